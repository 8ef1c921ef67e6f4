import json
from pathlib import Path

import pytest

from optimize.stages.onnx_files import ENTRY
from optimize.stages.tensorrt import BUILD_FILE
from optimize.tensorrt_serving import write_repository
from registry.errors import InputError


def test_a_folder_that_cannot_be_made_is_the_users_input(tmp_path: Path) -> None:
    prepared = tmp_path / "prepared"
    prepared.mkdir()
    (prepared / ENTRY).touch()
    build = {"trtexec": {"10.0": ["trtexec", f"--onnx={ENTRY}"]}, "profile": {}, "triton": {}}
    (prepared / BUILD_FILE).write_text(json.dumps(build), encoding="utf-8")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"--out .*file cannot be made"):
        write_repository(prepared, tmp_path / "file" / "repository")
