"""`polytask merge`: two folders in Hugging Face format become one that transformers loads."""

from __future__ import annotations

import csv
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from polytask import files
from polytask.cli import main
from polytask.merge import load_with_head, merge_state_dicts

sys.path.insert(0, str(Path(__file__).parents[1] / "merge"))
from merge_samples import WORDS, bert, llama, save, tree, tuned


def build(home: Path, model: Any) -> dict[str, Any]:
    models = {"base": model, "one": tuned(model, 1), "two": tuned(model, 2)}
    for name, one in models.items():
        save(one, home / name)
    return models


def recipe(home: Path, **data: Any) -> str:
    given = {"method": "ties", "base": "base", "models": ["one", "two"], **data}
    path = home / "my.yaml"
    path.write_text(yaml.safe_dump(given))
    return str(path)


def test_two_llama_folders_become_one_that_transformers_loads(tmp_path: Path, capsys: Any) -> None:
    from transformers import AutoModelForCausalLM

    models = build(tmp_path, llama(torch_dtype="float32"))
    out = tmp_path / "out"
    assert main(["merge", recipe(tmp_path), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "report.html" in said and str(out) in said.replace("\n", "")
    found = AutoModelForCausalLM.from_pretrained(out).state_dict()
    want = merge_state_dicts(
        "ties", [models[n].state_dict() for n in ("one", "two")], models["base"].state_dict()
    )
    assert all(torch.equal(found[key], value) for key, value in want.items())
    files.verify_manifest(out)
    assert {p.name for p in (out / "report").iterdir()} >= {
        "report.html", "coefficients.png", "conflict.png", "overlap.png", "sizes.png",
    }  # fmt: skip


def test_two_bert_folders_merge_by_a_mergekit_file(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    models = build(tmp_path, bert())
    data = {
        "merge_method": "linear",
        "models": [
            {"model": str(tmp_path / n), "parameters": {"weight": w}}
            for n, w in (("one", 0.25), ("two", 0.75))
        ],
        "dtype": "float32",
    }
    path = tmp_path / "mergekit.yml"
    path.write_text(yaml.safe_dump(data))
    assert main(["merge", str(path), "--out", str(tmp_path / "out"), "--no-report"]) == 0
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").state_dict()
    for key, value in found.items():
        want = 0.25 * models["one"].state_dict()[key] + 0.75 * models["two"].state_dict()[key]
        torch.testing.assert_close(value, want)


def test_a_dry_run_writes_nothing_and_says_what_would_be(tmp_path: Path, capsys: Any) -> None:
    build(tmp_path, llama())
    path = recipe(tmp_path, parameters={"trim": "model"})
    before = tree(tmp_path)
    assert main(["merge", path, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["tensors"] == {"merged": 30, "copied": 0, "tied": 0}
    assert plan["passes"] == ["magnitudes", "thresholds"]
    assert plan["bytes"] == sum(shard["bytes"] for shard in plan["shards"])
    assert main(["merge", path, "--dry-run", "--out", str(tmp_path / "out")]) == 0
    assert "all checks passed" in capsys.readouterr().out
    assert tree(tmp_path) == before
    assert main(["merge", path, "--out", str(tmp_path / "out"), "--json", "--no-report"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["bytes"] == plan["bytes"] and done["report"] is None
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == plan["bytes"]


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"methd": "x"}, "unknown key 'methd'. Did you mean 'method'?"),
        ({"parameters": {"densty": 1}}, "Did you mean 'density'?"),
        ({"models": ["one", "three"]}, "three: there is no file or folder three"),
        ({"models": ["one", "other"]}, "other: tensor 'lm_head.weight' has shape (40, 16)"),
    ],
)
def test_mistakes_are_said_in_a_line_and_exit_with_2(
    tmp_path: Path, capsys: Any, data: dict[str, Any], told: str
) -> None:
    build(tmp_path, llama())
    save(llama(hidden_size=16), tmp_path / "other")
    path = recipe(tmp_path, **data)
    assert main(["merge", path, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert told in said and "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_without_a_place_to_write_it_asks_for_one(tmp_path: Path, capsys: Any) -> None:
    build(tmp_path, llama())
    assert main(["merge", recipe(tmp_path)]) == 2
    assert "--out FOLDER" in capsys.readouterr().err
    path = recipe(tmp_path, out="there")
    assert main(["merge", path, "--no-report"]) == 0 and (tmp_path / "there").is_dir()
    assert main(["merge", path, "--scales", "1:0:2"]) == 2
    assert "give FIRST:LAST:STEP" in capsys.readouterr().err


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_an_interruption_exits_with_130_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path, llama())
    path = recipe(tmp_path)
    asked = ["merge", path, "--out", str(tmp_path / "out"), "--no-report"]
    with monkeypatch.context() as patch:
        patch.setattr("polytask.merge.output.complete", interrupted)
        assert main(asked) == 130
    assert not (tmp_path / "out").exists()
    assert main(asked) == 0 and (tmp_path / "out" / "manifest.json").is_file()


def rows(path: Path, label: Any) -> None:
    rng = random.Random(path.name)
    with path.open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["text", "label"])
        for _ in range(120):
            words = rng.sample(WORDS[5:], 5)
            writer.writerow([" ".join(words), label(words)])


def test_compare_scores_base_experts_and_merge(tmp_path: Path, capsys: Any) -> None:
    """Heads are given so that the experts' answers are known: the table must hold those scores."""
    trunk = bert()
    save(trunk.bert, tmp_path / "base")
    for i, name in enumerate(("one", "two")):
        model = bert(seed=i)
        model.bert.load_state_dict(tuned(trunk.bert, i).state_dict())
        model.config.id2label = {0: "no", 1: "yes"}
        model.config.label2id = {"no": 0, "yes": 1}
        save(model, tmp_path / name)
        rows(tmp_path / f"{name}.csv", lambda words: "yes" if "w7" in words else "no")
    tasks = {
        f"t-{n}": {"data": f"{n}.csv", "target": "label", "model": n, "split": {"test": 0.7}}
        for n in ("one", "two")
    }
    path = recipe(tmp_path, heads=["classifier.*"], compare={"tasks": tasks, "batch_size": 7})
    out = tmp_path / "out"
    assert main(["merge", path, "--out", str(out), "--scales", "0:1:0.5", "--json"]) == 0
    table = json.loads(capsys.readouterr().out)["compare"]
    assert table["columns"] == ["base", "one", "two", "merge"]
    assert [row["task"] for row in table["rows"]] == ["t-one", "t-two"]
    scales = dict(table["scales"])
    for row in table["rows"]:
        assert scales[0.0][row["task"]] == row["values"]["base"]
        assert scales[1.0][row["task"]] == row["values"]["merge"]
        name = row["task"].removeprefix("t-")
        merged = _accuracy(load_with_head(out, name), tmp_path, name, row["rows"])
        assert row["values"]["merge"] == pytest.approx(merged)
    page = (out / "report" / "report.html").read_text()
    assert "What it is worth" in page and (out / "report" / "scales.png").is_file()


def _accuracy(model: Any, home: Path, name: str, count: int) -> float:
    """The slow way: the model with its head, row by row."""
    from transformers import AutoTokenizer

    from polytask.tasks import build_tasks

    config = {"data": f"{name}.csv", "target": "label", "split": {"test": 0.7}}
    (task,) = build_tasks({f"t-{name}": config}, home, 0).tasks
    tokenizer = AutoTokenizer.from_pretrained(home / name)
    source = task.splits["test"]
    right = 0
    with torch.no_grad():
        for row in source.take(range(len(source))):
            said = model(**tokenizer(row["text"], return_tensors="pt")).logits.argmax()
            right += model.config.id2label[int(said)] == row["label"]
    assert len(source) == count
    return right / count


def test_compare_needs_to_know_whose_head_answers(tmp_path: Path, capsys: Any) -> None:
    build(tmp_path, bert())
    rows(tmp_path / "t.csv", lambda words: "no")
    task = {"t": {"data": "t.csv", "target": "label"}}
    asked = ["--compare", "--dry-run"]
    path = recipe(tmp_path, heads=["classifier.*"], compare={"tasks": task})
    assert main(["merge", path, *asked]) == 2
    assert "every model has its own head; say whose answers" in capsys.readouterr().err
    task["t"]["model"] = "onee"
    path = recipe(tmp_path, compare={"tasks": task})
    assert main(["merge", path, *asked]) == 2
    assert "there is no model 'onee'. Did you mean 'one'?" in capsys.readouterr().err
    assert main(["merge", recipe(tmp_path), *asked]) == 2
    assert "compare: give 'tasks'" in capsys.readouterr().err


@pytest.mark.slow
def test_polytask_runs_merge_and_compare_on_their_own_tasks(tmp_path: Path, capsys: Any) -> None:
    """Two short runs from one start; no data is named, since runs know their tasks."""
    from polytask.pipeline import parse_config, train

    rows(tmp_path / "t.csv", lambda words: "yes" if "w7" in words or "w9" in words else "no")
    small = {"dim": 16, "layers": 1, "heads": 2}
    for name, seed in (("base", 0), ("one", 1), ("two", 2)):
        config = {
            "name": name,
            "tasks": {"t": {"data": str(tmp_path / "t.csv"), "target": "label"}},
            "model": {**small, "seed": 0},
            "train": {"steps": 2 + 2 * seed, "batch_size": 8, "seed": seed},
            "evaluate": {"single_task": False},
        }
        train(parse_config(config), tmp_path / name, say=lambda text: None)
    path = recipe(tmp_path, method="average")
    assert main(["merge", path, "--out", str(tmp_path / "out"), "--compare", "--json"]) == 0
    table = json.loads(capsys.readouterr().out.splitlines()[-1])["compare"]
    assert [row["task"] for row in table["rows"]] == ["one: t", "two: t"]
    scores = json.loads((tmp_path / "one" / "scores.json").read_text())["tasks"][0]["multitask"]
    assert table["rows"][0]["values"]["one"] == pytest.approx(scores)
