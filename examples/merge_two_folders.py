"""Merge two folders in Hugging Face format: `python examples/merge_two_folders.py`.

Makes a tiny BERT that tells colours, trains two copies of it on other tasks (what a thing is, how
big it is), merges the two from the command line, compares on rows that nobody was trained on, and
loads the result with transformers. About half a minute.
"""

from __future__ import annotations

import argparse
import csv
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    AutoModel,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    logging,
)

from polytask.cli import main as polytask
from polytask.merge.output import load_with_head

WORDS = {
    "colour": ["red", "green", "blue", "yellow"],
    "size": ["tiny", "little", "big", "huge"],
    "tool": ["hammer", "saw", "drill", "wrench", "chisel", "pliers"],
    "fruit": ["apple", "pear", "plum", "cherry", "lemon", "fig"],
}
FILLERS = ["the", "a", "is", "on", "table", "floor", "and", "looks", "old", "new"]
RECIPE = """\
method: task_arithmetic
base: base
models:
  kind: {model: kind, weight: 0.6}
  size: {model: size, weight: 0.6}
heads: ["classifier.*"]
compare:
  tasks:
    kind: {data: kind.csv, target: label, model: kind, split: {test: 0.9, valid: 0.05}}
    size: {data: size.csv, target: label, model: size, split: {test: 0.9, valid: 0.05}}
"""


def sentence(rng: random.Random) -> dict[str, str]:
    """A sentence with what is true of it."""
    kind = rng.choice(["tool", "fruit"])
    colour, size, thing = (rng.choice(WORDS[w]) for w in ("colour", "size", kind))
    text = f"{rng.choice(['the', 'a'])} {size} {colour} {thing} {rng.choice(['is', 'looks'])} "
    text += rng.choice(["on the table", "on the floor", "old", "new", "old and new"])
    big = "large" if size in ("big", "huge") else "small"
    return {"text": text, "colour": colour, "kind": kind, "size": big}


def tokenizer(folder: Path) -> BertTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    path = folder / "vocab.txt"
    path.write_text(
        "\n".join([*special, *(w for words in WORDS.values() for w in words), *FILLERS]) + "\n"
    )
    return BertTokenizerFast(str(path))


def train(
    model: BertForSequenceClassification, words: BertTokenizerFast, task: str, steps: int
) -> BertForSequenceClassification:
    """Teach `model` one of the things that are true of sentences."""
    rng = random.Random(task)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    for _ in range(steps):
        rows = [sentence(rng) for _ in range(32)]
        batch = words([row["text"] for row in rows], padding=True, return_tensors="pt")
        labels = torch.tensor([model.config.label2id[row[task]] for row in rows])
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def build(home: Path, steps: int, say: Callable[[str], None] = print) -> None:
    """Three folders with models, two files with rows to compare on, and the recipe."""
    torch.manual_seed(0)
    words = tokenizer(home)
    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    labels = {"colour": WORDS["colour"], "kind": ["fruit", "tool"], "size": ["large", "small"]}

    def config(task: str) -> BertConfig:
        names = dict(enumerate(labels[task]))
        return BertConfig(
            vocab_size=len(words),
            intermediate_size=128,
            initializer_range=0.1,
            id2label=names,
            label2id={name: i for i, name in names.items()},
            **size,
        )

    say("training the base on colours, then a copy on what a thing is, and one on its size")
    base = train(BertForSequenceClassification(config("colour")), words, "colour", steps)
    for task, model in [("base", base), ("kind", None), ("size", None)]:
        if model is None:
            model = BertForSequenceClassification(config(task))
            model.bert.load_state_dict(base.bert.state_dict())
            train(model, words, task, steps)
        model.save_pretrained(home / task)
        words.save_pretrained(home / task)
    rng = random.Random("rows to compare on")
    for task in ("kind", "size"):
        with (home / f"{task}.csv").open("w", newline="") as handle:
            writer = csv.writer(handle)
            writer.writerow(["text", "label"])
            for _ in range(400):
                row = sentence(rng)
                writer.writerow([row["text"], row[task]])
    (home / "merge.yaml").write_text(RECIPE)


def main(steps: int, folder: Path | None = None) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as made:
        home = folder or Path(made)
        home.mkdir(parents=True, exist_ok=True)
        build(home, steps)
        out = home / "merged"
        asked = ["merge", str(home / "merge.yaml"), "--out", str(out), "--scales", "0:1.4:0.2"]
        if polytask(asked) != 0:
            raise SystemExit(1)
        trunk = AutoModel.from_pretrained(out)
        model = load_with_head(out, "size")
        words = BertTokenizerFast.from_pretrained(out)
        batch = words(["a huge red plum is on the table"], return_tensors="pt")
        answer = model.config.id2label[int(model(**batch).logits.argmax())]
        print(f"{type(trunk).__name__} loaded; 'a huge red plum ...' is {answer}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--folder", type=Path, help="keep everything here")
    options = parser.parse_args()
    main(options.steps, options.folder)
