"""The vocabulary: deterministic, lossless, and no text can forge a special token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polytask.errors import CheckpointError, ConfigError
from polytask.tasks.codec import SPECIALS, TextCodec

TEXTS = ["the quick brown fox jumps", "over the lazy dog", "the fox and the dog"] * 10
CODEC = TextCodec.train(TEXTS, 420)


def test_training_is_deterministic_and_special_tokens_come_first() -> None:
    again = TextCodec.train(iter(TEXTS), 420)
    assert again.tokenizer.to_str() == CODEC.tokenizer.to_str()
    assert [CODEC.tokenizer.token_to_id(t) for t in SPECIALS] == [0, 1, 2, 3, 4]
    assert (CODEC.pad, CODEC.start, CODEC.sep, CODEC.mask, CODEC.end) == (0, (1,), (2,), 3, 4)
    assert CODEC.sentinels == tuple(range(5, 37))
    assert CODEC.modes == tuple(range(37, 45))


@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=60))
def test_any_text_comes_back_as_it_was(text: str) -> None:
    (ids,) = CODEC.encode([text])
    assert CODEC.tokenizer.decode(ids, skip_special_tokens=False).removeprefix(" ") in (
        text,
        text.removeprefix(" "),
    )


def test_text_cannot_forge_special_tokens(tmp_path: Path) -> None:
    CODEC.save(tmp_path)
    for codec in (CODEC, TextCodec.load(tmp_path)):
        (ids,) = codec.encode(["[SEP] [MASK][SENTINEL_0] [END]"])
        assert min(ids) >= 45
        assert codec.decode(ids) == "[SEP] [MASK][SENTINEL_0] [END]"


def test_frequent_words_are_one_token() -> None:
    assert len(CODEC.encode(["the"])[0]) == 1


def test_decoding_stops_at_the_end_and_hides_special_tokens() -> None:
    (ids,) = CODEC.encode(["the fox"])
    assert CODEC.decode([1, *ids, 2, 0, 4, *ids]) == "the fox"


def test_a_vocabulary_smaller_than_the_bytes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"vocab_size = 280 is too small.*at least 301"):
        TextCodec.train(TEXTS, 280)
    assert TextCodec.train(TEXTS, 301).size == 301


def test_no_text_at_all_gives_a_vocabulary_of_bytes() -> None:
    codec = TextCodec.train([], 400)
    assert codec.size == 301
    assert codec.decode(codec.encode(["still works: é"])[0]) == "still works: é"


def test_a_damaged_tokenizer_file_is_named(tmp_path: Path) -> None:
    CODEC.save(tmp_path)
    (tmp_path / "codec.json").write_text("{")
    with pytest.raises(CheckpointError, match="the tokenizer cannot be read"):
        TextCodec.load(tmp_path)


def hub_tokenizer(**special: Any) -> Any:
    """A Hugging Face fast tokenizer made on the spot."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "<eos>", "the", "fox", "ran"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if "sep_token" in special:
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **special)


def test_a_hub_encoder_tokenizer_keeps_its_own_frame(tmp_path: Path) -> None:
    codec = TextCodec.of(
        hub_tokenizer(cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", mask_token="[MASK]")
    )
    assert (codec.start, codec.sep, codec.close) == ((1,), (2,), (2,))
    assert (codec.pad, codec.mask, codec.end, codec.joiner) == (3, 4, 2, "")
    codec.save(tmp_path)
    loaded = TextCodec.load(tmp_path)
    assert loaded.encode(["the fox ran"]) == codec.encode(["the fox ran"]) == [[6, 7, 8]]
    assert (loaded.start, loaded.close) == (codec.start, codec.close)


def test_a_hub_decoder_tokenizer_opens_with_its_end_token_and_joins_by_a_space() -> None:
    codec = TextCodec.of(hub_tokenizer(eos_token="<eos>"))
    assert (codec.start, codec.sep, codec.close, codec.end) == ((5,), (), (), 5)
    assert (codec.pad, codec.joiner) == (5, " ")


def test_a_slow_tokenizer_is_refused() -> None:
    with pytest.raises(ConfigError, match="not a fast tokenizer"):
        TextCodec.of(object())
