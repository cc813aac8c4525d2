"""Glyphs: small real pictures composed into multitask rows whose labels are known exactly.

The testbed behind several proofs (Multi-MNIST style, Sener and Koltun 2018, arXiv 1810.04650): two
garments or digits on one canvas, left-top and right-bottom, overlaid by the larger pixel; the two
tasks are the two classes. Draws are counter-based, no picture serves two parts of one testbed, and
labels can be replaced at random to make a task noisy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from polytask.data import embedded
from polytask.errors import ConfigError, DataError
from polytask.rng import generator

GlyphName = Literal["fashion-mnist", "mnist5k", "digits"]


@dataclass(frozen=True)
class Glyphs:
    """Pictures of one item each."""

    image: np.ndarray  # (n, height, width) uint8, ink bright on 0
    label: np.ndarray  # (n,) int64
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.label)

    def take(self, index: np.ndarray) -> Glyphs:
        """The items at `index`."""
        return replace(self, image=self.image[index], label=self.label[index])


@dataclass(frozen=True)
class GlyphPairs:
    """Two items on a canvas. `label` is what one trains on, `truth` what is there."""

    image: np.ndarray  # (n, size, size) uint8
    label: np.ndarray  # (n, 2) int64: left-top, right-bottom
    truth: np.ndarray  # (n, 2) int64
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.label)


def glyphs(name: GlyphName, split: str, scale: int = 1) -> Glyphs:
    """The items of an embedded data set, each pixel repeated `scale` times along both axes.

    `DataError` lists how to get a data set that is not here.
    """
    found = embedded.arrays(name, split)
    if "image" not in found or found["image"].ndim != 3:
        raise DataError(f"embedded data set '{name}' has no grey pictures to compose")
    image = found["image"] if scale == 1 else found["image"].repeat(scale, 1).repeat(scale, 2)
    return Glyphs(image, found["label"].astype(np.int64), embedded.info(name).classes)


def overlay(items: Glyphs, first: np.ndarray, second: np.ndarray, size: int) -> GlyphPairs:
    """Compose items `first` (left-top) with `second` (right-bottom) on a `size` x `size` canvas."""
    height, width = items.image.shape[1:]
    if size < max(height, width):
        raise ConfigError(f"a canvas of {size} pixels is smaller than a {height}x{width} glyph")
    canvas = np.zeros((len(first), size, size), np.uint8)
    canvas[:, :height, :width] = items.image[first]
    corner = canvas[:, size - height :, size - width :]
    np.maximum(corner, items.image[second], out=corner)
    label = np.stack([items.label[first], items.label[second]], axis=1)
    return GlyphPairs(canvas, label, label.copy(), items.classes)


def draw_pairs(
    items: Glyphs, counts: dict[str, int], size: int, seed: int, stream: str = "pairs"
) -> dict[str, GlyphPairs]:
    """Disjoint parts of `counts[name]` pairs: every item is used at most once over all parts.

    A pure function of (seed, stream): a part does not change when a later one grows.
    """
    needed = 2 * sum(counts.values())
    if needed > len(items):
        raise ConfigError(f"{needed} items are needed for {counts}, and there are {len(items)}")
    order = generator(seed, "glyphs", stream).permutation(len(items))
    parts: dict[str, GlyphPairs] = {}
    start = 0
    for name, count in counts.items():
        chosen = order[start : start + 2 * count]
        parts[name] = overlay(items, chosen[0::2], chosen[1::2], size)
        start += 2 * count
    return parts


def replace_labels(
    pairs: GlyphPairs, task: int, share: float, seed: int, stream: str = "noise"
) -> GlyphPairs:
    """Give exactly `share` of one task's labels a class drawn uniformly (the true one included).

    `truth` keeps what is in the picture.
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"share = {share} is not between 0 and 1")
    draws = generator(seed, "glyphs", stream, task)
    struck = draws.permutation(len(pairs))[: round(share * len(pairs))]
    label = pairs.label.copy()
    label[struck, task] = draws.integers(0, len(pairs.classes), size=len(struck))
    return replace(pairs, label=label)
