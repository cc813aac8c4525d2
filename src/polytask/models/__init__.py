"""Who learns: stems per modality, trunks, heads, hub loading, FLOP counting.

Names load on first use, so that importing the package does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polytask.models.batch import Batch, Target, Terms
    from polytask.models.build import build_model
    from polytask.models.cache import KVCache
    from polytask.models.collate import Collator
    from polytask.models.features import Features
    from polytask.models.flops import Flops, parameter_table
    from polytask.models.masks import MaskSpec
    from polytask.models.multitask import MultitaskModel, Prediction
    from polytask.models.specs import (
        HeadSpec,
        InputSpec,
        ModelConfig,
        ModelSpec,
        ObjectiveConfig,
    )
    from polytask.models.task_linear import TaskLinear
    from polytask.models.transformer import (
        Route,
        RouteContext,
        Transformer,
        TransformerConfig,
    )

_HOME = {
    "Batch": "batch",
    "Collator": "collate",
    "Features": "features",
    "Flops": "flops",
    "HeadSpec": "specs",
    "InputSpec": "specs",
    "KVCache": "cache",
    "MaskSpec": "masks",
    "ModelConfig": "specs",
    "ModelSpec": "specs",
    "MultitaskModel": "multitask",
    "ObjectiveConfig": "specs",
    "Prediction": "multitask",
    "Route": "transformer",
    "RouteContext": "transformer",
    "Target": "batch",
    "TaskLinear": "task_linear",
    "Terms": "batch",
    "Transformer": "transformer",
    "TransformerConfig": "transformer",
    "build_model": "build",
    "parameter_table": "flops",
}
__all__ = [
    "Batch",
    "Collator",
    "Features",
    "Flops",
    "HeadSpec",
    "InputSpec",
    "KVCache",
    "MaskSpec",
    "ModelConfig",
    "ModelSpec",
    "MultitaskModel",
    "ObjectiveConfig",
    "Prediction",
    "Route",
    "RouteContext",
    "Target",
    "TaskLinear",
    "Terms",
    "Transformer",
    "TransformerConfig",
    "build_model",
    "parameter_table",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
