import os
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from profiles.serving.session import Session, SessionError, _ort_providers, import_engine, open_session
from tests.doubles.models import mlp, mlp_answer, two_inputs, write_onnx, write_openvino

ENGINES = ["onnxruntime", "openvino"]
X = np.random.default_rng(7).normal(size=(5, 8)).astype(np.float32)


def opened(model: onnx.ModelProto, folder: Path, engine: str, **settings: object) -> Session:
    artifact = write_onnx(model, folder)
    return open_session(folder / artifact.entry, engine=engine, **settings)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("threads", [1, 2])
def test_answers_as_numpy_does(tmp_path: Path, engine: str, threads: int) -> None:
    session = opened(mlp(), tmp_path, engine, precision="float32", threads=threads)
    np.testing.assert_allclose(session.run({"x": X})["logits"], mlp_answer(X), rtol=1e-4, atol=1e-4)
    assert [(port.name, port.dtype.name, port.shape) for port in session.inputs] == [("x", "float32", (None, 8))]
    assert [(port.name, port.dtype.name, port.shape) for port in session.outputs] == [("logits", "float32", (None, 4))]
    assert session.engine_version[0].isdigit()


def test_reads_openvino_ir(tmp_path: Path) -> None:
    artifact = write_openvino(mlp(), tmp_path)
    session = open_session(tmp_path / artifact.entry, engine="openvino", precision="float32")
    np.testing.assert_allclose(session.run({"x": X})["logits"], mlp_answer(X), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
def test_answers_do_not_change_with_the_next_run(tmp_path: Path, engine: str) -> None:
    session = opened(mlp(), tmp_path, engine, precision="float32")
    first = session.run({"x": X})["logits"]
    kept = first.copy()
    session.run({"x": -X})
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("level", ["disable", "basic", "extended", "all"])
def test_every_graph_level_opens(tmp_path: Path, engine: str, level: str) -> None:
    assert opened(mlp(), tmp_path, engine, graph_level=level).run({"x": X})["logits"].shape == (5, 4)


@pytest.mark.parametrize("engine", ENGINES)
def test_integers_and_booleans_keep_their_types(tmp_path: Path, engine: str) -> None:
    session = opened(two_inputs(), tmp_path, engine)
    ids = np.array([[1, 2, 3], [4, 5, 6]])
    mask = np.array([[1, 1, 0], [1, 0, 0]])
    got = session.run({"mask": mask, "ids": ids})
    assert got["total"].tolist() == [3, 4]
    assert got["total"].dtype == np.int64
    assert got["present"].tolist() == mask.astype(bool).tolist()
    assert got["present"].dtype == np.bool_


@pytest.mark.parametrize("engine", ENGINES)
def test_takes_float16(tmp_path: Path, engine: str) -> None:
    got = opened(mlp(dtype="float16"), tmp_path, engine).run({"x": X.astype(np.float16)})["logits"]
    assert got.dtype == np.float16
    np.testing.assert_allclose(got, mlp_answer(X), rtol=0.05, atol=0.1)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("batch", [1, 2, 4, 5, 8])
def test_a_fixed_batch_takes_any_number_of_rows(tmp_path: Path, engine: str, batch: int) -> None:
    session = opened(mlp(batch=batch), tmp_path, engine, precision="float32")
    assert session.inputs[0].shape == (None, 8)
    got = session.run({"x": X})["logits"]
    np.testing.assert_allclose(got, mlp_answer(X), rtol=1e-4, atol=1e-4)
    assert session.run({"x": X[:0]})["logits"].shape == (0, 4)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({}, "'x' is missing"),
        ({"x": X, "y": X}, "no input 'y'"),
        ({"x": X.astype(np.float64)}, "is float32, not float64"),
        ({"x": X[:, :7]}, r"shape \?x8, not 5x7"),
        ({"x": X[0]}, r"shape \?x8, not 8"),
    ],
)
def test_says_what_does_not_fit(tmp_path: Path, engine: str, inputs: dict[str, np.ndarray], said: str) -> None:
    session = opened(mlp(), tmp_path, engine)
    with pytest.raises(SessionError, match=said):
        session.run(inputs)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("threads", [1, 2])
def test_an_engine_that_fails_in_a_run_is_a_session_error(tmp_path: Path, engine: str, threads: int) -> None:
    session = opened(two_inputs(), tmp_path, engine, threads=threads)
    with pytest.raises(SessionError, match=f"{engine} failed on inputs of shapes"):
        session.run({"ids": np.ones((2, 3), np.int64), "mask": np.ones((2, 4), np.int64)})


@pytest.mark.parametrize("engine", ENGINES)
def test_garbage_is_a_session_error(tmp_path: Path, engine: str) -> None:
    (tmp_path / "model.onnx").write_bytes(b"this is no model")
    with pytest.raises(SessionError, match=f"{engine} cannot open model.onnx"):
        open_session(tmp_path / "model.onnx", engine=engine)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"engine": "tflite"}, "no engine 'tflite'"),
        ({"engine": "onnxruntime", "precision": "int4"}, "no precision 'int4'"),
        ({"engine": "onnxruntime", "graph_level": "most"}, "no graph level 'most'"),
        ({"engine": "onnxruntime", "threads": 0}, "threads is 1 or more, not 0"),
        ({"engine": "onnxruntime", "providers": ["npu"]}, "no provider 'npu'"),
        ({"engine": "onnxruntime", "providers": ["tensorrt"]}, "has no TensorrtExecutionProvider"),
        ({"engine": "openvino", "providers": ["cuda"]}, "takes no providers cuda"),
    ],
)
def test_refuses_settings_it_does_not_know(tmp_path: Path, settings: dict[str, object], said: str) -> None:
    with pytest.raises(SessionError, match=said):
        opened(mlp(), tmp_path, **settings)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SessionError, match=r"there is no model file .*absent\.onnx"):
        open_session(tmp_path / "absent.onnx", engine="onnxruntime")


def test_providers_keep_the_order_they_are_asked_in() -> None:
    available = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    assert _ort_providers(["cuda", "cpu"], available) == ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert _ort_providers(None, available) == ["CPUExecutionProvider"]


def test_tensorrt_keeps_its_engines_where_it_is_told() -> None:
    available = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    first, second = _ort_providers(["tensorrt:/mnt/cache", "cuda"], available)
    name, options = first
    assert name == "TensorrtExecutionProvider"
    assert {key for key, value in options.items() if value == "/mnt/cache"} == {
        "trt_engine_cache_path", "trt_timing_cache_path",
    }  # fmt: skip
    assert second == "CUDAExecutionProvider"
    for wrong in ("cuda:/mnt/cache", "tensorrt:cache", "tensorrt:"):
        with pytest.raises(SessionError, match="only tensorrt takes a folder"):
            _ort_providers([wrong], available)


def test_strings_are_refused(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Identity", ["s"], ["t"])],
        "strings",
        [helper.make_tensor_value_info("s", TensorProto.STRING, ["n"])],
        [helper.make_tensor_value_info("t", TensorProto.STRING, ["n"])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    with pytest.raises(SessionError, match="'s' is of type string"):
        opened(model, tmp_path, "onnxruntime")


@pytest.mark.parametrize("engine", ENGINES)
def test_an_answer_may_be_empty(tmp_path: Path, engine: str) -> None:
    graph = helper.make_graph(
        [helper.make_node("NonZero", ["x"], ["where"])],
        "nonzero",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info("where", TensorProto.INT64, [1, "found"])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    got = opened(model, tmp_path, engine).run({"x": np.zeros(3, np.float32)})
    assert got["where"].shape == (1, 0)


@pytest.mark.parametrize("before", [None, "yes"])
def test_an_engine_is_imported_without_its_telemetry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    """By the variables that OpenVINO and nncf look at, which are then as they were."""
    (tmp_path / "engine_that_looks.py").write_text("import os\nseen = os.environ['CI'], os.environ['NNCF_CI']\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "engine_that_looks", raising=False)
    monkeypatch.delenv("NNCF_CI", raising=False)
    if before is None:
        monkeypatch.delenv("CI", raising=False)
    else:
        monkeypatch.setenv("CI", before)
    assert import_engine("engine_that_looks").seen == ("true", "1")
    assert (os.environ.get("CI"), os.environ.get("NNCF_CI")) == (before, None)
