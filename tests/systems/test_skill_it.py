"""System 50: its arms differ in the mixture alone; its command learns a graph and shows it."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import pytest

from polytask import systems
from polytask.cli import main
from polytask.errors import ConfigError
from polytask.study import Budget
from polytask.systems.skill_it_run import (
    SkillItRunConfig,
    made_up,
    planned_steps,
    round_length,
    texts_config,
)
from polytask.systems.testbeds import lego
from polytask.systems.testbeds import skill_training as bed

module = import_module("polytask.systems.50_skill_it")
system = systems.load("skill-it")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bed, "cache_root", lambda: tmp_path_factory.getbasetemp() / "lego")


def test_claims_are_the_sheets_pass_lines() -> None:
    found = {(c.better, c.than, c.metric, c.kind) for c in system.claims}
    assert found == {
        ("skill-it", "skewed", "auc", "claim"),
        ("skill-it", "transposed", "auc", "ablation"),
    }


def test_every_arm_starts_alike_and_spends_the_same() -> None:
    arms = system.arms("smoke")
    assert tuple(arms) == module.NAMES
    found = {name: arm.run(2, Budget(steps=4)) for name, arm in arms.items()}
    first = {json.dumps(r.notes["curve"]["accuracy"][0]) for r in found.values()}
    assert len(first) == 1
    spent = {(r.spent.steps, r.spent.rows) for n, r in found.items() if "longer" not in n}
    assert spent == {(4, 32)}
    assert found["stratified, longer"].spent.steps == 8
    graph = found["skill-it"].notes["graph"]
    assert found["skill-it"].notes["learned"]["total_steps"] == 6
    shares = {n: r.notes["curve"]["shares"][0] for n, r in found.items()}
    assert shares["stratified"] == pytest.approx(dict.fromkeys(graph["train"], 1 / 3))
    assert list(shares["skewed"].values()) == pytest.approx([1 / 7, 2 / 7, 4 / 7])
    assert shares["identity"] == pytest.approx(shares["stratified"])
    again = arms["skill-it"].run(2, Budget(steps=4))
    assert again.metrics == found["skill-it"].metrics


def test_the_transposed_arm_has_the_learned_graph_turned_round() -> None:
    learned = bed.learned_graph(module.SMOKE).graph
    graph, _ = module.Trial("transposed", 1e-3, smoke=True)._graph(module.SMOKE)
    assert graph.A.tolist() == learned.A.T.tolist()


def test_tuned_settings_go_to_the_methods_ablations_as_well() -> None:
    arms = system.arms("full")
    settings = {name: arm.params for name, arm in arms.items()}
    assert settings["identity"] == settings["transposed"] == settings["skill-it"]
    assert set(settings["skewed"]) == {"lr"}
    assert set(system.tuning.seeds) == {1000}


def test_rounds_divide_the_training() -> None:
    assert round_length(300, 10) == 30
    assert round_length(7, 10) == 1
    assert round_length(13, 10) == 13  # a prime has one round
    assert planned_steps({}) == 1000 and planned_steps({"train": {"epochs": 2}}) is None


def test_a_mapping_of_texts_is_a_configuration() -> None:
    values = texts_config({"de": "de.csv", "fr": "fr.csv"}, SkillItRunConfig(hub="embedded:x"))
    assert values["tasks"]["de"] == {
        "data": "de.csv", "schema": "language_model", "inputs": {"text": "text"}
    }  # fmt: skip
    assert values["model"] == {"hub": "embedded:x"} and values["train"]["lr"] == 5e-5


def test_lego_is_written_as_files_that_can_be_solved(tmp_path: Path) -> None:
    values, base = made_up(SkillItRunConfig(out=tmp_path, items=20), print)
    assert list(values["tasks"]) == ["depth1", "depth2", "depth3"]
    lines = (base / "skill-it-lego" / "depth3.csv").read_text().splitlines()
    assert len(lines) == 21
    for line in lines[1:]:
        text, _, answer = line.strip('"').rpartition('",')
        assert lego.solve(f"{text} {answer}") == answer


def test_a_graph_of_other_tasks_is_refused_before_training(tmp_path: Path) -> None:
    graph = tmp_path / "graph.json"
    graph.write_text('{"train": ["x"], "A": [[1]]}')
    config = SkillItRunConfig(out=tmp_path, items=60, graph=str(graph))
    with pytest.raises(ConfigError, match="names 'x', which is no task"):
        system.run(config, lambda text: None)


@pytest.mark.slow
def test_the_command_learns_a_graph_trains_by_it_and_shows_it(tmp_path: Path) -> None:
    text = Path(module.__file__).with_name("50_skill_it.yaml").read_text()
    assert "steps: 300" in text and "dim: 64, layers: 3, heads: 4" in text
    made_up(SkillItRunConfig(out=tmp_path, items=100), print)
    small = text.replace("steps: 300", "steps: 12").replace("64, layers: 3", "16, layers: 1")
    (tmp_path / "own.yaml").write_text(small.replace("name: skill-it", "name: own"))
    given = ["--out", str(tmp_path / "runs"), "--rounds=4", "--graph-steps=3"]
    assert main(["run", "skill-it", "--data", str(tmp_path / "own.yaml"), *given]) == 0
    folder = tmp_path / "runs" / "own-skill-it"
    record = json.loads((folder / "skill-it.json").read_text())
    assert record["graph"]["learned"]["total_steps"] == 9
    assert set(record["scores"]) == {"skill-it", "stratified"}
    table = (folder / "mixture.csv").read_text().splitlines()
    assert table[0].startswith("round,after_steps,share depth1") and len(table) == 5
    assert [line.split(",")[1] for line in table[1:]] == ["0", "3", "6", "9"]
    for name in ("skills.html", "mixture-shares.png", "skill-losses.png", "skill-graph.png"):
        assert (folder / name).is_file()
