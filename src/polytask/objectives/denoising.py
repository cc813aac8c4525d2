"""Language objectives as pure functions of token chunks: full LM, prefix LM, span corruption.

    chunk          t0 t1 t2 t3 t4 t5 t6 t7
    full_lm        -                            -> t0 t1 t2 t3 t4 t5 t6 t7
    prefix_lm      [S] t0 t1 t2 t3 t4 t5 </s>   -> t6 t7 </s>
    span corruption [R] t0 <0> t3 t4 <1> </s>   -> <0> t1 t2 <1> t5 t6 t7 </s>

A function takes a batch of chunks of one length (n, N), a seed and the number of each chunk in its
stream (n,), and gives `Pairs`; all work is done on whole arrays. The same chunk with the same
number gives the same pair in every batch. The mixture of them is `polytask.objectives.ul2`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from polytask.errors import ConfigError
from polytask.objectives import draws
from polytask.objectives.pairs import Bools, Ids, Ints, Pairs, offsets_of

Chunks = npt.NDArray[np.integer[Any]]
Rounding = Literal["float32", "float64"]
Split = float | Literal["uniform"]


@dataclass(frozen=True)
class Specials:
    """Ids that objectives write: sentinels by number, the end of a text, modes by name, the mask.
    `words` are the ids [first, last) that a random token is drawn from.

    `end` None writes no end. `modes` maps a denoiser's mode ('R', 'S', 'X') to its token; a mode
    that is not in it is an error, an empty mapping writes no mode tokens at all (an ablation).
    """

    sentinels: tuple[int, ...] = ()
    end: int | None = None
    modes: Mapping[str, int] = field(default_factory=dict)
    mask: int | None = None
    words: tuple[int, int] | None = None

    def mode(self, name: str | None) -> tuple[int, ...]:
        """The tokens that announce a mode: one or none."""
        if name is None or not self.modes:
            return ()
        if name not in self.modes:
            raise ConfigError(
                f"the vocabulary has no token for the mode '{name}' (it has: "
                f"{', '.join(self.modes)}); add it with polytask.models.extend_vocabulary"
            )
        return (self.modes[name],)


@dataclass(frozen=True)
class SpanSizes:
    """What one chunk of `length` tokens becomes: exact numbers, the same for every chunk."""

    length: int
    noise: int  # k, tokens taken out
    spans: int  # s


def span_sizes(
    length: int,
    mean_span: float,
    rate: float,
    spans: int | None = None,
    rounding: Rounding = "float32",
) -> SpanSizes:
    """k = clip(round(rate N), 1, N - 1) noise tokens in s = max(1, round(k / mean_span)) spans, or
    in `spans`; both round half to even.

    T5 multiplies rate and N in float32: at rate 0.15 and N = 190, 350 or 390 its k is one more than
    in float64. 'float32' is T5's own; 'float64' what most other implementations do.

    `ConfigError` for N < 2, a rate outside (0, 1), a mean span below 1, or more spans than there
    are noise or kept tokens to fill and part them.
    """
    if not 0 < rate < 1:
        raise ConfigError(f"a corruption rate lies between 0 and 1, not {rate}")
    if mean_span < 1:
        raise ConfigError(f"a mean span has at least 1 token, not {mean_span}")
    if spans is not None and spans < 1:
        raise ConfigError(f"a number of spans is at least 1, not {spans}")
    _check_length(length)
    product: Any = np.float32(rate) * np.float32(length) if rounding == "float32" else rate * length
    noise = min(max(int(np.round(product)), 1), length - 1)
    if spans is None:
        ratio: Any = noise / mean_span
        if rounding == "float32":
            ratio = np.float32(noise) / np.float32(mean_span)
        count = max(1, int(np.round(ratio)))
    else:
        count = spans
    if count > min(noise, length - noise):
        raise ConfigError(
            f"{count} spans cannot be cut from a chunk of {length} tokens, {noise} of them noise "
            f"(mean span {mean_span}, rate {rate}): each span needs a noise token and a kept "
            "token before it. Raise the mean span, lower the rate, or use longer chunks"
        )
    return SpanSizes(length, noise, count)


def full_lm(chunks: Chunks, specials: Specials | None = None, mode: str | None = None) -> Pairs:
    """Nothing given, every token predicted. Chunks (n, N >= 1). A mode token, if there is one,
    is the whole input; no end is written, since a chunk need not end where a text does."""
    body = checked(chunks, 1)
    n, length = body.shape
    head = (specials or Specials()).mode(mode)
    return Pairs(
        np.tile(np.array(head, np.int32), n),
        offsets_of(np.full(n, len(head))),
        body.reshape(-1),
        offsets_of(np.full(n, length)),
    )


def prefix_lengths(length: int, rate: Split, around: bool, seed: int, rows: npt.ArrayLike) -> Ints:
    """(n,) tokens in the prefix of each chunk; see `prefix_lm`."""
    _check_length(length)
    numbers = np.asarray(rows, np.int64)
    if rate == "uniform":
        least = 1
    else:
        if not 0 < rate < 1:
            raise ConfigError(f"the rate of a prefix LM is 'uniform' or in (0, 1), not {rate}")
        if not around:
            return np.full(len(numbers), length - span_sizes(length, length, rate, 1).noise)
        if rate > 0.5:
            raise ConfigError(
                f"a target that makes up {rate} of a chunk on average cannot be drawn around its "
                "mean: the prefix would be empty; use a rate of at most 0.5"
            )
        least = max(1, int(np.round((1 - 2 * rate) * (length - 1))))
    return least + draws.below(seed, "prefix", numbers, length - least)


def prefix_lm(
    chunks: Chunks,
    specials: Specials,
    seed: int,
    rows: npt.ArrayLike,
    rate: Split = "uniform",
    around: bool = False,
    mode: str | None = None,
    input_end: bool = True,
) -> Pairs:
    """The beginning of a chunk is given, its end is predicted; no sentinel is used.

    rate    'uniform': the prefix has 1 .. N - 1 tokens, each as likely (T5's `prefix_lm`; half of
            all tokens are targets); a number: the last round(rate N) tokens are the target (UL2's
            text: one span of a quarter, always at the end).
    around  draw the prefix uniformly from round((1 - 2 rate) (N - 1)) .. N - 1 instead, so that
            `rate` is the mean (what UL2's listing calls for, in other implementations of T5).
    mode    announced by its token before the input (`specials.modes`).
    input_end  write `specials.end` after the input too, as encoder-decoders expect.
    """
    body = checked(chunks, 2)
    n, length = body.shape
    prefix = prefix_lengths(length, rate, around, seed, numbered(rows, n))
    first = np.arange(length) < prefix[:, None]
    return _framed(body[first], prefix, body[~first], length - prefix, specials, mode, input_end)


def noise_mask(
    length: int,
    seed: int,
    rows: npt.ArrayLike,
    mean_span: float = 3.0,
    rate: float = 0.15,
    spans: int | None = None,
    rounding: Rounding = "float32",
) -> Bools:
    """(n, N) bool, True where T5's span corruption takes a token out.

    Kept and noise tokens are each cut into s positive parts, all cuts equally likely, and laid down
    in turn: kept, noise, kept, noise. So the first part is always kept, the last is always noise,
    and no two noise spans touch (Raffel et al. 2020, arXiv 1910.10683, `random_spans_noise_mask`).
    """
    sizes = span_sizes(length, mean_span, rate, spans, rounding)
    numbers = np.asarray(rows, np.int64).reshape(-1)
    return _mask(sizes, *_spans(sizes, seed, numbers)).reshape(len(numbers), length)


def span_corruption(
    chunks: Chunks,
    specials: Specials,
    seed: int,
    rows: npt.ArrayLike,
    mean_span: float = 3.0,
    rate: float = 0.15,
    spans: int | None = None,
    mode: str | None = None,
    input_end: bool = True,
    rounding: Rounding = "float32",
) -> Pairs:
    """Spans of a chunk become sentinels, and the target spells them out (T5, UL2's R and X).

    Input: mode token, kept tokens with sentinel i for span i, end. Target: sentinel 0, span 0,
    sentinel 1, span 1, ..., end. Both lengths are the same for all chunks: N - k + s and k + s,
    plus the frame. Chunks (n, N >= 2); errors as in `span_sizes`, and if sentinels run out.
    """
    body = checked(chunks, 2)
    n, length = body.shape
    sizes = span_sizes(length, mean_span, rate, spans, rounding)
    k, s = sizes.noise, sizes.spans
    if s > len(specials.sentinels):
        raise ConfigError(
            f"a chunk of {length} tokens has {s} spans (mean span {mean_span}, rate {rate}), but "
            f"the vocabulary has {len(specials.sentinels)} sentinels; add sentinels, shorten the "
            "chunks or raise the mean span"
        )
    begins, ends = _spans(sizes, seed, numbered(rows, n))
    mask = _mask(sizes, begins, ends)
    begin = (begins + (np.arange(n) * length)[:, None]).reshape(-1)
    sentinels = np.tile(np.array(specials.sentinels[:s], np.int32), n)
    # In the input a sentinel stands for the first token of its span, the rest goes. In the target
    # it stands for the kept token before the span: there always is one, and it belongs to no other.
    source, shown = body.flatten(), ~mask
    source[begin] = sentinels
    shown[begin] = True
    target, spelt = body.flatten(), mask.copy()
    target[begin - 1] = sentinels
    spelt[begin - 1] = True
    return _framed(
        source[shown],
        np.full(n, length - k + s),
        target[spelt],
        np.full(n, k + s),
        specials,
        mode,
        input_end,
        mask[spelt],
    )


def _spans(sizes: SpanSizes, seed: int, rows: Ints) -> tuple[Ints, Ints]:
    """Where the noise spans of each chunk begin and end, (n, s) each."""
    k, s, kept = sizes.noise, sizes.spans, sizes.length - sizes.noise
    kept_cuts = draws.choose(seed, "kept", rows, kept - 1, s - 1) + 1
    noise_cuts = draws.choose(seed, "noise", rows, k - 1, s - 1) + 1
    edge = np.ones((len(rows), 1), np.int64)
    kept_until = np.concatenate([kept_cuts, edge * kept], axis=1)
    noise_before = np.concatenate([edge * 0, noise_cuts], axis=1)
    noise_until = np.concatenate([noise_cuts, edge * k], axis=1)
    return kept_until + noise_before, kept_until + noise_until


def _mask(sizes: SpanSizes, begins: Ints, ends: Ints) -> Bools:
    """(n * N,) bool, True inside spans."""
    n = len(begins)
    turns = np.zeros(n * sizes.length + 1, np.int8)
    base = (np.arange(n) * sizes.length)[:, None]
    turns[(begins + base).reshape(-1)] = 1
    turns[(ends + base).reshape(-1)] -= 1
    return np.cumsum(turns[:-1], dtype=np.int8).view(np.bool_)


def _framed(
    source: Ids,
    source_lengths: Ints,
    target: Ids,
    target_lengths: Ints,
    specials: Specials,
    mode: str | None,
    input_end: bool,
    spoken: Bools | None = None,
) -> Pairs:
    """Mode tokens before inputs, ends after both sides; `spoken` marks original target tokens."""
    head = specials.mode(mode)
    tail = () if specials.end is None else (specials.end,)
    marks = np.ones(len(target), np.bool_) if spoken is None else spoken
    inputs, input_offsets = framed(source, source_lengths, head, tail if input_end else ())
    targets, target_offsets = framed(target, target_lengths, (), tail)
    original, _ = framed(marks, target_lengths, (), (False,) * len(tail))
    return Pairs(inputs, input_offsets, targets, target_offsets, original=original)


def framed(
    flat: npt.NDArray[Any], lengths: Ints, head: tuple[Any, ...], tail: tuple[Any, ...]
) -> tuple[npt.NDArray[Any], Ints]:
    """Every row of a ragged array with `head` before it and `tail` after it, and the offsets."""
    offsets = offsets_of(lengths + len(head) + len(tail))
    if not head and not tail:
        return flat, offsets
    out = np.empty(int(offsets[-1]), flat.dtype)
    for at, value in enumerate(head):
        out[offsets[:-1] + at] = value
    for at, value in enumerate(tail):
        out[offsets[1:] - len(tail) + at] = value
    shift = np.repeat(np.arange(len(lengths)) * (len(head) + len(tail)) + len(head), lengths)
    out[np.arange(len(flat)) + shift] = flat
    return out, offsets


def checked(chunks: Chunks, least: int) -> Ids:
    body = np.asarray(chunks)
    if body.ndim != 2 or body.dtype.kind not in "iu":
        raise ConfigError(
            f"chunks are whole numbers of shape (n, N), not {body.dtype} {body.shape}"
        )
    if body.shape[1] < least:
        _check_length(body.shape[1], least)
    return body.astype(np.int32, copy=False)


def _check_length(length: int, least: int = 2) -> None:
    if length < least:
        raise ConfigError(f"a chunk needs at least {least} tokens for this objective, not {length}")


def numbered(rows: npt.ArrayLike, n: int) -> Ints:
    numbers = np.asarray(rows, np.int64).reshape(-1)
    if len(numbers) != n:
        raise ConfigError(f"{n} chunks but {len(numbers)} row numbers")
    return numbers
