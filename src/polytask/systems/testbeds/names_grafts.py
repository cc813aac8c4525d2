"""Skills on population E: MiniLM's upper layers fine-tuned with SGD, and grafts cut from that.

Embeddings, lower layers and heads are frozen, as in the paper; SGD matters there (deltas of
adaptive optimisers spread over all parameters). What several arms of a seed share (fine-tuned
weights, learned masks) is cached by content, so that the arms are compared on the same models.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from polytask import files, rng
from polytask.data.embedded.sources import cache_root
from polytask.evaluate.calibration import Reliability, reliability
from polytask.evaluate.metric import Floats
from polytask.merge.graft import Graft
from polytask.merge.graft_delta import overlap
from polytask.merge.graft_fit import FittedMask, MaskConfig, fit_mask
from polytask.systems.testbeds import names, names_texts

VERSION = 1  # raise it when training or mask learning changes
MULTITASK = "multitask"
Optimiser = Literal["sgd", "adamw"]
Signs = Literal["both", "dropped"]


@dataclass(frozen=True)
class Setting:
    """How much of everything; part of the key of the cache."""

    tasks: tuple[str, ...]
    pool: tuple[tuple[str, int], ...]
    train: int  # texts of a task
    valid: int
    steps: int  # of fine-tuning, on one task
    multitask_steps: int
    batch: int
    lr: float
    adamw_lr: float
    mask_rows: int  # texts whose gradient makes a step of mask learning
    mask: MaskConfig
    patch: float

    @property
    def population(self) -> names.Setting:
        return names.Setting(self.tasks, self.pool, self.train, self.valid)


class Unsigned(Graft):
    """Ablation: the factor (1 - 2 gamma_b) is left out of the step."""

    def sign(self) -> Tensor:
        return torch.ones_like(self.delta)


@dataclass(frozen=True)
class Bed:
    """Population E without experts, fine-tuned here."""

    setting: Setting
    seed: int
    people: names.Population

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.setting.tasks

    @property
    def base(self) -> names.State:
        return self.people.base

    def finetuned(self, task: str, optimiser: Optimiser = "sgd") -> names.State:
        """The base tuned on a task, or on all of them in turn for 'multitask'; from the cache."""
        return _state(self, task, optimiser)

    def graft(
        self, task: str, sparsity: float, patch: float = 1.0, optimiser: Optimiser = "sgd"
    ) -> Graft:
        """Base, delta and base patch of a fine-tuned model."""
        return Graft.between(self.base, self.finetuned(task, optimiser), sparsity, patch=patch)

    def learned(
        self, task: str, sparsity: float, model: str = "", signs: Signs = "both"
    ) -> tuple[Graft, FittedMask]:
        """A graft for `task`, cut from the model `model` (default: the one tuned on the task)."""
        graft = self.graft(model or task, sparsity, self.setting.patch)
        return graft, _mask(self, task, sparsity, model or task, signs)

    def loss(self, task: str, index: Tensor, model: Any) -> Tensor:
        """Mean cross-entropy of some training texts."""
        part = self.people.tasks[task].parts["train"]
        logits = self.people.tasks[task].head(model(*part.inputs(index)))
        return functional.cross_entropy(logits, part.label[index])

    def probabilities(self, state: names.State, task: str, part: str = "test") -> Floats:
        """(n, classes) of a part's texts."""
        found = self.people.all_logits(state, task, part).double().softmax(1)
        values: Floats = found.numpy()
        return values

    def labels(self, task: str, part: str = "test") -> Any:
        return self.people.tasks[task].parts[part].label.numpy()

    def judge(self, state: names.State, task: str) -> tuple[Reliability, float, Any]:
        """Reliability (10 bins), accuracy and predicted classes on the test texts."""
        p, truth = self.probabilities(state, task), self.labels(task)
        return reliability(p, truth), float((p.argmax(1) == truth).mean()), p.argmax(1)

    def scores(
        self, states: Mapping[str, names.State]
    ) -> tuple[dict[str, float], dict[str, dict[str, float | None]]]:
        """Means over the tasks, each with its own state, and the tasks' own values.

        kept: share of what fine-tuning gained; NaN (None) where it gained nothing.
        """
        found: dict[str, dict[str, float]] = {}
        for task, state in states.items():
            diagram, accuracy, guess = self.judge(state, task)
            _, before, _ = judged(self.setting, self.seed, task, "pretrained")
            _, after, tuned = judged(self.setting, self.seed, task, "fine-tuned")
            found[task] = {
                "accuracy": accuracy,
                "ece": diagram.ece,
                "overconfidence": diagram.overconfidence,
                "agreement": float((guess == tuned).mean()),
                "kept": (accuracy - before) / (after - before) if after > before else math.nan,
            }
        keys = next(iter(found.values())).keys()
        means = {key: sum(row[key] for row in found.values()) / len(found) for key in keys}
        rows = {
            task: {key: value if math.isfinite(value) else None for key, value in row.items()}
            for task, row in found.items()
        }
        return means, rows


@functools.lru_cache(maxsize=2)
def bed(setting: Setting, seed: int) -> Bed:
    """The testbed of a seed."""
    return Bed(setting, seed, names.untrained(seed, setting.population))


@functools.lru_cache(maxsize=32)
def judged(
    setting: Setting, seed: int, task: str, model: Literal["pretrained", "fine-tuned"]
) -> tuple[Reliability, float, Any]:
    """`Bed.judge` of the two models that every arm is held against."""
    found = bed(setting, seed)
    state = found.base if model == "pretrained" else found.finetuned(task)
    return found.judge(state, task)


def _path(of: Bed, what: str, *content: Any) -> Any:
    rows = [of.people.tasks[task].parts["train"].rows.tolist() for task in of.tasks]
    held = [names_texts.pool(task, of.setting.pool).key for task in of.tasks]
    key = hashlib.blake2b(
        repr((VERSION, names.VERSION, held, of.setting, of.seed, rows, what, content)).encode(),
        digest_size=8,
    )
    name = f"{what}-seed{of.seed}-{key.hexdigest()}.safetensors"
    return cache_root() / "testbeds" / "grafts" / name


def _state(of: Bed, task: str, optimiser: Optimiser) -> names.State:
    from safetensors.torch import load_file, save_file

    path = _path(of, f"{task}-{optimiser}")
    if not path.is_file():
        state = _tune(of, task, optimiser)
        with files.writing(path) as aside:
            save_file(state, aside)
    return dict(load_file(path))


def _tune(of: Bed, task: str, optimiser: Optimiser) -> dict[str, Tensor]:
    """Plain SGD (or AdamW); a multitask model sees its tasks in turn."""
    setting, people = of.setting, of.people
    chosen = of.tasks if task == MULTITASK else (task,)
    steps = setting.multitask_steps if task == MULTITASK else setting.steps
    state = {name: t.clone().requires_grad_() for name, t in people.base.items()}
    rule: torch.optim.Optimizer = (
        torch.optim.SGD(state.values(), setting.lr)
        if optimiser == "sgd"
        else torch.optim.AdamW(state.values(), setting.adamw_lr)
    )
    batches = {one: people.batches(one, "train", setting.batch, "graft", task) for one in chosen}
    for step in range(steps):
        one = chosen[step % len(chosen)]
        index = next(batches[one])
        part = people.tasks[one].parts["train"]
        rule.zero_grad()
        logits = people.logits(state, one, part.inputs(index))
        functional.cross_entropy(logits, part.label[index]).backward()  # type: ignore[no-untyped-call]
        rule.step()
    return {name: t.detach() for name, t in state.items()}


def _mask(of: Bed, task: str, sparsity: float, model: str, signs: Signs) -> FittedMask:
    """Learn a mask, or find one that was learned: the whole fit is kept as its last checkpoint."""
    setting = of.setting
    graft = of.graft(model, sparsity, setting.patch)
    if signs == "dropped":
        graft = Unsigned(**{f: getattr(graft, f) for f in graft.__dataclass_fields__})
    part = of.people.tasks[task].parts
    truth = of.labels(task, "valid")

    def batches(step: int) -> Iterator[Tensor]:
        order = rng.generator(of.seed, "graft mask", task, step).permutation(len(part["train"]))
        return iter(torch.split(torch.from_numpy(order[: setting.mask_rows]), 64))

    def score(module: Any) -> float:
        guess = of.people.tasks[task].head(module(*part["valid"].inputs())).argmax(1).numpy()
        return float((guess == truth).mean())

    return fit_mask(
        graft,
        of.people.model,
        lambda module, index: of.loss(task, index, module),
        batches,
        score,
        setting.mask,
        checkpoint=_path(of, f"mask-{task}", sparsity, model, signs),
    )


def random_delta(graft: Graft, mask: Tensor, seed: int) -> Tensor:
    """(D,) the graft's mask over values of a random direction, as large in norm per tensor."""
    generator = rng.torch_generator(seed, "random delta")
    made = torch.zeros_like(graft.delta)
    for name, start in graft.layout.starts.items():
        stop = start + int(np.prod(graft.layout.shapes[name], dtype=np.int64))
        here = mask[start:stop]
        kept = graft.delta[start:stop][here]
        drawn = torch.randn(len(kept), generator=generator)
        scale = kept.norm() / drawn.norm().clamp(min=1e-12)
        made[start:stop][here] = drawn * scale
    return made


def with_delta(graft: Graft, delta: Tensor) -> dict[str, Tensor]:
    """The base plus other values for all coordinates."""
    return replace(graft, delta=delta).state(torch.ones_like(delta))


@dataclass(frozen=True)
class Regions:
    """Regions of the tasks of one multitask model, rows and columns in the order of the tasks.

    overlap: O_ij. whole: (T,) accuracy of the model. purged: (T, T) accuracy on task j with
    region i set back to the base. grafted: (T, T) accuracy on task j with region i alone.
    """

    overlap: Tensor
    whole: Tensor
    purged: Tensor
    grafted: Tensor

    @property
    def drop(self) -> Tensor:
        """(T, T) what purging region i costs task j."""
        return self.whole - self.purged

    def to_dict(self) -> dict[str, Any]:
        """Plain lists."""
        names_ = ("overlap", "whole", "purged", "grafted")
        return {name: getattr(self, name).tolist() for name in names_}


def regions(of: Bed, sparsity: float) -> Regions:
    """Learn a region for every task within the multitask model, and take each out."""
    state, tasks, cut = of.finetuned(MULTITASK), of.tasks, []
    for task in tasks:
        graft, found = of.learned(task, sparsity, MULTITASK)
        cut.append(graft.sparse(found.mask, task))

    def accuracies(one: names.State) -> list[float]:
        return [of.judge(one, task)[1] for task in tasks]

    return Regions(
        overlap(cut),
        torch.tensor(accuracies(state)),
        torch.tensor([accuracies(region.purge(state, of.base)) for region in cut]),
        torch.tensor([accuracies(region.apply(of.base)) for region in cut]),
    )


def off_diagonal(matrix: Tensor) -> float:
    """Mean of what is not on the diagonal."""
    outside = ~torch.eye(len(matrix), dtype=torch.bool)
    return float(matrix[outside].mean())
