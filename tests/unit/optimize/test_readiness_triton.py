"""What the stock Triton of a release takes."""

import onnx
import pytest
from onnx import TensorProto, helper

from optimize.readiness.graph import Graph
from optimize.readiness.releases import TRITON
from optimize.readiness.triton import TRITON_RULES, check_triton
from registry.errors import InputError


def model(
    op: str = "Relu",
    *,
    opset: int = 18,
    ir: int = 8,
    kind: int = TensorProto.FLOAT,
    inside: int | None = None,
    domain: str = "",
    domain_version: int = 1,
) -> onnx.ModelProto:
    """``x`` to ``y`` of a type, through one operator; with ``inside``, through a Cast to that type and back, too."""
    nodes = [helper.make_node(op, ["x"], ["y"], name="node", domain=domain)]
    if inside is not None:
        nodes[0].output[0] = "made"
        nodes.append(helper.make_node("Cast", ["made"], ["narrow"], to=inside))
        nodes.append(helper.make_node("Cast", ["narrow"], ["y"], to=kind))
    graph = helper.make_graph(
        nodes,
        "one",
        [helper.make_tensor_value_info("x", kind, [1])],
        [helper.make_tensor_value_info("y", kind, [1])],
    )
    imports = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, domain_version)] if domain else ())]
    return helper.make_model(graph, opset_imports=imports, ir_version=ir)


def rules(made: onnx.ModelProto, release: str) -> set[str]:
    return {finding.rule for finding in check_triton(Graph(made), release)}


CASES = [
    ("T101", model(opset=19), "23.03", "23.06"),
    ("T102", model(ir=9), "23.03", "23.06"),
    ("T102", model(ir=10), "23.06", "24.10"),
    ("T103", model("Identity", kind=TensorProto.COMPLEX64), "23.03", None),
    ("T104", model("MatMulNBits", domain="com.microsoft"), "23.03", "24.01"),
    ("T104", model("PagedAttention", domain="com.microsoft"), "25.07", "26.01"),
    ("T104", model("Conv", domain="com.microsoft.nchwc"), "24.10", None),
    ("T105", model(opset=21, ir=10, inside=TensorProto.INT4), "24.04", "24.07"),
    ("T107", model("Normalizer", domain="ai.onnx.ml", domain_version=5), "24.04", "24.07"),
    ("T106", model(inside=TensorProto.BFLOAT16), "23.03", None),
]


@pytest.mark.parametrize(("rule", "made", "refusing", "taking"), CASES)
def test_a_release_refuses_what_a_later_one_takes(rule, made, refusing, taking) -> None:
    assert rule in rules(made, refusing)
    if taking is not None:
        assert rules(made, taking) == set()


def test_every_rule_has_a_case() -> None:
    assert {case[0] for case in CASES} == set(TRITON_RULES)


def test_a_plain_model_is_taken_by_all_releases() -> None:
    assert [release for release in TRITON if rules(model(), release)] == []


def test_an_unknown_release_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"Triton '23\.02'") as caught:
        check_triton(Graph(model()), "23.02")
    assert "23.03, 23.06" in str(caught.value.hint)


def test_findings_say_which_onnx_runtime_it_is() -> None:
    (finding,) = check_triton(Graph(model(opset=19)), "23.03")
    assert finding.versions == "Triton 23.03 (ONNX Runtime 1.14.1)"
    assert finding.severity == "error"
