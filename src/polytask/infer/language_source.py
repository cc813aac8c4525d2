"""Language models of all three architectures, and prefix-converted hub models, as logit sources.

What continues a text, fuses logits or ranks choices asks a `LogitSource` for logits and gets a
cache back; nothing else in it knows whether a prompt was read causally, in both directions, or by
an encoder.

Legend: B rows, N new tokens, M prompt tokens, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from polytask.errors import ConfigError
from polytask.infer.logit_sources import (
    Cache,
    HubSource,
    LogitSource,
    Vocabulary,
    last_valid,
)
from polytask.models.cache import KVCache
from polytask.models.hub_lm import HubLanguageModel
from polytask.models.lm import LanguageModel
from polytask.models.masks import MaskSpec

if TYPE_CHECKING:
    from polytask.tasks.codec import TextCodec


@dataclass(frozen=True)
class _State:
    keys: KVCache
    memory: Tensor | None = None  # (B, M, D)
    length: Tensor | None = None  # (B,) of the memory


class LanguageSource(LogitSource):
    """A `LanguageModel` with its codec (or a vocabulary, where ids are all there is).

    Prompts need no opening token: the model's own bos comes first. A prefix decoder reads the
    whole prompt in both directions, an encoder-decoder with its encoder; an empty prompt is one.
    """

    def __init__(
        self,
        model: LanguageModel,
        codec: TextCodec | None = None,
        name: str = "model",
        *,
        vocabulary: Vocabulary | None = None,
        end: Sequence[int] | None = None,
    ) -> None:
        """`end`: ids that end a text; None takes the model's `end_id`, or the codec's."""
        self.model = model.eval()
        self.codec = codec
        self.name = name
        if vocabulary is None:
            tokens = Vocabulary(tuple(str(i) for i in range(model.config.vocab_size)))
            vocabulary = tokens if codec is None else Vocabulary.of_tokenizer(codec.tokenizer)
        self.vocabulary = vocabulary
        if end is None:
            own = model.config.end_id
            end = (own,) if own is not None else (() if codec is None else (codec.end,))
        self.end = tuple(end)
        self.longest = model.longest
        self._score = model.scorer()

    @property
    def _device(self) -> torch.device:
        return self.model.embedding.weight.device

    @torch.no_grad()
    def forward(
        self, ids_BN: Tensor, cache: Cache = None, valid_BN: Tensor | None = None, last: bool = True
    ) -> tuple[Tensor, Cache]:
        ids = ids_BN.to(self._device)
        if cache is not None:
            return self._advance(ids, cache, last)
        valid = None if valid_BN is None else valid_BN.to(self._device)
        fed, length = last_valid(ids, valid)
        bos = torch.full_like(ids[:, :1] if ids.shape[1] else ids.new_zeros(len(ids), 1), 0)
        bos += self.model.config.bos_id
        if self.model.has_encoder:
            if not last:
                raise ConfigError(
                    f"'{self.name}' reads its prompt with an encoder, so it scores no token of it"
                )
            return self._begin_memory(fed, length, bos)
        state, count = _State(KVCache()), ids.shape[1] + 1
        whole = torch.full((len(ids),), count, device=self._device)
        taken = whole if length is None else length + 1
        prefix = taken if self.model.architecture == "prefix" else None
        mask = MaskSpec(causal=True, length=None if length is None else taken, prefix=prefix)
        hidden = self.model.decode(torch.cat((bos, fed), 1), mask, cache=state.keys)
        rows = torch.arange(len(ids), device=self._device)
        if last:
            return self._cut(self._score(hidden[rows, taken - 1])), state
        # Back to where the tokens stood; bos was nobody's.
        step = torch.arange(ids.shape[1], device=self._device)
        place = (step - (whole - taken)[:, None]).clamp(min=0) + 1
        index = place[:, :, None].expand(-1, -1, hidden.shape[2])
        return self._cut(self._score(hidden.gather(1, index))), state

    def _begin_memory(
        self, fed: Tensor, length: Tensor | None, bos: Tensor
    ) -> tuple[Tensor, _State]:
        if fed.shape[1] == 0:
            fed = torch.full_like(bos, self.model.config.pad_id)
            length = torch.zeros(len(fed), dtype=torch.long, device=self._device)
        memory = self.model.encode(fed, MaskSpec(length=length))
        return self._advance(bos, _State(KVCache(), memory, length), True)

    def _advance(self, ids: Tensor, state: _State, last: bool) -> tuple[Tensor, _State]:
        mask = MaskSpec(causal=True, memory_length=state.length)
        hidden = self.model.decode(ids, mask, memory=state.memory, cache=state.keys)
        return self._cut(self._score(hidden[:, -1] if last else hidden)), state

    def select(self, cache: Cache, rows: Tensor) -> Cache:
        rows = rows.to(self._device)
        cache.keys.select(rows)
        return replace(
            cache,
            memory=None if cache.memory is None else cache.memory[rows],
            length=None if cache.length is None else cache.length[rows],
        )

    def encode(self, text: str) -> list[int]:
        if self.codec is None:
            return super().encode(text)
        return list(self.codec.encode([text])[0])

    def decode(self, ids: Sequence[int]) -> str:
        if self.codec is None:
            return super().decode(ids)
        hidden = {self.codec.pad, *self.end, *self.codec.start}
        return str(self.codec.tokenizer.decode([i for i in ids if i not in hidden]))


class PrefixHubSource(HubSource):
    """A Hugging Face decoder that reads its prompt in both directions and then writes causally:
    the prompt's pass gets a four-dimensional mask, later tokens see everything before them."""

    def __init__(self, model: Any, tokenizer: Any, name: str | None = None) -> None:
        HubLanguageModel(model, "prefix")  # says now if its attention takes no such masks
        super().__init__(model, tokenizer, name)

    def _attention(self, seen_BC: Tensor, first: bool) -> Tensor:
        if not first:
            return super()._attention(seen_BC, first)
        visible = seen_BC[:, None, :] & seen_BC[:, :, None]
        own = torch.eye(seen_BC.shape[1], dtype=torch.bool, device=seen_BC.device)
        dtype = next(self.model.parameters()).dtype
        lowest = torch.finfo(dtype).min
        zero = torch.zeros(visible.shape, dtype=dtype, device=seen_BC.device)
        return zero.masked_fill(~(visible | own), lowest)[:, None]


def source_of(
    model: LanguageModel | HubLanguageModel, reader: Any = None, name: str = "model"
) -> LogitSource:
    """The source of a language model; `reader` is its codec or its Hugging Face tokenizer.

    `ConfigError` for a hub encoder-decoder, which `transformers` itself generates with.
    """
    if isinstance(model, LanguageModel):
        return LanguageSource(model, reader, name)
    if model.architecture == "encdec":
        raise ConfigError(
            f"'{name}' is a Hugging Face encoder-decoder: use its own generate() after training"
        )
    if reader is None:
        raise ConfigError(f"'{name}' needs its tokenizer to write text")
    kind = PrefixHubSource if model.architecture == "prefix" else HubSource
    return kind(model.hub, reader, name)
