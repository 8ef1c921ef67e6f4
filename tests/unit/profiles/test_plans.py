"""Load profiles of YAML, and what carrying them out asks of a server, in virtual time."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from profiles.load.library import LoadPlan, load_plan, shipped_plans
from profiles.load.recording import save_arrays
from profiles.load.summary import summarize
from profiles.measure.plans import Planned, run_plan
from profiles.testing import Queue, simulate
from registry.codec import file_sha256, from_jsonable, to_jsonable
from registry.errors import DocumentError, InputError
from registry.records import ClosedLoop, LoadProfile, OpenLoop, Replay, RunRecord, Target

TARGET = Target(url="127.0.0.1:1", protocol="grpc", model="m")


class VirtualGenerator:
    """Offers windows to a server of 200 requests a second, in no time, and remembers what was asked."""

    def __init__(self, service: Literal["fixed", "exponential"] = "exponential") -> None:
        self.service = service
        self.offered: list[LoadProfile] = []

    def law(self) -> Queue:
        """How it answers in the window that is offered now."""
        return Queue(0.005, service=self.service, seed=len(self.offered))

    def run(self, target: Target, payloads: Any, profile: LoadProfile, *, raw_path: Path, raw_root: Path) -> RunRecord:
        self.offered.append(profile)
        save_arrays(raw_path, recording := simulate(self.law(), profile))
        name = raw_path.relative_to(raw_root).as_posix()
        return summarize(recording, profile, raw=name, raw_sha256=file_sha256(raw_path))


def carry_out(tmp_path: Path, plan: LoadPlan, **law: Any) -> tuple[Planned, list[LoadProfile]]:
    generator = VirtualGenerator(**law)
    found = run_plan(generator, TARGET, (), plan, seed=1, raw_root=tmp_path)  # type: ignore[arg-type]
    return found, generator.offered


def written(tmp_path: Path, text: str) -> LoadPlan:
    (tmp_path / "my.yaml").write_text(text, encoding="utf-8")
    return load_plan(str(tmp_path / "my.yaml"))


def test_what_ships_is_valid_and_each_of_its_own_kind() -> None:
    assert set(shipped_plans()) == {"closed", "poisson", "staged", "sweep", "slo", "replay"}
    kinds = {
        name: load_plan(name, arrivals=Path("t.txt") if name == "replay" else None).load.kind
        for name in shipped_plans()
    }
    assert kinds == {name: "open" if name == "poisson" else name for name in kinds}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("load:\n  kind: stagd\n", r"my.yaml:2: load.kind: 'stagd'.*did you mean 'staged'"),
        ("load:\n  kind: open\n  rates_rps: [5]\nrns: 2\n", r"my.yaml:4: rns.*did you mean 'runs'"),
        ("load:\n  kind: staged\n  shares: [0.5, 0.4]\n", "shares have to rise"),
        ("load:\n  kind: open\n", "and not both"),
        ("load:\n  kind: closed\n  concurrency: [0]\n", r"my.yaml:3: load.concurrency\[0\]: 0: must be greater"),
        ("load:\n  kind: open\n  rates_rps: [.inf]\n", r"my.yaml:3: load.rates_rps\[0\]"),
        ("load:\n  kind: closed\n  concurrency: [1]\nduration_s: .inf\n", "my.yaml:4: duration_s"),
    ],
)
def test_a_file_that_is_no_load_profile_is_told_where(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(DocumentError, match=problem):
        written(tmp_path, text)


def test_names_and_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no load profile 'stagd'") as error:
        load_plan("stagd")
    assert "staged" in str(error.value)
    with pytest.raises(DocumentError, match="there is no file"):
        load_plan(str(tmp_path / "absent.yaml"))
    with pytest.raises(InputError, match="needs recorded arrivals"):
        load_plan("replay")
    with pytest.raises(InputError, match="is for a replay"):
        load_plan("closed", arrivals=tmp_path / "times.txt")


def test_a_closed_loop_at_each_concurrency(tmp_path: Path) -> None:
    plan = written(tmp_path, "load:\n  kind: closed\n  concurrency: [1, 10, 2]\nruns: 2\n")
    found, offered = carry_out(tmp_path, plan)
    assert [profile.load for profile in offered] == [ClosedLoop(concurrency=n) for n in (1, 10, 2)] * 2
    assert [one.load for one in found.measurements] == ["concurrency 1", "concurrency 10", "concurrency 2"]
    assert all(one.metrics["throughput_rps"].value == pytest.approx(200, rel=0.1) for one in found.measurements)


def test_stages_ramp_hold_and_end_where_nothing_is_sustained(tmp_path: Path) -> None:
    text = "load:\n  kind: staged\n  rates_rps: [100, 150, 250, 300, 400]\n  ramp_s: 1.5\nduration_s: 8\nruns: 1\n"
    found, offered = carry_out(tmp_path, written(tmp_path, text), service="fixed")
    opened = [profile.load for profile in offered]
    assert all(isinstance(load, OpenLoop) and load.arrivals == "constant" for load in opened)
    assert [(load.ramp_from_rps, load.rate_rps) for load in opened if isinstance(load, OpenLoop)] == [
        (0, 100), (100, 150), (150, 250), (250, 300),
    ]  # fmt: skip
    assert {(profile.warmup_s, profile.duration_s) for profile in offered} == {(1.5, 8.0)}
    assert found.capacity is not None
    assert found.capacity.saturation_rps == 150
    assert [stage.sustained for stage in found.capacity.stages] == [True, True, False, False]


def test_a_rate_that_one_run_did_not_come_to_is_not_sustained_in_all(tmp_path: Path) -> None:
    class Waking(VirtualGenerator):
        """Half as fast for the first windows as it then is."""

        def law(self) -> Queue:
            return Queue(0.01 if len(self.offered) <= 3 else 0.005, service="fixed", seed=len(self.offered))

    text = "load:\n  kind: staged\n  rates_rps: [80, 130, 150, 170]\nduration_s: 8\nruns: 2\n"
    generator = Waking()
    found = run_plan(generator, TARGET, (), written(tmp_path, text), seed=1, raw_root=tmp_path)  # type: ignore[arg-type]
    assert [len(one.runs) for one in found.rounds] == [3, 4]
    assert found.capacity is not None
    assert [stage.sustained for stage in found.capacity.stages] == [True, False, False, False]
    assert found.capacity.saturation_rps == 80


def test_stages_may_be_shares_of_what_the_server_can(tmp_path: Path) -> None:
    found, _ = carry_out(tmp_path, load_plan("staged"))
    assert found.capacity is not None
    assert found.capacity.saturation_rps == pytest.approx(200, rel=0.2)


def test_poisson_arrivals_at_shares_of_the_saturation_point(tmp_path: Path) -> None:
    found, offered = carry_out(tmp_path, load_plan("poisson"))
    assert found.capacity is not None
    assert [one.load for one in found.measurements] == [None, "0.5 saturation", "0.8 saturation"]
    rates = {load.rate_rps for profile in offered[-6:] if isinstance(load := profile.load, OpenLoop)}
    assert rates == {share * (found.capacity.saturation_rps or 0) for share in (0.5, 0.8)}


def test_a_sweep_goes_from_concurrency_to_rates(tmp_path: Path) -> None:
    found, offered = carry_out(tmp_path, load_plan("sweep").model_copy(update={"runs": 1, "duration_s": 8.0}))
    assert [type(profile.load) for profile in offered] == [ClosedLoop] * 6 + [OpenLoop] * 6
    medians = [one.metrics["latency_p50_ms"].value for one in found.measurements[-6:]]
    assert medians[0] < medians[-1]


def test_near_the_most_that_a_sweep_found_a_tail_has_no_upper_end(tmp_path: Path) -> None:
    text = "load:\n  kind: sweep\n  concurrency: [8]\n  shares: [0.3, 0.95]\nduration_s: 8\n"
    found, _ = carry_out(tmp_path, written(tmp_path, text))
    assert found.measurements[0].load == "concurrency 8"
    low, high = (one.metrics["latency_p90_ms"] for one in found.measurements[-2:])
    assert low.high is not None
    assert (high.high, "near saturation" in high.method) == (None, True)
    assert not any("saturation_rps" in one.metrics for one in found.measurements)  # it was not looked for


def test_a_replay_lasts_as_long_as_its_recording(tmp_path: Path) -> None:
    times = np.random.default_rng(0).uniform(50, 53, 400)
    (tmp_path / "times.txt").write_text("\n".join(map(str, times)), encoding="utf-8")
    plan = written(tmp_path, "load:\n  kind: replay\n  file: times.txt\n  speed: 2\nruns: 2\n")
    found, offered = carry_out(tmp_path, plan)
    assert [profile.duration_s for profile in offered] == [pytest.approx(1.5, abs=0.05)] * 2
    assert [run.scheduled for one in found.rounds for run in one.runs] == [400, 400]
    assert from_jsonable(LoadProfile, to_jsonable(offered[0])) == offered[0]
    assert isinstance(offered[0].load, Replay)


def test_the_highest_rate_that_keeps_a_limit(tmp_path: Path) -> None:
    # M/M/1 at 200 a second: p99 is ln(100) / (200 - rate), which is 100 ms at 154 a second.
    found, _ = carry_out(tmp_path, load_plan("slo").model_copy(update={"duration_s": 20.0}))
    assert found.slo is not None
    assert found.slo.rate_rps is not None
    assert 100 < found.slo.rate_rps < 165
    assert not list(tmp_path.glob("slo*"))


def test_every_window_is_told_as_soon_as_it_is_there(tmp_path: Path) -> None:
    told: list[tuple[int, str]] = []
    plan = written(tmp_path, "load:\n  kind: closed\n  concurrency: [1, 2]\nruns: 2\n")
    run_plan(
        VirtualGenerator(),  # type: ignore[arg-type]
        TARGET,
        (),
        plan,
        seed=0,
        raw_root=tmp_path,
        on_run=lambda number, record: told.append((number, record.load.name)),
    )
    assert told == [(0, "concurrency 1"), (0, "concurrency 2"), (1, "concurrency 1"), (1, "concurrency 2")]
