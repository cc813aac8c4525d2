"""Generation with a cache equals choosing the best next token of full passes."""

from __future__ import annotations

from typing import Any

import model_examples as make
import numpy as np
import pytest
import torch
from model_examples import Row

from polytask.models import Batch, MultitaskModel
from polytask.models.collate import Collator, collate
from polytask.models.generate import generate

ARCHITECTURES: list[dict[str, Any]] = [
    {},
    {"positions": "relative", "tie": False, "kv_heads": 1},
    {"positions": "learned", "norm": "rms", "pool": "mean"},
    {"decoder_layers": 2},
    {"decoder_layers": 1, "positions": "relative", "pool": "last"},
]


@pytest.fixture(params=ARCHITECTURES, ids=["rope", "relative", "learned", "decoder", "t5"])
def model(request: pytest.FixtureRequest) -> MultitaskModel:
    return MultitaskModel(make.spec(**request.param)).eval()


def rows() -> list[Row]:
    """Prompts of other lengths, one with an image and a table, one that is a free text."""
    r = np.random.default_rng(2)
    made = []
    for number, (prompt, answer) in enumerate([(5, 4), (2, 3), (7, 1), (0, 6)]):
        sequence, labels = make.generation(r, prompt, answer)
        if number == 1:
            sequence |= make.image(r) | make.table(r)
        made.append(Row([sequence], {5: labels}, number))
    return made


def slow(model: MultitaskModel, row: Row, steps: int) -> list[int]:
    """One full forward pass per token, the answer so far standing in the text."""
    sequence, labels = row.sequences[0], row.targets[5]
    prompt = int(np.argmax(labels[1:] != -100)) + 1
    ids = list(sequence["text.ids"][:prompt])
    for _ in range(steps):
        text = np.array([*ids, 5], np.int32)
        wanted = np.full(len(text), -100, np.int32)
        wanted[prompt:] = 5
        prefix = min(int(sequence["text.prefix"]), prompt)
        grown = sequence | {"text.ids": text, "text.prefix": prefix}
        logits = model(collate([Row([grown], {5: wanted})], make.KINDS))["generate"].value
        ids.append(int(logits[-1].argmax()))
        if ids[-1] == make.INPUTS.end_id:
            break
    return ids[prompt:]


def run(model: MultitaskModel, batch: Batch, **options: Any) -> np.ndarray:
    pairs = model.all_pairs(batch, "generate")
    return generate(model, batch, pairs, **options)


def test_greedy_answers_equal_those_of_full_passes(model: MultitaskModel) -> None:
    found = run(model, collate(rows(), make.KINDS), max_new=8)
    for row, answer in zip(rows(), found, strict=True):
        expected = slow(model, row, 8)
        assert answer[: len(expected)].tolist() == expected
        assert set(answer[len(expected) :].tolist()) <= {make.INPUTS.pad_id}


def test_unlabelled_prompts_are_continued_alike(model: MultitaskModel) -> None:
    labelled = run(model, collate(rows(), make.KINDS), max_new=6)
    collator = Collator(make.KINDS, groups=[(5,)])
    prompts = []
    for row in rows():
        sequence = dict(row.sequences[0])
        prompt = int(np.argmax(row.targets[5][1:] != -100)) + 1
        sequence["text.ids"] = sequence["text.ids"][:prompt]
        sequence["text.prefix"] = min(int(sequence["text.prefix"]), prompt)
        prompts.append(Row([sequence], {}, row.row))
    batch = collator(prompts, [0] * 4, unlabelled=True)
    assert np.array_equal(run(model, batch, max_new=6), labelled)


def test_generation_stops_at_the_end_token(model: MultitaskModel) -> None:
    end = make.INPUTS.end_id
    assert end is not None
    calls: list[int] = []

    def choose(logits: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        token = torch.full((len(logits),), 9)
        token[: len(calls)] = end  # row i ends at step i
        return token

    found = run(model, collate(rows(), make.KINDS), max_new=50, choose=choose)
    pad = make.INPUTS.pad_id
    assert found.tolist() == [
        [end, pad, pad, pad],
        [9, end, pad, pad],
        [9, 9, end, pad],
        [9, 9, 9, end],
    ]


def test_the_default_limit_is_the_longest_answer_and_one_more() -> None:
    model = MultitaskModel(make.spec()).eval()
    found = run(model, collate(rows(), make.KINDS), choose=lambda logits: logits.argmax(-1) * 0 + 9)
    assert found.shape == (4, 6)  # 5 labelled tokens of the free text, and one more


def test_generation_under_bfloat16_runs(model: MultitaskModel) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found = run(model, collate(rows(), make.KINDS), max_new=4)
    assert found.shape[0] == 4 and (found < make.VOCAB).all()


def test_the_answer_is_hidden_from_the_prompt(model: MultitaskModel) -> None:
    """Changing a later label changes no earlier logit: nothing leaks from the answer."""
    one, other = rows(), rows()
    for row in other:
        row.sequences[0]["text.ids"] = row.sequences[0]["text.ids"].copy()
        row.sequences[0]["text.ids"][-1] = 7
    a, b = (model(collate(r, make.KINDS))["generate"].value for r in (one, other))
    torch.testing.assert_close(a, b)
