"""The suggested task configurations build as they stand, and judge nothing that was trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from polytask.data import embedded
from polytask.tasks import TaskSet, build_tasks
from polytask.tasks.leaks import check_leaks

TASKS: dict[str, dict[str, Any]] = {
    name: dict(task)
    for set_name in embedded.names()
    for name, task in embedded.info(set_name).tasks.items()
    if any(source.installed() for source in embedded.info(set_name).sources)
}


@pytest.fixture(scope="module")
def built(installed: Callable[[str], Any]) -> Iterator[TaskSet]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLYTASK_CACHE", str(installed.folder))  # type: ignore[attr-defined]
        yield build_tasks(TASKS)


def test_every_suggested_task_builds_with_its_schema(built: TaskSet) -> None:
    assert set(built.names) == set(TASKS)
    for task in built.tasks:
        assert task.schema.kind == TASKS[task.name]["schema"]
        assert {"train", "valid", "test"} <= set(task.splits)


def test_splits_are_taken_over_as_they_are(built: TaskSet, installed: Callable[[str], Any]) -> None:
    for task in built.tasks:
        source = TASKS[task.name]["data"].removeprefix("embedded:")
        sizes = {split: len(rows) for split, rows in installed(source).items()}
        assert {split: len(rows) for split, rows in task.splits.items()} == sizes  # type: ignore[arg-type]


def test_no_row_repeats_another(built: TaskSet) -> None:
    repeats = [note for note in map(str, built.notes) if "repeat the inputs" in note]
    assert repeats == []


def test_no_judged_row_was_trained_on_by_any_of_the_tasks(built: TaskSet) -> None:
    leaks = check_leaks(built).leaks
    assert [str(leak) for leak in leaks if leak.kind == "exact"] == []
    assert max((leak.share for leak in leaks), default=0.0) < 0.015
