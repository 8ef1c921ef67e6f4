"""Rounds against servers of known latency, in virtual time."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from profiles.deploy.cluster import Usage
from profiles.load.recording import save_arrays
from profiles.load.summary import summarize
from profiles.measure.compare import UNKNOWN_FLOOR, compare_pairs
from profiles.measure.levels import Level, find_level
from profiles.measure.rounds import (
    AGAIN,
    Slot,
    compare_rounds,
    load_of,
    measure_in_round,
    reduce_rounds,
    round_order,
    run_until_valid,
    window_profile,
)
from profiles.testing import Queue, simulate
from registry.codec import file_sha256
from registry.errors import InputError
from registry.records import (
    Candidate,
    Capacity,
    ClosedLoop,
    EngineSpec,
    GateFinding,
    LoadProfile,
    Measurement,
    OpenLoop,
    Round,
    RunRecord,
    ServingProfile,
    Target,
)

QUICK = find_level("quick")
LOADS = ("0.8 saturation", "concurrency 1")


@dataclass
class FakeDeployment:
    candidate: Candidate
    target: Target
    load_time_s: float = 1.0
    statistics: None = None

    def usage(self) -> Usage:
        return Usage(cpu_s=0.0, rss_mb=0.0)


class SimulatedGenerator:
    """Offers windows to a queue in virtual time; another seed of service times in each window."""

    def __init__(self, service_s: float, spoil: int = 0) -> None:
        self.service_s = service_s
        self.spoil = spoil
        self.profiles: list[LoadProfile] = []

    def run(
        self, target: Target, payloads: Any, profile: LoadProfile, *, raw_path: Path, raw_root: Path, **_: Any
    ) -> RunRecord:
        law = Queue(self.service_s, service="exponential", seed=len(self.profiles))
        self.profiles.append(profile)
        recording = simulate(law, profile)
        save_arrays(raw_path, recording)
        record = summarize(
            recording,
            profile,
            raw=raw_path.relative_to(raw_root).as_posix(),
            raw_sha256=file_sha256(raw_path),
            usage=(0.002 * recording.answered, 80.0),
        )
        if self.spoil:
            self.spoil -= 1
            return replace(record, findings=(GateFinding(gate="steal", observed="9%", limit="2%"),))
        return record


def deployment(name: str) -> Any:
    candidate = Candidate(
        id=name,
        name=name,
        variant_id="v",
        variant_name="v",
        engine=EngineSpec(name="onnxruntime"),
        engine_version="1",
        serving=ServingProfile(server="mlserver", backend="burnish"),
        server_version="1",
    )
    return FakeDeployment(candidate, Target(url="127.0.0.1:1", protocol="grpc", model="m"))


def capacity(name: str, service_s: float, saturation_rps: float | None = None) -> Capacity:
    return Capacity(
        candidate_id=name,
        concurrency=2,
        ladder=((1, 0.9 / service_s), (2, 1 / service_s)),
        stages=(),
        saturation_rps=saturation_rps or 1 / service_s,
    )


def measured(
    generator: SimulatedGenerator, name: str, number: int, root: Path, *, again: bool = False, level: Level = QUICK
) -> Round:
    return measure_in_round(
        generator,  # type: ignore[arg-type]
        deployment(name),
        (),
        capacity(name, generator.service_s),
        LOADS,
        level=level,
        number=number,
        position=0,
        seed=5,
        raw_root=root,
        folder=root / "raw" / name / f"round-{number}",
        again=again,
    )


def campaign(root: Path, rounds: int = 5) -> list[Round]:
    base, fast = SimulatedGenerator(0.004), SimulatedGenerator(0.002)
    return [
        one
        for number in range(rounds)
        for one in (
            measured(base, "base", number, root),
            measured(fast, "fast", number, root),
            measured(base, "base", number, root, again=True),
        )
    ]


def test_order_is_chance_by_seed_and_round() -> None:
    slots = [Slot(f"c{n}") for n in range(8)] + [Slot("c0", again=True)]
    first = round_order(1, 0, slots)
    assert sorted(first) == sorted(slots)
    assert first == round_order(1, 0, list(reversed(slots)))
    assert len({round_order(1, number, slots) for number in range(6)}) == 6
    assert first != round_order(2, 0, slots)
    apart = [
        order.index(Slot("c0", again=True)) - order.index(Slot("c0"))
        for order in (round_order(1, number, slots) for number in range(40))
    ]
    assert min(apart) < -3 < 3 < max(apart)


def test_names_of_loads() -> None:
    found = capacity("c", 0.01, saturation_rps=90.0)
    assert load_of("closed", found) == ClosedLoop(concurrency=2)
    assert load_of("concurrency 4", found) == ClosedLoop(concurrency=4)
    assert load_of("100 rps", found) == OpenLoop(rate_rps=100)
    assert load_of("0.5 saturation", found) == OpenLoop(rate_rps=45)
    assert load_of("0.5 saturation", replace(found, saturation_rps=None)) is None
    for wrong in ("fast", "0.8", "-1 rps", "0 rps", "concurrency 0"):
        with pytest.raises(InputError, match=wrong):
            load_of(wrong, found)


def test_windows_grow_for_slow_candidates() -> None:
    fast = window_profile("0.8 saturation", capacity("c", 0.001), QUICK, seed=0)
    slow = window_profile("0.8 saturation", capacity("c", 0.02), QUICK, seed=0)
    assert fast is not None
    assert slow is not None
    assert fast.duration_s == QUICK.open_s
    assert slow.duration_s == pytest.approx(QUICK.requests / 40)


def test_a_round_holds_a_run_for_each_load(tmp_path: Path) -> None:
    one = measured(SimulatedGenerator(0.004), "c", 3, tmp_path)
    assert [run.load.name for run in one.runs] == ["closed", "0.8 saturation", "concurrency 1"]
    assert (one.candidate_id, one.number) == ("c", 3)
    for run in one.runs:
        assert (tmp_path / run.raw).is_file()
        assert run.raw.startswith("raw/c/round-3/")


def test_a_second_slot_is_told_from_the_first(tmp_path: Path) -> None:
    first = measured(SimulatedGenerator(0.004), "c", 0, tmp_path)
    again = measured(SimulatedGenerator(0.004), "c", 0, tmp_path, again=True)
    assert [run.load.name for run in again.runs] == [name + AGAIN for name in ("closed", *LOADS)]
    assert len({run.raw for run in (*first.runs, *again.runs)}) == 6
    assert not {run.load.seed for run in first.runs} & {run.load.seed for run in again.runs}


def test_candidates_share_arrivals_within_a_round_only(tmp_path: Path) -> None:
    one, other = SimulatedGenerator(0.004), SimulatedGenerator(0.002)
    measured(one, "one", 0, tmp_path)
    measured(other, "other", 0, tmp_path)
    measured(one, "one", 1, tmp_path)
    seeds = [profile.seed for profile in one.profiles]
    assert seeds[:3] == [profile.seed for profile in other.profiles]
    assert len(set(seeds)) == 6


def test_an_invalid_window_is_run_again_within_the_bound(tmp_path: Path) -> None:
    profile = LoadProfile(name="x", load=ClosedLoop(concurrency=1), warmup_s=0.0, duration_s=0.1)
    for spoilt, runs, valid in ((0, 1, True), (1, 2, True), (2, 3, True), (3, 3, False)):
        generator = SimulatedGenerator(0.001, spoil=spoilt)

        def run(profile: LoadProfile, path: Path, generator: SimulatedGenerator = generator) -> RunRecord:
            return generator.run(None, (), profile, raw_path=path, raw_root=tmp_path)  # type: ignore[arg-type]

        record = run_until_valid(run, profile, tmp_path / "w.npz", QUICK)
        assert (len(generator.profiles), record.valid) == (runs, valid)


def measurement(found: tuple[Measurement, ...], load: str | None) -> Measurement:
    return next(one for one in found if one.load == load)


def test_reduction(tmp_path: Path) -> None:
    rounds = campaign(tmp_path)
    found = reduce_rounds(
        "fast", rounds, capacity("fast", 0.002), raw_root=tmp_path, level=QUICK, load_time_s=(1.5, 2.0)
    )
    whole = measurement(found, None).metrics
    assert whole["max_throughput_rps"].value == pytest.approx(500, rel=0.1)
    assert whole["max_throughput_rps"].runs == 5
    assert whole["max_throughput_rps"].low is not None
    assert (whole["saturation_rps"].value, whole["saturation_rps"].low, whole["saturation_rps"].high) == (
        500,
        500,
        None,
    )
    assert whole["cpu_s_per_1k"].value == pytest.approx(2.0, rel=0.01)
    assert whole["rss_mb"].value == pytest.approx(80)
    assert 1.5 < whole["load_time_s"].value < 2.0
    # M/M/1 at 80 %: sojourn times are exponential with mean 10 ms; runs of a second from an empty queue fall short.
    loaded = measurement(found, "0.8 saturation").metrics
    assert 3 < loaded["latency_p50_ms"].value < 14
    assert loaded["latency_p90_ms"].value > loaded["latency_p50_ms"].value
    assert loaded["latency_p90_ms"].runs == 5
    assert set(loaded) >= {"latency_p50_ms", "latency_p90_ms", "service_p50_ms"}
    assert "latency_p99_ms" not in loaded
    alone = measurement(found, "concurrency 1").metrics
    assert alone["latency_p50_ms"].value == pytest.approx(2 * 0.693, rel=0.15)


def test_invalid_runs_are_left_out_and_counted(tmp_path: Path) -> None:
    rounds = campaign(tmp_path, rounds=2)
    spoilt = GateFinding(gate="steal", observed="9%", limit="2%")
    last = rounds[4]
    rounds[4] = replace(last, runs=tuple(replace(run, findings=(spoilt,)) for run in last.runs))
    found = reduce_rounds("fast", rounds, capacity("fast", 0.002), raw_root=tmp_path, level=QUICK)
    assert [one.invalid_runs for one in found] == [1, 1, 1]
    assert measurement(found, None).metrics["max_throughput_rps"].method == "single run"
    (comparison, *_) = compare_rounds("base", rounds, raw_root=tmp_path, level=QUICK)
    assert comparison.ratio.runs == 1
    assert comparison.word == "undecided"


def test_a_candidate_without_valid_runs_has_no_metrics(tmp_path: Path) -> None:
    spoilt = measured(SimulatedGenerator(0.002, spoil=99), "c", 0, tmp_path)
    found = reduce_rounds(
        "c", [spoilt], replace(capacity("c", 0.002), saturation_rps=None), raw_root=tmp_path, level=QUICK
    )
    assert all(not one.metrics and one.invalid_runs == 1 for one in found)


def test_comparison_with_the_baseline(tmp_path: Path) -> None:
    comparisons = {
        (one.metric, one.load): one
        for one in compare_rounds("base", campaign(tmp_path), raw_root=tmp_path, level=QUICK)
    }
    assert set(comparisons) == {
        ("max_throughput_rps", None),
        ("latency_p50_ms", "0.8 saturation"),
        ("latency_p90_ms", "0.8 saturation"),
        ("latency_p50_ms", "concurrency 1"),
        ("latency_p90_ms", "concurrency 1"),
    }
    throughput = comparisons["max_throughput_rps", None]
    assert throughput.word == "faster"
    assert throughput.ratio.value == pytest.approx(2, rel=0.15)
    assert throughput.noise_floor >= 0.02
    assert comparisons["latency_p50_ms", "concurrency 1"].word == "faster"
    assert {one.candidate_id for one in comparisons.values()} == {"fast"}


def test_only_the_arrays_that_were_measured_are_reduced(tmp_path: Path) -> None:
    rounds = campaign(tmp_path, rounds=2)
    path = tmp_path / rounds[1].runs[1].raw
    others = (tmp_path / rounds[4].runs[1].raw).read_bytes()

    def reduce() -> Any:
        return reduce_rounds("fast", rounds, capacity("fast", 0.002), raw_root=tmp_path, level=QUICK)

    reduce()
    for spoil in (lambda: path.write_bytes(others), lambda: path.write_bytes(others[:100]), path.unlink):
        spoil()
        with pytest.raises(InputError, match=str(path)) as caught:
            reduce()
        assert "Restore the file, or remove the working folder" in str(caught.value)
        with pytest.raises(InputError, match=str(path)):
            compare_rounds("base", rounds, raw_root=tmp_path, level=QUICK)


def test_the_noise_floor_comes_from_the_baselines_two_runs(tmp_path: Path) -> None:
    rounds = campaign(tmp_path)
    noisy = []
    for one in rounds:
        again = [run for run in one.runs if run.load.name == "closed" + AGAIN]
        doubled = {run.raw: replace(run, metrics={**run.metrics, "throughput_rps": 900.0}) for run in again}
        noisy.append(replace(one, runs=tuple(doubled.get(run.raw, run) for run in one.runs)))
    found = compare_rounds("base", noisy, raw_root=tmp_path, level=QUICK)
    (throughput,) = (one for one in found if one.metric == "max_throughput_rps")
    assert throughput.noise_floor > 2
    assert throughput.word == "undecided"


def test_where_no_second_run_is_valid_nobody_knows_the_noise(tmp_path: Path) -> None:
    spoilt = GateFinding(gate="steal", observed="9%", limit="2%")
    rounds = [
        replace(
            one,
            runs=tuple(replace(run, findings=(spoilt,)) if run.load.name.endswith(AGAIN) else run for run in one.runs),
        )
        for one in campaign(tmp_path)
    ]
    found = compare_rounds("base", rounds, raw_root=tmp_path, level=QUICK)
    assert {one.noise_floor for one in found} == {UNKNOWN_FLOOR}
    (throughput,) = (one for one in found if one.metric == "max_throughput_rps")
    assert throughput.word == "faster"  # twice as fast is beyond it
    pairs = [(100, 100), (100, 101), (100, 99), (101, 100)]
    like = compare_pairs(pairs, candidate_id="c", baseline_id="b", metric="x_ms", load=None, noise_floor=UNKNOWN_FLOOR)
    assert like.word == "undecided"
