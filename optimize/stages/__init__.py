"""The stages that make variants, found by name: those of the house and those that plug-ins bring.

A plug-in is an entry point of the group ``burnish.stages``: its name is the stage's, its value the class
(``package.module:Class``, a subclass of ``optimize.stages.base.Stage``). It is imported when it is first asked for.
"""

import difflib
import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from registry.errors import InputError
from registry.records import StageCall

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from optimize.stages.base import Stage

GROUP = "burnish.stages"

# Modules are named, not imported: a stage's libraries load when it is used.
_IN_TREE: Mapping[str, str] = {
    "simplify.constants": "optimize.stages.simplify:Constants",
    "simplify.ort": "optimize.stages.simplify:OrtGraph",
    "simplify.transformer": "optimize.stages.simplify:TransformerFusion",
    "quantize.dynamic": "optimize.stages.quantize:DynamicInt8",
    "quantize.static": "optimize.stages.quantize:StaticInt8",
    "quantize.weights": "optimize.stages.weights:WeightOnly",
    "quantize.smooth": "optimize.stages.smoothquant:Smooth",
    "quantize.tensorrt": "optimize.stages.tensorrt_int8:TensorRtInt8",
    "precision.float16": "optimize.stages.precision:Float16",
    "precision.mixed": "optimize.stages.precision:MixedFloat16",
    "convert.opset": "optimize.stages.convert:Opset",
    "convert.fixed_shape": "optimize.stages.convert:FixedShape",
    "convert.free_batch": "optimize.stages.convert:FreeBatch",
    "reduce.input_type": "optimize.stages.reduce:InputType",
    "reduce.sequence_length": "optimize.stages.reduce:SequenceLength",
    "reduce.image_side": "optimize.stages.reduce:ImageSide",
    "convert.openvino": "optimize.stages.openvino:ToOpenVino",
    "quantize.openvino": "optimize.stages.openvino:OpenVinoInt8",
    "prune.magnitude": "optimize.stages.prune:Magnitude",
    "prune.structured": "optimize.stages.prune:Structured",
    "prune.two_four": "optimize.stages.prune:TwoFour",
    "tensorrt.prepare": "optimize.stages.tensorrt:Prepare",
}


def stage_names() -> tuple[str, ...]:
    """The names of all stages, in order; a broken plug-in's is among them."""
    return tuple(sorted({*_IN_TREE, *_plugins()}))


def find_stage(name: str) -> "type[Stage]":
    """The class of the stage of this name. The house's own stages cannot be replaced by a plug-in.

    Raises:
        InputError: there is none, or its plug-in cannot be imported or is not a stage.
    """
    if name in _IN_TREE:
        module, _, attribute = _IN_TREE[name].partition(":")
        found: type[Stage] = getattr(importlib.import_module(module), attribute)
        return found
    plugin = _plugins().get(name)
    if plugin is None:
        nearest = difflib.get_close_matches(name, stage_names(), n=1, cutoff=0.4)
        known = f"There are: {', '.join(stage_names())}."
        raise InputError(
            f"there is no stage {name!r}", hint=f"Did you mean {nearest[0]!r}? {known}" if nearest else known
        )
    return _load(plugin)


def make_stage(call: StageCall) -> "Stage":
    """The stage with its parameters validated.

    Raises:
        InputError: no such stage, an unknown parameter, or a value that does not fit.
    """
    return find_stage(call.name)(call.params)


def broken_stages() -> Mapping[str, str]:
    """Plug-ins that cannot be used: name -> reason."""
    reasons = {}
    for name, plugin in sorted(_plugins().items()):
        if name in _IN_TREE:
            reasons[name] = f"{plugin.value} takes the name of a stage of burnish"
            continue
        try:
            _load(plugin)
        except InputError as error:
            reasons[name] = error.message
    return reasons


def _plugins() -> "dict[str, EntryPoint]":
    # Here, because stages of the house need none of it, and importing it takes as long as many a check.
    from importlib.metadata import entry_points

    return {plugin.name: plugin for plugin in entry_points(group=GROUP)}


def _load(plugin: "EntryPoint") -> "type[Stage]":
    from optimize.stages.base import Stage

    try:
        found = plugin.load()
    except Exception as error:
        raise InputError(
            f"the stage {plugin.name!r} of the plug-in {plugin.value} cannot be imported: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Stage)):
        raise InputError(f"the plug-in {plugin.value} for the stage {plugin.name!r} is not a subclass of Stage")
    if getattr(found, "name", None) != plugin.name:
        raise InputError(f"the plug-in {plugin.value} is registered as {plugin.name!r} but has another name")
    return found
