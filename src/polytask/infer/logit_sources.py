"""Models that give next-token logits, behind one face: ids in, logits and a cache out.

Three kinds: a Hugging Face causal LM, polytask's own language model, and any function of ids (a
model behind an API, say). Every source keeps its own cache; prompts of a batch are padded on the
left and positions counted per row, so a row gives what it would give alone.

Models that are combined by logits must agree on what a logit means: `check_same_vocabulary`
compares size and order, token by token.

Legend: B rows, N new tokens, C tokens so far, V vocabulary.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from polytask.errors import ConfigError, DataError
from polytask.models.masks import MaskSpec

if TYPE_CHECKING:
    from polytask.models.multitask import MultitaskModel
    from polytask.tasks.codec import TextCodec

Cache = Any  # a source's own business; None at the start


@dataclass(frozen=True)
class Vocabulary:
    """What each id stands for; None where a tokenizer leaves a hole."""

    tokens: tuple[str | None, ...]

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def of_tokenizer(cls, tokenizer: Any) -> Vocabulary:
        """Of a Hugging Face tokenizer (or one of the `tokenizers` package), added tokens
        included."""
        found: dict[str, int] = tokenizer.get_vocab()
        tokens: list[str | None] = [None] * (max(found.values(), default=-1) + 1)
        for token, index in found.items():
            tokens[index] = token
        return cls(tuple(tokens))

    def difference(self, other: Vocabulary) -> str | None:
        """The first id that stands for something else there, in words; None when there is none."""
        for index, (mine, theirs) in enumerate(zip(self.tokens, other.tokens, strict=False)):
            if mine != theirs:
                same = set(self.tokens) == set(other.tokens)
                order = " (the same tokens in another order)" if same else ""
                return f"id {index} is {mine!r} in the one and {theirs!r} in the other{order}"
        if len(self) == len(other):
            return None
        longer = self if len(self) > len(other) else other
        index = min(len(self), len(other))
        return f"id {index}, {longer.tokens[index]!r}, is only in one of them"


class LogitSource(ABC):
    """A model that scores the next token. `encode` and `decode` are there where it reads text."""

    name: str
    vocabulary: Vocabulary
    end: tuple[int, ...] = ()  # ids that end a text
    longest: int | None = None  # positions it has, where they are limited

    @abstractmethod
    def forward(
        self, ids_BN: Tensor, cache: Cache = None, valid_BN: Tensor | None = None, last: bool = True
    ) -> tuple[Tensor, Cache]:
        """Logits after the new tokens, (B, V), or after each of them, (B, N, V), if not `last`.

        Args:
            cache: what the call before returned; None at the start.
            valid_BN: False at padding, which stands on the left; only with the first tokens.
        """

    @abstractmethod
    def select(self, cache: Cache, rows: Tensor) -> Cache:
        """The cache of some rows (int64), in that order."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text that is to be continued."""
        raise ConfigError(f"{self.name} reads ids, not text")

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids."""
        raise ConfigError(f"{self.name} writes ids, not text")

    def _cut(self, logits: Tensor) -> Tensor:
        """Embeddings may be padded beyond the vocabulary; those rows mean nothing."""
        if logits.shape[-1] < len(self.vocabulary):
            raise ConfigError(
                f"{self.name} scores {logits.shape[-1]} tokens and its vocabulary has "
                f"{len(self.vocabulary)}: model and tokenizer do not belong together"
            )
        return logits[..., : len(self.vocabulary)]


def check_same_vocabulary(sources: Sequence[LogitSource]) -> None:
    """`ConfigError` naming the first id that does not stand for the same token everywhere."""
    check_vocabularies([(source.name, source.vocabulary) for source in sources])


def check_vocabularies(named: Sequence[tuple[str, Vocabulary]]) -> None:
    """The same for vocabularies with the names of their models."""
    for name, other in named[1:]:
        first, mine = named[0]
        found = mine.difference(other)
        if found is not None:
            raise ConfigError(
                f"'{first}' ({len(mine)} tokens) and '{name}' ({len(other)} tokens) do not share a "
                f"vocabulary: {found}. Logits can only be added where every id stands for the same "
                "token: take models with one tokenizer"
            )


def last_valid(x_BN: Tensor, valid_BN: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Left-padded rows moved to the left, and their lengths (B,): what `KVCache` expects."""
    if valid_BN is None or bool(valid_BN.all()):
        return x_BN, None
    length = valid_BN.sum(1)
    step = torch.arange(x_BN.shape[1], device=x_BN.device)
    place = (step + (x_BN.shape[1] - length)[:, None]).clamp(max=x_BN.shape[1] - 1)
    return x_BN.gather(1, place), length


# -- Hugging Face


@dataclass
class _HubState:
    past: Any
    valid: Tensor  # (B, C)


class HubSource(LogitSource):
    """A Hugging Face causal LM with its tokenizer.

    Its own forward makes the logits, soft caps and scales included. Positions count each row's own
    tokens, whatever the padding.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str | None = None) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.name = name or str(getattr(model.config, "name_or_path", "") or "model")
        self.vocabulary = Vocabulary.of_tokenizer(tokenizer)
        scorer = model.get_output_embeddings()
        rows = model.config.vocab_size if scorer is None else scorer.weight.shape[0]
        self._cut(torch.empty(0, int(rows)))  # said now, not after the first forward pass
        ends: set[int | None] = set()
        for holder in (tokenizer, getattr(model, "generation_config", None)):
            given: Any = getattr(holder, "eos_token_id", None)
            ends |= set(given if isinstance(given, list | tuple) else [given])
        self.end = tuple(sorted(e for e in ends if e is not None))
        self.longest = getattr(model.config, "max_position_embeddings", None)
        self._accepts = set(inspect.signature(model.forward).parameters)

    @classmethod
    def load(
        cls,
        source: str,
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        tokenizer: Any = None,
    ) -> HubSource:
        """From a folder, a hub id or 'embedded:NAME'; weights from safetensors only."""
        from transformers import AutoModelForCausalLM

        from polytask.models.hub import locate

        where = locate(source)
        tokenizer = hub_tokenizer(source) if tokenizer is None else tokenizer
        with _readable(source):
            model: Any = AutoModelForCausalLM.from_pretrained(
                where, use_safetensors=True, dtype=dtype
            )
        return cls(model.to(device), tokenizer, source)

    @torch.no_grad()
    def forward(
        self, ids_BN: Tensor, cache: Cache = None, valid_BN: Tensor | None = None, last: bool = True
    ) -> tuple[Tensor, Cache]:
        ids = ids_BN.to(self.model.device)
        fresh = torch.ones_like(ids, dtype=torch.bool)
        if valid_BN is not None:
            fresh = valid_BN.to(ids.device)
        seen = fresh if cache is None else torch.cat((cache.valid, fresh), 1)
        options: dict[str, Any] = {}
        if "position_ids" in self._accepts:
            position = seen.long().cumsum(1) - 1
            options["position_ids"] = position.clamp(min=0)[:, -ids.shape[1] :]
        if last and "logits_to_keep" in self._accepts:
            options["logits_to_keep"] = 1
        out = self.model(
            input_ids=ids,
            attention_mask=self._attention(seen, cache is None),
            past_key_values=None if cache is None else cache.past,
            use_cache=True,
            return_dict=True,
            **options,
        )
        logits = self._cut(out.logits[:, -1] if last else out.logits)
        return logits, _HubState(out.past_key_values, seen)

    def _attention(self, seen_BC: Tensor, first: bool) -> Tensor:
        """The mask to hand to the model; `first`: the prompt's pass."""
        return seen_BC.long()

    def select(self, cache: Cache, rows: Tensor) -> Cache:
        rows = rows.to(cache.valid.device)
        if not hasattr(cache.past, "batch_select_indices"):
            raise ConfigError(
                f"'{self.name}' keeps a {type(cache.past).__name__}, from which rows cannot be "
                "taken; give it one prompt at a time"
            )
        cache.past.batch_select_indices(rows)
        return _HubState(cache.past, cache.valid[rows])

    def encode(self, text: str) -> list[int]:
        found: list[int] = list(self.tokenizer(text)["input_ids"])
        if not found and self.tokenizer.bos_token_id is not None:
            found = [int(self.tokenizer.bos_token_id)]
        return found

    def decode(self, ids: Sequence[int]) -> str:
        return str(
            self.tokenizer.decode(
                list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )


def hub_tokenizer(source: str) -> Any:
    """The tokenizer of a folder, a hub id or 'embedded:NAME'."""
    from transformers import AutoTokenizer

    from polytask.models.hub import locate

    where = locate(source)
    with _readable(source):
        return AutoTokenizer.from_pretrained(where)


def load_hub_sources(
    places: Sequence[str], *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> list[HubSource]:
    """Several models that are to be combined: vocabularies are compared before any weight is
    read."""
    tokenizers = [hub_tokenizer(place) for place in places]
    check_vocabularies(
        [(place, Vocabulary.of_tokenizer(t)) for place, t in zip(places, tokenizers, strict=True)]
    )
    return [
        HubSource.load(place, dtype=dtype, device=device, tokenizer=tokenizer)
        for place, tokenizer in zip(places, tokenizers, strict=True)
    ]


@contextmanager
def _readable(source: str) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        lines = str(error).strip().splitlines() or [repr(error)]
        raise ConfigError(f"cannot load '{source}' as a causal LM: {lines[0]}") from error


# -- polytask's own


class PolytaskSource(LogitSource):
    """A `MultitaskModel` that was trained on a language_model task: causal text, own cache.

    `codec` is the text codec of its run; `vocabulary` stands in for it where ids are all there is.
    `start` opens a text.
    """

    def __init__(
        self,
        model: MultitaskModel,
        codec: TextCodec | None = None,
        name: str = "model",
        *,
        vocabulary: Vocabulary | None = None,
        start: Sequence[int] = (),
    ) -> None:
        from polytask.models.language import token_scorer
        from polytask.models.transformer import Transformer

        if "generate" not in model.heads:
            raise ConfigError(f"'{name}' has no task that writes text, so it scores no tokens")
        if model.has_decoder:
            raise ConfigError(
                f"'{name}' answers with a decoder that attends to an encoded prompt; fusion needs "
                "models that continue a text"
            )
        self.model = model.eval()
        self.name = name
        self.codec = codec
        if vocabulary is None:
            if codec is None:
                raise ConfigError(f"'{name}': give its codec or its vocabulary")
            vocabulary = Vocabulary.of_tokenizer(codec.tokenizer)
        self.vocabulary = vocabulary
        self.start = tuple(start) or (codec.start if codec is not None else ())
        end = model.spec.inputs.end_id
        self.end = () if end is None else (end,)
        trunk = model.trunk
        if isinstance(trunk, Transformer) and trunk.config.positions == "learned":
            self.longest = trunk.config.max_length
        self._score = token_scorer(model)

    @torch.no_grad()
    def forward(
        self, ids_BN: Tensor, cache: Cache = None, valid_BN: Tensor | None = None, last: bool = True
    ) -> tuple[Tensor, Cache]:
        cache = self.model.new_cache() if cache is None else cache
        device = next(self.model.parameters()).device
        valid = None if valid_BN is None else valid_BN.to(device)
        ids, length = last_valid(ids_BN.to(device), valid)
        x = self.model.embed_text(ids)
        hidden = self.model.trunk(x, MaskSpec(causal=True, length=length), cache=cache)
        if last:
            rows = torch.arange(len(ids), device=device)
            hidden = hidden[:, -1] if length is None else hidden[rows, length - 1]
        elif length is not None:  # back to where the tokens stood
            step = torch.arange(ids.shape[1], device=device)
            place = step - (ids.shape[1] - length)[:, None]
            index = place.clamp(min=0)[:, :, None].expand(-1, -1, hidden.shape[2])
            hidden = hidden.gather(1, index)
        return self._cut(self._score(hidden)), cache

    def select(self, cache: Cache, rows: Tensor) -> Cache:
        cache.select(rows.to(next(self.model.parameters()).device))
        return cache

    def encode(self, text: str) -> list[int]:
        if self.codec is None:
            return super().encode(text)
        return [*self.start, *self.codec.encode([text])[0]]

    def decode(self, ids: Sequence[int]) -> str:
        if self.codec is None:
            return super().decode(ids)
        hidden = {self.codec.pad, self.codec.end, *self.codec.start}
        return str(self.codec.tokenizer.decode([i for i in ids if i not in hidden]))


# -- anything


class CallableSource(LogitSource):
    """Any function (ids (B, C), valid (B, C)) -> logits (B, V) after the last token, or (B, C, V).

    It has no cache: every call gets all tokens so far. `valid` is False at the padding on the left.
    """

    def __init__(
        self,
        function: Callable[[Tensor, Tensor], Tensor],
        vocabulary: Vocabulary | Sequence[str | None],
        name: str = "function",
        *,
        end: Sequence[int] = (),
        encode: Callable[[str], list[int]] | None = None,
        decode: Callable[[Sequence[int]], str] | None = None,
    ) -> None:
        self.function = function
        if not isinstance(vocabulary, Vocabulary):
            vocabulary = Vocabulary(tuple(vocabulary))
        self.vocabulary = vocabulary
        self.name = name
        self.end = tuple(end)
        self._encode, self._decode = encode, decode

    @torch.no_grad()
    def forward(
        self, ids_BN: Tensor, cache: Cache = None, valid_BN: Tensor | None = None, last: bool = True
    ) -> tuple[Tensor, Cache]:
        fresh = torch.ones_like(ids_BN, dtype=torch.bool) if valid_BN is None else valid_BN
        ids, valid = ids_BN, fresh
        if cache is not None:
            ids, valid = torch.cat((cache[0], ids), 1), torch.cat((cache[1], valid), 1)
        found = self.function(ids, valid)
        if found.dim() == 3:
            found = found[:, -1] if last else found[:, -ids_BN.shape[1] :]
        elif not last:
            raise ConfigError(
                f"'{self.name}' gives logits after the last token only; scoring a text needs them "
                "after every token: (rows, tokens, vocabulary)"
            )
        if found.shape[:1] != ids.shape[:1]:
            raise DataError(f"'{self.name}' gave {tuple(found.shape)} for ids {tuple(ids.shape)}")
        return self._cut(found), (ids, valid)

    def select(self, cache: Cache, rows: Tensor) -> Cache:
        return cache[0][rows], cache[1][rows]

    def encode(self, text: str) -> list[int]:
        return super().encode(text) if self._encode is None else self._encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return super().decode(ids) if self._decode is None else self._decode(ids)
