"""`method: adamerging` in a file: coefficients are learned, the result is an ordinary merge."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from polytask.cli import main
from polytask.errors import ConfigError, MergeError
from polytask.merge import load_with_head
from polytask.merge.methods.ties import ties_vectors
from polytask.merge.plan import make_plan
from polytask.merge.vectors import TaskVectors
from polytask.pipeline import learned
from polytask.systems import load

sys.path.insert(0, str(Path(__file__).parents[1] / "merge"))
from merge_samples import WORDS, bert, save, tuned


def build(home: Path) -> dict[str, Any]:
    """A BERT without head and two experts with heads of two and three classes, and their rows."""
    torch.manual_seed(0)
    trunk = bert(2)
    models = {"base": trunk.bert}
    for name, labels, seed in (("one", 2, 1), ("two", 3, 2)):
        model = bert(labels, seed=5)
        model.bert.load_state_dict(trunk.bert.state_dict())
        model = tuned(model, seed, 0.015)
        with torch.no_grad():
            model.classifier.weight.mul_(20)
        models[name] = model
    for name, model in models.items():
        save(model, home / name)
    words = WORDS[5:]
    for name in ("one", "two"):
        lines = [f"{' '.join(words[(i * k) % 35] for k in range(1, 6))}" for i in range(1, 30)]
        rows = [{"text": line, "more": line[:5]} for line in lines]
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return models


def recipe(home: Path, **data: Any) -> Path:
    given = {
        "method": "adamerging",
        "base": "base",
        "models": {"one": "one", "two": "two"},
        "inputs": {n: {"data": f"{n}.jsonl", "text": "text"} for n in ("one", "two")},
        "heads": ["classifier.*"],
        "parameters": {"steps": 5, "lr": 0.05, "batches_per_step": 1},
        "batch_size": 8,
        **data,
    }
    path = home / "my.yaml"
    path.write_text(yaml.safe_dump(given))
    return path


def states(models: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    base = models["base"].state_dict()
    experts = [models[n].bert.state_dict() for n in ("one", "two")]
    return base, experts


@pytest.mark.parametrize("trim", [None, 0.3])
def test_the_command_writes_the_merge_that_was_learned(tmp_path: Path, trim: Any) -> None:
    models = build(tmp_path)
    parameters = {"steps": 5, "lr": 0.05, "batches_per_step": 1, "trim": trim}
    path = recipe(tmp_path, parameters=parameters)
    out = tmp_path / "out"
    assert main(["merge", str(path), "--out", str(out)]) == 0
    record = json.loads((out / "coefficients.json").read_text())
    traces = json.loads((out / "trace.json").read_text())["entropy"]
    assert record["models"] == ["one", "two"] == list(traces)
    assert all(len(values) == 5 for values in traces.values())
    found = {k: torch.tensor(v, dtype=torch.float64) for k, v in record["coefficients"].items()}
    assert any(not math.isclose(float(c), 0.3) for row in found.values() for c in row)
    base, experts = states(models)
    parts = {name for name, _ in models["base"].named_parameters()}
    vectors = TaskVectors.from_state_dicts(
        {k: base[k] for k in parts}, [{k: e[k] for k in parts} for e in experts]
    )
    if trim is not None:
        vectors = ties_vectors(vectors, trim)
    wanted = vectors.add(found)
    for name, labels in (("one", 2), ("two", 3)):
        model = load_with_head(out, name)
        assert model.config.num_labels == labels
        for key, value in model.bert.state_dict().items():
            if key in wanted:
                assert torch.allclose(value, wanted[key].float(), atol=1e-5), key
        assert torch.equal(model.classifier.weight, models[name].classifier.weight)
    assert (out / "report" / "report.html").is_file()
    # The card's recipe gives the model again, without learning.
    said = json.loads((out / "merge.json").read_text())
    assert "task_arithmetic" in str(said) or "ties" in str(said)


def test_the_gradient_goes_through_each_experts_own_head(tmp_path: Path) -> None:
    build(tmp_path)
    learning = learned.find_learning(recipe(tmp_path))
    assert learning is not None
    plan = make_plan(learning.recipe)
    voices = learning.voices(plan)
    batch = next(iter(voices["two"].batches))
    forward = learned._forward(plan, "two", voices["two"])
    own = {k: v.clone() for k, v in voices["two"].module.bert.state_dict().items()}
    with torch.no_grad():
        said = forward({k: v for k, v in own.items() if v.is_floating_point()}, batch)
        alone = voices["two"].module(**batch).logits
    assert said.shape[1] == 3 and torch.allclose(said, alone, atol=1e-5)


def test_rows_come_in_another_order_every_time_and_all_of_them() -> None:
    batches = learned.Shuffled(10, 4, list, 0, "x")
    first, second = ([i for b in batches for i in b] for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert [i for b in learned.Shuffled(10, 4, list, 0, "x") for i in b] == first


def test_a_model_without_inputs_takes_part_all_the_same(tmp_path: Path) -> None:
    build(tmp_path)
    path = recipe(tmp_path, inputs={"one": {"data": "one.jsonl", "text": ["text", "more"]}})
    assert main(["merge", str(path), "--out", str(tmp_path / "out"), "--no-report"]) == 0
    record = json.loads((tmp_path / "out" / "coefficients.json").read_text())
    assert record["models"] == ["one", "two"]
    assert list(json.loads((tmp_path / "out" / "trace.json").read_text())["entropy"]) == ["one"]


def test_a_dry_run_learns_nothing(tmp_path: Path, capsys: Any) -> None:
    build(tmp_path)
    assert main(["merge", str(recipe(tmp_path)), "--out", str(tmp_path / "o"), "--dry-run"]) == 0
    assert not (tmp_path / "o").exists()
    assert "nothing written" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"inputs": {"ones": {"data": "one.jsonl", "text": "text"}}}, "no model 'ones'.*'one'"),
        ({"inputs": {"one": {"data": "one.jsonl", "text": "txet"}}}, "no column 'txet'.*'text'"),
        ({"inputs": {"one": {"data": "one.jsonl"}}}, "'text' names one column"),
        ({"inputs": {"one": {"data": "no.jsonl", "text": "text"}}}, "no.jsonl"),
        ({"inputs": {}}, "learns from unlabelled rows"),
        ({"input": {}}, "unknown key 'input'.*'inputs'"),
        ({"parameters": {"granularty": "task"}}, "granularity"),
        ({"tensors": []}, "what AdaMerging learns"),
    ],
)
def test_mistakes_are_named_before_anything_is_learned(
    tmp_path: Path, change: dict[str, Any], reason: str, capsys: Any
) -> None:
    import re

    build(tmp_path)
    path = recipe(tmp_path, **change)
    assert main(["merge", str(path), "--out", str(tmp_path / "out"), "--dry-run"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(reason, said), said


def test_a_base_is_needed_and_a_taken_folder_is_refused_at_once(tmp_path: Path) -> None:
    build(tmp_path)
    path = recipe(tmp_path)
    data = yaml.safe_load(path.read_text())
    del data["base"]
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(ConfigError, match="'base'"):
        learned.find_learning(path)
    with pytest.raises(MergeError, match="exists"):
        learned.check_free(tmp_path, overwrite=False)
    learned.check_free(tmp_path, overwrite=True)


def test_other_methods_are_left_to_the_usual_way(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("method: ties\nmodels: [a, b]\n")
    assert learned.find_learning(path) is None


def test_the_systems_run_on_folders(tmp_path: Path) -> None:
    build(tmp_path)
    ada = load("adamerging")
    outcome = ada.run(ada.config(data=recipe(tmp_path), out=tmp_path / "a"), lambda text: None)
    assert (outcome.folder / "coefficients.json").is_file() and outcome.figures["coefficient"]
    data = {
        "method": "pcb",
        "base": "base",
        "models": {"one": "one", "two": "two"},
        "heads": ["classifier.*"],
    }
    (tmp_path / "pcb.yaml").write_text(yaml.safe_dump(data))
    pcb = load("pcb-merging")
    config = pcb.config(data=tmp_path / "pcb.yaml", out=tmp_path / "b")
    outcome = pcb.run(config, lambda text: None)
    assert all(path.is_file() for path in outcome.files)
    assert set(outcome.figures) >= {"kept", "overlap"}


def test_a_weight_for_each_model_is_searched_on_labelled_rows(tmp_path: Path) -> None:
    models = build(tmp_path)
    rows = [{"text": f"w{i} w{i + 1}", "label": f"LABEL_{i % 2}"} for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "model": "one",
        "data": "rows.jsonl",
        "inputs": {"text": "text"},
        "target": "label",
    }
    data = {
        "method": "pcb",
        "base": "base",
        "models": {"one": "one", "two": "two"},
        "heads": ["classifier.*"],
        "compare": {"split": "valid", "tasks": {"first": task}},
    }
    (tmp_path / "pcb.yaml").write_text(yaml.safe_dump(data))
    pcb = load("36")
    config = pcb.config(data=tmp_path / "pcb.yaml", out=tmp_path / "b", search=4)
    outcome = pcb.run(config, lambda text: None)
    weights = outcome.figures["weights"]
    assert set(weights) == {"one", "two"} and all(0.5 <= w <= 3 for w in weights.values())
    found = load_with_head(outcome.folder, "one").bert.state_dict()
    from polytask.merge import merge_state_dicts

    base, experts = states(models)
    wanted = merge_state_dicts("pcb", experts, base, weight=tuple(weights.values()))
    key = "encoder.layer.0.output.dense.weight"
    assert torch.allclose(found[key], wanted[key], atol=1e-5)


@pytest.mark.slow
def test_polytask_runs_answer_through_their_own_task(tmp_path: Path) -> None:
    from polytask.pipeline import parse_config, train
    from polytask.pipeline.run import load_run

    lines = ["words,label", *(f"w{i % 7} w{i % 5},{'abc'[i % 3]}" for i in range(60))]
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    for name, seed in (("base", 0), ("one", 1), ("two", 2)):
        config = {
            "name": name,
            "tasks": {"t": {"data": str(tmp_path / "t.csv"), "target": "label"}},
            "model": {"dim": 16, "layers": 1, "heads": 2, "seed": 0},
            "train": {"steps": 2 + 2 * seed, "batch_size": 8, "seed": seed, "lr": 1e-2},
            "evaluate": {"single_task": False},
        }
        train(parse_config(config), tmp_path / name, say=lambda text: None)
    inputs = {name: {"data": "t.csv"} for name in ("one", "two")}
    path = recipe(tmp_path, inputs=inputs, heads=[])
    assert main(["merge", str(path), "--out", str(tmp_path / "out"), "--no-report"]) == 0
    record = json.loads((tmp_path / "out" / "coefficients.json").read_text())["coefficients"]
    # A run's head is a parameter like any other where no pattern keeps it apart.
    names = {n for n, _ in load_run(tmp_path / "one").model.named_parameters()}
    assert set(record) == names
    assert any(not math.isclose(c, 0.3) for row in record.values() for c in row)
    with pytest.raises(ConfigError, match="no task 'x'"):
        path = recipe(tmp_path, inputs={"one": {"data": "t.csv", "task": "x"}}, heads=[])
        learning = learned.find_learning(path)
        assert learning is not None
        learning.voices(make_plan(learning.recipe))
