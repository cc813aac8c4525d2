"""UL2's mixture of denoisers: seven ways to spoil a text, each announced by a mode token.

Tay, Dehghani et al. 2022 (arXiv 2205.05131). R, regular: short spans, 15 %. S, sequential: prefix
LM. X, extreme: long spans or half of the text. One model learns all of them; at inference the user
picks the mode that is like the task (R to classify, S to continue, X to write freely).

The objective's listing samples denoisers uniformly; public pipelines, after the paper's section
4.5, give R 0.4, X 0.4 and S 0.2, split evenly inside a mode, and that is the default here. A
mixture samples by example, and so does its loss: averaged over tokens, X with its long targets
would dominate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from polytask.errors import ConfigError, suggestion
from polytask.objectives import draws
from polytask.objectives.denoising import (
    Chunks,
    Rounding,
    Specials,
    Split,
    full_lm,
    prefix_lm,
    span_corruption,
    span_sizes,
)
from polytask.objectives.pairs import Ints, Pairs

_FLOOR, _FEW = 12.0, 0.3  # from this mean span or rate on, a denoiser is extreme


class Denoiser(Protocol):
    """A way to make pairs from chunks, as data."""

    @property
    def name(self) -> str: ...
    @property
    def mode(self) -> str | None: ...

    def __call__(
        self, chunks: Chunks, specials: Specials, seed: int, rows: npt.ArrayLike
    ) -> Pairs: ...

    def lengths(self, length: int) -> tuple[int, int]:
        """The longest input and target that a chunk of `length` tokens can give, without mode
        token and ends."""


@dataclass(frozen=True)
class SpanCorruption:
    """`span_corruption` with these settings; `mode` None: R, or X from a mean span of 12 or a rate
    of 0.3 on, '' for no mode token."""

    mean_span: float = 3.0
    rate: float = 0.15
    spans: int | None = None
    mode: str | None = None
    rounding: Rounding = "float32"
    input_end: bool = True

    def __post_init__(self) -> None:
        if self.mode is None:
            extreme = self.mean_span >= _FLOOR or self.rate >= _FEW
            object.__setattr__(self, "mode", "X" if extreme else "R")
        span_sizes(1 << 20, self.mean_span, self.rate, self.spans, self.rounding)

    @property
    def name(self) -> str:
        return f"{self.mode or 'spans'} ({self.mean_span:g}, {self.rate:g})"

    def __call__(self, chunks: Chunks, specials: Specials, seed: int, rows: npt.ArrayLike) -> Pairs:
        return span_corruption(
            chunks,
            specials,
            seed,
            rows,
            self.mean_span,
            self.rate,
            self.spans,
            self.mode or None,
            self.input_end,
            self.rounding,
        )

    def lengths(self, length: int) -> tuple[int, int]:
        sizes = span_sizes(length, self.mean_span, self.rate, self.spans, self.rounding)
        return length - sizes.noise + sizes.spans, sizes.noise + sizes.spans


@dataclass(frozen=True)
class PrefixLM:
    """`prefix_lm` with these settings; `mode` '' for no mode token."""

    rate: Split = 0.25
    around: bool = False
    mode: str = "S"
    input_end: bool = True

    @property
    def name(self) -> str:
        rate = self.rate if isinstance(self.rate, str) else f"{self.rate:g}"
        return f"{self.mode or 'prefix'} ({'around ' if self.around else ''}{rate})"

    def __call__(self, chunks: Chunks, specials: Specials, seed: int, rows: npt.ArrayLike) -> Pairs:
        mode = self.mode or None
        return prefix_lm(chunks, specials, seed, rows, self.rate, self.around, mode, self.input_end)

    def lengths(self, length: int) -> tuple[int, int]:
        if self.rate == "uniform":
            return length - 1, length - 1
        if self.around:
            least = max(1, int(np.round((1 - 2 * self.rate) * (length - 1))))
            return length - 1, length - least
        noise = span_sizes(length, length, self.rate, 1).noise
        return length - noise, noise


@dataclass(frozen=True)
class FullLM:
    """`full_lm`; a mode token, if one is named, is the whole input."""

    mode: str = ""

    @property
    def name(self) -> str:
        return f"{self.mode} (full)" if self.mode else "full"

    def __call__(self, chunks: Chunks, specials: Specials, seed: int, rows: npt.ArrayLike) -> Pairs:
        del seed, rows
        return full_lm(chunks, specials, self.mode or None)

    def lengths(self, length: int) -> tuple[int, int]:
        return 0, length


@dataclass(frozen=True)
class ChunkSize:
    """N, and the longest input and target it gives (mode token and ends included)."""

    length: int
    inputs: int
    targets: int


def chunk_size_for(
    denoiser: Denoiser,
    inputs_len: int,
    targets_len: int | None = None,
    modes: bool = False,
    balanced: bool = True,
    context: int | None = None,
) -> ChunkSize:
    """The longest chunk whose input fits `inputs_len` after corruption: (N, inputs, targets).

    `modes` reserves one place for the mode token. At rate 0.5, T5's helper takes one token less
    where the target would be longer than the input, and so does this (`balanced`); the target's
    length is then that of the shorter chunk. Unlike the helper, one span is the least. `context`
    bounds input and target together: what a decoder reads as one sequence.

    `ConfigError` if the target needs more than `targets_len`, or not even 2 tokens fit.
    """
    end = 1 if getattr(denoiser, "input_end", False) else 0
    frame = (1 if modes and denoiser.mode else 0) + end

    def sizes(length: int) -> ChunkSize:
        source, target = denoiser.lengths(length)
        closing = 0 if isinstance(denoiser, FullLM) else 1
        return ChunkSize(length, source + frame, target + closing)

    def fits(size: ChunkSize) -> bool:
        if isinstance(denoiser, FullLM):  # no input to bound: the whole length is target
            return size.inputs + size.targets <= (context or inputs_len)
        together = denoiser.lengths(size.length)
        whole = context is None or _together(denoiser, size, together) <= context
        return size.inputs <= inputs_len and whole

    if not fits(sizes(2)):
        raise ConfigError(
            f"no chunk fits: the denoiser {denoiser.name} needs inputs of at least "
            f"{sizes(2).inputs} tokens for 2 tokens of text, not {inputs_len}"
        )
    low, high = 2, 4
    while fits(sizes(high)):
        low, high = high, 2 * high
    while high - low > 1:  # lengths never shrink as N grows
        middle = (low + high) // 2
        low, high = (middle, high) if fits(sizes(middle)) else (low, middle)
    found = sizes(low)
    if (
        balanced
        and getattr(denoiser, "rate", None) == 0.5
        and found.targets > found.inputs - (frame - end)
    ):
        found = sizes(low - 1) if low > 2 else found
    if targets_len is not None and found.targets > targets_len:
        raise ConfigError(
            f"the denoiser {denoiser.name} turns chunks of {found.length} tokens into targets of "
            f"{found.targets}, but targets_len is {targets_len}; it needs at least that many, "
            "or shorter inputs"
        )
    return found


def _together(denoiser: Denoiser, size: ChunkSize, lengths: tuple[int, int]) -> int:
    """Tokens of the longest input and its own target: a prefix LM's split parts one chunk."""
    frame = size.inputs - lengths[0] + size.targets - lengths[1]
    return (size.length if isinstance(denoiser, PrefixLM) else sum(lengths)) + frame


def rates_of(
    denoisers: Sequence[Denoiser], shares: Mapping[str, float] | None = None
) -> tuple[float, ...]:
    """A rate per denoiser: each mode's share, split evenly inside the mode."""
    chosen = dict(shares or {"R": 0.4, "X": 0.4, "S": 0.2})
    missing = {d.mode or "" for d in denoisers} - set(chosen)
    if missing:
        raise ConfigError(f"no share is given for the modes {', '.join(sorted(missing))}")
    number = {mode: sum((d.mode or "") == mode for d in denoisers) for mode in chosen}
    return tuple(chosen[d.mode or ""] / number[d.mode or ""] for d in denoisers)


@dataclass(frozen=True)
class MixtureOfDenoisers:
    """Denoisers and how often each is drawn: example number r always draws the same one.

    `rates` need not sum to 1. Sources of chunks and sizes are the caller's: `make` asks for chunks.
    """

    denoisers: tuple[Denoiser, ...]
    rates: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.denoisers:
            raise ConfigError("a mixture needs at least one denoiser")
        rates = self.rates or (1.0,) * len(self.denoisers)
        if len(rates) != len(self.denoisers):
            raise ConfigError(f"{len(rates)} rates for {len(self.denoisers)} denoisers")
        if min(rates) < 0 or not np.isfinite(rates).all() or sum(rates) <= 0:
            raise ConfigError(f"rates are not negative and sum to more than 0, not {rates}")
        object.__setattr__(self, "rates", tuple(float(r) / sum(rates) for r in rates))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(d.name for d in self.denoisers)

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes that occur, in order."""
        return tuple(dict.fromkeys(d.mode for d in self.denoisers if d.mode))

    def draw(self, seed: int, rows: npt.ArrayLike) -> Ints:
        """(n,) which denoiser makes the examples of these numbers."""
        u = draws.uniform(seed, "denoiser", rows, 1)[:, 0]
        edges = np.cumsum(self.rates)
        edges[np.flatnonzero(self.rates)[-1] :] = 1.0
        return np.searchsorted(edges, u, side="right").astype(np.int64)

    def make(
        self,
        chunks: Callable[[int, Ints], Chunks],
        specials: Specials,
        seed: int,
        rows: npt.ArrayLike,
    ) -> Pairs:
        """The examples of these numbers (n,), in order; `source` is the number of the denoiser.

        `chunks(denoiser, rows)` gives that denoiser's chunks (m, N), all of the length it needs.
        """
        numbers = np.asarray(rows, np.int64).reshape(-1)
        which = self.draw(seed, numbers)
        parts, places = [], []
        for at, denoiser in enumerate(self.denoisers):
            mine = np.flatnonzero(which == at)
            if len(mine):
                made = denoiser(chunks(at, numbers[mine]), specials, seed, numbers[mine])
                parts.append(replace(made, source=np.full(len(mine), at, np.int64)))
                places.append(mine)
        joined = Pairs.join(parts)
        return joined.take(np.argsort(np.concatenate(places))) if parts else joined

    def without(self, mode: str) -> MixtureOfDenoisers:
        """The same mixture less one mode; the others keep their proportions."""
        kept = [(d, r) for d, r in zip(self.denoisers, self.rates) if d.mode != mode]
        if len(kept) == len(self.denoisers):
            raise ConfigError(f"no denoiser has the mode '{mode}'.{suggestion(mode, self.modes)}")
        return MixtureOfDenoisers(tuple(d for d, _ in kept), tuple(r for _, r in kept))


Preset = Literal["ul2-20b", "ul2r", "decoder"]
MODE_TOKENS = {"R": "[R]", "S": "[S]", "X": "[X]"}
RELEASED_TOKENS = {"R": "[NLU]", "S": "[S2S]", "X": "[NLG]"}  # of the public UL2-20B checkpoint


def ul2_mixture(
    preset: Preset = "ul2-20b",
    s_rate: Split = 0.25,
    spans: tuple[float, float, float] = (3, 8, 64),
    shares: Mapping[str, float] | None = None,
) -> MixtureOfDenoisers:
    """The mixtures of the papers.

    ul2-20b  R (3, .15), (8, .15); S; X (3, .5), (8, .5), (64, .15), (64, .5): 0.4, 0.2, 0.4.
    decoder  the same without an end between input and target: a decoder reads them as one.
    ul2r     what continues the training of a finished decoder (Tay et al. 2022, arXiv 2210.11399):
             half of it prefix LM with random splits, a quarter R (3, .15), a quarter X (32, .15)
             and (3, .5); also without an end between.

    `spans` are the three mean spans of ul2-20b and decoder, to be scaled down with the chunks.
    """
    if preset == "ul2r":
        tails: tuple[Denoiser, ...] = (
            SpanCorruption(3, 0.15, mode="R", input_end=False),
            PrefixLM("uniform", input_end=False),
            SpanCorruption(32, 0.15, mode="X", input_end=False),
            SpanCorruption(3, 0.5, mode="X", input_end=False),
        )
        return MixtureOfDenoisers(
            tails, rates_of(tails, shares or {"R": 0.25, "S": 0.5, "X": 0.25})
        )
    if preset not in ("ul2-20b", "decoder"):
        raise ConfigError(
            f"unknown preset '{preset}'.{suggestion(preset, ('ul2-20b', 'ul2r', 'decoder'))}"
        )
    end = preset == "ul2-20b"
    short, middle, long = spans
    denoisers: tuple[Denoiser, ...] = (
        SpanCorruption(short, 0.15, mode="R", input_end=end),
        SpanCorruption(middle, 0.15, mode="R", input_end=end),
        PrefixLM(s_rate, input_end=end),
        SpanCorruption(short, 0.5, mode="X", input_end=end),
        SpanCorruption(middle, 0.5, mode="X", input_end=end),
        SpanCorruption(long, 0.15, mode="X", input_end=end),
        SpanCorruption(long, 0.5, mode="X", input_end=end),
    )
    return MixtureOfDenoisers(denoisers, rates_of(denoisers, shares))


def restored(input_ids: Sequence[int], target_ids: Sequence[int], specials: Specials) -> list[int]:
    """The chunk that a pair was made of: sentinels of the input replaced by their spans.

    A prefix or full LM's pair is the input followed by the target. Modes and ends are dropped.
    """
    frame = {*specials.modes.values(), specials.end}
    marks = set(specials.sentinels)
    spans: dict[int, list[int]] = {}
    loose: list[int] = []
    here = loose
    for token in map(int, target_ids):
        if token in marks:
            here = spans.setdefault(token, [])
        elif token not in frame:
            here.append(token)
    out: list[int] = []
    for token in map(int, input_ids):
        if token in marks:
            out += spans.pop(token, [])
        elif token not in frame:
            out.append(token)
    return out + loose
