"""Fidelity and screening of small models in the real engines, each in a child process."""

import numpy as np
import onnx
import onnx.parser
import pytest

from optimize.fidelity import load_outputs, measure_fidelity
from optimize.samples import load_samples
from optimize.screening import screen_variant
from registry.errors import InputError, StageError
from registry.records import EngineSpec

pytestmark = pytest.mark.slow

ORT = EngineSpec(name="onnxruntime")


def save(path, body, signature="float[batch,8] x) => (float[batch,4] y"):
    weights = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> g ({signature}) {{ {body} }}')
    model.graph.initializer.append(onnx.numpy_helper.from_array(weights, "w"))
    onnx.save(model, path)
    return path


@pytest.fixture
def folder(tmp_path):
    save(tmp_path / "linear.onnx", "y = MatMul(x, w)")
    rows = np.random.default_rng(1).normal(size=(101, 8)).astype(np.float32)
    weights = onnx.numpy_helper.to_array(onnx.load(tmp_path / "linear.onnx").graph.initializer[0])
    np.savez(tmp_path / "samples.npz", x=rows, labels=(rows @ weights).argmax(axis=1))
    return tmp_path


def fidelity(
    folder, name, engine=ORT, reference=None, metric="accuracy", out=None, parity=True, digest=None, saturation=False
):
    return measure_fidelity(
        "v",
        folder / name,
        engine,
        samples=folder / "samples.npz",
        samples_digest=digest or load_samples(folder / "samples.npz").digest,
        out=folder / (out or f"{name}.npz"),
        reference=reference,
        parity=parity,
        metric=metric,
        batch_size=8,
        instruction_set="avx2",
        saturation=saturation,
        python_path=folder,
    )


def test_samples_that_changed_meanwhile_are_refused(folder):
    with pytest.raises(InputError, match="changed while"):
        fidelity(folder, "linear.onnx", digest="what it was")


def test_baseline_is_itself_and_its_answers_are_in_order(folder):
    got = fidelity(folder, "linear.onnx")
    assert got.metrics["accuracy"].value == 1.0
    assert got.metrics["accuracy_drop"].high == 0.0
    assert (got.samples, got.task_metric, got.batch_size) == (101, "accuracy", 8)
    samples = load_samples(folder / "samples.npz")
    kept = load_outputs(folder / "linear.onnx.npz")["y"]
    assert (kept.argmax(axis=1) == samples.labels).all()


@pytest.mark.parametrize("precision", ["default", "float32"])
def test_openvino_against_the_baseline(folder, precision):
    pytest.importorskip("openvino", reason="openvino is not installed")
    fidelity(folder, "linear.onnx")
    engine = EngineSpec(name="openvino", precision=precision)
    got = fidelity(folder, "linear.onnx", engine, reference=folder / "linear.onnx.npz", out="openvino.npz")
    assert got.metrics["cosine"].value > 0.999
    assert got.metrics["accuracy_drop"].high >= 0.0
    assert got.engine_version


def test_an_answer_that_depends_on_its_neighbours_differs(folder):
    fidelity(folder, "linear.onnx")
    save(folder / "mixed.onnx", "z = MatMul(x, w) m = ReduceMax <axes = [0], keepdims = 1> (z) y = Div(z, m)")
    got = fidelity(folder, "mixed.onnx", reference=folder / "linear.onnx.npz")
    assert got.metrics["max_abs_error"].value > 0
    assert got.metrics["batch_dependence"].value > 0.01
    assert got.metrics["batch_flip_rate"].runs == 96


def test_run_time_ranges_are_found_to_depend_on_neighbours(folder):
    from onnxruntime.quantization import quantize_dynamic

    own = fidelity(folder, "linear.onnx")
    assert own.metrics["batch_dependence"].value < 1e-5
    quantize_dynamic(folder / "linear.onnx", folder / "dynamic.onnx", op_types_to_quantize=["MatMul"])
    got = fidelity(folder, "dynamic.onnx", reference=folder / "linear.onnx.npz")
    assert got.metrics["batch_dependence"].value > 1e-4
    assert 25 < got.metrics["snr_db"].value < 60


def test_slices_and_samples_without_labels(folder):
    with np.load(folder / "samples.npz") as archive:
        rows = archive["x"]
    np.savez(folder / "samples.npz", x=rows, slices=np.array(["even", "odd"])[np.arange(101) % 2])
    own = fidelity(folder, "linear.onnx", metric="cosine")
    assert own.metrics["accuracy"].value == pytest.approx(1)
    assert own.metrics["slice_drop_max"].high == 0
    save(folder / "near.onnx", "z = MatMul(x, w) y = Round(z)")
    got = fidelity(folder, "near.onnx", reference=folder / "linear.onnx.npz", metric="cosine")
    assert 0.5 < got.metrics["accuracy"].value < 1
    assert got.metrics["slice_drop_max"].value >= got.metrics["accuracy_drop"].value
    assert any("slice with the largest drop" in note for note in got.notes)
    assert any("in the output 'y'" in note for note in got.notes)
    with pytest.raises(InputError, match="needs labels"):
        fidelity(folder, "linear.onnx")


def test_overflow_is_counted_in_the_child(folder):
    fidelity(folder, "linear.onnx")
    body = "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) v = DequantizeLinear(k, t, o) y = MatMul(d, v)"
    save(folder / "full.onnx", body)
    model = onnx.load(folder / "full.onnx")
    constants = {"s": np.float32(0.01), "z": np.uint8(128), "t": np.float32(0.02), "o": np.int8(0)}
    weights = onnx.numpy_helper.to_array(model.graph.initializer[0])
    constants["k"] = np.clip(np.rint(weights / 0.02), -128, 127).astype(np.int8)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items())
    onnx.save(model, folder / "full.onnx")
    got = fidelity(folder, "full.onnx", reference=folder / "linear.onnx.npz", saturation=True)
    assert 0 < got.metrics["saturated_share"].value < 1
    assert any("reduce_range" in note for note in got.notes)
    assert "saturated_share" not in fidelity(folder, "linear.onnx", saturation=True).metrics


def test_another_architecture_with_another_width_is_judged_by_retrieval(folder):
    labels = np.full(101, -1)
    labels[:50] = np.arange(50, 100)
    rows = np.random.default_rng(2).normal(size=(101, 8)).astype(np.float32)
    rows[50:100] = rows[:50] + 0.01
    np.savez(folder / "samples.npz", x=rows, labels=labels)
    fidelity(folder, "linear.onnx", metric="recall_at_1")
    save(folder / "wide.onnx", "embedding = Relu(x)", "float[batch,8] x) => (float[batch,8] embedding")
    options = {"reference": folder / "linear.onnx.npz", "metric": "recall_at_1"}
    with pytest.raises(StageError, match="its outputs are"):
        fidelity(folder, "wide.onnx", **options)
    got = fidelity(folder, "wide.onnx", parity=False, **options)
    assert set(got.metrics) == {"accuracy", "accuracy_drop", "flip_rate", "batch_dependence", "batch_flip_rate"}
    assert got.metrics["accuracy"].runs == got.metrics["accuracy_drop"].runs == 50
    assert got.metrics["accuracy"].value > 0.9
    assert load_outputs(folder / "wide.onnx.npz")["embedding"].shape == (101, 8)


def test_nan_is_a_failure_with_a_reason(folder):
    fidelity(folder, "linear.onnx")
    save(folder / "nan.onnx", "z = MatMul(x, w) y = Log(z)")
    with pytest.raises(StageError, match="gives NaN in the output 'y'"):
        fidelity(folder, "nan.onnx", reference=folder / "linear.onnx.npz")
    assert not (folder / "nan.onnx.npz").exists()


def test_outputs_without_a_row_a_sample_are_a_failure(folder):
    save(folder / "one.onnx", "z = MatMul(x, w) y = ReduceMax <axes = [0], keepdims = 1> (z)")
    with pytest.raises(StageError, match="not one row a sample"):
        fidelity(folder, "one.onnx")


def test_a_model_that_cannot_be_opened_is_a_failure(folder):
    save(folder / "broken.onnx", "y = MatMul(x, no_such_tensor)")
    with pytest.raises(StageError, match="cannot open"):
        fidelity(folder, "broken.onnx")


def test_users_metric_is_found_in_the_users_folder(folder):
    (folder / "my_metric.py").write_text("def always(outputs, labels):\n    return (labels >= 0).astype(float)\n")
    assert fidelity(folder, "linear.onnx", metric="my_metric:always").metrics["accuracy"].value == 1.0
    with pytest.raises(InputError, match="no 'never'"):
        fidelity(folder, "linear.onnx", metric="my_metric:never")


def test_screening_times_each_batch(folder):
    got = screen_variant(
        "v", folder / "linear.onnx", ORT, samples=folder / "samples.npz", batch_sizes=[1, 256], budget_s=0.2
    )
    assert set(got.metrics) == {"inprocess_ms.batch_1", "inprocess_ms.batch_256"}
    assert {one.unit for one in got.metrics.values()} == {"ms"}
    assert all(one.value > 0 and one.runs >= 3 for one in got.metrics.values())
