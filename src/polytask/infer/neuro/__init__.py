"""Neuroformer on a recording (sheet 01); names load on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polytask.infer.neuro.generate import Draw, EventGenerator
    from polytask.infer.neuro.neuroformer import Decoded, Neuroformer
    from polytask.infer.neuro.readouts import Connectivity
    from polytask.infer.neuro.runs import Generated
    from polytask.infer.neuro.settings import NeuroSettings

_HOME = {
    "Connectivity": "readouts",
    "Decoded": "neuroformer",
    "Draw": "generate",
    "EventGenerator": "generate",
    "Generated": "runs",
    "NeuroSettings": "settings",
    "Neuroformer": "neuroformer",
}
__all__ = [
    "Connectivity",
    "Decoded",
    "Draw",
    "EventGenerator",
    "Generated",
    "NeuroSettings",
    "Neuroformer",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"polytask.infer.neuro.{_HOME[name]}"), name)
