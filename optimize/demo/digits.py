"""The demo's task: scikit-learn's handwritten digits, enlarged from 8x8 to 32x32."""

from __future__ import annotations

import io
import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from registry.errors import MissingExtraError

if TYPE_CHECKING:
    from optimize.demo.network import ResidualNetwork

HELD_OUT = 898  # of 1,797: with two flips, the bound on the accuracy lost stays under 0.01
CALIBRATION = 256


def write_samples(folder: Path, seed: int = 0) -> None:
    """Writes ``evaluation.npz`` and ``calibration.npz`` into the folder, unless they are there already.

    Both hold ``image``, float32 (n, 1, 32, 32) in [0, 1], and ``labels``, int64 (n,). The 898 images of evaluation
    are held out from training; the 256 of calibration are of those the network learns from.

    Args:
        folder: made where it is missing.
        seed: of the split; `create_model` trains on the other side of the split of seed 0.
    """
    images, labels = _digits()
    held_out, learned = _split(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("evaluation", held_out), ("calibration", learned[:CALIBRATION])):
        buffer = io.BytesIO()
        np.savez(buffer, image=images[rows], labels=labels[rows])
        _write(folder / f"{name}.npz", buffer.getvalue())


def create_model() -> ResidualNetwork:
    """The network trained on the images that `write_samples` does not hold out, in eval mode: image -> logits.

    Takes 20 to 45 s of one core; the same host trains the same weights, byte for byte.

    Raises:
        MissingExtraError: torch is not installed.
    """
    try:
        from optimize.demo.network import train
    except ModuleNotFoundError as error:
        raise MissingExtraError("The demo's network", extra="torch") from error
    images, labels = _digits()
    _, learned = _split(seed=0)
    return train(images[learned], labels[learned], seed=0)


@cache
def _digits() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    from scipy.ndimage import zoom
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    images = zoom(digits.images / 16.0, (1, 4, 4), order=1, mode="nearest", grid_mode=True)
    return images[:, None].astype(np.float32), digits.target.astype(np.int64)


def _split(seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows held out and rows to learn from, with the same share of every digit in both."""
    from sklearn.model_selection import train_test_split

    _, labels = _digits()
    learned, held_out = train_test_split(np.arange(len(labels)), test_size=HELD_OUT, stratify=labels, random_state=seed)
    return held_out, learned


def _write(path: Path, content: bytes) -> None:
    """The file with this content, whole at any moment; one that has it already is left alone."""
    if path.is_file() and path.read_bytes() == content:
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
