"""Stages that take weights away: single ones become zero, and whole channels are gone."""

import difflib
import zlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from optimize.stages import onnx_files
from optimize.stages.base import Context, Stage, StageInput, StageParams, StageResult
from registry.errors import InputError, NotApplicableError

if TYPE_CHECKING:
    import torch

Mask = NDArray[np.bool_]

_FUNCTION = r"^[\w.]+:\w+$"
_TRANSPOSED = "ConvTranspose"
_WEIGHTED = ("Conv", _TRANSPOSED, "Gemm", "MatMul")
_CHUNK_BYTES = 1 << 20


class ZeroingParams(StageParams):
    """Parameters of the stages that zero single weights.

    Attributes:
        keep: names of nodes (with ``fine_tune``, of layers of the torch module) whose weights stay.
        keep_ends: whether the first and the last of the layers stay, which suffer most and hold least.
        min_elements: layers with fewer weights stay.
        fine_tune: ``package.module:function`` that trains the torch module while the zeros stay zero; torch sources
            only. None trains nothing, and takes any source.
    """

    keep: tuple[str, ...] = ()
    keep_ends: bool = True
    min_elements: int = Field(default=1024, ge=1)
    fine_tune: str | None = Field(default=None, pattern=_FUNCTION)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One layer's weight.

    Attributes:
        name: the node's, or the torch layer's.
        weight: its values.
        axis: the one that is summed over: input channels of a convolution, rows of a matrix that is multiplied from
            the right.
        transposed: whether it is that of a transposed convolution.
    """

    name: str
    weight: NDArray[Any]
    axis: int
    transposed: bool = False


class _Zeroing(Stage):
    """Zeroes weights of Conv, ConvTranspose, Gemm and MatMul, in the file or in the torch module; biases stay."""

    Params = ZeroingParams
    tools = ("onnx", "numpy")
    params: ZeroingParams

    @property
    def needs_module(self) -> bool:
        """Only where the user's function is to train what is left."""
        return self.params.fine_tune is not None

    @property
    def functions(self) -> tuple[str, ...]:
        """The one that trains."""
        return () if self.params.fine_tune is None else (self.params.fine_tune,)

    @abstractmethod
    def masks(self, layers: Sequence[Layer]) -> list[Mask]:
        """For each layer, False where its weight becomes zero, in the weight's shape."""

    @abstractmethod
    def told(self, layers: Sequence[Layer], masks: Sequence[Mask], folder: Path) -> str:
        """What was gained, and what was not, of the model in a folder."""

    def fits(self, layer: Layer) -> bool:
        """Whether the stage's pattern fits the weight."""
        return True

    def apply(self, source: StageInput, context: Context) -> StageResult:
        """Zeroes weights in the file or, to train the others, in the module."""
        if self.needs_module:
            return self._trained(source, context)
        model = onnx_files.load(source)
        onnx_files.refuse_quantized(self.name, model)
        onnx_files.lift_constants(model)
        onnx_files.name_nodes(model)
        tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        found = _layers_of(model, tensors)
        layers = self._chosen([layer for layer, _ in found])
        masks = self.masks(layers)
        if not any((layer.weight[~mask] != 0).any() for layer, mask in zip(layers, masks, strict=True)):
            return self.unchanged(source, "the weights that it would make zero are zero already")
        names = {layer.name: tensor for layer, tensor in found}
        for layer, mask in zip(layers, masks, strict=True):
            _overwrite(tensors[names[layer.name]], np.where(mask, layer.weight, layer.weight.dtype.type(0)))
        entry = onnx_files.save(model, context.out)
        return self.written(context, entry, self.told(layers, masks, context.out))

    def _trained(self, source: StageInput, context: Context) -> StageResult:
        from optimize.torch_modules import export_changed, prunable_weights, train_masked

        done: list[tuple[list[Layer], list[Mask]]] = []

        def change(module: "torch.nn.Module", examples: Mapping[str, "torch.Tensor"]) -> "torch.nn.Module":
            layers = self._chosen(
                [
                    Layer(name=name, weight=weight.copy(), axis=axis, transposed=axis == 0)
                    for name, (weight, axis) in prunable_weights(module).items()
                ]
            )
            masks = self.masks(layers)
            done.append((layers, masks))
            by_name = {layer.name: mask for layer, mask in zip(layers, masks, strict=True)}
            return train_masked(module, by_name, self.params.fine_tune)

        export_changed(source, context, change)
        note = self.told(*done[0], context.out)
        return self.written(context, onnx_files.ENTRY, note, f"the others were trained by {self.params.fine_tune}")

    def _chosen(self, found: Sequence[Layer]) -> list[Layer]:
        """The layers whose weights are to be zeroed.

        Raises:
            InputError: ``keep`` names one that is not there.
            NotApplicableError: there is none.
        """
        check_names(self.name, "keep", self.params.keep, [layer.name for layer in found])
        inner = found[1:-1] if self.params.keep_ends else found
        chosen = [
            layer
            for layer in inner
            if layer.name not in self.params.keep and layer.weight.size >= self.params.min_elements and self.fits(layer)
        ]
        if not chosen:
            raise NotApplicableError(
                f"{self.name}: none of the {len(found)} layers with weights of their own may be pruned",
                hint="Set keep_ends to false, or min_elements lower, where they are to be pruned nevertheless.",
            )
        return chosen


class MagnitudeParams(ZeroingParams):
    """Parameters of ``prune.magnitude``.

    Attributes:
        sparsity: the share of weights that are zero afterwards.
        scope: ``layer`` takes this share of each layer; ``global`` of all their weights together, so that layers with
            small weights lose more.
    """

    sparsity: float = Field(default=0.5, gt=0, lt=1)
    scope: Literal["layer", "global"] = "layer"


class Magnitude(_Zeroing):
    """Zeroes the weights that are smallest in magnitude; names, types and shapes stay.

    It saves no time in ONNX Runtime, whose kernels multiply with zeros as with all else, and no byte in the file; what
    is stored or sent compressed gets smaller. Source: Han et al., "Learning both Weights and Connections for Efficient
    Neural Networks", 2015.
    """

    name = "prune.magnitude"
    Params = MagnitudeParams
    params: MagnitudeParams

    def masks(self, layers: Sequence[Layer]) -> list[Mask]:
        """False for the smallest of each layer, or of all."""
        if self.params.scope == "layer":
            return [_smallest_out([layer.weight], self.params.sparsity)[0] for layer in layers]
        return _smallest_out([layer.weight for layer in layers], self.params.sparsity)

    def told(self, layers: Sequence[Layer], masks: Sequence[Mask], folder: Path) -> str:
        """How many are zero, what that is worth, and to what the file can be compressed."""
        shares = [1 - mask.mean() for mask in masks]
        total = sum(mask.size for mask in masks)
        zeros = total - sum(int(mask.sum()) for mask in masks)
        spread = f", {min(shares):.0%} to {max(shares):.0%} of a layer" if self.params.scope == "global" else ""
        size, packed = compressed_size(folder)
        return (
            f"{zeros / total:.1%} of the {total:,} weights of {_layers(len(layers))} are zero{spread}; dense kernels "
            f"run at the same speed and the file keeps its size, but zlib packs it to {packed / size:.0%} of it"
        )


class TwoFour(_Zeroing):
    """Zeroes the two smallest of each four neighbours along the axis that is summed over; shapes and types stay.

    That axis is the input channels of a convolution (C of [M, C, kH, kW]) and the rows of the matrix of a MatMul or
    Gemm (K of [K, N]). The sparse tensor cores of NVIDIA GPUs from Ampere on skip such zeros where TensorRT is told to
    (``trtexec --sparsity=enable``) and finds its sparse kernel faster; on a CPU nothing is gained. Layers whose axis is
    no multiple of four stay, and transposed convolutions, which have no such kernel. Source: Mishra et al.,
    "Accelerating Sparse Deep Neural Networks", 2021.
    """

    name = "prune.two_four"

    def fits(self, layer: Layer) -> bool:
        """Groups of four must fit the axis."""
        return not layer.transposed and layer.weight.shape[layer.axis] % 4 == 0

    def masks(self, layers: Sequence[Layer]) -> list[Mask]:
        """False for two of each four."""
        return [two_of_four(layer.weight, layer.axis) for layer in layers]

    def told(self, layers: Sequence[Layer], masks: Sequence[Mask], folder: Path) -> str:
        """What the pattern is good for."""
        total = sum(mask.size for mask in masks)
        return (
            f"two of each four of the {total:,} weights of {_layers(len(layers))} are zero, along the axis that is "
            "summed over; only NVIDIA GPUs from Ampere on can be faster by it, with TensorRT's sparse kernels "
            "(trtexec --sparsity=enable): on a CPU nothing is gained, and the file keeps its size"
        )


class StructuredParams(StageParams):
    """Parameters of ``prune.structured``.

    Attributes:
        sparsity: the share of channels to remove; weights between two pruned layers go by about twice that share.
        global_ranking: whether channels are ranked among all layers, so that unimportant layers lose more; else each
            layer loses the same share.
        round_to: what is left of a layer is rounded down to a multiple of this, for which kernels (int8 ones above
            all) are made; a layer that would be left with nothing stays.
        ignore: names of modules, as ``named_modules`` has them, that keep their channels. Layers whose channels are an
            output's do so without being named.
        iterative_steps: in how many steps, with ``fine_tune`` after each.
        fine_tune: ``package.module:function`` that is called with the pruned module in evaluation mode, and trains it
            in place or returns the trained one; None leaves it as it is.
    """

    sparsity: float = Field(default=0.5, gt=0, lt=1)
    global_ranking: bool = False
    round_to: int = Field(default=16, ge=1)
    ignore: tuple[str, ...] = ()
    iterative_steps: int = Field(default=1, ge=1, le=100)
    fine_tune: str | None = Field(default=None, pattern=_FUNCTION)


class Structured(Stage):
    """Removes channels of a torch module and exports it again: a smaller model, faster wherever it runs.

    The factory of the torch source is called again, channels with the smallest weights are removed together with all
    that depends on them, and the user's function may train what is left. The module is exported and checked as the
    source was: names, types and shapes of inputs and outputs stay. Source: Fang et al., "DepGraph: Towards Any
    Structural Pruning", 2023 (torch_pruning, with group magnitudes as the importance).
    """

    name = "prune.structured"
    Params = StructuredParams
    tools = ("torch-pruning",)
    params: StructuredParams

    @property
    def needs_module(self) -> bool:
        """A file has lost what depends on what."""
        return True

    @property
    def functions(self) -> tuple[str, ...]:
        """The one that trains."""
        return () if self.params.fine_tune is None else (self.params.fine_tune,)

    def apply(self, source: StageInput, context: Context) -> StageResult:
        """Prunes, trains and exports."""
        from optimize.torch_modules import export_changed, fine_tuned, prune_channels, size_of

        sizes = []

        def change(module: "torch.nn.Module", examples: Mapping[str, "torch.Tensor"]) -> "torch.nn.Module":
            sizes.append(size_of(module, examples))
            pruned = prune_channels(
                module,
                examples,
                sparsity=self.params.sparsity,
                global_ranking=self.params.global_ranking,
                round_to=self.params.round_to,
                ignore=self.params.ignore,
                steps=self.params.iterative_steps,
                tune=lambda pruned: fine_tuned(pruned, self.params.fine_tune),
            )
            sizes.append(size_of(pruned, examples))
            return pruned

        export_changed(source, context, change)
        before, after = sizes
        trained = "not trained on" if self.params.fine_tune is None else f"trained on by {self.params.fine_tune}"
        return self.written(
            context,
            onnx_files.ENTRY,
            f"parameters {before.parameters:,} -> {after.parameters:,}, multiply-adds for a sample "
            f"{before.macs:,} -> {after.macs:,}, file {_megabytes(source.folder)} -> {_megabytes(context.out)}; "
            f"{trained}",
        )


def check_names(stage: str, parameter: str, names: Sequence[str], known: Sequence[str]) -> None:
    """Returns when each name is known.

    Raises:
        InputError: one is not; the message names the nearest.
    """
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            listed = f"There are {', '.join(known[:5])}{', ...' if len(known) > 5 else ''}."
            raise InputError(
                f"{stage}: {parameter} names {name!r}, and the model has nothing of this name",
                hint=f"Did you mean {nearest[0]!r}?" if nearest else listed,
            )


def two_of_four(weight: NDArray[Any], axis: int) -> Mask:
    """False at the two smallest magnitudes of each four neighbours along an axis, in the weight's shape.

    Of equal ones the first go.

    Args:
        weight: of any shape whose size along the axis is a multiple of four.
        axis: the one that fours are taken along.
    """
    moved = np.moveaxis(np.abs(weight), axis, -1)
    fours = moved.reshape(*moved.shape[:-1], -1, 4)
    order = np.argsort(fours, axis=-1, kind="stable")
    kept = np.ones(fours.shape, bool)
    np.put_along_axis(kept, order[..., :2], False, axis=-1)
    return np.ascontiguousarray(np.moveaxis(kept.reshape(moved.shape), -1, axis))


def compressed_size(folder: Path) -> tuple[int, int]:
    """Bytes of a folder's files as they are, and as zlib's fastest level leaves them."""
    size = packed = 0
    for path in sorted(file for file in folder.rglob("*") if file.is_file()):
        packer = zlib.compressobj(1)
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                size += len(chunk)
                packed += len(packer.compress(chunk))
        packed += len(packer.flush())
    return size, packed


def _smallest_out(weights: Sequence[NDArray[Any]], share: float) -> list[Mask]:
    """False at the smallest magnitudes of all weights together, which are this share of them."""
    magnitudes = np.concatenate([np.abs(weight).ravel() for weight in weights])
    kept = np.ones(magnitudes.size, bool)
    count = round(share * magnitudes.size)
    if count:
        kept[np.argpartition(magnitudes, count - 1)[:count]] = False
    ends = np.cumsum([weight.size for weight in weights])[:-1]
    return [part.reshape(weight.shape) for part, weight in zip(np.split(kept, ends), weights, strict=True)]


def _layers_of(model: Any, tensors: Mapping[str, Any]) -> list[tuple[Layer, str]]:
    """The layers with constant floating-point weights that nothing else uses, and the names of these tensors."""
    import onnx
    from onnx import numpy_helper

    floats = {onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE}
    uses: dict[str, int] = {}
    for node in onnx_files.nodes(model.graph):
        for name in node.input:
            uses[name] = uses.get(name, 0) + 1
    for value in model.graph.output:
        uses[value.name] = uses.get(value.name, 0) + 1
    found = []
    for node in model.graph.node:
        if node.op_type not in _WEIGHTED or node.domain not in {"", "ai.onnx"}:
            continue
        for place in (1, 0) if node.op_type == "MatMul" else (1,):
            tensor = tensors.get(node.input[place])
            if tensor is None or tensor.data_type not in floats or len(tensor.dims) < 2 or uses[tensor.name] > 1:
                continue
            layer = Layer(
                name=node.name,
                weight=numpy_helper.to_array(tensor),
                axis=_summed_axis(node, place, len(tensor.dims)),
                transposed=node.op_type == _TRANSPOSED,
            )
            found.append((layer, tensor.name))
            break
    return found


def _summed_axis(node: Any, place: int, rank: int) -> int:
    if node.op_type == "MatMul":
        return rank - 2 if place == 1 else rank - 1
    if node.op_type == "Gemm":
        return int(next((attribute.i for attribute in node.attribute if attribute.name == "transB"), 0))
    return 0 if node.op_type == _TRANSPOSED else 1


def _overwrite(tensor: Any, values: NDArray[Any]) -> None:
    from onnx import numpy_helper

    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), tensor.name))


def _layers(count: int) -> str:
    return "one layer" if count == 1 else f"{count} layers"


def _megabytes(folder: Path) -> str:
    return f"{sum(path.stat().st_size for path in folder.rglob('*') if path.is_file()) / 1e6:.3f} MB"
