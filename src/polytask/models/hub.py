"""Any Hugging Face encoder, decoder or encoder-decoder as the trunk.

Text goes through the model's own embeddings; other modalities enter as embeddings beside it. On
plain text the outputs are those of the bare model (tested). Weights are read from safetensors only:
a pickle can run code when it is opened.

Legend: S sequences, L length, M memory length, D width, N new tokens, C cache slots.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from polytask.errors import ConfigError
from polytask.models.masks import MaskSpec
from polytask.models.transformer import Route, RouteContext

Family = Literal["encoder", "decoder", "encoder-decoder"]


class HubCache:
    """A Hugging Face cache, and which of its slots hold valid tokens of which row."""

    def __init__(self) -> None:
        from transformers import DynamicCache

        self.inner: Any = DynamicCache()
        self.valid: Tensor | None = None  # (S, C) bool
        self.length: Tensor | None = None  # (S,)

    def extend(self, rows: int, new: int, length: Tensor | None, device: torch.device) -> Tensor:
        """Positions (S, N) of new tokens, of which `length` (S,) per row are valid."""
        if self.length is None or self.valid is None:
            self.length = torch.zeros(rows, dtype=torch.long, device=device)
            self.valid = torch.zeros(rows, 0, dtype=torch.bool, device=device)
        step = torch.arange(new, device=device)
        added = torch.full_like(self.length, new) if length is None else length
        position = self.length[:, None] + step
        self.valid = torch.cat((self.valid, step < added[:, None]), 1)
        self.length = self.length + added
        return position

    def select(self, rows: Tensor) -> None:
        """Keep some rows (int64), in that order."""
        if self.length is not None and self.valid is not None:
            self.inner.batch_select_indices(rows)
            self.length = self.length.index_select(0, rows)
            self.valid = self.valid.index_select(0, rows)


class HubTrunk(nn.Module):
    """Wraps a model; called like `Transformer` (without a routing hook)."""

    def __init__(self, model: nn.Module, family: Family) -> None:
        super().__init__()
        self.model = model
        self.family = family
        self.dim = int(self.embedding.weight.shape[1])
        self.vocab_size = int(self.embedding.weight.shape[0])
        self.decoder_start = _decoder_start(model)
        self.work: dict[str, tuple[float, ...]] = {}  # see polytask.models.flops

    @property
    def embedding(self) -> nn.Embedding:
        """The model's token embeddings."""
        found: nn.Embedding = self.model.get_input_embeddings()  # type: ignore[operator]
        return found

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether layers are recomputed in the backward pass."""
        return any(getattr(m, "gradient_checkpointing", False) for m in self.model.modules())

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        if on == self.gradient_checkpointing:
            return
        verb = "enable" if on else "disable"
        # Transformers 5 renamed the switch.
        new, old = f"activation_checkpointing_{verb}", f"gradient_checkpointing_{verb}"
        switch: Any = getattr(self.model, new if hasattr(self.model, new) else old)
        if on:
            switch({"use_reentrant": False})
        else:
            switch()

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings, scaled where the model does so itself."""
        tokens: Tensor = self.embedding(ids)
        return tokens

    def scorer(self) -> tuple[Tensor, Tensor | None]:
        """(V, D) weight and (V,) bias of the model's own language-model head."""
        model: Any = self.model
        head = model.get_output_embeddings()
        bias = getattr(head, "bias", None)
        if bias is None:
            bias = getattr(model, "final_logits_bias", None)
            bias = None if bias is None else bias[0]
        return head.weight, bias

    def forward(
        self,
        x_SLD: Tensor,
        mask: MaskSpec | None = None,
        *,
        route: Route | None = None,
        context: RouteContext | None = None,
        cache: HubCache | None = None,
    ) -> Tensor:
        """(S, L, D) last hidden states."""
        if route is not None:
            raise ConfigError("routing needs polytask's own transformer; remove 'hub' or the route")
        mask = mask or MaskSpec()
        if self.family == "encoder-decoder":
            return self._encode(x_SLD, mask)
        body: Any = self.model if self.family == "encoder" else self.model.base_model
        if cache is not None:
            return self._cached(body, x_SLD, mask, cache)
        given = self._mask(x_SLD, mask)
        options = {"use_cache": False} if self.family == "decoder" else {}
        out = body(inputs_embeds=x_SLD, attention_mask=given, return_dict=True, **options)
        hidden: Tensor = out.last_hidden_state
        return hidden

    def decode(
        self,
        x_SND: Tensor,
        memory_SMD: Tensor,
        memory_length: Tensor | None,
        cache: HubCache | None = None,
    ) -> Tensor:
        """(S, N, D) decoder states, ready to be scored; rows of equal length."""
        decoder: Any = self.model.get_decoder()  # type: ignore[operator]
        seen = None
        if memory_length is not None:
            step = torch.arange(memory_SMD.shape[1], device=memory_SMD.device)
            seen = (step < memory_length[:, None]).long()
        options: dict[str, Any] = {"use_cache": False}
        if cache is not None:
            options = {"use_cache": True, "past_key_values": self._both_caches(cache)}
        out = decoder(
            inputs_embeds=x_SND,
            encoder_hidden_states=memory_SMD,
            encoder_attention_mask=seen,
            return_dict=True,
            **options,
        )
        hidden: Tensor = out.last_hidden_state
        return hidden * self._decoder_scale()

    @staticmethod
    def _both_caches(cache: HubCache) -> Any:
        from transformers import DynamicCache, EncoderDecoderCache

        if not isinstance(cache.inner, EncoderDecoderCache):
            cache.inner = EncoderDecoderCache(cache.inner, DynamicCache())
        return cache.inner

    def _decoder_scale(self) -> float:
        """T5 with tied embeddings scores states that are scaled by 1 / sqrt(D)."""
        config: Any = self.model.config
        if "t5" not in str(config.model_type):
            return 1.0
        scaled = getattr(config, "scale_decoder_outputs", config.tie_word_embeddings)
        return float(config.d_model**-0.5) if scaled else 1.0

    def _encode(self, x_SLD: Tensor, mask: MaskSpec) -> Tensor:
        encoder: Any = self.model.get_encoder()  # type: ignore[operator]
        out = encoder(inputs_embeds=x_SLD, attention_mask=self._mask(x_SLD, mask), return_dict=True)
        hidden: Tensor = out.last_hidden_state
        return hidden

    def _mask(self, x_SLD: Tensor, mask: MaskSpec) -> Tensor | None:
        """None, a padding mask, or additive 4-D scores for what the model does not do by itself."""
        length = x_SLD.shape[1]
        alone = mask.segments is None and mask.prefix is None
        if alone and mask.causal == (self.family == "decoder"):
            # Under plain causality right padding is never seen.
            valid = None if mask.causal else mask.valid(length, x_SLD.device)
            return None if valid is None else valid.long()
        visible, causal = mask.attention(length, x_SLD.device)
        if visible is None:
            visible = torch.ones(length, length, dtype=torch.bool, device=x_SLD.device)
            visible = (visible.tril() if causal else visible)[None, None]
        return additive(visible.expand(x_SLD.shape[0], 1, length, length), x_SLD.dtype)

    def _cached(self, body: Any, x_SND: Tensor, mask: MaskSpec, cache: HubCache) -> Tensor:
        if not mask.causal:
            raise ValueError("a cache needs causal attention")
        rows, new = x_SND.shape[:2]
        position = cache.extend(rows, new, mask.length, x_SND.device)
        assert cache.valid is not None
        slots = cache.valid.shape[1]
        # A new token sees the valid slots before it: earlier ones, and up to itself among the new.
        step = torch.arange(new, device=x_SND.device)
        slot = torch.arange(slots, device=x_SND.device) - (slots - new)
        visible = (slot <= step[:, None])[None]
        if mask.prefix is not None:
            visible = visible | (slot < mask.prefix[:, None])[:, None, :]
        visible = visible & (cache.valid[:, None, :] | (slot == step[:, None])[None])
        out = body(
            inputs_embeds=x_SND,
            attention_mask=additive(visible[:, None], x_SND.dtype),
            position_ids=position,
            past_key_values=cache.inner,
            use_cache=True,
            return_dict=True,
        )
        hidden: Tensor = out.last_hidden_state
        return hidden


def _decoder_start(model: Any) -> int:
    """The token that a decoder is begun with: where Transformers 4 and 5 keep it, else padding."""
    for holder in (getattr(model, "generation_config", None), model.config):
        start = getattr(holder, "decoder_start_token_id", None)
        if start is not None:
            return int(start)
    return int(getattr(model.config, "pad_token_id", None) or 0)


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where visible, the most negative number elsewhere."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(
        ~visible, torch.finfo(dtype).min
    )


# -- loading


def locate(source: str) -> str:
    """A folder or hub id for `hub:`; 'embedded:NAME' is a model that travels in a package."""
    if source.startswith("embedded:"):
        from polytask.data.embedded import weights

        return str(weights(source.removeprefix("embedded:")))
    folder = Path(source).expanduser()
    if folder.is_dir():
        _check_folder(folder)
        return str(folder)
    if source.startswith((".", "/", "~")):
        raise ConfigError(f"hub: there is no folder {source}")
    return source


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ConfigError(f"hub: {folder} has no config.json, so it is no Hugging Face model")
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    found = f"only {pickles[0]}, a pickle, which can run code when opened" if pickles else "none"
    raise ConfigError(
        f"hub: {folder} has no weights in safetensors ({found}). Convert it where you trust it: "
        "model.save_pretrained(folder, safe_serialization=True)"
    )


def family_of(config: Any) -> Family:
    """Which kind of model a Hugging Face configuration describes."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    if getattr(config, "is_encoder_decoder", False):
        return "encoder-decoder"
    kind = config.model_type
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        return "encoder"
    return "decoder" if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else "encoder"


def load_trunk(source: str) -> HubTrunk:
    """The pretrained model at `source`, in float32. `ConfigError` when it cannot be used."""
    from safetensors import SafetensorError
    from transformers import AutoConfig

    where = locate(source)
    try:
        config = AutoConfig.from_pretrained(where)
        family = family_of(config)
        model = _auto(family).from_pretrained(
            where, config=config, use_safetensors=True, dtype=torch.float32, **_extra(family)
        )
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"hub: cannot load '{source}': {reason}") from error
    return HubTrunk(model, family)


def empty_trunk(config: dict[str, Any]) -> HubTrunk:
    """A model of the same shape with random weights, to load a checkpoint into."""
    from transformers import AutoConfig

    kept = dict(config)
    made = AutoConfig.for_model(kept.pop("model_type"), **kept)
    family = family_of(made)
    return HubTrunk(_auto(family).from_config(made, **_extra(family)), family)


def _auto(family: Family) -> Any:
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    return {
        "encoder": AutoModel,
        "decoder": AutoModelForCausalLM,
        "encoder-decoder": AutoModelForSeq2SeqLM,
    }[family]


def _extra(family: Family) -> dict[str, Any]:
    # BERT's pooler is a layer that nothing here reads; a parameter without gradient stalls DDP.
    return {"add_pooling_layer": False} if family == "encoder" else {}


@torch.no_grad()
def check_scoring(trunk: HubTrunk, source: str) -> None:
    """Refuse models whose logits are more than hidden @ weight' + bias (soft caps, scales, ...):
    generation would silently differ from the model's own."""
    training = trunk.training
    trunk.eval()
    model: Any = trunk.model
    ids = torch.arange(1, 4)[None]
    if trunk.family == "decoder":
        own = model(input_ids=ids).logits
        hidden = trunk(trunk.embed(ids), MaskSpec(causal=True))
    else:
        own = model(input_ids=ids, decoder_input_ids=ids).logits
        hidden = trunk.decode(trunk.embed(ids), trunk(trunk.embed(ids)), None)
    weight, bias = trunk.scorer()
    ours = nn.functional.linear(hidden, weight, bias)
    trunk.train(training)
    scale = float(own.abs().max())
    if not torch.allclose(ours, own, atol=1e-4 * max(1.0, scale), rtol=1e-4):
        raise ConfigError(
            f"hub: '{source}' scores tokens in a way of its own (not hidden @ embeddings'), "
            "so it cannot serve generation here; use it without generation tasks"
        )
