"""Versions of installed packages, where one may come under another name."""

import importlib.metadata
from importlib.metadata import PackageNotFoundError

__all__ = ["PackageNotFoundError", "version"]

_BUILDS = {"onnxruntime": ("onnxruntime-gpu",)}
"""Package -> distributions that hold the same modules, built for other hardware."""


def version(package: str) -> str:
    """The installed version of a package, or that of the build that stands in its place.

    Raises:
        PackageNotFoundError: neither is installed.
    """
    for name in (package, *_BUILDS.get(package, ())):
        try:
            return importlib.metadata.version(name)
        except PackageNotFoundError:
            continue
    raise PackageNotFoundError(package)
