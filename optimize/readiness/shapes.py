"""E5: free dimensions, optimization profiles and batches."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from math import prod

from optimize.readiness.graph import Graph, given, named
from optimize.readiness.profile import ENDS
from optimize.readiness.rules import Hit, Rule, Target

_WIDEST = 32
_MOST_ELEMENTS = 64
# Operator -> the input that is a shape, not data.
_SHAPE_INPUTS: Mapping[str, int] = {"Reshape": 1, "Expand": 1, "ConstantOfShape": 0, "Tile": 1, "Resize": 3}


def missing_profiles(graph: Graph, target: Target) -> Iterator[Hit]:
    """Free dimensions without a profile, and profiles that do not fit the inputs."""
    free = [value.name for value in graph.inputs if None in (graph.shape(value.name) or ())]
    if target.profile is None:
        if free:
            message = f"the inputs {', '.join(free)} have free dimensions: an engine needs a profile for them"
            yield Hit(message=message, nodes=tuple(free), severity="warning")
        return
    known = {value.name for value in graph.inputs}
    for name in free:
        if name not in target.profile:
            yield Hit(message=f"the profile lacks the input {name!r}", nodes=(name,))
    for name, shapes in target.profile.items():
        if name not in known:
            yield Hit(message=f"the profile names {name!r}, which is no input", nodes=(name,))
            continue
        declared = graph.shape(name) or ()
        if len(declared) != len(shapes.min):
            yield Hit(message=f"the profile of {name!r} has rank {len(shapes.min)}, not {len(declared)}", nodes=(name,))
            continue
        for least, best, most, dim in zip(shapes.min, shapes.opt, shapes.max, declared, strict=True):
            if not 1 <= least <= best <= most or (dim is not None and {least, best, most} != {dim}):
                message = f"the profile of {name!r} has {least}, {best}, {most} for a dimension of {dim or 'free size'}"
                yield Hit(message=message, nodes=(name,))


def wide_profiles(graph: Graph, target: Target) -> Iterator[Hit]:
    """Profiles that span too much for one set of kernels."""
    for name, shapes in (target.profile or {}).items():
        for least, best, most in zip(shapes.min, shapes.opt, shapes.max, strict=True):
            if most > _WIDEST * least:
                yield Hit(message=f"{name!r} spans {least} to {most}, more than {_WIDEST} times", nodes=(name,))
            elif best == least == 1 and most >= 8:
                yield Hit(message=f"{name!r} is tuned for 1 and allows {most}", nodes=(name,))


def unequal_names(graph: Graph, target: Target) -> Iterator[Hit]:
    """One name of a dimension with several sizes in the profile."""
    sizes = defaultdict(set)
    for value in graph.inputs:
        shapes = (target.profile or {}).get(value.name)
        dims = value.type.tensor_type.shape.dim
        if shapes is None or len(dims) != len(shapes.min):
            continue
        for position, dim in enumerate(dims):
            if dim.dim_param:
                sizes[dim.dim_param].add(tuple(shapes.at(end)[position] for end in ENDS))
    for name, found in sizes.items():
        if len(found) > 1:
            yield Hit(message=f"the dimension {name!r} has several ranges: {sorted(found)}", nodes=(name,))


def unbatched(graph: Graph, target: Target) -> Iterator[Hit]:
    """Tensors that a server cannot batch along their first dimension."""
    if not target.max_batch_size:
        return
    for value in (*graph.inputs, *graph.outputs):
        shape = graph.shape(value.name)
        if not shape or shape[0] is not None:
            first = "is a scalar" if not shape else f"has the fixed first dimension {shape[0]}"
            message = f"{value.name!r} {first}; max_batch_size {target.max_batch_size} needs a free one"
            yield Hit(message=message, nodes=(value.name,))


def large_shape_tensors(graph: Graph, target: Target) -> Iterator[Hit]:
    """Shapes computed at run time with more elements than TensorRT keeps on the host."""
    for node in graph.of_type(*_SHAPE_INPUTS):
        name = given(node, _SHAPE_INPUTS[node.op_type])
        shape = graph.shape(name) if name and not graph.is_constant(name) else None
        if shape and None not in shape and prod(size or 0 for size in shape) > _MOST_ELEMENTS:
            yield Hit(message=f"the shape {name!r} has more than {_MOST_ELEMENTS} elements", nodes=(named(node),))


RULES = (
    Rule(
        id="E501", severity="error", title="profile missing or wrong", check=missing_profiles,
        fix="Give min, opt and max for each input: --shapes input=1x3x8x8,8x3x8x8,16x3x8x8, or tensorrt.prepare.",
    ),
    Rule(
        id="E502", severity="warning", title="profile too wide", check=wide_profiles,
        fix="Build several narrow profiles; set opt to the size that is served most.",
    ),
    Rule(
        id="E503", severity="warning", title="one dimension, several ranges", check=unequal_names,
        fix="Give dimensions of one name the same sizes in all inputs.",
    ),
    Rule(
        id="E504", severity="error", title="batch that a server cannot make", check=unbatched,
        fix="Export with a free first dimension in all inputs and outputs, or serve with max_batch_size 0.",
    ),
    Rule(
        id="E505", severity="warning", title="large shape tensor", check=large_shape_tensors,
        fix="Fold shapes, or fix the dimensions.",
    ),
)  # fmt: skip
