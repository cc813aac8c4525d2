"""Templates: how the cells of a row become one text.

'Question: {question} Answer:' has two literals and one slot; slots name columns and '{{' is a
brace. When a text is too long only what stands in the slots is shortened, the longest slot first;
the template's own words are never cut.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from polytask.errors import TaskError, suggestion
from polytask.tasks.schemas import is_missing, label_key

_PART = re.compile(r"(\{\{|\}\}|\{[^{}]*\}|[{}])")


@dataclass(frozen=True)
class Template:
    """`literals` has one more entry than `slots`: literal, slot, literal, slot, ..., literal."""

    literals: tuple[str, ...]
    slots: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Template:
        """Read a template; `TaskError` for an empty slot or a brace without its partner."""
        literals, slots = [""], []
        for part in _PART.split(text):
            if part in ("{{", "}}"):
                literals[-1] += part[0]
            elif part in ("{", "}"):
                raise TaskError(
                    f"template {text!r} has a '{part}' without its partner; write '{part * 2}' "
                    "for the character itself"
                )
            elif part.startswith("{"):
                name = part[1:-1].strip()
                if not name:
                    raise TaskError(
                        f"template {text!r} has an empty slot; name a column: '{{text}}'"
                    )
                slots.append(name)
                literals.append("")
            else:
                literals[-1] += part
        if not slots:
            raise TaskError(f"template {text!r} has no slot; name a column in braces: '{{text}}'")
        return cls(tuple(literals), tuple(slots))

    def check(self, columns: Iterable[str], what: str) -> None:
        """`TaskError` naming a slot that is no column, with the nearest column."""
        known = list(columns)
        for slot in self.slots:
            if slot not in known:
                raise TaskError(
                    f"{what}: template slot '{{{slot}}}' is not a column "
                    f"(has: {', '.join(known)}).{suggestion(slot, known)}"
                )

    def fill(self, contents: Sequence[str]) -> str:
        """The text with `contents` in the slots, in order."""
        if len(contents) == 1:  # the common case, and this runs once a row
            return f"{self.literals[0]}{contents[0]}{self.literals[1]}"
        parts = [self.literals[0]]
        for content, literal in zip(contents, self.literals[1:], strict=True):
            parts.append(content)
            parts.append(literal)
        return "".join(parts)

    def contents(self, row: Mapping[str, Any]) -> list[str]:
        """What the row puts in the slots."""
        return [cell_text(row[slot]) for slot in self.slots]

    def spans(self, contents: Sequence[str]) -> list[tuple[int, int]]:
        """Where each slot's content stands in the filled text: (start, end) in characters."""
        spans, position = [], len(self.literals[0])
        for content, literal in zip(contents, self.literals[1:], strict=True):
            spans.append((position, position + len(content)))
            position += len(content) + len(literal)
        return spans


def default_template(columns: Sequence[str]) -> str:
    """One column as it is; several with their names before them: 'title: {title} body: {body}'."""
    if len(columns) == 1:
        return "{" + _escaped(columns[0]) + "}"
    return " ".join(f"{column}: {{{_escaped(column)}}}" for column in columns)


def _escaped(column: str) -> str:
    if "{" in column or "}" in column:
        raise TaskError(f"column '{column}' has braces in its name; rename it to use it as text")
    return column


def cell_text(value: Any) -> str:
    """A cell as text: missing is empty, lists are joined by spaces, numbers are written out."""
    if isinstance(value, str):
        return value
    if is_missing(value):
        return ""
    if isinstance(value, list | tuple | np.ndarray):
        return " ".join(cell_text(item) for item in value)
    return label_key(value)


def shares(lengths: Sequence[int], room: int) -> list[int]:
    """How many units each slot may keep so that all fit in `room`: the longest give first.

    Every slot keeps min(length, cap) for one common cap (slots that got a unit more come first).
    """
    if sum(lengths) <= room:
        return list(lengths)
    if room <= 0:
        return [0] * len(lengths)
    kept = [0] * len(lengths)
    left, order = room, sorted(range(len(lengths)), key=lambda i: lengths[i])
    for rank, slot in enumerate(order):
        waiting = len(order) - rank
        kept[slot] = min(lengths[slot], left // waiting)
        left -= kept[slot]
    return kept
