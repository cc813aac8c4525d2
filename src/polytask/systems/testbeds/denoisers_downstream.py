"""What a pretrained arm is good for afterwards: WordNet's definitions, classified and completed.

Classifying (mode R): a definition is the input, its field of meaning one token. Completing (mode
S): the first half of a definition is the input, the second the target. Both are learned together
for the same number of steps by every arm; an arm without modes writes no mode token. Reported, not
claimed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from polytask.data import embedded
from polytask.models.lm import LanguageModel
from polytask.objectives import draws
from polytask.objectives.pairs import Pairs
from polytask.systems.testbeds.prose import Part, Prose
from polytask.train.language import LanguageObjective, PretrainConfig, pretrain

FIELDS = (
    "noun.act",
    "noun.animal",
    "noun.artifact",
    "noun.body",
    "noun.communication",
    "noun.food",
    "noun.location",
    "noun.person",
    "noun.plant",
    "noun.substance",
)
_TEST = 400


@dataclass(frozen=True)
class Glosses:
    """Token ids of definitions of a part, and the number of each one's field."""

    ids: list[list[int]]
    field: np.ndarray


def here() -> bool:
    """Whether WordNet is on this machine."""
    return embedded.state("wordnet") is not None


def read(text: Prose, part: Part, most: int) -> Glosses:
    """At most `most` definitions of the ten fields."""
    rows = embedded.load("wordnet")[part]
    number = {name: at for at, name in enumerate(FIELDS)}
    kept = [row for row in rows.take(range(len(rows))) if row["field"] in number]
    order = draws.words(0, f"glosses of {part}", np.arange(len(kept)), 1)[:, 0].argsort()[:most]
    chosen = [kept[i] for i in order.tolist()]
    ids = text.codec.encode([str(row["definition"]) for row in chosen])
    return Glosses(ids, np.array([number[row["field"]] for row in chosen]))


def classify(text: Prose, found: Glosses, rows: Sequence[int], length: int, modes: bool) -> Pairs:
    """Definition -> the token that stands for its field."""
    head = text.specials.mode("R" if modes else None)
    labels = label_tokens(text)
    inputs = [[*head, *found.ids[row][: length - len(head)]] for row in rows]
    return Pairs.of(inputs, [[labels[int(found.field[row])]] for row in rows])


def complete(text: Prose, found: Glosses, rows: Sequence[int], length: int, modes: bool) -> Pairs:
    """First half -> second half."""
    head = text.specials.mode("S" if modes else None)
    inputs, targets = [], []
    for row in rows:
        ids = found.ids[row][:length]
        half = max(1, len(ids) // 2)
        inputs.append([*head, *ids[:half]])
        targets.append(ids[half:] or ids[-1:])
    return Pairs.of(inputs, targets)


def label_tokens(text: Prose) -> list[int]:
    """Ordinary tokens that stand for the fields: those after the special ones."""
    first = max(*text.codec.sentinels, *text.codec.modes, text.codec.end) + 1
    return list(range(first, first + len(FIELDS)))


def finetuned(
    text: Prose, model: LanguageModel, modes: bool, inputs: int, seed: int, steps: int
) -> dict[str, float]:
    """Accuracy of fields and -log p per token of second halves on test definitions, after `steps`
    steps of 12 examples of each. The model is changed."""
    train, test = read(text, "train", 6000), read(text, "test", _TEST)

    def draw(step: int) -> Pairs:
        rows = draws.below(seed, "glosses", np.arange(24) + 24 * step, len(train.ids)).tolist()
        both = (
            classify(text, train, rows[:12], inputs, modes),
            complete(text, train, rows[12:], inputs, modes),
        )
        return Pairs.join(both)

    tokens = steps * 24 * 2 * inputs  # more than is seen: the draws end the training
    pretrain(
        model,
        lambda step: draw(step) if step < steps else Pairs.of([], []),
        PretrainConfig(
            tokens=tokens,
            lr=1e-3,
            schedule="constant",
            width=4 * inputs,
            seed=seed,
            objective=LanguageObjective(mean="sequence", z_loss=0.0),
        ),
    )
    rows = range(len(test.ids))
    return {
        "field accuracy": accuracy(text, model, test, inputs, modes),
        "completion": second_halves(model, complete(text, test, rows, inputs, modes)),
    }


@torch.no_grad()
def accuracy(text: Prose, model: LanguageModel, found: Glosses, inputs: int, modes: bool) -> float:
    """Share of definitions whose field's token is the likeliest of the ten."""
    model.eval()
    labels = torch.tensor(label_tokens(text))
    right = 0
    for first in range(0, len(found.ids), 100):
        rows = range(first, min(first + 100, len(found.ids)))
        batch = model.feed(classify(text, found, rows, inputs, modes), pack=False)
        guess = model.logits(batch)[:, labels].argmax(1)
        right += int((labels[guess] == batch.label).sum())
    return right / len(found.ids)


@torch.no_grad()
def second_halves(model: LanguageModel, pairs: Pairs) -> float:
    """-log p per target token."""
    model.eval()
    total = 0.0
    for first in range(0, len(pairs), 100):
        batch = model.feed(pairs.take(np.arange(first, min(first + 100, len(pairs)))))
        total += float(model.token_losses(batch)[0].double().sum())
    return total / len(pairs.target_ids)
