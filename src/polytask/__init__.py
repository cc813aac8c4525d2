"""polytask: one library for the whole life of a multitask model.

    from polytask.pipeline import load_config, train

    run = train(load_config("my.yaml"))
    run.predict("reviews", [{"text": "..."}])

Names are loaded when they are first used, so importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polytask.data import open_rows as open_rows
    from polytask.pipeline import Run as Run
    from polytask.pipeline import RunConfig as RunConfig
    from polytask.pipeline import load_config as load_config
    from polytask.pipeline import load_run as load_run
    from polytask.pipeline import parse_config as parse_config
    from polytask.tasks import Task as Task
    from polytask.tasks import build_tasks as build_tasks

__version__ = "0.1.0"

_HOMES = {
    "Run": "pipeline",
    "RunConfig": "pipeline",
    "Task": "tasks",
    "build_tasks": "tasks",
    "load_config": "pipeline",
    "load_run": "pipeline",
    "open_rows": "data",
    "parse_config": "pipeline",
}
__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'polytask' has no attribute '{name}'")
    return getattr(import_module(f"polytask.{_HOMES[name]}"), name)
