"""Torch modules that a stage changes before they are exported again: pruned, and trained on by the user's function."""

import contextlib
import random
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from optimize.engines.child import resolve
from optimize.export import export_module, flat_answer, make_module
from optimize.stages.base import Context, StageInput
from optimize.stages.prune import check_names
from registry.errors import BurnishError, InputError, MissingExtraError, NotApplicableError, StageError

if TYPE_CHECKING:
    import torch

Examples = Mapping[str, "torch.Tensor"]
Shapes = list[tuple[int, ...]]


def export_changed(
    source: StageInput, context: Context, change: Callable[["torch.nn.Module", Examples], "torch.nn.Module"]
) -> None:
    """Makes the source's module again, changes it, and exports it into ``context.out`` as the source was.

    Args:
        source: a model with an origin.
        context: of the stage; its seed goes to Python's, numpy's and torch's random numbers.
        change: given the module in evaluation mode and input name -> example of four rows, returns the module that is
            exported, which may be the same one.

    Raises:
        InputError: the factory cannot be found or called.
        StageError: the changed module fails, has answers of another shape, or cannot be exported.
        MissingExtraError: torch is not installed.
    """
    origin = source.origin
    if origin is None:
        raise NotApplicableError(f"{source.path} does not come from a torch module")
    module, examples = make_module(origin.factory, samples=Path(origin.samples), seed=origin.seed)
    shapes = _answer_shapes(module, examples)
    with _seeded(context):
        changed = change(module, examples).eval().cpu()
    try:
        now = _answer_shapes(changed, examples)
    except Exception as error:  # what a module raises whose layers no longer fit each other
        raise StageError(f"the changed module fails: {type(error).__name__}: {error}") from error
    if now != shapes:
        raise StageError(f"the changed module answers in the shapes {now}, where it was {shapes}")
    export_module(changed, examples, context.out, factory=origin.factory, opset=origin.opset)


def fine_tuned(module: "torch.nn.Module", function: str | None) -> "torch.nn.Module":
    """The module after the user's function has trained it on: what it returns, or the module itself where that is None.

    Args:
        module: in evaluation mode, which the function changes as it needs.
        function: ``package.module:function``, called with the module; None leaves the module as it is.

    Raises:
        InputError: there is no such function, or it returns something else.
        StageError: it raised.
    """
    import torch

    if function is None:
        return module
    called = resolve(function)
    try:
        answer = called(module)
    except (BurnishError, MemoryError):
        raise
    except Exception as error:  # whatever a user's function raises
        traceback.print_exc()
        raise StageError(f"{function} raised {type(error).__name__}: {error}") from error
    tuned = module if answer is None else answer
    if not isinstance(tuned, torch.nn.Module):
        raise InputError(
            f"{function} returned {type(answer).__name__}, not a torch.nn.Module",
            hint="It returns the module that it has trained, or nothing where it trains the one that it is given.",
        )
    return tuned.eval().cpu()


def _answer_shapes(module: "torch.nn.Module", examples: Examples) -> Shapes:
    import torch

    with torch.no_grad():
        return [tuple(tensor.shape) for tensor in flat_answer(module, examples)]


@contextlib.contextmanager
def _seeded(context: Context) -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    random.seed(context.seed)
    np.random.seed(context.seed % 2**32)  # the user's function may draw from it
    torch.manual_seed(context.seed)
    torch.set_num_threads(context.threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# --- channels --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What a module holds and does.

    Attributes:
        parameters: how many numbers.
        macs: multiply-adds for one sample.
    """

    parameters: int
    macs: int


def size_of(module: "torch.nn.Module", examples: Examples) -> Size:
    """Parameters and multiply-adds for one sample; source: torch_pruning.utils.count_ops_and_params."""
    import torch_pruning

    one = {name: tensor[:1] for name, tensor in examples.items()}
    macs, parameters = torch_pruning.utils.count_ops_and_params(module, _as_given(module, one))
    return Size(parameters=int(parameters), macs=int(macs))


def prune_channels(
    module: "torch.nn.Module",
    examples: Examples,
    *,
    sparsity: float,
    global_ranking: bool,
    round_to: int,
    ignore: Sequence[str],
    steps: int,
    tune: Callable[["torch.nn.Module"], "torch.nn.Module"],
) -> "torch.nn.Module":
    """Removes the channels whose weights are smallest, with all that depends on them, and tunes what is left.

    Channels that belong together (those that a residual sum adds, say) go together. Layers whose channels are an
    output's stay whole. Source: Fang et al., "DepGraph: Towards Any Structural Pruning", 2023, as torch_pruning's
    ``BasePruner`` with ``GroupMagnitudeImportance``.

    Args:
        module: in evaluation mode; it is changed.
        examples: input name -> example.
        sparsity: share of the channels to remove, of each layer or (``global_ranking``) of all.
        global_ranking: whether channels are ranked among all layers, else within each.
        round_to: what is left of a layer is rounded down to a multiple of this; a layer with nothing left stays.
        ignore: names of modules that keep their channels.
        steps: how many, with ``tune`` after each.
        tune: trains the module on.

    Raises:
        InputError: ``ignore`` names a module that is not there, or ``tune`` gives another module with steps to come.
        NotApplicableError: the module cannot be traced, or nothing could be removed.
        MissingExtraError: torch_pruning is not installed.
    """
    try:
        import torch_pruning
    except ImportError as error:
        raise MissingExtraError("pruning a torch module", extra="torch") from error

    ignored = _named(module, ignore)
    before = sum(parameter.numel() for parameter in module.parameters())
    given = _as_given(module, examples)
    # The tracer follows gradients, so that every parameter must have one, and pruned parameters are new ones.
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    module.requires_grad_(True)
    try:
        pruner = torch_pruning.pruner.BasePruner(
            module,
            given,
            importance=torch_pruning.importance.GroupMagnitudeImportance(),
            global_pruning=global_ranking,
            pruning_ratio=sparsity,
            iterative_steps=steps,
            ignored_layers=[*ignored, *_output_layers(module, given)],
            round_to=round_to,
        )
    except Exception as error:  # the tracer's errors have many classes
        traceback.print_exc()
        raise NotApplicableError(
            f"torch_pruning cannot follow the channels of this module: {type(error).__name__}: {error}"
        ) from error
    tuned = module
    for step in range(1, steps + 1):
        try:
            pruner.step()
        except Exception as error:  # a layout that it has misunderstood shows as an index out of range, and the like
            traceback.print_exc()
            raise NotApplicableError(
                f"torch_pruning cannot remove channels of this module: {type(error).__name__}: {error}",
                hint="Name in `ignore` the layers whose outputs are reshaped, those of an attention for example.",
            ) from error
        if sum(parameter.numel() for parameter in module.parameters()) == before:
            continue  # there is nothing to make up for yet
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name not in frozen)
        tuned = tune(module)
        if tuned is not module and step < steps:
            raise InputError(
                f"fine_tune returned another module after step {step} of {steps}",
                hint="Have it train the module that it is given, or prune in one step.",
            )
    if sum(parameter.numel() for parameter in module.parameters()) == before:
        raise NotApplicableError(
            f"no layer can lose {sparsity:.0%} of its channels and keep a multiple of {round_to}",
            hint="Take a smaller round_to or a larger sparsity, or ignore fewer modules.",
        )
    return tuned


def _output_layers(module: "torch.nn.Module", given: Any) -> list["torch.nn.Module"]:
    """The layers whose channels are those of an output: without one of them, an answer would have another shape."""
    import torch_pruning

    operators = torch_pruning.ops
    roots = (operators.TORCH_CONV, operators.TORCH_LINEAR, operators.TORCH_LSTM)
    traced = torch_pruning.DependencyGraph().build_dependency(module, example_inputs=given)

    def gives_output(dependency: Any) -> bool:
        handler, node = dependency.handler, dependency.target
        takes_only = traced.is_in_channel_pruning_fn(handler) and not traced.is_out_channel_pruning_fn(handler)
        return not takes_only and (not node.outputs or node.type == operators.OPTYPE.OUTPUT)

    return [
        group[0].dep.target.module
        for group in traced.get_all_groups(root_module_types=roots)
        if any(gives_output(dependency) for dependency, _ in group)
    ]


def _named(module: "torch.nn.Module", names: Sequence[str]) -> list["torch.nn.Module"]:
    known = {name: part for name, part in module.named_modules() if name}
    check_names("prune.structured", "ignore", names, list(known))
    return [known[name] for name in names]


def _as_given(module: "torch.nn.Module", examples: Examples) -> Any:
    """The examples as torch_pruning calls the module with them: by name where ``forward`` has these names."""
    from optimize.export import takes_by_name

    return dict(examples) if takes_by_name(module, examples) else tuple(examples.values())


# --- single weights --------------------------------------------------------------------------------------------


def prunable_weights(module: "torch.nn.Module") -> dict[str, tuple[NDArray[Any], int]]:
    """Name of each convolution and linear layer -> its weight, and the axis that is summed over; shared ones left out.

    The order is the one in which the module holds its layers.
    """
    from torch import nn
    from torch.nn.utils import parametrize

    uses: dict[int, int] = {}
    for _, parameter in module.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    found = {}
    for name, layer in module.named_modules():
        ours = isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *transposed))
        if not ours or parametrize.is_parametrized(layer) or uses.get(id(layer.weight)) != 1:
            continue
        found[name] = (layer.weight.detach().cpu().numpy(), 0 if isinstance(layer, transposed) else 1)
    return found


def train_masked(
    module: "torch.nn.Module", masks: Mapping[str, NDArray[np.bool_]], function: str | None
) -> "torch.nn.Module":
    """Zeroes weights and has the user's function train the others: the zeros stay zero however it trains.

    Each masked weight is a parametrization while the function runs, with zeros where the mask is False, and a plain
    weight after it.

    Args:
        module: in evaluation mode; it is changed.
        masks: name of a layer -> False where its weight becomes zero, in the weight's shape.
        function: as `fine_tuned` takes it.

    Raises:
        InputError: the function cannot be had, or returns something else than a module.
        StageError: it raised, or what it returned has lost the zeros.
    """
    import torch
    from torch.nn.utils import parametrize

    class Masked(torch.nn.Module):  # type: ignore[misc]  # torch is not followed
        def __init__(self, kept: torch.Tensor) -> None:
            super().__init__()
            self.register_buffer("kept", kept)

        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return torch.where(self.kept, weight, 0.0)

    for name, mask in masks.items():
        parametrize.register_parametrization(module.get_submodule(name), "weight", Masked(torch.from_numpy(mask)))
    tuned = fine_tuned(module, function)
    layers = dict(tuned.named_modules())
    for name, mask in masks.items():
        layer = layers.get(name)
        if layer is not None and parametrize.is_parametrized(layer, "weight"):
            parametrize.remove_parametrizations(layer, "weight")
        weight = getattr(layer, "weight", None)
        if (
            weight is None
            or tuple(weight.shape) != mask.shape
            or bool((weight.detach()[~torch.from_numpy(mask)]).any())
        ):
            raise StageError(
                f"{function} returned a module whose layer {name!r} has not kept the zeros",
                hint="Have it train the module that it is given, without replacing its layers.",
            )
    return tuned
