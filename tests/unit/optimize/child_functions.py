"""Functions that the tests of the child process run in it."""

import os
import subprocess
import sys
import time
from pathlib import Path

from registry.errors import InputError, MissingExtraError


def echo(**arguments):
    print("a library prints this")
    return arguments


def environment():
    return dict(os.environ)


def search_path():
    return sys.path


def affinity():
    return sorted(os.sched_getaffinity(0))


def refuse():
    raise InputError("the value 7 is refused", hint="give 8")


def miss_extra():
    raise MissingExtraError("drawing", extra="pictures")


def fail():
    raise ZeroDivisionError("by nothing")


def sleep(pid_file=None):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(200)"])
    if pid_file:
        draft = Path(f"{pid_file}.draft")
        draft.write_text(f"{os.getpid()} {child.pid}")
        draft.replace(pid_file)
    time.sleep(200)


def eat():
    held = []
    while True:
        held.append(bytearray(20_000_000))
        time.sleep(0.01)


def vanish():
    os.kill(os.getpid(), 9)


def not_json():
    return {1, 2}
