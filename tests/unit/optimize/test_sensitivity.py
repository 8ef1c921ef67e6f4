"""Which nodes to leave in float32: the search on made-up landscapes, and the ranking on real graphs."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from optimize import tuning
from optimize.calibration import whole_batches
from optimize.sensitivity import MOST_GROUPS, Found, named_in_ir, search_float_nodes
from optimize.stages import make_stage
from optimize.stages.base import Context, read_input
from optimize.stages.preparation import PREPARED, load, prepare
from registry import codec
from registry.records import AccuracySearch, Estimate, NodeGroup, SearchTrial, Sensitivity, StageCall
from tests.doubles.sensitive import clear_samples, conv_chain

LIMIT = 0.01


# --- searching -------------------------------------------------------------------------------------------------


def estimate(value: float, width: float = 0.0) -> Estimate:
    return Estimate(value=value, low=value - width, high=value + width, runs=900, method="made up", unit="fraction")


def group(name: str, noise: float = 1.0, *, macs: float = 0.1) -> NodeGroup:
    return NodeGroup(nodes=(name,), noise=noise, macs=macs)


def trial(nodes: tuple[str, ...], drop: Estimate | None, *, took_s: float = 1.0) -> SearchTrial:
    if drop is None:
        return SearchTrial(float_nodes=nodes, outcome="failed", drop=None, reason="it broke", took_s=took_s)
    outcome = "pass" if drop.high is not None and drop.high <= LIMIT else "fail"
    return SearchTrial(float_nodes=nodes, outcome=outcome, drop=drop, reason=f"{drop.high} and {LIMIT}", took_s=took_s)


class Landscape:
    """What is lost with each set of nodes in float32; keeps what it was asked."""

    def __init__(self, drop: Callable[[frozenset[str]], Estimate | None]) -> None:
        self.drop = drop
        self.asked: list[tuple[str, ...]] = []

    def __call__(self, nodes: tuple[str, ...]) -> SearchTrial:
        self.asked.append(nodes)
        return trial(nodes, self.drop(frozenset(nodes)))


def additive(effects: Sequence[float]) -> tuple[list[NodeGroup], Landscape]:
    """Nodes ``n0``, ``n1``, ..., each losing its effect where it is quantized; ranked by it."""
    order = sorted(range(len(effects)), key=lambda i: -effects[i])
    groups = [group(f"n{i}", effects[i]) for i in order]
    return groups, Landscape(
        lambda nodes: estimate(sum(effect for i, effect in enumerate(effects) if f"n{i}" not in nodes))
    )


def search(groups: Sequence[NodeGroup], landscape: Callable[..., SearchTrial], **budget: float) -> Found:
    return search_float_nodes(groups, landscape, **{"trials": 50, "seconds": 1e6, **budget})  # type: ignore[arg-type]


def test_the_worst_nodes_are_left_out_until_the_limit_is_met():
    groups, landscape = additive([0.001, 0.05, 0.0005, 0.03, 0.002, 0.0, 0.0, 0.0])
    found = search(groups, landscape)
    assert found.best is not None
    assert set(found.best.float_nodes) == {"n1", "n3"}
    assert found.stopped == "done"
    assert found.monotone
    assert landscape.asked == [("n1",), ("n1", "n3"), ("n3",)]


def test_a_long_ranking_is_bisected_and_not_walked():
    groups, landscape = additive([0.02] * 20 + [0.0] * 180)
    found = search(groups, landscape, trials=10)  # 1, 2, 4, ..., 32, then between 16 and 32
    assert found.best is not None
    assert len(found.best.float_nodes) == 20
    assert found.best.outcome == "pass"


def test_what_is_not_needed_is_put_back():
    """Two nodes that share a bad tensor: leaving out one of them does not help; two bystanders rank between."""

    def drop(nodes: frozenset[str]) -> Estimate:
        return estimate(0.0 if {"a", "d"} <= nodes else 0.3)

    found = search([group(name) for name in "abcdefgh"], landscape := Landscape(drop))
    assert found.best is not None
    assert set(found.best.float_nodes) == {"a", "d"}
    assert len(landscape.asked) == len(set(landscape.asked)) <= 8, "a set was tried twice, or too many were"


def test_only_the_pessimistic_end_counts():
    groups = [group("a"), group("b"), group("c")]
    widths = {frozenset("a"): 0.008, frozenset("ab"): 0.004}
    found = search(groups, Landscape(lambda nodes: estimate(0.005, widths.get(nodes, 0.5))))
    assert found.best is not None
    assert found.best.float_nodes == ("a", "b")


def test_what_a_noisy_metric_once_passed_is_kept_as_it_was_tried():
    noise = np.random.default_rng(3)
    seen: dict[frozenset[str], Estimate] = {}

    def drop(nodes: frozenset[str]) -> Estimate:
        value = 0.004 * (5 - len(nodes)) + noise.normal(0, 0.004)
        return seen.setdefault(nodes, estimate(value, 0.002))

    found = search([group(name) for name in "abcdefgh"], landscape := Landscape(drop))
    assert found.best in found.trials
    assert found.best is not None
    assert found.best.outcome == "pass"
    assert len(landscape.asked) == len(set(landscape.asked)), "a set was tried twice"


def test_where_no_set_meets_the_limit_the_best_so_far_is_kept_and_how_far_it_is_off():
    groups = [group(name) for name in "abcdef"]
    found = search(groups, Landscape(lambda nodes: estimate(0.08 - 0.01 * len(nodes), 0.001)))
    assert found.stopped == "exhausted"
    assert found.best is not None
    assert found.best.float_nodes == tuple("abcde"), "all in float32 is no quantized variant"
    told = tuning.told(found, found.best, estimate(0.08, 0.001), groups, allowed=LIMIT)
    assert "still over the limit by 0.0210" in told
    assert "left 5 of 6 nodes in float32 (a, b, c and 2 more)" in told


def test_a_budget_of_one_trial_is_one_trial():
    groups, landscape = additive([0.05, 0.03, 0.02, 0.0])
    found = search(groups, landscape, trials=1)
    assert landscape.asked == [("n0",)]
    assert found.stopped == "trials"
    assert found.best is not None
    assert found.best.drop == estimate(0.05)


def test_time_is_a_budget_too_and_what_ranking_took_counts():
    groups, landscape = additive([0.05] * 8)
    found = search(groups, landscape, seconds=10.0, spent_s=7.5)
    assert found.stopped == "minutes"
    assert len(landscape.asked) == 3


def test_a_trial_that_fails_is_recorded_and_the_search_goes_on():
    groups, landscape = additive([0.05, 0.04, 0.03, 0.0, 0.0, 0.0])
    additive_drop = landscape.drop
    landscape.drop = lambda nodes: None if len(nodes) == 2 else additive_drop(nodes)
    found = search(groups, landscape)
    assert found.best is not None
    assert set(found.best.float_nodes) == {"n0", "n1", "n2"}
    assert "failed" in [one.outcome for one in found.trials]


def test_where_all_trials_fail_there_is_nothing_to_keep():
    groups = [group(name) for name in "abc"]
    found = search(groups, Landscape(lambda nodes: None))
    assert found.best is None
    assert "no set of nodes" in tuning.told(found, None, estimate(0.1), groups, allowed=LIMIT)


def test_one_node_leaves_nothing_to_choose_from():
    landscape = Landscape(lambda nodes: estimate(0.0))
    assert search([group("only")], landscape).stopped == "exhausted"
    assert landscape.asked == []


def test_a_search_that_was_killed_takes_the_same_way_again():
    groups, whole = additive([0.02, 0.03, 0.05, 0.01, 0.002, 0.001, 0.0, 0.0, 0.0])
    wanted = search(groups, whole, trials=9)
    for killed_at in range(len(wanted.trials)):
        journal: dict[tuple[str, ...], SearchTrial] = {}
        made: list[tuple[str, ...]] = []

        def remembered(
            nodes: tuple[str, ...],
            journal: dict[tuple[str, ...], SearchTrial] = journal,
            made: list[tuple[str, ...]] = made,
            killed_at: int = killed_at,
        ) -> SearchTrial:
            if nodes not in journal:
                if len(made) == killed_at:
                    made.append(())
                    raise KeyboardInterrupt
                made.append(nodes)
                journal[nodes] = whole(nodes)
            return journal[nodes]

        with pytest.raises(KeyboardInterrupt):
            search(groups, remembered, trials=9)
        assert search(groups, remembered, trials=9) == wanted
        assert len(made) == len(wanted.trials) + 1, "a trial was made twice"


def test_a_larger_set_that_loses_certainly_more_is_noticed():
    drops = {1: 0.02, 2: 0.05, 4: 0.0, 3: 0.0}
    found = search([group(name) for name in "abcdefgh"], Landscape(lambda nodes: estimate(drops[len(nodes)], 0.001)))
    assert found.best is not None
    assert not found.monotone
    assert "a larger set once lost more" in tuning.told(found, found.best, estimate(0.1), [], allowed=LIMIT)


@given(st.lists(st.floats(0, 0.05), min_size=2, max_size=24))
@settings(max_examples=60)
def test_where_effects_add_up_no_node_is_left_out_for_nothing(effects):
    groups, landscape = additive(effects)
    found = search(groups, landscape, trials=500)
    assert found.best is not None
    chosen = set(found.best.float_nodes)
    if found.best.outcome == "pass":
        for node in chosen if len(chosen) > 1 else ():
            drop = landscape.drop(frozenset(chosen - {node}))
            assert drop is not None
            assert drop.value > LIMIT, f"{node} could have been quantized"
    else:
        assert len(chosen) == len(groups) - 1


def test_what_was_found_is_told_with_its_cost():
    groups = [group("conv_1", macs=0.03), group("conv_2", macs=0.01), group("head", macs=0.5)]
    kept = trial(("conv_1", "conv_2"), estimate(0.006, 0.002))
    found = Found(best=kept, trials=(kept,), stopped="done", monotone=True)
    assert tuning.told(found, kept, estimate(0.031, 0.004), groups, allowed=LIMIT) == (
        "left 2 of 3 nodes in float32 (conv_1, conv_2): accuracy drop 0.0310 [0.0270, 0.0350] -> "
        "0.0060 [0.0040, 0.0080], 4 % of MACs in float32 (1 trial)"
    )


def test_records_of_a_search_come_back_from_json_as_they_were():
    groups, landscape = additive([0.05, 0.0, 0.0])
    found = search(groups, landscape)
    record = AccuracySearch(
        variant_id="v",
        variant_name="int8",
        before=estimate(0.05),
        groups=tuple(groups),
        trials=(*found.trials, trial(("x",), None)),
        best=found.best,
        stopped="done",
        monotone=True,
        sentence="so it is",
    )
    ranking = Sensitivity(variant_id="v", groups=tuple(groups), floor=estimate(0.0, 0.001), took_s=1.0)
    for one in (record, ranking):
        assert codec.loads(codec.dumps(one)) == one


# --- ranking ---------------------------------------------------------------------------------------------------


def rank(model: Path, call: StageCall, images: dict[str, np.ndarray], tmp_path: Path) -> list[NodeGroup]:
    """Ranks the nodes of a stage as a campaign does, in this process."""
    work = tmp_path / f"rank-{len(list(tmp_path.iterdir()))}"
    work.mkdir()
    given = read_input(model.parent, model.name)
    return tuning._rank(given, make_stage(call).call, images, work, seed=0, threads=1)


def test_the_nodes_at_a_bad_tensor_rank_first(tmp_path):
    model = conv_chain(tmp_path / "model", spiked=(1,))
    images = {"image": clear_samples(model, count=16)["image"]}
    for params in ({}, {"format": "qoperator"}, {"scheme": "s8s8", "per_channel": False}):
        first, second, third, *_ = ranked = rank(
            model, StageCall(name="quantize.static", params=params), images, tmp_path
        )
        assert {*first.nodes, *second.nodes} == {"conv_1", "conv_2"}
        assert second.noise > 100 * third.noise
        assert len(ranked) == 7
        assert math.isclose(sum(one.macs for one in ranked), 1.0)
        assert ranked == sorted(ranked, key=lambda one: -one.noise)


def test_pairs_for_tensorrt_are_ranked_by_what_they_round(tmp_path):
    """Its weights stand between pairs in float32, and its outputs are not rounded: the next layer's input is."""
    model = conv_chain(tmp_path / "model", spiked=(1,))
    images = {"image": clear_samples(model, count=16)["image"]}
    first, second, third, *_ = rank(model, StageCall(name="quantize.tensorrt"), images, tmp_path)
    assert {*first.nodes, *second.nodes} == {"conv_1", "conv_2"}
    assert second.noise > 100 * third.noise


def test_nodes_go_by_the_names_that_the_ir_has_for_them():
    known = {"conv/WithoutBiases", "conv", "a/MatMul", "c_0", "y"}
    both = NodeGroup(nodes=("conv", "gone"), noise=1.0, macs=0.1)
    groups = [both, group("a/MatMul/MatMulAddFusion"), group("Conv_c_0"), group("head"), group("nowhere")]
    named = named_in_ir(groups, known, {"Conv_c_0": "c_0", "head": "y", "gone": "z"})
    assert [one.nodes for one in named] == [("conv",), ("a/MatMul",), ("c_0",), ("y",)]


def test_nodes_that_are_left_out_already_are_not_ranked_again(tmp_path):
    model = conv_chain(tmp_path / "model", spiked=(1,))
    images = {"image": clear_samples(model, count=16)["image"]}
    params = {"float_nodes": ("conv_1", "conv_2")}
    ranked = rank(model, StageCall(name="quantize.static", params=params), images, tmp_path)
    assert {name for one in ranked for name in one.nodes} == {"conv_0", "conv_3", "conv_4", "conv_5", "head"}
    assert ranked[0].noise < 0.01


def test_neighbours_are_joined_where_there_are_many(tmp_path):
    layers = MOST_GROUPS + 5
    model = conv_chain(tmp_path / "model", layers=layers, spiked=(10,))
    images = {"image": clear_samples(model, count=8)["image"]}
    ranked = rank(model, StageCall(name="quantize.static"), images, tmp_path)
    assert len(ranked) == math.ceil((layers + 1) / 2)
    assert ranked[0].nodes == ("conv_10", "conv_11")


@pytest.mark.parametrize("transposed", [False, True])
def test_dynamic_quantization_is_ranked_by_what_it_would_round(tmp_path, transposed):
    """A weight of one scale a tensor, in which one value dwarfs all others, next to one that is even."""
    random = np.random.default_rng(0)
    weights = [random.standard_normal((8, 8)).astype(np.float32) for _ in range(3)]
    weights[1][0, 0] = 1e4
    weights[0][:, 0] = 0  # so that the large value takes no part in answers
    nodes, tensors, before = [], [], "x"
    for i, values in enumerate(weights):
        tensors.append(numpy_helper.from_array(np.ascontiguousarray(values.T if transposed else values), f"w{i}"))
        nodes.append(helper.make_node("Gemm", [before, f"w{i}"], [f"y{i}"], name=f"g{i}", transB=int(transposed)))
        before = f"y{i}"
    ends = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 8])] for name in ("x", before)]
    graph = helper.make_graph(nodes, "gemms", *ends, initializer=tensors)
    (tmp_path / "model").mkdir()
    path = tmp_path / "model" / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))
    images = {"x": np.eye(8, dtype=np.float32)[np.arange(16) % 8]}
    call = StageCall(name="quantize.dynamic", params={"per_channel": False})
    ranked = rank(path, call, images, tmp_path)
    assert ranked[0].nodes == ("g1",)
    assert ranked[0].noise > 20 * ranked[1].noise


def test_switches_off_give_the_float_model_and_all_on_the_quantized_one(tmp_path):
    """What is ranked is what is served: one group of all nodes differs from float32 as the variant itself does."""
    import onnxruntime

    model = conv_chain(tmp_path / "model", layers=3, spiked=(0,))
    images = {"image": clear_samples(model, count=8)["image"]}
    given = read_input(model.parent, model.name)
    for folder in ("out", "scratch"):
        (tmp_path / folder).mkdir()
    made = make_stage(StageCall(name="quantize.static"))(given, Context(out=tmp_path / "out", calibration=images))
    prepare(given, tmp_path / "scratch")
    prepared = load(tmp_path / "scratch" / PREPARED)
    quantized = onnx.load(str(made.folder / made.entry))
    everything = onnx.ModelProto()
    everything.CopyFrom(prepared)
    batches = list(whole_batches(images, given.inputs, wanted=8))
    import optimize.sensitivity as module

    switched, tensors = module._switched(prepared, quantized)
    noise = module._noises(switched, sorted(tensors), [[], sorted(tensors)], batches, scratch=tmp_path, threads=1)

    def answers(path: Path) -> np.ndarray:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        return onnxruntime.InferenceSession(str(path), options).run(None, images)[0]

    float32, int8 = answers(model), answers(made.folder / made.entry)
    wanted = float(np.square(float32 - int8).sum() / np.square(float32).sum())
    assert noise[0] == 0.0
    assert noise[1] == pytest.approx(wanted, rel=1e-3)
    assert prepared == everything, "the prepared graph was changed"
