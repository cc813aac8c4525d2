"""Text to ids and back: one byte-level BPE vocabulary for all text tasks of a run.

The vocabulary is trained on train splits only, or a given Hugging Face fast tokenizer is used as
it is. Special tokens are written by `Processor`, never read from text: a cell that says '[SEP]'
is five ordinary characters, so data cannot forge the structure of a sequence.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polytask.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PAD, START, SEP, MASK, END = "[PAD]", "[START]", "[SEP]", "[MASK]", "[END]"
SPECIALS = (PAD, START, SEP, MASK, END)
BYTES = 256


@dataclass(frozen=True)
class TextCodec:
    """A tokenizer and the ids of its special tokens.

    `start` opens a sequence, `sep` stands between two texts (and before an answer), `close` ends
    an input where the tokenizer's model expects that (BERT's last [SEP]), `end` ends a generated
    text. `sentinels` and `modes` are spare ids for objectives (span corruption, denoiser modes).
    `joiner` goes before an answer when nothing else separates it from the prompt.
    """

    tokenizer: Tokenizer = field(repr=False)
    pad: int
    start: tuple[int, ...]
    sep: tuple[int, ...]
    close: tuple[int, ...]
    end: int
    mask: int | None
    sentinels: tuple[int, ...] = ()
    modes: tuple[int, ...] = ()
    joiner: str = ""

    @property
    def size(self) -> int:
        """Number of ids, special ones included."""
        return int(self.tokenizer.get_vocab_size())

    @classmethod
    def train(
        cls,
        texts: Iterable[str] | Iterator[str],
        size: int,
        sentinels: int = 32,
        modes: int | Sequence[str] = 8,
    ) -> TextCodec:
        """Learn a byte-level BPE vocabulary of at most `size` ids; same texts, same vocabulary.
        `modes` are mode tokens by name, or how many spare ones there are."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        named = [f"[MODE_{i}]" for i in range(modes)] if isinstance(modes, int) else list(modes)
        specials = [*SPECIALS, *(f"[SENTINEL_{i}]" for i in range(sentinels)), *named]
        if size < len(specials) + BYTES:
            raise ConfigError(
                f"vocab_size = {size} is too small: {BYTES} bytes and {len(specials)} special "
                f"tokens need at least {len(specials) + BYTES}"
            )
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=specials,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        tokenizer.encode_special_tokens = True
        return cls.trained(tokenizer, sentinels, len(named))

    @classmethod
    def trained(cls, tokenizer: Tokenizer, sentinels: int, modes: int) -> TextCodec:
        """A tokenizer whose first ids are SPECIALS, then sentinels, then mode tokens."""
        first = len(SPECIALS)
        return cls(
            tokenizer,
            pad=0,
            start=(1,),
            sep=(2,),
            close=(),
            mask=3,
            end=4,
            sentinels=tuple(range(first, first + sentinels)),
            modes=tuple(range(first + sentinels, first + sentinels + modes)),
        )

    @classmethod
    def of(cls, tokenizer: Any) -> TextCodec:
        """Wrap a Hugging Face fast tokenizer (its own special tokens are kept), or a codec."""
        if isinstance(tokenizer, TextCodec):
            return tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ConfigError(
                f"{type(tokenizer).__name__} is not a fast tokenizer; load it with "
                "AutoTokenizer.from_pretrained(..., use_fast=True)"
            )
        copy = _plain(backend.to_str())
        frame = list(tokenizer("")["input_ids"])
        cls_id, sep_id = tokenizer.cls_token_id, tokenizer.sep_token_id
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        start = frame[:1] or [i for i in (bos, cls_id, eos) if i is not None][:1]
        end = next((i for i in (eos, sep_id, bos) if i is not None), None)
        if not start or end is None:
            raise ConfigError(
                f"{type(tokenizer).__name__} has no token that opens or ends a text; "
                "set bos_token and eos_token"
            )
        pad = tokenizer.pad_token_id
        extra = sorted(
            i for token, i in tokenizer.get_added_vocab().items() if token.startswith("<extra_id_")
        )
        return cls(
            copy,
            pad=end if pad is None else pad,
            start=tuple(start),
            sep=() if sep_id is None else (sep_id,),
            close=tuple(frame[1:]),
            end=end,
            mask=tokenizer.mask_token_id,
            sentinels=tuple(reversed(extra)),
            joiner="" if sep_id is not None else " ",
        )

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without special tokens."""
        encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_offsets(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Ids and the characters each stands for, per text."""
        encodings = self.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [(encoding.ids, encoding.offsets) for encoding in encodings]

    def encode_words(self, rows: Sequence[Sequence[str]]) -> list[tuple[list[int], list[int]]]:
        """Ids of rows that are split into words, and which word each id belongs to."""
        encodings = self.tokenizer.encode_batch(
            [list(words) for words in rows], is_pretokenized=True, add_special_tokens=False
        )
        return [(e.ids, [-1 if w is None else w for w in e.word_ids]) for e in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids up to the first end; special tokens are left out."""
        hidden = {self.pad, self.end, *self.start, *self.sep, *self.close}
        kept = []
        for token in ids:
            if token == self.end:
                break
            if token >= 0 and token not in hidden:
                kept.append(int(token))
        return str(self.tokenizer.decode(kept, skip_special_tokens=True)).strip()

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and codec.json."""
        roles = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "tokenizer"}
        (folder / "tokenizer.json").write_text(self.tokenizer.to_str(), encoding="utf-8")
        (folder / "codec.json").write_text(json.dumps(roles), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> TextCodec:
        """Read what `save` wrote."""
        try:
            text = (folder / "tokenizer.json").read_text(encoding="utf-8")
            roles: dict[str, Any] = json.loads((folder / "codec.json").read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder}: the tokenizer cannot be read: {error}") from error
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in roles.items()
        }
        return cls(_plain(text), **values)


def _plain(text: str) -> Tokenizer:
    """A tokenizer that neither pads nor truncates and reads special tokens in text as text."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(text)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    return tokenizer
