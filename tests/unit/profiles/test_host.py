import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from profiles.load.priority import PRIORITY, may_go_first
from profiles.measure import host
from profiles.measure.host import fingerprint_host, split_cpus, widest_instruction_set

X86 = """processor\t: 0
model name\t: Some CPU @ 3 GHz
flags\t\t: fpu sse4_2 f16c avx avx2 avx512f avx512_vnni nonsense

processor\t: 1
"""
ARM = """processor\t: 0
Features\t: fp asimd asimdhp asimddp sve
CPU part\t: 0xd40
"""


def test_this_host() -> None:
    found = fingerprint_host("as it is")
    assert found.cores == len(os.sched_getaffinity(0))
    assert found.memory_mb > 100
    assert found == fingerprint_host("as it is")
    assert found.fingerprint != fingerprint_host("otherwise").fingerprint
    assert len(found.fingerprint) == 16


@pytest.mark.parametrize(("text", "model", "widest"), [(X86, "Some CPU @ 3 GHz", "avx512_vnni"), (ARM, "0xd40", "sve")])
def test_instruction_sets(monkeypatch: pytest.MonkeyPatch, text: str, model: str, widest: str) -> None:
    real = Path.read_text

    def read_text(path: Path, *args: Any, **more: Any) -> str:
        return text if str(path) == "/proc/cpuinfo" else real(path, *args, **more)

    monkeypatch.setattr(Path, "read_text", read_text)
    found = fingerprint_host("")
    assert found.cpu_model == model
    assert widest_instruction_set(found) == widest
    assert "nonsense" not in found.instruction_sets
    assert widest_instruction_set(replace(found, instruction_sets=())) == "none"


@pytest.mark.parametrize(
    ("usable", "server", "client"),
    [
        ({3}, (3,), (3,)),
        ({0, 1}, (0,), (1,)),
        ({2, 3, 5, 7}, (2, 3, 5), (7,)),
        (set(range(16)), tuple(range(14)), (14, 15)),
    ],
)
def test_cpus_are_shared_out(
    monkeypatch: pytest.MonkeyPatch, usable: set[int], server: tuple[int, ...], client: tuple[int, ...]
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: usable)
    assert split_cpus()[:2] == (server, client)


@pytest.mark.parametrize(
    ("usable", "places"),
    [({0, 1, 2, 3}, "server on 3 CPUs (0-2), client on 1 CPU (3)"), ({0}, "server and client share the only CPU")],
)
def test_the_sharing_is_put_in_words(monkeypatch: pytest.MonkeyPatch, usable: set[int], places: str) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: usable)
    monkeypatch.setattr(host, "may_go_first", lambda: True)
    assert split_cpus()[2] == f"{places}; the client is woken first"
    monkeypatch.setattr(host, "may_go_first", lambda: False)
    assert split_cpus()[2] == f"{places}; the client is not woken first"


def test_whether_the_client_may_go_first_is_found_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.getpriority(os.PRIO_PROCESS, 0)
    assert may_go_first() in {True, False}
    assert os.getpriority(os.PRIO_PROCESS, 0) == before

    asked: list[int] = []
    monkeypatch.setattr(os, "setpriority", lambda *given: asked.append(given[2]))
    assert may_go_first()
    assert asked == [PRIORITY, before]

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "setpriority", refuse)
    assert not may_go_first()


def test_gpus_are_those_that_nvidia_smi_lists(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho 'NVIDIA L4'\necho 'NVIDIA L4'\n", encoding="utf-8")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path) + os.pathsep + os.environ["PATH"])
    assert fingerprint_host("").gpus == ("NVIDIA L4", "NVIDIA L4")
    command.write_text("#!/bin/sh\nexit 9\n", encoding="utf-8")
    assert fingerprint_host("").gpus == ()


def test_a_driver_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*_: Any, **__: Any) -> None:
        raise subprocess.TimeoutExpired("nvidia-smi", 10)

    monkeypatch.setattr(host.shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(host.subprocess, "run", hang)
    assert fingerprint_host("").gpus == ()
