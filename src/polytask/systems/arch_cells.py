"""Cells of the study of architectures and objectives: training, held-out curves, adaptation.

A cell is an architecture (cd causal decoder, nd prefix decoder, ed encoder-decoder) with an
objective (flm full language modelling, plm prefix language modelling, mlm T5's span corruption).
All cells see the same number of tokens a step: chunks of span corruption are shorter by as much as
sentinels and ends add, as in the paper (512 + 114 = 626). Streams of text differ by objective, so
that what a model is adapted on is not what it was pretrained on.

Wang, Roberts et al. 2022, arXiv 2204.05832.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import torch
from torch import nn

from polytask import rng
from polytask.errors import ConfigError, suggestion
from polytask.models.convert import convert
from polytask.models.feed import Architecture
from polytask.models.lm import LanguageModel, LanguageModelConfig
from polytask.objectives.denoising import Specials, full_lm, prefix_lm, span_corruption
from polytask.objectives.pairs import Pairs
from polytask.objectives.ul2 import SpanCorruption, chunk_size_for
from polytask.systems.testbeds.prose import Part, Prose
from polytask.train.language import Draw as Draw
from polytask.train.language import LanguageObjective, PretrainConfig, Pretrained, pretrain

Objective = Literal["flm", "plm", "mlm"]
SHORT: dict[str, Architecture] = {"cd": "causal", "nd": "prefix", "ed": "encdec"}
# What the paper trains: full language modelling needs no prefix, prefix modelling needs one.
CELLS = ("cd:flm", "nd:plm", "ed:plm", "cd:mlm", "nd:mlm", "ed:mlm")


@dataclass(frozen=True)
class Scale:
    """How large models and batches are."""

    dim: int = 64
    layers: int = 2
    heads: int = 4
    vocab: int = 1024
    rows: int = 16  # pairs a step
    length: int = 64  # tokens seen a pair
    held_out: int = 96  # pairs of every held-out score
    every: int = 25  # steps between points of a curve
    t5_like: bool = False

    @property
    def step_tokens(self) -> int:
        return self.rows * self.length

    def config(self, architecture: Architecture, vocab: int) -> LanguageModelConfig:
        sizes = {"dim": self.dim, "layers": self.layers, "heads": self.heads, "vocab_size": vocab}
        make = LanguageModelConfig.t5_like if self.t5_like else LanguageModelConfig
        return make(architecture=architecture, **sizes)


@dataclass(frozen=True)
class Cell:
    """An architecture and an objective, by their names in the paper: 'nd:mlm'."""

    name: str
    architecture: Architecture
    objective: Objective

    @classmethod
    def of(cls, name: str) -> Cell:
        """`ConfigError` with the nearest name where the grid has no such cell."""
        if name not in CELLS:
            raise ConfigError(f"there is no cell '{name}'.{suggestion(name, CELLS)}")
        short, _, objective = name.partition(":")
        kind: Objective = next(o for o in get_args(Objective) if o == objective)
        return cls(name, SHORT[short], kind)


def span_chunk(scale: Scale, text: Prose) -> int:
    """Tokens of a chunk whose corrupted input and target together have `scale.length`."""
    denoiser = SpanCorruption(3.0, 0.15)
    size = chunk_size_for(denoiser, scale.length, context=scale.length, balanced=False)
    return size.length


def pairs_of(
    text: Prose, objective: Objective, scale: Scale, chunks: np.ndarray, seed: int, rows: np.ndarray
) -> Pairs:
    """Chunks under an objective; no mode tokens, ends only where T5 has them."""
    specials = text.specials
    if objective == "flm":
        return full_lm(chunks)
    if objective == "plm":
        return prefix_lm(chunks, Specials(), seed, rows)
    return span_corruption(chunks, Specials(specials.sentinels, specials.end), seed, rows)


def chunk_length(text: Prose, objective: Objective, scale: Scale) -> int:
    """Tokens of text in a chunk."""
    return span_chunk(scale, text) if objective == "mlm" else scale.length


def draw(text: Prose, objective: Objective, scale: Scale, seed: int) -> Draw:
    """step -> pairs, the same for every model that trains on this objective with this seed."""
    length = chunk_length(text, objective, scale)
    stream = rng.derive(seed, "text of", objective)

    def at(step: int) -> Pairs:
        rows = np.arange(scale.rows) + scale.rows * step
        chunks = text.windows("train", length, stream, rows)
        return pairs_of(text, objective, scale, chunks, stream, rows)

    return at


def held_out(text: Prose, objective: Objective, scale: Scale, part: Part = "valid") -> Pairs:
    """Pairs of held-out text; splits and spans are the same for every model and seed."""
    blocks = text.blocks(part, chunk_length(text, objective, scale), scale.held_out)
    return pairs_of(text, objective, scale, blocks, 0, np.arange(len(blocks)))


@torch.no_grad()
def score(model: LanguageModel, pairs: Pairs, rows: int = 48) -> dict[str, float]:
    """Mean -log p of target tokens in nats: all of them, and those that belong to the text."""
    training = model.training
    model.eval()
    total, count = np.zeros(2), np.zeros(2)
    for first in range(0, len(pairs), rows):
        part = pairs.take(np.arange(first, min(first + rows, len(pairs))))
        batch = model.feed(part)
        nll = model.token_losses(batch)[0].double().numpy()
        own = part.is_original[batch.target.numpy()]
        total += nll.sum(), nll[own].sum()
        count += len(nll), own.sum()
    model.train(training)
    return {"loss": float(total[0] / count[0]), "text": float(total[1] / count[1])}


@dataclass
class Curve:
    """Held-out loss over training; the first point is before the first step."""

    tokens: list[int] = field(default_factory=list)  # seen
    loss: list[float] = field(default_factory=list)
    text: list[float] = field(default_factory=list)  # the same over tokens of the text alone

    def at(self, tokens: float) -> float:
        """The loss after so many tokens, interpolated."""
        return float(np.interp(tokens, self.tokens, self.loss))

    def reaches(self, loss: float) -> float | None:
        """Tokens after which the curve is first at or below `loss`, interpolated between points;
        None where it never is."""
        for place, value in enumerate(self.loss):
            if value <= loss:
                if place == 0:
                    return float(self.tokens[0])
                before, after = self.loss[place - 1], value
                share = (before - loss) / (before - after)
                first, last = self.tokens[place - 1], self.tokens[place]
                return first + share * (last - first)
        return None


def speed_up(adapted: Curve, scratch: Curve) -> tuple[float, bool]:
    """How many times the tokens of the adaptation training from scratch needs for the same loss.

    Second: whether it got there; if not, the number is a lower bound (all that scratch was given).
    """
    spent = adapted.tokens[-1]
    reached = scratch.reaches(adapted.loss[-1])
    if reached is None:
        return scratch.tokens[-1] / spent, False
    return reached / spent, True


def train(
    model: LanguageModel,
    text: Prose,
    objective: Objective,
    scale: Scale,
    seed: int,
    steps: int,
    lr: float,
    part: Part = "valid",
) -> tuple[Curve, Pretrained]:
    """Train in place with a constant rate after a short rise, so that a curve does not know where
    it will end; score held-out text every `scale.every` steps."""
    judged, curve = held_out(text, objective, scale, part), Curve()

    def look(tokens: int) -> None:
        found = score(model, judged)
        curve.tokens.append(tokens)
        curve.loss.append(found["loss"])
        curve.text.append(found["text"])

    def on_step(done: Pretrained, _: object) -> None:
        if done.steps % scale.every == 0 or done.steps == steps:
            look(done.tokens)

    look(0)
    settings = PretrainConfig(
        tokens=steps * scale.step_tokens,
        lr=lr,
        warmup=min(0.5, 10 / steps),  # ten steps, however long the run
        objective=LanguageObjective(),
        seed=seed,
    )
    source = draw(text, objective, scale, seed)
    return curve, pretrain(model, source, settings, on_step)


def fresh(text: Prose, architecture: Architecture, scale: Scale, seed: int) -> LanguageModel:
    """A model that has seen nothing."""
    return LanguageModel(scale.config(architecture, vocabulary(text)), seed)


def vocabulary(text: Prose) -> int:
    """Ids of the codec, specials included."""
    return int(text.codec.tokenizer.get_vocab_size())


def rebuilt(model: LanguageModel, seed: int) -> LanguageModel:
    """The model with its embeddings and with all blocks and norms as they were never trained."""
    new = LanguageModel(model.config, rng.derive(seed, "blocks anew"))
    with torch.no_grad():
        new.embedding.weight.copy_(model.embedding.weight)
    return new


def switched(model: LanguageModel, to: Literal["causal", "prefix"]) -> LanguageModel:
    """A copy under another mask (`polytask.models.convert`)."""
    return convert(model, to)


def parameters(model: nn.Module) -> int:
    """Numbers that train."""
    return sum(p.numel() for p in model.parameters())


def mean(values: Sequence[float]) -> float:
    """Plain mean."""
    return float(np.mean(values))
