"""What the author of a stage tests it with: `StageContract`, and tiny models to run it on. Needs pytest.

::

    class TestMyStage(StageContract):
        @pytest.fixture
        def stage(self):
            return MyStage({"level": 2})

        @pytest.fixture
        def source(self, tmp_path):
            return tiny_conv_net(tmp_path / "source")
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from optimize.adaptation import adapt
from optimize.samples import check_fit
from optimize.stages.base import Context, Stage, StageInput, StageResult, read_input
from registry.errors import InputError, NotApplicableError
from registry.records import TensorSpec

Arrays = Mapping[str, NDArray[Any]]


class StageContract:
    """The suite that every stage passes. Subclass it and give the fixtures ``stage`` and ``source``.

    Attributes:
        min_cosine: least cosine between the outputs of the source and of what the stage makes, each flattened.
    """

    min_cosine: ClassVar[float] = 0.98

    def feeds_for(self, made: StageResult, feeds: Arrays) -> Arrays:
        """What the stage's model is fed where the source gets ``feeds``: the same, after the adaptation it declares.

        Override it where a stage changes the signature in a way that an adaptation cannot say.
        """
        return adapt(feeds, made.adaptation)

    @pytest.fixture
    def stage(self) -> Stage:
        """The stage under test."""
        raise NotImplementedError("give a fixture `stage`")

    @pytest.fixture
    def source(self, tmp_path: Path) -> StageInput:
        """A model that the stage takes."""
        raise NotImplementedError("give a fixture `source`")

    @pytest.fixture
    def refused(self, tmp_path: Path) -> StageInput:
        """A model that the stage cannot take; by default one in a format that does not exist."""
        (tmp_path / "refused").mkdir()
        return StageInput(
            folder=tmp_path / "refused",
            entry="model.none",
            format="none",  # type: ignore[arg-type]
            inputs=(),
            outputs=(),
        )

    @pytest.fixture
    def calibration(self, source: StageInput) -> Arrays:
        """Samples that fit the source."""
        return samples_for(source.inputs, count=16)

    @pytest.fixture
    def made(self, stage: Stage, source: StageInput, calibration: Arrays, tmp_path: Path) -> StageResult:
        """What the stage makes of the source."""
        return _run(stage, source, calibration, tmp_path / "made")

    def test_it_has_a_name_and_tools(self, stage: Stage) -> None:
        """The name is ``<family>.<way>``, and the packages that do the work are named."""
        family, _, way = stage.name.partition(".")
        assert family
        assert way
        assert stage.tools
        assert stage.version >= 1

    def test_it_keeps_the_signature(self, stage: Stage, source: StageInput, made: StageResult) -> None:
        """Names, types and ranks stay, unless the stage declares otherwise."""
        if not stage.changes_signature:
            assert [_told(spec) for spec in made.inputs] == [_told(spec) for spec in source.inputs]
            assert [_told(spec) for spec in made.outputs] == [_told(spec) for spec in source.outputs]

    def test_it_keeps_a_free_batch(self, stage: Stage, source: StageInput, made: StageResult) -> None:
        """A first dimension that was free is not fixed on the way."""
        if not stage.changes_signature:
            before = [bool(spec.shape) and isinstance(spec.shape[0], int) for spec in source.inputs]
            assert [bool(spec.shape) and isinstance(spec.shape[0], int) for spec in made.inputs] == before

    def test_it_is_deterministic(
        self, stage: Stage, source: StageInput, calibration: Arrays, made: StageResult, tmp_path: Path
    ) -> None:
        """The same input gives the same bytes."""
        again = _run(stage, source, calibration, tmp_path / "again")
        assert contents(again.folder) == contents(made.folder)

    def test_it_leaves_the_source_alone(
        self, stage: Stage, source: StageInput, calibration: Arrays, tmp_path: Path
    ) -> None:
        """No file of the source's folder is written, added or removed; nothing is left beside the output."""
        before = contents(source.folder)
        _run(stage, source, calibration, tmp_path / "work" / "made")
        assert contents(source.folder) == before
        assert [path.name for path in (tmp_path / "work").iterdir()] == ["made"]

    def test_it_refuses_what_it_cannot_take(self, stage: Stage, refused: StageInput, tmp_path: Path) -> None:
        """A model that it cannot take is a verdict with a reason, not a crash."""
        samples = samples_for(refused.inputs, count=16) if refused.inputs else {}
        with pytest.raises(NotApplicableError) as caught:
            _run(stage, refused, samples, tmp_path / "made")
        assert len(caught.value.message) > 20

    def test_it_refuses_unknown_parameters(self, stage: Stage) -> None:
        """An unknown parameter is the user's error, named in the message."""
        with pytest.raises(InputError, match="no_such_parameter"):
            type(stage)({**stage.call.params, "no_such_parameter": 1})

    def test_its_call_makes_the_same_stage(self, stage: Stage) -> None:
        """The call that is recorded holds all parameters."""
        assert type(stage)(stage.call.params).params == stage.params

    def test_it_asks_for_calibration_where_it_needs_it(self, stage: Stage, source: StageInput, tmp_path: Path) -> None:
        """Without samples, a stage that needs them refuses."""
        if stage.needs_calibration:
            with pytest.raises(NotApplicableError, match="calibration"):
                _run(stage, source, None, tmp_path / "made")

    def test_its_output_runs_and_is_close(self, source: StageInput, made: StageResult) -> None:
        """The engine of the format runs what was made, at two batch sizes, and answers much as the source does.

        A model that fixes its batch is run at that size alone. Where a stage says that inputs are adapted, an output of
        another shape is its right, and its answers are then not compared.
        """
        fixed = {spec.shape[0] for spec in (*source.inputs, *made.inputs) if isinstance(spec.shape[0], int)}
        for count in sorted(fixed) or (1, 3):
            feeds = samples_for(source.inputs, count=count, seed=count)
            answers = run_model(made, self.feeds_for(made, feeds))
            for before, after in zip(run_model(source, feeds), answers, strict=True):
                if made.adaptation and after.shape != before.shape:
                    continue
                assert after.shape == before.shape
                assert cosine(before, after) >= self.min_cosine

    def test_it_declares_how_inputs_are_adapted(self, stage: Stage, source: StageInput, made: StageResult) -> None:
        """Inputs that are to be sent in another form are a change of signature, and samples so adapted fit them."""
        if made.adaptation:
            assert stage.changes_signature
            count = next((spec.shape[0] for spec in made.inputs if isinstance(spec.shape[0], int)), 2)
            adapted = adapt(samples_for(source.inputs, count=count), made.adaptation)
            check_fit(adapted, made.inputs, where="the adapted samples")


def run_model(model: StageInput | StageResult, feeds: Arrays) -> list[NDArray[Any]]:
    """The outputs of a model in the engine of its format, on one thread, in float32 where it can choose."""
    if model.format == "openvino":
        from profiles.serving.session import import_engine

        openvino = import_engine("openvino")
        config = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
        compiled = openvino.Core().compile_model(str(model.folder / model.entry), "CPU", config)
        answer = compiled(dict(feeds))
        return [np.array(answer[port]) for port in compiled.outputs]
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    path = str(model.folder / model.entry)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return list(session.run(None, dict(feeds)))


def cosine(left: NDArray[Any], right: NDArray[Any]) -> float:
    """The cosine of the angle between two arrays, each flattened."""
    a, b = left.astype(np.float64).ravel(), right.astype(np.float64).ravel()
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def samples_for(inputs: tuple[TensorSpec, ...], *, count: int, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Random samples that fit the inputs: normal for floats, 0 or 1 for integers; free dimensions are 4 long."""
    random = np.random.default_rng(seed)

    def one(spec: TensorSpec) -> NDArray[Any]:
        shape = (count, *(dim if isinstance(dim, int) else 4 for dim in spec.shape[1:]))
        if np.dtype(spec.dtype).kind == "f":
            return random.standard_normal(shape).astype(spec.dtype)
        return random.integers(0, 2, shape).astype(spec.dtype)

    return {spec.name: one(spec) for spec in inputs}


def contents(folder: Path) -> dict[str, str]:
    """Path inside the folder -> SHA-256 (hex), for each file."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def tiny_conv_net(folder: Path, *, batch: int | str = "batch", opset: int = 17) -> StageInput:
    """Two convolutions, batch normalization and a Gemm: ``image`` (batch, 3, 8, 8) to ``logits`` (batch, 4)."""
    import onnx

    make, weights = onnx.helper.make_node, _Weights()
    graph_nodes = [
        make("Conv", ["image", weights(8, 3, 3, 3)], ["c1"], pads=[1, 1, 1, 1]),
        make("BatchNormalization", ["c1", *(weights.positive(8) for _ in range(4))], ["n1"]),
        make("Relu", ["n1"], ["r1"]),
        make("Conv", ["r1", weights(16, 8, 3, 3), weights(16)], ["c2"], pads=[1, 1, 1, 1], strides=[2, 2]),
        make("Relu", ["c2"], ["r2"]),
        make("GlobalAveragePool", ["r2"], ["p"]),
        make("Flatten", ["p"], ["f"]),
        make("Gemm", ["f", weights(16, 4), weights(4)], ["logits"]),
    ]
    inputs, outputs = {"image": [batch, 3, 8, 8]}, {"logits": [batch, 4]}
    return _written(folder, graph_nodes, weights.tensors, inputs=inputs, outputs=outputs, opset=opset)


def tiny_transformer(
    folder: Path, *, batch: int | str = "batch", opset: int = 17, constant_nodes: bool = False
) -> StageInput:
    """One encoder layer of width 32 with one head: ``hidden`` (batch, 4, 32) to ``encoded`` of the same shape.

    Args:
        folder: made, and written to.
        batch: a fixed batch, or the name of a free one.
        opset: 17 at least, which brought LayerNormalization.
        constant_nodes: whether weights are Constant nodes instead of initializers.
    """
    import onnx

    make, weights = onnx.helper.make_node, _Weights()
    graph_nodes = [
        make("MatMul", ["hidden", weights(32, 32)], ["q"]),
        make("MatMul", ["hidden", weights(32, 32)], ["k"]),
        make("MatMul", ["hidden", weights(32, 32)], ["v"]),
        make("Transpose", ["k"], ["kt"], perm=[0, 2, 1]),
        make("MatMul", ["q", "kt"], ["scores"]),
        make("Softmax", ["scores"], ["shares"], axis=-1),
        make("MatMul", ["shares", "v"], ["attended"]),
        make("MatMul", ["attended", weights(32, 32)], ["projected"]),
        make("Add", ["projected", "hidden"], ["s1"]),
        make("LayerNormalization", ["s1", weights.positive(32), weights(32)], ["l1"], axis=-1),
        make("MatMul", ["l1", weights(32, 64)], ["up"]),
        make("Relu", ["up"], ["active"]),
        make("MatMul", ["active", weights(64, 32)], ["down"]),
        make("Add", ["down", "l1"], ["s2"]),
        make("LayerNormalization", ["s2", weights.positive(32), weights(32)], ["encoded"], axis=-1),
    ]
    tensors = weights.tensors
    if constant_nodes:
        graph_nodes = [make("Constant", [], [tensor.name], value=tensor) for tensor in tensors] + graph_nodes
        tensors = []
    inputs, outputs = {"hidden": [batch, 4, 32]}, {"encoded": [batch, 4, 32]}
    return _written(folder, graph_nodes, tensors, inputs=inputs, outputs=outputs, opset=opset)


def integer_model(folder: Path) -> StageInput:
    """A model without any weight: ``left`` plus ``right``, int64 (batch, 2), is ``total``. Most stages refuse it."""
    import onnx

    shape, int64 = ["batch", 2], onnx.TensorProto.INT64
    node = onnx.helper.make_node("Add", ["left", "right"], ["total"])
    inputs, outputs = {"left": shape, "right": shape}, {"total": shape}
    return _written(folder, [node], [], inputs=inputs, outputs=outputs, opset=17, kind=int64)


class _Weights:
    """Names random weights, and keeps their tensors."""

    def __init__(self) -> None:
        self.tensors: list[Any] = []
        self._random = np.random.default_rng(7)

    def __call__(self, *shape: int) -> str:
        fan_in = int(np.prod(shape[1:])) if len(shape) > 2 else shape[0]
        return self._keep(self._random.standard_normal(shape) / np.sqrt(fan_in))

    def positive(self, *shape: int) -> str:
        return self._keep(self._random.uniform(0.5, 1.5, shape))

    def _keep(self, values: NDArray[Any]) -> str:
        from onnx import numpy_helper

        name = f"weight_{len(self.tensors)}"
        self.tensors.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name


def _written(
    folder: Path,
    graph_nodes: list[Any],
    tensors: list[Any],
    *,
    inputs: Mapping[str, list[Any]],
    outputs: Mapping[str, list[Any]],
    opset: int,
    kind: int = 1,  # onnx.TensorProto.FLOAT
) -> StageInput:
    import onnx

    for position, node in enumerate(graph_nodes):
        node.name = f"{node.op_type}_{position}"
    ends = [
        [onnx.helper.make_tensor_value_info(name, kind, shape) for name, shape in side.items()]
        for side in (inputs, outputs)
    ]
    graph = onnx.helper.make_graph(graph_nodes, "tiny", *ends, initializer=tensors)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(model)
    folder.mkdir(parents=True)
    onnx.save(model, str(folder / "model.onnx"))
    return read_input(folder, "model.onnx")


def _run(stage: Stage, source: StageInput, calibration: Arrays | None, out: Path) -> StageResult:
    out.mkdir(parents=True)
    return stage(source, Context(out=out, calibration=calibration, seed=0, threads=1))


def _told(spec: TensorSpec) -> tuple[str, str, int]:
    return spec.name, spec.dtype, len(spec.shape)
