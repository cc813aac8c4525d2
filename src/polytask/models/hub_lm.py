"""A Hugging Face language model that trains on pairs: causal, prefix or encoder-decoder.

A causal decoder becomes a prefix decoder by its attention mask alone: every pass hands the model a
four-dimensional mask, which its 'sdpa' and 'eager' attention take as it is. The same masks keep
packed pairs apart. Whether a model really honours such a mask is tried once on five tokens before
anything is trained, since an architecture that ignores it would leak silently.

Legend: B rows, L slots, T scored slots, V vocabulary.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polytask.errors import ConfigError
from polytask.models.feed import Architecture, LanguageBatch, feed
from polytask.models.masks import MaskSpec
from polytask.objectives.pairs import Pairs
from polytask.objectives.tokens import token_cross_entropy

_KERNELS = ("sdpa", "eager")
_RELATIVE = ("t5", "mt5", "umt5")  # encoder-decoders whose positions are relative: packing is exact


class HubLanguageModel(nn.Module):
    """`model` (AutoModelForCausalLM or AutoModelForSeq2SeqLM) under `architecture`.

    The weights are the model's own and keep their names below `hub.`. `bos` is fed into the first
    slot of a decoder's segments; by default nothing is, as in the model's own training, and a pair
    without an input does not score its first token.

    Errors: `ConfigError` for an architecture that the model cannot have, an attention kernel that
    takes no masks, or a mask that is not honoured.
    """

    def __init__(
        self,
        model: nn.Module,
        architecture: Architecture | None = None,
        bos: int | None = None,
        pad: int | None = None,
    ) -> None:
        super().__init__()
        self.hub: Any = model
        config: Any = model.config
        both = bool(getattr(config, "is_encoder_decoder", False))
        own: Architecture = "encdec" if both else "causal"
        self._architecture: Architecture = architecture or own
        if both is not (self._architecture == "encdec"):
            kind = "an encoder-decoder" if both else "a decoder"
            raise ConfigError(
                f"{type(model).__name__} is {kind}; '{self._architecture}' is not what a mask can "
                "make of it"
            )
        if both:
            bos = config.decoder_start_token_id if bos is None else bos
            bos = config.pad_token_id if bos is None else bos
        self.bos = bos
        given = getattr(config, "pad_token_id", None) if pad is None else pad
        self.pad = int(given) if isinstance(given, int) and given >= 0 else 0
        self._accepts = set(inspect.signature(model.forward).parameters)
        self._tried = False
        if self._architecture == "prefix":
            self._try_masks()

    @property
    def architecture(self) -> Architecture:
        """'causal', 'prefix' or 'encdec'."""
        return self._architecture

    @property
    def vocab_size(self) -> int:
        """Tokens that have an embedding."""
        return int(self.hub.get_input_embeddings().weight.shape[0])

    def feed(
        self, pairs: Pairs, width: int | tuple[int, int] | None = None, pack: bool = True
    ) -> LanguageBatch:
        """Lay out pairs as the model was trained to read them."""
        if pack and self._architecture == "encdec" and self.hub.config.model_type not in _RELATIVE:
            raise ConfigError(
                f"packing keeps positions only where they are relative ({', '.join(_RELATIVE)}), "
                f"not in '{self.hub.config.model_type}': set pack to false"
            )
        return feed(pairs, self._architecture, width, pack=pack, bos=self.bos, pad=self.pad)

    def logits(self, batch: LanguageBatch) -> Tensor:
        """(T, V) float32 at the scored slots, caps and scales of the model included."""
        found = self._run(batch).flatten(0, 1).index_select(0, batch.slot)
        return found.float()

    def token_losses(self, batch: LanguageBatch, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """(T,) -log p of each target token and (T,) log(Z)^2."""
        return token_cross_entropy(self.logits(batch), batch.label, smoothing)

    def forward(self, batch: LanguageBatch) -> Tensor:
        """`logits`."""
        return self.logits(batch)

    def save(self, folder: Path) -> None:
        """What `transformers` loads; the architecture is a matter of masks and is not in it."""
        self.hub.save_pretrained(folder, safe_serialization=True)

    def _run(self, batch: LanguageBatch) -> Tensor:
        given: dict[str, Any] = {"use_cache": False}
        device, length = batch.ids.device, batch.ids.shape[1]
        visible, plain = batch.mask().attention(length, device)
        if self._architecture == "encdec":
            assert batch.memory_ids is not None
            memory = batch.memory_ids.shape[1]
            below, _ = batch.memory_mask().attention(memory, device)
            across = batch.mask().cross_attention(memory, device)
            given |= {"input_ids": batch.memory_ids, "decoder_input_ids": batch.ids}
            if batch.memory_segments is None:
                # The model makes the masks of encoder and cross-attention of this one.
                valid = batch.memory_mask().valid(memory, device)
                given["attention_mask"] = None if valid is None else valid.long()
            else:
                self._try_masks()
                assert below is not None and across is not None
                states = self.hub.get_encoder()(
                    input_ids=batch.memory_ids, attention_mask=self._additive(below)
                )
                del given["input_ids"]
                given["encoder_outputs"] = states
                given["attention_mask"] = self._additive(_open_empty(across))
                given["decoder_attention_mask"] = self._additive(visible)
        else:
            given["input_ids"] = batch.ids
            if not plain:
                self._try_masks()
                _check_window(self.hub, length)
                given["attention_mask"] = self._additive(visible)
            if batch.positions is not None:
                given["position_ids"] = batch.positions
        logits: Tensor = self.hub(**given).logits
        return logits

    def _additive(self, visible: Tensor | None) -> Tensor:
        """0 where visible and the most negative number elsewhere: what both kernels take."""
        assert visible is not None
        dtype = next(self.hub.parameters()).dtype
        zero = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        return zero.masked_fill(~visible, torch.finfo(dtype).min)

    def _try_masks(self) -> None:
        """Once: the kernel takes masks, and a token sees what the mask says and nothing else."""
        if self._tried:
            return
        config = self.hub.config
        kernel = getattr(config, "_attn_implementation", "eager")
        if kernel not in _KERNELS:
            raise ConfigError(
                f"'{kernel}' attention takes no mask of our making: load the model with "
                "attn_implementation='sdpa' (or 'eager')"
            )
        if self._architecture != "encdec":
            if "position_ids" not in self._accepts:
                raise ConfigError(
                    f"{type(self.hub).__name__} takes no position_ids, so positions cannot "
                    "restart in a packed row"
                )
            self._probe()
        self._tried = True

    @torch.no_grad()
    def _probe(self) -> None:
        training = self.hub.training
        self.hub.eval()
        device = next(self.hub.parameters()).device
        ids = torch.arange(1, 6, device=device)[None] % self.vocab_size
        visible, _ = MaskSpec(causal=True, prefix=torch.tensor([3], device=device)).attention(
            5, device
        )
        states = []
        for changed in (None, 2, 4):
            fed = ids.clone()
            if changed is not None:
                fed[0, changed] = (fed[0, changed] + 7) % self.vocab_size
            states.append(
                self.hub(
                    input_ids=fed, attention_mask=self._additive(visible), use_cache=False
                ).logits[0]
            )
        self.hub.train(training)
        sees_prefix = not torch.allclose(states[0][0], states[1][0])
        sees_future = not torch.allclose(states[0][:4], states[2][:4], rtol=1e-3, atol=1e-3)
        if not sees_prefix or sees_future:
            raise ConfigError(
                f"{type(self.hub).__name__} does not attend as its mask says, so it can be neither "
                "a prefix decoder nor fed packed rows: train it as it is, with pack: false"
            )


def _open_empty(across: Tensor) -> Tensor:
    """Slots that see no memory (padding, pairs without an input) see all of it instead of a
    softmax over nothing."""
    return across | ~across.any(-1, keepdim=True)


def _check_window(model: Any, length: int) -> None:
    """Layers with a sliding window would see further under a mask of ours than they should."""
    config = model.config
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    slides = getattr(config, "use_sliding_window", True)
    if kinds is not None:
        slides = "sliding_attention" in kinds
    if window is not None and slides and length > window:
        raise ConfigError(
            f"{type(model).__name__} has layers that see {window} tokens back; a prefix or packed "
            f"mask over {length} would let them see further. Use rows of at most {window} tokens"
        )
