"""Example transforms in tokens per second beside one-at-a-time code, and packing of their pairs.

    python -m benchmarks objectives

The reference is the transform as it is usually written: one chunk at a time, T5's segmentation by
a shuffled indicator in NumPy, sentinels by a loop over the mask. Both give pairs with the same
numbers of noise tokens and spans (checked before timing). Packing: the share of places that hold a
token when pairs of UL2's mixture are fed to a decoder and to an encoder-decoder, beside one pair a
row padded to the longest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from benchmarks.harness import Aim, compare, options_of, show, show_versions

from polytask.models.feed import Architecture, feed
from polytask.objectives.denoising import Specials, prefix_lm, span_corruption, span_sizes
from polytask.objectives.pairs import Pairs
from polytask.objectives.ul2 import chunk_size_for, ul2_mixture

SPECIALS = Specials(tuple(range(30_000, 30_400)), 1, {"R": 30_500, "S": 30_501, "X": 30_502})
CHUNKS = 256
SETTINGS = ((3.0, 0.15, 568), (3.0, 0.5, 766), (64.0, 0.5, 1006))


def chunks_of(length: int, count: int = CHUNKS) -> np.ndarray:
    return np.random.default_rng(0).integers(2, 29_000, (count, length)).astype(np.int32)


def one_by_one(chunks: np.ndarray, mean_span: float, rate: float, seed: int) -> list[Any]:
    """Span corruption of each chunk, as it is usually written."""
    random = np.random.default_rng(seed)

    def segments(items: int, parts: int) -> np.ndarray:
        first = np.arange(items - 1) < parts - 1
        random.shuffle(first)
        ids = np.cumsum(np.pad(first, (1, 0)))
        return np.bincount(ids, minlength=parts)

    found = []
    for chunk in chunks:
        sizes = span_sizes(len(chunk), mean_span, rate)
        noise = segments(sizes.noise, sizes.spans)
        kept = segments(len(chunk) - sizes.noise, sizes.spans)
        lengths = np.stack([kept, noise], 1).reshape(-1)
        mask = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
        source, target, span = [], [], -1
        for at, token in enumerate(chunk):
            if mask[at]:
                if not mask[at - 1]:
                    span += 1
                    source.append(SPECIALS.sentinels[span])
                    target.append(SPECIALS.sentinels[span])
                target.append(token)
            else:
                source.append(token)
        found.append((np.array([*source, 1]), np.array([*target, 1])))
    return found


def throughput(clock: Callable[[], float], repeats: int) -> list[dict[str, Any]]:
    """Million tokens of text per second."""
    rows = []
    for mean_span, rate, length in SETTINGS:
        chunks, numbers = chunks_of(length), np.arange(CHUNKS)

        def ours(
            chunks: np.ndarray = chunks,
            numbers: np.ndarray = numbers,
            mean_span: float = mean_span,
            rate: float = rate,
        ) -> Pairs:
            return span_corruption(chunks, SPECIALS, 0, numbers, mean_span, rate)

        def theirs(
            chunks: np.ndarray = chunks, mean_span: float = mean_span, rate: float = rate
        ) -> list[Any]:
            return one_by_one(chunks, mean_span, rate, 0)

        mine, other = ours(), theirs()
        if [len(t) for _, t in other] != mine.target_lengths.tolist():
            raise AssertionError("the two transforms disagree")
        taken = compare({"polytask": ours, "one by one": theirs}, repeats, clock=clock).medians
        size = CHUNKS * length / 1e6
        rows.append(
            {
                "objective": f"spans ({mean_span:g}, {rate:g})",
                "chunk": length,
                "polytask": size / taken["polytask"],
                "one by one": size / taken["one by one"],
                "ratio": taken["one by one"] / taken["polytask"],
            }
        )
    chunks, numbers = chunks_of(512), np.arange(CHUNKS)
    taken = compare(
        {"polytask": lambda: prefix_lm(chunks, SPECIALS, 0, numbers)}, repeats, clock=clock
    ).medians
    rows.append(
        {
            "objective": "prefix LM",
            "chunk": 512,
            "polytask": CHUNKS * 512 / 1e6 / taken["polytask"],
            "one by one": "",
            "ratio": "",
        }
    )
    return rows


def packing(count: int = 512) -> list[dict[str, Any]]:
    """Share of places that hold a token (or the first slot of a segment)."""
    found = []
    for architecture in ("prefix", "encdec"):
        chosen: Architecture = architecture  # type: ignore[assignment]
        both = architecture == "encdec"
        mixture = ul2_mixture("ul2-20b" if both else "decoder")
        context = None if both else 512
        sizes = [
            chunk_size_for(d, 512, modes=True, context=context).length for d in mixture.denoisers
        ]
        pairs = mixture.make(
            lambda at, rows, sizes=sizes: chunks_of(sizes[at], len(rows)),
            SPECIALS,
            0,
            np.arange(count),
        )
        width = (4096, 2048) if both else 2048
        packed = feed(pairs, chosen, width)
        alone = feed(pairs, chosen, pack=False)
        found.append(
            {
                "architecture": architecture,
                "packed": packed.efficiency,
                "one pair a row": alone.efficiency,
                "ratio": packed.efficiency / alone.efficiency,
            }
        )
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = options_of(__doc__, argv)
    used = show_versions(("numpy", "torch"))
    found = {
        "versions": used,
        "throughput": throughput(options.clock, options.repeats),
        "packing": packing(),
    }
    show(found, options)
    return found


def aims(figures: dict[str, Any]) -> list[Aim]:
    """Transforms are not the bottleneck: five times a plain loop. Packed rows of a decoder are
    nearly full; an encoder-decoder's have two limits, and inputs run out before targets do."""
    slowest = min(row["ratio"] for row in figures["throughput"] if row["ratio"])
    decoder, both = (row["packed"] for row in figures["packing"])
    return [
        Aim("span corruption beside one at a time", slowest, at_least=10),
        Aim("share of places in use, packed decoder", decoder, at_least=0.9),
        Aim("share of places in use, packed encoder-decoder", both, at_least=0.9),
    ]
