"""An engine built by NVIDIA's trtexec from what ``tensorrt.prepare`` made, on a machine that has a GPU.

An engine (a plan) is tied to the GPU's compute capability and to the version of TensorRT, so it is built where it will
run, with the TensorRT of the server's image. Never exercised by us on a GPU: the tests run a double of trtexec.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from optimize.readiness.releases import Version
from optimize.stages.onnx_files import ENTRY
from optimize.stages.tensorrt import BUILD_FILE, PLAN, command_for
from registry.errors import InputError, NotApplicableError, StageError

ENGINE_FILE = "engine.json"
# What trtexec may know of this process: no tokens, no passwords.
_ENVIRONMENT = ("PATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES")
_TAIL = 2000
_MADE_BY = "Name the folder of a variant whose recipe ends with tensorrt.prepare."
_ASK_TIMEOUT_S = 60.0
# What `optimize.stages.tensorrt.trtexec_command` writes. Other flags name files of the machine, or code to load.
_ARGUMENT = re.compile(
    rf"trtexec|--onnx={re.escape(ENTRY)}|--saveEngine={re.escape(PLAN)}|--memPoolSize=workspace:\d+|"
    r"--(min|opt|max)Shapes=.+|--timingCacheFile=timing\.cache|--stronglyTyped|--fp16|--int8"
)
_NOT_LINKED = frozenset({PLAN, ENGINE_FILE, "timing.cache"})  # trtexec would write through the links


class _Shapes(BaseModel):
    min: tuple[int, ...] = Field(min_length=1)
    opt: tuple[int, ...] = Field(min_length=1)
    max: tuple[int, ...] = Field(min_length=1)


class _Build(BaseModel):
    """What is read of ``build.json``."""

    trtexec: dict[Annotated[str, Field(pattern=r"^\d+\.\d+$")], list[str]] = Field(min_length=1)
    profile: dict[str, _Shapes]
    triton: dict[str, str]


def build_engine(folder: Path, out: Path, *, timeout_s: float = 3600.0) -> Path:
    """Builds ``model.plan`` in ``out`` and writes ``engine.json`` beside it: versions, GPU and command.

    The signature of the plan is that of the ONNX model it is built from. Nothing is left in ``out`` when it fails.

    Args:
        folder: what the stage ``tensorrt.prepare`` made: ``model.onnx`` and ``build.json``.
        out: a folder; the plan in it is replaced.
        timeout_s: longest time for trtexec.

    Raises:
        NotApplicableError: there is no trtexec, or no GPU.
        InputError: the folder holds no such model.
        StageError: trtexec failed, took too long, or wrote nothing; the end of its log is in the message.
    """
    build = read_build(folder)
    trtexec = shutil.which("trtexec")
    if trtexec is None:
        raise NotApplicableError("no engine was built: no trtexec on PATH", hint="Build where TensorRT is installed.")
    gpu = _gpu()
    version = _version(trtexec)
    command = [trtexec, *command_for(build, version)[1:]]
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".engine-", dir=out) as scratch:
        for file in folder.iterdir():
            if file.is_file() and file.name not in _NOT_LINKED:
                (Path(scratch) / file.name).symlink_to(file.resolve())
        log = _run(command, Path(scratch), timeout_s)
        plan = Path(scratch) / PLAN
        if not plan.is_file() or not plan.stat().st_size:
            raise StageError(f"trtexec ended well and wrote no {PLAN}\n{log[-_TAIL:]}")
        plan.replace(out / PLAN)
    facts = {"tensorrt": f"{version[0]}.{version[1]}", **gpu, "command": command}
    (out / ENGINE_FILE).write_text(json.dumps(facts, indent=2) + "\n")
    return out / PLAN


def read_build(folder: Path) -> dict[str, Any]:
    """What ``tensorrt.prepare`` wrote beside its model: profile, commands, strings for Triton, findings.

    Nobody has vouched for the file: its commands may hold no more than those that the stage writes.

    Raises:
        InputError: the folder is not what the stage makes.
    """
    try:
        build = json.loads((folder / BUILD_FILE).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} holds no {BUILD_FILE} that can be read: {error}", hint=_MADE_BY) from error
    try:
        commands = _Build.model_validate(build).trtexec.values()
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"])) or "it"
        told = f"{folder} is not what the stage tensorrt.prepare makes: {where} in {BUILD_FILE} does not fit"
        raise InputError(told, hint=_MADE_BY) from error
    if not (folder / ENTRY).is_file():
        raise InputError(f"{folder} is not what the stage tensorrt.prepare makes: it has no {ENTRY}", hint=_MADE_BY)
    if other := [argument for command in commands for argument in command if not _ARGUMENT.fullmatch(argument)]:
        raise InputError(
            f"{BUILD_FILE} of {folder} would run {other[0]!r}, which the stage never writes", hint=_MADE_BY
        )
    return dict(build)


def _gpu() -> dict[str, str]:
    """Name and compute capability of the first GPU.

    Raises:
        NotApplicableError: there is none.
    """
    command = shutil.which("nvidia-smi")
    none = NotApplicableError("no engine was built: no GPU", hint="A plan is built on the kind of GPU that serves it.")
    if command is None:
        raise none
    query = [command, "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=_ASK_TIMEOUT_S, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise none from error
    name, separator, capability = next(iter(told.strip().splitlines()), "").rpartition(",")
    if not separator:
        raise none
    return {"gpu": name.strip(), "compute_capability": capability.strip()}


def _version(trtexec: str) -> Version:
    """The version in the line that trtexec begins with: ``[TensorRT v101200]`` is 10.12.

    Raises:
        StageError: there is no such line.
    """
    try:
        told = subprocess.run([trtexec, "--help"], capture_output=True, text=True, timeout=_ASK_TIMEOUT_S, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        raise StageError(f"{trtexec} cannot be run: {error}") from error
    found = re.search(r"TensorRT v(\d+)(\d{2})(\d{2})\b", told.stdout + told.stderr)
    if found is None:
        raise StageError(f"{trtexec} does not say which version of TensorRT it is of")
    return int(found[1]), int(found[2])


def _run(command: list[str], folder: Path, timeout_s: float) -> str:
    """What the command printed, run in the folder in a process group of its own.

    Raises:
        StageError: it failed, or took too long.
    """
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        log, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        _end(process)
        log, _ = process.communicate()
        raise StageError(f"trtexec took more than {timeout_s:g} s\n{log[-_TAIL:]}") from error
    except BaseException:
        _end(process)
        process.communicate()
        raise
    if process.returncode:
        raise StageError(f"trtexec failed with exit code {process.returncode}\n{log[-_TAIL:]}")
    return log


def _end(process: "subprocess.Popen[str]") -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
