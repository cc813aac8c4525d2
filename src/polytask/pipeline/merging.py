"""What a merge is worth: base, experts and merge scored on the same rows, then the page.

Every task is answered through the head of the model it belongs to; what changes from column to
column is the trunk beneath. Tensors are swapped into the head's model one at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polytask import files
from polytask.errors import ConfigError, MergeError, suggestion
from polytask.evaluate.comparison import compare_single
from polytask.evaluate.scored import TaskScore
from polytask.merge.config import CompareConfig
from polytask.merge.plan import Plan
from polytask.merge.sources import TensorSource, open_source

Say = Callable[[str], None]
MERGE, BASE = "merge", "base"


@dataclass(frozen=True)
class Row:
    """One task: its values by column, and the merge against the model the task belongs to."""

    task: str
    model: str
    metric: str
    higher_is_better: bool
    rows: int
    values: dict[str, float]
    gain: tuple[float, float, float] | None = None  # merge minus own model: mean, low, high


@dataclass(frozen=True)
class Compared:
    """The table: columns are 'base', the experts, 'merge'; `scales`: s -> task -> value."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    scales: dict[float, dict[str, float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "columns": list(self.columns),
            "rows": [vars(row) for row in self.rows],
            "scales": [[s, values] for s, values in self.scales.items()],
        }


class Judge:
    """One expert with its head and its tasks; `score` looks at the weights it has just now."""

    def __init__(
        self, number: int, model: Any, tasks: Sequence[str], score: Callable[[], dict[str, Any]]
    ) -> None:
        self.number = number
        self.model = model
        self.tasks = tuple(tasks)
        self.score: Callable[[], dict[str, TaskScore]] = score
        self._places: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))

    @torch.no_grad()
    def put(self, plan: Plan, value: Callable[[str], Tensor]) -> None:
        """Give the shared tensors, named as in the frame, other values."""
        keys = plan.matches[self.number].keys
        for item in plan.merged:
            own = keys.get(item.name, item.name)
            if own not in self._places:
                raise MergeError(
                    f"{plan.sources[self.number].name}: its class has no tensor '{own}', so that "
                    "the merge cannot be compared on it"
                )
            self._places[own].copy_(value(item.name))


def find_judges(plan: Plan, config: CompareConfig, home: Path) -> list[Judge]:
    """A judge for each expert that has tasks; all checks of tasks, nothing long.

    Raises:
        ConfigError: no tasks, a task of an unknown model.
        MergeError: models that cannot be compared.
    """
    if plan.layers is not None or plan.alignment is not None:
        what = "stacked slices" if plan.layers is not None else "aligned vocabularies"
        raise ConfigError(f"compare: a merge with {what} has no model of the same shape to go with")
    experts = plan.recipe.experts
    names = [plan.recipe.models[n].name for n in experts]
    if {MERGE, BASE} & set(names):
        raise ConfigError(f"compare: '{MERGE}' and '{BASE}' are columns; give models other names")
    owner: dict[str, str] = {}
    for task, entry in config.tasks.items():
        if entry.model is None and any(plan.heads[n] for n in experts):
            raise ConfigError(
                f"compare.tasks.{task}: every model has its own head; say whose answers: 'model'"
            )
        owner[task] = entry.model or names[0]
        if owner[task] not in names:
            raise ConfigError(
                f"compare.tasks.{task}: there is no model '{owner[task]}'."
                f"{suggestion(owner[task], names)}"
            )
    found = []
    for number, name in zip(experts, names, strict=True):
        own = {task: entry for task, entry in config.tasks.items() if owner[task] == name}
        folder = plan.sources[number].folder
        if folder is not None and (folder / "model.json").is_file():
            found.append(_run_judge(number, folder.parent, config))
        elif own:
            found.append(_hub_judge(number, folder, own, config, home, name))
    if not found:
        raise ConfigError("compare: give 'tasks', the rows with labels to compare on")
    return found


def compare(
    plan: Plan, merged: Path, judges: Sequence[Judge], config: CompareConfig, say: Say | None = None
) -> Compared:
    """Score base, experts and merge on every task.

    Args:
        plan: of the merge.
        merged: its folder.
        judges: from `find_judges`.
        config: rows, batch size, scales.
        say: is told what is being done.
    """
    tell = say or (lambda text: None)
    result = open_source(str(merged), MERGE)
    columns: dict[str, Callable[[str], Tensor]] = {}
    base = plan.recipe.base
    if base is not None:
        columns[BASE] = _values(plan.sources[base], {})
    for number in plan.recipe.experts:
        columns[plan.sources[number].name] = _values(
            plan.sources[number], plan.matches[number].keys
        )
    columns[MERGE] = _values(result, plan.aliases)
    scores: dict[str, dict[str, TaskScore]] = {}
    for column, value in columns.items():
        tell(f"scoring {column}")
        scores[column] = _scored(plan, judges, value)
    scales: dict[float, dict[str, float]] = {}
    for scale in config.scales:
        if base is None:
            raise ConfigError("compare.scales: base + s (merge - base) needs a base")
        tell(f"scoring scale {scale:g}")
        value = _scaled(columns[BASE], columns[MERGE], scale)
        found = _scored(plan, judges, value)
        scales[scale] = {task: score.value for task, score in found.items()}
    return Compared(tuple(columns), _rows(plan, judges, scores), scales)


def report(plan: Plan, merged: Path, compared: Compared | None, say: Say | None = None) -> Path:
    """Write report/report.html, its pictures and compare.json into the folder of the merge."""
    from polytask.merge.anatomy import anatomy
    from polytask.report.merge_page import merge_report

    if say is not None:
        say("looking at what differs")
    figures = anatomy(plan, open_source(str(merged), MERGE))
    record = json.loads((merged / "merge.json").read_text(encoding="utf-8"))
    folder = merged / "report"
    folder.mkdir(exist_ok=True)
    content = None if compared is None else compared.to_dict()
    if content is not None:
        files.write_json(folder / "compare.json", content)
    return merge_report(
        folder,
        merged.name,
        record,
        [vars(row) for row in figures],
        content,
        traces=_optional(merged / "trace.json"),
    )


def _optional(path: Path) -> Mapping[str, Any] | None:
    if not path.is_file():
        return None
    found: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _run_judge(number: int, folder: Path, config: CompareConfig) -> Judge:
    from polytask.pipeline.run import load_run

    run = load_run(folder)
    tasks = list(run.config.tasks)

    def score() -> dict[str, TaskScore]:
        return run.evaluate(split=config.split, batch_size=config.batch_size)

    return Judge(number, run.model, tasks, score)


def _hub_judge(
    number: int,
    folder: Path | None,
    tasks: Mapping[str, Any],
    config: CompareConfig,
    home: Path,
    name: str,
) -> Judge:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from polytask.evaluate.classifier import check_classifier, score_classifier
    from polytask.tasks import build_tasks

    if folder is None:
        raise ConfigError(f"compare: {name} has no folder with a configuration and a tokenizer")
    plain = {t: entry.model_copy(update={"share_rows": False}) for t, entry in tasks.items()}
    taskset = build_tasks(plain, home, 0)
    try:
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise MergeError(
            f"compare: {name} is no sequence classifier with a tokenizer: {error}"
        ) from error
    model.eval()
    for task in taskset.tasks:
        check_classifier(model, task, config.split)

    def score() -> dict[str, TaskScore]:
        return {
            task.name: score_classifier(
                model, tokenizer, task, config.split, config.batch_size, config.limit
            )
            for task in taskset.tasks
        }

    return Judge(number, model, taskset.names, score)


def _values(source: TensorSource, keys: Mapping[str, str]) -> Callable[[str], Tensor]:
    def value(name: str) -> Tensor:
        key = keys.get(name, name)
        header = source.headers[key]
        out = torch.empty(header.count)
        source.read_into(key, out)
        return out.view(header.shape)

    return value


def _scaled(
    base: Callable[[str], Tensor], merged: Callable[[str], Tensor], scale: float
) -> Callable[[str], Tensor]:
    return lambda name: torch.lerp(base(name), merged(name), scale)


def _scored(
    plan: Plan, judges: Sequence[Judge], value: Callable[[str], Tensor]
) -> dict[str, TaskScore]:
    found: dict[str, TaskScore] = {}
    for judge in judges:
        judge.put(plan, value)
        for task, score in judge.score().items():
            found[_label(plan, judge, task, judges)] = score
    return found


def _label(plan: Plan, judge: Judge, task: str, judges: Sequence[Judge]) -> str:
    """The task's name; with the model's where two models have a task of this name."""
    twice = sum(task in other.tasks for other in judges) > 1
    return f"{plan.sources[judge.number].name}: {task}" if twice else task


def _rows(
    plan: Plan, judges: Sequence[Judge], scores: Mapping[str, Mapping[str, TaskScore]]
) -> tuple[Row, ...]:
    rows = []
    for judge in judges:
        own = plan.sources[judge.number].name
        for task in judge.tasks:
            label = _label(plan, judge, task, judges)
            merged, alone = scores[MERGE][label], scores[own][label]
            gain = compare_single({label: merged}, {label: alone}).tasks[0].gain
            rows.append(
                Row(
                    label,
                    own,
                    merged.primary,
                    merged.higher_is_better,
                    merged.n,
                    {column: found[label].value for column, found in scores.items()},
                    (gain.mean, gain.low, gain.high),
                )
            )
    return tuple(rows)
