"""The demo's network and its training, apart from the samples so that only who trains loads torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

WIDTHS = (128, 256, 256)  # channels of the blocks; multiples of 16, as int8 kernels like them
EPOCHS = 4
BATCH = 32
LEARNING_RATE = 1e-3
THREADS = 1  # the number of threads decides the order of sums, and so the bytes of the weights


class Block(nn.Module):  # type: ignore[misc]
    """Two 3x3 convolutions beside a 1x1 convolution; halves height and width where ``stride`` is 2."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Features (n, outputs, h / stride, w / stride) of features (n, inputs, h, w)."""
        return F.relu(self.main(features) + self.shortcut(features))


class ResidualNetwork(nn.Module):  # type: ignore[misc]
    """A residual network for images of 32x32 in one channel, about 0.4 GFLOP an image."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        first, *_ = WIDTHS
        self.stem = nn.Sequential(nn.Conv2d(1, first, 3, 2, 1, bias=False), nn.BatchNorm2d(first), nn.ReLU())
        pairs = zip((first, *WIDTHS), WIDTHS, strict=False)
        self.blocks = nn.Sequential(*(Block(a, b, 1 if i == 0 else 2) for i, (a, b) in enumerate(pairs)))
        self.head = nn.Linear(WIDTHS[-1], classes)

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """``logits`` (n, classes) of images (n, 1, 32, 32) in [0, 1]; the key names the exported model's output."""
        return {"logits": self.head(self.blocks(self.stem(image)).mean((2, 3)))}


def train(images: NDArray[np.float32], labels: NDArray[np.int64], seed: int) -> ResidualNetwork:
    """A network trained on images (n, 1, 32, 32) and labels (n,): the same bytes for one seed on one kind of host.

    One cycle of the learning rate with AdamW, in bfloat16 where the CPU computes in it.
    """
    images_, labels_ = torch.from_numpy(images), torch.from_numpy(labels)
    capabilities: dict[str, bool] = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    with _deterministic(seed):
        network = ResidualNetwork()
        network.to(memory_format=torch.channels_last)
        steps = EPOCHS * (len(images) // BATCH)
        optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.25, cycle_momentum=False
        )
        for batch in _batches(len(images), steps):
            with torch.autocast("cpu", torch.bfloat16, enabled=capabilities.get("avx512_bf16", False)):
                loss = F.cross_entropy(network(_jitter(images_[batch]))["logits"], labels_[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    network.to(memory_format=torch.contiguous_format).eval()
    return network


def _batches(count: int, steps: int) -> Iterator[torch.Tensor]:
    per_epoch = count // BATCH
    for _ in range(steps // per_epoch):
        yield from torch.randperm(count)[: per_epoch * BATCH].view(per_epoch, BATCH)


def _jitter(images: torch.Tensor) -> torch.Tensor:
    """The images each turned, stretched and moved a little (4 % of their size, one standard deviation)."""
    warp = torch.eye(2, 3) + 0.04 * torch.randn(len(images), 2, 3)
    grid = F.affine_grid(warp, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False).contiguous(memory_format=torch.channels_last)


@contextmanager
def _deterministic(seed: int) -> Iterator[None]:
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(THREADS)
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(strict)
