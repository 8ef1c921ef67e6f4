"""Functions that tests of bad input run in a child process."""

import tempfile
from pathlib import Path

import numpy as np

from optimize.admission import admit
from optimize.stages import make_stage
from optimize.stages.base import Context, read_input
from registry.errors import InputError
from registry.records import StageCall


def try_damaged(*, folder, count, seed):
    """How many of ``count`` damaged copies of the models in the subfolders are let in, and how many are refused."""
    originals = [path.read_bytes() for path in sorted(Path(folder).glob("*/model.onnx"))]
    random = np.random.default_rng(seed)
    refused, admitted, without_reason = 0, 0, []
    for _ in range(count):
        with tempfile.TemporaryDirectory() as name:
            given, target = Path(name) / "given.onnx", Path(name) / "to"
            target.mkdir()
            given.write_bytes(damaged(originals[random.integers(len(originals))], random))
            try:
                admit(given, target)
                admitted += 1
            except InputError as error:
                refused += 1
                if len(error.message) < 20:
                    without_reason.append(error.message)
    return {"refused": refused, "admitted": admitted, "without_reason": without_reason}


def damaged(whole, random):
    """The bytes cut short, with bits flipped, or with a piece of them written over another place."""
    data = bytearray(whole)
    way = random.integers(3)
    if way == 0:
        return bytes(data[: random.integers(1, len(data))])
    if way == 1:
        for place in random.integers(0, len(data) * 8, random.integers(1, 9)):
            data[place // 8] ^= 1 << (place % 8)
        return bytes(data)
    start, to = random.integers(0, len(data), 2)
    piece = data[start : start + random.integers(1, 40)]
    data[to : to + len(piece)] = piece
    return bytes(data)


def convert_to_openvino(*, folder):
    """Converts ``model.onnx`` in the folder; what is made stays beside it."""
    source = read_input(Path(folder), "model.onnx")
    (Path(folder) / "made").mkdir()
    make_stage(StageCall(name="convert.openvino"))(source, Context(out=Path(folder) / "made"))
