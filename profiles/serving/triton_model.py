"""The model of Triton's Python backend around a session. A rendered ``model.py`` imports `TritonPythonModel` from here.

The Python backend of Triton 2.51 (24.10) is built for numpy 1: beside numpy 2 its tensors hold wrong numbers, and no
error says so. Its other way, DLPack, ends the process with tensors of numpy 1. So numpy 2 is refused at the start.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from profiles.serving.session import Session, SessionError, open_session, run_merged

Array = npt.NDArray[Any]


class TritonPythonModel:
    """Serves one ONNX or OpenVINO file with Triton's Python backend.

    Keys of the config's ``parameters``: ``entry`` (the model file beside ``model.py``), ``engine``, ``precision``,
    ``graph_level``, ``threads`` and ``providers`` (joined by commas).
    """

    def initialize(self, args: Mapping[str, str]) -> None:
        """Opens the session that the model's config asks for.

        Raises:
            RuntimeError: numpy 2 is installed, with which every answer would be wrong.
            SessionError: the model cannot be opened.
            KeyError: the config has no parameter ``entry``.
        """
        refuse_numpy_2(np.__version__)
        import triton_python_backend_utils as pb_utils

        self._backend: Any = pb_utils
        config = json.loads(args["model_config"])
        self._outputs = [output["name"] for output in config["output"]]
        self._batches = config.get("max_batch_size", 0) > 0
        settings = {key: value["string_value"] for key, value in config["parameters"].items()}
        folder = Path(args["model_repository"]) / args["model_version"]
        self._session = _open(folder, settings)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One answer a request: Triton's batcher hands over several, which run as one batch.

        Where the batch fails, each request is run alone, so that one bad request fails nobody else's.
        """
        arrays: list[dict[str, Array]] = [self._inputs(request) for request in requests]
        if len(requests) == 1 or not self._batches:
            return [self._alone(request, own) for request, own in zip(requests, arrays, strict=True)]
        try:
            answers = run_merged(self._session, arrays)
        except (SessionError, ValueError):
            return [self._alone(request, own) for request, own in zip(requests, arrays, strict=True)]
        return [self._response(request, answer) for request, answer in zip(requests, answers, strict=True)]

    def finalize(self) -> None:
        """Lets go of the session."""
        del self._session

    def _inputs(self, request: Any) -> dict[str, Array]:
        return {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}

    def _alone(self, request: Any, arrays: Mapping[str, Array]) -> Any:
        try:
            return self._response(request, self._session.run(arrays))
        except SessionError as error:
            return self._backend.InferenceResponse(error=self._backend.TritonError(str(error)))

    def _response(self, request: Any, answer: Mapping[str, Array]) -> Any:
        wanted = set(request.requested_output_names())
        tensors = [
            self._backend.Tensor(name, np.ascontiguousarray(answer[name])) for name in self._outputs if name in wanted
        ]
        return self._backend.InferenceResponse(output_tensors=tensors)


def refuse_numpy_2(version: str) -> None:
    """Returns when this version of numpy is one that Triton's Python backend was built for.

    Raises:
        RuntimeError: it is 2 or later.
    """
    if int(version.split(".", 1)[0]) >= 2:
        raise RuntimeError(
            f"numpy {version} is installed; with it Triton's Python backend gives wrong numbers. "
            "Install 'numpy<2' beside the server."
        )


def _open(folder: Path, settings: Mapping[str, str]) -> Session:
    providers = [name.strip() for name in settings.get("providers", "").split(",") if name.strip()]
    return open_session(
        folder / settings["entry"],
        engine=settings.get("engine", "onnxruntime"),
        precision=settings.get("precision", "default"),
        graph_level=settings.get("graph_level", "all"),
        threads=int(settings.get("threads", "1")),
        providers=providers or None,
    )
