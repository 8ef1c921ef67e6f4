import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optimize import comparing
from optimize.cli import main
from optimize.comparing import Asked, Pair, compare_candidates, compare_live, compare_recorded, kind_of
from optimize.reporting import write_campaign
from profiles.load.ceiling import Ceilings
from profiles.measure.recorded import FILE, read_recorded
from registry.errors import InputError
from registry.records import Campaign, Failure, GateFinding, Round, RunRecord, Target
from tests.doubles.campaigns import campaign
from tests.doubles.loads import StatedGenerator

RATES = {"float32": 100.0, "int8": 150.0, "same": 100.0}


# --- candidates of a campaign


def closed_only(made: Campaign) -> Campaign:
    """The campaign without loads whose arrays nobody has."""
    rounds = tuple(
        replace(one, runs=tuple(run for run in one.runs if run.load.name.startswith("closed"))) for one in made.rounds
    )
    return replace(made, rounds=rounds)


def folder_of(made: Campaign, work: Path) -> Path:
    write_campaign(made, work)
    return work


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return folder_of(closed_only(campaign(level="standard")), tmp_path)


def test_two_candidates_of_a_campaign(work: Path) -> None:
    [pair] = compare_candidates(work, "float32 @ mlserver-grpc-b8-d2", "int8-static @ mlserver-grpc-b8-d2")
    assert pair.chosen is not None
    assert pair.chosen.metric == "max_throughput_rps"
    assert pair.chosen.word == "faster"
    assert 1.9 < pair.chosen.ratio.value < 2.0
    assert "int8-static @ mlserver-grpc-b8-d2" in pair.sentence
    assert {what for what, _, _ in pair.differences} >= {"variant", "stages"}
    assert not {"server", "engine version"} & {what for what, _, _ in pair.differences}
    assert ("accuracy_drop", None) in pair.metrics[1]


def test_the_other_way_round_says_the_reverse(work: Path) -> None:
    [there] = compare_candidates(work, "float32 @ mlserver-grpc-b8-d2", "int8-static @ mlserver-grpc-b8-d2")
    [back] = compare_candidates(work, "int8-static @ mlserver-grpc-b8-d2", "float32 @ mlserver-grpc-b8-d2")
    assert there.chosen is not None
    assert back.chosen is not None
    assert back.chosen.ratio.value == pytest.approx(1 / there.chosen.ratio.value)
    assert {there.chosen.word, back.chosen.word} in ({"faster", "slower"}, {"undecided"})


def test_variants_stand_for_their_candidates_where_these_are_served_alike(work: Path) -> None:
    pairs = compare_candidates(work, "float32", "int8-static")
    assert all(one.names[0].split(" @ ")[1] == one.names[1].split(" @ ")[1] for one in pairs)
    assert pairs


def test_what_cannot_be_compared_is_told(work: Path) -> None:
    with pytest.raises(InputError, match="is no candidate") as error:
        compare_candidates(work, "float32", "int8-statik")
    assert "int8-static" in (error.value.hint or "")
    with pytest.raises(InputError, match="in process"):
        compare_candidates(work, "float32", "int8-dynamic")
    with pytest.raises(InputError, match="with itself"):
        compare_candidates(work, "float32 @ mlserver-grpc-b8-d2", "float32 @ mlserver-grpc-b8-d2")
    with pytest.raises(InputError, match="no finished campaign"):
        compare_candidates(work / "none", "a", "b")


def test_a_candidate_without_rounds_says_why(tmp_path: Path) -> None:
    made = closed_only(campaign(level="standard"))
    dead = next(one for one in made.candidates if one.name == "int8-static @ mlserver-grpc-b8-d2")
    failure = Failure(subject=dead.name, phase="deploy", kind="died", reason="the server ended")
    rounds = tuple(one for one in made.rounds if one.candidate_id != dead.id)
    work = folder_of(replace(made, rounds=rounds, failures=(*made.failures, failure)), tmp_path)
    with pytest.raises(InputError, match="the server ended"):
        compare_candidates(work, "float32 @ mlserver-grpc-b8-d2", dead.name)


# --- live endpoints and their records


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    path = tmp_path / "samples.npz"
    np.savez(path, x=np.ones((4, 2), dtype=np.float32))
    return path


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch, samples: Path) -> Callable[..., Pair]:
    monkeypatch.setattr(comparing, "LoadGenerator", StatedGenerator(RATES))

    def compare(first: str, second: str, **given: Any) -> Pair:
        return compare_live(first, second, Asked(samples=samples, rate_rps=40, **given))

    return compare


def test_live_endpoints_are_measured_and_their_records_compared_as_pairs(
    live: Callable[..., Pair], tmp_path: Path
) -> None:
    out = tmp_path / "kept"
    told = live("127.0.0.1:1/float32", "localhost:2/int8", out=out)
    assert told.chosen is not None
    assert told.chosen.word == "faster"
    assert told.sentence.startswith("localhost:2/int8 is faster than 127.0.0.1:1/float32: p90 at 40 rps 0.67×")
    assert {what for what, _, _ in told.differences} == {"url", "model"}
    again = compare_recorded(out / "A", out / "B")
    assert [one.ratio for one in again.comparisons] == [one.ratio for one in told.comparisons]
    assert [one.noise_floor for one in again.comparisons] == [one.noise_floor for one in told.comparisons]
    assert not again.notes


def test_the_same_endpoint_twice_is_equivalent_to_itself(live: Callable[..., Pair]) -> None:
    told = live("127.0.0.1:1/float32", "127.0.0.1:1/float32")
    assert told.chosen is not None
    assert told.chosen.word == "equivalent"
    assert "is as fast as" in told.sentence
    assert "noise" in told.notes[0]
    assert told.differences == []


def test_across_hosts_numbers_stand_side_by_side(live: Callable[..., Pair], tmp_path: Path) -> None:
    out = tmp_path / "kept"
    told = live("127.0.0.1:1/float32", "10.0.0.7:2/int8", out=out)
    assert told.comparisons == ()
    assert told.chosen is None
    assert "different hosts" in told.sentence
    assert all(("latency_p50_ms", "40 rps") in known for known in told.metrics)
    assert compare_recorded(out / "A", out / "B").refused == told.refused


def rewritten(folder: Path, **fields: Any) -> Path:
    content = json.loads((folder / FILE).read_text())
    (folder / FILE).write_text(json.dumps({**content, **fields}))
    return folder


def test_runs_of_two_times_are_told_apart_only_where_they_are_far_apart(
    live: Callable[..., Pair], tmp_path: Path
) -> None:
    out = tmp_path / "kept"
    live("127.0.0.1:1/float32", "127.0.0.1:2/int8", out=out)
    content = json.loads((out / "B" / FILE).read_text())
    rewritten(out / "B", session="another")
    told = compare_recorded(out / "A", out / "B")
    assert {one.noise_floor for one in told.comparisons} == {0.4}
    assert "not measured in turns" in told.notes[0]
    rewritten(out / "B", samples_digest="others", client={**content["client"], "fingerprint": "f"})
    told = compare_recorded(out / "A", out / "B")
    assert told.comparisons == ()
    assert "machines that measured them differ" in told.sentence
    assert "They were asked with different samples." in told.notes


def test_records_that_cannot_be_read(live: Callable[..., Pair], tmp_path: Path) -> None:
    out = tmp_path / "kept"
    live("127.0.0.1:1/float32", "127.0.0.1:2/int8", out=out)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no measurement can be read"):
        compare_recorded(out / "A", tmp_path / "empty")
    rounds = json.loads((out / "B" / FILE).read_text())["rounds"]
    rounds[0]["runs"][0]["raw"] = "../A/bench.json"
    with pytest.raises(InputError, match="outside its folder"):
        compare_recorded(out / "A", rewritten(out / "B", rounds=rounds))
    with pytest.raises(InputError, match="schema 9"):
        compare_recorded(out / "A", rewritten(out / "B", schema=9))
    for odd in ({"rounds": "many"}, ["rounds"]):
        with pytest.raises(InputError, match="no measurement can be read"):
            read_recorded(rewritten(out / "A", settings=odd))
    (out / "A" / FILE).write_text("[]")
    with pytest.raises(InputError, match="no measurement can be read"):
        read_recorded(out / "A")


def test_runs_that_are_left_out_are_counted(
    live: Callable[..., Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = StatedGenerator(RATES)
    busy.findings = (GateFinding(gate="client_cpu", observed="95%", limit="70%"),)
    monkeypatch.setattr(comparing, "LoadGenerator", busy)
    told = live("127.0.0.1:1/float32", "127.0.0.1:2/int8", rounds=2)
    assert told.chosen is None
    assert "nothing was measured of both" in told.sentence
    assert told.notes[0] == "127.0.0.1:1/float32: 4 of 4 runs were invalid and are left out (client_cpu 4)."


def test_headers_stay_out_of_records(live: Callable[..., Pair], tmp_path: Path) -> None:
    live("127.0.0.1:1/float32", "127.0.0.1:2/int8", out=tmp_path / "kept", headers=["authorization=secret-token"])
    kept = (tmp_path / "kept" / "A" / FILE).read_text()
    assert "authorization" in kept
    assert "secret-token" not in kept


def test_a_round_of_a_record_is_one_of_this_side(live: Callable[..., Pair], tmp_path: Path) -> None:
    live("127.0.0.1:1/float32", "127.0.0.1:2/int8", out=tmp_path / "kept")
    recorded = read_recorded(tmp_path / "kept" / "B")
    assert {one.candidate_id for one in recorded.rounds} == {"B"}
    assert all(isinstance(one, Round) for one in recorded.rounds)


def test_what_was_measured_before_an_end_stays(
    live: Callable[..., Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dying(StatedGenerator):
        def run(self, *given: Any, **named: Any) -> RunRecord:
            if len(self.windows) == 7:
                raise KeyboardInterrupt
            return super().run(*given, **named)

    monkeypatch.setattr(comparing, "LoadGenerator", Dying(RATES))
    with pytest.raises(KeyboardInterrupt):
        live("127.0.0.1:1/float32", "127.0.0.1:2/int8", out=tmp_path / "kept")
    kept = [read_recorded(tmp_path / "kept" / name) for name in "AB"]
    assert sum(len(one.rounds) for one in kept) == 7
    assert compare_recorded(tmp_path / "kept" / "A", tmp_path / "kept" / "B").comparisons


def test_a_header_may_name_each_sides_own_model(live: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    sent: dict[str, Any] = {}

    class Watching(StatedGenerator):
        def run(self, target: Target, *given: Any, **named: Any) -> RunRecord:
            sent[target.model] = dict(target.headers)
            return super().run(target, *given, **named)

    monkeypatch.setattr(comparing, "LoadGenerator", Watching(RATES))
    live("127.0.0.1:1/float32", "127.0.0.1:1/int8", headers=["seldon-model={model}"], rounds=2)
    assert sent == {"float32": {"seldon-model": "float32"}, "int8": {"seldon-model": "int8"}}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rounds": 0}, "is above 0"),
        ({"duration_s": -1.0}, "is above 0"),
        ({"duration_s": float("inf")}, "is above 0"),
        ({"seed": -1}, "--seed is 0 or more"),
        ({"out": Path(__file__, "out")}, "--out .* cannot be made"),
    ],
)
def test_options_that_are_none(live: Callable[..., Pair], given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        live("127.0.0.1:1/float32", "127.0.0.1:2/int8", **given)


@pytest.mark.parametrize(("level", "asked"), [("quick", False), ("standard", True)])
def test_windows_are_held_against_the_clients_ceiling_but_for_a_hint(
    live: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch, level: str, asked: bool
) -> None:
    made: dict[str, Any] = {}

    class Watching(StatedGenerator):
        def __call__(self, **given: Any) -> "Watching":
            made.update(given)
            return self

    monkeypatch.setattr(comparing, "LoadGenerator", Watching(RATES))
    live("127.0.0.1:1/float32", "127.0.0.1:1/int8", level=level, rounds=1)
    assert isinstance(made["ceiling"], Ceilings) == asked


# --- the command


def test_kinds(tmp_path: Path) -> None:
    (tmp_path / FILE).touch()
    assert kind_of("float32", "int8 @ triton-grpc-b8") == "campaign"
    assert kind_of("grpc://host:1/m", "10.0.0.1:8080/n") == "live"
    assert kind_of(str(tmp_path), str(tmp_path)) == "recorded"
    with pytest.raises(InputError, match="two kinds"):
        kind_of(str(tmp_path), "host:1/m")


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["burnish", "compare", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_the_command_tells_people_and_scripts(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = ("float32 @ mlserver-grpc-b8-d2", "int8-static @ mlserver-grpc-b8-d2", "--work", str(work))
    assert command(monkeypatch, *pair) == 0
    shown = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "what differs" in shown
    assert "maximum throughput" in shown
    assert command(monkeypatch, *pair, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["kind"] == "campaign"
    [told] = document["pairs"]
    assert told["word"] in {"faster", "undecided"}
    assert told["ratio"]["low"] < told["ratio"]["value"] < told["ratio"]["high"]
    assert {row["what"] for row in told["differences"]} >= {"variant"}


def test_options_that_do_not_fit_are_refused(
    work: Path, samples: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "float32", "int8-static", "--work", str(work), "--samples", str(samples)) == 2
    assert command(monkeypatch, "127.0.0.1:1/a", "127.0.0.1:1/b") == 2
    assert "--samples" in capsys.readouterr().err
