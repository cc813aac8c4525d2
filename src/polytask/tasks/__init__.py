"""What is to be learned: tasks, schemas, templates, splits, leak checks.

Names are loaded when they are used, so importing this package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polytask.tasks.build import build_tasks
    from polytask.tasks.config import InputsConfig, SplitConfig, TaskConfig
    from polytask.tasks.encode import Example, Processor, ProcessorConfig
    from polytask.tasks.leaks import LeakConfig, LeakReport, check_leaks
    from polytask.tasks.schemas import SCHEMAS, Schema, schema_from_json
    from polytask.tasks.task import Field, RowGroup, Task, TaskSet

_HOMES = {
    "build": ("build_tasks",),
    "config": ("InputsConfig", "SplitConfig", "TaskConfig"),
    "encode": ("Example", "Processor", "ProcessorConfig"),
    "leaks": ("LeakConfig", "LeakReport", "check_leaks"),
    "schemas": ("SCHEMAS", "Schema", "schema_from_json"),
    "task": ("Field", "RowGroup", "Task", "TaskSet"),
}
_MODULES = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "SCHEMAS",
    "Example",
    "Field",
    "InputsConfig",
    "LeakConfig",
    "LeakReport",
    "Processor",
    "ProcessorConfig",
    "RowGroup",
    "Schema",
    "SplitConfig",
    "Task",
    "TaskConfig",
    "TaskSet",
    "build_tasks",
    "check_leaks",
    "schema_from_json",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'polytask.tasks' has no attribute '{name}'")
    return getattr(importlib.import_module(f"polytask.tasks.{_MODULES[name]}"), name)
