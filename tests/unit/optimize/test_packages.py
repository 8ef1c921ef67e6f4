"""A build of a package for other hardware counts as the package."""

import subprocess
import sys
from importlib.metadata import version as installed
from pathlib import Path

import pytest

from optimize.packages import PackageNotFoundError, version

ROOT = Path(__file__).resolve().parents[3]


def test_the_version_is_that_of_what_is_installed():
    assert version("onnxruntime") == installed("onnxruntime")


def test_a_package_that_is_not_there_is_named():
    with pytest.raises(PackageNotFoundError, match="no-such-package"):
        version("no-such-package")


def test_onnxruntime_may_be_the_build_for_gpus(tmp_path: Path):
    described = tmp_path / "onnxruntime_gpu-9.8.7.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 9.8.7\n")
    code = (
        f"import sys; sys.path[:] = [*sys.path, {str(ROOT)!r}, {str(tmp_path)!r}]; "
        "from optimize.packages import version; print(version('onnxruntime'))"
    )
    # Without site-packages, where the build for the CPU is.
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], check=False, capture_output=True, text=True)
    assert done.stdout.strip() == "9.8.7", done.stderr
