"""From one architecture to another by switching the attention mask: parameters are copied 1:1.

Wang, Roberts et al. 2022 (arXiv 2204.05832), section 5: a causal decoder that was trained on full
language modelling, continued as a prefix decoder on span corruption (non-causal adaptation), learns
that objective several times as fast as from scratch; the way back (language-modelling adaptation)
gains too. From an encoder-decoder it does not: cutting away the encoder was worse than starting
anew, which is why that is refused unless forced.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import nn

from polytask.errors import ConfigError
from polytask.models.hub_lm import HubLanguageModel
from polytask.models.lm import LanguageModel

_TARGETS = ("causal", "prefix")
_CROSS = (".cross.", ".norm_cross.")


@overload
def convert(
    model: LanguageModel, to: Literal["causal", "prefix"], force: bool = False
) -> LanguageModel: ...
@overload
def convert(
    model: nn.Module, to: Literal["causal", "prefix"], force: bool = False
) -> LanguageModel | HubLanguageModel: ...
def convert(
    model: nn.Module, to: Literal["causal", "prefix"], force: bool = False
) -> LanguageModel | HubLanguageModel:
    """The model as a causal or a prefix decoder.

    A `LanguageModel` is copied (names and values of the copy are compared with the original's). A
    Hugging Face decoder is wrapped: it stays the object it is and gets its masks from outside.
    Optimiser states do not belong to a model; a run that goes on with it starts its own.

    Errors (`ConfigError`): an encoder-decoder, unless `force` drops encoder and cross-attention;
    a causal model with relative buckets for both directions as a prefix decoder, unless forced
    (the buckets of the future were never trained); a Hugging Face encoder-decoder in any case.
    """
    if to not in _TARGETS:
        raise ConfigError(
            f"a model is converted to 'causal' or 'prefix', not to '{to}': an encoder-decoder "
            "has weights that a decoder lacks"
        )
    if isinstance(model, HubLanguageModel):
        return _hub(model.hub, to)
    if not isinstance(model, LanguageModel):
        return _hub(model, to)
    if model.has_encoder and not force:
        raise ConfigError(
            "this model is an encoder-decoder. Dropping its encoder and cross-attention was worse "
            "than training a decoder from scratch (arXiv 2204.05832, section 5.1); force=True "
            "does it all the same"
        )
    untrained = model.architecture == "causal" and model.config.relative_bidirectional
    if to == "prefix" and untrained and model.decoder.relative is not None and not force:
        raise ConfigError(
            "its relative positions have buckets for both directions, and a causal model has "
            "never trained those of the future; relative_bidirectional: false avoids it, "
            "force=True converts it all the same"
        )
    return _copy(model, to)


def _hub(model: Any, to: Literal["causal", "prefix"]) -> HubLanguageModel:
    if getattr(model.config, "is_encoder_decoder", False):
        raise ConfigError(
            f"{type(model).__name__} is an encoder-decoder; a mask does not make a decoder of it, "
            "and dropping its encoder was worse than training from scratch (arXiv 2204.05832)"
        )
    return HubLanguageModel(model, to)


def _copy(model: LanguageModel, to: Literal["causal", "prefix"]) -> LanguageModel:
    config = model.config.model_copy(update={"architecture": to})
    with torch.random.fork_rng(devices=[]):
        copy = LanguageModel(config)
    old = {
        name: value
        for name, value in model.state_dict().items()
        if not name.startswith("encoder.") and not any(part in name for part in _CROSS)
    }
    copy.to(next(model.parameters()).dtype).to(next(model.parameters()).device)
    copy.load_state_dict(old)
    for name, value in copy.state_dict().items():
        if not torch.equal(torch.nan_to_num(value), torch.nan_to_num(old[name])):
            raise AssertionError(f"{name} changed in conversion")
    return copy.train(model.training)
