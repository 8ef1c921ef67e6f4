"""Runs one server so that it never outlives the process that wanted it.

A script of the standard library alone, started as ``python -I -S supervise.py --record FILE -- command...`` with a
pipe as its standard input. The other end is held by the process that wants the server: when that process closes it,
ends, or is killed in whatever way, the pipe is at its end, and the supervisor ends the server and all that the server
started. If the supervisor itself is killed, the kernel kills the server (PR_SET_PDEATHSIG), and the record that is
left behind lets ``profiles.deploy.reaper`` find the rest.

It exits with the server's status, or 128 and the number of the signal that ended it.
"""

import argparse
import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

# linux/prctl.h
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

MARK = "BURNISH_SERVER"
"""Environment variable that all processes of one server carry."""

POLL_S = 0.5
LINGER_S = 1.0
COMMAND_NOT_FOUND = 127
STDIN = 0


def start_ticks(pid: int) -> int | None:
    """When the process started, in clock ticks since boot, or None where there is none (or only its corpse).

    With the pid it names one process for good: pids are used again, start times are not. Field 22 of proc(5)'s stat.
    """
    fields = _stat(pid)
    return None if fields is None or fields[0] in "ZX" else int(fields[19])


def descendants(pid: int) -> list[int]:
    """Every living process under this one, children before their children."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))) is not None and fields[0] not in "ZX":
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found = [pid]
    for parent in found:
        found.extend(children.get(parent, []))
    return found[1:]


def kill_all(find: Callable[[], Iterable[int]], *, limit_s: float = 10.0) -> None:
    """Kills the processes that `find` gives, again and again until it gives none or the limit is over.

    Python's resource tracker is left a moment to end by itself, as it does when those it serves are gone: it then
    removes the semaphores of worker processes, which nobody else knows.
    """
    began = time.monotonic()
    while (remaining := list(find())) and time.monotonic() - began < limit_s:
        patient = time.monotonic() - began < LINGER_S
        for pid in remaining:
            if not (patient and _is_resource_tracker(pid)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _is_resource_tracker(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def remove_shared_memory(prefix: str) -> list[str]:
    """Removes the regions under /dev/shm whose name begins so; returns their names."""
    removed = []
    for region in sorted(Path("/dev/shm").iterdir()) if prefix else ():  # noqa: S108  # where regions live
        if region.name.startswith(prefix):
            with contextlib.suppress(OSError):
                region.unlink()
                removed.append(region.name)
    return removed


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/<pid>/stat after the command's name, which may hold anything."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _start(command: list[str], supervisor: int) -> subprocess.Popen[bytes]:
    def before_exec() -> None:
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != supervisor:
            os._exit(1)

    # A session of its own: Ctrl-C in the terminal is for the parent, which then decides about its servers.
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=before_exec)  # noqa: PLW1509


def _write_record(path: Path, server: int, parent: int, shm_prefix: str) -> None:
    me = os.getpid()
    record = {
        "mark": os.environ.get(MARK, ""),
        "shm_prefix": shm_prefix,
        "server": [server, start_ticks(server)],
        "supervisor": [me, start_ticks(me)],
        "parent": [parent, start_ticks(parent)],
    }
    # Written whole or not at all.
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(record))
    draft.replace(path)


def _wait_for_end(server: subprocess.Popen[bytes], parent: int, wakeup: int) -> None:
    """Returns when the server has ended or must end: the pipe closed, the parent gone, or a signal."""
    poll = select.poll()
    poll.register(STDIN, select.POLLIN | select.POLLHUP)
    poll.register(wakeup, select.POLLIN)
    while server.poll() is None:
        # The parent is looked at too: a child that it forked may hold the pipe open after its end.
        if os.getppid() != parent:
            return
        for descriptor, _ in poll.poll(POLL_S * 1000):
            if descriptor == STDIN and not os.read(STDIN, 4096):
                return
            if descriptor == wakeup and {signal.SIGTERM, signal.SIGINT, signal.SIGHUP} & set(os.read(wakeup, 4096)):
                return


def _end(server: subprocess.Popen[bytes], grace_s: float) -> None:
    """Asks the server to end, waits, and kills it with whatever it has started."""
    if server.poll() is None:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(grace_s)
    # Orphans of the server come to us (PR_SET_CHILD_SUBREAPER), so nobody is missed, and nobody is new at the end.
    kill_all(lambda: descendants(os.getpid()))
    server.wait()


def main(arguments: list[str]) -> int:
    """Runs the command under supervision; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, required=True, help="file that names the processes while they live")
    parser.add_argument("--cpus", help="CPUs that the server may use, joined by commas")
    parser.add_argument("--shm-prefix", default="", help="regions of /dev/shm to remove at the end")
    parser.add_argument("--grace", type=float, default=10.0, help="seconds that the server has to end by itself")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args(arguments)
    parent = os.getppid()
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    if options.cpus:
        os.sched_setaffinity(0, {int(cpu) for cpu in options.cpus.split(",")})
    wakeup, written = os.pipe()
    os.set_blocking(written, False)
    signal.set_wakeup_fd(written)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    try:
        server = _start(options.command, os.getpid())
    except OSError as error:
        sys.stderr.write(f"cannot start {options.command[0]}: {error}\n")
        return COMMAND_NOT_FOUND
    _write_record(options.record, server.pid, parent, options.shm_prefix)
    try:
        _wait_for_end(server, parent, wakeup)
    finally:
        _end(server, options.grace)
        remove_shared_memory(options.shm_prefix)
        options.record.unlink(missing_ok=True)
    return server.returncode if server.returncode >= 0 else 128 - server.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
