"""Population E: experts of a truly pretrained encoder, judged through the names of the classes.

MiniLM (22.7 million real weights) makes a text a unit vector; a class is the vector of its name,
and logits are 20 times the cosine, as CLIP's are. An expert is MiniLM with its upper layers tuned
on one task; the heads are frozen, so models of one base can be merged and judged on all tasks.

    bed = population(seed=20)
    state = merged somehow from bed.base and bed.experts
    bed.accuracy(state, "languages"), bed.mean_accuracy(state)
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from polytask import files, rng
from polytask.data.embedded.sources import cache_root
from polytask.systems.testbeds import names_encoder as encoder
from polytask.systems.testbeds import names_texts as texts
from polytask.systems.testbeds.names_texts import Texts

VERSION = 1  # raise it when the way experts are trained changes
SCALE = 20.0  # logits are this times the cosine
State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Setting:
    """How much of everything; part of the key under which experts are cached."""

    tasks: tuple[str, ...]
    pool: tuple[tuple[str, int], ...]  # texts a seed draws from, by split
    train: int  # labelled texts of an expert
    valid: int  # labelled texts on which a scale may be tuned
    steps: int = 100
    batch: int = 32
    lr: float = 2e-4


FULL = Setting(tuple(texts.SPECS), tuple(texts.POOL.items()), train=800, valid=200)
SMOKE = Setting(("languages", "library"), (("train", 96), ("valid", 32), ("test", 64)), 64, 32, 4)


class NameHead(nn.Module):
    """Logits (n, classes): `SCALE` times the cosine of features and class names. Frozen."""

    def __init__(self, names: Tensor) -> None:
        super().__init__()
        self.register_buffer("names", names)

    def forward(self, features: Tensor) -> Tensor:
        return SCALE * functional.linear(features, self.get_buffer("names"))


@dataclass(frozen=True)
class NameTask:
    """A task of one seed: train, valid and test texts; 'unlabelled' is as large as 'test'."""

    name: str
    classes: tuple[str, ...]
    head: NameHead
    parts: Mapping[str, Texts]


@dataclass(frozen=True)
class Population:
    """Base, experts and tasks of one seed.

    Attributes:
        model: the module whose parameters are merged; called as model(states, mask).
        base: its pretrained state dict (32 tensors, float32).
        experts: task name -> state dict, each tuned on that task from the base.
        tasks: task name -> texts and head.
    """

    seed: int
    model: encoder.UpperLayers
    base: State
    experts: Mapping[str, State]
    tasks: Mapping[str, NameTask]

    @property
    def heads(self) -> dict[str, NameHead]:
        return {name: task.head for name, task in self.tasks.items()}

    def logits(self, state: State, task: str, inputs: encoder.Inputs) -> Tensor:
        """(n, classes) of the model with the tensors of `state`; differentiable in them."""
        found: Tensor = self.tasks[task].head(functional_call(self.model, dict(state), inputs))
        return found

    @torch.no_grad()
    def all_logits(self, state: State, task: str, part: str = "test", batch: int = 128) -> Tensor:
        """(n, classes) of a whole part, in its order."""
        data = self.tasks[task].parts[part]
        lengths = data.offsets[data.rows + 1] - data.offsets[data.rows]
        order = torch.argsort(lengths, stable=True)  # less padding
        found = torch.empty(len(data), len(self.tasks[task].classes))
        for chosen in torch.split(order, batch):
            found[chosen] = self.logits(state, task, data.inputs(chosen))
        return found

    def accuracy(self, state: State, task: str, part: str = "test") -> float:
        """Share of a part's texts whose class is named right."""
        label = self.tasks[task].parts[part].label
        return float((self.all_logits(state, task, part).argmax(1) == label).float().mean())

    def accuracies(self, state: State, part: str = "test") -> dict[str, float]:
        """By task."""
        return {task: self.accuracy(state, task, part) for task in self.tasks}

    def mean_accuracy(self, state: State, part: str = "test") -> float:
        """Mean of the tasks' accuracies."""
        found = self.accuracies(state, part)
        return sum(found.values()) / len(found)

    def batches(self, task: str, part: str, size: int, *stream: rng.Key) -> Iterator[Tensor]:
        """Endless batches of indices (size,) into a part: one random order after the other."""
        return endless(len(self.tasks[task].parts[part]), size, self.seed, task, part, *stream)


def endless(rows: int, size: int, seed: int, *stream: rng.Key) -> Iterator[Tensor]:
    """Batches (size,) cut from permutations of `rows` put one after another."""
    left, epoch = torch.empty(0, dtype=torch.long), 0
    while True:
        while len(left) < size:
            order = rng.generator(seed, "names", *stream, epoch).permutation(rows)
            left, epoch = torch.cat((left, torch.from_numpy(order))), epoch + 1
        yield left[:size]
        left = left[size:]


def population(seed: int, smoke: bool = False) -> Population:
    """The population of a seed; experts that were trained before come from the cache.

    Raises:
        DataError: a package that holds the weights or a task's texts is not here (with every way
            to get it).
    """
    return _population(seed, SMOKE if smoke else FULL)


@functools.lru_cache(maxsize=2)
def _population(seed: int, setting: Setting) -> Population:
    bed = untrained(seed, setting)
    experts = {name: _expert(bed, name, setting) for name in setting.tasks}
    return Population(seed, bed.model, bed.base, experts, bed.tasks)


def untrained(seed: int, setting: Setting) -> Population:
    """Base and tasks of a seed without experts, for those who train in another way."""
    tasks = {name: _task(name, setting, seed) for name in setting.tasks}
    model = encoder.UpperLayers().requires_grad_(False)
    base = encoder.upper_weights()
    model.load_state_dict(base)
    return Population(seed, model, base, {}, tasks)


def _task(name: str, setting: Setting, seed: int) -> NameTask:
    """A seed's own draw from the pool; the test pool gives two halves, judged and unlabelled."""
    found = texts.pool(name, setting.pool)
    parts = {}
    for split, data in found.splits.items():
        order = torch.from_numpy(rng.generator(seed, "names", name, split).permutation(len(data)))
        half = len(order) // 2
        if split == "test":
            parts["test"], parts["unlabelled"] = (
                data.take(order[:half]),
                data.take(order[half : 2 * half]),
            )
        else:
            wanted = setting.train if split == "train" else setting.valid
            parts[split] = data.take(order[:wanted])
    return NameTask(name, found.classes, NameHead(found.head), parts)


def _expert(bed: Population, task: str, setting: Setting) -> dict[str, Tensor]:
    from safetensors.torch import load_file, save_file

    data = bed.tasks[task].parts["train"]
    held = texts.pool(task, setting.pool).key
    content = repr((VERSION, held, setting, task, bed.seed, data.rows.tolist()))
    key = hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
    path = cache_root() / "testbeds" / "names" / f"expert-{task}-seed{bed.seed}-{key}.safetensors"
    if not path.is_file():
        state = tune(bed, task, setting)
        with files.writing(path) as aside:
            save_file(state, aside)
    return dict(load_file(path))


def tune(bed: Population, task: str, setting: Setting) -> dict[str, Tensor]:
    """The base trained on one task: AdamW on the cross entropy of the task's head."""
    state = {name: t.clone().requires_grad_() for name, t in bed.base.items()}
    optimiser = torch.optim.AdamW(state.values(), lr=setting.lr, fused=True)
    data = bed.tasks[task].parts["train"]
    for _, index in zip(range(setting.steps), bed.batches(task, "train", setting.batch, "expert")):
        optimiser.zero_grad()
        logits = bed.logits(state, task, data.inputs(index))
        torch.autograd.backward(functional.cross_entropy(logits, data.label[index]))
        optimiser.step()
    return {name: t.detach() for name, t in state.items()}
