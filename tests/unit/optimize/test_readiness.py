"""One tiny model for each rule that sets it off, and models that set off none."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from optimize.readiness.graph import Graph
from optimize.readiness.lint import RULES, load_graph
from optimize.readiness.profile import Range
from optimize.readiness.rules import Target, apply_rules
from optimize.readiness.serving import parse_config, profile_in
from registry.errors import InputError

DATA = Path(__file__).parents[2] / "data"
TENSORRT_10, TENSORRT_11 = (10, 0), (11, 0)


def parsed(body: str, *, opset: int = 17, ir: int = 8, domains: str = "") -> onnx.ModelProto:
    return onnx.parser.parse_model(f'<ir_version: {ir}, opset_import: ["": {opset}{domains}]> {body}')


def found(model: onnx.ModelProto, *, version=TENSORRT_10, config: str | None = None, **target) -> dict[str, list]:
    by_rule: dict[str, list] = {}
    parsed_config = None if config is None else parse_config(config)
    for finding in apply_rules(RULES, Graph(model), Target(tensorrt=version, config=parsed_config, **target)):
        by_rule.setdefault(finding.rule, []).append(finding)
    return by_rule


def simple(
    op: str, inputs: str = "float[1,4] x", output: str = "float[1,4] y", call: str = "x", attrs: str = ""
) -> str:
    return f"g ({inputs}) => ({output}) {{ y = {op}{attrs}({call}) }}"


# --- Q/DQ models -----------------------------------------------------------------------------------------------


def quantized_product(
    *,
    zero: object = 0,
    scale: object = 0.1,
    weight_scale: object = 0.1,
    kind: str = "int8",
    axis: int = 1,
    weight_block: int = 0,
    quantize_input: bool = True,
    quantize_weight: bool = True,
    opset: int = 17,
    after: tuple[onnx.NodeProto, ...] = (),
    output: str = "p",
) -> onnx.ModelProto:
    """``x`` (1, 4) times a weight (4, 2), each through a Q/DQ pair; what differs from the rule is an argument."""
    node = helper.make_node
    weights = {
        "w": np.linspace(-1, 1, 8, dtype=np.float32).reshape(4, 2),
        "xs": np.array(scale, dtype=np.float32),
        "xz": np.full(np.shape(scale), zero, dtype=kind),
        "ws": np.array(weight_scale, dtype=np.float32),
        "wz": np.zeros(np.shape(weight_scale), dtype=kind),
    }
    per_channel = {"axis": axis} if np.ndim(weight_scale) else {}
    if weight_block:
        per_channel["block_size"] = weight_block
    nodes = []
    left, right = "x", "w"
    if quantize_input:
        nodes += [node("QuantizeLinear", ["x", "xs", "xz"], ["xq"], name="q_x")]
        nodes += [node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"], name="dq_x")]
        left = "xd"
    if quantize_weight:
        nodes += [node("QuantizeLinear", ["w", "ws", "wz"], ["wq"], name="q_w", **per_channel)]
        nodes += [node("DequantizeLinear", ["wq", "ws", "wz"], ["wd"], name="dq_w", **per_channel)]
        right = "wd"
    nodes += [node("MatMul", [left, right], ["p"], name="product"), *after]
    graph = helper.make_graph(
        nodes,
        "quantized",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, [1, 2])],
        [numpy_helper.from_array(values, name) for name, values in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def of_kind(kind: int, *, opset: int, block: int = 0, of_weight: bool = True, taker: str = "MatMul") -> onnx.ModelProto:
    """A DQ of a narrow type, of a stored weight or of a Q, before a matrix product."""
    node = helper.make_node
    settings = {"axis": 0, "block_size": block} if block else {}
    scale = np.full((128 // block, 2) if block else (), 0.1, dtype=np.float32)
    tensors = [numpy_helper.from_array(scale, "s")]
    if of_weight:
        size = 128 * 2 // (2 if kind == TensorProto.INT4 else 1)
        stored = helper.make_tensor("w", kind, [128, 2], bytes(size), raw=True)
        tensors.append(stored)
        nodes = [node("DequantizeLinear", ["w", "s"], ["d"], name="dq", **settings)]
        nodes.append(node(taker, ["x", "d"], ["y"], name="taker"))
    else:
        nodes = [
            node("QuantizeLinear", ["x", "s", "z"], ["q"], name="q"),
            node("DequantizeLinear", ["q", "s", "z"], ["y"], name="dq"),
        ]
        tensors.append(helper.make_tensor("z", kind, [], bytes(1), raw=True))
    graph = helper.make_graph(
        nodes,
        "narrow",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [128, 128])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def pair_after(maker: str, then: str, *, last: str = "y") -> tuple[onnx.NodeProto, ...]:
    """A Q/DQ pair on a tensor, and an operator behind it."""
    node = helper.make_node
    return (
        node("QuantizeLinear", [maker, "xs", "xz"], ["aq"]),
        node("DequantizeLinear", ["aq", "xs", "xz"], ["ad"]),
        node(then, ["ad"], [last], name="after"),
    )


def quantized_conv(*after: onnx.NodeProto, output: str = "c") -> onnx.ModelProto:
    """A convolution with both inputs quantized, ``x`` (1, 2, 4, 4) to ``c`` of the same shape."""
    node = helper.make_node
    weights = {
        "w": np.ones((2, 2, 1, 1), dtype=np.float32),
        "xs": np.float32(0.1),
        "xz": np.int8(0),
        "ws": np.full(2, 0.1, dtype=np.float32),
        "wz": np.zeros(2, dtype=np.int8),
    }
    nodes = [
        node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
        node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"]),
        node("QuantizeLinear", ["w", "ws", "wz"], ["wq"], axis=0),
        node("DequantizeLinear", ["wq", "ws", "wz"], ["wd"], axis=0),
        node("Conv", ["xd", "wd"], ["c"], name="conv"),
        *after,
    ]
    shape = [1, 2, 4, 4]
    graph = helper.make_graph(
        nodes,
        "conv",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.asarray(values), name) for name, values in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def stored_int8(values: list[int]) -> onnx.ModelProto:
    listed = ", ".join(map(str, values))
    return parsed(
        f"g (float[1,2] x) => (float[1,2] y) <float s = {{0.1}}, int8[2,2] w = {{{listed}}}, int8 z = {{0}}>"
        "{ d = DequantizeLinear(w, s, z)  xq = QuantizeLinear(x, s, z)  xd = DequantizeLinear(xq, s, z)"
        "  y = MatMul(xd, d) }"
    )


def with_weights(model: onnx.ModelProto, **weights: np.ndarray) -> onnx.ModelProto:
    model.graph.initializer.extend(numpy_helper.from_array(values, name) for name, values in weights.items())
    return model


def external() -> onnx.ModelProto:
    model = with_weights(parsed(simple("Add", call="x, w")), w=np.ones((1, 4), dtype=np.float32))
    onnx.external_data_helper.set_external_data(model.graph.initializer[0], location="model.onnx.data")
    return model


def branches(names: tuple[str, str]) -> onnx.ModelProto:
    then, other = names
    return parsed(
        "g (bool c, float[1] x) => (float[1] y) { y = If (c) <"
        f"then_branch = t () => (float[1] {then}) {{ {then} = Relu(x) }}, "
        f"else_branch = e () => (float[1] {other}) {{ {other} = Neg(x) }}> }}"
    )


def on_onnx_runtime(more: str = "", /, *, kind: str = "KIND_GPU", **settings: str) -> str:
    """A config.pbtxt for ONNX Runtime with its TensorRT provider, set as given."""
    given = "".join(f'parameters {{ key: "{key}" value: "{value}" }} ' for key, value in settings.items())
    return (
        f'backend: "onnxruntime" max_batch_size: 1 instance_group [ {{ kind: {kind} }} ] {more} optimization {{'
        f' execution_accelerators {{ gpu_execution_accelerator: [ {{ name: "tensorrt" {given} }} ] }} }}'
    )


ON_CPU = 'backend: "onnxruntime" instance_group [ { kind: KIND_CPU } ] '
FREE = simple("Relu", "float[n,4] x", "float[n,4] y")
RELU = simple("Relu")
HALF = simple("Relu", "float16[1,4] x", "float16[1,4] y")
CASES = [
    ("E101", parsed("g (float[4] x, int64[n] s) => (float[] y) { r = Reshape(x, s)  y = Relu(r) }"), {}),
    ("E102", parsed(RELU, opset=21), {}),
    ("E102", parsed(RELU, opset=8), {"version": TENSORRT_11}),
    ("E103", parsed(RELU, ir=12), {}),
    ("E104", parsed(simple("com.microsoft.FastGelu"), domains=', "com.microsoft": 1'), {}),
    ("E105", external(), {}),
    ("E201", parsed(simple("Det", "float[2,2] x", "float y")), {}),
    ("E202", parsed("g (float[4] x) => (uint8[4] q) { q, s, z = DynamicQuantizeLinear(x) }"), {}),
    ("E203", parsed(simple("ReduceSum", "float[1,4] x, int64[1] a", "float[n] y", "x, a")), {}),
    ("E203", parsed(simple("Hardmax", "float[1,n] x", "float[1,n] y")), {}),
    ("E204", parsed(simple("AveragePool", "float[1,1,4] x", "float[1,1,3] y", attrs=" <kernel_shape = [2]>")), {}),
    ("E204", parsed("g (float[1,1,4,4] x) => (float[1,1,3,3] y) { y, i = MaxPool <kernel_shape = [2,2]> (x) }"), {}),
    ("E204", parsed(simple("MaxPool", "float[1,1,8,8] x", "float[1,1,6,6] y",
                           attrs=" <kernel_shape = [2,2], dilations = [2,2]>")), {}),
    ("E204", parsed(simple("ScatterND", "float[4] x, int64[1,1] i, float[1] u", "float[4] y", "x, i, u",
                           ' <reduction = "add">')), {}),
    ("E204", parsed(simple("Resize", "float[1,1,4,4] x", "float[1,1,8,8] y", 'x, , s', ' <mode = "cubic">').replace(
        "{", "<float[4] s = {1, 1, 2, 2}> {", 1)), {}),
    ("E204", parsed(simple("GRU", "float[1,1,4] x, float[2,6,4] w, float[2,6,2] r", "float[1,2,1,2] y", "x, w, r",
                           ' <direction = "bidirectional", hidden_size = 2,'
                           ' activations = ["Sigmoid", "Tanh", "Sigmoid", "Relu"]>')), {}),
    ("E204", parsed(simple("LSTM", "float[1,1,4] x, float[1,8,4] w, float[1,8,2] r", "float[1,1,1,2] y", "x, w, r",
                           " <hidden_size = 2, input_forget = 1>")), {}),
    ("E204", branches(("y1", "y1")), {}),
    ("E204", parsed('g (float x) => (string[1] y) { y = Constant <value_strings = ["a"]> () }'), {}),
    ("E204", parsed("g (float[8] x) => (float[4] y, int64[4] i) <int64[1] k = {4}>"
                    "{ y, i = TopK <sorted = 0> (x, k) }"), {}),
    ("E204", parsed(simple("GridSample", "float[1,1,2,2,2] x, float[1,2,2,2,3] g", "float[1,1,2,2,2] y", "x, g"),
                    opset=20), {}),
    ("E205", parsed(simple("RMSNormalization", "float[1,4] x, float[4] s", call="x, s"), opset=23), {}),
    ("E206", parsed(simple("NonZero", "float[4] x", "int64[1,n] y")), {}),
    ("E301", parsed(simple("Relu", "double[4] x", "double[4] y")), {}),
    ("E302", parsed(simple("Identity", "string[4] x", "string[4] y")), {}),
    ("E303", parsed(simple("Add", "uint8[4] x", "uint8[4] y", "x, x")), {}),
    ("E304", with_weights(parsed(simple("Add", "int64[1] x", "int64[1] y", "x, w")), w=np.array([2**40])), {}),
    ("E305", parsed(RELU), {"version": TENSORRT_11, "precision": "float16"}),
    ("E305", parsed(RELU), {"version": (10, 12), "precision": "int8"}),
    ("E305", parsed(RELU), {"version": TENSORRT_11}),
    ("E305", parsed(HALF, opset=12), {"version": TENSORRT_11, "precision": "float16"}),
    ("E306", with_weights(parsed(simple("Add", call="x, w")), w=np.full((1, 4), 7e4, np.float32)),
     {"precision": "float16"}),
    ("E306", with_weights(parsed(HALF.replace("Relu(x)", "Add(x, w)")), w=np.full((1, 4), 1e-6, np.float16)), {}),
    ("E307", parsed(HALF), {}),
    ("E401", quantized_product(zero=3), {}),
    ("E402", quantized_product(kind="uint8"), {}),
    ("E402", parsed("g (float[4] x) => (float[4] y) <float s = {0.1}>"
                    "{ q = QuantizeLinear(x, s)  y = DequantizeLinear(q, s) }"), {}),
    ("E403", parsed("g (float[1,2] x) => (float[1,2] y) <float s = {0.1}, int32[2] b = {1, 2}>"
                    "{ d = DequantizeLinear(b, s)  y = Add(x, d) }"), {}),
    ("E404", quantized_product(scale=0.0), {}),
    ("E404", quantized_product(scale=np.inf), {}),
    ("E404", quantized_product(scale=[0.1] * 4), {}),
    ("E404", quantized_product(weight_scale=[0.1] * 4, axis=0), {}),
    ("E404", parsed("g (float[4] x, float s) => (float[4] y) <int8 z = {0}>"
                    "{ q = QuantizeLinear(x, s, z)  y = DequantizeLinear(q, s, z) }"), {}),
    ("E405", quantized_product(weight_scale=[0.1] * 2, opset=12), {}),
    ("E405", of_kind(TensorProto.FLOAT8E4M3FN, opset=17), {}),
    ("E405", of_kind(TensorProto.INT4, opset=21, block=32), {"version": TENSORRT_11}),
    ("E405", of_kind(TensorProto.INT4, opset=21, of_weight=False), {"version": TENSORRT_11}),
    ("E405", of_kind(TensorProto.INT4, opset=21, taker="Add"), {"version": TENSORRT_11}),
    ("E406", helper.make_model(helper.make_graph(
        [*quantized_product().graph.node, *of_kind(TensorProto.FLOAT8E4M3FN, opset=19).graph.node], "both",
        quantized_product().graph.input, quantized_product().graph.output,
        [*quantized_product().graph.initializer[1:], *of_kind(TensorProto.FLOAT8E4M3FN, opset=19).graph.initializer],
    ), opset_imports=[helper.make_opsetid("", 19)], ir_version=9), {}),
    ("E407", quantized_product(quantize_weight=False), {}),
    ("E407", quantized_product(quantize_input=False), {}),
    ("E408", quantized_product(after=pair_after("p", "Relu"), output="y"), {}),
    ("E408", quantized_product(after=pair_after("p", "Relu", last="unused"), output="ad"), {}),
    ("E409", quantized_conv(helper.make_node("Add", ["c", "x"], ["y"], name="sum"), output="y"), {}),
    ("E410", quantized_conv(*pair_after("c", "Relu"), output="y"), {}),
    ("E411", stored_int8([1, 2, 3, 4]), {}),
    ("E412", quantized_product(after=pair_after("p", "Softmax"), output="y"), {}),
    ("E412", parsed("g (float[4] x) => (int8[4] y) <float s = {0.1}, int8 z = {0}>"
                    "{ q = QuantizeLinear(x, s, z)  y = Identity(q) }"), {}),
    ("E412", parsed("g (int8[4] x) => (float[4] y) <float s = {0.1}> { y = DequantizeLinear(x, s) }"), {}),
    ("E413", quantized_product(quantize_weight=False), {}),
    ("E414", stored_int8([1, 2, 3, -128]), {}),
    ("E501", parsed(simple("Relu", "float[n,4] x", "float[n,4] y")), {}),
    ("E501", parsed(simple("Relu", "float[n,4] x", "float[n,4] y")), {"profile": {}}),
    ("E501", parsed(RELU), {"profile": {"z": Range(min=(1,), opt=(1,), max=(1,))}}),
    ("E501", parsed(RELU), {"profile": {"x": Range(min=(1,), opt=(1,), max=(1,))}}),
    ("E501", parsed(RELU), {"profile": {"x": Range(min=(2, 4), opt=(1, 4), max=(4, 4))}}),
    ("E502", parsed(simple("Relu", "float[n,4] x", "float[n,4] y")),
     {"profile": {"x": Range(min=(1, 4), opt=(8, 4), max=(64, 4))}}),
    ("E502", parsed(simple("Relu", "float[n,4] x", "float[n,4] y")),
     {"profile": {"x": Range(min=(1, 4), opt=(1, 4), max=(16, 4))}}),
    ("E503", parsed(simple("Add", "float[n,4] x, float[n,4] z", "float[n,4] y", "x, z")),
     {"profile": {"x": Range(min=(1, 4), opt=(2, 4), max=(4, 4)), "z": Range(min=(1, 4), opt=(2, 4), max=(8, 4))}}),
    ("E504", parsed(RELU), {"max_batch_size": 8}),
    ("E505", parsed(simple("ConstantOfShape", "int64[65] x", "float[n] y")), {}),
    ("E701", parsed(RELU), {"config": 'platform: "tensorrt_plan" instance_group [ { kind: KIND_CPU } ]'}),
    ("E701", parsed(RELU), {"config": on_onnx_runtime(kind="KIND_CPU")}),
    ("E702", parsed(RELU), {"config": on_onnx_runtime(precision_mode="INT4")}),
    ("E702", parsed(RELU), {"config": on_onnx_runtime().replace('"tensorrt"', '"tensorflow"')}),
    ("E702", parsed(FREE), {"config": on_onnx_runtime(trt_profile_min_shapes="x:1x4")}),
    ("E702", parsed(FREE), {"config": on_onnx_runtime(
        trt_profile_min_shapes="z:1x4", trt_profile_opt_shapes="x:1x4", trt_profile_max_shapes="x:1x4")}),
    ("E702", parsed(FREE), {"config": on_onnx_runtime(
        trt_profile_min_shapes="x:1x4", trt_profile_opt_shapes="x:4", trt_profile_max_shapes="x:1x4")}),
    ("E703", quantized_product(), {"config": on_onnx_runtime(precision_mode="FP16")}),
    ("E703", quantized_product(), {"config": on_onnx_runtime(
        precision_mode="INT8", int8_calibration_table_name="table")}),
    ("E704", parsed(RELU), {"config": on_onnx_runtime(trt_engine_cache_path="/mnt/cache")}),
    ("E705", parsed(simple("Det", "float[2,2] x", "float y")), {"config": on_onnx_runtime()}),
    ("E706", parsed(RELU), {"config": ON_CPU + "optimization { graph { level: 2 } }"}),
    ("E706", parsed(RELU), {"config": ON_CPU + "max_batch_size: 8"}),
    ("E707", parsed(RELU), {"config": ON_CPU}),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "model", "target"), CASES, ids=[f"{case[0]}-{i}" for i, case in enumerate(CASES)])
def test_a_model_sets_off_its_rule(rule: str, model: onnx.ModelProto, target: dict) -> None:
    hits = found(model, **target)
    assert rule in hits
    known = next(entry for entry in RULES if entry.id == rule)
    for finding in hits[rule]:
        assert finding.message
        assert finding.fix == known.fix


def test_every_rule_has_a_model_that_sets_it_off() -> None:
    assert {case[0] for case in CASES} == {rule.id for rule in RULES}
    assert len({rule.id for rule in RULES}) == len(RULES)


CLEAN = [
    parsed(RELU),
    quantized_product(),
    quantized_product(weight_scale=[0.1, 0.2]),
    quantized_conv(helper.make_node("Relu", ["c"], ["y"]), output="y"),
    of_kind(TensorProto.FLOAT8E4M3FN, opset=19, of_weight=False),
    branches(("y1", "y2")),
    parsed(
        "g (float[1,8] x) => (float[1,2] y) <int64[1] a = {0}, int64[1] e = {9223372036854775807}, int64[1] o = {1},"
        " int64[1] s = {4}> { y = Slice(x, a, e, o, s) }"
    ),
    parsed("g (uint8[1,4] x) => (float[1,4] y) { y = Cast <to = 1> (x) }"),
]


@pytest.mark.parametrize("model", CLEAN)
def test_a_clean_model_sets_off_none(model: onnx.ModelProto) -> None:
    assert found(model) == {}


@pytest.mark.parametrize(
    ("op", "settings", "shape", "axis"),
    [
        ("Conv", {}, (3, 2, 1, 1), 0),
        ("ConvTranspose", {}, (2, 3, 1, 1), 1),
        ("Gemm", {}, (4, 3), 1),
        ("Gemm", {"transB": 1}, (3, 4), 0),
        ("MatMul", {}, (4, 3), 1),
    ],
)
def test_weights_have_a_scale_for_each_output_channel(op, settings, shape, axis) -> None:
    def with_axis(chosen: int) -> set[str]:
        tensors = [
            numpy_helper.from_array(np.ones(shape, dtype=np.int8), "w"),
            numpy_helper.from_array(np.full(shape[chosen], 0.1, dtype=np.float32), "s"),
        ]
        graph = helper.make_graph(
            [
                helper.make_node("DequantizeLinear", ["w", "s"], ["d"], axis=chosen),
                helper.make_node(op, ["x", "d"], ["y"], name="taker", **settings),
            ],
            "weights",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2, 4, 4] if len(shape) == 4 else [1, 4])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            tensors,
        )
        return set(found(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)))

    assert "E404" not in with_axis(axis)
    assert "E404" in with_axis(1 - axis)


def test_a_graph_as_deep_as_networks_get_is_looked_at_whole() -> None:
    deep = quantized_product()
    chain = [helper.make_node("Relu", [f"t{i}"], [f"t{i + 1}"]) for i in range(3000)]
    deep.graph.node[0].input[0] = "t3000"
    chain[0].input[0] = "x"
    for node in reversed(chain):
        deep.graph.node.insert(0, node)
    assert found(deep) == {}


KEPT = {"trt_engine_cache_enable": "1", "trt_engine_cache_path": "/mnt/cache"}
WARM = 'model_warmup [ { name: "first" batch_size: 1 } ]'


@pytest.mark.parametrize(
    ("model", "config"),
    [
        (parsed(RELU), 'platform: "tensorrt_plan" instance_group [ { kind: KIND_GPU } ]'),
        (quantized_product(), on_onnx_runtime(WARM, precision_mode="INT8", **KEPT)),
        (parsed(RELU), ON_CPU + 'max_batch_size: 0 input [ { name: "x" data_type: TYPE_FP32 dims: [ 4 ] } ]'
         ' parameters { key: "intra_op_thread_count" value: { string_value: "1" } } optimization {'
         ' execution_accelerators { cpu_execution_accelerator: [ { name: "openvino" } ] } }'),
    ],
)  # fmt: skip
def test_a_configuration_that_fits_sets_off_none(model: onnx.ModelProto, config: str) -> None:
    assert found(model, config=config) == {}


def test_what_onnx_runtime_runs_elsewhere_is_no_error_there() -> None:
    fused = parsed(simple("com.microsoft.FastGelu"), domains=', "com.microsoft": 1')
    assert found(fused)["E104"][0].severity == "error"
    served = found(fused, config=on_onnx_runtime(WARM, **KEPT))
    assert {rule: hits[0].severity for rule, hits in served.items()} == {"E104": "warning", "E705": "warning"}
    assert served["E705"][0].message == "1 of 1 nodes (100%) are left to CUDA, and cut the graph there"


def test_pairs_need_no_int8_mode_from_tensorrt_11_on() -> None:
    config = on_onnx_runtime(WARM, **KEPT)
    assert "E703" in found(quantized_product(), config=config)
    assert "E703" not in found(quantized_product(), config=config, version=TENSORRT_11)


def test_the_shapes_of_a_configuration_are_the_profile() -> None:
    ends = {"min": "x:1x4,m:1", "opt": "x:2x4,m:2", "max": "x:8x4,m:8"}
    shapes = {f"trt_profile_{end}_shapes": text for end, text in ends.items()}
    assert profile_in(parse_config(on_onnx_runtime(**shapes))) == {
        "x": Range(min=(1, 4), opt=(2, 4), max=(8, 4)),
        "m": Range(min=(1,), opt=(2,), max=(8,)),
    }
    ranks = {**shapes, "trt_profile_max_shapes": "x:8x4x1,m:8"}
    for odd in (ranks, {**shapes, "trt_profile_max_shapes": "x:8xn"}, dict(list(shapes.items())[:2]), {}):
        assert profile_in(parse_config(on_onnx_runtime(**odd))) is None
    assert profile_in(None) is None


def test_a_configuration_that_is_none_is_the_users_input() -> None:
    with pytest.raises(InputError, match=r"no config\.pbtxt of Triton"):
        parse_config("max_batch: 8")


def test_rules_hold_from_their_version_on() -> None:
    plain, swish = parsed(RELU), parsed(simple("RMSNormalization", "float[1,4] x, float[4] s", call="x, s"), opset=23)
    assert "E305" not in found(plain, version=(10, 11))
    assert found(plain, version=TENSORRT_11)["E305"][0].severity == "info"
    assert "E205" not in found(swish, version=TENSORRT_11)


def test_findings_name_their_nodes_and_errors_come_first() -> None:
    findings = apply_rules(RULES, Graph(quantized_product(zero=3, kind="uint8")), Target(tensorrt=TENSORRT_10))
    assert [finding.rule for finding in findings] == ["E401", "E402"]
    assert findings[0].nodes == ("q_x", "dq_x")
    assert findings[1].nodes == ("q_x", "dq_x", "q_w", "dq_w")
    assert findings[0].message == "2 Q and DQ have a zero point that is not 0: 3, for one"
    assert findings[0].severity == "error"


@pytest.mark.parametrize("version", [TENSORRT_10, TENSORRT_11])
@pytest.mark.parametrize("name", ["modelopt-int8-float16.onnx", "modelopt-int8-float32.onnx"])
def test_what_nvidias_own_tool_quantized_is_ready(name: str, version: tuple[int, int]) -> None:
    shapes = {"image": Range(min=(1, 3, 16, 16), opt=(8, 3, 16, 16), max=(16, 3, 16, 16))}
    target = Target(tensorrt=version, profile=shapes, precision="int8", max_batch_size=16)
    graph = load_graph(DATA / name)
    assert sum(node.op_type == "QuantizeLinear" for node in graph.nodes) == 7
    assert apply_rules(RULES, graph, target) == ()


def test_a_version_that_nothing_is_known_of_is_refused() -> None:
    from optimize.readiness.releases import tensorrt_release, tensorrt_version

    with pytest.raises(InputError, match="TensorRT '9'"):
        tensorrt_version("9")
    with pytest.raises(InputError, match="TensorRT 'new'"):
        tensorrt_version("new")
    assert tensorrt_version("10.14") == (10, 14)
    assert tensorrt_release((10, 14)).opsets == (9, 20)
