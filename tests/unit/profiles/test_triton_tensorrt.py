"""Triton's settings for TensorRT, read back by Triton's own protobuf."""

from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from profiles.serving.triton import GpuServing, TensorRtProvider, render_triton_plan, render_triton_tensorrt
from registry.errors import InputError
from registry.records import Artifact, TensorSpec

GOLDEN = Path(__file__).parents[2] / "golden"
BATCHED = GpuServing(max_batch_size=16, max_batch_delay_ms=1.5, instances=2)
PROFILE = {
    "trt_profile_min_shapes": "image:1x3x8x8",
    "trt_profile_opt_shapes": "image:8x3x8x8",
    "trt_profile_max_shapes": "image:16x3x8x8",
}


def artifact(*, dtype: str = "float32", batch: int | str = "batch") -> Artifact:
    return Artifact(
        digest="0" * 64,
        format="onnx",
        entry="model.onnx",
        files=(),
        inputs=(TensorSpec(name="image", dtype=dtype, shape=(batch, 3, 8, 8)),),
        outputs=(TensorSpec(name="logits", dtype="float32", shape=(batch, 4)),),
    )


def config_of(files: dict[str, str]) -> model_config_pb2.ModelConfig:
    ((path, text),) = files.items()
    assert path == "net/config.pbtxt"
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def test_a_plan_is_served_on_the_gpu() -> None:
    files = render_triton_plan(artifact(), model_name="net", serving=BATCHED)
    assert files["net/config.pbtxt"] == (GOLDEN / "triton-tensorrt-plan.pbtxt").read_text()
    config = config_of(files)
    assert (config.platform, config.default_model_filename) == ("tensorrt_plan", "model.plan")
    assert [group.kind for group in config.instance_group] == [model_config_pb2.ModelInstanceGroup.KIND_GPU]
    assert list(config.input[0].dims) == [3, 8, 8]


def test_a_plan_without_batching_has_all_dimensions() -> None:
    config = config_of(render_triton_plan(artifact(), model_name="net"))
    assert config.max_batch_size == 0
    assert list(config.input[0].dims) == [-1, 3, 8, 8]


def test_onnx_runtime_with_the_tensorrt_provider() -> None:
    provider = TensorRtProvider(precision_mode="FP16", profile_shapes=PROFILE)
    files = render_triton_tensorrt(artifact(), model_name="net", provider=provider, serving=BATCHED)
    assert files["net/config.pbtxt"] == (GOLDEN / "triton-tensorrt-provider.pbtxt").read_text()
    (accelerator,) = config_of(files).optimization.execution_accelerators.gpu_execution_accelerator
    assert accelerator.name == "tensorrt"
    assert dict(accelerator.parameters) == {
        "precision_mode": "FP16",
        "max_workspace_size_bytes": "1073741824",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": "/mnt/trt-cache",
        **PROFILE,
    }


def test_no_cache_is_no_cache() -> None:
    files = render_triton_tensorrt(artifact(), model_name="net", provider=TensorRtProvider(engine_cache_path=None))
    (accelerator,) = config_of(files).optimization.execution_accelerators.gpu_execution_accelerator
    assert dict(accelerator.parameters) == {"precision_mode": "FP32", "max_workspace_size_bytes": "1073741824"}


@pytest.mark.parametrize(
    ("model", "serving", "said"),
    [
        (artifact(dtype="float64"), BATCHED, "'image' is of type float64"),
        (artifact(batch=1), BATCHED, "'image' has no free first dimension"),
        (artifact(), GpuServing(max_batch_size=0), "max_batch_size 0"),
        (artifact(), GpuServing(instances=0), "instances 0"),
    ],
)
def test_a_plan_that_cannot_be_served(model, serving, said) -> None:
    with pytest.raises(InputError, match=said):
        render_triton_plan(model, model_name="net", serving=serving)


@pytest.mark.parametrize(
    ("provider", "said"),
    [
        (TensorRtProvider(profile_shapes={"trt_profile_min_shapes": "image:1x3x8x8"}), "all three"),
        (TensorRtProvider(profile_shapes=PROFILE | {"trt_profile_opt_shapes": "x:1"}), "opt_shapes lacks the input"),
        (TensorRtProvider(max_workspace_bytes=0), "max_workspace_bytes is 0"),
        (TensorRtProvider(engine_cache_path="cache"), "'cache' is not absolute"),
    ],
)
def test_a_provider_that_cannot_be_set(provider, said) -> None:
    with pytest.raises(InputError, match=said):
        render_triton_tensorrt(artifact(), model_name="net", provider=provider)
