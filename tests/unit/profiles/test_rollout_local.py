"""What is applied on this machine, without its servers; with them, see tests/integration."""

import errno
from pathlib import Path
from typing import Any

import pytest

from profiles.deploy.rollout_local import LocalProduction
from registry.errors import StorageError
from registry.store import FolderStore
from tests.doubles.promotions import model_manifest


def test_a_full_disk_leaves_applied_what_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = LocalProduction(tmp_path, FolderStore(tmp_path))
    old = model_manifest("digits", "/store/old")
    local.apply(old)

    def full(path: Path, *_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(StorageError, match=r"applied\.json could not be written: No space left"):
            local.apply(model_manifest("digits", "/store/new"))
    assert local.read("Model", "digits") == old
    assert [path.name for path in (tmp_path / "production").iterdir()] == ["applied.json"]
