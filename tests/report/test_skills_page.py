"""The page of a mixture over skills: its table is exact, its sentence true, its pictures there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from polytask.errors import ConfigError
from polytask.mixture import SkillGraph
from polytask.report.skills_page import mixture_table, read_rounds, said, skills_page


def round_(after: int, share: float, **losses: float) -> dict[str, Any]:
    return {"after": after, "shares": {"a": share, "<b>": 1 - share}, "losses": losses}


ROUNDS = [round_(0, 0.5, a=2.0, b=1.0), round_(10, 0.25, a=1.0), round_(20, 0.125, a=0.5, b=0.75)]


def folder(tmp_path: Path, rounds: list[dict[str, Any]], graph: Any = None) -> Path:
    lines = [{"kind": "train", "step": 1}]
    lines += [{"kind": "event", "event": "mixture", "step": r["after"] + 1, **r} for r in rounds]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = {"config": {"name": "<my> run", "mixture": {"graph": graph}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_the_table_has_a_line_per_round_and_gaps_where_nothing_was_measured() -> None:
    assert mixture_table(ROUNDS).splitlines() == [
        "round,after_steps,share a,share <b>,loss a,loss b",
        "1,0,0.500000,0.500000,2.000000,1.000000",
        "2,10,0.250000,0.750000,1.000000,",
        "3,20,0.125000,0.875000,0.500000,0.750000",
    ]


def test_the_sentence_says_who_gained_and_how_many_edges_there_are() -> None:
    graph = SkillGraph([[1, 0.5], [0, 1]], ["a", "<b>"])
    text = said(ROUNDS, graph)
    assert "3 rounds over 2 tasks" in text and "1 of 2 possible edges" in text
    assert "'<b>' went from 50% to 88%" in text and "'a' from 50% to 12%" in text
    assert "went from" not in said(ROUNDS[:1], None)


@pytest.mark.parametrize("rounds", [ROUNDS, ROUNDS[:1]])
def test_the_page_is_whole(tmp_path: Path, rounds: list[dict[str, Any]]) -> None:
    graph = SkillGraph([[1, -0.5], [0, 1]], ["a", "<b>"]).to_dict()
    page = skills_page(folder(tmp_path, rounds, graph)).read_text()
    assert "&lt;my&gt; run" in page and "<b> " not in page
    for name in ("mixture-shares", "skill-losses", "skill-graph"):
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
    assert page.count("<svg") == 3


def test_a_learned_graph_goes_before_none_and_other_runs_are_told_apart(tmp_path: Path) -> None:
    skills_page(folder(tmp_path, ROUNDS))
    assert not (tmp_path / "skill-graph.png").exists()
    SkillGraph([[1.0]], ["a"]).save(tmp_path / "graph.json")
    skills_page(tmp_path)
    assert (tmp_path / "skill-graph.png").exists()
    with pytest.raises(ConfigError, match="no mixture that followed validation losses"):
        read_rounds(folder(tmp_path, []))
    with pytest.raises(ConfigError, match=r"no metrics\.jsonl"):
        read_rounds(tmp_path / "none")
