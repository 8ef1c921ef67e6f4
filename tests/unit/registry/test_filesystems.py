"""Paths as users write them."""

from pathlib import Path

import pytest

from registry.filesystems import destination_of, local_path


def test_a_path_is_seen_from_its_folder_and_from_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert local_path("data/samples.npz", tmp_path) == tmp_path / "data" / "samples.npz"
    assert local_path("/data/samples.npz", tmp_path) == Path("/data/samples.npz")
    assert local_path("~/samples.npz", tmp_path) == tmp_path / "home" / "samples.npz"
    assert destination_of("~/variants").root == str((tmp_path / "home" / "variants").resolve())


@pytest.mark.parametrize("given", ["~no-such-user/samples.npz", "./~/samples.npz"])
def test_a_name_that_only_looks_like_a_home_is_a_name(tmp_path: Path, given: str) -> None:
    assert local_path(given, tmp_path) == tmp_path / given
