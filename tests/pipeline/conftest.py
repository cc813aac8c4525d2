"""Three small files of a user, and a configuration that trains on them in a second."""

from __future__ import annotations

import csv
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))

GOOD, BAD = ["fine", "great", "lovely", "bright"], ["poor", "awful", "broken", "dull"]


def write(path: Path, header: list[str], rows: list[list[Any]]) -> None:
    with path.open("w", newline="") as handle:
        csv.writer(handle).writerows([header, *rows])


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """reviews.csv (two labels per row, some missing), pairs.csv, houses.csv."""
    draw = random.Random(0)

    def words(pool: list[str]) -> str:
        return " ".join(draw.choices([*pool, "the", "a", "it", "was"], k=6)) + f" {draw.random()}"

    reviews = [
        [words(GOOD if good else BAD), "yes" if good else "no", "" if i % 5 == 0 else 1.0 + good]
        for i in range(120)
        for good in [i % 2 == 0]
    ]
    write(tmp_path / "reviews.csv", ["body", "liked", "stars"], reviews)
    pairs = [[words(GOOD), words(GOOD if same else BAD), same] for same in [0, 1] * 60]
    write(tmp_path / "pairs.csv", ["left", "right", "same"], pairs)
    areas = [draw.uniform(20, 200) for _ in range(120)]
    houses = [[f"{a:.1f}", draw.choice(["north", "south"]), f"{a * 3 + 10:.1f}"] for a in areas]
    write(tmp_path / "houses.csv", ["area", "side", "price"], houses)
    return tmp_path


@pytest.fixture
def config(files: Path) -> Callable[..., Path]:
    """Write config.yaml with changes to the working one; returns its path."""

    def make(changes: dict[str, Any] | None = None) -> Path:
        content: dict[str, Any] = {
            "name": "small",
            "tasks": {
                "liked": {"data": "reviews.csv", "inputs": {"text": "body"}, "target": "liked"},
                "stars": {"data": "reviews.csv", "inputs": {"text": "body"}, "target": "stars"},
                "same": {
                    "data": "pairs.csv",
                    "schema": "pair",
                    "inputs": {"a": {"text": "left"}, "b": {"text": "right"}},
                    "target": "same",
                },
                "price": {
                    "data": "houses.csv",
                    "inputs": {"table": ["area", "side"]},
                    "target": "price",
                },
            },
            "encoding": {"vocab_size": 400, "text_length": 24},
            "model": {"dim": 32, "layers": 1, "heads": 2},
            "train": {"steps": 12, "batch_size": 16, "log_every": 4, "progress": False},
            "evaluate": {"resamples": 50},
        }
        for key, value in (changes or {}).items():
            here = content
            *path, last = key.split("/")
            for part in path:
                here = here.setdefault(part, {})
            if value is None:
                here.pop(last, None)
            else:
                here[last] = value
        path = files / "config.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return make
