"""Optimization profiles: the least, best and largest shape of each input that a TensorRT engine is built for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from registry.errors import InputError
from registry.records import TensorSpec

Shape = tuple[int, ...]
End = Literal["min", "opt", "max"]
ENDS: tuple[End, ...] = ("min", "opt", "max")


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Least, best and largest shape of one input, or sizes of one dimension where they have one entry."""

    min: Shape
    opt: Shape
    max: Shape

    def at(self, end: End) -> Shape:
        """The shape at this end."""
        return {"min": self.min, "opt": self.opt, "max": self.max}[end]


Profile = Mapping[str, Range]


def profile_text(profile: Profile, end: End) -> str:
    """``x:1x3x8x8,mask:1x4``: how trtexec and Triton write the shapes at one end."""
    return ",".join(f"{name}:{'x'.join(map(str, shapes.at(end)))}" for name, shapes in profile.items())


def parse_sizes(text: str) -> dict[str, Range]:
    """Sizes of free dimensions from ``sequence=1,128,512; height=224,224,448``: name -> one-entry ranges.

    Raises:
        InputError: an entry is not ``name=min,opt,max`` of positive, rising numbers.
    """
    sizes = {}
    for entry in filter(None, (part.strip() for part in text.split(";"))):
        name, separator, numbers = (part.strip() for part in entry.partition("="))
        values = [number.strip() for number in numbers.split(",")]
        if not separator or not name or len(values) != 3 or not all(value.isdecimal() for value in values):
            raise InputError(
                f"{entry!r} gives no sizes of a dimension", hint="Write name=min,opt,max, as in sequence=1,128,512."
            )
        least, best, most = map(int, values)
        if not 1 <= least <= best <= most:
            raise InputError(f"the sizes in {entry!r} do not rise: min <= opt <= max, from 1 on")
        sizes[name] = Range(min=(least,), opt=(best,), max=(most,))
    return sizes


def parse_shapes(texts: Sequence[str]) -> dict[str, Range]:
    """Shapes of inputs from ``x=1x3x8x8,8x3x8x8,16x3x8x8``: input -> its range, in any order of numbers.

    Raises:
        InputError: an entry is not ``input=min,opt,max`` of shapes of the same rank.
    """
    profile = {}
    for text in texts:
        name, separator, rest = text.rpartition("=")
        try:
            shapes = [tuple(int(dim) for dim in shape.split("x")) for shape in rest.split(",")]
        except ValueError:
            shapes = []
        if not separator or not name or len(shapes) != 3 or len({len(shape) for shape in shapes}) != 1:
            raise InputError(
                f"{text!r} gives no shapes of an input", hint="Write input=min,opt,max, as in x=1x8,4x8,16x8."
            )
        profile[name] = Range(min=shapes[0], opt=shapes[1], max=shapes[2])
    return profile


def profile_of(inputs: Sequence[TensorSpec], *, batch: Range, sizes: Mapping[str, Range]) -> dict[str, Range]:
    """The profile of a model: the batch for a free first dimension, sizes by name for other free ones.

    All inputs are in it, those of a fixed shape too; it is empty where all are fixed, since trtexec takes no shapes
    then. A size that has the name of the first dimension goes before the batch.

    Raises:
        InputError: a free dimension has no sizes, or a name of ``sizes`` is no free dimension.
    """
    free = {dim for spec in inputs for dim in spec.shape if isinstance(dim, str)}
    for name in sizes:
        if name not in free:
            raise InputError(
                f"no input has a free dimension {name!r}", hint=f"Free are: {', '.join(sorted(free)) or 'none'}."
            )
    if all(isinstance(dim, int) for spec in inputs for dim in spec.shape):
        return {}
    return {spec.name: _range_of(spec, batch, sizes) for spec in inputs if spec.shape}


def _range_of(spec: TensorSpec, batch: Range, sizes: Mapping[str, Range]) -> Range:
    columns = []
    for position, dim in enumerate(spec.shape):
        if isinstance(dim, int):
            columns.append((dim, dim, dim))
        elif dim is not None and dim in sizes:
            columns.append(_triple(sizes[dim]))
        elif position == 0:
            columns.append(_triple(batch))
        else:
            raise InputError(
                f"the dimension {dim or position!r} of the input {spec.name!r} is free and has no sizes",
                hint=f"Give them: {dim or 'its name in the graph'}=min,opt,max.",
            )
    least, best, most = (tuple(column[end] for column in columns) for end in range(3))
    return Range(min=least, opt=best, max=most)


def _triple(sizes: Range) -> tuple[int, int, int]:
    return sizes.min[0], sizes.opt[0], sizes.max[0]
