"""Learning a graph: edges from losses, what it costs, and going on after an interruption."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from polytask.errors import ConfigError, NonFiniteError
from polytask.mixture import SkillGraph, learn_graph

TABLE = {
    "": {"a": 2.0, "b": 4.0, "c": 1.0},
    "a": {"a": 0.5, "b": 2.0, "c": 1.5},
    "b": {"a": 2.0, "b": 2.0, "c": 0.5},
    "c": {"a": 1.0, "b": 4.0, "c": 0.0},
    "ab": {"a": 0.8, "b": 1.0, "c": 9.0},
    "ac": {"a": 0.5, "b": 9.0, "c": 0.0},
    "bc": {"a": 9.0, "b": 3.0, "c": 0.0},
}


class Lab:
    def __init__(self) -> None:
        self.runs: list[tuple[str, int]] = []

    def __call__(self, shares: Mapping[str, float], steps: int) -> Mapping[str, float]:
        assert not shares or set(shares.values()) == {1 / len(shares)}
        key = "".join(sorted(shares))
        self.runs.append((key, steps))
        return TABLE[key]


def test_pairs_have_an_edge_where_a_mix_beats_the_skill_alone() -> None:
    lab = Lab()
    found = learn_graph(lab, ["a", "b", "c"], 30, "pairwise")
    # Own gains on the diagonal; a helps b (1 < 2); b does not help a (0.8 > 0.5); a tie is no edge.
    assert found.graph == SkillGraph(
        [[0.75, 0.5, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 1.0]], ["a", "b", "c"]
    )
    assert (found.runs, found.total_steps) == (6, 180)
    assert sorted(lab.runs) == [
        ("", 0), ("a", 30), ("ab", 30), ("ac", 30), ("b", 30), ("bc", 30), ("c", 30)
    ]  # fmt: skip


def test_single_runs_give_the_share_of_the_loss_that_goes_away() -> None:
    lab = Lab()
    found = learn_graph(lab, ["a", "b", "c"], 30, "single")
    expected = [[0.75, 0.5, 0.0], [0.0, 0.5, 0.5], [0.5, 0.0, 1.0]]
    assert np.allclose(found.graph.A, expected, atol=1e-15)
    assert (found.runs, found.total_steps) == (3, 90)


def test_out_of_domain_skills_are_only_judged() -> None:
    found = learn_graph(Lab(), ["a", "b"], 30, "single", eval_skills=["c"])
    assert found.graph == SkillGraph([[0.0], [0.5]], ["a", "b"], ["c"])
    with pytest.raises(ConfigError, match="mode 'single'"):
        learn_graph(Lab(), ["a", "b"], 30, "pairwise", eval_skills=["c"])


def test_an_interrupted_graph_goes_on(tmp_path: Path) -> None:
    cache = tmp_path / "runs.json"

    class Breaks(Lab):
        def __call__(self, shares: Mapping[str, float], steps: int) -> Mapping[str, float]:
            if len(self.runs) == 3:
                raise KeyboardInterrupt
            return super().__call__(shares, steps)

    with pytest.raises(KeyboardInterrupt):
        learn_graph(Breaks(), ["a", "b", "c"], 30, "pairwise", cache=cache)
    told: list[str] = []
    lab = Lab()
    found = learn_graph(lab, ["a", "b", "c"], 30, "pairwise", cache=cache, say=told.append)
    assert len(lab.runs) == 4 and found.runs == 6
    assert found.graph == learn_graph(Lab(), ["a", "b", "c"], 30, "pairwise").graph
    assert told[-1].endswith("(6/6)") and "30 steps on" in told[0]
    with pytest.raises(ConfigError, match="holds runs of 30 steps, not 40"):
        learn_graph(lab, ["a", "b", "c"], 40, "pairwise", cache=cache)


def test_mistakes_are_told_before_or_named() -> None:
    with pytest.raises(ConfigError, match="different names"):
        learn_graph(Lab(), ["a", "a"], 30)
    with pytest.raises(ConfigError, match="at least one step"):
        learn_graph(Lab(), ["a", "b"], 0)
    with pytest.raises(ConfigError, match="no loss for 'd'"):
        learn_graph(Lab(), ["a"], 1, "single", eval_skills=["d"])
    with pytest.raises(NonFiniteError, match="run 'start' the loss of 'a' is nan"):
        learn_graph(lambda shares, steps: {"a": float("nan")}, ["a"], 1, "single")


def test_a_saved_graph_knows_what_it_cost(tmp_path: Path) -> None:
    found = learn_graph(Lab(), ["a", "b", "c"], 30, "single")
    found.save(tmp_path / "graph.json")
    assert SkillGraph.load(tmp_path / "graph.json") == found.graph
    assert '"total_steps": 90' in (tmp_path / "graph.json").read_text()
