"""A stand-in for a container engine: the stages of a Dockerfile built as plain folders, where there is no engine.

It copies what ``COPY`` copies and runs what ``RUN`` runs of Python and pip, with the interpreter at hand in the place
of the base image's. It has no base image and is no user but the caller, so the rest of ``RUN`` is left out, and said
to be. Paths that begin with one of `HOSTED` stand for folders under the stage's root.
"""

import os
import re
import shlex
import shutil
import string
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import dockerfile

HOSTED = ("/home", "/mnt", "/opt")
"""Where an image of ours has files of its own."""
RUN_HERE = ("python", "pip")
LEFT_OUT = ("useradd", "chmod")
"""Programs of ``RUN`` lines that change what only an image has."""
# Settings of the host's pip say where packages come from; they are the caller's in a build with an engine too.
_THE_CALLERS = ("HOME", "PIP_NO_CACHE_DIR")
_NOT_INHERITED = ("PYTHONPATH", "PYTHONHOME", "PYTHONSAFEPATH", "VIRTUAL_ENV", "PATH")
_PATH = re.compile(rf"(?<![\w./-])(?={'|'.join(HOSTED)}(?:/|$))")


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruction:
    """One instruction: its name in capitals, its words, and ``--flag=value`` before them."""

    name: str
    words: tuple[str, ...]
    flags: Mapping[str, str]
    exec_form: bool
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A stage: what it starts from, which is another stage or an image, and its instructions after ``FROM``."""

    name: str
    base: str
    instructions: tuple[Instruction, ...]

    def of(self, name: str) -> tuple[Instruction, ...]:
        """Its instructions of this name."""
        return tuple(one for one in self.instructions if one.name == name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """What a stage is when it is built.

    Attributes:
        root: the folder that stands for its file system.
        environment: of ``ENV``, with the image's own paths.
        working_folder: path in the image.
        user: of the last ``USER``.
        entry_point: the words of ``ENTRYPOINT``.
        arguments: the words of ``CMD``.
        left_out: what was not run.
    """

    root: Path
    environment: Mapping[str, str] = field(default_factory=lambda: {"PATH": "/usr/local/bin:/usr/bin:/bin"})
    working_folder: str = "/"
    user: str | None = None
    entry_point: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    def on_host(self, text: str) -> str:
        """The text with the image's paths made those of this host."""
        return _PATH.sub(str(self.root), text)

    def path(self, inside: str | PurePosixPath) -> Path:
        """Where a file of the image is; a relative path counts from the working folder."""
        return self.root / str(PurePosixPath(self.working_folder, inside)).lstrip("/")

    def process_environment(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        """The environment that a container's process has, and nothing of ours."""
        return {name: self.on_host(value) for name, value in {**self.environment, **(more or {})}.items()}

    def command(self, *arguments: str) -> list[str]:
        """What a container runs: the entry point with these arguments, or with the image's own."""
        return [self.on_host(word) for word in (*self.entry_point, *(arguments or self.arguments))]


def parse(text: str) -> dict[str, Stage]:
    """The stages of a Dockerfile by their names, in order.

    Raises:
        ValueError: a stage has no name, or an instruction comes before the first stage.
    """
    stages: dict[str, Stage] = {}
    instructions: list[Instruction] = []
    for found in dockerfile.parse_string(text):
        one = Instruction(
            name=found.cmd.upper(),
            words=tuple(found.value),
            flags=dict(flag.removeprefix("--").partition("=")[::2] for flag in found.flags),
            exec_form=found.json,
            text=found.original,
        )
        if one.name == "FROM":
            if len(one.words) != 3:
                raise ValueError(f"{one.text!r} does not name its stage")
            instructions = []
            stages[one.words[2]] = Stage(name=one.words[2], base=one.words[0], instructions=())
        elif not stages:
            raise ValueError(f"{one.text!r} stands before the first stage")
        else:
            instructions.append(one)
        last = next(reversed(stages))
        stages[last] = replace(stages[last], instructions=tuple(instructions))
    return stages


def ancestry(stages: Mapping[str, Stage], target: str) -> list[Stage]:
    """The stages that make up the target's file system, the first one first: those of ``FROM``, without ``COPY``'s."""
    line: list[Stage] = []
    name: str | None = target
    while name in stages:
        line.insert(0, stages[name])
        name = stages[name].base
    return line


class Builder:
    """Builds stages under a folder. All of them at the same path, one at a time: environments cannot be moved."""

    def __init__(
        self, stages: Mapping[str, Stage], *, context: Path, work: Path, build_arguments: Mapping[str, str],
        say: Callable[[str], None], python: Path = Path(sys.base_prefix, "bin", f"python3.{sys.version_info.minor}"),
    ) -> None:  # fmt: skip
        """Takes what to build.

        Args:
            stages: of `parse`.
            context: where ``COPY`` finds files.
            work: an empty folder.
            build_arguments: of ``ARG``; an empty one leaves the variable unset.
            say: told what is run, and what is left out.
            python: the interpreter that stands in for the base image's.
        """
        self._stages = stages
        self._context = context
        self._root = work / "root"
        self._kept = work / "stages"
        self._kept.mkdir()
        self._arguments = build_arguments
        self._say = say
        self._interpreter = str(python)
        self._built: dict[str, Image] = {}

    def build(self, name: str) -> Image:
        """Builds the stage with all it needs, and leaves its files at the path where they work.

        The image is good until the next call.

        Raises:
            ValueError: an instruction is none that this builder knows, or a command failed.
        """
        if name not in self._built:
            self._make(name)
        shutil.rmtree(self._root, ignore_errors=True)
        _clone(self._kept / name, self._root)
        return self._built[name]

    def _make(self, name: str) -> None:
        stage = self._stages[name]
        copied = [one.flags["from"] for one in stage.of("COPY") if "from" in one.flags]
        for needed in (stage.base, *copied):
            if needed in self._stages and needed not in self._built:
                self._make(needed)
        shutil.rmtree(self._root, ignore_errors=True)
        image = self._built.get(stage.base, Image(root=self._root))
        if stage.base in self._built:
            _clone(self._kept / stage.base, self._root)
        self._root.mkdir(exist_ok=True)
        variables: dict[str, str] = {}
        self._say(f"stage {name}, from {stage.base}")
        for one in stage.instructions:
            image = self._do(one, image, variables)
        self._root.rename(self._kept / name)
        self._built[name] = image

    def _do(self, one: Instruction, image: Image, variables: dict[str, str]) -> Image:
        match one.name:
            case "ARG":
                key, _, default = one.words[0].partition("=")
                variables[key] = self._arguments.get(key, default)
            case "ENV":
                return replace(image, environment=_with(image.environment, one.words))
            case "WORKDIR":
                image.path(one.words[0]).mkdir(parents=True, exist_ok=True)
                return replace(image, working_folder=str(PurePosixPath(image.working_folder, one.words[0])))
            case "USER":
                return replace(image, user=one.words[0])
            case "ENTRYPOINT":
                return replace(image, entry_point=one.words)
            case "CMD":
                return replace(image, arguments=one.words)
            case "COPY":
                self._copy(one, image)
            case "RUN":
                return self._run(one, image, variables)
            case "LABEL" | "EXPOSE":
                pass
            case _:
                raise ValueError(f"this builder does not know {one.name}: {one.text!r}")
        return image

    def _copy(self, one: Instruction, image: Image) -> None:
        *sources, target = one.words
        for source in sources:
            inside = source.lstrip("/")
            found = self._kept / one.flags["from"] / inside if "from" in one.flags else self._context / inside
            place = image.path(target)
            if found.is_dir():
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copytree(
                    found, place, symlinks=True, dirs_exist_ok=True, copy_function=_link_or_copy,
                    ignore=None if "from" in one.flags else shutil.ignore_patterns("__pycache__"),
                )  # fmt: skip
            else:
                place = place / found.name if target.endswith("/") else place
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(found, place)

    def _run(self, one: Instruction, image: Image, variables: Mapping[str, str]) -> Image:
        left: list[str] = []
        for part in one.words[0].split("&&"):
            words = shlex.split(part)
            line = shlex.join(words)
            if words[0] in LEFT_OUT:
                self._say(f"  left out  {line}")
                left.append(line)
            elif words[0] in RUN_HERE:
                self._say(f"  run       {line}")
                given = {key: value for key, value in variables.items() if value}
                self._python(words, image, given)
            else:
                raise ValueError(f"this builder cannot run {words[0]!r}: {line!r}")
        return replace(image, left_out=(*image.left_out, *left))

    def _python(self, words: list[str], image: Image, variables: Mapping[str, str]) -> None:
        here = {key: value for key, value in os.environ.items() if key not in _NOT_INHERITED}
        own = {key: value for key, value in image.process_environment().items() if key not in _THE_CALLERS}
        environment = {**here, **own, **variables}
        program = shutil.which(words[0], path=environment["PATH"].partition(":")[0])
        if program is None:
            program = self._interpreter
            # What the base image would run; there, too, pip is a module of it.
            words = ["python", *(["-m", "pip"] if words[0] == "pip" else []), *words[1:]]
        folder = image.path(".")
        folder.mkdir(parents=True, exist_ok=True)
        command = [program, *(image.on_host(word) for word in words[1:])]
        done = subprocess.run(
            command,
            check=False,
            cwd=folder,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        if done.returncode:
            raise ValueError(f"{shlex.join(words)!r} ended with {done.returncode}:\n{done.stdout[-2000:]}")


def _with(environment: Mapping[str, str], words: tuple[str, ...]) -> dict[str, str]:
    """The environment with the pairs of an ``ENV``; values see the variables of before."""
    pairs = zip(words[::2], words[1::2], strict=True)
    return {**environment, **{name: string.Template(text).safe_substitute(environment) for name, text in pairs}}


def _clone(source: Path, target: Path) -> None:
    shutil.copytree(source, target, symlinks=True, copy_function=_link_or_copy)


def _link_or_copy(source: str, target: str) -> str:
    """A second name for the file: pip and Python put a new file in the place of one that they change."""
    if Path(target).exists():
        Path(target).unlink()
    os.link(source, target)
    return target
