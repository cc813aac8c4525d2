"""Add tasks to a model with few parameters: routed adapters, scaled source adapters, peft's."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polytask.adapt.adapters import Adapters, Share
    from polytask.adapt.bottleneck import AdapterBank, Fusion, ScaledSum
    from polytask.adapt.config import AdaptConfig
    from polytask.adapt.inserting import attach
    from polytask.adapt.peft_bridge import peft_model
    from polytask.adapt.routed import RoutedLoRA
    from polytask.adapt.routing import TaskTable
    from polytask.adapt.rows import RowTasks
    from polytask.adapt.store import load, read_bottlenecks, save

_HOME = {
    "AdaptConfig": "config",
    "AdapterBank": "bottleneck",
    "Adapters": "adapters",
    "Fusion": "bottleneck",
    "RoutedLoRA": "routed",
    "RowTasks": "rows",
    "ScaledSum": "bottleneck",
    "Share": "adapters",
    "TaskTable": "routing",
    "attach": "inserting",
    "load": "store",
    "peft_model": "peft_bridge",
    "read_bottlenecks": "store",
    "save": "store",
}

__all__ = [  # noqa: RUF022 - in reading order
    "attach",
    "AdaptConfig",
    "Adapters",
    "Share",
    "RoutedLoRA",
    "TaskTable",
    "RowTasks",
    "AdapterBank",
    "ScaledSum",
    "Fusion",
    "peft_model",
    "save",
    "load",
    "read_bottlenecks",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'polytask.adapt' has no attribute '{name}'")
    return getattr(importlib.import_module(f"polytask.adapt.{_HOME[name]}"), name)
