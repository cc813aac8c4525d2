"""Two overlaid glyphs, two tasks, a LeNet with two heads: the usual bench of multitask optimisers.

Held here: the network, batches that are a pure function of (seed, step), and how a trained network
is judged (accuracy, calibration, sharpness). How it is trained is the system's business.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from polytask.rng import derive, generator
from polytask.train.sharpness import SharpnessMeter

if TYPE_CHECKING:
    from polytask.data.glyphs import GlyphPairs

SIDES = ("left", "right")


class PairNet(nn.Module):
    """LeNet for 36 x 36 canvases: conv 10 of 9 x 9, conv 20 of 5 x 5, 50 features, two heads."""

    def __init__(self, classes: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, "init"))
            self.trunk = nn.Sequential(
                nn.Conv2d(1, 10, 9),  # (n, 10, 28, 28)
                nn.MaxPool2d(2),
                nn.ReLU(),
                nn.Conv2d(10, 20, 5),  # (n, 20, 10, 10)
                nn.MaxPool2d(2),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(500, 50),
                nn.ReLU(),
            )
            self.heads = nn.ModuleList([nn.Linear(50, classes) for _ in SIDES])
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Logits per task from (n, 1, 36, 36) in [0, 1]."""
        features = self.trunk(pixels)
        return [head(features) for head in self.heads]

    @property
    def shared(self) -> list[nn.Parameter]:
        return list(self.trunk.parameters())

    @property
    def own(self) -> list[list[nn.Parameter]]:
        """Parameters of each head."""
        return [list(head.parameters()) for head in self.heads]


@dataclass(frozen=True)
class Part:
    """Pairs as tensors: pixels (n, 1, size, size), labels and truths (n, 2)."""

    pixels: Tensor
    label: Tensor
    truth: Tensor

    @classmethod
    def of(cls, pairs: GlyphPairs) -> Part:
        pixels = torch.from_numpy(pairs.image).float().div_(255).unsqueeze(1)
        return cls(
            pixels.contiguous(memory_format=torch.channels_last),
            torch.from_numpy(pairs.label),
            torch.from_numpy(pairs.truth),
        )

    def __len__(self) -> int:
        return len(self.label)

    def take(self, index: Tensor) -> Part:
        return Part(self.pixels[index], self.label[index], self.truth[index])


def batch_indices(rows: int, batch: int, step: int, seed: int) -> Tensor:
    """Rows of a step: an endless chain of permutations, cut into batches."""
    start = step * batch
    found = []
    while start < (step + 1) * batch:
        epoch, offset = divmod(start, rows)
        order = generator(seed, "batches", epoch).permutation(rows)
        found.append(order[offset : offset + (step + 1) * batch - start])
        start += len(found[-1])
    return torch.from_numpy(np.concatenate(found))


def losses(net: PairNet, part: Part) -> Callable[[], list[Tensor]]:
    """A closure with both tasks' mean cross entropy on the labels, from one forward."""
    return lambda: [cross_entropy(out, part.label[:, t]) for t, out in enumerate(net(part.pixels))]


@torch.no_grad()
def probabilities(net: PairNet, part: Part, chunk: int = 500) -> list[Tensor]:
    """Per task (n, classes), in evaluation mode."""
    net.eval()
    outputs = [net(part.pixels[i : i + chunk]) for i in range(0, len(part), chunk)]
    net.train()
    return [torch.cat([out[t] for out in outputs]).softmax(1) for t in range(len(SIDES))]


def accuracies(net: PairNet, part: Part) -> list[float]:
    """Share of true classes found, per task."""
    found = probabilities(net, part)
    return [float((p.argmax(1) == part.truth[:, t]).float().mean()) for t, p in enumerate(found)]


def calibration_error(probability: Tensor, truth: Tensor, bins: int = 15) -> float:
    """Expected calibration error: |accuracy - confidence| averaged over equal-width bins of
    confidence, weighted by their share (Guo et al. 2017, arXiv 1706.04599, eq. 3)."""
    confidence, guess = probability.double().max(1)
    right = (guess == truth).double()
    bin_of = (confidence * bins).ceil().long().sub(1).clamp(0, bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64).index_add(0, bin_of, right - confidence)
    return float(gap.abs().sum() / len(truth))


def judge(net: PairNet, train: Part, test: Part, rhos: tuple[float, ...]) -> dict[str, float]:
    """Test accuracy and calibration error per task and on average, and each task's rise of the
    training loss at every radius: 'sharpness_left@0.1'."""
    metrics: dict[str, float] = {}
    found = probabilities(net, test)
    for t, side in enumerate(SIDES):
        truth = test.truth[:, t]
        metrics[f"accuracy_{side}"] = float((found[t].argmax(1) == truth).float().mean())
        metrics[f"ece_{side}"] = calibration_error(found[t], truth)
    for name in ("accuracy", "ece"):
        metrics[name] = sum(metrics[f"{name}_{side}"] for side in SIDES) / len(SIDES)
    net.eval()
    climbed = SharpnessMeter(rhos).measure(losses(net, train), net.shared, net.own)
    net.train()
    for t, side in enumerate(SIDES):
        metrics[f"train_loss_{side}"] = float(climbed.loss[t])
        for column, rho in enumerate(rhos):
            metrics[f"sharpness_{side}@{rho:g}"] = float(climbed.rise[t, column])
    return metrics
