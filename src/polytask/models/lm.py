"""Language models whose architecture is a mask: causal and prefix decoders, encoder-decoders.

Causal and prefix decoders have the same parameters under the same names, so changing one into the
other copies them one to one (`polytask.models.convert`). An encoder-decoder of the same `layers`
has about twice as many parameters at about equal operations per token, as in Wang, Roberts et al.
2022 (arXiv 2204.05832), whose backbone is `t5_like`.

Where their code and common sense differ, an option says which: `relative_bidirectional` False
(code) gives future keys of a prefix the bucket of distance 0, so that a causal model can become a
prefix model without meeting buckets it never trained; True has buckets for both directions.

Legend: B rows, L slots, M slots of inputs, T scored slots, D width, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator
from torch import Tensor, nn

from polytask import files
from polytask.configs import parse
from polytask.errors import CheckpointError
from polytask.models.cache import KVCache
from polytask.models.feed import Architecture, LanguageBatch, feed
from polytask.models.init import initialise
from polytask.models.masks import MaskSpec
from polytask.models.transformer import Transformer, TransformerConfig
from polytask.objectives.pairs import Pairs
from polytask.objectives.tokens import projected_cross_entropy

_EMBEDDED = 0.02  # deviation of embeddings at the start; 1 where logits are scaled, as in T5


class LanguageModelConfig(TransformerConfig):
    """Size and kind of a language model; `layers` are the decoder's."""

    vocab_size: int = Field(gt=0)
    architecture: Architecture = "causal"
    encoder_layers: int | None = Field(None, ge=0, description="None: as many as the decoder's")
    tie: bool = Field(True, description="score tokens with the matrix that embeds them")
    scale_logits: bool = Field(False, description="T5: embeddings start at 1, logits / sqrt(dim)")
    relative_bidirectional: bool = Field(
        False, description="relative positions of decoders: buckets for both directions"
    )
    bos_id: int = Field(0, ge=0, description="what the first slot of a segment holds")
    pad_id: int = Field(0, ge=0)
    end_id: int | None = Field(None, ge=0, description="ends a text that is written")

    @model_validator(mode="after")
    def _a_language_model(self) -> LanguageModelConfig:
        if self.experts is not None:
            raise ValueError("language models have no experts: train a MultitaskModel for those")
        for name in ("bos_id", "pad_id", "end_id"):
            value = getattr(self, name)
            if value is not None and value >= self.vocab_size:
                raise ValueError(f"{name} {value} is outside the {self.vocab_size} tokens")
        return self

    @classmethod
    def t5_like(cls, **given: Any) -> LanguageModelConfig:
        """The backbone of arXiv 2204.05832: RMS norm, gated feed-forward, relative positions with
        a table per layer, tied and scaled embeddings; sizes as given."""
        chosen = {
            "norm": "rms",
            "gated": True,
            "positions": "relative",
            "relative_tables": "layer",
            "scale_logits": True,
        }
        return cls(**(chosen | given))


class LanguageModel(nn.Module):
    """Embedding, transformer(s), scores over the vocabulary. `seed` fixes the start."""

    def __init__(self, config: LanguageModelConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        std = 1.0 if config.scale_logits else _EMBEDDED
        self.embedding.init_std = {"weight": std}  # type: ignore[assignment]
        self.encoder: Transformer | None = None
        both_ways = config.relative_bidirectional and not self.has_encoder
        if self.has_encoder:
            layers = config.layers if config.encoder_layers is None else config.encoder_layers
            self.encoder = Transformer(config.model_copy(update={"layers": layers}))
        self.decoder = Transformer(config, cross=self.has_encoder, bidirectional=both_ways)
        self.output = None if config.tie else nn.Linear(config.dim, config.vocab_size, bias=False)
        if self.output is not None:
            self.output.init_std = {"weight": _EMBEDDED}  # type: ignore[assignment]
        initialise(self, seed)

    @property
    def architecture(self) -> Architecture:
        """'causal', 'prefix' or 'encdec'."""
        return self.config.architecture

    @property
    def has_encoder(self) -> bool:
        """Whether inputs are read by an encoder."""
        return self.config.architecture == "encdec"

    @property
    def longest(self) -> int | None:
        """Positions it has, where they are limited."""
        return self.config.max_length if self.config.positions == "learned" else None

    def feed(
        self, pairs: Pairs, width: int | tuple[int, int] | None = None, pack: bool = True
    ) -> LanguageBatch:
        """`polytask.models.feed.feed` for this model."""
        config = self.config
        return feed(
            pairs, config.architecture, width, pack=pack, bos=config.bos_id, pad=config.pad_id
        )

    def encode(
        self, ids_BM: Tensor, mask: MaskSpec | None = None, positions_BM: Tensor | None = None
    ) -> Tensor:
        """(B, M, D): what the encoder makes of inputs."""
        assert self.encoder is not None
        encoded: Tensor = self.encoder(self.embedding(ids_BM), mask, positions=positions_BM)
        return encoded

    def decode(
        self,
        ids_BL: Tensor,
        mask: MaskSpec,
        *,
        memory: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """(B, L, D): the decoder's states, after the final norm and before scoring."""
        states: Tensor = self.decoder(
            self.embedding(ids_BL), mask, memory=memory, positions=positions, cache=cache
        )
        return states

    def hidden(self, batch: LanguageBatch) -> Tensor:
        """(B, L, D) decoder states of a batch."""
        memory = None
        if batch.memory_ids is not None:
            memory = self.encode(batch.memory_ids, batch.memory_mask(), batch.memory_positions)
        return self.decode(batch.ids, batch.mask(), memory=memory, positions=batch.positions)

    def scorer(self) -> Callable[[Tensor], Tensor]:
        """Decoder states (..., D) -> float32 logits (..., V)."""
        weight = self._weight()
        return lambda states: nn.functional.linear(self._scaled(states), weight).float()

    def logits(self, batch: LanguageBatch) -> Tensor:
        """(T, V) float32 at the scored slots."""
        return self.scorer()(self._scored(batch))

    def token_losses(self, batch: LanguageBatch, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """(T,) -log p of each target token and (T,) log(Z)^2; see `objectives.tokens`."""
        states = self._scaled(self._scored(batch))
        return projected_cross_entropy(states, self._weight(), batch.label, smoothing=smoothing)

    def forward(self, batch: LanguageBatch) -> Tensor:
        """`logits`."""
        return self.logits(batch)

    def _scored(self, batch: LanguageBatch) -> Tensor:
        return self.hidden(batch).flatten(0, 1).index_select(0, batch.slot)

    def _scaled(self, states: Tensor) -> Tensor:
        return states * self.config.dim**-0.5 if self.config.scale_logits else states

    def _weight(self) -> Tensor:
        return self.embedding.weight if self.output is None else self.output.weight

    def save(self, folder: Path, beside: Mapping[str, str] | None = None) -> None:
        """config.json and model.safetensors, whole or not at all; `beside`: further text files by
        name."""
        from safetensors.torch import save_file

        with files.building(folder) as aside:
            text = json.dumps(self.config.model_dump(mode="json"), indent=2)
            (aside / "config.json").write_text(text + "\n", encoding="utf-8")
            state = {name: value.contiguous() for name, value in self.state_dict().items()}
            save_file(state, aside / "model.safetensors")
            for name, content in (beside or {}).items():
                (aside / name).write_text(content, encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> LanguageModel:
        """What `save` wrote; `CheckpointError` where it is incomplete or damaged."""
        from safetensors.torch import load_file

        files.verify_manifest(folder)
        try:
            data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{folder / 'config.json'} is not JSON: {error}") from error
        model = cls(parse(LanguageModelConfig, data, str(folder / "config.json")))
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model
