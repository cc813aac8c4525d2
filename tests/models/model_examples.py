"""Examples of every modality and label for the tests of models, made from a seed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from polytask.models import HeadSpec, InputSpec, ModelConfig, ModelSpec

VOCAB, IMAGE, SERIES = 50, 8, 24


@dataclass
class Row:
    """Stands in for polytask.tasks.encode.Example."""

    sequences: list[dict[str, Any]]
    targets: dict[int, Any] = field(default_factory=dict)
    row: int = 0


HEADS = (
    HeadSpec(task="sentiment", kind="classify", outputs=3),
    HeadSpec(task="topics", kind="multilabel", outputs=4),
    HeadSpec(task="price", kind="regress", outputs=2, mean=(10.0, -5.0), std=(2.0, 0.5)),
    HeadSpec(task="answer", kind="choice"),
    HeadSpec(task="names", kind="tag", outputs=5),
    HeadSpec(task="story", kind="generate", outputs=0),
    HeadSpec(task="pairs", kind="match", temperature=0.1),
    HeadSpec(task="demand", kind="forecast", horizon=6, channels=2, outputs=12),
    HeadSpec(task="mask", kind="dense", outputs=3, classes=3, height=8, width=8),
    HeadSpec(task="depth", kind="dense", outputs=1, height=6, width=5),
    HeadSpec(task="digit", kind="classify", outputs=10),
)
KINDS = [head.kind for head in HEADS]
INPUTS = InputSpec(
    vocab_size=VOCAB,
    end_id=4,
    image_size=IMAGE,
    series_length=SERIES,
    series_channels=2,
    number_columns=4,
    categories=7,
    feature_width=6,
)


def spec(**options: Any) -> ModelSpec:
    """A tiny model of all kinds."""
    base = {"dim": 32, "layers": 2, "heads": 4, "image_patch": 4}
    return ModelSpec(config=ModelConfig(**(base | options)), inputs=INPUTS, heads=HEADS)


def text(rng: np.random.Generator, length: int, prefix: int | None = None) -> dict[str, Any]:
    ids = rng.integers(5, VOCAB, length).astype(np.int32)
    return {"text.ids": ids, "text.prefix": length if prefix is None else prefix}


def image(rng: np.random.Generator) -> dict[str, Any]:
    return {"image.pixels": rng.integers(0, 256, (3, IMAGE, IMAGE)).astype(np.uint8)}


def series(rng: np.random.Generator, length: int, channels: int = 2) -> dict[str, Any]:
    values = rng.normal(100, 20, (length, channels)).astype(np.float32)
    values[rng.random(values.shape) < 0.1] = np.nan
    return {"series.values": values}


def table(rng: np.random.Generator, numbers: int = 2, categories: int = 2) -> dict[str, Any]:
    values = rng.normal(size=numbers).astype(np.float32)
    if numbers:
        values[0] = np.nan
    return {
        "table.number": values,
        "table.number_id": np.arange(numbers, dtype=np.int32),
        "table.category": rng.integers(0, 7, categories).astype(np.int32),
    }


def features(rng: np.random.Generator, length: int) -> dict[str, Any]:
    return {"features.values": rng.normal(size=(length, 6)).astype(np.float32)}


def generation(rng: np.random.Generator, prompt: int, answer: int) -> tuple[dict[str, Any], Any]:
    sequence = text(rng, prompt + answer, prompt)
    labels = np.full(prompt + answer, -100, np.int32)
    labels[max(1, prompt) :] = sequence["text.ids"][max(1, prompt) :]
    return sequence, labels


def everything(seed: int = 0) -> list[Row]:
    """One or more rows of every kind of label, several labels on one row, and missing ones."""
    r = np.random.default_rng(seed)
    story, labels = generation(r, 5, 4)
    essay, free = generation(r, 0, 7)
    words = text(r, 6)
    tags = np.array([-100, 0, 4, 2, -100, 1], np.int32)
    holes = np.array([1, 0, np.nan, 1], np.float32)
    future = r.normal(100, 20, (6, 2)).astype(np.float32)
    future[0, 0] = np.nan
    classes = r.integers(0, 3, (8, 8))
    classes[0] = -100
    return [
        Row([text(r, 5)], {0: 2, 1: holes, 2: np.array([11.0, np.nan], np.float32)}, 10),
        Row([text(r, 9)], {0: 1, 2: np.array([9.0, -4.0], np.float32)}, 11),
        Row([text(r, 4), text(r, 6), text(r, 3)], {3: 1}, 12),
        Row([text(r, 3), text(r, 3)], {3: 0}, 13),
        Row([words], {4: tags}, 14),
        Row([story], {5: labels}, 15),
        Row([essay], {5: free}, 16),
        Row([text(r, 4), text(r, 5)], {6: 77}, 17),
        Row([text(r, 6), image(r)], {6: 78}, 18),
        Row([text(r, 6), image(r)], {6: 78}, 19),
        Row([series(r, 24)], {7: future}, 20),
        Row([series(r, 13) | table(r)], {7: future * 3}, 21),
        Row([image(r)], {8: classes, 9: r.normal(size=(6, 5)).astype(np.float32), 10: 7}, 22),
        Row([image(r) | text(r, 3)], {10: 3}, 23),
        Row([table(r, 4, 1)], {2: np.array([10.0, -5.0], np.float32), 0: 0}, 24),
        Row([table(r, 1, 3) | features(r, 2)], {0: 1}, 25),
        Row([features(r, 5)], {1: np.array([0, 1, 0, 1], np.float32)}, 26),
    ]
