"""From a configuration to a draft: columns checked, gaps guessed, fields and schema kind settled.

Nothing here reads more than a sample of rows, so a misspelt column is reported at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from polytask.data.rows import Row, RowSource
from polytask.errors import ConfigError, TaskError, suggestion
from polytask.tasks.config import InputsConfig, TaskConfig, as_columns
from polytask.tasks.fit import sample_rows
from polytask.tasks.guess import guess_inputs, guess_schema, guess_target
from polytask.tasks.schemas import SCHEMAS, is_missing, words_of
from polytask.tasks.sources import Source
from polytask.tasks.task import Field
from polytask.tasks.templates import Template, default_template

SAMPLE = 200


@dataclass(frozen=True)
class Draft:
    """A task whose columns are known to exist and whose labels have not been read yet."""

    name: str
    config: TaskConfig
    sources: Mapping[str, Source]
    kind: str
    fields: tuple[Field, ...]
    target: str | tuple[str, ...] | None

    @property
    def what(self) -> str:
        return f"task '{self.name}'"

    @property
    def main(self) -> Source:
        """The train rows, or the rows that are still to be split."""
        return next(self.sources[n] for n in ("train", *self.sources) if n in self.sources)

    @property
    def label_columns(self) -> tuple[str, ...]:
        return as_columns(self.target)

    @property
    def windows(self) -> bool:
        """Whether forecasting windows are cut from long series."""
        return self.kind == "forecasting" and self.target is None


def plan(name: str, config: TaskConfig, sources: Mapping[str, Source]) -> Draft:
    """Settle what the configuration says and guess what it leaves out.

    Errors name the task and the nearest column: `TaskError` for a missing column, an unusable
    combination or no rows, `ConfigError` for an unknown schema.
    """
    what = f"task '{name}'"
    if config.kind is not None and config.kind not in SCHEMAS:
        raise ConfigError(
            f"{what}: unknown schema '{config.kind}'.{suggestion(config.kind, SCHEMAS)}"
        )
    for split, source in sources.items():
        if isinstance(source, RowSource) and len(source) == 0:
            shown = "" if split == "all" else f"the split '{split}' is empty: "
            raise TaskError(f"{what}: {shown}{source.name} has no rows")
    draft = Draft(name, config, sources, config.kind or "", (), None)
    rows = sample_rows(draft.main, SAMPLE)
    if not rows:
        raise TaskError(f"{what}: {draft.main.name} has no rows")
    target = _target(config, draft)
    draft = replace(draft, target=target)
    inputs = _inputs(config, draft, rows)
    kind = config.kind or _kind(config, draft, inputs, rows)
    draft = replace(draft, kind=kind)
    return replace(draft, fields=_fields(draft, inputs))


def passage_column(draft: Draft) -> str:
    """The one text column that a language model's passages are cut from."""
    columns = next(f for f in draft.fields if f.modality == "text").columns
    if len(columns) != 1:
        raise TaskError(
            f"{draft.what}: 'context' cuts one text column into passages, not {len(columns)}"
        )
    return columns[0]


def check_columns(draft: Draft, columns: Sequence[str]) -> None:
    """`TaskError` naming the first column that a source lacks, with the nearest it has."""
    for source in draft.sources.values():
        for column in columns:
            if column not in source.columns:
                has = ", ".join(source.columns[:30]) + (", ..." if len(source.columns) > 30 else "")
                raise TaskError(
                    f"{draft.what}: column '{column}' is missing in {source.name} "
                    f"(has: {has}).{suggestion(column, source.columns)}"
                )


def _target(config: TaskConfig, draft: Draft) -> str | tuple[str, ...] | None:
    if config.target is not None:
        check_columns(draft, as_columns(config.target))
        return config.target
    if config.kind in ("language_model", "matching"):
        return None
    used = _mentioned(config)
    found = guess_target(config, draft.main.columns, used)
    if found is None and config.kind not in (None, "forecasting"):
        raise TaskError(
            f"{draft.what}: say which column is the target "
            f"({draft.main.name} has: {', '.join(draft.main.columns)})"
        )
    return found


def _mentioned(config: TaskConfig) -> set[str]:
    """Columns that the configuration uses for something else than the label."""
    used = {config.split.by} if config.split.by else set()
    for text in as_columns(config.template):
        used |= set(Template.parse(text).slots)
    return used | (columns_of(config.inputs) if config.inputs else set())


def columns_of(inputs: InputsConfig) -> set[str]:
    """Every column that inputs name."""
    found = set()
    for value in (inputs.text, inputs.series, inputs.table, inputs.choices):
        found |= set(as_columns(value))
    found |= {c for c in (inputs.image, inputs.features) if c is not None}
    for side in (inputs.a, inputs.b):
        found |= columns_of(side) if side is not None else set()
    return found


def _inputs(config: TaskConfig, draft: Draft, rows: Sequence[Row]) -> InputsConfig:
    templates = [Template.parse(text) for text in as_columns(config.template)]
    for template in templates:
        for source in draft.sources.values():
            template.check(source.columns, f"{draft.what}, {source.name}")
    if config.inputs is not None:
        check_columns(draft, sorted(columns_of(config.inputs)))
        clash = columns_of(config.inputs) & set(draft.label_columns)
        if clash:
            raise TaskError(f"{draft.what}: column '{min(clash)}' is both an input and the target")
        inputs = config.inputs
    elif templates:
        inputs = InputsConfig()
    else:
        leave_out = {*draft.label_columns, *({config.split.by} if config.split.by else set())}
        inputs = guess_inputs(
            rows, draft.main.columns, leave_out, f"{draft.what}: {draft.main.name}"
        )
    if templates:
        slots = tuple(dict.fromkeys(slot for template in templates for slot in template.slots))
        inputs = inputs.model_copy(update={"text": slots})
    if not columns_of(inputs):
        raise TaskError(f"{draft.what}: no inputs are named; give at least one column")
    return inputs


def _kind(config: TaskConfig, draft: Draft, inputs: InputsConfig, rows: Sequence[Row]) -> str:
    if draft.target is None:
        return _kind_without_target(config, draft, inputs)
    columns = draft.label_columns
    labels = [
        row.get(columns[0]) if len(columns) == 1 else [row.get(c) for c in columns] for row in rows
    ]
    present = [label for label in labels if not is_missing(label)]
    if not present:
        raise TaskError(
            f"{draft.what}: column '{columns[0]}' of {draft.main.name} holds no label "
            f"in {len(rows)} rows looked at"
        )
    return guess_schema(config, inputs, present, _per_word(inputs, rows, columns[0]))


def _per_word(inputs: InputsConfig, rows: Sequence[Row], target: str) -> bool:
    """Whether every label is a list as long as its row's words."""
    texts = as_columns(inputs.text)
    if len(texts) != 1:
        return False
    pairs = [(row.get(texts[0]), row.get(target)) for row in rows]
    present = [(a, b) for a, b in pairs if not is_missing(a) and isinstance(b, list | tuple)]
    return bool(present) and all(len(words_of(a)) == len(b) for a, b in present)


def _kind_without_target(config: TaskConfig, draft: Draft, inputs: InputsConfig) -> str:
    if inputs.a is not None or inputs.b is not None:
        return "matching"
    if config.horizon is not None and inputs.series is not None:
        return "forecasting"
    others = columns_of(inputs) - set(as_columns(inputs.text))
    if len(as_columns(inputs.text)) == 1 and not others:
        return "language_model"
    raise TaskError(
        f"{draft.what}: say which column is the target "
        f"({draft.main.name} has: {', '.join(draft.main.columns)}), or which schema this is"
    )


def _fields(draft: Draft, inputs: InputsConfig) -> tuple[Field, ...]:
    if draft.kind == "matching":
        return _sides(draft, inputs)
    if inputs.a is not None or inputs.b is not None:
        if draft.kind != "pair" or inputs.a is None or inputs.b is None:
            raise TaskError(f"{draft.what}: inputs a and b are for matching and pair tasks")
        inputs = inputs.model_copy(
            update={"text": as_columns(inputs.a.text) + as_columns(inputs.b.text)}
        )
    fields = [*_texts(draft, inputs), *_others(inputs)]
    modalities = {f.modality for f in fields}
    if draft.kind == "forecasting" and "series" not in modalities:
        raise TaskError(f"{draft.what}: forecasting needs 'series' among its inputs")
    if draft.kind == "dense" and "image" not in modalities:
        raise TaskError(f"{draft.what}: dense prediction needs 'image' among its inputs")
    needs_text = ("pair", "choice", "tagging", "generation", "language_model")
    if draft.kind in needs_text and "text" not in modalities:
        raise TaskError(f"{draft.what}: a {draft.kind} task needs 'text' among its inputs")
    return tuple(fields)


def _texts(draft: Draft, inputs: InputsConfig) -> list[Field]:
    columns, templates = as_columns(inputs.text), as_columns(draft.config.template)
    if draft.kind == "tagging" and (len(columns) != 1 or templates):
        raise TaskError(
            f"{draft.what}: token labelling reads one text column and no template, "
            f"not {len(columns)} columns{' and a template' if templates else ''}"
        )
    fields = []
    if draft.kind == "pair" and not templates:
        if len(columns) != 2:
            raise TaskError(
                f"{draft.what}: a pair task needs two text columns, not {len(columns)}: "
                "inputs: {text: [premise, hypothesis]}"
            )
        fields = [text_field((c,), slot=slot) for c, slot in zip(columns, "ab", strict=True)]
    elif columns:
        fields = [text_field(columns, templates)]
    if draft.kind == "choice":
        choices = as_columns(inputs.choices)
        if not choices:
            raise TaskError(
                f"{draft.what}: a choice task needs 'choices' among its inputs: a column with "
                "a list of candidates, or one column each"
            )
        fields.append(Field("text", choices, slot="choices"))
    elif inputs.choices is not None:
        raise TaskError(f"{draft.what}: 'choices' are for choice tasks, not for {draft.kind}")
    return fields


def text_field(
    columns: tuple[str, ...], templates: tuple[str, ...] = (), slot: str = "main"
) -> Field:
    """Text of some columns in the given templates, or the canonical one."""
    first, *rest = templates or (default_template(columns),)
    return Field("text", columns, template=first, slot=slot, alternatives=tuple(rest))


def _others(inputs: InputsConfig, slot: str = "main") -> list[Field]:
    fields = []
    if inputs.image is not None:
        fields.append(Field("image", (inputs.image,), slot=slot))
    if inputs.series is not None:
        fields.append(Field("series", as_columns(inputs.series), slot=slot))
    if inputs.table is not None:
        fields.append(Field("table", as_columns(inputs.table), slot=slot))
    if inputs.features is not None:
        fields.append(Field("features", (inputs.features,), slot=slot))
    return fields


def _sides(draft: Draft, inputs: InputsConfig) -> tuple[Field, ...]:
    """The fields of the two sides of a matching task."""
    if draft.config.template is not None:
        raise TaskError(f"{draft.what}: a matching task takes no template; it has two sides")
    if inputs.a is not None and inputs.b is not None:
        sides = (inputs.a, inputs.b)
    else:
        texts, others = as_columns(inputs.text), _others(inputs)
        if len(texts) == 2 and not others:
            sides = (InputsConfig(text=texts[0]), InputsConfig(text=texts[1]))
        elif len(texts) == 1 and len(others) == 1:
            rest = inputs.model_copy(update={"text": None})
            sides = (InputsConfig(text=texts[0]), rest)
        else:
            raise TaskError(
                f"{draft.what}: a matching task needs two sides: two text columns, a text and "
                "another input, or inputs a and b"
            )
    fields = []
    for side, slot in zip(sides, ("a", "b"), strict=True):
        if side.text is not None:
            fields.append(text_field(as_columns(side.text), slot=slot))
        fields += _others(side, slot)
    if {f.slot for f in fields} != {"a", "b"}:
        raise TaskError(f"{draft.what}: inputs a and b both need at least one column")
    return tuple(fields)
