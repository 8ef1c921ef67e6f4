"""ResNet-18 for digits of 64x64, as a torch source of a campaign: the network, its training, and its fine-tuning."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from optimize.demo import digits
from optimize.demo.network import _jitter

FOLDER = Path(__file__).resolve().parent / "burnish-work-tasks" / "resnet18"
WEIGHTS = FOLDER / "weights.pt"
EPOCHS, BATCH, LEARNING_RATE = 5, 32, 1e-3
FINE_TUNE_EPOCHS = 5


class Block(nn.Module):
    """Two 3x3 convolutions beside the identity, or beside a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        same = stride == 1 and inputs == outputs
        projection = (nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = nn.Identity() if same else nn.Sequential(*projection)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.main(x) + self.shortcut(x))


class ResNet18(nn.Module):
    """He et al., "Deep Residual Learning for Image Recognition", 2016, table 1, with ten classes."""

    def __init__(self) -> None:
        super().__init__()
        widths = (64, 64, 128, 128, 256, 256, 512, 512)
        pairs = zip((64, *widths), widths, strict=False)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
            *(Block(a, b, 2 if a != b else 1) for a, b in pairs),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(512, 10),
        )

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.layers(image)}


def create() -> nn.Module:
    """The trained network, in eval mode."""
    network = ResNet18()
    network.load_state_dict(torch.load(WEIGHTS, weights_only=True))
    return network.eval()


def prepare() -> None:
    """Writes samples and trained weights, unless they are there: two minutes on two cores."""
    if WEIGHTS.exists():
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    digits.write_samples(FOLDER / "small")
    for name in ("evaluation", "calibration"):
        with np.load(FOLDER / "small" / f"{name}.npz") as arrays:
            np.savez(FOLDER / f"{name}.npz", image=enlarged(arrays["image"]), labels=arrays["labels"])
    torch.manual_seed(0)
    network = train(ResNet18(), EPOCHS, LEARNING_RATE)
    torch.save(network.state_dict(), FOLDER / "partial.pt")
    (FOLDER / "partial.pt").rename(WEIGHTS)


def fine_tune(module: nn.Module) -> nn.Module:
    """Trains on what the network has learned from before: what held-out samples judge stays unseen."""
    return train(module, FINE_TUNE_EPOCHS, LEARNING_RATE)


def train(network: Any, epochs: int, learning_rate: float) -> nn.Module:
    """One cycle of the learning rate with AdamW over the digits that are not held out, each a little moved."""
    images, labels = digits._digits()
    _, learned = digits._split(seed=0)
    x, y = torch.from_numpy(enlarged(images[learned])), torch.from_numpy(labels[learned])
    network.train().to(memory_format=torch.channels_last)
    steps = epochs * (len(x) // BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, cycle_momentum=False)
    for _ in range(epochs):
        for rows in torch.randperm(len(x))[: len(x) // BATCH * BATCH].view(-1, BATCH):
            loss = F.cross_entropy(network(_jitter(x[rows]))["logits"], y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    trained: nn.Module = network.to(memory_format=torch.contiguous_format).eval()
    return trained


def enlarged(images: np.ndarray) -> np.ndarray:
    """Images (n, 1, 32, 32) as (n, 3, 64, 64), each pixel four times."""
    large = images.repeat(2, axis=2).repeat(2, axis=3)
    return np.ascontiguousarray(large.repeat(3, axis=1), dtype=np.float32)
