"""OpenVINO behind MLflow's pyfunc: a file that stands alone, beside the model."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import registry

SOURCE = Path(registry.__path__[0], "openvino_pyfunc.py")


def alone(folder: Path) -> ModuleType:
    """The file loaded from a folder that has nothing else of ours, as MLflow does."""
    copied = Path(shutil.copy(SOURCE, folder))
    spec = importlib.util.spec_from_file_location("openvino_pyfunc_alone", copied)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("before", [None, "yes"])
def test_openvino_is_imported_without_its_telemetry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    (tmp_path / "openvino.py").write_text("import os\nseen = os.environ['CI']\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "openvino", raising=False)
    if before is None:
        monkeypatch.delenv("CI", raising=False)
    else:
        monkeypatch.setenv("CI", before)
    try:
        assert alone(tmp_path)._openvino().seen == "true"
    finally:
        sys.modules.pop("openvino", None)
    assert os.environ.get("CI") == before


def test_it_needs_nothing_of_ours(tmp_path: Path) -> None:
    """Isolated from our packages, it is imported with numpy alone."""
    shutil.copy(SOURCE, tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import openvino_pyfunc; "
        "print(sorted({'registry', 'profiles', 'optimize', 'openvino'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "[]"


def test_several_inputs_are_asked_for_by_name(tmp_path: Path) -> None:
    module = alone(tmp_path)
    model = module.OpenVinoModel.__new__(module.OpenVinoModel)
    model._inputs = ["ids", "mask"]
    with pytest.raises(ValueError, match=r"\['ids', 'mask'\]"):
        model.predict([1.0])
