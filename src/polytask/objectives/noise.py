"""Objectives that give back the whole chunk: BERT's masked tokens and BART's noise.

Devlin et al. 2019 (arXiv 1810.04805): 15 % of the tokens are chosen, of these 80 % become the mask,
10 % a random token, 10 % stay; only chosen tokens are scored. Lewis et al. 2020 (arXiv 1910.13461):
sentences are shuffled, spans with lengths drawn from Poisson(3) become one mask each (a length of 0
inserts a mask), tokens are deleted, the text is rotated; the target is the text itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import exp

import numpy as np
import numpy.typing as npt

from polytask.errors import ConfigError
from polytask.objectives import draws
from polytask.objectives.denoising import Chunks, Specials, checked, framed, numbered
from polytask.objectives.pairs import Bools, Ids, Ints, Pairs, offsets_of

_MORE = 8  # spans of length 0 that a row may have beside one span a token


def masked_lm(
    chunks: Chunks,
    specials: Specials,
    seed: int,
    rows: npt.ArrayLike,
    vocab_size: int,
    rate: float = 0.15,
    mask: float = 0.8,
    random: float = 0.1,
    first_random: int = 0,
) -> Pairs:
    """Input: the chunk with noise. Target: the chunk, weight 1 at chosen tokens and 0 elsewhere.

    k = clip(round(rate N), 1, N) tokens of every chunk (n, N >= 1) are chosen. Random tokens are
    uniform over `first_random` .. vocab_size - 1 (special tokens usually come first). Errors:
    `ConfigError` for rates outside [0, 1], shares above 1 together, or a vocabulary without mask.
    """
    body = checked(chunks, 1)
    n, length = body.shape
    if not 0 < rate <= 1:
        raise ConfigError(f"the rate of masked tokens lies in (0, 1], not {rate}")
    if min(mask, random) < 0 or mask + random > 1:
        raise ConfigError(
            f"the shares that are masked ({mask}) and replaced ({random}) lie in [0, 1], "
            "also summed"
        )
    if mask > 0 and specials.mask is None:
        raise ConfigError("the vocabulary has no mask token; add one, or mask with share 0")
    if not 0 <= first_random < vocab_size:
        raise ConfigError(f"no random token from {first_random} below {vocab_size}")
    numbers = numbered(rows, n)
    k = min(max(int(np.round(rate * length)), 1), length)
    where = draws.choose(seed, "masked", numbers, length, k)
    fate = draws.uniform(seed, "fate", numbers, k)
    span = vocab_size - first_random
    other = first_random + (draws.uniform(seed, "other", numbers, k) * span).astype(np.int64)
    new = np.take_along_axis(body, where, axis=1).astype(np.int64)
    new = np.where(fate < mask + random, other, new)
    if specials.mask is not None:
        new = np.where(fate < mask, specials.mask, new)
    spoilt, weight = body.copy(), np.zeros((n, length), np.float32)
    np.put_along_axis(spoilt, where, new.astype(np.int32), axis=1)
    np.put_along_axis(weight, where, np.float32(1), axis=1)
    offsets = offsets_of(np.full(n, length))
    return Pairs(spoilt.reshape(-1), offsets, body.reshape(-1), offsets, weight.reshape(-1))


@dataclass(frozen=True)
class BartNoise:
    """Which noises, in the order in which they are applied; rates of 0 leave one out.

    permute  put the sentences of a chunk into a random order; `stops` are the ids that end one.
    infill   share of the tokens that spans take out, round(infill N) of them exactly; `span` is the
             mean of the Poisson distribution, the last span is cut to fit.
    delete   share of the remaining tokens that vanish without a mark.
    rotate   probability that a chunk begins at a random token of its own.
    """

    infill: float = 0.3
    span: float = 3.0
    permute: bool = True
    stops: tuple[int, ...] = ()
    delete: float = 0.0
    rotate: float = 0.0

    def __post_init__(self) -> None:
        for name in ("infill", "delete", "rotate"):
            value = getattr(self, name)
            if not 0 <= value <= 1 or (name != "rotate" and value == 1):
                raise ConfigError(f"{name} is a share from 0 up to 1, not {value}")
        if self.span < 1:
            raise ConfigError(f"spans have a mean length of at least 1, not {self.span}")
        if self.permute and not self.stops:
            raise ConfigError(
                "to put sentences into another order, name the tokens that end one (stops), or "
                "say permute: false"
            )


def bart_noise(
    chunks: Chunks,
    specials: Specials,
    seed: int,
    rows: npt.ArrayLike,
    noise: BartNoise,
    input_end: bool = True,
) -> Pairs:
    """Input: the chunk under `noise`; target: the chunk; ends after both (after the input with
    `input_end` alone). Chunks (n, N >= 2)."""
    body = checked(chunks, 2)
    n, length = body.shape
    numbers = numbered(rows, n)
    if noise.infill and specials.mask is None:
        raise ConfigError("text infilling needs a mask token in the vocabulary")
    spoilt = permute_sentences(body, noise.stops, seed, numbers) if noise.permute else body
    flat, lengths = spoilt.reshape(-1), np.full(n, length)
    if noise.infill:
        assert specials.mask is not None
        flat, lengths = infill(spoilt, specials.mask, noise.infill, noise.span, seed, numbers)
    if noise.delete:
        flat, lengths = _delete(flat, lengths, noise.delete, seed, numbers)
    if noise.rotate:
        flat = _rotate(flat, lengths, noise.rotate, seed, numbers)
    tail = () if specials.end is None else (specials.end,)
    inputs, input_offsets = framed(flat, lengths, (), tail if input_end else ())
    targets, target_offsets = framed(body.reshape(-1), np.full(n, length), (), tail)
    marks: Bools = np.ones(n * length, np.bool_)
    original, _ = framed(marks, np.full(n, length), (), (False,) * len(tail))
    return Pairs(inputs, input_offsets, targets, target_offsets, original=original)


def permute_sentences(body: Ids, stops: Sequence[int], seed: int, rows: Ints) -> Ids:
    """(n, N) with the sentences of each row in a random order, all orders equally likely. A
    sentence ends with one of `stops`; what follows the last one is a sentence too."""
    n, length = body.shape
    ended = np.isin(body, np.array(stops))
    number = np.zeros((n, length), np.int64)
    number[:, 1:] = np.cumsum(ended[:, :-1], axis=1)
    key = draws.words(seed, "sentences", rows, int(number.max(initial=0)) + 1)
    order = np.argsort(np.take_along_axis(key, number, axis=1), axis=1, kind="stable")
    return np.take_along_axis(body, order, axis=1)


def infill(
    body: Ids, mask: int, rate: float, span: float, seed: int, rows: Ints
) -> tuple[Ids, Ints]:
    """Spans of Poisson lengths replaced by one mask each: flat ids and (n,) lengths.

    k = round(rate N) tokens go. Lengths are drawn until they reach k, the last is cut. Spans and
    kept tokens then stand in an order drawn uniformly, so two spans may be neighbours. There are at
    most k + 8 spans, so a row grows by 8 at most; drawn lengths of 0 and 1 would have to exceed
    this about once in 10,000 rows at a mean of 1, and far more rarely at 3.
    """
    n, length = body.shape
    k = min(int(np.round(rate * length)), length)
    kept = length - k
    if k == 0 or n == 0:
        return body.reshape(-1), np.full(n, length)
    lengths = _poisson(span, draws.uniform(seed, "spans", rows, k + _MORE))
    lengths[:, -1] = k  # should the draws not reach k, the last one does
    total = np.cumsum(lengths, axis=1)
    used = np.argmax(total >= k, axis=1) + 1  # (n,) spans
    lengths = np.diff(np.minimum(total, k), axis=1, prepend=0)
    most = int(used.max())
    items = kept + used  # kept tokens and masks of each row
    keys = draws.words(seed, "order", rows, kept + most) >> np.uint64(1)
    keys[np.arange(kept + most) >= items[:, None]] = np.uint64(2**63)
    rank = np.argsort(np.argsort(keys, axis=1, kind="stable"), axis=1, kind="stable")
    inside = np.arange(kept + most) < items[:, None]
    masked = (rank < used[:, None]) & inside
    span_of = np.cumsum(masked, axis=1) - masked  # spans before each item
    gone = np.concatenate([np.zeros((n, 1), np.int64), np.cumsum(lengths, axis=1)], axis=1)
    place = np.cumsum(~masked, axis=1) - ~masked + np.take_along_axis(gone, span_of, axis=1)
    tokens = np.take_along_axis(body, np.minimum(place, length - 1), axis=1)
    out = np.where(masked, np.int32(mask), tokens)
    return out[inside], items


def _poisson(mean: float, u: npt.NDArray[np.float64]) -> Ints:
    """Poisson numbers from uniform ones, by inversion; beyond 1 - 1e-15 the largest counts."""
    probability, table, total = exp(-mean), [], 0.0
    for count in range(1, int(20 * mean) + 50):
        total += probability
        table.append(total)
        probability *= mean / count
    return np.searchsorted(np.array(table[:-1]), u, side="right").astype(np.int64)


def _delete(flat: Ids, lengths: Ints, rate: float, seed: int, rows: Ints) -> tuple[Ids, Ints]:
    """round(rate * length) tokens of each row gone, any as likely as any other; one is left."""
    gone = np.minimum(np.round(rate * lengths).astype(np.int64), np.maximum(lengths - 1, 0))
    width = int(lengths.max(initial=1))
    keys = draws.words(seed, "delete", rows, width) >> np.uint64(1)
    inside = np.arange(width) < lengths[:, None]
    keys[~inside] = np.uint64(2**63)
    rank = np.argsort(np.argsort(keys, axis=1, kind="stable"), axis=1, kind="stable")
    kept = (rank >= gone[:, None]) & inside
    return flat[kept[inside]], lengths - gone


def _rotate(flat: Ids, lengths: Ints, chance: float, seed: int, rows: Ints) -> Ids:
    turned = draws.uniform(seed, "rotated", rows, 1)[:, 0] < chance
    first = np.where(turned, draws.below(seed, "first", rows, np.maximum(lengths, 1)), 0)
    offsets = offsets_of(lengths)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    inside = np.arange(len(flat)) - offsets[:-1][owner]
    return flat[offsets[:-1][owner] + (inside + first[owner]) % lengths[owner]]


@dataclass(frozen=True)
class MaskedLM:
    """`masked_lm` as a denoiser of a mixture. Random tokens are drawn from `Specials.words`."""

    rate: float = 0.15
    mask: float = 0.8
    random: float = 0.1
    mode: str = field(default="", init=False)

    @property
    def name(self) -> str:
        return f"masked ({self.rate:g})"

    def __call__(self, chunks: Chunks, specials: Specials, seed: int, rows: npt.ArrayLike) -> Pairs:
        if specials.words is None:
            raise ConfigError("masked tokens need to know which ids are words (Specials.words)")
        first, last = specials.words
        return masked_lm(
            chunks, specials, seed, rows, last, self.rate, self.mask, self.random, first
        )

    def lengths(self, length: int) -> tuple[int, int]:
        return length, length


@dataclass(frozen=True)
class Bart:
    """`bart_noise` as a denoiser of a mixture; `input_end` as there."""

    noise: BartNoise = BartNoise(permute=False)
    input_end: bool = True
    mode: str = field(default="", init=False)

    @property
    def name(self) -> str:
        return f"BART ({self.noise.infill:g})"

    def __call__(self, chunks: Chunks, specials: Specials, seed: int, rows: npt.ArrayLike) -> Pairs:
        return bart_noise(chunks, specials, seed, rows, self.noise, self.input_end)

    def lengths(self, length: int) -> tuple[int, int]:
        return length + (_MORE if self.noise.infill else 0), length
