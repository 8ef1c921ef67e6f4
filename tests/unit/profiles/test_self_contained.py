import ast
import dataclasses
import hashlib
import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from profiles.serving.core2 import manifests
from profiles.serving.core2.folder import model_folder, write_folder
from profiles.serving.roundtrip import agent_rewrite, check_roundtrip
from profiles.serving.self_contained import Bundle, bundle, bundle_for, source_of
from registry.errors import InputError
from tests.doubles.candidates import candidate
from tests.doubles.models import mlp, write_onnx

DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
BUNDLES = [("runtime", "SessionRuntime"), ("triton_model", "TritonPythonModel")]

# Where nothing of ours can be imported: no site, so no path to this project.
ALONE = """
import importlib, json, sys, traceback
sys.path[:0] = [{packages!r}, {folder!r}]
import numpy as np
for name in ("optimize", "profiles", "registry"):
    try:
        importlib.import_module(name)
    except ImportError:
        continue
    sys.exit(f"{{name}} can be imported here")
module = importlib.import_module({module!r})
served, first = module.TritonPythonModel, module.Session
importlib.reload(module)
session = module.open_session({model!r}, engine="onnxruntime")
found = {{"same": module.TritonPythonModel is served and module.Session is first}}
found["shape"] = session.run({{"x": np.zeros((3, 8), np.float32)}})["logits"].shape
try:
    session.run({{"y": np.zeros(1)}})
except module.SessionError as error:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    found["frame"] = [frame.filename, frame.name, frame.line]
print(json.dumps(found))
"""


def made(**sources: str) -> Bundle:
    return bundle("a", "X", sources.__getitem__)


def run(text: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "made"}
    exec(compile(text, "made.py", "exec"), names)
    return names


@pytest.mark.parametrize(("entry", "class_name"), BUNDLES)
def test_the_same_sources_are_the_same_file_named_by_its_digest(entry: str, class_name: str) -> None:
    one = bundle(entry, class_name)
    assert one == bundle(entry, class_name)
    assert one.file == f"burnish_runtime_{hashlib.sha256(one.text.encode()).hexdigest()[:12]}.py"
    assert one.implementation == f"{one.module}.{class_name}"
    other = bundle(entry, class_name, lambda name: source_of(name) + "# more\n")
    assert other.module != one.module


@pytest.mark.parametrize(("entry", "class_name"), BUNDLES)
def test_nothing_of_the_house_is_imported_and_all_sources_are_there(entry: str, class_name: str) -> None:
    text = bundle(entry, class_name).text
    tree = ast.parse(text, feature_version=(3, 10))  # MLServer's own image, and Triton's, have Python 3.10
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {name.partition(".")[0] for name in imported} & {"optimize", "profiles", "registry"}
    kept = {getattr(node, "name", None) for node in ast.walk(tree)}
    for name in ("session", entry):
        assert {node.name for node in ast.parse(source_of(name)).body if isinstance(node, DEFINITIONS)} <= kept


def test_it_runs_alone_and_a_second_load_changes_nothing(tmp_path: Path) -> None:
    artifact = write_onnx(mlp(), tmp_path)
    alone = bundle("triton_model", "TritonPythonModel")
    (tmp_path / alone.file).write_text(alone.text)
    code = ALONE.format(
        packages=sysconfig.get_path("purelib"),
        folder=str(tmp_path),
        module=alone.module,
        model=str(tmp_path / artifact.entry),
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["same"], found["shape"]) == (True, [3, 4])
    file, function, line = found["frame"]
    assert (file, function) == (str(tmp_path / alone.file), "check")
    assert line.startswith('raise SessionError(f"the model has no input')


def test_texts_of_several_lines_stay_as_they_are() -> None:
    text = 'X = """first\n  second\n\n    third"""\n'
    function = 'def f():\n    """Says.\n\n    More.\n    """\n    return f"""{1}\n2"""\n'
    names = run(made(a=f"{text}\n\n{function}").text)
    assert names["X"] == "first\n  second\n\n    third"
    assert names["f"]() == "1\n2"


def test_each_module_comes_once_and_after_those_it_needs() -> None:
    one = "from profiles.serving.c import ONE\n"
    names = run(
        made(
            a=f"import math\nfrom profiles.serving.b import (\n    double,\n)\n{one}\nX = double(ONE)\n",
            b=f"{one}import math\n\n\ndef double(n):\n    return 2 * n + math.floor(ONE / 2)\n",
            c="ONE = 1\n",
        ).text
    )
    assert names["X"] == 2


@pytest.mark.parametrize(
    ("sources", "said"),
    [
        ({"a": "from profiles.serving.b import Y\nX = 1\n", "b": "X = Y = 2\n"}, "a.py: 'X' is another thing"),
        ({"a": "from profiles.serving.b import f\nX = f\n", "b": "Y = 2\n"}, "nothing .* defines 'f'"),
        ({"a": "from registry.errors import InputError\nX = 1\n"}, "a.py:1: registry.errors cannot be bundled"),
        ({"a": "from profiles.serving import b\nX = 1\n"}, "profiles.serving cannot be bundled"),
        ({"a": "X = 1\nfrom profiles.serving.b import Y as Z\n"}, "a.py:2: .* by `from ... import name` alone"),
        ({"a": "import profiles.serving.b\nX = 1\n"}, "by `from ... import name` alone"),
        ({"a": "def X():\n    from profiles.serving.b import Y\n"}, "a.py:2: .* by `from"),
        ({"a": "X = 1\nif X:\n    Y = 2\n"}, "a.py:2: .* definitions and constants alone"),
    ],
)
def test_what_cannot_share_a_file_is_an_error(sources: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        made(**sources)


def test_tritons_own_backends_need_no_code_of_ours() -> None:
    served = candidate(server="triton")
    served = dataclasses.replace(served, serving=dataclasses.replace(served.serving, backend="onnxruntime"))
    with pytest.raises(InputError, match="own backend onnxruntime, which needs no code"):
        bundle_for(served)


def test_a_folder_for_mlserver_comes_through_core_2_whole(tmp_path: Path) -> None:
    artifact = write_onnx(mlp(), tmp_path / "from")
    environment = tmp_path / "any.tar.gz"
    environment.write_bytes(b"packed")
    served = candidate(max_batch_size=4, max_batch_delay_ms=1.0)
    folder = model_folder(served, artifact, model_name="m", self_contained=True, environment=environment)
    ours = bundle_for(served)
    tarball = f"environment-{hashlib.sha256(b'packed').hexdigest()[:12]}.tar.gz"
    settings = json.loads(folder.rendered["model-settings.json"])
    assert settings["implementation"] == ours.implementation
    assert settings["parameters"]["environment_tarball"] == f"./{tarball}"
    write_folder(folder, tmp_path / "from", tmp_path / "folder")
    requirements = manifests.SELF_CONTAINED["burnish"]
    found = check_roundtrip(
        tmp_path / "folder",
        "mlserver",
        parameters=manifests.model_parameters(served, folder.extra),
        requirements=requirements,
    )
    assert {one.severity for one in found} <= {"info"}
    rewritten = agent_rewrite(tmp_path / "folder", "mlserver", name="m", requirements=requirements)
    rewritten.lay_out(tmp_path / "models")
    there = tmp_path / "models/m_1/1"
    assert {path.name for path in there.iterdir()} == {"model-settings.json", "model.onnx", ours.file, tarball}
    kept = json.loads((there / "model-settings.json").read_text())
    assert kept["implementation"] == settings["implementation"]
    assert {**kept["parameters"], "version": None} == {**settings["parameters"], "version": None}
    assert (there / ours.file).read_text() == ours.text
    assert (there / tarball).read_bytes() == b"packed"


@pytest.mark.parametrize("change", ["edited", "gone"])
def test_a_folder_without_its_own_code_is_found_out(tmp_path: Path, change: str) -> None:
    artifact = write_onnx(mlp(), tmp_path / "from")
    write_folder(
        model_folder(candidate(), artifact, model_name="m", self_contained=True), tmp_path / "from", tmp_path / "folder"
    )
    code = tmp_path / "folder" / bundle_for(candidate()).file
    if change == "gone":
        code.unlink()
    else:
        code.write_text(code.read_text() + "# mine\n")
    (found,) = (one for one in check_roundtrip(tmp_path / "folder", "mlserver") if one.severity == "error")
    assert (found.rule, found.key) == ("C114", "/implementation")
    assert found.message.startswith(code.name)


def test_the_folders_digest_is_of_all_that_is_in_it(tmp_path: Path) -> None:
    artifact = write_onnx(mlp(), tmp_path)
    packed = tmp_path / "any.tar.gz"
    packed.write_bytes(b"packed")
    digests = {model_folder(candidate(), artifact, model_name="m").digest}
    digests.add(model_folder(candidate(), artifact, model_name="m", self_contained=True).digest)
    for content in (b"packed", b"other"):
        packed.write_bytes(content)
        folder = model_folder(candidate(), artifact, model_name="m", self_contained=True, environment=packed)
        digests.add(folder.digest)
    assert len(digests) == 4


def test_a_folder_for_tritons_python_backend_has_all_in_model_py(tmp_path: Path) -> None:
    artifact = write_onnx(mlp(), tmp_path)
    served = candidate(server="triton")
    folder = model_folder(served, artifact, model_name="m", self_contained=True)
    assert folder.rendered["1/model.py"] == bundle_for(served).text
    with pytest.raises(InputError, match="an environment is for MLServer"):
        model_folder(served, artifact, model_name="m", self_contained=True, environment=tmp_path / "model.onnx")


def test_servers_of_core_2s_own_can_take_it() -> None:
    for backend, server in (("burnish", "mlserver"), ("python", "triton")):
        assert manifests.STOCK_CAPABILITIES[server] >= {*manifests.SELF_CONTAINED[backend]}
    rendered = manifests.render_server(
        "s", candidate().serving, labels={}, capabilities=manifests.SELF_CONTAINED["burnish"]
    )
    assert rendered["spec"]["capabilities"] == ["mlserver", "python"]
