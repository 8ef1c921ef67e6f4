"""A fleet whose campaigns are small scripts: what is tested is what the fleet makes of how they end."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from optimize import budget
from optimize.config import load_campaign
from optimize.fleet import JOURNAL, process, running
from optimize.fleet.config import FleetPlan, plan_fleet
from optimize.fleet.journal import Journal, read_fleet
from optimize.fleet.outcomes import exit_code_of
from optimize.fleet.process import CAMPAIGN, LOG, SAID, CampaignProcess, as_document
from optimize.fleet.running import run_fleet
from optimize.plan import Plan
from profiles.deploy.supervise import start_ticks
from registry import codec
from registry.documents import parse_document
from registry.errors import InputError, StorageError
from registry.ledger import Ledger
from registry.records import Fleet
from tests.doubles import campaigns, fleets
from tests.doubles.busy import until

FLEET = """
name: spring
parallel: 2
defaults:
  samples: {evaluation: held-out.npz}
  level: quick
models:
"""
WON = "import shutil; shutil.copy('made.json', 'campaign.json'); print('{\"selected\": 1}')"
NONE = "import shutil; shutil.copy('none.json', 'campaign.json'); print('{\"selected\": null}'); raise SystemExit(3)"
CUT = "import shutil; shutil.copy('cut.json', 'campaign.json'); print('{\"selected\": 1}')"
WRONG = 'print(\'{"error": {"kind": "input", "message": "no labels", "hint": "Save them."}}\'); raise SystemExit(2)'
GONE = 'print(\'{"error": {"kind": "unreachable", "message": "no MLflow", "hint": null}}\'); raise SystemExit(4)'
NO_TIME = 'print(\'{"error": {"kind": "budget", "message": "was used up", "hint": null}}\'); raise SystemExit(3)'
BUG = "import sys; sys.stderr.write('Traceback\\nKeyError: http://me:hunter2@mlflow\\n'); raise SystemExit(1)"
KILLED = "import os; os.kill(os.getpid(), 9)"
SLEEPS = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); time.sleep(200)"
WON_ONE, LOST, STOPPED = ("won", "", 0), ("no_winner", "", 3), ("stopped", "", 143)


class Told:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.outcomes: dict[str, str] = {}
        self.notes: list[str] = []

    def phase(self, name: str, total: int) -> None:
        """Nothing to keep."""

    def begun(self, kind: str, subject: str, where: str = "") -> None:
        """Nothing to keep."""

    def ended(self, kind: str, subject: str) -> None:
        """Nothing to keep."""

    def done(self, subject: str, outcome: str) -> None:
        self.outcomes[subject] = outcome

    def note(self, text: str) -> None:
        self.notes.append(text)


class Scripts:
    """Starts a script for each model in place of a campaign, and counts how often."""

    def __init__(self, scripts: Mapping[str, str]) -> None:
        self.scripts = dict(scripts)
        self.started: list[str] = []
        self.minutes: dict[str, float | None] = {}
        self.pids: dict[str, int] = {}

    def __call__(self, planned: Plan, *, minutes: float | None) -> CampaignProcess:
        name, work = planned.work.name, planned.work
        work.mkdir(parents=True, exist_ok=True)
        made = campaigns.campaign()
        cut = replace(made, verdict=replace(made.verdict, cut_short="The budget of 9 minutes was used up."))
        for file, record in (
            ("made", made),
            ("cut", cut),
            ("none", replace(made, verdict=campaigns.no_winner())),
        ):
            (work / f"{file}.json").write_text(codec.dumps(record))
        (work / "ledger.jsonl").touch()
        self.started.append(name)
        self.minutes[name] = minutes
        with (work / SAID).open("wb") as said, (work / LOG).open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", self.scripts[name]],
                cwd=work,
                stdout=said,
                stderr=log,
                start_new_session=True,
            )
        self.pids[name] = process.pid
        return CampaignProcess(process, work)


@pytest.fixture(autouse=True)
def looked_at_often(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (running, process):
        monkeypatch.setattr(module, "_POLL_S", 0.01)


@pytest.fixture
def plan_of(tmp_path: Path) -> Callable[..., FleetPlan]:
    (tmp_path / "model.onnx").write_bytes(b"model")
    np.savez(tmp_path / "held-out.npz", x=np.zeros((4, 8), np.float32), labels=np.zeros(4, np.int64))

    def make(*models: str, head: str = FLEET) -> FleetPlan:
        lines = [f"  - {{name: {model}, sources: [{{onnx: model.onnx}}]}}\n" for model in models]
        (tmp_path / "fleet.yaml").write_text(head + "".join(lines).replace(" minutes", ", minutes"))
        return plan_fleet(tmp_path / "fleet.yaml", work=tmp_path / "work")

    return make


def run(fleet: FleetPlan, scripts: Scripts, **options: float) -> tuple[Fleet, Told]:
    told = Told()
    return run_fleet(fleet, observer=told, start=scripts, **options), told


def states(fleet: Fleet) -> dict[str, tuple[str, str]]:
    return {one.model: (one.state, one.kind) for one in fleet.outcomes}


def test_whatever_becomes_of_a_campaign_the_others_go_on(plan_of):
    scripts = Scripts({"a": WRONG, "b": WON, "c": NONE, "d": KILLED, "e": BUG, "f": GONE, "g": CUT, "h": NO_TIME})
    fleet, told = run(plan_of(*scripts.scripts), scripts)
    assert states(fleet) == {
        "a": ("failed", "input"),
        "b": ("won", ""),
        "c": ("no_winner", ""),
        "d": ("failed", "killed"),
        "e": ("failed", "bug"),
        "f": ("failed", "unreachable"),
        "g": ("won", ""),
        "h": ("failed", "budget"),
    }
    reasons = {one.model: one.reason for one in fleet.outcomes}
    assert reasons["a"] == "no labels. Save them."
    assert reasons["d"] == "its process was ended by SIGKILL"
    assert reasons["e"].endswith("its log ends: KeyError: http://***@mlflow")
    assert "No candidate meets the policy" in reasons["c"]
    found = {one.model: one for one in fleet.outcomes}
    assert found["b"].gain is not None
    assert found["c"].misses[0].startswith("accuracy_drop <= 0.01: int8-static @ triton")
    assert [one.model for one in fleet.outcomes if one.cut] == ["g"]
    assert set(told.outcomes) == set(scripts.scripts)


def test_finished_models_cost_nothing_and_the_others_are_tried_again(plan_of):
    scripts = Scripts({"won": WON, "none": NONE, "wrong": WRONG})
    fleet = plan_of(*scripts.scripts)
    run(fleet, scripts)
    scripts.scripts["wrong"] = WON
    again, told = run(fleet, scripts)
    assert scripts.started == ["won", "none", "wrong", "wrong"]
    assert told.outcomes["won"].endswith("(known)")
    assert states(again)["wrong"] == ("won", "")
    assert [one.attempt for one in again.outcomes] == [1, 1, 2]
    assert states(read_fleet(fleet.work)) == states(again)
    run(fleet, scripts)
    assert len(scripts.started) == 4


@pytest.mark.parametrize("changed", ["held-out.npz", "model.onnx", "fleet.yaml"])
def test_a_model_whose_campaign_or_files_changed_is_run_again(plan_of, tmp_path: Path, changed: str):
    scripts = Scripts({"a": WON})
    run(plan_of("a"), scripts)
    if changed == "fleet.yaml":
        fleet = plan_of("a", head=FLEET.replace("quick", "standard"))
    else:
        os.utime(tmp_path / changed)
        fleet = plan_of("a")
    _, told = run(fleet, scripts)
    assert scripts.started == ["a", "a"]
    assert told.notes[0].startswith("a is done again: ")


def test_files_beside_a_model_count_too(plan_of, tmp_path: Path):
    (tmp_path / "weights.bin").write_bytes(b"1")
    fleet = plan_of("a")
    work = fleet.entries[0].planned.work
    with Ledger.open(work / "ledger.jsonl") as ledger:
        components = {"files": {"model.onnx": "x", "weights.bin": "y"}}
        ledger.commit("Source", "model", components, campaigns.campaign().sources[0])
    scripts = Scripts({"a": WON})
    first, _ = run(fleet, scripts)
    assert first.outcomes[0].beside == (str(tmp_path / "weights.bin"),)
    run(fleet, scripts)
    assert scripts.started == ["a"]
    (tmp_path / "weights.bin").write_bytes(b"2")
    run(fleet, scripts)
    assert scripts.started == ["a", "a"]


def test_a_verdict_for_want_of_its_own_minutes_is_final_until_it_gets_more(plan_of):
    scripts = Scripts({"a": CUT})
    run(plan_of("a minutes: 20"), scripts)
    run(plan_of("a minutes: 20"), scripts)
    assert scripts.started == ["a"]
    run(plan_of("a minutes: 30"), scripts)
    assert scripts.started == ["a", "a"]
    assert 9.9 < (scripts.minutes["a"] or 0) <= 30


@pytest.mark.parametrize("taken", [19.9, 20.0, 31.0])
def test_what_kills_have_taken_leaves_a_model_a_few_of_its_minutes(plan_of, taken: float):
    fleet = plan_of("a minutes: 20")
    with Ledger.open(fleet.work / JOURNAL) as ledger:
        journal = Journal(ledger)
        journal.begin(fleet)
        stopped = fleets.lost("a", "stopped", minutes=taken)
        journal.commit(fleet.entries[0], stopped, journal.past(fleet.entries[0]).components)
    scripts = Scripts({"a": WON})
    run(fleet, scripts)
    assert scripts.minutes["a"] == pytest.approx(2.0)


def test_a_verdict_for_want_of_the_fleets_minutes_goes_on_the_next_time(plan_of):
    scripts = Scripts({"a": CUT, "b": WON})
    fleet = plan_of("a", "b", head=FLEET.replace("parallel: 2", "parallel: 1\nminutes: 1000"))
    run(fleet, scripts)
    assert scripts.minutes["a"] == pytest.approx(500.0, rel=0.1)
    assert scripts.minutes["b"] == pytest.approx(1000.0, rel=0.05)  # what the first left over
    run(fleet, scripts)
    assert scripts.started == ["a", "b", "a"]


def test_a_campaign_far_over_its_minutes_is_ended(plan_of):
    scripts = Scripts({"slow": SLEEPS, "next": WON})
    fleet = plan_of("slow minutes: 0.005", "next", head=FLEET.replace("parallel: 2", "parallel: 1"))
    found, _ = run(fleet, scripts, grace_minutes=0.005)
    assert states(found) == {"slow": ("failed", "budget"), "next": ("won", "")}
    run(fleet, scripts, grace_minutes=0.005)
    assert scripts.started == ["slow", "next"]


def test_what_the_fleets_minutes_do_not_reach_is_not_begun(plan_of, monkeypatch: pytest.MonkeyPatch):
    ahead_s = [0.0]
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + ahead_s[0], sleep=time.sleep)
    monkeypatch.setattr(budget, "monotonic", clock.monotonic)
    monkeypatch.setattr(running, "time", clock)

    def an_hour_passes() -> None:
        ahead_s[0] += 3600

    scripts = WatchedScripts({"slow": SLEEPS, "next": WON}, at="slow", look=an_hour_passes)
    fleet = plan_of("slow", "next", head=FLEET.replace("parallel: 2", "parallel: 1\nminutes: 30"))
    found, told = run(fleet, scripts)
    assert states(found) == {"slow": ("failed", "budget")}
    assert told.notes[-1] == "not begun: next; the same command goes on there"
    assert exit_code_of(found) == 3


class Watched(CampaignProcess):
    """Does something when it is first looked at, which is once the fleet has taken it for one that runs."""

    def __init__(self, process: "subprocess.Popen[bytes]", work: Path, look: Callable[[], None]) -> None:
        super().__init__(process, work)
        self._look: Callable[[], None] | None = look

    def poll(self) -> int | None:
        look, self._look = self._look, None
        if look is not None:
            look()
        return super().poll()


class WatchedScripts(Scripts):
    """Of which one is `Watched`, the first time that it is started."""

    def __init__(self, scripts: Mapping[str, str], *, at: str, look: Callable[[], None]) -> None:
        super().__init__(scripts)
        self.at = at
        self.look = look

    def __call__(self, planned: Plan, *, minutes: float | None) -> CampaignProcess:
        process = super().__call__(planned, minutes=minutes)
        if planned.work.name != self.at:
            return process
        self.at = ""
        return Watched(process._process, planned.work, self.look)


def test_ctrl_c_ends_all_and_the_next_run_goes_on(plan_of):
    scripts = WatchedScripts(
        {"done": WON, "long": SLEEPS, "last": WON}, at="long", look=lambda: os.kill(os.getpid(), signal.SIGINT)
    )
    fleet = plan_of(*scripts.scripts, head=FLEET.replace("parallel: 2", "parallel: 1"))
    with pytest.raises(KeyboardInterrupt):
        run(fleet, scripts)
    assert not psutil.pid_exists(scripts.pids["long"])
    found = read_fleet(fleet.work)
    assert states(found) == {"done": ("won", ""), "long": ("stopped", "")}
    assert "1 stopped, 1 not begun" in (fleet.work / "fleet.html").read_text()
    scripts.scripts["long"] = WON
    again, _ = run(fleet, scripts)
    assert scripts.started == ["done", "long", "long", "last"]
    assert exit_code_of(again) == 0


def test_a_folder_of_a_model_that_cannot_be_written_is_said(plan_of):
    fleet = plan_of("a", "b")
    fleet.entries[0].planned.work.parent.mkdir(parents=True)
    fleet.entries[0].planned.work.touch()
    with pytest.raises(StorageError, match=r"campaign\.yaml could not be written: (File exists|Not a directory)"):
        run_fleet(fleet, observer=Told())
    assert "2 not begun" in (fleet.work / "fleet.html").read_text()


def test_two_fleets_in_one_folder_are_refused(plan_of):
    fleet = plan_of("a")
    with Ledger.open(fleet.work / "fleet.jsonl"), pytest.raises(InputError, match="another burnish is working"):
        run(fleet, Scripts({"a": WON}))


@pytest.mark.parametrize(
    ("outcomes", "code"),
    [
        ({"a": WON_ONE, "b": WON_ONE}, 0),
        ({"a": WON_ONE}, 3),
        ({"a": WON_ONE, "b": LOST}, 3),
        ({"a": LOST, "b": STOPPED}, 3),
        ({"a": LOST, "b": ("failed", "budget", 3)}, 3),
        ({"a": LOST, "b": ("failed", "input", 2)}, 2),
        ({"a": ("failed", "bug", 1), "b": ("failed", "input", 2)}, 1),
        ({"a": ("failed", "bug", 1), "b": ("failed", "unreachable", 4)}, 4),
        ({"a": ("failed", "input", 2), "b": ("failed", "killed", -9)}, 4),
    ],
)
def test_the_exit_code_is_that_of_the_worst(outcomes: dict[str, tuple[str, str, int]], code: int):
    ended = tuple(
        fleets.won(name, state=state, kind=kind, exit_code=ended) for name, (state, kind, ended) in outcomes.items()
    )
    made = replace(fleets.fleet(), models=tuple(map(fleets.model, "ab")), outcomes=ended)
    assert exit_code_of(made) == code


def test_the_file_that_a_campaign_is_run_from_says_the_same(plan_of, tmp_path: Path):
    config = plan_of("a").entries[0].planned.config
    (tmp_path / CAMPAIGN).write_text(json.dumps(as_document(config, None), indent=2))
    assert load_campaign(tmp_path / CAMPAIGN) == config
    cut = parse_document(json.dumps(as_document(config, 2.5)), type(config), name="x")
    assert cut.limits.minutes == 2.5
    own = config.model_copy(update={"limits": config.limits.model_copy(update={"minutes": 1.0})})
    assert as_document(own, 2.5)["limits"]["minutes"] == 1.0


def test_a_campaign_dies_with_its_fleet(plan_of, tmp_path: Path):
    """The process that the fleet starts for a campaign is killed with it, however that ends."""
    script = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from optimize.fleet.config import plan_fleet\n"
        "from optimize.fleet.process import CampaignProcess\n"
        f"plan = plan_fleet(Path({str(tmp_path / 'fleet.yaml')!r}), work=Path({str(tmp_path / 'work')!r}))\n"
        "one = CampaignProcess.start(plan.entries[0].planned, minutes=None)\n"
        "print(one._process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    plan_of("a")
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=200)
    pid = int(done.stdout)
    until(lambda: start_ticks(pid) is None)
