"""Torch modules pruned, trained on and exported again, in this process and through a campaign."""

import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

torch = pytest.importorskip("torch")
pytest.importorskip("torch_pruning")
pytest.importorskip("onnxscript")

from optimize.export import make_module  # noqa: E402
from optimize.stages import make_stage  # noqa: E402
from optimize.stages.base import Context, read_input  # noqa: E402
from optimize.testing import run_model, samples_for  # noqa: E402
from optimize.torch_modules import prunable_weights, prune_channels, size_of, train_masked  # noqa: E402
from registry.errors import InputError, NotApplicableError, StageError  # noqa: E402
from registry.records import StageCall  # noqa: E402
from tests.doubles import torch_nets  # noqa: E402
from tests.doubles.torch_nets import exported, write_samples  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # campaigns wait for each other's cores

TRAINING = f"{__name__}:"


def made(factory, tmp_path):
    write_samples(tmp_path / "samples.npz")
    return make_module(f"{torch_nets.__name__}:{factory}", samples=tmp_path / "samples.npz", seed=0)


def prune(module, examples, *, tune=lambda module: module, **given):
    settings = {"sparsity": 0.5, "global_ranking": False, "round_to": 1, "ignore": (), "steps": 1, **given}
    return prune_channels(module, examples, tune=tune, **settings)


def answer_shapes(module, examples):
    with torch.no_grad():
        return [tuple(tensor.shape) for tensor in torch_nets.tensors(module(**examples))]


def channels(module):
    return {name: layer.out_channels for name, layer in module.named_modules() if isinstance(layer, torch.nn.Conv2d)}


# --- channels --------------------------------------------------------------------------------------------------


def test_half_of_the_channels_are_a_quarter_of_the_weights(tmp_path):
    module, examples = made("residual", tmp_path)
    before, shapes = size_of(module, examples), answer_shapes(module, examples)
    assert before.parameters == sum(parameter.numel() for parameter in module.parameters())
    pruned = prune(module, examples)
    after = size_of(pruned, examples)
    assert 0.2 < after.parameters / before.parameters < 0.3
    assert 0.2 < after.macs / before.macs < 0.35
    assert answer_shapes(pruned, examples) == shapes
    assert set(channels(pruned).values()) == {8, 16}


def test_channels_left_are_a_multiple(tmp_path):
    module, examples = made("residual", tmp_path)
    assert set(channels(prune(module, examples, sparsity=0.3, round_to=4)).values()) == {8, 20}


def test_layers_that_would_be_left_with_nothing_stay(tmp_path):
    module, examples = made("residual", tmp_path)
    assert set(channels(prune(module, examples, round_to=16)).values()) == {16}


def test_ranked_among_all_layers_they_lose_different_shares(tmp_path):
    module, examples = made("residual", tmp_path)
    with torch.no_grad():
        for of_a_channel in (module.one.first.weight, module.one.norm.weight, module.one.second.weight.transpose(0, 1)):
            of_a_channel[:9] *= 1e-3
    after = channels(prune(module, examples, sparsity=0.1, global_ranking=True))
    assert (after["one.first"], after["two.first"]) == (7, 32)


def test_ignored_modules_keep_their_channels(tmp_path):
    module, examples = made("residual", tmp_path)
    after = channels(prune(module, examples, ignore=("two",)))
    assert (after["one.first"], after["two.first"], after["down"]) == (8, 32, 32)


def test_an_ignored_name_that_is_not_there_is_the_users_error(tmp_path):
    module, examples = made("residual", tmp_path)
    with pytest.raises(InputError, match=r"'one\.fist'") as caught:
        prune(module, examples, ignore=("one.fist",))
    assert "'one.first'" in caught.value.hint


def test_nothing_to_remove_is_a_verdict(tmp_path):
    module, examples = made("residual", tmp_path)
    with pytest.raises(NotApplicableError, match="multiple of 64"):
        prune(module, examples, round_to=64)


def test_training_follows_each_step(tmp_path):
    module, examples = made("residual", tmp_path)
    seen = []

    def tune(pruned):
        seen.append(channels(pruned)["two.first"])
        return pruned

    prune(module, examples, steps=2, tune=tune)
    assert seen == [24, 16]


def test_another_module_cannot_be_pruned_further(tmp_path):
    module, examples = made("residual", tmp_path)
    with pytest.raises(InputError, match="after step 1 of 2"):
        prune(module, examples, steps=2, tune=torch.nn.Sequential)


def test_what_was_frozen_stays_frozen(tmp_path):
    module, examples = made("frozen", tmp_path)
    pruned = prune(module, examples)
    assert {name for name, one in pruned.named_parameters() if not one.requires_grad} == {"stem.weight", "stem.bias"}


def test_attention_by_reshape_is_refused_until_it_is_ignored(tmp_path):
    module, examples = made("attending", tmp_path)
    with pytest.raises(NotApplicableError, match="cannot remove channels") as caught:
        prune(module, examples)
    assert "ignore" in caught.value.hint
    module, examples = made("attending", tmp_path)
    shapes = answer_shapes(module, examples)
    pruned = prune(module, examples, ignore=("qkv", "out"))
    assert answer_shapes(pruned, examples) == shapes
    assert pruned.up.out_features == 32


# --- single weights --------------------------------------------------------------------------------------------


def half(module):
    random = np.random.default_rng(0)
    return {name: random.random(weight.shape) < 0.5 for name, (weight, _) in prunable_weights(module).items()}


def train(module):
    """Three steps with momentum and weight decay, which move weights whose gradient is zero, too."""
    module.train()
    images = torch.from_numpy(np.random.default_rng(1).normal(size=(8, 1, 8, 8)).astype(np.float32))
    steps = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        steps.zero_grad()
        module(images)["logits"].square().mean().backward()
        steps.step()


def replaced(module):
    return torch_nets.residual()


def raising(module):
    raise ValueError("no data here")


def number(module):
    return 3


def untrained(module):
    with torch.no_grad():
        module.head.weight.zero_()
        module.head.bias.copy_(torch.arange(10))


def test_zeros_stay_zero_while_the_others_are_trained(tmp_path):
    module, _ = made("residual", tmp_path)
    before = {name: layer.weight.detach().clone() for name, layer in module.named_modules() if hasattr(layer, "weight")}
    masks = half(module)
    assert list(masks) == ["stem", "one.first", "one.second", "down", "two.first", "two.second", "head"]
    tuned = train_masked(module, masks, TRAINING + "train")
    assert not tuned.training
    assert tuned.state_dict().keys() == torch_nets.residual().state_dict().keys()
    for name, mask in masks.items():
        weight = tuned.get_submodule(name).weight.detach()
        assert not weight[~torch.from_numpy(mask)].any()
        assert (weight[torch.from_numpy(mask)] != before[name][torch.from_numpy(mask)]).any()


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        ("replaced", StageError, "'stem' has not kept the zeros"),
        ("raising", StageError, "ValueError: no data here"),
        ("number", InputError, "returned int, not a torch.nn.Module"),
        ("nowhere", InputError, "has no 'nowhere'"),
    ],
)
def test_a_function_that_does_not_do_its_part_is_named(function, error, message, tmp_path):
    module, _ = made("residual", tmp_path)
    with pytest.raises(error, match=message):
        train_masked(module, half(module), TRAINING + function)


# --- stages ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def residual(tmp_path_factory):
    return exported("residual", tmp_path_factory.mktemp("residual"))


def run(name, source, out, **params):
    out.mkdir()
    return make_stage(StageCall(name=name, params=params))(source, Context(out=out))


def test_what_the_function_trained_is_exported(residual, tmp_path):
    result = run("prune.structured", residual, tmp_path / "out", fine_tune=TRAINING + "untrained", round_to=4)
    for count in (1, 3):
        (logits,) = run_model(result, samples_for(result.inputs, count=count))
        assert np.allclose(logits, np.arange(10)[None].repeat(count, axis=0))
    assert (result.folder / result.entry).stat().st_size < 0.5 * residual.path.stat().st_size
    assert "parameters 28,314 -> 7,250, multiply-adds for a sample 679,242 -> " in result.notes[0]
    assert f"trained on by {TRAINING}untrained" in result.notes[0]


def test_zeros_reach_the_file(residual, tmp_path):
    result = run("prune.two_four", residual, tmp_path / "out", fine_tune=TRAINING + "train")
    tensors = [numpy_helper.to_array(one) for one in onnx.load(str(result.folder / result.entry)).graph.initializer]
    inner = [one for one in tensors if one.ndim == 4 and one.shape[1] > 1]
    assert len(inner) == 5
    for weight in inner:
        fours = np.moveaxis(weight, 1, -1).reshape(-1, 4)
        assert ((fours == 0).sum(axis=1) == 2).all()


# --- a campaign ------------------------------------------------------------------------------------------------


CAMPAIGN = """
name: pruned
sources: [{torch: nets_of_a_campaign:net}]
samples: {evaluation: samples.npz, calibration: samples.npz}
variants:
  - name: small-int8
    stages: [{name: prune.structured, round_to: 4, fine_tune: training_of_a_campaign:train}, quantize.static]
policy: {constraints: []}
"""
NETS = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(1, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16, 10)

    def forward(self, image):
        return self.head(self.second(self.first(image).relu()).relu().mean((2, 3)))

def net():
    return Net()
"""
TRAIN = """
def train(module):
    module.head.weight.data.zero_()
    module.head.bias.data.fill_(5)
"""


def test_a_campaign_prunes_trains_and_quantizes(tmp_path):
    (tmp_path / "nets_of_a_campaign.py").write_text(NETS)
    (tmp_path / "training_of_a_campaign.py").write_text(TRAIN)
    (tmp_path / "campaign.yaml").write_text(CAMPAIGN)
    write_samples(tmp_path / "samples.npz")
    command = [sys.executable, "-P", "-m", "optimize", "make", str(tmp_path / "campaign.yaml"), "--json"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "variants")], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["failures"] == []
    variant = next(one for one in document["variants"] if one["name"] == "small-int8")
    assert any("prune.structured: parameters 2,650 -> 754" in note for note in variant["notes"])
    assert any(note.startswith("quantize.static:") for note in variant["notes"])
    made = read_input(tmp_path / "variants" / "small-int8", "model.onnx")
    (logits,) = run_model(made, samples_for(made.inputs, count=3))
    assert np.abs(logits - 5).max() < 0.5
    # What the id was made of.
    assert '"training_of_a_campaign:train":' in (tmp_path / "burnish-work" / "ledger.jsonl").read_text()
