"""A child process that never outlives us: started under its supervisor, ended with it, and its log at hand."""

import contextlib
import re
import secrets
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from profiles.deploy import supervise
from profiles.deploy.reaper import end_server

LOG_LINES = 25
LOG_LINE_LENGTH = 400
# How much longer than its grace a supervisor may take to end what it has started.
SUPERVISOR_S = 5.0


class SupervisedChild:
    """A process under a supervisor, which ends it when this process ends, however that happens.

    Attributes:
        log: what it writes, on both its outputs.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: Path,
        record: Path,
        environment: Mapping[str, str],
        grace_s: float,
        cpus: Sequence[int] = (),
        shm_prefix: str = "",
    ) -> None:
        """Starts it, in the folder of its log.

        Args:
            command: the program and its arguments.
            log: where its outputs go, after what is there already.
            record: what `reaper.reap` finds it by.
            environment: all of its environment.
            grace_s: how long it may take to end by itself.
            cpus: those that it may use; all where none are given.
            shm_prefix: what its shared memory begins with, to be removed at its end; empty where it has none.
        """
        self.log = log
        self._record = record
        self._grace_s = grace_s
        mark = f"burnish-{secrets.token_hex(6)}"
        line = [sys.executable, "-I", "-S", supervise.__file__, "--record", str(record), "--grace", str(grace_s)]
        line += ["--cpus", ",".join(map(str, cpus))] if cpus else []
        line += ["--shm-prefix", shm_prefix] if shm_prefix else []
        with log.open("ab") as out:
            self._log_begins = out.tell()
            self._supervisor = subprocess.Popen(
                [*line, "--", *command],
                cwd=log.parent,
                env={**environment, supervise.MARK: mark},
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    @property
    def supervisor(self) -> int:
        """The process id of its supervisor, whose child it is."""
        return self._supervisor.pid

    @property
    def status(self) -> int | None:
        """What it ended with; None while it runs."""
        return self._supervisor.poll()

    def wait(self, limit_s: float) -> None:
        """Returns when it has ended, or when so much time is over."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._supervisor.wait(limit_s)

    def tell(self) -> None:
        """Tells the supervisor to end it, by closing its pipe; does not wait."""
        if self._supervisor.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._supervisor.stdin.close()

    def end(self) -> None:
        """Ends it and waits until nothing of it is left."""
        self.tell()
        try:
            self._supervisor.wait(self._grace_s + SUPERVISOR_S)
        except subprocess.TimeoutExpired:
            self._supervisor.kill()
            self._supervisor.wait()
        end_server(self._record)

    def forget(self) -> None:
        """What it has written so far is not told any more; it stays in the log."""
        self._log_begins = self.log_size()

    def log_size(self) -> int:
        """Bytes in the log now."""
        return self.log.stat().st_size

    def log_text(self, since: int = 0) -> str:
        """What it has written; of that, what is behind so many bytes of the log."""
        with self.log.open("rb") as log:
            log.seek(max(self._log_begins, since))
            return log.read().decode(errors="replace")

    def log_end(self, noise: "re.Pattern[str] | None" = None) -> str:
        """The last lines of it, but for those that begin with something that tells nothing."""
        lines = [line for line in self.log_text().splitlines() if noise is None or not noise.match(line)]
        return "\n".join(line[:LOG_LINE_LENGTH] for line in lines[-LOG_LINES:])
