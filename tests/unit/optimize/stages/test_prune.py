"""Weights that become zero: which ones, which stay, and what is said of it."""

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from optimize.making import code_versions, origin_of
from optimize.plan import plan
from optimize.recipes import functions_of, needs_module, recipe_from_mapping, tool_versions
from optimize.stages import make_stage, onnx_files
from optimize.stages.base import Context, TorchOrigin, input_of, read_input
from optimize.stages.prune import compressed_size, two_of_four
from optimize.testing import tiny_conv_net, tiny_transformer
from registry.errors import InputError, NotApplicableError
from registry.records import Artifact, Source, StageCall

ALL = {"keep_ends": False, "min_elements": 1}


def run(source, out, name="prune.magnitude", **params):
    out.mkdir()
    return make_stage(StageCall(name=name, params=params))(source, Context(out=out))


def weights(model):
    """Node name -> its weight, of nodes that multiply with one."""
    loaded = onnx_files.load(model)
    onnx_files.name_nodes(loaded)
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in loaded.graph.initializer}
    return {
        node.name: tensors[name]
        for node in loaded.graph.node
        if node.op_type in {"Conv", "ConvTranspose", "Gemm", "MatMul"}
        for name in node.input[:2]
        if name in tensors
    }


def opened(made):
    return weights(read_input(made.folder, made.entry))


def model_of(folder, nodes, tensors, shape):
    values = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in tensors.items()]
    graph = helper.make_graph(
        [helper.make_node(kind, inputs, [output], name=output, **more) for kind, inputs, output, more in nodes],
        "layers",
        [helper.make_tensor_value_info("x", 1, shape)],
        [helper.make_tensor_value_info("y", 1, [None] * len(shape))],
        values,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    folder.mkdir(parents=True)
    onnx.save(model, str(folder / "model.onnx"))
    return read_input(folder, "model.onnx")


@pytest.fixture
def conv(tmp_path):
    return tiny_conv_net(tmp_path / "conv")


def test_each_layer_loses_its_smallest_weights(conv, tmp_path):
    made = run(conv, tmp_path / "out", sparsity=0.25, **ALL)
    before, after = weights(conv), opened(made)
    assert list(before) == list(after)
    for name, weight in before.items():
        gone = after[name] == 0
        assert gone.sum() == weight.size / 4
        assert np.abs(weight[gone]).max() <= np.abs(weight[~gone]).min()
        assert np.array_equal(after[name][~gone], weight[~gone])
    assert "25.0% of the 1,432 weights of 3 layers are zero" in made.notes[0]


def test_the_smallest_of_all_layers_are_taken_together(conv, tmp_path):
    after = opened(run(conv, tmp_path / "out", scope="global", **ALL))
    gone = np.concatenate([(weight == 0).ravel() for weight in after.values()])
    magnitudes = np.abs(np.concatenate([weight.ravel() for weight in weights(conv).values()]))
    assert gone.sum() == gone.size / 2
    assert magnitudes[gone].max() <= magnitudes[~gone].min()
    assert len({(weight == 0).mean().round(2) for weight in after.values()}) > 1


def test_it_says_that_zeros_alone_gain_nothing(conv, tmp_path):
    made = run(conv, tmp_path / "out", **ALL)
    assert "run at the same speed and the file keeps its size" in made.notes[0]
    size, packed = compressed_size(made.folder)
    assert f"zlib packs it to {packed / size:.0%} of it" in made.notes[0]
    assert packed < compressed_size(conv.folder)[1]
    assert abs(size - conv.path.stat().st_size) < 100


def test_first_last_small_and_named_layers_stay(tmp_path):
    source = tiny_transformer(tmp_path / "transformer")
    changed = {}
    for number, params in enumerate(({}, {"min_elements": 2000}, {"keep": ("MatMul_1",)}, {"keep_ends": False})):
        after = opened(run(source, tmp_path / f"out{number}", **params))
        changed[number] = [name for name, weight in after.items() if (weight == 0).any()]
    every = list(weights(source))
    assert changed == {0: every[1:-1], 1: ["MatMul_10"], 2: ["MatMul_2", "MatMul_7", "MatMul_10"], 3: every}


def test_a_name_to_keep_that_is_not_there_is_the_users_error(conv, tmp_path):
    with pytest.raises(InputError, match="'Conv_9'") as caught:
        run(conv, tmp_path / "out", keep=("Conv_9",))
    assert "'Conv_" in caught.value.hint


def test_nothing_to_prune_is_a_verdict(conv, tmp_path):
    with pytest.raises(NotApplicableError, match="none of the 3 layers"):
        run(conv, tmp_path / "out", min_elements=10_000)


def test_weights_that_are_zero_already_are_no_change(conv, tmp_path):
    once = run(conv, tmp_path / "once", **ALL)
    twice = run(read_input(once.folder, once.entry), tmp_path / "twice", sparsity=0.4, **ALL)
    assert not twice.changed


def test_weights_that_others_use_stay_and_constants_count(tmp_path):
    random = np.random.default_rng(0)
    tensors = {"table": random.normal(size=(8, 8)), "own": random.normal(size=(8, 8))}
    nodes = [
        ("Constant", [], "held", {"value": numpy_helper.from_array(random.normal(size=(8, 8)).astype(np.float32))}),
        ("MatMul", ["x", "table"], "a", {}),
        ("Add", ["a", "table"], "b", {}),
        ("MatMul", ["b", "held"], "c", {}),
        ("MatMul", ["own", "c"], "y", {}),
    ]
    source = model_of(tmp_path / "in", nodes, tensors, [8, 8])
    made = run(source, tmp_path / "out", **ALL)
    assert {name: (weight == 0).mean() for name, weight in opened(made).items()} == {"a": 0, "c": 0.5, "y": 0.5}


@pytest.mark.parametrize(
    ("kind", "shape", "x", "more", "axis"),
    [
        ("Conv", (5, 8, 3, 3), ["batch", 8, 5, 5], {}, 1),
        ("MatMul", (8, 5), ["batch", 8], {}, 0),
        ("Gemm", (8, 5), ["batch", 8], {}, 0),
        ("Gemm", (5, 8), ["batch", 8], {"transB": 1}, 1),
    ],
)
def test_two_of_four_go_along_the_axis_that_is_summed_over(tmp_path, kind, shape, x, more, axis):
    tensors = {"w": np.random.default_rng(0).normal(size=shape)}
    source = model_of(tmp_path / "in", [(kind, ["x", "w"], "y", more)], tensors, x)
    made = run(source, tmp_path / "out", "prune.two_four", **ALL)
    after = np.moveaxis(opened(made)["y"], axis, -1).reshape(-1, 4)
    assert ((after == 0).sum(axis=1) == 2).all()
    before = np.abs(np.moveaxis(tensors["w"], axis, -1).reshape(-1, 4))
    assert (before[after == 0].reshape(-1, 2).max(axis=1) <= before[after != 0].reshape(-1, 2).min(axis=1)).all()
    assert "Ampere" in made.notes[0]
    assert "on a CPU nothing is gained" in made.notes[0]


def test_a_matrix_on_the_left_is_summed_over_its_columns(tmp_path):
    tensors = {"w": np.random.default_rng(0).normal(size=(5, 8))}
    source = model_of(tmp_path / "in", [("MatMul", ["w", "x"], "y", {})], tensors, [8, 3])
    after = opened(run(source, tmp_path / "out", "prune.two_four", **ALL))["y"]
    assert ((after.reshape(-1, 4) == 0).sum(axis=1) == 2).all()


def test_fours_that_do_not_fit_and_transposed_convolutions_stay(tmp_path):
    random = np.random.default_rng(0)
    tensors = {"odd": random.normal(size=(8, 6, 1, 1)), "even": random.normal(size=(8, 8, 1, 1))}
    tensors["up"] = random.normal(size=(8, 8, 1, 1))
    nodes = [
        ("Conv", ["x", "odd"], "a", {}),
        ("Conv", ["a", "even"], "b", {}),
        ("ConvTranspose", ["b", "up"], "y", {}),
    ]
    source = model_of(tmp_path / "in", nodes, tensors, ["batch", 6, 2, 2])
    after = opened(run(source, tmp_path / "out", "prune.two_four", **ALL))
    assert [name for name, weight in after.items() if (weight == 0).any()] == ["b"]


def test_equal_weights_leave_two_of_four():
    assert two_of_four(np.ones((2, 8)), 1).sum() == 8
    assert two_of_four(np.ones((4, 3)), 0).sum(axis=0).tolist() == [2, 2, 2]


@pytest.mark.parametrize("name", ["prune.magnitude", "prune.structured"])
@pytest.mark.parametrize("sparsity", [0, 1, 1.5, -0.1])
def test_a_share_is_between_none_and_all(name, sparsity):
    with pytest.raises(InputError, match="sparsity"):
        make_stage(StageCall(name=name, params={"sparsity": sparsity}))


@pytest.mark.parametrize("name", ["prune.magnitude", "prune.two_four", "prune.structured"])
def test_training_needs_the_torch_module(name, conv, tmp_path):
    with pytest.raises(NotApplicableError, match="needs the torch module") as caught:
        run(conv, tmp_path / "out", name, fine_tune="mine:train")
    assert "torch source" in caught.value.hint


def test_a_function_is_named_with_its_module():
    with pytest.raises(InputError, match="fine_tune"):
        make_stage(StageCall(name="prune.structured", params={"fine_tune": "train"}))


# --- what a variant's id is made of ----------------------------------------------------------------------------


CAMPAIGN = {"name": "tiny", "policy": {"constraints": []}}
STRUCTURED = {"name": "small", "stages": [{"name": "prune.structured", "fine_tune": "training_of_a_test:train"}]}


@pytest.fixture
def planned(tmp_path):
    from optimize.config import CampaignConfig

    (tmp_path / "net_of_a_test.py").write_text("def make(): ...\n")
    (tmp_path / "training_of_a_test.py").write_text("def train(module): ...\n")
    (tmp_path / "weights.pt").write_bytes(b"1")
    np.savez(tmp_path / "samples.npz", x=np.zeros((2, 3), np.float32), labels=np.zeros(2, np.int64))
    source = {"torch": "net_of_a_test:make", "depends_on": ["weights.pt"], "opset": 18}
    samples = {"evaluation": "samples.npz"}
    config = CampaignConfig.model_validate(
        {**CAMPAIGN, "sources": [source], "samples": samples, "variants": [STRUCTURED], "seed": 5}
    )
    return plan(config, base=tmp_path, work=tmp_path / "work")


def source_record(kind="torch"):
    artifact = Artifact(digest="d", format="onnx", entry="model.onnx", files=(), inputs=(), outputs=())
    return Source(name="model", kind=kind, location="net_of_a_test:make", digest="d", artifact=artifact)


def test_the_users_code_is_part_of_a_pruned_variants_id(planned, tmp_path):
    baseline, structured = planned.recipes
    assert code_versions(planned, source_record(), baseline) == {}
    before = code_versions(planned, source_record(), structured)
    assert list(before) == ["training_of_a_test:train", "net_of_a_test:make", "weights.pt"]
    for name, file in zip(before, ("training_of_a_test.py", "net_of_a_test.py", "weights.pt"), strict=True):
        (tmp_path / file).write_text("changed = 1\n")
        after = code_versions(planned, source_record(), structured)
        assert [key for key in after if after[key] != before[key]] == [name]
        before = after


def test_the_tools_of_the_export_are_part_of_it(planned):
    baseline, structured = planned.recipes
    assert {"torch", "torch-pruning", "onnxscript"} <= set(tool_versions(structured))
    assert tool_versions(baseline) == {}
    zeroed = recipe_from_mapping({"name": "zeroed", "stages": ["prune.magnitude"]})
    assert (needs_module(zeroed), functions_of(zeroed)) == (False, ())
    assert "torch" not in tool_versions(zeroed)


def test_only_recipes_for_the_module_of_a_torch_source_are_given_it(planned, tmp_path):
    baseline, structured = planned.recipes
    samples = str((tmp_path / "samples.npz").resolve())
    given = {"factory": "net_of_a_test:make", "samples": samples, "opset": 18, "seed": 5}
    assert origin_of(planned, source_record(), structured) == given
    assert input_of(source_record().artifact, tmp_path, TorchOrigin(**given)).origin == TorchOrigin(**given)
    assert origin_of(planned, source_record(), baseline) is None
    assert origin_of(planned, source_record("onnx"), structured) is None


def test_a_function_that_is_not_there_is_said_before_any_work(planned, tmp_path):
    (tmp_path / "training_of_a_test.py").unlink()
    with pytest.raises(InputError, match="no module named 'training_of_a_test'"):
        plan(planned.config, base=tmp_path, work=tmp_path / "work")
