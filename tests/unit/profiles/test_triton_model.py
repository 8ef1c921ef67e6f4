import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from profiles.serving.session import SessionError, open_session, run_merged
from profiles.serving.triton_model import TritonPythonModel, refuse_numpy_2
from tests.doubles.models import mlp, mlp_answer, two_inputs, write_onnx


def rows(*sizes: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(3)
    return [{"x": rng.normal(size=(size, 8)).astype(np.float32)} for size in sizes]


def test_each_request_gets_its_own_rows(tmp_path: Path) -> None:
    artifact = write_onnx(mlp(), tmp_path)
    requests = rows(1, 3, 2)
    answers = run_merged(open_session(tmp_path / artifact.entry, engine="onnxruntime"), requests)
    for request, answer in zip(requests, answers, strict=True):
        np.testing.assert_allclose(answer["logits"], mlp_answer(request["x"]), rtol=1e-4, atol=1e-4)


def test_outputs_without_the_batch_are_not_split() -> None:
    session: Any = SimpleNamespace(run=lambda inputs: {"mean": np.zeros((1, 4))})
    with pytest.raises(SessionError, match="4 rows went in"):
        run_merged(session, rows(1, 3))


@pytest.mark.parametrize(("version", "refused"), [("1.26.4", False), ("2.0.0", True), ("10.1", True)])
def test_numpy_2_is_refused_before_it_gives_wrong_numbers(version: str, refused: bool) -> None:
    if not refused:
        refuse_numpy_2(version)
        return
    with pytest.raises(RuntimeError, match=f"numpy {version}"):
        refuse_numpy_2(version)


class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TritonPythonModel:
    backend = SimpleNamespace(
        Tensor=Tensor,
        TritonError=str,
        InferenceResponse=lambda output_tensors=(), error=None: SimpleNamespace(tensors=output_tensors, error=error),
    )
    monkeypatch.setitem(__import__("sys").modules, "triton_python_backend_utils", backend)
    monkeypatch.setattr("profiles.serving.triton_model.np.__version__", "1.26.4")
    write_onnx(two_inputs(), tmp_path / "1")
    config = {
        "max_batch_size": 8,
        "output": [{"name": "total"}, {"name": "present"}],
        "parameters": {"entry": {"string_value": "model.onnx"}},
    }
    model = TritonPythonModel()
    model.initialize({"model_config": json.dumps(config), "model_repository": str(tmp_path), "model_version": "1"})
    return model


def request(ids: np.ndarray, mask: np.ndarray, *wanted: str) -> SimpleNamespace:
    tensors = [Tensor("ids", ids), Tensor("mask", mask)]
    return SimpleNamespace(inputs=lambda: tensors, requested_output_names=lambda: list(wanted))


def test_a_bad_request_fails_nobody_else_in_its_batch(model: TritonPythonModel) -> None:
    good, other = np.ones((2, 3), np.int64), np.full((1, 3), 2)
    responses = model.execute(
        [
            request(good, good, "total"),
            request(good, np.ones((2, 4), np.int64), "total"),
            request(other, other, "total"),
        ]
    )
    assert [response.error is None for response in responses] == [True, False, True]
    assert responses[0].tensors[0].as_numpy().tolist() == [3, 3]
    assert "failed on inputs of shapes" in responses[1].error
    assert responses[2].tensors[0].as_numpy().tolist() == [12]


def test_only_the_outputs_that_were_asked_for_come_back(model: TritonPythonModel) -> None:
    ones = np.ones((2, 3), np.int64)
    (response,) = model.execute([request(ones, ones, "present")])
    assert [tensor.name() for tensor in response.tensors] == ["present"]
    model.finalize()
