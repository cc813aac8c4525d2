"""What counts as learning: losses per pair, unreduced, in float32; names load on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polytask.objectives.classes import binary_cross_entropy, cross_entropy, mask_classes
    from polytask.objectives.contrast import info_nce
    from polytask.objectives.dense import dense_absolute, dense_cross_entropy
    from polytask.objectives.numbers import forecast, pinball, raw_forecast, regression
    from polytask.objectives.tokens import (
        per_pair,
        projected_cross_entropy,
        token_cross_entropy,
    )

_HOME = {
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
    "binary_cross_entropy",
    "cross_entropy",
    "dense_absolute",
    "dense_cross_entropy",
    "forecast",
    "info_nce",
    "mask_classes",
    "per_pair",
    "pinball",
    "projected_cross_entropy",
    "raw_forecast",
    "regression",
    "token_cross_entropy",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
