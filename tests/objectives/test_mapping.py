"""UL2 as a map over a Hugging Face data set: nothing invented, nothing twice, same every time."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from polytask.errors import ConfigError
from polytask.objectives.denoising import Specials
from polytask.objectives.mapping import ul2
from polytask.objectives.ul2 import restored

SPECIALS = Specials(tuple(range(5000, 5100)), 4000, {"R": 4001, "S": 4002, "X": 4003})


def numbers(texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
    """'3 4' -> [3, 4], in place of a tokenizer."""
    return {"input_ids": [[int(word) for word in text.split()] for text in texts]}


def texts_of(documents: int = 60) -> tuple[Dataset, list[int]]:
    stream, texts = [], []
    for number in range(documents):
        ids = list(range(number * 40, number * 40 + 23 + number % 17))
        texts.append(" ".join(map(str, ids)))
        stream += [*ids, 4000]
    return Dataset.from_dict({"text": texts}), stream


def test_examples_are_the_joined_text_in_order() -> None:
    data, stream = texts_of()
    options = {"batched": True, "batch_size": 60, "with_indices": True}
    given = ul2(numbers, SPECIALS, inputs_len=48, spans=(3, 5, 16))
    made = data.map(given, remove_columns=["text"], **options)
    found: list[int] = []
    for row in made:
        assert len(row["input_ids"]) <= 48
        found += restored(row["input_ids"], row["labels"], SPECIALS)
    text = [token for token in stream if token != 4000]
    assert found == text[: len(found)]
    assert len(text) - len(found) < 100  # the rest is shorter than a chunk
    again = data.map(given, remove_columns=["text"], load_from_cache_file=False, **options)
    assert again["input_ids"] == made["input_ids"]


def test_a_decoder_reads_both_in_one() -> None:
    data, _ = texts_of()
    given = ul2(numbers, SPECIALS, inputs_len=64, preset="ul2r", spans=(3, 5, 16))
    made = given({"text": data["text"]}, list(range(60)))
    for ids, labels, prefix in zip(made["input_ids"], made["labels"], made["prefix"]):
        assert len(ids) == len(labels) <= 64
        assert labels[:prefix] == [-100] * prefix
        assert labels[prefix:] == ids[prefix:]
        chunk = restored(ids[:prefix], ids[prefix:], SPECIALS)
        assert all(b - a in (1, 40 - 22 - (a // 40) % 17) for a, b in pairwise(chunk))
    assert set(np.array([ids[0] for ids in made["input_ids"]])) == {4001, 4002, 4003}


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match=r"has no column .text. .has: body"):
        ul2(numbers, SPECIALS, 48)({"body": ["1"]}, [0])
    with pytest.raises(ConfigError, match="for encoder-decoders"):
        ul2(numbers, SPECIALS, 48, 20, preset="decoder")
    with pytest.raises(ConfigError, match="but targets_len is 20"):
        ul2(numbers, SPECIALS, 48, 20)
