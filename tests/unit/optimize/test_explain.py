"""The sentence on two profiles, what is predicted, and which models a name stands for."""

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from optimize.explain import as_lines, compare_times, explain_difference, models_of, predict, weights_of
from optimize.profiling import unfused_pairs
from registry.codec import dumps, loads
from registry.errors import InputError
from registry.records import EngineGraph, EngineSpec, Estimate, Explanation, OperatorShare, Recipe, StageCall
from tests.doubles.campaigns import campaign
from tests.doubles.models import mlp


def graph(
    ms: float,
    operators: dict[str, float],
    macs: dict[str, int],
    *,
    engine: Literal["onnxruntime", "openvino"] = "onnxruntime",
    unfused: int = 0,
    nodes: int = 4,
) -> EngineGraph:
    shares = sorted(operators.items(), key=lambda item: -item[1])
    return EngineGraph(
        engine=EngineSpec(name=engine),
        engine_version="1",
        batch_size=8,
        threads=1,
        time=Estimate(value=ms, low=ms * 0.99, high=ms * 1.01, runs=15, method="test", unit="ms"),
        operators=tuple(OperatorShare(operator=name, nodes=nodes, time_share=share) for name, share in shares),
        macs=macs,
        unfused_qdq=unfused,
    )


BEFORE = graph(29.0, {"Conv": 0.88, "Relu": 0.07, "Gemm": 0.05}, {"float32": 1000})


def sentence(after: EngineGraph, before: EngineGraph = BEFORE) -> str:
    return explain_difference(before, after, compare_times(before, after))


def test_faster_in_int8():
    after = graph(10.0, {"QLinearConv": 0.61, "Conv": 0.3}, {"int8": 960, "float32": 40})
    assert sentence(after) == (
        "2.9 times faster: 96 % of multiply-adds are in int8 and QLinearConv takes 61 % of the time "
        "where Conv took 88 %."
    )


def test_all_of_it_in_int8():
    assert "all multiply-adds are in int8" in sentence(graph(10.0, {"QLinearConv": 1.0}, {"int8": 1000}))


def test_slower_by_quantizing_at_run_time():
    after = graph(104.4, {"ConvInteger": 0.75, "DynamicQuantizeLinear": 0.08, "Mul": 0.17}, {"int8": 1000})
    assert sentence(after) == "3.6 times slower: ConvInteger and DynamicQuantizeLinear take 83 % of the time."


def test_slower_by_pairs_that_are_not_fused():
    after = graph(40.0, {"Conv": 0.5, "DequantizeLinear": 0.3, "QuantizeLinear": 0.2}, {"float32": 1000}, unfused=12)
    told = sentence(after)
    assert told.startswith("1.38 times slower: DequantizeLinear and QuantizeLinear take 50 % of the time")
    assert "12 pairs that are not fused" in told


def test_slower_by_casts():
    after = graph(40.0, {"Conv": 0.8, "Cast": 0.2}, {"float32": 1000})
    told = sentence(after)
    assert "1.38 times slower: Cast takes 20 % of the time and Conv takes 80 % of the time, before 88 %." in told


def test_slower_for_no_reason_that_is_seen():
    assert sentence(graph(40.0, {"Conv": 1.0}, {"float32": 1000})).endswith(
        "Conv takes 100 % of the time, before 88 %."
    )


@pytest.mark.parametrize("ms", [29.0, 28.0, 30.0])
def test_equal(ms: float):
    assert sentence(graph(ms, {"Conv": 1.0}, {"float32": 1000})) == (
        "As fast as the baseline: the arithmetic is the same."
    )


def test_equal_although_narrower():
    after = graph(29.0, {"Conv": 0.6, "Cast": 0.4}, {"float16": 1000})
    assert sentence(after) == (
        "As fast as the baseline: all multiply-adds are in float16, but Cast takes 40 % of the time."
    )


def test_times_whose_intervals_meet_are_equal():
    after = graph(20.0, {"Conv": 1.0}, {"float32": 1000})
    wide = Estimate(value=20.0, low=10.0, high=40.0, runs=3, method="test", unit="ms")
    after = EngineGraph(**{name: getattr(after, name) for name in after.__slots__} | {"time": wide})
    assert sentence(after).startswith("As fast as the baseline")


def test_openvino_in_bfloat16():
    after = graph(14.5, {"Convolution": 0.9}, {"bfloat16": 1000}, engine="openvino")
    assert sentence(after) == (
        "2.0 times faster: all multiply-adds are in bfloat16 and Convolution takes 90 % of the time "
        "where Conv took 88 %."
    )


def test_another_engine_with_the_same_arithmetic():
    after = graph(20.0, {"Convolution": 0.9}, {"float32": 1000}, engine="openvino")
    assert "openvino does the same arithmetic faster than onnxruntime" in sentence(after)


def test_fewer_operators_and_fewer_multiply_adds():
    assert "the same arithmetic in 2 operators instead of 12" in sentence(
        graph(20.0, {"Conv": 0.9, "Gemm": 0.1}, {"float32": 1000}, nodes=1)
    )
    assert "it does 43 % of the baseline's multiply-adds" in sentence(graph(14.0, {"Conv": 1.0}, {"float32": 430}))


def test_counts_of_two_engines_are_not_set_against_each_other():
    after = graph(20.0, {"RNNSeq": 0.9}, {}, engine="openvino")
    assert "multiply-adds" not in sentence(after)


def test_narrow_weights():
    after = graph(20.0, {"MatMulNBits": 0.9}, {"int4 weights": 900, "float32": 100})
    assert "90 % of multiply-adds are with int4 weights" in sentence(after)


def test_an_explanation_survives_json_and_reads_well():
    after = graph(10.0, {"QLinearConv": 0.997, "Reshape": 0.003}, {"int8": 1000}, unfused=1)
    told = Explanation(
        name="int8",
        baseline="float32",
        speedup=compare_times(BEFORE, after),
        before=BEFORE,
        after=after,
        sentence="Is.",
    )
    assert loads(dumps(told)) == told
    lines = as_lines(told)
    assert lines[0] == "int8: Is."
    assert any("<1 %  Reshape x 4" in line for line in lines)
    assert any(">99 %  QLinearConv x 4" in line for line in lines)


def test_casts_and_what_quantizes_are_listed_however_little_they_take():
    many = {f"Op{number}": 0.1 for number in range(9)}
    after = graph(10.0, {**many, "Cast": 0.06, "DynamicQuantizeLinear": 0.03, "Relu": 0.01}, {"float32": 1000})
    told = Explanation(
        name="x", baseline="float32", speedup=compare_times(BEFORE, after), before=BEFORE, after=after, sentence="Is."
    )
    lines = [line.strip() for line in as_lines(told)]
    assert "6 %  Cast x 4" in lines
    assert "3 %  DynamicQuantizeLinear x 4" in lines
    assert lines[-1] == "11 %  2 others"


# --- predictions -----------------------------------------------------------------------------------------------

DYNAMIC = StageCall(name="quantize.dynamic")


def recipe(*stages: StageCall) -> Recipe:
    return Recipe(name="tried", stages=stages, engines=(EngineSpec(name="onnxruntime"),))


def test_dynamic_int8_of_convolutions_is_hopeless():
    reason = predict(recipe(DYNAMIC), {"Conv": 97, "Gemm": 3})
    assert reason is not None
    assert reason.startswith("predicted: 97 % of the weights are of convolutions")
    assert "predict: false and ops: all" in reason
    asked = predict(recipe(StageCall(name="quantize.dynamic", params={"ops": "all"})), {"Conv": 97, "Gemm": 3})
    assert asked is not None
    assert "ops" not in asked


@pytest.mark.parametrize("weights", [{"MatMul": 90, "Conv": 10}, {"Conv": 50, "Gemm": 50}, {}])
def test_dynamic_int8_of_others_is_not(weights: dict[str, int]):
    assert predict(recipe(DYNAMIC), weights) is None


@pytest.mark.parametrize("stage", ["quantize.static", "precision.float16", "convert.openvino"])
def test_nothing_else_is_predicted(stage: str):
    assert predict(recipe(StageCall(name=stage)), {"Conv": 100}) is None


def test_weights_of_a_file(tmp_path: Path):
    (tmp_path / "model.onnx").write_bytes(mlp().SerializeToString())
    # A Gemm's weights and biases: 8 x 16 + 16, and 16 x 4 + 4.
    assert weights_of(tmp_path / "model.onnx") == {"Gemm": 212}


# --- graphs and names ------------------------------------------------------------------------------------------


def test_pairs_that_are_not_fused():
    def node(kind: str, source: str, target: str):
        return helper.make_node(kind, [source, "scale"], [target])

    nodes = [
        node("QuantizeLinear", "x", "q"),
        node("DequantizeLinear", "q", "d"),  # straight back
        node("DequantizeLinear", "weight", "w"),  # in each run
        helper.make_node("QLinearAdd", ["q", "q"], ["sum"]),
        node("DequantizeLinear", "sum", "y"),  # the end of what is in int8
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    constants = [numpy_helper.from_array(np.ones(1, np.int8), "weight")]
    assert unfused_pairs(helper.make_graph(nodes, "g", values[:1], values[1:], constants)) == 2


def test_a_name_and_an_id_stand_for_the_same_model():
    record = campaign()
    variant = record.variants[3]
    candidate = next(one for one in record.candidates if one.variant_id == variant.id)
    found = [
        models_of(record, wanted, lambda one: Path(one.name))
        for wanted in (variant.name, variant.id, candidate.name, candidate.id)
    ]
    assert all(one == found[0] for one in found)
    (model,), baseline = found[0]
    assert model.entry == Path(variant.name, "model.onnx")
    assert baseline.name == "float32"


def test_an_unknown_name_gets_the_nearest():
    record = campaign()
    with pytest.raises(InputError, match="no variant or candidate 'int8-statik'") as caught:
        models_of(record, "int8-statik", lambda one: Path(one.name))
    assert "Did you mean 'int8-static'?" in str(caught.value.hint)
