"""Use it: predict with a trained run, forecast series, fuse logits; names load on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polytask.infer.adapters import DatasetForecaster, SeriesForecaster
    from polytask.infer.forecaster import Forecaster
    from polytask.infer.fusion import fuse_step
    from polytask.infer.fusion_model import Fusion
    from polytask.infer.neuro.neuroformer import Neuroformer

_HOME = {
    "DatasetForecaster": "adapters",
    "Forecaster": "forecaster",
    "Fusion": "fusion_model",
    "Neuroformer": "neuro.neuroformer",
    "SeriesForecaster": "adapters",
    "fuse_step": "fusion",
}
__all__ = [
    "DatasetForecaster",
    "Forecaster",
    "Fusion",
    "Neuroformer",
    "SeriesForecaster",
    "fuse_step",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"polytask.infer.{_HOME[name]}"), name)
