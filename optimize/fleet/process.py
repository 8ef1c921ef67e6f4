"""The process of one campaign of a fleet: ``burnish run`` in a session of its own, which ends with the fleet's."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from optimize.config import CampaignConfig
from optimize.plan import Plan
from registry.ledger import write_durably

CAMPAIGN = "campaign.yaml"
"""The campaign as it is run, in its working folder; JSON, which is YAML too."""
SAID, LOG = "run.json", "run.log"
"""What the campaign's process wrote to standard output, and to standard error."""
ENDING_S = 30.0
"""What a campaign may need after SIGTERM to end its servers; as `optimize.engines.job_config.LEAST_GRACE_S`."""
_POLL_S = 0.1


class CampaignProcess:
    """A campaign that runs. It is killed when this process ends, however it ends."""

    def __init__(self, process: "subprocess.Popen[bytes]", work: Path) -> None:
        self._process = process
        self._work = work

    @classmethod
    def start(cls, planned: Plan, *, minutes: float | None) -> Self:
        """Starts ``burnish run``; only from the main thread, whose end would end the campaign, too.

        Args:
            planned: the campaign, in its working folder.
            minutes: the most that it may take, for its own configuration; None for any.

        Raises:
            StorageError: its working folder cannot be written.
        """
        file = planned.work / CAMPAIGN
        write_durably(file, json.dumps(as_document(planned.config, minutes), indent=2) + "\n")
        command = [
            *(sys.executable, "-P", "-m", "optimize", "run", str(file)),
            *("--base", str(planned.base), "--work", str(planned.work), "--json", "--parent", str(os.getpid())),
        ]
        with (planned.work / SAID).open("wb") as said, (planned.work / LOG).open("wb") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=log,
                start_new_session=True,
            )
        return cls(process, planned.work)

    def poll(self) -> int | None:
        """Its exit code, negative where a signal ended it; None while it runs."""
        return self._process.poll()

    def ask_to_end(self) -> None:
        """Sends SIGTERM: it ends its servers, and what is committed stays."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()

    def kill(self) -> None:
        """Ends it and its group at once; servers and children see to it themselves."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def said(self) -> dict[str, Any]:
        """The JSON document that it wrote; empty where it wrote none."""
        return read_said(self._work)


def end_all(processes: Iterable[CampaignProcess], *, clock: Callable[[], float] = time.monotonic) -> None:
    """Returns when all of them have ended: asked to, and killed if they do not."""
    left = [one for one in processes if one.poll() is None]
    try:
        for one in left:
            one.ask_to_end()
        deadline = clock() + ENDING_S
        while clock() < deadline and any(one.poll() is None for one in left):
            time.sleep(_POLL_S)
    finally:
        for one in left:
            if one.poll() is None:
                one.kill()


def read_said(work: Path) -> dict[str, Any]:
    """The JSON document that the campaign in a working folder wrote last; empty where there is none."""
    with contextlib.suppress(OSError, ValueError):
        document = json.loads((work / SAID).read_text(encoding="utf-8"))
        return document if isinstance(document, dict) else {}
    return {}


def last_words(work: Path) -> str:
    """The last line that a campaign wrote to its log; empty where there is none."""
    with contextlib.suppress(OSError):
        lines = (work / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else ""
    return ""


def as_document(config: CampaignConfig, minutes: float | None) -> Mapping[str, Any]:
    """The campaign file that stands for a configuration, with a budget of minutes if that is less than its own."""
    document: dict[str, Any] = config.model_dump(mode="json", exclude_unset=True)
    own = config.limits.minutes
    if minutes is not None and (own is None or minutes < own):
        document["limits"] = {**document.get("limits", {}), "minutes": minutes}
    return document
