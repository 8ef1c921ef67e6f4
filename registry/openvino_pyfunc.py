"""An OpenVINO model behind MLflow's ``pyfunc``; MLflow copies this file beside the model and loads it from there.

It stands alone: only numpy and openvino are imported, and nothing is unpickled.
"""

import importlib
import os
from pathlib import Path
from typing import Any

import numpy as np


class OpenVinoModel:
    """Answers ``predict`` with an OpenVINO model compiled for the CPU.

    Args:
        entry: the ``.xml`` of the model.
        precision: ``default`` leaves it to OpenVINO, which computes in bfloat16 where the CPU has it; ``float32`` holds
            it to float32.
    """

    def __init__(self, entry: Path, *, precision: str = "default") -> None:
        openvino = _openvino()
        settings = {"INFERENCE_PRECISION_HINT": "f32"} if precision == "float32" else {}
        self._compiled = openvino.Core().compile_model(str(entry), "CPU", settings)
        self._inputs = [port.get_any_name() for port in self._compiled.inputs]
        self._outputs = [port.get_any_name() for port in self._compiled.outputs]

    def get_raw_model(self) -> Any:
        """The compiled model, which ``mlflow.pyfunc.PyFuncModel.get_raw_model`` returns."""
        return self._compiled

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> dict[str, Any]:
        """The model's outputs by name.

        Args:
            model_input: an array for a model of one input, else a mapping of input name to array.
            params: not used; MLflow passes it.

        Raises:
            ValueError: an array was given, and the model has several inputs.
        """
        if not isinstance(model_input, dict):
            if len(self._inputs) != 1:
                raise ValueError(f"the model has the inputs {self._inputs}: pass a dict of name to array")
            model_input = {self._inputs[0]: np.asarray(model_input)}
        answers = self._compiled({name: model_input[name] for name in self._inputs})
        return {name: answers[index] for index, name in enumerate(self._outputs)}


def _openvino() -> Any:
    """OpenVINO, imported without its telemetry, which reports each use over the network unless ``CI`` is ``true``."""
    before = os.environ.get("CI")
    os.environ["CI"] = "true"
    try:
        return importlib.import_module("openvino")
    finally:
        if before is None:
            del os.environ["CI"]
        else:
            os.environ["CI"] = before


def _load_pyfunc(path: str, model_config: dict[str, Any] | None = None) -> OpenVinoModel:
    """MLflow's entry: ``path`` is the artifact's folder, which holds one ``.xml``; the config names the precision."""
    return OpenVinoModel(next(iter(sorted(Path(path).glob("*.xml")))), **(model_config or {}))
