"""A finished run: its folder, its model, and what one can ask of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polytask import files
from polytask.data import DataSpec, open_rows
from polytask.data.rows import Row
from polytask.errors import CheckpointError
from polytask.infer.predict import Answer, Predictor
from polytask.models.multitask import MultitaskModel
from polytask.pipeline import adapting
from polytask.pipeline.config import RunConfig, read_resolved
from polytask.tasks import RowGroup, TaskSet, build_tasks
from polytask.tasks.encode import Processor

if TYPE_CHECKING:
    from polytask.evaluate import TaskScore

ADAPTERS = "adapters"  # folder within it, where a run has adapters
MODEL = "model"  # folder with the weights, the model's shape and the processor


class Run:
    """A run folder. Heavy parts are read when they are first used.

    config.json     the configuration as resolved, with versions
    metrics.jsonl   every loss term and score, one JSON object a line
    checkpoints/    what resuming needs
    model/          model.safetensors, model.json, processor; complete when its manifest exists
    scores.json     test scores, single-task models and intervals
    report.html     the page to look at
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    @cached_property
    def config(self) -> RunConfig:
        return read_resolved(self.folder)

    @cached_property
    def processor(self) -> Processor:
        self._complete()
        return Processor.load(self.folder / MODEL / "processor")

    @cached_property
    def model(self) -> MultitaskModel:
        """The trained model, in evaluation mode, on the CPU."""
        self._complete()
        return load_model(self.folder / MODEL)

    @cached_property
    def scores(self) -> dict[str, Any]:
        """What scores.json holds."""
        path = self.folder / "scores.json"
        if not path.is_file():
            raise CheckpointError(f"{self.folder} has no scores.json yet: the run did not finish")
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    @property
    def report(self) -> Path:
        return self.folder / "report.html"

    def predictor(self, batch_size: int = 64) -> Predictor:
        return Predictor(self.model, self.processor, batch_size)

    def predict(self, task: str, rows: Sequence[Row]) -> list[Answer]:
        """Answers of one task for rows that have its input columns."""
        return self.predictor().predict(task, rows)

    def evaluate(
        self,
        data: str | Mapping[str, Any] | None = None,
        *,
        tasks: Sequence[str] | None = None,
        split: str = "test",
        batch_size: int = 256,
        resume_file: Path | None = None,
    ) -> dict[str, TaskScore]:
        """Scores by task, on the run's own split or on the labelled rows of `data`.

        `data` (a path, 'hub:ID', 'embedded:NAME' or mapping) holds rows for the one task named.
        """
        from polytask.evaluate import evaluate

        taskset = self._own_tasks() if data is None else self._tasks_on(data, tasks or (), split)
        return evaluate(
            self.model,
            taskset,
            self.processor,
            split,
            batch_size,
            resume_file=resume_file,
            tasks=tasks,
        )

    def _own_tasks(self) -> TaskSet:
        base = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))["base"]
        return build_tasks(self.config.tasks, Path(base), self.config.seed)

    def _tasks_on(self, data: Any, tasks: Sequence[str], split: str) -> TaskSet:
        """The run's tasks with `data` as the split of the named one's row group."""
        source = open_rows(DataSpec.of(data), Path())
        owners = {self.processor.group_of(name) for name in tasks}
        groups = []
        for number, layout in enumerate(self.processor.layouts):
            rows = {split: source} if number in owners else {}
            groups.append(
                RowGroup(layout.name, tuple(replace(t, splits=rows) for t in layout.tasks))
            )
        return TaskSet(tuple(groups))

    def _complete(self) -> None:
        if not (self.folder / MODEL).is_dir():
            read_resolved(self.folder)  # says so when this is no run folder at all
            raise CheckpointError(
                f"{self.folder} has no finished model. Run the same `polytask train` again: it "
                "goes on where it stopped"
            )
        files.verify_manifest(self.folder / MODEL)


def load_run(folder: Path | str) -> Run:
    """The run in `folder`; `ConfigError` when there is none."""
    run = Run(folder)
    _ = run.config
    return run


def save_model(folder: Path, model: MultitaskModel, processor: Processor) -> None:
    """Write weights, shape and processor; `folder` appears only when all of it is there."""
    from safetensors.torch import save_model as save_tensors

    with files.building(folder) as aside:
        save_tensors(model, str(aside / "model.safetensors"))
        files.write_text(aside / "model.json", model.to_json())
        processor.save(aside / "processor")
        adapting.save_adapters(aside / ADAPTERS, model)


def load_model(folder: Path) -> MultitaskModel:
    """What `save_model` wrote, in evaluation mode."""
    from safetensors import SafetensorError
    from safetensors.torch import load_model as load_tensors

    model = MultitaskModel.from_json((folder / "model.json").read_text(encoding="utf-8"))
    if (folder / ADAPTERS).is_dir():
        adapting.reattach(model, folder / ADAPTERS)
    try:
        load_tensors(model, str(folder / "model.safetensors"))
    except (SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{folder / 'model.safetensors'} does not fit: {error}") from error
    return model.eval()
