"""An engine for servers that have none: a tarball for MLServer's ``environment_tarball``.

MLServer (1.7.1, ``mlserver/env.py``) unpacks it, starts workers with its ``bin/python``, and puts its
``lib/python*/site-packages`` before the server's own packages. So it has to be of the server's Python and platform, and
need not hold MLServer.

venv-pack links to the Python of the machine it ran on, and conda-pack needs conda; so this writes the few files itself.
"""

import csv
import gzip
import io
import platform
import re
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath

from registry.codec import file_sha256
from registry.errors import InputError

PACKAGES = {"onnxruntime": ("onnxruntime", "numpy"), "openvino": ("openvino", "numpy")}
"""Engine -> the distributions that a session imports; whatever else they ask for it does not need."""
PYTHON = """#!/bin/sh
# MLServer starts its workers with this. It brings no Python: the server's own, which starts it, is taken.
python=$(readlink "/proc/$PPID/exe") || python=python3
exec "$python" "$@"
"""
_ABOUT_THIS_INSTALL = frozenset({"RECORD", "INSTALLER", "REQUESTED", "direct_url.json"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What is in a tarball.

    Attributes:
        python: the minor version of Python that it is for, such as ``3.11``.
        engine_version: of the engine in it, or None where the files do not tell.
    """

    python: str
    engine_version: str | None


def pack_environment(engine: str, version: str, target: Path) -> None:
    """Writes an environment with an engine and numpy, as they are installed here: for this Python and this platform.

    The same installation gives the same bytes.

    Args:
        engine: ``onnxruntime`` or ``openvino``.
        version: of the engine, which has to be the one that is installed.
        target: the ``.tar.gz`` to write.

    Raises:
        InputError: the engine is not installed here in this version, or not with a list of its files.
    """
    files = {path: source for name in PACKAGES[engine] for path, source in _files(_distribution(name, engine, version))}
    folder = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    with (
        target.open("wb") as raw,
        gzip.GzipFile("", "wb", compresslevel=1, fileobj=raw, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w") as tarball,
    ):
        script = _entry("bin/python", len(PYTHON), executable=True)
        tarball.addfile(script, io.BytesIO(PYTHON.encode()))
        for path, source in sorted(files.items()):
            facts = source.stat()
            entry = _entry(f"{folder}/{path}", facts.st_size, executable=bool(facts.st_mode & 0o100))
            with source.open("rb") as content:
                tarball.addfile(entry, content)


def here() -> str:
    """The Python and platform that `pack_environment` packs for."""
    return f"Python {sys.version_info.major}.{sys.version_info.minor} on {platform.system()} {platform.machine()}"


def check_environment(tarball: Path, engine: str) -> Environment:
    """What is in a tarball that somebody else made, with conda-pack say.

    Raises:
        InputError: it is none, or MLServer could not use it, or the engine is not in it.
    """
    try:
        with tarfile.open(tarball) as opened:
            names = {str(PurePosixPath(name)) for name in opened.getnames()}
    except (OSError, tarfile.TarError, EOFError) as error:
        raise InputError(f"{tarball} cannot be read as a tarball: {error}") from error
    packages = re.compile(r"lib/python(\d+\.\d+)/site-packages/" + re.escape(engine) + r"/__init__\.py")
    found = next((match[1] for name in sorted(names) if (match := packages.fullmatch(name))), None)
    if found is None or "bin/python" not in names:
        lacking = "bin/python" if found else f"{engine} under lib/python*/site-packages"
        raise InputError(
            f"{tarball} has no {lacking}", hint="Make it with conda-pack, or leave it to burnish: --environment pack."
        )
    about = re.compile(rf"lib/python{re.escape(found)}/site-packages/{engine}(?:_gpu)?-([^-/]+)\.dist-info/METADATA")
    version = next((match[1] for name in sorted(names) if (match := about.fullmatch(name))), None)
    return Environment(python=found, engine_version=version)


def tarball_name(tarball: Path) -> str:
    """The name by which it stands beside a model: of its digest, so that another one has another."""
    return f"environment-{file_sha256(tarball)[:12]}.tar.gz"


def _distribution(name: str, engine: str, version: str) -> metadata.Distribution:
    names = (name, f"{name}-gpu") if name == "onnxruntime" else (name,)
    for one in names:
        try:
            found = metadata.distribution(one)
        except metadata.PackageNotFoundError:
            continue
        if name == engine and found.version.split("+")[0] != version:
            raise InputError(
                f"{name} {version} was measured, and {found.version} is installed here",
                hint=f"Install {name}=={version}, or give --environment a tarball that has it.",
            )
        return found
    wanted = f"{name}=={version}" if name == engine else name
    raise InputError(f"{name} is not installed here, so it cannot be packed", hint=f"Install {wanted}.")


def _files(distribution: metadata.Distribution) -> Iterator[tuple[str, Path]]:
    """The files of a distribution that a program imports or a license asks for, by their path in site-packages."""
    # Not `files`: where the package importlib_metadata was imported, that leaves out what is missing.
    record = distribution.read_text("RECORD")
    if record is None:
        raise InputError(f"{distribution.name} is installed here without a list of its files, so it cannot be packed")
    for path, *_ in csv.reader(record.splitlines()):
        file = PurePosixPath(path)
        if ".." in file.parts or "__pycache__" in file.parts or file.name in _ABOUT_THIS_INSTALL:
            continue
        source = Path(str(distribution.locate_file(file)))
        if not source.is_file():
            raise InputError(f"{distribution.name} is not installed here as a whole: {source} is missing")
        yield file.as_posix(), source


def _entry(path: str, size: int, *, executable: bool) -> tarfile.TarInfo:
    """An entry that says nothing of this machine: no owner, no time."""
    entry = tarfile.TarInfo(path)
    entry.size = size
    entry.mode = 0o755 if executable else 0o644
    return entry
