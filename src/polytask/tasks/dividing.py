"""Divides a group's usable rows into train, valid and test, as its `SplitConfig` says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from polytask.errors import TaskError
from polytask.rng import derive
from polytask.tasks import splits
from polytask.tasks.config import SplitConfig
from polytask.tasks.plan import Draft
from polytask.tasks.scan import Scan
from polytask.tasks.schemas import Classification, Schema
from polytask.tasks.sources import WHOLE

Rows = dict[str, tuple[str, np.ndarray[Any, Any]]]  # split -> (source, indices)


def divide(
    drafts: Sequence[Draft],
    schemas: Sequence[Schema],
    scans: Mapping[str, Scan],
    kept: Mapping[str, np.ndarray[Any, Any]],
    seed: int,
) -> Rows:
    """Which rows of which source are train, valid and test."""
    draft, config = drafts[0], drafts[0].config.split
    chosen = derive(seed if config.seed is None else config.seed, "rows")
    if WHOLE in scans:
        part = _parts(draft, schemas, config, scans[WHOLE], kept[WHOLE], chosen)
        rows: Rows = {
            name: (WHOLE, kept[WHOLE][index]) for name, index in splits.parts_of(part).items()
        }
    else:
        if config.kind not in (None, "given"):
            raise TaskError(
                f"{draft.what}: the data comes with splits ({', '.join(scans)}); a split by "
                f"'{config.kind}' needs one undivided source"
            )
        rows = {name: (name, index) for name, index in kept.items()}
        missing = config.model_copy(
            update={
                "kind": "random",
                "valid": 0.0 if "valid" in rows else config.valid,
                "test": 0.0 if "test" in rows else config.test,
            }
        )
        if config.kind is None and missing.valid + missing.test > 0:
            train = kept["train"]
            part = _parts(draft, schemas, missing, scans["train"], train, chosen)
            for name, index in splits.parts_of(part).items():
                rows[name] = ("train", train[index])
    for name in ("train", *(n for n in ("valid", "test") if getattr(config, n) > 0)):
        if name not in rows or not len(rows[name][1]):
            if config.kind == "given" and name != "train":
                continue
            count = sum(map(len, kept.values()))
            distinct = len(np.unique(np.concatenate([s.hashes for s in scans.values()])))
            raise TaskError(
                f"{draft.what}: the {name} split is empty ({count} usable rows in "
                f"{draft.main.name}, {distinct} distinct inputs, split "
                f"'{config.kind or 'random'}')"
            )
    return {name: rows[name] for name in splits.SPLITS if name in rows}


def _parts(
    draft: Draft,
    schemas: Sequence[Schema],
    config: SplitConfig,
    s: Scan,
    kept: np.ndarray[Any, Any],
    seed: int,
) -> splits.Parts:
    by = [s.by[i] for i in kept] if config.by is not None else []
    if config.kind == "given":
        if config.by is None:
            raise TaskError(
                f"{draft.what}: {s.source.name} has no splits of its own; name the column that "
                "holds them with 'by', or choose the kind random, group or time"
            )
        return np.array([splits.given_part(value) for value in by], np.int8)
    if config.kind == "time":
        order = [splits.time_of(v) for v in by] if by else kept.tolist()
        return splits.split_time(np.array(order, np.float64), config.valid, config.test)
    if config.kind == "group":
        return splits.split_random(splits.group_keys(by), config.valid, config.test, seed)
    strata = _strata(schemas, s, kept)
    return splits.split_random(s.hashes[kept], config.valid, config.test, seed, strata)


def _strata(
    schemas: Sequence[Schema], s: Scan, kept: np.ndarray[Any, Any]
) -> np.ndarray[Any, Any] | None:
    """Classes of the group's first classification task (-1: no label); None without one."""
    for k, schema in enumerate(schemas):
        if isinstance(schema, Classification):
            labels = [s.labels[k][i] for i in kept]
            return np.array([-1 if v is None else schema.read(v) for v in labels], np.int64)
    return None
