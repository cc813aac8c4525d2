"""Configurations to a `TaskSet`, with every check that can be made before training starts.

Order: columns and guesses for every task (a sample of rows), then one pass over the rows of each
group (labels, inputs, duplicates), then the split, then what each split must hold. The work is in
proportion to rows and tasks: tasks that share rows share the pass.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from polytask.configs import parse
from polytask.data.problems import RowProblems
from polytask.data.rows import RowSource, View
from polytask.errors import TaskError
from polytask.tasks import splits
from polytask.tasks.config import TaskConfig
from polytask.tasks.dividing import Rows, divide
from polytask.tasks.finish import check_range, finish_schema
from polytask.tasks.horizons import FUTURE, window_splits
from polytask.tasks.layouts import mode_of
from polytask.tasks.passages import cut_passages
from polytask.tasks.plan import Draft, check_columns, passage_column, plan
from polytask.tasks.scan import Scan, scan
from polytask.tasks.schemas import (
    SCHEMAS,
    Choice,
    Regression,
    Schema,
    is_missing,
)
from polytask.tasks.sources import WHOLE, Source, open_sources
from polytask.tasks.streams import probe, stream_sources
from polytask.tasks.task import RowGroup, Task, TaskSet

log = logging.getLogger("polytask.tasks")

Configs = Mapping[str, TaskConfig | Mapping[str, Any]]


def build_tasks(
    configs: Configs | Iterable[tuple[str, TaskConfig | Mapping[str, Any]]],
    base: Path = Path(),
    seed: int = 0,
) -> TaskSet:
    """Open the data of every task, check it, split it; relative paths start at `base`.

    Every fault of the input is a `UserError` that names task, column, file and line, and the
    nearest name that would have worked. What is worth knowing but no fault stands in `notes`.
    """
    opened: dict[str, dict[str, Source]] = {}
    drafts: list[tuple[str, Draft]] = []
    seen: set[str] = set()
    for name, given in configs.items() if isinstance(configs, Mapping) else configs:
        what = f"task '{name}'"
        if name in seen:
            raise TaskError(f"two tasks are named '{name}'; give each its own name")
        seen.add(name)
        config = given if isinstance(given, TaskConfig) else parse(TaskConfig, given, what)
        config = with_defaults(name, config)
        key = data_key(config.data)
        if key not in opened:
            opened[key] = open_sources(config.data, base, what)
        sources = opened[key]
        if set(sources) == {"train"} and config.split.kind != "given":
            sources = {WHOLE: sources["train"]}  # one part is no split
        drafts.append((key, plan(name, config, sources)))
    return assemble(drafts, seed)


def data_key(data: Any) -> str:
    """Equal for data that are the same rows: by what they say, objects by identity."""
    if isinstance(data, Mapping):
        return str(sorted((str(key), data_key(value)) for key, value in data.items()))
    return repr(data) if isinstance(data, str | int | float | None) else f"object {id(data)}"


def with_defaults(name: str, config: TaskConfig) -> TaskConfig:
    """Embedded data sets bring the configuration that fits them; the user's words come first."""
    from polytask.data.spec import DataSpec

    data = config.data
    short = isinstance(data, str) and data.startswith("embedded:")
    if not short and not (isinstance(data, Mapping) and "embedded" in data):
        return config
    from polytask.data import embedded

    info = embedded.info(str(DataSpec.of(data).embedded))
    default = info.tasks.get(name, info.task)
    given = config.model_dump(by_alias=True, exclude_unset=True)
    if {"schema", "inputs", "target", "template"} & set(given):
        defaults = {"classes": info.classes} if given.get("target") == default.get("target") else {}
    else:
        defaults = {"classes": info.classes, **default}
    if not defaults.get("classes") or {"classes", "verbaliser"} & set(given):
        defaults.pop("classes", None)
    return parse(TaskConfig, {**defaults, **given, "data": data}, f"task '{name}'")


def assemble(drafts: Sequence[tuple[str, Draft]], seed: int) -> TaskSet:
    """Group drafts that read the same inputs of the same rows, and finish each group."""
    grouped: dict[str, list[Draft]] = {}
    for key, draft in drafts:
        grouped.setdefault(_group_key(key, draft), []).append(draft)
    groups, notes = [], []
    for members in grouped.values():
        group, said = _finish(members, seed)
        groups.append(group)
        notes += said
    for note in notes:
        log.warning("%s", note)
    return TaskSet(tuple(groups), tuple(notes))


def _group_key(data: str, draft: Draft) -> str:
    """Equal for drafts that can share rows."""
    shares = draft.config.share_rows and mode_of(SCHEMAS.get(draft.kind)) in ("plain", "words")
    window = (draft.config.horizon, draft.config.context, draft.config.stride)
    parts = (
        data,
        [repr(f) for f in draft.fields],
        draft.config.split.model_dump_json(),
        window if draft.windows else None,
        draft.config.categories,
        None if shares else draft.name,
    )
    return json.dumps(parts)


def _finish(drafts: Sequence[Draft], seed: int) -> tuple[RowGroup, list[str]]:
    """One group: rows read, bad ones counted, schemas made, rows split."""
    first = drafts[0]
    if first.config.split.by is not None:
        check_columns(first, [first.config.split.by])
    if not all(isinstance(source, RowSource) for source in first.sources.values()):
        return finish_stream(drafts, stream_sources(first, seed)), []
    sources = {n: s for n, s in first.sources.items() if isinstance(s, RowSource)}
    scans = {name: scan(drafts, source) for name, source in sources.items()}
    notes = _drop_unlabelled(drafts, scans)
    schemas = _schemas(drafts, scans)
    kept = {name: _kept(drafts, schemas, s) for name, s in scans.items()}
    notes += [note for s in scans.values() for note in _notes(drafts, s)]
    if first.windows:
        views = {name: View(s.source, kept[name]) for name, s in scans.items()}
        parts, schema = window_splits(first, views)
        return _group(drafts, [schema] * len(drafts), parts), notes
    rows = divide(drafts, schemas, scans, kept, seed)
    schemas = [
        _checked(draft, schema, k, scans, rows)
        for k, (draft, schema) in enumerate(zip(drafts, schemas, strict=True))
    ]
    found: dict[str, RowSource] = {
        name: View(scans[origin].source, index) for name, (origin, index) in rows.items()
    }
    if first.kind == "language_model" and first.config.context is not None:
        column = passage_column(first)
        found = {n: cut_passages(s, column, first.config.context) for n, s in found.items()}
    return _group(drafts, schemas, found), notes


def finish_stream(drafts: Sequence[Draft], found: Mapping[str, Source]) -> RowGroup:
    """A group whose train rows are a stream: its first rows stand for it in the checks."""
    looked_at = {n: s if isinstance(s, RowSource) else probe(s) for n, s in found.items()}
    scans = {name: scan(drafts, source) for name, source in looked_at.items()}
    schemas = _schemas(drafts, scans)
    kept = {name: _kept(drafts, schemas, s) for name, s in scans.items()}
    rows: Rows = {name: (name, index) for name, index in kept.items()}
    schemas = [
        _checked(draft, schema, k, scans, rows)
        for k, (draft, schema) in enumerate(zip(drafts, schemas, strict=True))
    ]
    final = {n: View(s, kept[n]) if isinstance(s, RowSource) else s for n, s in found.items()}
    return _group(drafts, schemas, final)


def _schemas(drafts: Sequence[Draft], scans: Mapping[str, Scan]) -> list[Schema]:
    for s in scans.values():  # unreadable rows explain missing labels better than "no labels"
        _problems(drafts, s, s.bad).check(len(s) - len(s.bad))
    return [
        finish_schema(
            draft,
            [label for s in scans.values() for label in s.labels[k] if not is_missing(label)],
        )
        for k, draft in enumerate(drafts)
    ]


def _group(
    drafts: Sequence[Draft], schemas: Sequence[Schema], found: Mapping[str, Any]
) -> RowGroup:
    tasks = tuple(
        Task(
            name=draft.name,
            schema=schema,
            splits=found,
            inputs=draft.fields,
            target=FUTURE if draft.windows else draft.target,
            facets=dict(draft.config.facets),
            metrics=draft.config.metrics,
            options={"weight": draft.config.weight, "categories": list(draft.config.categories)},
        )
        for draft, schema in zip(drafts, schemas, strict=True)
    )
    return RowGroup(tasks[0].name if len(tasks) == 1 else "+".join(t.name for t in tasks), tasks)


def _drop_unlabelled(drafts: Sequence[Draft], scans: dict[str, Scan]) -> list[str]:
    """Published test splits often come without labels (all missing, or all -1): not for judging."""
    notes = []
    for name in [n for n in scans if n not in ("train", WHOLE)]:
        labels = [label for task in scans[name].labels for label in task]
        hidden = all(is_missing(label) or str(label) == "-1" for label in labels)
        if drafts[0].label_columns and labels and hidden:
            notes.append(
                f"{drafts[0].what}: the given split '{name}' has no labels and is not used"
            )
            del scans[name]
    if drafts[0].config.split.kind is None and "test" not in scans and "valid" in scans:
        scans["test"] = scans.pop("valid")
        notes.append(f"{drafts[0].what}: the given valid split is used as test")
    return notes


def _kept(drafts: Sequence[Draft], schemas: Sequence[Schema], s: Scan) -> np.ndarray[Any, Any]:
    """Indices of usable rows; the others are counted, shown, and stop above `max_bad`."""
    config = drafts[0].config
    bad = dict(s.bad)
    labelled = [draft.label_columns for draft in drafts]
    read_by = splits.READERS[config.split.kind or "random"]
    for i in range(len(s)):
        if i in bad:
            continue
        some = not any(labelled)
        for k, schema in enumerate(schemas):
            label = s.labels[k][i] if labelled[k] else None
            if label is None:
                continue
            some = True
            try:
                schema.resolve(*label) if isinstance(schema, Choice) else schema.read(label)
            except ValueError as error:
                bad[i] = str(error)
                break
        if not some:
            columns = ", ".join(f"'{c}'" for c in dict.fromkeys(sum(labelled, ())))
            bad[i] = f"the target is missing (empty or NaN in column {columns})"
        elif i not in bad and s.by:
            try:
                read_by(s.by[i])
            except ValueError as error:
                bad[i] = str(error)
    _problems(drafts, s, bad).conclude(len(s) - len(bad))
    return np.setdiff1d(np.arange(len(s)), np.fromiter(bad, np.int64, len(bad)))


def _problems(drafts: Sequence[Draft], s: Scan, bad: Mapping[int, str]) -> RowProblems:
    problems = RowProblems(f"{_names(drafts)}, {s.source.name}", drafts[0].config.max_bad)
    for i in sorted(bad):
        problems.add(s.source.where(i), bad[i])
    return problems


def _names(drafts: Sequence[Draft]) -> str:
    if len(drafts) == 1:
        return drafts[0].what
    return f"tasks {', '.join(repr(d.name) for d in drafts[:3])}{', ...' * (len(drafts) > 3)}"


def _notes(drafts: Sequence[Draft], s: Scan) -> list[str]:
    """Duplicated rows, with the first pair."""
    _, first, counts = np.unique(s.hashes, return_index=True, return_counts=True)
    repeated = int((counts - 1).sum())
    if not repeated:
        return []
    original = int(first[counts > 1].min())
    again = int(np.flatnonzero(s.hashes == s.hashes[original])[1])
    return [
        f"{_names(drafts)}: {repeated} of {len(s)} rows repeat the inputs of another row "
        f"(first: {s.source.where(again)} repeats {s.source.where(original)})"
    ]


def _checked(draft: Draft, schema: Schema, k: int, scans: Mapping[str, Scan], rows: Rows) -> Schema:
    """What each split of a task must hold; regression learns the train split's scale."""
    if not draft.label_columns:
        return schema
    for name, (origin, index) in rows.items():
        labels = [scans[origin].labels[k][i] for i in index]
        labels = [label for label in labels if label is not None]
        if not labels:
            raise TaskError(
                f"{draft.what}: no row of the {name} split has a label in column "
                f"'{draft.label_columns[0]}'"
            )
        check_range(draft, schema, labels, name)
        if name == "train" and isinstance(schema, Regression):
            schema = with_scale(schema, labels)
    return schema


def with_scale(schema: Regression, labels: Sequence[Any]) -> Regression:
    """The schema with mean and deviation of some labels."""
    values = np.stack([schema.read(label) for label in labels]).astype(np.float64)
    mean, std = values.mean(0), values.std(0)
    std = np.where(std > 1e-9 * np.maximum(1.0, np.abs(mean)), std, 1.0)
    return replace(schema, mean=tuple(mean.tolist()), std=tuple(std.tolist()))
