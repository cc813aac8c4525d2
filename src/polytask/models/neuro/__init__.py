"""Neuroformer: stems, cross-modal stack, model (sheet 01); names load on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polytask.models.neuro.batch import NeuroBatch
    from polytask.models.neuro.config import (
        GroupConfig,
        NeuroformerConfig,
        TargetConfig,
        VideoConfig,
    )
    from polytask.models.neuro.model import NeuroformerModel, NeuroOutput
    from polytask.models.neuro.stack import CrossModalStack, Memory, Trace

_HOME = {
    "CrossModalStack": "stack",
    "GroupConfig": "config",
    "Memory": "stack",
    "NeuroBatch": "batch",
    "NeuroOutput": "model",
    "NeuroformerConfig": "config",
    "NeuroformerModel": "model",
    "TargetConfig": "config",
    "Trace": "stack",
    "VideoConfig": "config",
}
__all__ = [
    "CrossModalStack",
    "GroupConfig",
    "Memory",
    "NeuroBatch",
    "NeuroOutput",
    "NeuroformerConfig",
    "NeuroformerModel",
    "TargetConfig",
    "Trace",
    "VideoConfig",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"polytask.models.neuro.{_HOME[name]}"), name)
