"""Profiles of real engines on small networks whose multiply-adds are known by hand."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from optimize.explain import Model, explain, explain_files
from optimize.making import make_here
from optimize.profiling import profile_here, profile_variant
from optimize.recipes import apply_recipe, recipe_from_mapping
from optimize.signature import read_signature
from optimize.stages.base import read_input
from registry.codec import to_jsonable
from registry.errors import InputError, NotApplicableError, StageError
from registry.records import Adaptation, EngineGraph, EngineSpec, Explanation, Source
from tests.doubles import zoo
from tests.doubles.busy import undisturbed
from tests.doubles.models import write_onnx

pytestmark = pytest.mark.slow

ORT = EngineSpec(name="onnxruntime")
FLOAT32 = EngineSpec(name="openvino", precision="float32")
SIDE = 24
# Outputs times kernel: 3 -> 16 channels, 16 -> 32 in two groups, and 32 -> 10 classes.
CONV_MACS = SIDE * SIDE * 16 * 3 * 9 + SIDE * SIDE * 32 * 8 * 9 + 32 * 10


def convolutional(*, batch: int | str = "batch") -> onnx.ModelProto:
    rng = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array(rng.normal(size=shape, scale=0.1).astype(np.float32), name)

    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c1"], name="first", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"], name="relu"),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], pads=[1, 1, 1, 1], group=2),  # without a name
        helper.make_node("GlobalAveragePool", ["c2"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flatten"),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["y"], name="classify"),
    ]
    graph = helper.make_graph(
        nodes,
        "convolutional",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 10])],
        [weight("w1", 16, 3, 3, 3), weight("w2", 32, 8, 3, 3), weight("w3", 32, 10), weight("b3", 10)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models")
    (place / "model.onnx").write_bytes(convolutional().SerializeToString())
    images = np.random.default_rng(1).normal(size=(16, 3, SIDE, SIDE)).astype(np.float32)
    np.savez(place / "samples.npz", x=images)
    return place


def made(folder: Path, work: Path, stage: str, **params: str) -> Path:
    work.mkdir()
    recipe = recipe_from_mapping({"name": "tried", "stages": [{"name": stage, **params}]})
    samples = {"x": np.load(folder / "samples.npz")["x"]}
    result = apply_recipe(recipe, read_input(folder, "model.onnx"), calibration=samples, seed=0, threads=1, work=work)
    return result.folder / result.entry


def profiled(folder: Path, entry: Path, engine: EngineSpec, *, batch_size: int = 4) -> EngineGraph:
    return profile_variant(entry, engine, samples=folder / "samples.npz", batch_size=batch_size, timing_s=0.1)


def nodes(graph: EngineGraph) -> dict[str, int]:
    return {one.operator: one.nodes for one in graph.operators}


@pytest.mark.parametrize("level", ["disable", "all"])
def test_onnxruntime_counts_multiply_adds(folder: Path, level: str):
    graph = profiled(folder, folder / "model.onnx", EngineSpec(name="onnxruntime", graph_level=level))
    assert graph.macs == {"float32": CONV_MACS}
    assert nodes(graph)["Conv"] == 2
    assert ("Relu" in nodes(graph)) == (level == "disable")
    assert sum(one.time_share for one in graph.operators) == pytest.approx(1, abs=1e-4)
    assert graph.time.value > 0


@pytest.mark.parametrize(
    ("kind", "macs"),
    [
        # 8 of 8x8 from 3, 16 of 3x3 from 8, 4 from 16: not the channels that kernels pad to.
        ("opset-17", 8 * 64 * 27 + 16 * 9 * 72 + 64),
        ("local-functions", 8 * 16 + 16 * 4),
        ("external-data", 8 * 16 + 16 * 4),
        ("integers", None),
    ],
)
def test_models_as_they_come(kind: str, macs: int | None, tmp_path: Path):
    entry = zoo.write(kind, tmp_path / "model")
    inputs, _ = read_signature(entry)
    arrays = {
        spec.name: np.ones([2, *(size if isinstance(size, int) else 6 for size in spec.shape[1:])], dtype=spec.dtype)
        for spec in inputs
    }
    np.savez(tmp_path / "samples.npz", **arrays)
    (tmp_path / "work").mkdir()
    graph = profile_here(
        entry=str(entry),
        engine=to_jsonable(ORT),
        samples=str(tmp_path / "samples.npz"),
        batch_size=2,
        threads=1,
        timing_s=0.01,
        work=str(tmp_path / "work"),
    )
    assert graph["macs"] == ({} if macs is None else {"float32": macs})
    assert graph["operators"]


def test_openvino_counts_the_same(folder: Path):
    graph = profiled(folder, folder / "model.onnx", FLOAT32)
    assert graph.macs == {"float32": CONV_MACS}
    assert nodes(graph)["Convolution"] == 2


def test_static_int8_is_int8_in_both_engines(folder: Path, tmp_path: Path):
    entry = made(folder, tmp_path / "work", "quantize.static")
    ort, openvino = (profiled(folder, entry, engine) for engine in (ORT, FLOAT32))
    assert ort.macs == {"int8": CONV_MACS}
    assert nodes(ort)["QLinearConv"] == 2
    assert ort.unfused_qdq == 0
    assert openvino.macs["int8"] >= 0.9 * CONV_MACS
    unoptimized = profiled(folder, entry, EngineSpec(name="onnxruntime", graph_level="disable"))
    assert unoptimized.macs == {"float32": CONV_MACS}
    assert unoptimized.unfused_qdq > 4


def test_dynamic_int8_of_a_convolutional_net_names_convinteger(folder: Path, tmp_path: Path):
    entry = made(folder, tmp_path / "work", "quantize.dynamic", ops="all")
    baseline = Model(name="float32", entry=folder / "model.onnx", engine=ORT)
    words = "slower: ConvInteger and DynamicQuantizeLinear take"

    def explained() -> Explanation:
        (told,) = explain(
            [Model(name="int8-dynamic", entry=entry, engine=ORT)],
            baseline,
            samples=folder / "samples.npz",
            batch_size=4,
            timing_s=0.3,
        )
        return told

    # What else a busy machine does may fall on one of the two alone.
    told = undisturbed(explained, lambda told: words in told.sentence)
    assert words in told.sentence
    assert nodes(told.after)["ConvInteger"] == 2


def test_a_fixed_batch_counts_for_one_sample(folder: Path, tmp_path: Path):
    (tmp_path / "fixed.onnx").write_bytes(convolutional(batch=1).SerializeToString())
    for engine in (ORT, FLOAT32):
        assert profiled(folder, tmp_path / "fixed.onnx", engine).macs == {"float32": CONV_MACS}


def test_two_files_without_a_campaign(folder: Path):
    model = folder / "model.onnx"
    (told,) = explain_files(model, model, samples=folder / "samples.npz", batch_size=2, threads=1)
    assert told.before.batch_size == 2
    assert told.after.macs == told.before.macs


def test_samples_that_do_not_fit(folder: Path, tmp_path: Path):
    np.savez(tmp_path / "other.npz", z=np.ones((2, 3), np.float32))
    with pytest.raises(StageError, match="input 'z'"):
        profile_variant(folder / "model.onnx", ORT, samples=tmp_path / "other.npz", batch_size=2)
    with pytest.raises(InputError, match="no samples at"):
        explain_files(folder / "model.onnx", folder / "model.onnx", samples=tmp_path / "none", batch_size=1, threads=1)


def test_samples_are_adapted_to_smaller_inputs(folder: Path, tmp_path: Path):
    np.savez(tmp_path / "large.npz", x=np.ones((4, 3, SIDE, 2 * SIDE), np.float32))
    graph = profile_variant(
        folder / "model.onnx",
        ORT,
        samples=tmp_path / "large.npz",
        batch_size=4,
        timing_s=0.2,
        adaptation=(Adaptation(input="x", way="truncate", axes=(3,), sizes=(SIDE,)),),
    )
    assert graph.macs == {"float32": CONV_MACS}


def test_what_is_predicted_is_not_made_unless_told_otherwise(folder: Path, tmp_path: Path):
    artifact = write_onnx(convolutional(), tmp_path / "files")
    source = Source(name="net", kind="onnx", location="net.onnx", digest="0", artifact=artifact)
    recipe = recipe_from_mapping({"name": "tried", "stages": [{"name": "quantize.dynamic", "ops": "all"}]})

    def make(name: str, *, foreseen: bool) -> dict[str, object]:
        (tmp_path / name).mkdir()
        return make_here(
            recipe=to_jsonable(recipe),
            source=to_jsonable(source),
            files=str(tmp_path / "files"),
            calibration=None,
            seed=0,
            threads=1,
            work=str(tmp_path / name),
            foreseen=foreseen,
        )

    with pytest.raises(NotApplicableError, match=r"^predicted: 89 % of the weights are of convolutions"):
        make("first", foreseen=True)
    assert not list((tmp_path / "first").iterdir())
    assert make("second", foreseen=False)["entry"] == "model.onnx"
