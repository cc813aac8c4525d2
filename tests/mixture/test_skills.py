"""Skill graphs: shapes, names, warnings, files."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from polytask.errors import ConfigError
from polytask.mixture import SkillGraph

A = [[1.0, 0.5, 0.0], [0.0, 1.0, 0.25]]


def test_a_rectangular_graph_has_training_rows_and_evaluation_columns() -> None:
    graph = SkillGraph(A, ["a", "b"], ["a", "x", "y"])
    assert graph.shape == (2, 3) and not graph.square
    assert graph.own.tolist() == [[True, False, False], [False, False, False]]
    only = graph.only(eval_names=["y", "a"])
    assert only.A.tolist() == [[0.0, 1.0], [0.25, 0.0]] and only.eval_names == ("y", "a")
    assert graph.transposed().A[1, 0] == 0.5
    assert graph.transposed().train_names == ("a", "x", "y")


@pytest.mark.parametrize(
    ("matrix", "names", "told"),
    [
        ([[1, 2], [3, 4]], ["a"], r"shape \(2, 2\).*1 training"),
        ([[1, float("nan")], [0, 1]], ["a", "b"], "'a' -> 'b' is nan"),
        ([[1, 0], [float("inf"), 1]], ["a", "b"], "'b' -> 'a' is inf"),
        ([[1, 0], [0, 1]], ["a", "a"], "names 'a' twice"),
        ([[1, 0], [0]], ["a", "b"], "rows of numbers"),
        ([["x"]], ["a"], "rows of numbers"),
        ([], [], "at least one skill"),
    ],
)
def test_a_faulty_graph_says_where(matrix: object, names: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        SkillGraph(matrix, names)  # type: ignore[arg-type]


def test_negative_entries_are_kept_with_a_warning_and_clipped_on_request(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        kept = SkillGraph([[1, -0.5], [0, 1]], ["a", "b"])
    assert kept.A[0, 1] == -0.5
    assert "1 negative" in caplog.text and "'a' -> 'b'" in caplog.text
    caplog.clear()
    clipped = SkillGraph([[1, -0.5], [0, 1]], ["a", "b"], clip=True)
    assert clipped.A[0, 1] == 0 and not caplog.text
    assert kept.clipped() == clipped


def test_a_graph_without_order_is_warned_of() -> None:
    names = list("abcd")
    chain = SkillGraph(np.eye(4) + np.eye(4, k=1) + np.eye(4, k=2), names)
    assert chain.warn_if_flat() is None
    assert "almost no edges" in (SkillGraph.identity(names).warn_if_flat() or "")
    assert "almost all edges" in (SkillGraph(np.ones((4, 4)), names).warn_if_flat() or "")
    assert SkillGraph([[1.0]], ["a"]).warn_if_flat() is None  # a single skill has no order


def test_a_graph_comes_back_from_its_file(tmp_path: Path) -> None:
    graph = SkillGraph(A, ["a", "b"], ["a", "x", "y"])
    path = tmp_path / "graph.json"
    graph.save(path, {"mode": "single"})
    assert SkillGraph.load(path) == graph
    assert json.loads(path.read_text())["learned"] == {"mode": "single"}
    with pytest.raises(ConfigError, match="there is no skill graph"):
        SkillGraph.load(tmp_path / "none.json")
    path.write_text("{")
    with pytest.raises(ConfigError, match="no JSON"):
        SkillGraph.load(path)
    path.write_text('{"train": ["a"], "a": [[1]]}')
    with pytest.raises(ConfigError, match=r"unknown key 'a'. Known: A"):
        SkillGraph.load(path)
    path.write_text('{"train": ["a"], "A": [[1, 2]]}')
    with pytest.raises(ConfigError, match=r"graph.json: the skill graph has shape"):
        SkillGraph.load(path)


def test_edges_drawn_by_hand_count_half() -> None:
    """The LEGO graph of the paper: ones off the diagonal become 0.5 in the authors' code."""
    rows = [[1, 0, 0, 0, 0], [1, 1, 1, 1, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]
    graph = SkillGraph.by_hand(rows, list("12345"))
    assert graph.A[1].tolist() == [0.5, 1, 0.5, 0.5, 0]
    assert graph.lone.tolist() == [False, False, False, False, True]


def test_halving_leaves_own_and_negative_entries_alone() -> None:
    graph = SkillGraph([[1, 0.5], [-0.5, 1]], ["a", "b"]).halved_edges(2)
    assert graph.A.tolist() == [[1, 0.125], [-0.5, 1]]
    out = SkillGraph([[1.0, 0.5]], ["a"], ["x", "a"]).halved_edges(1)  # own is by name
    assert out.A.tolist() == [[0.5, 0.5]]


def test_an_unknown_name_is_told_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no evaluation skill 'spnish'. Did you mean 'spanish'"):
        SkillGraph([[1, 0], [0, 1]], ["spanish", "french"]).only(eval_names=["spnish"])
