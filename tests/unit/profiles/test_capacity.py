"""The search for capacity against servers of known capacity, in virtual time."""

from dataclasses import replace

import pytest

from profiles.load.summary import summarize
from profiles.measure.capacity import Run, estimate_saturation, find_capacity, keeps_up, told_saturation
from profiles.measure.levels import find_level
from profiles.testing import Law, Queue, simulate
from registry.records import Capacity, ClosedLoop, GateFinding, LoadProfile, OpenLoop, RateStage, RunRecord

QUICK, STANDARD = find_level("quick"), find_level("standard")


def runner(service_s: float, workers: int = 1, service: str = "fixed") -> Run:
    seeds = iter(range(10_000))

    def run(profile: LoadProfile) -> RunRecord:
        law: Law = Queue(service_s, workers=workers, service=service, seed=next(seeds))  # type: ignore[arg-type]
        return summarize(simulate(law, profile), profile, raw="r")

    return run


@pytest.mark.parametrize("level", [QUICK, STANDARD], ids=["quick", "standard"])
@pytest.mark.parametrize(("service_s", "workers"), [(0.001, 1), (0.005, 1), (0.02, 1), (0.02, 4), (0.1, 2)])
@pytest.mark.parametrize("service", ["fixed", "exponential"])
def test_finds_the_rate_of_a_queue(level, service_s: float, workers: int, service: str) -> None:
    true_rps = workers / service_s
    capacity = find_capacity(runner(service_s, workers, service), level, candidate_id="c")
    noisy = 0.25 if service == "exponential" else 0.0
    assert capacity.saturation_rps is not None
    # Ten per cent between stages; a queue fed evenly at exactly its rate keeps up.
    assert true_rps * (0.84 - noisy) <= capacity.saturation_rps <= true_rps * (1.03 + noisy)
    assert max(rps for _, rps in capacity.ladder) == pytest.approx(true_rps, rel=0.02 + noisy)
    assert capacity.candidate_id == "c"


def test_the_ladder_stops_when_it_gains_nothing() -> None:
    capacity = find_capacity(runner(0.005), QUICK, candidate_id="c")
    assert [concurrency for concurrency, _ in capacity.ladder] == [1, 2, 4]
    assert [n for n, _ in find_capacity(runner(0.005, workers=4), QUICK, candidate_id="c").ladder] == [1, 2, 4, 8, 16]


def test_stages_rise_and_stop_after_two_that_fail() -> None:
    capacity = find_capacity(runner(0.002), STANDARD, candidate_id="c")
    rates = [stage.offered_rps for stage in capacity.stages]
    assert rates == sorted(rates)
    assert [stage.sustained for stage in capacity.stages].count(False) <= 2
    assert capacity.stages[0].sustained
    assert capacity.stages[0].latency_p50_ms == pytest.approx(2, abs=0.1)


def test_a_server_that_fails_has_no_saturation_point() -> None:
    def run(profile: LoadProfile) -> RunRecord:
        record = runner(0.002)(profile)
        return replace(record, ok=0, errors={"status": record.scheduled})

    capacity = find_capacity(run, QUICK, candidate_id="c")
    assert capacity.saturation_rps is None
    assert not any(stage.sustained for stage in capacity.stages)
    assert len(capacity.ladder) == 1


def test_a_lower_stage_is_tried_where_none_is_sustained() -> None:
    # As a server that falls apart under open load: fast in a closed loop, a third of it in the open.
    def run(profile: LoadProfile) -> RunRecord:
        return runner(0.001 if isinstance(profile.load, ClosedLoop) else 0.003)(profile)

    capacity = find_capacity(run, QUICK, candidate_id="c")
    assert capacity.saturation_rps == pytest.approx(300, rel=0.01)
    assert capacity.stages[0].offered_rps < capacity.stages[1].offered_rps


def test_a_window_that_the_client_spoiled_is_run_again_and_never_sustained() -> None:
    asked: list[LoadProfile] = []

    def run(profile: LoadProfile) -> RunRecord:
        asked.append(profile)
        record = runner(0.002)(profile)
        if isinstance(profile.load, ClosedLoop):
            return record
        busy = GateFinding(gate="client_cpu", observed="95%", limit="70%")
        return replace(record, findings=(busy,))

    capacity = find_capacity(run, QUICK, candidate_id="c")
    assert capacity.saturation_rps is None
    assert capacity.stages[0].findings[0].gate == "client_cpu"
    opened = [profile for profile in asked if not isinstance(profile.load, ClosedLoop)]
    assert len(opened) == 2 * len(capacity.stages)


def test_a_late_client_does_not_unmake_what_the_server_sustained() -> None:
    def run(profile: LoadProfile) -> RunRecord:
        late = GateFinding(gate="lateness", observed="p99 9 ms", limit="1 ms")
        return replace(runner(0.002)(profile), findings=(late,))

    capacity = find_capacity(run, QUICK, candidate_id="c")
    assert capacity.saturation_rps == pytest.approx(500, rel=0.01)
    assert capacity.stages[0].findings[0].gate == "lateness"


@pytest.mark.parametrize(
    ("seen", "kept_up"),
    [
        ({"in_flight_end": 60.0}, False),
        ({"in_flight_end": 29.0}, True),
        # Slow answers: as many in flight at the end as at the beginning are no backlog.
        ({"in_flight_start": 200.0, "in_flight_end": 210.0}, True),
        ({"latency_first_third_ms": 10.0, "latency_last_third_ms": 29.0}, True),
        ({"latency_first_third_ms": 10.0, "latency_last_third_ms": 31.0}, False),
        # A slow model's latency may wander by half of itself.
        ({"latency_first_third_ms": 300.0, "latency_last_third_ms": 440.0}, True),
    ],
)
def test_keeping_up(seen: dict[str, float], kept_up: bool) -> None:
    load = LoadProfile(name="capacity", load=OpenLoop(rate_rps=1000), warmup_s=0.2, duration_s=1.0)
    metrics = {"throughput_rps": 1000.0, "in_flight_start": 0.0, "in_flight_end": 0.0, **seen}
    record = RunRecord(
        load=load, scheduled=1000, ok=1000, errors={}, window_s=1.0, metrics=metrics, findings=(), raw="r"
    )
    assert keeps_up(record, concurrency=4) == kept_up
    assert not keeps_up(replace(record, errors={"timeout": 11}), concurrency=4)
    assert keeps_up(replace(record, errors={"timeout": 10}), concurrency=4) == kept_up


def stage(offered_rps: float, sustained: bool, *gates: str) -> RateStage:
    return RateStage(
        offered_rps=offered_rps,
        achieved_rps=offered_rps,
        latency_p50_ms=None,
        latency_p90_ms=None,
        sustained=sustained,
        findings=tuple(GateFinding(gate=gate, observed="x", limit="y") for gate in gates),
    )


@pytest.mark.parametrize(
    ("above", "high"),
    [
        ([], None),
        ([stage(110, False), stage(120, False)], 110),
        # What the client spoiled says nothing of the server; a late client does not excuse it.
        ([stage(110, False, "client_cpu"), stage(120, False, "lateness")], 120),
        ([stage(110, False, "in_flight"), stage(120, False, "client_cpu")], None),
    ],
)
def test_the_saturation_point_lies_between_two_stages(above: list[RateStage], high: float | None) -> None:
    tried = (stage(80, True), stage(90, False), stage(100, True), *above)
    capacity = Capacity(candidate_id="c", concurrency=1, ladder=(), stages=tried, saturation_rps=100)
    estimate = estimate_saturation(capacity)
    assert estimate is not None
    assert (estimate.low, estimate.value, estimate.high, estimate.method) == (100, 100, high, "stage grid")
    assert estimate_saturation(replace(capacity, saturation_rps=None)) is None


@pytest.mark.parametrize(
    ("saturation_rps", "stages", "said"),
    [
        (123.4, 1, "saturates at 123 requests a second"),
        (0.4321, 1, "saturates at 0.43 requests a second"),
        (None, 1, "keeps up with none of the rates that were tried"),
        (None, 0, "answers nothing in a closed loop"),
    ],
)
def test_where_something_saturates_is_told_as_far_as_it_is_known(
    saturation_rps: float | None, stages: int, said: str
) -> None:
    tried = (stage(100, False),) * stages
    capacity = Capacity(candidate_id="c", concurrency=1, ladder=(), stages=tried, saturation_rps=saturation_rps)
    assert told_saturation(capacity) == said
