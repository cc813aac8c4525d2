"""Small data sets that several tests of tasks build on."""

from __future__ import annotations

from typing import Any

import numpy as np

WORDS = [
    "film",
    "plot",
    "scene",
    "actor",
    "music",
    "story",
    "light",
    "sound",
    "ending",
    "joke",
    "camera",
    "silence",
]


def reviews(count: int = 60, classes: tuple[str, ...] = ("bad", "good")) -> list[dict[str, Any]]:
    """Distinct short texts with balanced labels."""
    return [
        {
            "text": f"{WORDS[i % 12]} {WORDS[(i * 5 + 1) % 12]} number {i}",
            "label": classes[i % len(classes)],
        }
        for i in range(count)
    ]


def pictures(count: int = 40, size: int = 8) -> list[dict[str, Any]]:
    """Random grey pictures with two labels, one of them sometimes missing."""
    rng = np.random.default_rng(0)
    return [
        {
            "image": rng.integers(0, 256, (size, size), dtype=np.uint8),
            "shape": ("round", "square")[i % 2],
            "weight": None if i % 4 == 3 else float(i),
        }
        for i in range(count)
    ]


def measurements(count: int = 50) -> list[dict[str, Any]]:
    """A table with numbers, a category, gaps, and a numeric target."""
    return [
        {
            "age": i if i % 7 else None,
            "size": i * 0.5 - 3,
            "colour": ("red", "green", "blue")[i % 3],
            "price": 2.5 * i + 1,
        }
        for i in range(count)
    ]
