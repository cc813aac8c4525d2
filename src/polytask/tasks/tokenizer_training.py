"""A vocabulary of one's own, learned from a stream of texts: byte-level BPE, or whole words.

The result is a `TextCodec`: sentinels for spans and mode tokens are single ids from the start, and
none of them can be forged by text. Same texts in the same order, same vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from polytask.errors import ConfigError, DataError
from polytask.tasks.codec import SPECIALS, TextCodec

Kind = Literal["bpe", "word"]
UNKNOWN = "[UNK]"


def train_tokenizer(
    texts: Iterable[str],
    size: int,
    kind: Kind = "bpe",
    sentinels: int = 100,
    modes: Sequence[str] = ("[R]", "[S]", "[X]"),
    lowercase: bool = False,
) -> TextCodec:
    """Learn a vocabulary of at most `size` ids, special ones included.

    bpe   byte-level byte-pair encoding: every text can be written, and is given back exactly.
    word  the commonest words and marks of punctuation, anything else is '[UNK]'; `lowercase` folds
          case first. For small models whose every token should mean something.

    `modes` are written as mode tokens in this order (`codec.modes`). `ConfigError` for a size that
    does not hold the special tokens (and 256 bytes), `DataError` for texts without any word.
    """
    if kind not in ("bpe", "word"):
        raise ConfigError(f"a tokenizer's kind is 'bpe' or 'word', not '{kind}'")
    if len(set(modes)) != len(modes) or set(modes) & set(SPECIALS):
        raise ConfigError(f"mode tokens must differ from each other and from {SPECIALS}: {modes}")
    if lowercase and kind == "bpe":
        raise ConfigError("byte-level BPE gives texts back as they were; lowercase is for words")
    some = _seen(texts)
    if kind == "bpe":
        return TextCodec.train(some, size, sentinels, modes)
    return _words(some, size, sentinels, modes, lowercase)


def _seen(texts: Iterable[str]) -> Iterable[str]:
    """The texts; `DataError` at the end if none held a word."""
    found = False
    for text in texts:
        found = found or bool(text.strip())
        yield text
    if not found:
        raise DataError("there is no text to learn a vocabulary from")


def _words(
    texts: Iterable[str], size: int, sentinels: int, modes: Sequence[str], lowercase: bool
) -> TextCodec:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    marks = [*SPECIALS, *(f"[SENTINEL_{i}]" for i in range(sentinels)), *modes, UNKNOWN]
    if size <= len(marks):
        raise ConfigError(
            f"vocab_size = {size} is too small: the {len(marks)} special tokens leave no words"
        )
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(prefix="")
    trainer = trainers.WordLevelTrainer(vocab_size=size, special_tokens=marks, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.encode_special_tokens = True
    return TextCodec.trained(tokenizer, sentinels, len(modes))
