"""Two overlaid glyphs, two tasks, a LeNet with two heads: the usual bench of multitask optimisers.

Held here: the network, batches that are a pure function of (seed, step), and how a trained network
is judged (accuracy, calibration, sharpness). How it is trained is the system's business.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from polytask.data.glyphs import GlyphName, GlyphPairs, draw_pairs, glyphs, replace_labels
from polytask.rng import derive, generator
from polytask.train.flat import FlatMTL
from polytask.train.sharpness import GradConflictMeter, SharpnessMeter

SIDES = ("left", "right")
SIZE = 36  # pixels of a canvas


@dataclass(frozen=True)
class Setting:
    """How much data an experiment has, and how noisy it is."""

    pairs: int
    data: GlyphName = "fashion-mnist"
    scale: int = 1  # each pixel of a glyph is repeated this often
    valid: int = 500
    test: int = 3000
    batch: int = 128
    noise: float = 0.3  # share of the right-hand training labels replaced at random
    steps: float = 1.0  # steps as a share of what the budget gives


def pair_parts(setting: Setting, seed: int) -> dict[str, Part]:
    """'train' (noisy right labels), 'valid' and 'test' (clean); no glyph occurs in two parts."""
    counts = {"train": setting.pairs, "valid": setting.valid}
    parts = draw_pairs(glyphs(setting.data, "train", setting.scale), counts, SIZE, seed)
    parts["train"] = replace_labels(parts["train"], 1, setting.noise, seed)
    fresh = glyphs(setting.data, "test", setting.scale)
    parts |= draw_pairs(fresh, {"test": setting.test}, SIZE, seed, "test")
    return {name: Part.of(pairs) for name, pairs in parts.items()}


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


@dataclass
class Fitted:
    """What training spent and saw."""

    flops: int
    forwards: int
    backwards: int
    conflict: GradConflictMeter


def fit(
    net: PairNet,
    flat: FlatMTL,
    train: Part,
    steps: int,
    batch: int,
    seed: int,
    decay: float = 0.0,
    after: Callable[[int], None] | None = None,
) -> Fitted:
    """Train in place with AdamW at 1e-3; batches depend on (seed, step) only.

    `after(step)` is called with the number of steps done. FLOPs are counted in the first step,
    which is like all others.
    """
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=decay)
    fitted = Fitted(0, 0, 0, GradConflictMeter(len(SIDES)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "train"))
        for step in range(steps):
            closure = losses(net, train.take(batch_indices(len(train), batch, step, seed)))
            optimizer.zero_grad()
            with FlopCounterMode(display=False) if step == 0 else nullcontext() as counter:
                report = flat.step(closure, net.shared, net.own)
            if counter is not None:
                fitted.flops = steps * counter.get_total_flops()
            optimizer.step()
            fitted.forwards += report.forwards
            fitted.backwards += report.backwards
            fitted.conflict.update(report)
            if after is not None:
                after(step + 1)
    return fitted


class BestWeights:
    """Remembers, every so many steps, the weights with the best mean validation accuracy."""

    def __init__(self, net: PairNet, valid: Part, every: int) -> None:
        self.net = net
        self.valid = valid
        self.every = every
        self.accuracy, self.step = -1.0, 0
        self.weights: dict[str, Tensor] = {}

    def __call__(self, step: int) -> None:
        if step % self.every == 0:
            found = mean_accuracy(self.net, self.valid)
            if found > self.accuracy:
                self.accuracy, self.step = found, step
                self.weights = copy.deepcopy(self.net.state_dict())

    def settle(self) -> int:
        """Put the best weights into the network; returns the step they are from."""
        self.net.load_state_dict(self.weights)
        return self.step


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


def mean_accuracy(net: PairNet, part: Part) -> float:
    """Mean over tasks of the share of true classes found."""
    return sum(accuracies(net, part)) / len(SIDES)


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
