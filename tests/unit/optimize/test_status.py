"""What a campaign leaves for other processes: its status, whatever ends it, and a log of JSON lines."""

import json
import logging
import os
import signal
import subprocess
import sys
from contextlib import suppress
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from optimize import status
from optimize.budget import UNLIMITED, Budget
from optimize.cli import main
from optimize.cli import status as cli_status
from optimize.cli.output import LineObserver, LiveObserver
from optimize.cli.status import _text
from optimize.plan import Observer
from optimize.progress import Progress, working
from optimize.status import LOG, STATUS, Watch, read_status
from registry.errors import InputError, UnreachableError
from registry.processes import is_alive, this_process
from tests.doubles.busy import until

SECRET = "t0p-s3cret-value"


@pytest.fixture(autouse=True)
def written_when_a_test_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "_EVERY_S", 3600.0)


class Told(Observer):
    def __init__(self) -> None:
        self.lines: list[tuple[str, ...]] = []

    def phase(self, name: str, total: int) -> None:
        self.lines.append(("phase", name))

    def begun(self, kind: str, subject: str, where: str = "") -> None:
        self.lines.append(("begun", kind, subject, where))

    def ended(self, kind: str, subject: str) -> None:
        self.lines.append(("ended", kind, subject))

    def done(self, subject: str, outcome: str) -> None:
        self.lines.append(("done", subject, outcome))

    def note(self, text: str) -> None:
        self.lines.append(("note", text))


def watch(work: Path, shown: Observer | None = None, budget: Budget = UNLIMITED) -> Watch:
    return Watch(work, shown or Told(), campaign="digits", level="quick", budget=budget)


def log(work: Path, name: str = LOG) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (work / name).read_text().splitlines()]


def test_all_that_is_told_is_shown_and_kept(tmp_path: Path):
    shown = Told()
    with watch(tmp_path, shown, Budget.from_now(30)) as told:
        told.phase("Making variants", 3)
        with working(told, "Variant", "float32"):
            pass
        told.done("float32", "0.10 MB")
        told.done("int8", "failed: it was killed")
        told.note("something")
        told.begun("Variant", "float16", "node-2")
        told._write()
        running = read_status(tmp_path)
    assert shown.lines == [
        ("phase", "Making variants"),
        ("begun", "Variant", "float32", ""),
        ("ended", "Variant", "float32"),
        ("done", "float32", "0.10 MB"),
        ("done", "int8", "failed: it was killed"),
        ("note", "something"),
        ("begun", "Variant", "float16", "node-2"),
    ]
    assert (running["state"], running["resumable"], running["pid"]) == ("running", False, os.getpid())
    phase = running["phase"]
    assert (phase["name"], phase["done"], phase["total"], phase["failed"]) == ("Making variants", 2, 3, 1)
    assert phase["left_s"] is not None
    [now] = running["running"]
    assert (now["kind"], now["subject"], now["where"]) == ("Variant", "float16", "node-2")
    assert running["failures"] == [{"subject": "int8", "phase": "Making variants", "reason": "it was killed"}]
    assert running["budget"]["minutes"] == 30
    words = _text(running)
    assert "digits (quick)" in words
    assert "now: making float16 on node-2, for" in words
    assert "int8 (Making variants): it was killed" in words
    assert read_status(tmp_path)["state"] == "done"


def test_the_log_has_what_was_told_and_what_libraries_of_ours_say(tmp_path: Path):
    with watch(tmp_path) as told:
        told.phase("Judging answers", 2)
        told.done("int8", "failed: no memory was left")
        logging.getLogger("registry.leases").info("waiting for %s", "float32")
        logging.getLogger("somebody.else").warning("no word of ours")
    logging.getLogger("registry.leases").warning("after the end")
    lines = log(tmp_path)
    assert all({"time", "level", "phase", "event", "subject", "outcome"} <= line.keys() for line in lines)
    told_of = [(one["level"], one["phase"], one["event"], one["subject"], one["outcome"]) for one in lines]
    assert told_of == [
        ("info", "", "begun", "digits", "level quick"),
        ("info", "Judging answers", "phase", "Judging answers", "2 units"),
        ("warning", "Judging answers", "done", "int8", "failed: no memory was left"),
        ("info", "Judging answers", "log", "registry.leases", "waiting for float32"),
        ("info", "Judging answers", "ended", "digits", "done"),
    ]
    assert lines[0]["time"].endswith("Z")
    assert logging.getLogger("registry").level == logging.NOTSET


def test_the_log_is_bounded_and_begins_anew_after_half_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(status, "LOG_BYTES", 2000)
    (tmp_path / LOG).write_text('{"time": "2026-01-01T00:00:00.000Z", "lev')
    with watch(tmp_path) as told:
        for number in range(60):
            told.note(f"note {number} " + "x" * 40)
    assert (tmp_path / LOG).stat().st_size <= 2000
    assert (tmp_path / f"{LOG}.1").stat().st_size <= 2000
    assert log(tmp_path)[-1]["outcome"] == "done"
    assert sorted(path.name for path in tmp_path.glob(f"{LOG}*")) == [LOG, f"{LOG}.1"]


def test_no_secret_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("MY_SERVICE_TOKEN", "another-one-of-them")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://user:p@ss/w0rd@host/db")
    with suppress(UnreachableError), watch(tmp_path) as told:
        told.phase("Recording", 1)
        told.done("x", f"failed: refused {SECRET} at https://me:hunter22@example.org/a?token=abcdef&b=1")
        told.note("and another-one-of-them, postgresql://user:p@ss/w0rd@host/db")
        logging.getLogger("optimize").error("s3://key:%s@bucket", SECRET)
        raise UnreachableError(f"no {SECRET}", hint="https://u:hunter22@h")
    kept = (tmp_path / LOG).read_text() + (tmp_path / STATUS).read_text()
    for secret in (SECRET, "another-one-of-them", "hunter22", "abcdef", "w0rd"):
        assert secret not in kept
    assert "b=1" in kept


@pytest.mark.parametrize(
    ("error", "state", "message"),
    [
        (None, "done", ""),
        (InputError("the value 7 is refused"), "failed", "the value 7 is refused"),
        (ZeroDivisionError("a bug"), "failed", "ZeroDivisionError: a bug"),
        (KeyboardInterrupt(), "interrupted", ""),
    ],
)
def test_how_a_run_ended(tmp_path: Path, error: BaseException | None, state: str, message: str):
    with suppress(InputError, ZeroDivisionError, KeyboardInterrupt), watch(tmp_path) as told:
        told.phase("Measuring", 2)
        if error is not None:
            raise error
    found = read_status(tmp_path)
    assert (found["state"], found["message"], found["resumable"]) == (state, message, error is not None)
    assert found["ended"] is not None
    assert found["running"] == []
    if isinstance(error, ZeroDivisionError):
        assert "ZeroDivisionError: a bug" in log(tmp_path)[-1]["trace"]


KILLED = """
import sys
from pathlib import Path
from optimize import status
from optimize.budget import UNLIMITED
from optimize.cli.output import LineObserver
from optimize.status import Watch
status._EVERY_S = 3600.0
with Watch(Path(sys.argv[1]), LineObserver(), campaign="digits", level="quick", budget=UNLIMITED) as told:
    told.phase("Measuring", 9)
    told.begun("Round", "round 1 of float32")
    told._write()
    print("there", flush=True)
    sys.stdin.read()
"""


def test_a_killed_run_says_so_and_can_be_taken_up(tmp_path: Path):
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        alive = read_status(tmp_path)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (alive["state"], alive["pid"]) == ("running", process.pid)
    assert [one["subject"] for one in alive["running"]] == ["round 1 of float32"]
    found = read_status(tmp_path)
    assert (found["state"], found["resumable"], found["running"], found["ended"]) == ("killed", True, [], None)
    words = _text(found)
    assert "was killed" in words
    assert "The same command goes on where it stopped." in words
    assert not list(tmp_path.glob(f".{STATUS}*"))


def test_a_run_of_another_machine_is_not_taken_for_dead(tmp_path: Path):
    with watch(tmp_path) as told:
        told.phase("Measuring", 9)
        told._write()
        content = json.loads((tmp_path / STATUS).read_text())
    content["process"]["machine"] = "somewhere else"
    content["updated"] -= 40
    (tmp_path / STATUS).write_text(json.dumps(content))
    found = read_status(tmp_path)
    assert found["state"] == "unseen"
    assert found["silent_s"] >= 40
    assert "last sign of life" in _text(found)


def test_the_file_is_written_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(status, "_EVERY_S", 0.01)
    with watch(tmp_path) as told:
        told.phase("Measuring", 9)
        until(lambda: read_status(tmp_path)["phase"] is not None)


def test_a_place_that_takes_no_files_ends_nothing(tmp_path: Path):
    gone = tmp_path / "gone"
    with watch(gone) as told:
        told.phase("Measuring", 1)
        told.done("x", "measured")
    assert not gone.exists()


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"process": {}, "outcome": null}'])
def test_what_is_no_status_is_refused(tmp_path: Path, content: str | None):
    if content is not None:
        (tmp_path / STATUS).write_text(content)
    with pytest.raises(InputError) as caught:
        read_status(tmp_path)
    assert str(tmp_path) in caught.value.message


def test_a_fleet_tells_of_its_models(tmp_path: Path):
    for name in ("one", "two"):
        (tmp_path / "models" / name).mkdir(parents=True)
        with watch(tmp_path / "models" / name) as told:
            told.phase("Measuring", 1)
    path = tmp_path / "models" / "two" / STATUS
    content = json.loads(path.read_text()) | {"outcome": None}
    path.write_text(json.dumps(content | {"process": this_process() | {"started": 1.0}}))
    with watch(tmp_path):
        pass
    found = read_status(tmp_path)
    assert [(one["model"], one["state"]) for one in found["models"]] == [("one", "done"), ("two", "killed")]
    assert "1 of 2 models that were begun are done." in _text(found)


def test_processes_are_told_apart():
    me = this_process()
    assert is_alive(me) is True
    assert is_alive(me | {"started": me["started"] - 100}) is False
    assert is_alive(me | {"machine": "another"}) is None
    assert is_alive({"machine": me["machine"]}) is None


# --- what people see -----------------------------------------------------------------------------------------------


def burnish(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["burnish", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.mark.parametrize("follow", [(), ("--follow",)])
def test_the_command_tells_of_a_run_that_is_over(monkeypatch, capsys, tmp_path: Path, follow: tuple[str, ...]):
    with watch(tmp_path) as told:
        told.phase("Measuring", 2)
        told.done("float32 @ mlserver", "round 1")
    assert burnish(monkeypatch, "status", str(tmp_path), "--json", *follow) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["state"], document["phase"]["done"]) == ("done", 1)
    assert burnish(monkeypatch, "status", str(tmp_path), *follow) == 0
    shown = capsys.readouterr().out
    assert shown.count("digits (quick)") == 1
    assert "Measuring: 1 of 2" in shown


def test_following_ends_with_the_run(monkeypatch, capsys, tmp_path: Path):
    monkeypatch.setattr(cli_status, "_EVERY_S", 0.0)
    looked = []
    with watch(tmp_path) as told:
        told.phase("Measuring", 2)
        told._write()

        def sleep(seconds: float) -> None:
            looked.append(seconds)
            if len(looked) == 2:
                told.done("float32 @ mlserver", "round 1")
                told._write()
            if len(looked) >= 4:
                content = json.loads((tmp_path / STATUS).read_text())
                ended = {"kind": "done", "message": "", "hint": None, "ended": content["updated"]}
                (tmp_path / STATUS).write_text(json.dumps(content | {"outcome": ended}))

        monkeypatch.setattr(cli_status.time, "sleep", sleep)
        assert burnish(monkeypatch, "status", str(tmp_path), "--follow", "--json") == 0
        monkeypatch.undo()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(one["state"], one["phase"]["done"]) for one in lines] == [("running", 0), ("running", 1), ("done", 1)]


def test_a_folder_without_a_run_is_refused(monkeypatch, capsys, tmp_path: Path):
    assert burnish(monkeypatch, "status", str(tmp_path / "none"), "--json") == 2
    assert "no run has left its status" in json.loads(capsys.readouterr().out)["error"]["message"]


def test_lines_say_how_far_the_phase_is(capsys):
    shown, now_s = LineObserver(), [1000.0]
    shown._progress = Progress(lambda: now_s[0])
    shown.phase("Making variants", 3)
    shown.begun("Variant", "float32", "node-2")
    now_s[0] += 30
    shown.ended("Variant", "float32")
    shown.done("float32", "0.10 MB")
    shown.begun("Variant", "int8")
    told = capsys.readouterr().err.splitlines()
    assert told[:2] == ["Making variants: 3", "  float32 begins on node-2"]
    assert told[2] == "  float32: 0.10 MB (1 of 3, about 1 min left)"
    assert len(told) == 3


def test_the_terminal_shows_each_piece_of_work(tmp_path: Path):
    file = StringIO()
    console = Console(file=file, width=160, force_terminal=True, color_system=None)
    shown = LiveObserver(console)
    console.print(shown)
    shown.phase("Making variants", 20)
    for number in range(14):
        shown.begun("Variant", f"v{number:02}", f"node-{number}")
    shown.done("float32", "failed: [bold]no markup[/]")
    console.print(shown)
    told = file.getvalue()
    assert "Making variants" in told
    assert "1/20" in told
    assert "time left not known yet" in told
    assert "making v00 on node-0" in told
    assert "and 2 more" in told
    assert "[bold]no markup[/]" in told


@pytest.mark.parametrize("minutes", ["0", "-3", "nan"])
def test_no_time_is_no_budget(monkeypatch, capsys, tmp_path: Path, minutes: str):
    (tmp_path / "c.yaml").write_text("name: tiny\nsources: [{onnx: m.onnx}]\nsamples: {evaluation: e.npz}\n")
    assert burnish(monkeypatch, "run", str(tmp_path / "c.yaml"), f"--minutes={minutes}", "--json") == 2
    assert "is no time to work in" in json.loads(capsys.readouterr().out)["error"]["message"]
