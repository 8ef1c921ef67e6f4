import io
import sys
import tarfile
from importlib import metadata
from pathlib import Path

import pytest

from profiles.serving import environment_tarball
from profiles.serving.environment_tarball import Environment, check_environment, pack_environment, tarball_name
from registry.errors import InputError

SITE = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small engine, installed as pip installs."""
    site = tmp_path / "site"
    content = {
        "tiny/__init__.py": "VERSION = 1\n",
        "tiny/core.so": "\x7fELF",
        "tiny/__pycache__/__init__.cpython-311.pyc": "compiled",
        "tiny-1.2.dist-info/METADATA": "Metadata-Version: 2.1\nName: tiny\nVersion: 1.2\n",
        "tiny-1.2.dist-info/LICENSE": "as you like",
        "tiny-1.2.dist-info/INSTALLER": "pip",
    }
    for path, text in content.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(text)
    (site / "tiny/core.so").chmod(0o755)
    listed = [*content, "tiny-1.2.dist-info/RECORD", "../../bin/tiny-tool"]
    (site / "tiny-1.2.dist-info/RECORD").write_text("".join(f"{path},,\n" for path in listed))
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setitem(environment_tarball.PACKAGES, "tiny", ("tiny",))
    return site


def test_it_holds_what_is_imported_and_a_python_that_is_the_servers(installed: Path, tmp_path: Path) -> None:
    pack_environment("tiny", "1.2", tmp_path / "one.tar.gz")
    with tarfile.open(tmp_path / "one.tar.gz") as opened:
        modes = {entry.name: entry.mode for entry in opened.getmembers()}
        script = opened.extractfile("bin/python")
        assert script is not None
        assert b"/proc/$PPID/exe" in script.read()
    assert modes == {
        "bin/python": 0o755,
        f"{SITE}/tiny/__init__.py": 0o644,
        f"{SITE}/tiny/core.so": 0o755,
        f"{SITE}/tiny-1.2.dist-info/METADATA": 0o644,
        f"{SITE}/tiny-1.2.dist-info/LICENSE": 0o644,
    }
    assert check_environment(tmp_path / "one.tar.gz", "tiny") == Environment(
        python=SITE.split("/")[1].removeprefix("python"), engine_version="1.2"
    )


def test_the_same_installation_gives_the_same_bytes(installed: Path, tmp_path: Path) -> None:
    pack_environment("tiny", "1.2", tmp_path / "one.tar.gz")
    (installed / "tiny/core.so").touch()
    pack_environment("tiny", "1.2", tmp_path / "two.tar.gz")
    assert (tmp_path / "one.tar.gz").read_bytes() == (tmp_path / "two.tar.gz").read_bytes()
    assert tarball_name(tmp_path / "one.tar.gz") == tarball_name(tmp_path / "two.tar.gz")
    (installed / "tiny/__init__.py").write_text("VERSION = 2\n")
    pack_environment("tiny", "1.2", tmp_path / "two.tar.gz")
    assert tarball_name(tmp_path / "one.tar.gz") != tarball_name(tmp_path / "two.tar.gz")


def test_another_version_than_was_measured_is_refused(installed: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tiny 1\.3 was measured, and 1\.2 is installed here"):
        pack_environment("tiny", "1.3", tmp_path / "one.tar.gz")


def test_half_an_installation_is_refused(installed: Path, tmp_path: Path) -> None:
    import importlib_metadata  # noqa: F401 - it changes what importlib.metadata finds

    (installed / "tiny/core.so").unlink()
    with pytest.raises(InputError, match=r"tiny is not installed here as a whole: .*core\.so is missing"):
        pack_environment("tiny", "1.2", tmp_path / "one.tar.gz")
    assert not (tmp_path / "one.tar.gz").exists()


def test_what_is_not_installed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(environment_tarball.PACKAGES, "absent-engine", ("absent-engine",))
    with pytest.raises(InputError, match="absent-engine is not installed here"):
        pack_environment("absent-engine", "1", tmp_path / "one.tar.gz")


def test_the_engines_are_installed_with_lists_of_their_files() -> None:
    for names in environment_tarball.PACKAGES.values():
        assert all(metadata.distribution(name).files for name in names)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["lib/python3.10/site-packages/tiny/__init__.py"], "has no bin/python"),
        (["bin/python", "lib/python3.10/site-packages/other/__init__.py"], r"has no tiny under lib/python\*"),
        (None, "cannot be read as a tarball"),
    ],
)
def test_a_tarball_that_would_not_do_is_refused(tmp_path: Path, names: list[str] | None, said: str) -> None:
    packed = tmp_path / "mine.tar.gz"
    if names is None:
        packed.write_bytes(b"no tarball")
    else:
        write(packed, names)
    with pytest.raises(InputError, match=said):
        check_environment(packed, "tiny")


def test_one_of_conda_pack_is_known_by_its_python(tmp_path: Path) -> None:
    packed = tmp_path / "mine.tar.gz"
    write(packed, ["./bin/python", "./lib/python3.10/site-packages/tiny/__init__.py"])
    assert check_environment(packed, "tiny") == Environment(python="3.10", engine_version=None)


def write(target: Path, names: list[str]) -> None:
    with tarfile.open(target, "w:gz") as opened:
        for name in names:
            opened.addfile(tarfile.TarInfo(name), io.BytesIO())
