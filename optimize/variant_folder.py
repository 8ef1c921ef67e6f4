"""The folder that ``burnish make`` leaves a variant in, replaced whole by the next one of its name."""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from optimize.stages.tensorrt import BUILD_FILE
from registry.errors import InputError, StorageError
from registry.records import Variant

_SUFFIXES = frozenset({".onnx", ".data", ".onnx_data", ".xml", ".bin"})
"""Of the files of variants."""


def place_variant(files: Path, variant: Variant, out: Path) -> Path:
    """A folder of the variant's name in ``out`` with copies of its files; what was there of a variant is replaced.

    Args:
        files: the folder that has its files.
        variant: whose they are.
        out: a folder that is there.

    Raises:
        InputError: something is there that is no part of a variant.
        StorageError: ``out`` cannot be written.
    """
    folder = out / variant.name.replace("/", "-")
    own = {file.path for file in variant.artifact.files} | {BUILD_FILE}
    strange = [path for path in sorted(folder.rglob("*")) if not _is_ours(path, path.relative_to(folder), own)]
    if strange or folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        what = strange[0] if strange else folder
        raise InputError(f"{what} is in the way, and no part of a variant", hint="Name another folder with --out.")
    try:
        with TemporaryDirectory(dir=out, prefix=".new-") as draft:
            made = shutil.copytree(files, Path(draft) / "made")
            if folder.exists():
                folder.rename(Path(draft) / "old")
            made.rename(folder)
    except OSError as error:
        raise StorageError(f"{out} cannot be written: {error.strerror or error}") from error
    return folder


def _is_ours(path: Path, inside: Path, own: set[str]) -> bool:
    """Whether a variant may have brought this; links it never brings, and folders only for the files in them."""
    if path.is_symlink():
        return False
    return path.is_dir() or path.suffix in _SUFFIXES or inside.as_posix() in own
