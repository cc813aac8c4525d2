"""Which tasks a table suggests, from the profiles of its columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from polytask.data.profile import MOST_CLASSES, Profile, series_key, typical_period
from polytask.data.rows import RowSource

Keys = dict[str, tuple[Any, str]]  # key -> value and the comment that says why

TARGET_NAMES = (
    "label", "labels", "target", "class", "category", "y", "answer", "output", "score", "rating",
    "stars", "sentiment", "topic", "tags", "price", "value", "response", "summary", "translation",
)  # fmt: skip
SPLIT_NAMES = ("split", "fold", "subset", "partition")
_MOST_TASKS = 6
_SHORTEST_SERIES = 24


@dataclass(frozen=True)
class Proposal:
    """A task as it goes into the configuration; inactive ones are written as comments."""

    name: str
    keys: Keys
    reasons: tuple[str, ...] = ()
    active: bool = True

    def renamed(self, name: str) -> Proposal:
        return replace(self, name=name)


@dataclass(frozen=True)
class Table:
    """A table to be judged: its rows, what its columns are, how its data and split are said."""

    name: str
    data: Any
    source: RowSource
    columns: tuple[Profile, ...]
    given: bool  # the data has splits of its own
    note: str

    def of(self, *kinds: str) -> list[Profile]:
        return [column for column in self.columns if column.kind in kinds]

    def task(
        self, name: str, schema: str, inputs: Any, target: Any, why: str, **more: Any
    ) -> Proposal:
        keys: Keys = {
            "data": (self.data, self.note),
            "schema": (schema, why),
            "inputs": inputs if isinstance(inputs, tuple) else (inputs, ""),
        }
        if target is not None:
            keys["target"] = (target, "")
        keys |= {key: value for key, value in more.items() if value is not None}
        if not self.given and "horizon" not in more:
            keys["split"] = self.split()
        return Proposal(name, keys)

    def split(self) -> tuple[Mapping[str, Any], str]:
        """Given by a column, by group where rows belong together, else at random."""
        for column in self.columns:
            if column.name.lower() in SPLIT_NAMES and column.kind == "class":
                return {"kind": "given", "by": column.name}, f"'{column.name}' names the split"
        sizes = {"valid": 0.1, "test": 0.2}
        for column in self.of("id", "class", "number"):
            repeated = 1 < column.distinct <= column.filled / 2 and column.distinct >= 10
            if column.named_as_id and repeated and column.filled == column.rows:
                why = f"'{column.name}' {column.counted}: rows that belong together stay together"
                return {"kind": "group", "by": column.name, **sizes}, why
        return {"kind": "random", **sizes}, "70 % train, 10 % valid, 20 % test"


def suggest(
    name: str,
    data: Any,
    source: RowSource,
    columns: Sequence[Profile],
    given: bool,
    note: str = "",
) -> list[Proposal]:
    """Tasks for one table, the likeliest first."""
    table = Table(name, data, source, tuple(columns), given, note)
    forecasting = None if given else _forecasting(table)
    if forecasting is not None:
        return [forecasting]
    usable = [c for c in table.columns if c.name.lower() not in SPLIT_NAMES]
    table = replace(table, columns=tuple(table.columns))
    texts = [c for c in usable if c.kind == "text"]
    others = {c.kind for c in usable}
    if texts or others & {"image", "series"}:
        return _from_content(table, usable, texts)
    return _from_table(table, usable)


def _forecasting(table: Table) -> Proposal | None:
    times, numbers = table.of("time"), table.of("number", "class", "flag")
    numbers = [c for c in numbers if c.kind == "number" or c.distinct > 2]
    if len(times) != 1 or table.of("text", "image", "series", "tags"):
        return None
    key = series_key(table.source, times[0], table.columns)
    values = [c for c in numbers if c.name != key and c.filled >= 0.5 * c.rows]
    values = [c for c in values if c.kind == "number"]
    if key is False or not values or not isinstance(table.data, str):
        return None
    groups = 1 if key is None else next(c.distinct for c in table.columns if c.name == key)
    steps = len(table.source) // groups
    if steps < _SHORTEST_SERIES:
        return None
    period = typical_period(table.source, times[0])
    horizon = max(1, min(period or 12, steps // 8))
    context = max(4, min(6 * horizon, steps // 2))
    names = [c.name for c in values]
    series: dict[str, Any] = {"time": times[0].name, "values": names}
    why = f"'{times[0].name}' orders {len(table.source):,} rows"
    if key is not None:
        series["by"] = key
        why += f" into {groups:,} series, one for each '{key}'"
    listed = ", ".join(f"'{name}'" for name in names[:6])
    season = f"the season of its spacing is {period} steps" if period else "a first choice"
    proposal = replace(table, data={"path": table.data, "series": series}, note=why).task(
        table.name,
        "forecasting",
        {"series": "series"},
        None,
        f"numbers over time: {listed}",
        horizon=(horizon, f"steps ahead; {season}"),
        context=(context, f"steps of past that the model sees; a series has about {steps:,}"),
    )
    return proposal


def _from_content(
    table: Table, usable: Sequence[Profile], texts: Sequence[Profile]
) -> list[Proposal]:
    """Rows with texts, images or series: every label column is a task on the same inputs."""
    inputs, why = _content(usable, texts)
    proposals = list(_label_tasks(table, usable, texts, inputs, why))
    if not proposals and len(texts) >= 2:
        proposals = [_generation(table, texts)]
    if not proposals and texts:
        reason = f"'{texts[0].name}' is text ({texts[0].words:.0f} words a cell), without labels"
        proposals = [
            table.task(table.name, "language_model", {"text": texts[0].name}, None, reason)
        ]
    if len(proposals) > 1:
        proposals = [p.renamed(f"{table.name}_{_target_name(p)}") for p in proposals]
    return [replace(p, active=i < _MOST_TASKS) for i, p in enumerate(proposals)]


def _content(usable: Sequence[Profile], texts: Sequence[Profile]) -> tuple[dict[str, Any], str]:
    inputs: dict[str, Any] = {}
    reasons = []
    for modality in ("image", "series"):
        found = next((c for c in usable if c.kind == modality), None)
        if found is not None:
            inputs[modality] = found.name
            what = "image files" if modality == "image" else f"series of about {found.words:.0f}"
            reasons.append(f"'{found.name}' holds {what}")
    if texts:
        names = [c.name for c in texts]
        inputs["text"] = names[0] if len(names) == 1 else names
        reasons += [f"'{c.name}' is text ({c.words:.0f} words a cell)" for c in texts]
    return inputs, "; ".join(reasons)


def _label_tasks(
    table: Table,
    usable: Sequence[Profile],
    texts: Sequence[Profile],
    inputs: dict[str, Any],
    why: str,
) -> Iterator[Proposal]:
    flags = [c for c in usable if c.kind == "flag"]
    if len(flags) >= 3:
        names = [c.name for c in flags]
        reason = f"{len(names)} columns of 0 and 1: {', '.join(names[:6])}"
        yield table.task(table.name, "multilabel", (inputs, why), names, reason)
        usable = [c for c in usable if c.kind != "flag"]
    pair = len(texts) == 2 and set(inputs) == {"text"}
    for label in sorted(usable, key=lambda c: c.name.lower() not in TARGET_NAMES):
        if label.kind in ("class", "flag") and label.distinct <= 4 * MOST_CLASSES:
            schema = "pair" if pair else "classification"
        elif label.kind == "number":
            schema = "regression"
        elif label.kind == "tags":
            schema = "multilabel"
        else:
            continue
        reason = f"'{label.name}' {_described(label)}"
        if schema == "pair":
            reason += ", and two texts to judge together"
        yield table.task(table.name, schema, (inputs, why), label.name, reason)


def _described(label: Profile) -> str:
    if label.kind == "number":
        return ("holds whole numbers; it " if label.whole else "holds numbers; it ") + label.counted
    if label.kind == "tags":
        return f"holds lists of {label.distinct:,} different cells in {label.rows:,} rows"
    return label.counted


def _generation(table: Table, texts: Sequence[Profile]) -> Proposal:
    named = [c for c in texts if c.name.lower() in TARGET_NAMES]
    target = named[0] if named else texts[-1]
    rest = [c.name for c in texts if c is not target]
    inputs = {"text": rest[0] if len(rest) == 1 else rest}
    listed = ", ".join(f"'{name}'" for name in rest)
    reason = (
        f"'{target.name}' is text ({target.words:.0f} words a cell), to be written from {listed}"
    )
    return table.task(table.name, "generation", inputs, target.name, reason)


def _from_table(table: Table, usable: Sequence[Profile]) -> list[Proposal]:
    """Numbers and classes only: one column is the target, the others are inputs."""
    cells = [c for c in usable if c.kind in ("number", "class", "flag")]
    cells = [c for c in cells if not c.named_as_id]
    targets = [c for c in cells if c.distinct >= 2]
    if len(cells) < 2 or not targets:
        return []
    named = [c for c in targets if c.name.lower() in TARGET_NAMES]
    first = named[0] if named else targets[-1]
    because = "and its name says label" if named else "and is the last column"
    proposals = []
    for target in [first, *(c for c in targets if c is not first)]:
        schema = "regression" if target.kind == "number" else "classification"
        inputs = [c.name for c in cells if c is not target]
        reason = f"'{target.name}' {_described(target)}"
        reason += f", {because}" if target is first else ""
        task = table.task(table.name, schema, {"table": inputs}, target.name, reason)
        if target is not first:
            task = replace(
                task.renamed(f"{table.name}_{target.name}"),
                active=False,
                reasons=("another column that could be the target:",),
            )
        proposals.append(task)
    return proposals[: _MOST_TASKS // 2]


def _target_name(proposal: Proposal) -> str:
    target = proposal.keys["target"][0] if "target" in proposal.keys else "text"
    return "flags" if isinstance(target, list) else str(target)
