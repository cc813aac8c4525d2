"""Vocabularies learned from text: what can be written, what stays one id, errors with names."""

from __future__ import annotations

from pathlib import Path

import pytest

from polytask.errors import ConfigError, DataError
from polytask.tasks.codec import TextCodec
from polytask.tasks.tokenizer_training import train_tokenizer

TEXTS = ["the cat sat on the mat, the cat slept", "a dog saw the cat. Grüße! \U0001f600"] * 20


def test_bytes_give_every_text_back(tmp_path: Path) -> None:
    codec = train_tokenizer(TEXTS, 420, sentinels=12, modes=("[R]", "[S]"))
    for text in (*TEXTS[:2], "never seen: žluťoučký 馬", "[R] [SENTINEL_0]"):
        (ids,) = codec.encode([text])
        assert codec.tokenizer.decode(ids).strip() == text
        assert not set(ids) & {*codec.modes, *codec.sentinels, codec.end}
    assert len(codec.sentinels) == 12
    assert [codec.tokenizer.id_to_token(i) for i in codec.modes] == ["[R]", "[S]"]
    again = train_tokenizer(iter(TEXTS), 420, sentinels=12, modes=("[R]", "[S]"))
    assert again.tokenizer.get_vocab() == codec.tokenizer.get_vocab()
    codec.save(tmp_path)
    assert TextCodec.load(tmp_path).modes == codec.modes


def test_words_are_the_commonest_ones() -> None:
    codec = train_tokenizer(
        TEXTS, 12 + 5 + 3 + 1, "word", sentinels=5, modes=("[S]",), lowercase=True
    )
    (ids,) = codec.encode(["The CAT zzz"])
    assert len(ids) == 3
    words = [codec.tokenizer.id_to_token(i) for i in ids]
    assert words == ["the", "cat", "[UNK]"]
    assert codec.size <= 21


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"size": 260}, "too small"),
        ({"size": 8, "kind": "word"}, "leave no words"),
        ({"size": 500, "kind": "piece"}, "'bpe' or 'word'"),
        ({"size": 500, "modes": ("[R]", "[R]")}, "must differ"),
        ({"size": 500, "modes": ("[PAD]",)}, "must differ"),
        ({"size": 500, "lowercase": True}, "lowercase is for words"),
    ],
)
def test_mistakes_are_named(given: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        train_tokenizer(TEXTS, **given)  # type: ignore[arg-type]


def test_no_text_is_an_error() -> None:
    with pytest.raises(DataError, match="no text"):
        train_tokenizer(["", "  "], 500)
