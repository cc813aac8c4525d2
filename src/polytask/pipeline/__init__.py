"""From a configuration to a trained, judged and reported model: what `polytask train` does.

config = load_config("my.yaml")
run = train(config)                      # or load_run("runs/my") later
run.predict("reviews", rows)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polytask.pipeline.config import EvaluateConfig, RunConfig, load_config, parse_config
    from polytask.pipeline.run import Run, load_run
    from polytask.pipeline.training import train

__all__ = [
    "EvaluateConfig",
    "Run",
    "RunConfig",
    "load_config",
    "load_run",
    "parse_config",
    "train",
]

_HOMES = {
    "EvaluateConfig": "config",
    "RunConfig": "config",
    "load_config": "config",
    "parse_config": "config",
    "Run": "run",
    "load_run": "run",
    "train": "training",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
