"""Every stage of the house through the suite that third parties get."""

import importlib.util
from functools import partial
from pathlib import Path

import pytest

from optimize.stages import make_stage, stage_names
from optimize.stages.base import Context
from optimize.testing import StageContract, integer_model, tiny_conv_net, tiny_transformer
from registry.records import StageCall

MODELS = {"conv": tiny_conv_net, "transformer": tiny_transformer}
needs_openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None or importlib.util.find_spec("nncf") is None,
    reason="the extra openvino is not installed",
)

STRUCTURED = StageCall(name="prune.structured", params={"sparsity": 0.25, "round_to": 4})
needs_torch_pruning = pytest.mark.skipif(
    importlib.util.find_spec("torch_pruning") is None or importlib.util.find_spec("onnxscript") is None,
    reason="the extra torch is not installed",
)


def source_fixture(*kinds):
    @pytest.fixture(params=kinds)
    def source(self, request, tmp_path):
        return MODELS[request.param](tmp_path / "source")

    return source


def stage_fixture(*calls):
    @pytest.fixture(params=calls, ids=[str(call.params) for call in calls])
    def stage(self, request):
        return make_stage(request.param)

    return stage


@pytest.fixture
def integers(tmp_path):
    return integer_model(tmp_path / "integers")


@pytest.fixture(scope="module")
def torch_net(tmp_path_factory):
    from tests.doubles.torch_nets import exported

    return exported("residual", tmp_path_factory.mktemp("torch"))


@pytest.fixture(scope="module")
def pruned_net(torch_net, tmp_path_factory):
    return make_stage(STRUCTURED)(torch_net, Context(out=tmp_path_factory.mktemp("pruned")))


class TestOrtGraph(StageContract):
    stage = stage_fixture(
        StageCall(name="simplify.ort", params={"level": "basic"}),
        StageCall(name="simplify.ort"),
    )
    source = source_fixture("conv", "transformer")
    min_cosine = 0.99999


class TestTransformerFusion(StageContract):
    stage = stage_fixture(StageCall(name="simplify.transformer"))
    source = source_fixture("transformer")
    min_cosine = 0.99999

    @pytest.fixture
    def refused(self, integers):
        return integers


class TestDynamicInt8(StageContract):
    stage = stage_fixture(
        StageCall(name="quantize.dynamic"),
        StageCall(name="quantize.dynamic", params={"per_channel": False, "reduce_range": True}),
    )
    source = source_fixture("transformer")

    @pytest.fixture
    def refused(self, tmp_path):
        return tiny_conv_net(tmp_path / "conv")


class TestDynamicInt8OfConvolutions(StageContract):
    stage = stage_fixture(StageCall(name="quantize.dynamic", params={"ops": "all"}))
    source = source_fixture("conv")

    @pytest.fixture
    def refused(self, integers):
        return integers


class TestStaticInt8(StageContract):
    stage = stage_fixture(
        StageCall(name="quantize.static"),
        StageCall(name="quantize.static", params={"method": "percentile", "batch_size": 3}),
        StageCall(name="quantize.static", params={"method": "entropy"}),
        StageCall(name="quantize.static", params={"symmetric_activations": True, "reduce_range": True}),
        StageCall(name="quantize.static", params={"ops": "weighted", "matmul_output": "quantized"}),
        StageCall(name="quantize.static", params={"scheme": "s8s8", "method": "entropy", "ops": "all"}),
        StageCall(name="quantize.static", params={"scheme": "u8u8", "format": "qoperator", "per_channel": False}),
    )
    source = source_fixture("conv", "transformer")
    # Ranges from 16 random samples clip others.
    min_cosine = 0.95

    @pytest.fixture
    def refused(self, integers):
        return integers


class TestWeightOnly(StageContract):
    stage = stage_fixture(
        StageCall(name="quantize.weights"),
        StageCall(name="quantize.weights", params={"bits": 8, "block_size": 128, "symmetric": False}),
    )
    source = source_fixture("transformer")

    @pytest.fixture
    def refused(self, tmp_path):
        return tiny_conv_net(tmp_path / "conv")


class TestSmooth(StageContract):
    stage = stage_fixture(
        StageCall(name="quantize.smooth"),
        StageCall(name="quantize.smooth", params={"alpha": 0.75, "insert_mul": "always"}),
    )
    source = source_fixture("transformer")
    min_cosine = 0.99999

    @pytest.fixture
    def refused(self, integers):
        return integers


class TestTensorRtInt8(StageContract):
    stage = stage_fixture(
        StageCall(name="quantize.tensorrt"),
        StageCall(name="quantize.tensorrt", params={"method": "percentile", "batch_size": 3}),
    )
    source = source_fixture("conv", "transformer")
    min_cosine = 0.95

    @pytest.fixture
    def refused(self, integers):
        return integers


class TestConstants(StageContract):
    stage = stage_fixture(StageCall(name="simplify.constants"))
    min_cosine = 0.99999

    @pytest.fixture(params=[tiny_conv_net, partial(tiny_transformer, constant_nodes=True)], ids=["conv", "constants"])
    def source(self, request, tmp_path):
        return request.param(tmp_path / "source")


class TestOpset(StageContract):
    stage = stage_fixture(
        StageCall(name="convert.opset", params={"opset": 20}),
        StageCall(name="convert.opset", params={"opset": 18, "ir_version": 9}),
    )
    source = source_fixture("conv", "transformer")
    min_cosine = 0.99999


class TestOpsetDownwards(StageContract):
    stage = stage_fixture(StageCall(name="convert.opset", params={"opset": 12}))
    source = source_fixture("conv")
    min_cosine = 0.99999

    @pytest.fixture
    def refused(self, tmp_path):
        return tiny_transformer(tmp_path / "refused")


class TestFixedShape(StageContract):
    stage = stage_fixture(
        StageCall(name="convert.fixed_shape"),
        StageCall(name="convert.fixed_shape", params={"dims": ("batch=3",)}),
    )
    source = source_fixture("conv", "transformer")
    min_cosine = 0.99999

    @pytest.fixture
    def refused(self, tmp_path):
        return tiny_conv_net(tmp_path / "refused", batch=1)


class TestFreeBatch(StageContract):
    stage = stage_fixture(StageCall(name="convert.free_batch"))
    min_cosine = 0.99999

    @pytest.fixture(params=["conv", "transformer"])
    def source(self, request, tmp_path):
        return MODELS[request.param](tmp_path / "source", batch=1)

    @pytest.fixture
    def refused(self, integers):
        return integers


class TestInputType(StageContract):
    stage = stage_fixture(
        StageCall(name="reduce.input_type", params={"low": -4.0, "high": 4.0}),
        StageCall(name="reduce.input_type", params={"dtype": "float16"}),
    )
    source = source_fixture("conv", "transformer")
    min_cosine = 0.999

    @pytest.fixture
    def refused(self, integers):
        return integers


class TestSequenceLength(StageContract):
    stage = stage_fixture(StageCall(name="reduce.sequence_length", params={"length": 2, "inputs": ("hidden",)}))
    source = source_fixture("transformer")

    @pytest.fixture
    def refused(self, integers):
        return integers


class TestImageSide(StageContract):
    stage = stage_fixture(StageCall(name="reduce.image_side", params={"side": 4}))
    source = source_fixture("conv")
    # Noise has nothing in common with its own half size.
    min_cosine = 0.5

    @pytest.fixture
    def refused(self, integers):
        return integers


class TestMixedFloat16(StageContract):
    stage = stage_fixture(
        StageCall(name="precision.mixed"),
        StageCall(name="precision.mixed", params={"share": 5e-5}),
    )
    source = source_fixture("conv", "transformer")
    min_cosine = 0.9999

    @pytest.fixture
    def refused(self, integers):
        return integers


class TestFloat16(StageContract):
    stage = stage_fixture(StageCall(name="precision.float16"))
    source = source_fixture("conv", "transformer")
    min_cosine = 0.9999

    @pytest.fixture
    def refused(self, integers):
        return integers


class TestMagnitude(StageContract):
    stage = stage_fixture(
        StageCall(name="prune.magnitude", params={"sparsity": 0.3}),
        StageCall(name="prune.magnitude", params={"sparsity": 0.2, "scope": "global", "keep_ends": False}),
    )
    source = source_fixture("conv", "transformer")
    min_cosine = 0.95

    @pytest.fixture
    def refused(self, integers):
        return integers


class TestTwoFour(StageContract):
    stage = stage_fixture(StageCall(name="prune.two_four"))
    source = source_fixture("conv", "transformer")
    # Half of the weights are gone, and nothing made up for them.
    min_cosine = 0.8

    @pytest.fixture
    def refused(self, integers):
        return integers


@needs_torch_pruning
@pytest.mark.slow
class TestStructured(StageContract):
    stage = stage_fixture(STRUCTURED)
    # A fourth of the channels of an untrained net are gone.
    min_cosine = 0.8

    @pytest.fixture
    def source(self, torch_net):
        return torch_net

    @pytest.fixture
    def made(self, pruned_net):
        return pruned_net

    @pytest.fixture
    def refused(self, integers):
        return integers


class TestTensorRtPrepare(StageContract):
    stage = stage_fixture(
        StageCall(name="tensorrt.prepare"),
        StageCall(name="tensorrt.prepare", params={"version": 10, "precision": "float16"}),
    )
    source = source_fixture("conv", "transformer")
    min_cosine = 0.9999


@needs_openvino
class TestToOpenVino(StageContract):
    stage = stage_fixture(StageCall(name="convert.openvino"))
    source = source_fixture("conv", "transformer")
    min_cosine = 0.99999


@needs_openvino
@pytest.mark.slow
class TestOpenVinoInt8(StageContract):
    stage = stage_fixture(
        StageCall(name="quantize.openvino"),
        StageCall(name="quantize.openvino", params={"preset": "performance", "subset_size": 4}),
    )
    min_cosine = 0.95

    @pytest.fixture(params=["conv", "transformer"])
    def source(self, request, tmp_path):
        return converted(MODELS[request.param](tmp_path / "onnx"), tmp_path)

    @pytest.fixture
    def refused(self, integers, tmp_path):
        return converted(integers, tmp_path)


def converted(source, tmp_path):
    from optimize.stages.base import read_input

    (tmp_path / "ir").mkdir()
    made = make_stage(StageCall(name="convert.openvino"))(source, Context(out=tmp_path / "ir"))
    return read_input(made.folder, made.entry)


def test_every_stage_is_in_this_file():
    text = Path(__file__).read_text()
    assert [name for name in stage_names() if f'"{name}"' not in text] == []
