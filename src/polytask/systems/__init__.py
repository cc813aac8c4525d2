"""The 64 systems: a card for each, and for those that are built a module NN_name.py.

    >>> from polytask import systems
    >>> systems.card("flat-mtl").number
    16

Names are forgiving: '16', 16, 'flat-mtl', '16-flat-mtl', '16_flat_mtl' and 'FlatMTL' are the same.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polytask.errors import ConfigError, UserError, suggestion
from polytask.systems.base import Card, Reporting, System, Tunable

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "Card",
    "Reporting",
    "Status",
    "System",
    "Tunable",
    "card",
    "cards",
    "evidence_folders",
    "is_built",
    "load",
    "status",
]

PLANNED = "planned"


@cache
def cards() -> tuple[Card, ...]:
    """All cards, by number."""
    text = resources.files("polytask.systems").joinpath("cards.json").read_text(encoding="utf-8")
    found = []
    for entry in json.loads(text):
        for key in ("stages", "modalities"):
            entry[key] = tuple(entry[key])
        found.append(Card(**entry))
    return tuple(sorted(found, key=lambda c: c.number))


def card(name: str | int) -> Card:
    """The card of a system; `ConfigError` with the nearest name when there is none."""
    wanted = _plain(str(name))
    for found in cards():
        if wanted in {_plain(alias) for alias in _aliases(found)}:
            return found
    slugs = [found.slug for found in cards()]
    raise ConfigError(
        f"no system '{name}'.{suggestion(str(name).lower().replace('_', '-'), slugs)} "
        "'polytask systems' lists all."
    )


def _aliases(found: Card) -> Iterator[str]:
    yield from (str(found.number), f"{found.number:02d}", found.slug, found.key, found.name)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def module_name(found: Card) -> str:
    """Module of a system: polytask.systems.16_flat_mtl."""
    return f"{__name__}.{found.key.replace('-', '_')}"


def is_built(found: Card) -> bool:
    """Whether this version of the package can run the system."""
    return importlib.util.find_spec(module_name(found)) is not None


def load(name: str | int) -> System:
    """The system itself; `UserError` when only its card exists so far."""
    found = card(name)
    if not is_built(found):
        built = ", ".join(c.slug for c in cards() if is_built(c))
        raise UserError(
            f"system {found.number} ({found.name}) is planned: its card exists, its code does not. "
            f"Built so far: {built}."
        )
    system: System = importlib.import_module(module_name(found)).system
    return system


@dataclass(frozen=True)
class Status:
    """What is known of a system's claim: a verdict of `study`, or 'planned'."""

    verdict: str
    path: Path | None = None
    record: dict[str, Any] | None = None


def evidence_folders() -> tuple[Path, ...]:
    """Where evidence is looked for: the source checkout first, then inside the package."""
    package = Path(str(resources.files("polytask")))
    checkout = package.parents[1]
    found = [checkout / "evidence"] if (checkout / "pyproject.toml").is_file() else []
    return (*found, package / "evidence")


def status(found: Card) -> Status:
    """The verdict on record. A built system without evidence is 'not proved yet'."""
    for folder in evidence_folders():
        path = folder / f"{found.key}.json"
        if path.is_file():
            try:
                record = json.loads(path.read_text(encoding="utf-8"))
                return Status(str(record["verdict"]), path, record)
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path} is not an evidence record: {error}") from error
    return Status("not proved yet" if is_built(found) else PLANNED)
