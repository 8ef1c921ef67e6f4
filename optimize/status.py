"""How a campaign is, for other processes: a small file that is always whole, and a log of JSON lines.

Both stand in the working folder and are only told, never asked: a campaign goes on by its journal, and a disk that
takes no status ends nothing. The file is renamed into its place, so that it is whole whenever this process is killed;
it is not synced, since after a loss of power nothing in it is true anyway.
"""

import json
import logging
import os
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from optimize.budget import Budget
from optimize.fleet import MODELS
from optimize.progress import FAILED, Phase, Progress, Running
from optimize.reporting import RECORD, read_campaign
from registry.errors import BurnishError, InputError
from registry.processes import is_alive, this_process
from registry.tracking import hide_secrets

if TYPE_CHECKING:
    from optimize.plan import Observer

STATUS = "status.json"
LOG = "log.jsonl"
LOG_BYTES = 2_000_000
"""The log is begun anew at this size; the one before it is kept as ``log.jsonl.1``."""

_EVERY_S = 1.0
_SIGN_OF_LIFE_S = 15.0
_KEPT_FAILURES = 20
_LONGEST = 2000
_OWN_LOGGERS = ("optimize", "profiles", "registry")


class Watch:
    """Implements `optimize.plan.Observer`: what is shown to people is also kept for other processes. A context manager.

    The file is written when something has changed, once a second at most, and as a sign of life now and then.
    """

    def __init__(self, work: Path, shown: "Observer", *, campaign: str, level: str, budget: Budget) -> None:
        """Writes nothing yet.

        Args:
            work: the campaign's working folder, which nobody else may be using.
            shown: told the same, for people.
            campaign: its name.
            level: its level of proof.
            budget: its time.
        """
        self._path = work / STATUS
        self._shown = shown
        self._campaign, self._level = campaign, level
        self._about = {"campaign": campaign, "level": level, "process": this_process()}
        self._budget = budget
        self._ends = budget.begin_by
        self._progress = Progress()
        self._failures: list[dict[str, str]] = []
        self._failed = 0
        self._began = time.time()
        self._outcome: dict[str, Any] | None = None
        self._log = _log_handler(work / LOG, self._progress)
        self._levels: dict[str, int] = {}
        self._changed, self._ended = threading.Event(), threading.Event()
        self._writer = threading.Thread(target=self._write_now_and_then, name="burnish-status", daemon=True)

    def __enter__(self) -> Self:
        for name in _OWN_LOGGERS:
            logger = logging.getLogger(name)
            self._levels[name] = logger.level
            logger.setLevel(logging.INFO)
            logger.addHandler(self._log)
        self._tell("begun", self._campaign, f"level {self._level}")
        self._write()
        self._writer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._outcome = _outcome(error)
        level = logging.INFO if error is None else logging.ERROR
        words = {} if error is None or isinstance(error, BurnishError) else {"trace": _trace(error)}
        self._tell("ended", self._campaign, _sentence(self._outcome), level, **words)
        self._ended.set()
        self._changed.set()
        self._writer.join()
        self._write()
        for name, before in self._levels.items():
            logging.getLogger(name).removeHandler(self._log)
            logging.getLogger(name).setLevel(before)
        self._log.close()

    # --- what it is told ---

    def phase(self, name: str, total: int) -> None:
        """A phase of ``total`` units begins."""
        self._progress.phase(name, total)
        self._tell("phase", name, f"{total} units")
        self._shown.phase(name, total)

    def begun(self, kind: str, subject: str, where: str = "") -> None:
        """A piece of work begins."""
        self._progress.begun(kind, subject, where)
        self._tell("begun", subject, "", kind=kind, where=where)
        self._shown.begun(kind, subject, where)

    def ended(self, kind: str, subject: str) -> None:
        """A piece of work is over."""
        self._progress.ended(kind, subject)
        self._tell("ended", subject, "", kind=kind)
        self._shown.ended(kind, subject)

    def done(self, subject: str, outcome: str) -> None:
        """One unit of the phase is done."""
        failed = outcome.startswith(FAILED)
        if failed:
            phase = self._progress.current
            reason = hide_secrets(outcome.removeprefix(FAILED))[:_LONGEST]
            self._failed += 1
            self._failures.append({"subject": subject, "phase": "" if phase is None else phase.name, "reason": reason})
            del self._failures[:-_KEPT_FAILURES]
        self._progress.done(subject, outcome)
        self._tell("done", subject, outcome, logging.WARNING if failed else logging.INFO)
        self._shown.done(subject, outcome)

    def note(self, text: str) -> None:
        """Something worth saying that is no unit of the phase."""
        self._tell("note", "", text)
        self._shown.note(text)

    # --- what it writes ---

    def _tell(self, event: str, subject: str, outcome: str, level: int = logging.INFO, **more: str) -> None:
        fields = {"event": event, "subject": subject, "more": {name: text for name, text in more.items() if text}}
        record = logging.makeLogRecord({"msg": outcome, "levelno": level, "levelname": logging.getLevelName(level)})
        vars(record).update(fields)
        self._log.handle(record)
        self._changed.set()

    def _write_now_and_then(self) -> None:
        while not self._ended.wait(_EVERY_S):
            self._changed.wait(_SIGN_OF_LIFE_S)
            self._changed.clear()
            if not self._ended.is_set():
                self._write()

    def _write(self) -> None:
        current = self._progress.current
        document = {
            **self._about,
            "began": self._began,
            "updated": time.time(),
            "outcome": self._outcome,
            "budget": None if self._ends is None else {"minutes": self._budget.minutes, "ends": self._ends},
            "phase": None if current is None else asdict(current),
            "past": [asdict(one) for one in self._progress.past],
            "running": [asdict(one) for one in self._progress.running],
            "failures": list(self._failures),
            "failed": self._failed,
        }
        draft = self._path.with_name(f".{STATUS}.new")
        with suppress(OSError):
            draft.write_text(json.dumps(document), encoding="utf-8")
            draft.replace(self._path)


def _outcome(error: BaseException | None) -> dict[str, Any]:
    """How a run ended, as JSON has it."""
    ended = {"ended": time.time()}
    if error is None:
        return {"kind": "done", "message": "", "hint": None, **ended}
    if isinstance(error, BurnishError):
        hint = None if error.hint is None else hide_secrets(error.hint)
        return {"kind": "failed", "message": hide_secrets(error.message), "hint": hint, **ended}
    if isinstance(error, Exception):
        return {"kind": "failed", "message": hide_secrets(f"{type(error).__name__}: {error}"), "hint": None, **ended}
    return {"kind": "interrupted", "message": "", "hint": None, **ended}


def _sentence(outcome: dict[str, Any]) -> str:
    return f"{outcome['kind']}: {outcome['message']}" if outcome["message"] else str(outcome["kind"])


def _trace(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


# --- the log ---------------------------------------------------------------------------------------------------


class _LogFile(RotatingFileHandler):
    """Of JSON lines. What cannot be written is left out."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Says nothing: a full disk is told by whoever needs it."""


class _JsonLines(logging.Formatter):
    """One object a line: ``time``, ``level``, ``phase``, ``event``, ``subject``, ``outcome``, more of some events."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        current = self._progress.current
        fields = {
            "time": _iso(record.created),
            "level": record.levelname.lower(),
            "phase": "" if current is None else current.name,
            "event": getattr(record, "event", "log"),
            "subject": getattr(record, "subject", record.name),
            "outcome": record.getMessage(),
            **getattr(record, "more", {}),
        }
        if record.exc_info and record.exc_info[1] is not None:
            fields["trace"] = _trace(record.exc_info[1])
        shown = {name: hide_secrets(value)[:_LONGEST] for name, value in fields.items()}
        return json.dumps(shown, ensure_ascii=False)


def _log_handler(path: Path, progress: Progress) -> _LogFile:
    handler = _LogFile(path, maxBytes=LOG_BYTES, backupCount=1, encoding="utf-8", delay=True)
    handler.setFormatter(_JsonLines(progress))
    with suppress(OSError), path.open("rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":  # a killed run left half a line
            file.write(b"\n")
    return handler


# --- what others read ------------------------------------------------------------------------------------------


def read_status(work: Path) -> dict[str, Any]:
    """How the last run in a working folder is, as JSON has it; times are ISO 8601, in UTC.

    ``state`` is one of ``running``, ``done``, ``failed``, ``interrupted``, ``killed``, and ``unseen`` where the run is
    another machine's (or container's) and has not said that it ended. ``resumable`` says whether the same command goes
    on where it stopped.

    Raises:
        InputError: no run left its status there, or it cannot be read.
    """
    path = work / STATUS
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return _read(found, work, time.time())
    except FileNotFoundError:
        raise InputError(
            f"no run has left its status in {work}", hint="Name the working folder of a campaign that was run."
        ) from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{path} cannot be read ({error})", hint="The next run writes it anew.") from error


def _read(found: dict[str, Any], work: Path, now: float) -> dict[str, Any]:
    state, outcome, budget = _state(found), found["outcome"], found["budget"]
    over = state not in {"running", "unseen"}
    verdict = _verdict(work, found["began"]) if over else None
    running = () if over else tuple(Running(**one) for one in found["running"])
    phase = None if found["phase"] is None else Phase(**found["phase"])
    return {
        "state": state,
        "resumable": state in {"interrupted", "killed", "failed"} or bool(verdict and verdict["cut_short"]),
        "campaign": found["campaign"],
        "level": found["level"],
        "work": str(work),
        "pid": found["process"]["pid"],
        "host": found["process"]["host"],
        "began": _iso(found["began"]),
        "updated": _iso(found["updated"]),
        "silent_s": round(max(0.0, now - found["updated"]), 1),
        "ended": None if outcome is None else _iso(outcome["ended"]),
        "took_s": round((found["updated"] if over else now) - found["began"], 1),
        "message": "" if outcome is None else outcome["message"],
        "hint": None if outcome is None else outcome["hint"],
        "verdict": verdict,
        "budget": None if budget is None else {"minutes": budget["minutes"], "ends": _iso(budget["ends"])},
        "phase": None if phase is None else _shown(phase, None if over else phase.left_s(running, now)),
        "past": [{name: one[name] for name in ("name", "total", "done", "failed")} for one in found["past"]],
        "running": [
            {
                "kind": one.kind,
                "subject": one.subject,
                "words": one.words,
                "where": one.where,
                "since": _iso(one.since),
                "for_s": round(max(0.0, now - one.since), 1),
            }
            for one in running
        ],
        "failures": found["failures"],
        "failed": found["failed"],
        "models": [_brief(one) for one in sorted(work.glob(f"{MODELS}/*/{STATUS}"))],
    }


def _brief(path: Path) -> dict[str, Any]:
    """How a campaign of a fleet is."""
    found = json.loads(path.read_text(encoding="utf-8"))
    phase = found["phase"] or {"name": "", "done": 0, "total": 0}
    return {
        "model": path.parent.name,
        "state": _state(found),
        "phase": {name: phase[name] for name in ("name", "done", "total")},
        "failed": found["failed"],
    }


def _verdict(work: Path, began: float) -> dict[str, Any] | None:
    """What the run came to; None where the folder holds no verdict, or that of an earlier run."""
    try:
        if (work / RECORD).stat().st_mtime < began:
            return None
        campaign = read_campaign(work)
    except (OSError, InputError):
        return None
    names = {one.id: one.name for one in campaign.candidates}
    verdict = campaign.verdict
    return {
        "selected": names.get(verdict.selected or ""),
        "sentence": verdict.sentence,
        "provisional": verdict.provisional,
        "cut_short": verdict.cut_short,
    }


def _shown(phase: Phase, left_s: float | None) -> dict[str, Any]:
    return {
        "name": phase.name,
        "total": phase.total,
        "done": phase.done,
        "failed": phase.failed,
        "began": _iso(phase.began),
        "median_s": None if phase.median_s is None else round(phase.median_s, 3),
        "left_s": None if left_s is None else round(left_s, 1),
    }


def _state(found: dict[str, Any]) -> str:
    if found["outcome"] is not None:
        return str(found["outcome"]["kind"])
    return {True: "running", False: "killed", None: "unseen"}[is_alive(found["process"])]


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
