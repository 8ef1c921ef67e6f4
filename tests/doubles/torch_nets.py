"""Tiny torch nets with factories, and the sources that they are once exported."""

import warnings
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from optimize.export import export_torch
from optimize.stages.base import StageInput, TorchOrigin, read_input

__all__ = ["attending", "exported", "frozen", "residual", "tensors", "write_samples"]


class Block(nn.Module):
    """Two convolutions and what comes in, summed."""

    def __init__(self, channels):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return torch.relu(x + self.second(torch.relu(self.norm(self.first(x)))))


class Residual(nn.Module):
    """``image`` (batch, 1, 8, 8) to ``logits`` (batch, 10)."""

    def __init__(self, channels=16):
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, padding=1)
        self.one = Block(channels)
        self.down = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1)
        self.two = Block(2 * channels)
        self.head = nn.Linear(2 * channels, 10)

    def forward(self, image):
        hidden = self.down(self.one(torch.relu(self.stem(image))))
        return {"logits": self.head(self.two(torch.relu(hidden)).mean((2, 3)))}


class Attending(nn.Module):
    """One encoder layer whose heads are a reshape: ``tokens`` (batch, 4, 32) to ``encoded`` of the same shape."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, tokens):
        split = self.qkv(tokens).reshape(-1, 4, 3, 2, 16).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(split[0], split[1], split[2])
        tokens = tokens + self.out(attended.transpose(1, 2).reshape(-1, 4, 32))
        return {"encoded": tokens + self.down(torch.relu(self.up(tokens)))}


def residual():
    """A net of 16 and 32 channels with two sums."""
    return Residual()


def frozen():
    """The same with a stem that is not trained."""
    made = Residual()
    made.stem.requires_grad_(requires_grad=False)
    return made


def attending():
    """A net whose attention knows the number of its channels."""
    return Attending(), {"tokens": torch.randn(2, 4, 32)}


def write_samples(path):
    """Twenty images of noise with labels."""
    random = np.random.default_rng(0)
    images = random.normal(size=(20, 1, 8, 8)).astype(np.float32)
    np.savez(path, image=images, labels=random.integers(0, 10, 20))


def exported(factory, folder) -> StageInput:
    """The source that a factory of this module is, as a campaign would have it."""
    (folder / "source").mkdir(parents=True)
    write_samples(folder / "samples.npz")
    origin = TorchOrigin(factory=f"{__name__}:{factory}", samples=str(folder / "samples.npz"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own, which a child of a campaign keeps in its log
        export_torch(
            factory=origin.factory, samples=origin.samples, folder=str(folder / "source"), opset=None, seed=origin.seed
        )
    return replace(read_input(folder / "source", "model.onnx"), origin=origin)


def tensors(answer):
    """The tensors that one of these nets answers with."""
    return list(answer.values())
