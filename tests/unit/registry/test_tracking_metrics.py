"""A campaign's numbers as metrics and curves: no MLflow in here."""

import dataclasses
import re
from collections.abc import Mapping

import pytest

from registry import tracked, tracked_metrics
from registry.records import Breakdown, Campaign, Capacity, CapacityAdvice, RateStage, RunRecord, Spectrum
from registry.tracked_metrics import Point
from tests.doubles import campaigns, searches


def steps(points: list[Point], name: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in points if point.name == name]


def with_runs(change: Mapping[str, float], **given: object) -> Campaign:
    """The campaign, its runs with further metrics."""
    made = campaigns.campaign()

    def changed(run: RunRecord) -> RunRecord:
        return dataclasses.replace(run, metrics={**run.metrics, **change}, **given)

    rounds = tuple(
        dataclasses.replace(one, runs=tuple(changed(run) for run in one.runs)) for one in campaigns.campaign().rounds
    )
    return dataclasses.replace(made, rounds=rounds)


def test_names_hold_only_what_a_tracker_takes() -> None:
    made = with_runs({"rss_mb": 240.0})
    for candidate in made.candidates:
        points = [
            *tracked_metrics.curves(made, candidate),
            *tracked_metrics.round_curves(made, candidate),
            *tracked_metrics.system_metrics(made, candidate),
        ]
        names = [*tracked_metrics.metrics(made, candidate), *(point.name for point in points)]
        assert len(names) > 30
        assert all(re.fullmatch(r"[A-Za-z0-9_./-]+", name) for name in names)


@pytest.mark.parametrize(
    ("metric", "load", "name"),
    [
        ("latency_p90_ms", "0.8 saturation", "latency_p90_ms.at_0.8_saturation"),
        ("latency_p99_ms", "100 rps", "latency_p99_ms.at_100_rps"),
        ("cosine./model/out:0", None, "cosine./model/out_0"),
        ("cosine.a//b", None, "cosine.a__b"),
        ("cosine.x/../y", None, "cosine.x_.._y"),
        ("../up", None, ".._up"),
        ("/root", None, "_root"),
    ],
)
def test_a_name_is_one_that_mlflow_takes(metric: str, load: str | None, name: str) -> None:
    assert tracked_metrics.name_of(metric, load) == name


def test_a_long_name_keeps_its_beginning_and_stays_unique() -> None:
    first, second = (tracked_metrics.name_of(f"cosine.{'x' * 400}{end}") for end in "ab")
    assert first != second
    assert first.startswith("cosine.xxx")
    assert len(first) == len(second) == 240


def test_an_estimate_is_three_metrics() -> None:
    found = tracked_metrics.metrics(campaigns.campaign(), campaigns.STATIC_TRITON)
    assert found["latency_p90_ms.at_0.8_saturation_low"] < found["latency_p90_ms.at_0.8_saturation"]
    assert found["latency_p90_ms.at_0.8_saturation_high"] > found["latency_p90_ms.at_0.8_saturation"]
    assert found["ratio.max_throughput_rps"] == pytest.approx(2.7167, abs=1e-3)
    unknown = tracked_metrics.metrics(campaigns.campaign(), campaigns.OPENVINO_TRITON)
    assert "latency_p90_ms.at_0.8_saturation" not in unknown


def test_the_models_own_numbers_and_those_of_its_serving_are_told_apart() -> None:
    made, candidate = campaigns.campaign(), campaigns.STATIC_TRITON
    judged = tracked_metrics.judged_metrics(made, candidate)
    own, served = tracked_metrics.model_metrics(made, candidate), tracked_metrics.served_metrics(made, candidate)
    assert {"accuracy", "accuracy_drop_high", "flip_rate"} <= set(judged)
    assert own["size_mb"] == pytest.approx(0.331)
    assert own["inprocess_ms.batch_1"] == 0.46
    assert "max_throughput_rps" in served
    assert judged | served | own == tracked_metrics.metrics(made, candidate)


def test_a_curve_has_a_step_for_each_rate() -> None:
    points = tracked_metrics.curves(campaigns.campaign(), campaigns.BASELINE)
    assert len({(point.name, point.step) for point in points}) == len(points)
    assert {point.name for point in points} == {
        "curve/achieved_rps", "curve/closed_rps", "curve/latency_p50_ms", "curve/latency_p90_ms",
        "curve/measured_latency_p50_ms", "curve/measured_latency_p90_ms",
    }  # fmt: skip
    assert [step for step, _ in steps(points, "curve/closed_rps")] == [1, 2, 4, 8]
    (measured,) = steps(points, "curve/measured_latency_p90_ms")
    assert measured[0] == round(0.8 * 412.0)


def test_rates_that_round_to_one_step_keep_their_points() -> None:
    made = campaigns.campaign()
    stages = tuple(
        RateStage(offered_rps=rate, achieved_rps=rate, latency_p50_ms=100 * rate, latency_p90_ms=None, sustained=True)
        for rate in (0.6, 0.9, 1.1, 4.0)
    )
    slow = Capacity(candidate_id=campaigns.BASELINE.id, concurrency=1, ladder=(), stages=stages, saturation_rps=4.0)
    points = tracked_metrics.curves(dataclasses.replace(made, capacities=(slow,)), campaigns.BASELINE)
    assert steps(points, "curve/latency_p50_ms") == [(1, 60.0), (2, 90.0), (3, pytest.approx(110.0)), (4, 400.0)]
    assert [point.at for point in points if point.name == "curve/latency_p50_ms"] == [0.6, 0.9, 1.1, 4.0]


def test_each_valid_window_is_a_step_of_its_round() -> None:
    points = tracked_metrics.round_curves(campaigns.campaign(), campaigns.OPENVINO_TRITON)
    assert [step for step, _ in steps(points, "round/throughput_rps.at_closed")] == [1, 2, 3]
    assert [step for step, _ in steps(points, "round/latency_p90_ms.at_0.8_saturation")] == [1, 3]


def test_the_parts_of_a_requests_time_are_curves_as_far_as_the_server_tells() -> None:
    told = Breakdown(requests=9, lateness_ms=0.1, service_ms=5.0, queue_ms=1.5, compute_ms=2.5)
    points = tracked_metrics.round_curves(with_runs({}, breakdown=told), campaigns.BASELINE)
    assert steps(points, "round/queue_ms.at_closed") == [(1, 1.5), (2, 1.5), (3, 1.5)]
    assert steps(points, "round/network_ms.at_closed") == []


def test_what_processes_took_is_told_in_mlflows_units() -> None:
    used = {"rss_mb": 240.0, "cpu_s_per_1k": 2.0, "client_cpu": 0.5, "gpu_memory_mb": 90.0, "gpu_utilisation": 0.25}
    points = tracked_metrics.system_metrics(with_runs(used), campaigns.BASELINE)
    first = {point.name: point.value for point in points if point.step == 1}
    assert first["system/server_memory_usage_megabytes.at_closed"] == 240.0
    # 452.2 requests a second of 2 ms each keep 0.904 of a core busy.
    assert first["system/server_cpu_utilization_percentage.at_closed"] == pytest.approx(90.44)
    assert first["system/client_cpu_utilization_percentage.at_closed"] == 50.0
    assert first["system/gpu_memory_usage_megabytes.at_closed"] == 90.0
    assert first["system/gpu_utilization_percentage.at_closed"] == 25.0
    assert tracked_metrics.system_metrics(campaigns.campaign(), campaigns.BASELINE) == []


def test_ratios_to_the_baseline_and_to_the_champion_are_told_apart() -> None:
    made = campaigns.campaign()
    (plain,) = [one for one in made.comparisons if one.candidate_id == campaigns.STATIC_TRITON.id]
    champion = campaigns.OPENVINO_TRITON.id
    against = dataclasses.replace(
        plain, baseline_id=champion, ratio=dataclasses.replace(plain.ratio, value=1.2, low=1.1, high=1.3)
    )
    judged = dataclasses.replace(
        made, comparisons=(*made.comparisons, against), verdict=dataclasses.replace(made.verdict, champion=champion)
    )
    found = tracked_metrics.metrics(judged, campaigns.STATIC_TRITON)
    assert found["ratio_vs_champion.max_throughput_rps_high"] == 1.3
    assert found["ratio.max_throughput_rps"] == plain.ratio.value
    tags = tracked.tags(judged, campaigns.OPENVINO_TRITON)
    assert (tags["burnish.champion"], tags["burnish.baseline"]) == ("true", "false")


def test_a_champion_that_is_the_baseline_gives_both_ratios() -> None:
    made = campaigns.campaign()
    verdict = dataclasses.replace(made.verdict, champion=campaigns.BASELINE.id)
    found = tracked_metrics.metrics(dataclasses.replace(made, verdict=verdict), campaigns.STATIC_TRITON)
    assert found["ratio_vs_champion.max_throughput_rps"] == found["ratio.max_throughput_rps"]


def test_what_follows_from_a_capacity_and_the_percentiles_are_metrics() -> None:
    here = campaigns.BASELINE.id
    advice = CapacityAdvice(
        candidate_id=here, knee=4, law={"sigma": campaigns.estimate(0.1, 0.02, "1")}, explanation="", lines=(),
        target_rps=(200.0, 300.0),
    )  # fmt: skip
    spectrum = Spectrum(candidate_id=here, load="100 rps", requests=5000, points=((50.0, 4.0), (99.9, 21.0)))
    made = dataclasses.replace(campaigns.campaign(), advice=(advice,), spectra=(spectrum,))
    found = tracked_metrics.metrics(made, campaigns.BASELINE)
    assert (found["advice.knee_concurrency"], found["advice.sigma_high"]) == (4.0, pytest.approx(0.12))
    assert (found["advice.target_rps_low"], found["advice.target_rps_high"]) == (200.0, 300.0)
    points = tracked_metrics.spectrum_curves(made, campaigns.BASELINE)
    assert steps(points, "spectrum/latency_ms.at_100_rps") == [(5000, 4.0), (9990, 21.0)]
    assert tracked_metrics.spectrum_curves(made, campaigns.STATIC_TRITON) == []


def test_a_search_is_its_looks_and_the_best_so_far() -> None:
    points = tracked_metrics.search_curves(searches.search())
    assert steps(points, "search/closed_rps") == [(1, 450.0), (3, 610.0), (4, 580.0)]
    assert steps(points, "search/best_rps") == [(1, 450.0), (2, 450.0), (3, 610.0), (4, 610.0)]


def test_the_tables_hold_what_steps_cannot() -> None:
    made = campaigns.campaign()
    table = tracked.curves_table(made)
    rates = [row[2] for row in table["data"] if row[:2] == [campaigns.BASELINE.name, "curve/latency_p90_ms"]]
    assert rates == [91.6, 183.1, 274.7, 366.2, 412.0, 448.6]
    looks = tracked.search_table(searches.search())["data"]
    assert [(row[1], row[2], row[6], row[7]) for row in looks][1:3] == [
        ("mlserver-grpc-b64", None, "the server died", False),
        ("mlserver-grpc-b16-d5", 610.0, "", True),
    ]
