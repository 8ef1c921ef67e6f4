from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from profiles.serving.triton import render_triton
from registry.errors import InputError
from registry.records import Artifact, EngineSpec, TensorSpec
from tests.doubles.candidates import candidate

GOLDEN = Path(__file__).parents[2] / "golden"
FLOAT = EngineSpec(name="openvino", precision="float32")
OPENVINO = EngineSpec(name="openvino")


def artifact(*inputs: TensorSpec) -> Artifact:
    return Artifact(
        digest="0" * 64,
        format="onnx",
        entry="model.onnx",
        files=(),
        inputs=inputs or (TensorSpec(name="x", dtype="float32", shape=("batch", 3, None)),),
        outputs=(TensorSpec(name="logits", dtype="float16", shape=("batch", 4)),),
    )


def config_of(files: dict[str, str]) -> model_config_pb2.ModelConfig:
    (name,) = (path for path in files if path.endswith("config.pbtxt"))
    return text_format.Parse(files[name], model_config_pb2.ModelConfig())


@pytest.mark.parametrize(
    ("golden", "served"),
    [
        (
            "triton-python-batched.pbtxt",
            candidate(server="triton", engine=FLOAT, max_batch_size=8, max_batch_delay_ms=2.5, instances=2),
        ),
        ("triton-python.pbtxt", candidate(server="triton")),
        (
            "triton-onnxruntime.pbtxt",
            candidate(
                server="triton",
                backend="onnxruntime",
                engine=EngineSpec(name="onnxruntime", graph_level="basic"),
                max_batch_size=16,
                threads=4,
            ),
        ),
        ("triton-openvino.pbtxt", candidate(server="triton", backend="openvino", engine=OPENVINO)),
    ],
)
def test_matches_the_golden_files(golden: str, served: object) -> None:
    files = render_triton(served, artifact(), model_name="digits")
    assert files["digits/config.pbtxt"] == (GOLDEN / golden).read_text()
    assert ("digits/1/model.py" in files) == (served.serving.backend == "python")


def test_batches_of_zero_delay_are_still_batches() -> None:
    files = render_triton(candidate(server="triton", max_batch_size=8), artifact(), model_name="m")
    config = config_of(files)
    assert config.HasField("dynamic_batching")
    assert config.max_batch_size == 8
    assert list(config.input[0].dims) == [3, -1]


FIXED = TensorSpec(name="x", dtype="float32", shape=("batch", 3, 8))


@pytest.mark.parametrize("backend", ["python", "onnxruntime"])
def test_zeros_are_run_before_the_model_counts_as_ready(backend: str) -> None:
    config = config_of(
        render_triton(candidate(server="triton", backend=backend, max_batch_size=8), artifact(FIXED), model_name="m")
    )
    assert [sample.batch_size for sample in config.model_warmup] == [1, 8]
    assert len({sample.name for sample in config.model_warmup}) == 2
    assert all(sample.count == 0 for sample in config.model_warmup)  # Core 2 could not read one
    for sample in config.model_warmup:
        assert list(sample.inputs["x"].dims) == [3, 8]
        assert sample.inputs["x"].zero_data
        assert sample.inputs["x"].data_type == model_config_pb2.TYPE_FP32


def test_without_batches_one_row_of_zeros_is_run() -> None:
    config = config_of(render_triton(candidate(server="triton"), artifact(FIXED), model_name="m"))
    (sample,) = config.model_warmup
    assert (sample.batch_size, list(sample.inputs["x"].dims)) == (1, [1, 3, 8])


def test_nothing_is_made_up_for_a_size_that_is_free() -> None:
    config = config_of(render_triton(candidate(server="triton", max_batch_size=8), artifact(), model_name="m"))
    assert not config.model_warmup


def test_no_batching_tells_triton_of_no_batch_dimension() -> None:
    config = config_of(render_triton(candidate(server="triton"), artifact(), model_name="m"))
    assert config.max_batch_size == 0
    assert not config.HasField("dynamic_batching")
    assert list(config.input[0].dims) == [-1, 3, -1]


def test_a_fixed_batch_is_free_where_our_session_cuts_it() -> None:
    model = Artifact(
        digest="0" * 64,
        format="onnx",
        entry="model.onnx",
        files=(),
        inputs=(TensorSpec(name="x", dtype="float32", shape=(1, 8)),),
        outputs=(TensorSpec(name="y", dtype="float32", shape=(1, 4)),),
    )
    ours = config_of(render_triton(candidate(server="triton"), model, model_name="m"))
    theirs = config_of(render_triton(candidate(server="triton", backend="onnxruntime"), model, model_name="m"))
    assert list(ours.input[0].dims) == [-1, 8]
    assert list(theirs.input[0].dims) == [1, 8]


@pytest.mark.parametrize(
    ("served", "model", "said"),
    [
        (candidate(), artifact(), "not for Triton"),
        (candidate(server="triton", parallel_workers=1), artifact(), "1 parallel workers"),
        (candidate(server="triton", instances=0), artifact(), "0 instances"),
        (
            candidate(server="triton", backend="openvino"),
            artifact(),
            "the engine onnxruntime from Triton's backend openvino",
        ),
        (candidate(server="triton", backend="openvino", engine=FLOAT), artifact(), "holds OpenVINO to float32"),
        (candidate(server="triton"), artifact(TensorSpec(name="s", dtype="str", shape=(None,))), "'s' is of type str"),
        (
            candidate(server="triton", max_batch_size=8),
            artifact(TensorSpec(name="n", dtype="int64", shape=(None,))),
            "'n' has a batch dimension and no other",
        ),
    ],
)
def test_refuses_what_triton_cannot_do(served: object, model: Artifact, said: str) -> None:
    with pytest.raises(InputError, match=said):
        render_triton(served, model, model_name="m")
