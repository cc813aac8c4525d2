"""Garments at two depths, five tasks on the same tokens: training and judging of small ViTs.

24 x 24 pixels, 36 patches. Tasks: `seg` (class of every 4 x 4 cell), `depth` (its depth), `edge`
(whether an outline crosses it), and two that pull the same tokens apart, `near` and `far`: the
class of the nearer and of the farther garment, from the mean token. Training pictures come from
Fashion-MNIST's training part, test pictures from its test part; a scene is a function of (seed,
number).

Every task has a forward pass of its own, as M3ViT trains. Where nothing in the trunk depends on
the task (a dense trunk, a task-blind router) all passes would be equal, and one is run for all.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from polytask import files
from polytask.data.embedded.sources import cache_root
from polytask.data.scenes import Scenes, SceneSetting, draw_scenes
from polytask.models.experts import ExpertsConfig, ExpertUsage, RoutingRecord
from polytask.models.experts.vit import MoEViT, MoEViTConfig, VisionTask
from polytask.rng import derive, generator

TASKS = (
    VisionTask(name="seg", outputs=11),
    VisionTask(name="depth", outputs=1),
    VisionTask(name="edge", outputs=1),
    VisionTask(name="near", outputs=10, head="image"),
    VisionTask(name="far", outputs=10, head="image"),
)
NAMES = tuple(task.name for task in TASKS)
METRIC = {"seg": "miou", "depth": "l1", "edge": "ap", "near": "accuracy", "far": "accuracy"}
HIGHER = {"seg": True, "depth": False, "edge": True, "near": True, "far": True}
CONFLICT = ("near", "far")


SMALL = SceneSetting(size=24, reach=17.0)


@dataclass(frozen=True)
class Bed:
    """How much of everything."""

    train: int = 4000
    valid: int = 500
    test: int = 1000
    dim: int = 64
    depth: int = 4
    heads: int = 4
    batch: int = 16
    patch: int = 4
    scene: SceneSetting = SMALL
    decay: float = 0.05


@dataclass(frozen=True)
class Part:
    """Scenes as tensors: pixels (n, 1, S, S) about -1 to 1, and a target per task."""

    pixels: Tensor
    target: Mapping[str, Tensor]

    @classmethod
    def of(cls, scenes: Scenes, cell: int) -> Part:
        grid = scenes.grid(cell)
        target = {
            "seg": torch.from_numpy(grid.seg),
            "depth": torch.from_numpy(grid.depth),
            "edge": torch.from_numpy(grid.edge.astype(np.float32)),
            "near": torch.from_numpy(scenes.near),
            "far": torch.from_numpy(scenes.far),
        }
        return cls(torch.from_numpy(scenes.image).float()[:, None] / 64 - 1, target)

    def __len__(self) -> int:
        return len(self.pixels)

    def take(self, index: Tensor) -> Part:
        return Part(self.pixels[index], {name: t[index] for name, t in self.target.items()})


@functools.lru_cache(maxsize=1)
def parts(bed: Bed, seed: int) -> dict[str, Part]:
    """'train', 'valid' (other scenes of these garments) and 'test' (other garments) of a seed."""
    plan = (
        ("train", "train", bed.train),
        ("valid", "train", bed.valid),
        ("test", "test", bed.test),
    )
    return {
        name: Part.of(draw_scenes(bed.scene, split, count, seed, name), bed.patch)
        for name, split, count in plan
    }


def build(
    bed: Bed,
    seed: int,
    experts: ExpertsConfig | None,
    tasks: Sequence[str] = NAMES,
    ratio: float = 4,
) -> MoEViT:
    """A ViT for some of the tasks; trunk, heads and gates start alike whichever these are."""
    return MoEViT(
        MoEViTConfig(
            image_size=bed.scene.size,
            patch=bed.patch,
            channels=1,
            dim=bed.dim,
            depth=bed.depth,
            heads=bed.heads,
            mlp_ratio=ratio,
            class_token=False,
            experts=experts,
            tasks=tuple(task for task in TASKS if task.name in tasks),
            seed=derive(seed, "init"),
        )
    )


def loss_of(task: str, output: Tensor, target: Tensor) -> Tensor:
    """() cross entropy, mean absolute error, or binary cross entropy."""
    if task == "seg" or task in CONFLICT:
        return F.cross_entropy(output, target)
    if task == "depth":
        return (output[:, 0] - target).abs().mean()
    return F.binary_cross_entropy_with_logits(output[:, 0], target)


@dataclass
class Fitted:
    """What training spent, and the cosine between the gradients of `near` and `far`."""

    passes: int = 0
    cosine: dict[str, list[float]] = field(default_factory=dict)


def fit(
    model: MoEViT, train: Part, steps: int, batch: int, lr: float, seed: int, decay: float = 0.05
) -> Fitted:
    """Train in place with AdamW, linear warm-up over 10 % of the steps, then a cosine to 0.

    Losses of the model's tasks and their balance losses are added up; a step's rows depend on
    (seed, step) only, so every arm of a seed sees the same.
    """
    names = model.config.names
    optimizer = torch.optim.AdamW(_groups(model, decay), lr=lr)
    found = Fitted()
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "train"))
        for step in range(steps):
            rows = generator(seed, "batch", step).integers(0, len(train), batch)
            part = train.take(torch.from_numpy(rows))
            for group in optimizer.param_groups:
                group["lr"] = lr * _scale(step, steps)
            losses = task_losses(model, part, names)
            found.passes += len(names) if _by_task(model) else 1
            if step % max(1, steps // 8) == 0 and set(CONFLICT) <= set(names):
                _look(model, losses, found)
            optimizer.zero_grad(set_to_none=True)
            torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return found


def task_losses(model: MoEViT, part: Part, names: Sequence[str]) -> dict[str, Tensor]:
    """() per task, each from its own pass, with the balance loss of that pass (a blind router's,
    which has one pass, is the first task's)."""
    record = RoutingRecord()
    found = model.features_by_task(part.pixels, names, record)
    experts = model.config.experts
    balance = torch.zeros(len(names))
    if experts is not None and experts.balance:
        balance = experts.balance * record.balance(len(names), experts)
    return {
        name: loss_of(name, model.answer(x, name), part.target[name]) + balance[number]
        for number, (name, x) in enumerate(zip(names, found, strict=True))
    }


def _by_task(model: MoEViT) -> bool:
    experts = model.config.experts
    return experts is not None and experts.router != "blind"


def _groups(model: MoEViT, decay: float) -> list[dict[str, object]]:
    """Weights with decay; norms, biases and positions without."""
    matrices = [p for p in model.parameters() if p.dim() > 1 and p is not model.position]
    ids = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in ids]
    return [{"params": matrices, "weight_decay": decay}, {"params": rest, "weight_decay": 0.0}]


def _scale(step: int, steps: int) -> float:
    warm = max(1, round(0.1 * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _look(model: MoEViT, losses: Mapping[str, Tensor], found: Fitted) -> None:
    """Cosine of the two conflicting gradients on feed-forwards of sparse blocks, and on all else.

    A parameter that one of them does not reach counts as gradient 0 there.
    """
    named = [(n, p) for n, p in model.named_parameters() if not n.startswith("heads.")]
    odd = {n for n, _ in named if ".feed_forward." in n and int(n.split(".")[1]) % 2}
    gradients = [
        torch.autograd.grad(
            losses[task], [p for _, p in named], retain_graph=True, allow_unused=True
        )
        for task in CONFLICT
    ]
    for group, chosen in (("sparse blocks", True), ("elsewhere", False)):
        dot, square = 0.0, [0.0, 0.0]
        for (name, _), a, b in zip(named, *gradients, strict=True):
            if (name in odd) is not chosen:
                continue
            for i, g in enumerate((a, b)):
                square[i] += 0.0 if g is None else float(g.square().sum())
            if a is not None and b is not None:
                dot += float((a * b).sum())
        norm = math.sqrt(square[0] * square[1])
        found.cosine.setdefault(group, []).append(dot / norm if norm > 0 else 0.0)


@torch.no_grad()
def scores(model: MoEViT, test: Part, chunk: int = 250) -> dict[str, float]:
    """{'seg': mIoU, 'depth': mean absolute error, 'edge': average precision, 'near', 'far':
    accuracy} for the model's tasks."""
    found = {}
    for name in model.config.names:
        out = torch.cat([model.run(test.pixels[i : i + chunk], name)
                         for i in range(0, len(test), chunk)])  # fmt: skip
        target = test.target[name]
        if name == "seg":
            found[name] = mean_iou(out.argmax(1), target, 11)
        elif name == "depth":
            found[name] = float((out[:, 0] - target).abs().mean())
        elif name == "edge":
            found[name] = average_precision(out[:, 0].reshape(-1), target.reshape(-1))
        else:
            found[name] = float((out.argmax(1) == target).float().mean())
    return found


def mean_iou(guess: Tensor, target: Tensor, classes: int) -> float:
    """Mean over classes that occur of intersection over union, over all cells together."""
    cell = (target * classes + guess).reshape(-1)
    table = torch.bincount(cell, minlength=classes**2).view(classes, classes).double()
    both = table.diagonal()
    union = table.sum(0) + table.sum(1) - both
    there = table.sum(1) > 0
    return float((both[there] / union[there]).mean())


def average_precision(score: Tensor, target: Tensor) -> float:
    """Area under precision and recall, as a sum over the positives."""
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(target.numpy(), score.numpy()))


def delta_m(found: Mapping[str, float], single: Mapping[str, float]) -> float:
    """Mean over tasks of the relative gain over single-task models, in per cent (Maninis et al.
    2019, arXiv 1904.08918)."""
    gains = [(1 if HIGHER[n] else -1) * (found[n] - single[n]) / abs(single[n]) for n in NAMES]
    return 100 * sum(gains) / len(gains)


def overall(found: Mapping[str, float]) -> float:
    """Mean of all tasks' scores, an error counted as 1 - error: what settings are chosen by."""
    return sum(found[n] if HIGHER[n] else 1 - found[n] for n in NAMES) / len(NAMES)


def usage_of(model: MoEViT, part: Part, chunk: int = 250) -> ExpertUsage:
    """Who uses which expert, every task on the same pictures."""
    experts = model.config.experts
    usage = ExpertUsage(model.config.names, 1 if experts is None else experts.count)
    for name in model.config.names:
        for i in range(0, len(part), chunk):
            record = RoutingRecord()
            model.run(part.pixels[i : i + chunk], name, record)
            usage.add(record)
    return usage


def single_scores(bed: Bed, seed: int, steps: int, lr: float) -> dict[str, float]:
    """One dense model per task, each on as many rows as the multitask models: what `delta_m`
    compares with. Computed once per (bed, seed, steps, lr, code) and kept in the cache."""
    path = cache_root() / "testbeds" / "scenes" / f"single-{_key(bed, seed, steps, lr)}.json"
    if path.is_file():
        kept: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
        return kept
    part, found = parts(bed, seed), {}
    for name in NAMES:
        model = build(bed, seed, None, (name,))
        fit(model, part["train"], steps, bed.batch, lr, seed, bed.decay)
        for split in ("valid", "test"):
            found[f"{split} {name}"] = scores(model, part[split])[name]
    files.write_json(path, found)
    return found


def _key(bed: Bed, seed: int, steps: int, lr: float) -> str:
    """Changes with the setting and with the code that decides the result."""
    from polytask.data import scenes
    from polytask.models.experts import vit

    digest = hashlib.blake2b(f"{bed}/{seed}/{steps}/{lr}/{torch.__version__}".encode())
    for module in (scenes, vit, sys.modules[__name__]):
        digest.update(inspect.getsource(module).encode())
    return digest.hexdigest()[:16]
