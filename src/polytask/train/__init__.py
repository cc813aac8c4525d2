"""How it learns: trainer, stages, optimisers, gradient aggregation, checkpoints, distribution.

Names are loaded when they are first used, so importing the package does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polytask.train.config import EarlyStopping, StageConfig, TrainConfig
    from polytask.train.flat import FlatMTL
    from polytask.train.loader import FunctionLoader, Loader, make_loader
    from polytask.train.trainer import Trainer, TrainResult

_HOMES = {
    "EarlyStopping": "config",
    "FlatMTL": "flat",
    "FunctionLoader": "loader",
    "Loader": "loader",
    "StageConfig": "config",
    "TrainConfig": "config",
    "TrainResult": "trainer",
    "Trainer": "trainer",
    "make_loader": "loader",
}

__all__ = [
    "EarlyStopping",
    "FlatMTL",
    "FunctionLoader",
    "Loader",
    "StageConfig",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "make_loader",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'polytask.train' has no attribute '{name}'")
    return getattr(import_module(f"polytask.train.{_HOMES[name]}"), name)
