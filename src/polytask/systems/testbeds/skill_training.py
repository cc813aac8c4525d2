"""A small causal transformer that learns LEGO's skills under any mixture, round by round.

All arms of a seed start from the same weights: a model that has been taught to look variables up
(`lego.recall`), which a pretrained language model can do and a fresh small one needs thousands of
steps for. Each token also sees the four before it through a short causal convolution, without which
the look-up did not form within the budget at all. The n-th item of a skill is the same in every arm
of a seed; losses that the mixture follows and the accuracies that arms are judged by come from
different items, and none of them is ever trained on.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from polytask import files
from polytask.data.embedded.sources import cache_root
from polytask.mixture import LearnedGraph, OnlineMixture, SkillGraph, learn_graph
from polytask.mixture.plan import whole_rows
from polytask.models.masks import MaskSpec
from polytask.models.transformer import Transformer, TransformerConfig
from polytask.rng import derive, generator
from polytask.systems.testbeds import lego

GraphMode = Literal["pairwise", "single"]
Shares = Mapping[str, float]
_BLOCK = 512  # items generated at a time


@dataclass(frozen=True)
class Bed:
    """How much of everything."""

    chain: int = 3
    dim: int = 64
    layers: int = 3
    heads: int = 4
    batch: int = 32
    lr: float = 2e-3  # of the graph's runs; arms have their own
    warmup: int = 50
    context: float = 0.1  # loss weight of tokens that are not the answer
    start_steps: int = 700
    start_lr: float = 3e-3
    round_steps: int = 100
    graph_steps: int = 1200  # as long as an arm, as the authors did; 300 showed no edge
    graph_mode: GraphMode = "pairwise"
    graph_seed: int = 100  # never judged on
    valid: int = 200  # items per skill whose losses the mixture follows
    test: int = 500  # items per skill that judge

    @property
    def names(self) -> tuple[str, ...]:
        """The skills: 'depth 1' asks for the chain's first variable."""
        return tuple(f"depth {s + 1}" for s in range(self.chain))


class ChainModel(nn.Module):
    """Word embeddings, a short causal convolution, transformer blocks, scores over words."""

    def __init__(self, bed: Bed, seed: int) -> None:
        super().__init__()
        size = TransformerConfig(dim=bed.dim, layers=bed.layers, heads=bed.heads)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, "chain-model"))
            self.embedding = nn.Embedding(len(lego.WORDS), bed.dim)
            nn.init.normal_(self.embedding.weight, std=0.5)
            self.near = nn.Conv1d(bed.dim, bed.dim, lego.CLAUSE, groups=bed.dim)
            self.trunk = Transformer(size)
            self.output = nn.Linear(bed.dim, len(lego.WORDS), bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """(items, length) ids -> (items, length, words) scores of each next word."""
        x = self.embedding(ids)
        past = F.pad(x.transpose(1, 2), (lego.CLAUSE - 1, 0))
        x = x + self.near(past).transpose(1, 2)
        scores: Tensor = self.output(self.trunk(x, MaskSpec(causal=True)))
        return scores


class Items:
    """Items of every skill, the n-th always the same."""

    def __init__(self, bed: Bed, seed: int, part: str) -> None:
        self.bed, self.seed, self.part = bed, seed, part
        self._used = [0] * bed.chain
        self._blocks: dict[tuple[int, int], lego.Ints] = {}

    def take(self, skill: int, count: int) -> lego.Ints:
        """The next `count` items of a skill; none for 0."""
        first = self._used[skill]
        self._used[skill] += count
        numbers = range(first // _BLOCK, -(-(first + count) // _BLOCK))
        found = [self._block(skill, number) for number in numbers]
        if not found:
            return np.empty((0, lego.length(self.bed.chain)), dtype=np.int64)
        begin = first - numbers[0] * _BLOCK
        return np.concatenate(found)[begin : begin + count]

    def _block(self, skill: int, number: int) -> lego.Ints:
        key = (skill, number)
        if key not in self._blocks:
            for old in [k for k in self._blocks if k[0] == skill and k[1] < number]:
                del self._blocks[old]
            r = generator(self.seed, "lego", self.part, skill, number)
            self._blocks[key] = lego.items(r, skill, _BLOCK, self.bed.chain)
        return self._blocks[key]

    def round(self, shares: Shares, count: int, number: int, exact: bool = True) -> Tensor:
        """(count, length) items of one round, shuffled: whole counts by the shares, or (not
        `exact`) a skill drawn by chance for every item."""
        weights = np.array([shares.get(name, 0.0) for name in self.bed.names])
        r = generator(self.seed, "order", self.part, number)
        if exact:
            room = np.full(len(weights), count)
            counts = whole_rows(weights * count, room, count)
        else:
            counts = r.multinomial(count, weights / weights.sum())
        drawn = np.concatenate([self.take(s, int(n)) for s, n in enumerate(counts)])
        return torch.from_numpy(drawn[r.permutation(count)])


def train(
    model: ChainModel,
    batches: Tensor,
    bed: Bed,
    lr: float,
    optimizer: torch.optim.Optimizer,
    step: int,
    answers: Tensor | None = None,
) -> None:
    """One pass over items in order, `bed.batch` a step. `answers`: columns with weight 1; None: the
    last. `step` counts the optimiser's steps so far, for the warm-up."""
    columns = torch.tensor([batches.shape[1] - 1]) if answers is None else answers
    weight = torch.full((batches.shape[1] - 1,), bed.context)
    weight[columns - 1] = 1.0  # the score of a word is made at the word before it
    weight /= weight.sum()
    model.train()
    for number, ids in enumerate(torch.split(batches, bed.batch)):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + number + 1) / bed.warmup)
        scores = model(ids[:, :-1])
        loss = F.cross_entropy(scores.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward((loss.view(len(ids), -1) @ weight).mean())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def judge(model: ChainModel, items: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
    """Per skill the mean loss of the answer, and its accuracy among the two bits."""
    model.eval()
    found = {}
    for name, ids in items.items():
        scores = model(ids[:, :-1])[:, -1]
        right = ids[:, -1]
        loss = float(F.cross_entropy(scores, right))
        bit = scores[:, lego.ZERO : lego.ONE + 1].argmax(1) + lego.ZERO
        found[name] = (loss, float((bit == right).float().mean()))
    return found


def judged_items(bed: Bed, seed: int, part: str, count: int) -> dict[str, Tensor]:
    """Items of every skill that nobody trains on."""
    source = Items(bed, seed, part)
    return {name: torch.from_numpy(source.take(s, count)) for s, name in enumerate(bed.names)}


@dataclass
class Curve:
    """What a run was and became; one entry per round, the first before training."""

    steps: list[int] = field(default_factory=list)
    shares: list[dict[str, float]] = field(default_factory=list)
    valid: list[dict[str, float]] = field(default_factory=list)  # losses
    accuracy: list[dict[str, float]] = field(default_factory=list)  # on test items
    loss: list[dict[str, float]] = field(default_factory=list)

    def mean(self, number: int = -1) -> float:
        """Mean accuracy over skills after a round."""
        values = list(self.accuracy[number].values())
        return sum(values) / len(values)

    def area(self, until: int | None = None, table: str = "accuracy") -> float:
        """Mean over steps of the mean over skills, by the trapezoid rule, up to step `until`."""
        rows: list[dict[str, float]] = getattr(self, table)
        steps = np.array([s for s in self.steps if until is None or s <= until], dtype=np.float64)
        height = np.array([np.mean(list(row.values())) for row in rows[: len(steps)]])
        if len(steps) == 1:
            return float(height[0])
        return float(np.trapezoid(height, steps) / (steps[-1] - steps[0]))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        names = ("steps", "shares", "valid", "accuracy", "loss")
        return {name: getattr(self, name) for name in names}


def run(
    bed: Bed,
    seed: int,
    steps: int,
    lr: float,
    mixture: OnlineMixture | Shares,
    exact: bool = True,
) -> Curve:
    """Train from the common start, in rounds; a mixture that learns is told validation losses after
    each. `steps` must be whole rounds."""
    if steps % bed.round_steps:
        raise ValueError(f"{steps} steps are not whole rounds of {bed.round_steps}")
    model = start(bed, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    items, curve = Items(bed, seed, "train"), Curve()
    valid = judged_items(bed, seed, "valid", bed.valid)
    test = judged_items(bed, seed, "test", bed.test)

    def look(step: int) -> None:
        losses = {name: loss for name, (loss, _) in judge(model, valid).items()}
        found = judge(model, test)
        curve.steps.append(step)
        curve.valid.append(losses)
        curve.loss.append({name: loss for name, (loss, _) in found.items()})
        curve.accuracy.append({name: right for name, (_, right) in found.items()})
        if isinstance(mixture, OnlineMixture):
            mixture.update(losses, step)

    look(0)
    for number, step in enumerate(range(0, steps, bed.round_steps)):
        shares = mixture.shares if isinstance(mixture, OnlineMixture) else mixture
        curve.shares.append(dict(shares))
        drawn = items.round(shares, bed.round_steps * bed.batch, number, exact)
        train(model, drawn, bed, lr, optimizer, step)
        look(step + bed.round_steps)
    return curve


def start(bed: Bed, seed: int) -> ChainModel:
    """The common start of a seed's arms; trained once and kept in the cache."""
    model = ChainModel(bed, seed)
    if not bed.start_steps:
        return model
    path = _folder() / f"start-seed{seed}-{_key(bed, seed)}.safetensors"
    if path.is_file():
        model.load_state_dict(load_file(path))
        return model
    optimizer = torch.optim.Adam(model.parameters(), lr=bed.start_lr)
    r = generator(seed, "lego", "recall")
    ids, answers = lego.recall(r, bed.start_steps * bed.batch, bed.chain)
    train(model, torch.from_numpy(ids), bed, bed.start_lr, optimizer, 0, torch.from_numpy(answers))
    with files.writing(path) as aside:
        save_file(model.state_dict(), aside)
    return model


def learned_graph(bed: Bed, say: Callable[[str], None] | None = None) -> LearnedGraph:
    """The skill graph of `bed.graph_seed`, learned once and kept in the cache."""
    seed = bed.graph_seed
    path = _folder() / f"graph-{_key(bed, seed)}.json"
    valid = judged_items(bed, seed, "valid", bed.valid)

    def train_fn(shares: Shares, steps: int) -> dict[str, float]:
        model = start(bed, seed)
        if steps:
            optimizer = torch.optim.Adam(model.parameters(), lr=bed.lr)
            drawn = Items(bed, seed, "graph").round(shares, steps * bed.batch, 0)
            train(model, drawn, bed, bed.lr, optimizer, 0)
        return {name: loss for name, (loss, _) in judge(model, valid).items()}

    return learn_graph(train_fn, bed.names, bed.graph_steps, bed.graph_mode, cache=path, say=say)


def graph_by_hand(bed: Bed) -> SkillGraph:
    """What the generator implies: each depth needs the one before it."""
    A = np.eye(bed.chain) + np.eye(bed.chain, k=1)
    return SkillGraph.by_hand(A, bed.names)


def _folder() -> Path:
    return cache_root() / "testbeds" / "lego"


def _key(bed: Bed, seed: int) -> str:
    """Changes with the setting and with the code that decides the result."""
    from polytask.mixture import graph_learning
    from polytask.models import transformer

    settings = json.dumps([str(bed), seed, torch.__version__])
    digest = hashlib.blake2b(settings.encode())
    for module in (lego, transformer, graph_learning, sys.modules[__name__]):
        digest.update(inspect.getsource(module).encode())
    return digest.hexdigest()[:16]
