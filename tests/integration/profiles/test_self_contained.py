"""Self-contained models in a real MLServer, laid out as a Core 2 agent does, where nothing of burnish is importable."""

import json
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tritonclient.grpc

from profiles.deploy import core2_scheduler_pb2 as pb
from profiles.serving.environment_tarball import pack_environment, tarball_name
from profiles.serving.mlserver import render_mlserver
from profiles.serving.self_contained import Bundle, bundle, source_of
from registry.records import Candidate
from tests.doubles.busy import undisturbed
from tests.doubles.candidates import candidate
from tests.doubles.core2_agent import LOOPBACK, AgentDouble
from tests.doubles.models import FEATURES, mlp, mlp_answer, write_onnx

pytestmark = pytest.mark.slow

LIMIT_S = 60.0
BATCHED = candidate(max_batch_size=8, max_batch_delay_ms=20.0)

# What a server's Python is without burnish: and, where the engine is refused too, with none but a model's own.
REFUSE = """
import sys
from importlib.machinery import PathFinder


class Refuse:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == {engine!r}:
            found = PathFinder.find_spec(name, [folder for folder in sys.path if "/.envs/" in folder])
            if found is not None:
                return found
        if name in {refused!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)


sys.meta_path.insert(0, Refuse)
"""
HOUSE = ("optimize", "profiles", "registry")


def changed(module: str, old: str, new: str) -> Bundle:
    """The runtime of another version of burnish, in which a line of a module is another."""

    def read(name: str) -> str:
        source = source_of(name)
        if name != module:
            return source
        assert source.count(old) == 1
        return source.replace(old, new)

    return bundle("runtime", "SessionRuntime", read)


OURS = bundle("runtime", "SessionRuntime")
ANSWER = "return dict(zip(self._names, self._session.run(self._names, inputs), strict=True))"
DOUBLED = changed(
    "session", ANSWER, ANSWER.replace("return", "outputs =") + "; " + "return {n: 2 * o for n, o in outputs.items()}"
)
SHIFTED = changed("raw_tensors", "return array.reshape(self.shape)", "return array.reshape(self.shape) + 1")
ROWS = changed(
    "session", ANSWER, "return {name: np.full((len(inputs['x']), 4), len(inputs['x']), 'f4') for name in self._names}"
)


@pytest.fixture
def put(tmp_path: Path) -> Callable[..., pb.Model]:
    """Renders a model's folder, as a message that has an agent load it from there."""

    def folder(name: str, ours: Bundle | None, how: Candidate = BATCHED, tarball: Path | None = None) -> pb.Model:
        where = tmp_path / "shelf" / name
        artifact = write_onnx(mlp(), where)
        packed = None if tarball is None else tarball_name(tarball)
        files = render_mlserver(
            how, artifact, model_name=name, http_port=1, grpc_port=2, metrics_port=3, bundle=ours, environment=packed
        )
        for path, text in files.items():
            if path.startswith(f"{name}/"):
                (where / path.removeprefix(f"{name}/")).write_text(text)
        if tarball is not None and packed is not None:
            (where / packed).hardlink_to(tarball)
        return pb.Model(
            meta=pb.MetaData(name=name), modelSpec=pb.ModelSpec(uri=str(where), requirements=["mlserver", "python"])
        )

    return folder


def agent(folder: Path, workers: int, refused: tuple[str, ...] = HOUSE, engine: str = "") -> AgentDouble:
    start = folder / "start"
    start.mkdir()
    (start / "sitecustomize.py").write_text(REFUSE.format(refused=refused, engine=engine))
    return AgentDouble(folder / "agent", PYTHONPATH=str(start), MLSERVER_PARALLEL_WORKERS=str(workers))


class Asked:
    """Models of a server, to be asked in both protocols."""

    def __init__(self, server: AgentDouble, client: tritonclient.grpc.InferenceServerClient) -> None:
        self._server, self._client = server, client

    def raw(self, model: str, x: np.ndarray) -> np.ndarray:
        tensor = tritonclient.grpc.InferInput("x", list(x.shape), "FP32")
        tensor.set_data_from_numpy(x)
        answer = self._client.infer(model, [tensor], client_timeout=LIMIT_S).as_numpy("logits")
        assert answer is not None
        return answer

    def json(self, model: str, x: np.ndarray) -> np.ndarray:
        tensor = {"name": "x", "shape": x.shape, "datatype": "FP32", "data": x.ravel().tolist()}
        request = urllib.request.Request(
            f"http://{LOOPBACK}:{self._server.http}/v2/models/{model}/infer",
            data=json.dumps({"inputs": [tensor]}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=LIMIT_S) as response:
            (output,) = json.load(response)["outputs"]
        return np.array(output["data"], np.float32).reshape(output["shape"])


@pytest.fixture
def asked() -> Iterator[Callable[[AgentDouble], Asked]]:
    opened: list[Any] = []

    def ask(server: AgentDouble) -> Asked:
        opened.append(tritonclient.grpc.InferenceServerClient(f"{LOOPBACK}:{server.grpc}"))
        return Asked(server, opened[-1])

    yield ask
    for client in opened:
        client.close()


def rows(number: int) -> np.ndarray:
    return np.random.default_rng(number).normal(size=(1 + number % 3, FEATURES)).astype(np.float32)


# Model -> what it answers, raw and as JSON.
ANSWERS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]] = {
    "ours": (mlp_answer, mlp_answer),
    "doubled": (lambda x: 2 * mlp_answer(x), lambda x: 2 * mlp_answer(x)),
    # It decodes raw tensors otherwise, with code of its own, though another version changed MLServer before it.
    "shifted": (lambda x: mlp_answer(x + 1), mlp_answer),
    "installed": (mlp_answer, mlp_answer),
}


def each_answers_with_its_own(asked: Asked, *models: str) -> None:
    def one(number: int) -> None:
        model, x = models[number % len(models)], rows(number)
        raw, plain = ANSWERS[model.rpartition("_")[0]]
        if number // len(models) % 2:
            np.testing.assert_allclose(asked.raw(model, x), raw(x), rtol=1e-4, atol=1e-4, err_msg=f"{model}, raw")
        else:
            np.testing.assert_allclose(asked.json(model, x), plain(x), rtol=1e-4, atol=1e-4, err_msg=f"{model}, JSON")

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(one, range(20 * len(models))))


@pytest.mark.parametrize(("workers", "installed"), [(0, True), (1, False)], ids=["beside ours", "in a worker"])
def test_versions_on_one_server_answer_each_with_its_own_code(
    tmp_path: Path, put: Callable[..., pb.Model], asked: Callable[[AgentDouble], Asked], workers: int, installed: bool
) -> None:
    models = {
        "ours": put("ours", OURS),
        "doubled": put("doubled", DOUBLED),
        "shifted": put("shifted", SHIFTED, candidate()),
    }
    if installed:
        models["installed"] = put("installed", None)
    with agent(tmp_path, workers, () if installed else HOUSE) as server:
        for model in models.values():
            assert server.load(model, 1) == ""
        ask = asked(server)
        with ThreadPoolExecutor(1) as beside:  # MLServer runs the file anew for each of these, under requests
            loaded = beside.submit(lambda: [server.load(models["ours"], version) for version in range(3, 9)])
            each_answers_with_its_own(ask, *(f"{name}_1" for name in models))
        assert not any(loaded.result())
        server.unload(models["ours"], 1)  # which was the first, and changed MLServer
        assert server.load(models["doubled"], 2) == ""
        each_answers_with_its_own(ask, "doubled_1", "doubled_2", "shifted_1")
        assert server.load(models["ours"], 2) == ""
        each_answers_with_its_own(ask, "ours_2", "doubled_1", "shifted_1")


def test_without_its_file_or_burnish_the_model_is_refused(tmp_path: Path, put: Callable[..., pb.Model]) -> None:
    with agent(tmp_path, 0) as server:
        assert "No module named 'profiles'" in server.load(put("installed", None), 1)


def test_an_environment_brings_the_engine_to_a_server_without(
    tmp_path: Path, put: Callable[..., pb.Model], asked: Callable[[AgentDouble], Asked]
) -> None:
    tarball = tmp_path / "environment.tar.gz"
    pack_environment("onnxruntime", onnxruntime.__version__, tarball)
    with agent(tmp_path, 1, (*HOUSE, "onnxruntime"), "onnxruntime") as server:
        assert "the engine onnxruntime is not installed here" in server.load(put("ours", OURS), 1)
        for name, ours in (("doubled", DOUBLED), ("rows", ROWS)):
            assert server.load(put(name, ours, BATCHED, tarball), 1) == ""
        ask = asked(server)
        each_answers_with_its_own(ask, "doubled_1")

        def most_rows() -> float:
            """The most rows that any of 32 requests at once was answered with."""
            one_row = np.zeros((1, FEATURES), np.float32)
            with ThreadPoolExecutor(8) as pool:
                return float(max(pool.map(lambda _: ask.raw("rows_1", one_row)[0, 0], range(32))))

        # The settings of batching are in parameters.extra, where MLServer looks not.
        assert undisturbed(most_rows, lambda seen: seen > 1) > 1
        assert len(list((tmp_path / "agent/.envs").iterdir())) == 1
