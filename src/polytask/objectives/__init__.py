"""What counts as learning: losses per pair, unreduced, in float32, and the transforms of text into
the pairs of a language objective; names load on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polytask.objectives.classes import binary_cross_entropy, cross_entropy, mask_classes
    from polytask.objectives.contrast import info_nce
    from polytask.objectives.denoising import Specials, full_lm, prefix_lm, span_corruption
    from polytask.objectives.dense import dense_absolute, dense_cross_entropy
    from polytask.objectives.noise import BartNoise, bart_noise, masked_lm
    from polytask.objectives.numbers import forecast, pinball, raw_forecast, regression
    from polytask.objectives.pairs import Pairs
    from polytask.objectives.tokens import (
        per_pair,
        projected_cross_entropy,
        token_cross_entropy,
    )
    from polytask.objectives.ul2 import (
        FullLM,
        MixtureOfDenoisers,
        PrefixLM,
        SpanCorruption,
        chunk_size_for,
        ul2_mixture,
    )

_HOME = {
    "BartNoise": "noise",
    "FullLM": "ul2",
    "MixtureOfDenoisers": "ul2",
    "Pairs": "pairs",
    "PrefixLM": "ul2",
    "SpanCorruption": "ul2",
    "Specials": "denoising",
    "bart_noise": "noise",
    "chunk_size_for": "ul2",
    "full_lm": "denoising",
    "masked_lm": "noise",
    "prefix_lm": "denoising",
    "span_corruption": "denoising",
    "ul2_mixture": "ul2",
    "binary_cross_entropy": "classes",
    "cross_entropy": "classes",
    "mask_classes": "classes",
    "info_nce": "contrast",
    "dense_absolute": "dense",
    "dense_cross_entropy": "dense",
    "forecast": "numbers",
    "pinball": "numbers",
    "raw_forecast": "numbers",
    "regression": "numbers",
    "per_pair": "tokens",
    "projected_cross_entropy": "tokens",
    "token_cross_entropy": "tokens",
}
__all__ = [
    "BartNoise",
    "FullLM",
    "MixtureOfDenoisers",
    "Pairs",
    "PrefixLM",
    "SpanCorruption",
    "Specials",
    "bart_noise",
    "binary_cross_entropy",
    "chunk_size_for",
    "cross_entropy",
    "dense_absolute",
    "dense_cross_entropy",
    "forecast",
    "full_lm",
    "info_nce",
    "mask_classes",
    "masked_lm",
    "per_pair",
    "pinball",
    "prefix_lm",
    "projected_cross_entropy",
    "raw_forecast",
    "regression",
    "span_corruption",
    "token_cross_entropy",
    "ul2_mixture",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
