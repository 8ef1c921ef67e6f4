"""A server that could not run a model is found out before one is given to it."""

from pathlib import Path

import pytest

from profiles.deploy import local_installation as local
from registry.errors import UnreachableError


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    """A copy of the real stub that wants the library of a Python that does not exist."""
    if local.available_servers()["triton"].version is None:
        pytest.skip(f"triton: {local.available_servers()['triton'].reason}")
    content = local.stub_of_python().read_bytes()
    assert b"libpython3" in content
    copy = tmp_path / "stub"
    copy.write_bytes(content.replace(b"libpython3", b"libpython9"))
    copy.chmod(0o755)
    return copy


def test_the_real_stub_finds_its_libraries(stub: Path) -> None:
    local.check_libraries(local.stub_of_python())


def test_a_missing_libpython_is_named_with_its_package(stub: Path) -> None:
    with pytest.raises(UnreachableError, match=r"needs libpython9\.\d+\.so\.1\.0, which is not here") as caught:
        local.check_libraries(stub)
    assert str(caught.value.hint).startswith("On Debian and Ubuntu: apt-get install libpython9.")


def test_it_is_the_reason_why_triton_cannot_be_used(stub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "stub_of_python", lambda: stub)
    local.server_version.cache_clear()
    try:
        here = local.available_servers()["triton"]
    finally:
        local.server_version.cache_clear()
    assert here.version is None
    assert "apt-get install libpython9" in str(here.reason)
