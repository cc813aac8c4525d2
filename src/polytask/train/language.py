"""Pretraining a language model on pairs, with a budget in tokens seen.

    until the budget is spent:
        pairs = draw(step)                    # a pure function of the step; cut to what is left
        batch = model.feed(pairs)             # laid out for the architecture
        loss  = mean of objective(model, batch)
        clip, set the learning rate by the share of the budget that is spent, update
        book the pairs' tokens by source; tell `on_step`

`LanguageObjective` also goes into `polytask.train.Trainer`, which adds checkpoints, resuming,
stages and processes; this loop is for studies that train dozens of small models in memory.

What is seen (inputs and targets, padding left out) is the budget, not what is trained on: an
objective that scores a seventh of the tokens would else get seven times the computing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from polytask import rng
from polytask.configs import Config
from polytask.errors import NonFiniteError
from polytask.models.batch import Terms
from polytask.models.feed import Architecture, LanguageBatch
from polytask.objectives.pairs import Pairs
from polytask.objectives.tokens import per_pair
from polytask.train.config import Schedule, StageConfig, TrainConfig
from polytask.train.optim import build_optimizer, clip_, scale_at, set_scale
from polytask.train.stages import Leg

Draw = Callable[[int], Pairs]
_PARTS = 10_000  # the schedule's resolution: shares of the budget


class Scorable(Protocol):
    """What the objective and the loop ask of a model: ours, or a hub model in its wrapper."""

    @property
    def architecture(self) -> Architecture: ...

    def feed(
        self, pairs: Pairs, width: int | tuple[int, int] | None = None, pack: bool = True
    ) -> LanguageBatch: ...

    def token_losses(
        self, batch: LanguageBatch, smoothing: float = 0.0
    ) -> tuple[Tensor, Tensor]: ...


class LanguageObjective(Config):
    """Cross-entropy of target tokens, with z-loss and label smoothing.

    mean: 'token' divides by the (weighted) number of target tokens of the batch; 'sequence' gives
    every pair the same say, however long its target; 'sum' adds a pair's tokens up (T5X, for
    optimisers that do not mind the scale).
    """

    mean: Literal["token", "sequence", "sum"] = "token"
    z_loss: float = Field(1e-4, ge=0, description="weight of log(Z)^2")
    smoothing: float = Field(0.0, ge=0, lt=1, description="label smoothing")
    by_source: bool = Field(False, description="count means within each source, not over all")

    def __call__(self, model: Any, batch: LanguageBatch) -> Terms:
        """One value per pair and term, so that the mean over pairs is what `mean` says."""
        nll, z = model.token_losses(batch, self.smoothing)
        pairs = len(batch.seen)
        task = batch.source
        group = task if self.by_source else torch.zeros_like(task)
        terms = {"nll": per_pair(nll, batch.pair, pairs, group, self.mean, batch.weight)}
        if self.z_loss:
            each = self.z_loss * z
            terms["z"] = per_pair(each, batch.pair, pairs, group, self.mean, batch.weight)
        row = torch.arange(pairs, device=nll.device)
        return Terms(terms, dict.fromkeys(terms, task), dict.fromkeys(terms, row))


class PretrainConfig(Config):
    """How long and how; `tokens` is the budget of tokens seen."""

    tokens: PositiveInt
    lr: PositiveFloat = 1e-3
    schedule: Schedule = "constant"
    warmup: float = Field(0.02, ge=0, lt=1, description="share of the budget")
    floor: float = Field(0.0, ge=0, le=1)
    weight_decay: NonNegativeFloat = 0.0
    betas: tuple[float, float] = (0.9, 0.98)
    clip: NonNegativeFloat = 1.0
    precision: Literal["fp32", "bf16"] = "fp32"
    objective: LanguageObjective = LanguageObjective()
    width: int | tuple[int, int] | None = Field(None, description="slots of a packed row")
    pack: bool = True
    seed: int = 0


@dataclass
class Pretrained:
    """What a run did. `losses` holds (tokens seen before the step, mean of the terms) per step."""

    steps: int = 0
    tokens: int = 0  # seen: inputs and targets
    trained: int = 0  # target tokens that a loss was computed on
    pairs: int = 0
    slots: int = 0  # places computed, padding and bos included
    seconds: float = 0.0
    by_source: dict[int, int] = field(default_factory=dict)  # tokens seen
    losses: list[tuple[int, float]] = field(default_factory=list)

    @property
    def efficiency(self) -> float:
        """Share of the places computed that held a token."""
        return self.tokens / self.slots if self.slots else 1.0


OnStep = Callable[[Pretrained, Terms], None]


def pretrain(
    model: nn.Module, draw: Draw, config: PretrainConfig, on_step: OnStep | None = None
) -> Pretrained:
    """Train `model` (a `LanguageModel`, or a hub model in `HubLanguageModel`) until it has seen
    `config.tokens` tokens.

    draw: step -> pairs. The last batch is cut to the pairs that fit, so that no more than the
    budget is seen, and less than one pair of it is left over.
    on_step: told after every step of the totals and the step's terms (detached).

    Raises `NonFiniteError` before an update with a loss or gradient that is not finite.
    """
    options = _as_train_config(config)
    optimizer = build_optimizer(model, options.plan()[0], options)
    leg = Leg(0, 0, _PARTS, options.plan()[0])
    done = Pretrained()
    started = time.perf_counter()
    model.train()
    device = next(model.parameters()).device
    while (left := config.tokens - done.tokens) > 0:
        pairs = _fitting(draw(done.steps), left)
        if pairs is None:
            break
        torch.manual_seed(rng.derive(config.seed, "step", done.steps))  # dropout
        set_scale(optimizer, scale_at(_PARTS * done.tokens // config.tokens, leg, options))
        terms, batch = train_step(model, pairs, config, optimizer, device, done.steps)
        done.losses.append((done.tokens, float(mean_loss(terms))))
        _book(done, batch)
        done.seconds = time.perf_counter() - started
        if on_step is not None:
            on_step(done, terms)
    model.eval()
    return done


def train_step(
    model: Any,
    pairs: Pairs,
    config: PretrainConfig,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    step: int,
) -> tuple[Terms, LanguageBatch]:
    """One update; returns the terms, detached, and the batch."""
    batch = model.feed(pairs, config.width, config.pack)
    if device.type != "cpu":
        batch = batch.to(device)
    wide = torch.autocast(device.type, torch.bfloat16) if config.precision == "bf16" else None
    with wide or nullcontext():
        terms = config.objective(model, batch)
    loss = mean_loss(terms)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
    norm = clip_(
        [g for g in gradients if g is not None], torch.ones((), device=device), config.clip
    )
    if not bool(torch.isfinite(loss.detach() + norm)):
        raise NonFiniteError(
            f"step {step + 1}: the loss is {float(loss.detach())} and the gradient's norm "
            f"{float(norm)}. The update was not made; lower the learning rate {config.lr}"
        )
    optimizer.step()
    values = {name: value.detach() for name, value in terms.value.items()}
    return Terms(values, terms.task, terms.row), batch


def mean_loss(terms: Terms) -> Tensor:
    """The mean over pairs of all terms together."""
    return torch.stack([value.mean() for value in terms.value.values()]).sum()


def _fitting(pairs: Pairs, left: int) -> Pairs | None:
    """As many of the pairs, from the first, as `left` tokens allow; None: not even one."""
    if pairs.tokens <= left:
        return pairs if len(pairs) else None
    total = np.cumsum(pairs.input_lengths + pairs.target_lengths)
    count = int(np.searchsorted(total, left, "right"))
    return pairs.take(np.arange(count)) if count else None


def _book(done: Pretrained, batch: LanguageBatch) -> None:
    done.steps += 1
    done.tokens += batch.tokens
    done.trained += len(batch.label)
    done.pairs += batch.rows
    done.slots += batch.slots
    source, (owner, tokens) = batch.booked()
    for name in np.unique(source).tolist():
        add = int(tokens[owner == name].sum())
        done.by_source[name] = done.by_source.get(name, 0) + add


def _as_train_config(config: PretrainConfig) -> TrainConfig:
    stage = StageConfig(steps=_PARTS, warmup=max(0, math.ceil(config.warmup * _PARTS)))
    return TrainConfig(
        stages=(stage,),
        lr=config.lr,
        schedule=config.schedule,
        floor=config.floor,
        weight_decay=config.weight_decay,
        betas=config.betas,
        clip=config.clip,
        warmup=0,
    )
