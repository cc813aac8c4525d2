"""Tuning gives every arm the same grid and says what it tried."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from study_arms import Bowl

from polytask.errors import ConfigError
from polytask.study import Arm, Budget, Claim, Executor, Study, prove, tune
from polytask.study.tuning import grid_points


def plain(point: Mapping[str, Any]) -> Arm:
    return Arm("plain", Bowl(0.1, **point), dict(point))


def method(point: Mapping[str, Any]) -> Arm:
    return Arm("method", Bowl(0.2, **point), dict(point))


GRID = {"lr": [0.05, 0.1, 0.2]}


def test_every_arm_gets_the_whole_grid_and_its_own_best(tmp_path: Path) -> None:
    tuning, arms = tune(
        {"plain": plain, "method": method},
        GRID,
        seeds=[100, 101],
        budget=Budget(rows=10),
        metric="accuracy",
        own={"method": {"radius": [0.0, 0.5]}},
        cache=tmp_path,
        executor=Executor(workers=0),
    )
    assert tuning.chosen == {"plain": {"lr": 0.1}, "method": {"lr": 0.2, "radius": 0.5}}
    assert tuning.trials == {"plain": 6, "method": 12}
    assert [p.params["lr"] for p in tuning.points["plain"]] == GRID["lr"]
    assert tuning.points["plain"][0].spent.rows == 20
    assert arms["method"].params == {"lr": 0.2, "radius": 0.5}

    claims = (Claim("method", "plain", "accuracy"),)
    study = Study("tuned", arms, claims, Budget(rows=10), tuning=tuning)
    assert prove(study, seeds=2, cache=tmp_path).tuning == tuning
    with pytest.raises(ConfigError, match=r"seeds \[101\] were used for tuning"):
        prove(study, seeds=2, seed_base=101, cache=tmp_path)


def test_lower_is_better_and_ties_go_to_the_first(tmp_path: Path) -> None:
    tuning, _ = tune(
        {"plain": plain},
        GRID,
        [1],
        Budget(rows=10),
        "seed",
        higher_is_better=False,
        cache=tmp_path,
    )
    assert tuning.chosen == {"plain": {"lr": 0.05}}


def diverges(point: Mapping[str, Any]) -> Arm:
    return Arm("diverges", Bowl(0.1, lr=float("nan")), dict(point))


def test_an_arm_that_always_diverges_cannot_be_tuned(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="every point of arm 'diverges' diverged"):
        tune({"diverges": diverges}, {"lr": [1.0]}, [1], Budget(), "accuracy", cache=tmp_path)


def test_grids_are_products_with_the_last_axis_fastest() -> None:
    assert grid_points({"a": [1, 2], "b": [3, 4]}) == [
        {"a": 1, "b": 3},
        {"a": 1, "b": 4},
        {"a": 2, "b": 3},
        {"a": 2, "b": 4},
    ]
    assert grid_points({}) == [{}]
    with pytest.raises(ConfigError, match="'a' has no values"):
        grid_points({"a": []})
