"""`mixture: {policy: skillit}` in a configuration: graphs read, checked, learned, shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from polytask.cli import main
from polytask.errors import ConfigError
from polytask.mixture import SkillGraph
from polytask.pipeline import load_config, train
from polytask.pipeline.prepare import prepare

Make = Callable[..., Path]
GROUPS = ["liked+stars", "same", "price"]
CHAIN = [[1, 0.5, 0], [0, 1, 0.5], [0, 0, 1]]


def skillit(**options: Any) -> dict[str, Any]:
    return {"mixture": {"policy": "skillit", "update_steps": 4, **options}}


def test_a_graph_is_read_beside_the_configuration_and_kept_in_it(config: Make) -> None:
    path = config(skillit(graph="chain.json"))
    with pytest.raises(ConfigError, match="there is no skill graph"):
        prepare(load_config(path), path.parent)
    SkillGraph(CHAIN, GROUPS).save(path.parent / "chain.json")
    prepared = prepare(load_config(path), path.parent)
    assert prepared.config.mixture.graph == SkillGraph(CHAIN, GROUPS).to_dict()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"graph": {"train": ["same", "price"], "A": [[1, 0], [0, 1]]}}, "for 'liked\\+stars'"),
        ({"graph": {"train": GROUPS, "A": [[1, 0], [0, 1]]}}, "shape \\(2, 2\\)"),
        ({"graph": "auto", "targets": ["prize"]}, "'prize'. Did you mean 'price'"),
        ({"graph": "auto", "eval_only": ["prize"]}, "'prize'. Did you mean 'price'"),
        ({"graph": "auto", "eval_only": GROUPS}, "nothing to train on"),
        ({"eval_only": ["price"]}, "goes with 'graph: auto'"),
        ({"graph": "auto", "prior": {"prize": 1.0}}, "prior names 'prize'"),
    ],
)
def test_mistakes_are_told_before_training(
    config: Make, options: dict[str, Any], told: str
) -> None:
    path = config(skillit(**options))
    with pytest.raises(ConfigError, match=told):
        prepare(load_config(path), path.parent)


@pytest.mark.slow
def test_a_graph_is_learned_first_and_the_run_is_shown(config: Make, tmp_path: Path) -> None:
    path = config(skillit(graph="auto", graph_steps=2) | {"evaluate/single_task": False})
    run = train(load_config(path), tmp_path / "run", base=path.parent)
    record = json.loads((run.folder / "graph.json").read_text())
    assert record["train"] == record["eval"] == GROUPS
    assert record["learned"]["total_steps"] == 6
    start, own = record["learned"]["losses"]["start"], record["learned"]["losses"]['["price"]']
    expected = max(0.0, (start["same"] - own["same"]) / start["same"])
    assert record["A"][2][1] == pytest.approx(expected)
    table = (run.folder / "mixture.csv").read_text().splitlines()
    assert [line.split(",")[:2] for line in table[1:]] == [["1", "0"], ["2", "4"], ["3", "8"]]
    for name in ("skills.html", "mixture-shares.png", "skill-losses.png", "skill-graph.png"):
        assert (run.folder / name).stat().st_size > 1000
    assert json.loads((run.folder / "config.json").read_text())["config"]["mixture"]["graph"] == (
        "auto"
    )
    assert train(load_config(path), run.folder, base=path.parent).scores == run.scores
    assert main(["mixture", "show", str(run.folder)]) == 0


@pytest.mark.slow
def test_tasks_that_are_only_judged_get_no_rows(config: Make, tmp_path: Path) -> None:
    changes = skillit(graph="auto", graph_steps=1, eval_only=["price"])
    path = config(changes | {"evaluate/single_task": False})
    run = train(load_config(path), tmp_path / "run", base=path.parent)
    graph = SkillGraph.load(run.folder / "graph.json")
    assert (graph.train_names, graph.eval_names) == (("liked+stars", "same"), ("price",))
    ledger = json.loads((run.folder / "ledger.json").read_text())["mixture"]
    assert {row["group"]: row["rows"] > 0 for row in ledger} == {
        "liked+stars": True, "same": True, "price": False
    }  # fmt: skip


@pytest.mark.slow
def test_the_command_writes_a_graph_that_a_run_can_use(
    config: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config()
    out = tmp_path / "graph.json"
    given = ["mixture", "graph", str(path), "--out", str(out), "--steps", "1"]
    assert main([*given, "--mode", "pairwise"]) == 0
    assert "6 runs, 6 steps in all" in capsys.readouterr().out
    assert SkillGraph.load(out).train_names == tuple(GROUPS)
    assert main(["mixture", "show", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["train"] == GROUPS
    assert main([*given, "--mode", "pair"]) == 2
    assert "Did you mean 'pairwise'" in capsys.readouterr().err
    assert main([*given, "--eval", "prize"]) == 2
    assert main(["mixture", "show", str(path)]) == 2
