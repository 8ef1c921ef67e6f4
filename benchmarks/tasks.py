"""The two tasks that variants are made for in benchmarks: a ResNet-18 on enlarged digits, and MiniLM on docstrings.

Both are written once into ``benchmarks/burnish-work-tasks`` (the second into ``examples/minilm``) and kept.
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from figures import say

from optimize.config import CampaignConfig
from optimize.demo import digits

HERE = Path(__file__).resolve().parent
TASKS = HERE / "burnish-work-tasks"
MINILM = HERE.parent / "examples" / "minilm"
VNNI = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})
BATCH_SIZES = (1, 32)
SIDE = 64
EPOCHS = 5


@dataclass(frozen=True)
class Task:
    """A model with its samples, as a campaign names them.

    Attributes:
        name: of the task.
        base: the folder that paths are relative to.
        source: the entry of ``sources``.
        evaluation: path of the held-out samples.
        calibration: path of the calibration samples.
        metric: the task metric.
    """

    name: str
    base: Path
    source: dict[str, Any]
    evaluation: str
    calibration: str
    metric: str

    def config(self, variants: list[Any]) -> CampaignConfig:
        """A campaign of these variants that judges them at the batch sizes of the benchmark."""
        return CampaignConfig.model_validate(
            {
                "name": self.name,
                "sources": [self.source],
                "samples": {"evaluation": self.evaluation, "calibration": self.calibration},
                "metric": self.metric,
                "variants": variants,
                "serving": [
                    {"server": "triton", "max_batch_size": size, "max_batch_delay_ms": 1.0}
                    for size in sorted(BATCH_SIZES, reverse=True)
                ],
                "level": "quick",
            }
        )


def resnet18() -> Task:
    """ResNet-18 (He et al., "Deep Residual Learning for Image Recognition", 2016) for digits of 64x64 in 3 channels."""
    folder = TASKS / "resnet18"
    if not (folder / "model.onnx").exists():
        folder.mkdir(parents=True, exist_ok=True)
        _train(folder)
    source = {"name": "resnet18", "onnx": "model.onnx"}
    return Task("resnet18", folder, source, "evaluation.npz", "calibration.npz", "accuracy")


def minilm() -> Task:
    """all-MiniLM-L6-v2 with the retrieval task of examples/minilm."""
    subprocess.run([sys.executable, str(MINILM / "prepare.py")], check=True)
    source = {"name": "minilm", "huggingface": "data/model", "task": "feature-extraction", "pooling": "mean"}
    return Task("minilm", MINILM, source, "data/evaluation.npz", "data/calibration.npz", "recall_at_1")


def enlarged(images: np.ndarray) -> np.ndarray:
    """Images (n, 1, 32, 32) as (n, 3, 64, 64), each pixel four times."""
    large = images.repeat(2, axis=2).repeat(2, axis=3)
    return np.ascontiguousarray(large.repeat(3, axis=1), dtype=np.float32)


def _train(folder: Path) -> None:
    import torch
    import torch.nn.functional as F

    small = folder / "small"
    digits.write_samples(small)
    for name in ("evaluation", "calibration"):
        with np.load(small / f"{name}.npz") as arrays:
            np.savez(folder / f"{name}.npz", image=enlarged(arrays["image"]), labels=arrays["labels"])
    images, labels = digits._digits()
    _, learned = digits._split(seed=0)
    x, y = torch.from_numpy(enlarged(images[learned])), torch.from_numpy(labels[learned])
    torch.manual_seed(0)
    network = _network().to(memory_format=torch.channels_last)
    steps = EPOCHS * (len(x) // 32)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, cycle_momentum=False)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x))[: len(x) // 32 * 32].view(-1, 32):
            loss = F.cross_entropy(network(x[rows].contiguous(memory_format=torch.channels_last)), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        say(f"resnet18: trained, loss {loss.item():.3f}")
    network.to(memory_format=torch.contiguous_format).eval()
    torch.onnx.export(
        network,
        (x[:2],),
        str(folder / "partial.onnx"),
        dynamo=True,
        external_data=False,
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )
    (folder / "partial.onnx").rename(folder / "model.onnx")


def _network() -> Any:
    from torch import nn

    class Block(nn.Module):
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

        def forward(self, x: Any) -> Any:
            return nn.functional.relu(self.main(x) + self.shortcut(x))

    widths = (64, 64, 128, 128, 256, 256, 512, 512)
    pairs = zip((64, *widths), widths, strict=False)
    return nn.Sequential(
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        *(Block(a, b, 2 if a != b else 1) for a, b in pairs),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(512, 10),
    )
