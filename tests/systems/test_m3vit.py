"""System 24: its arms differ in the router alone, costs are equal, metrics agree with loops."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from polytask import systems
from polytask.cli import main
from polytask.models.experts.vit_flops import vit_flops
from polytask.study import Budget
from polytask.systems.testbeds import scenes as bed

module = import_module("polytask.systems.24_m3vit")
system = systems.load("m3vit")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bed, "cache_root", lambda: tmp_path_factory.getbasetemp() / "scenes")


def test_claims_are_the_sheets_pass_lines() -> None:
    found = {(c.better, c.than, c.metric, c.kind) for c in system.claims}
    assert found == {
        ("multi-gate", "dense", "delta_m", "claim"),
        ("multi-gate", "blind", "delta_m", "ablation"),
        ("multi-gate", "blind", "conflict", "ablation"),
    }


def test_arms_cost_the_same_per_request_and_less_than_half_of_all_tasks() -> None:
    models = {n: bed.build(module.FULL, 0, e) for n, e in module.EXPERTS.items()}
    costs = {
        n: [sum(vit_flops(m.config, t).values()) for t in bed.NAMES] for n, m in models.items()
    }
    whole = {n: sum(c) for n, c in costs.items()}
    assert max(whole.values()) / min(whole.values()) < 1.02
    assert all(max(c) < 0.5 * sum(c) for c in costs.values())


def test_trunks_of_all_arms_start_alike_outside_their_experts() -> None:
    dense, sparse = (bed.build(module.SMOKE, 3, module.EXPERTS[n]) for n in ("dense", "multi-gate"))
    theirs = dict(sparse.named_parameters())
    shared = [n for n, _ in dense.named_parameters() if n in theirs]
    assert len(shared) > 30
    assert all(torch.equal(p, theirs[n]) for n, p in dense.named_parameters() if n in theirs)


def test_tasks_targets_are_the_scenes_own() -> None:
    part = bed.parts(module.SMOKE, 1)["test"]
    assert part.pixels.shape == (64, 1, 16, 16)
    assert {n: tuple(t.shape[1:]) for n, t in part.target.items()} == {
        "seg": (4, 4), "depth": (4, 4), "edge": (4, 4), "near": (), "far": ()
    }  # fmt: skip
    assert int(part.target["seg"].max()) <= 10


def test_mean_iou_against_a_loop() -> None:
    r = np.random.default_rng(0)
    guess, target = (torch.from_numpy(r.integers(0, 4, (5, 3, 3))) for _ in range(2))
    ious = []
    for c in range(4):
        a, b = guess == c, target == c
        if b.any():
            ious.append(float((a & b).sum()) / float((a | b).sum()))
    assert bed.mean_iou(guess, target, 6) == pytest.approx(np.mean(ious))


def test_delta_m_is_the_mean_relative_gain_with_errors_turned_round() -> None:
    single = {"seg": 0.5, "depth": 0.2, "edge": 0.5, "near": 0.8, "far": 0.4}
    found = {"seg": 0.6, "depth": 0.1, "edge": 0.5, "near": 0.4, "far": 0.4}
    assert bed.delta_m(found, single) == pytest.approx(100 * (0.2 + 0.5 + 0 - 0.5 + 0) / 5)
    assert bed.delta_m(single, single) == 0


def test_the_same_seed_gives_the_same_result_and_every_arm_spends_the_same() -> None:
    arms = system.arms("smoke")
    first = arms["multi-gate"].run(1, Budget(steps=2))
    again = arms["multi-gate"].run(1, Budget(steps=2))
    assert first.metrics == again.metrics
    assert first.notes["order_gap"] < 1e-5
    store = first.notes["store"]
    assert store["peak"] <= 2 < store["experts"]
    assert all(t["gap"] < 1e-5 and t["loads"] <= store["experts"] for t in store["tasks"].values())
    dense = arms["dense"].run(1, Budget(steps=2))
    assert (dense.spent.steps, dense.spent.rows) == (first.spent.steps, first.spent.rows)
    single = arms["single"].run(1, Budget(steps=2))
    assert single.metrics["delta_m"] == 0


def test_each_task_has_a_pass_of_its_own_unless_the_trunk_is_blind() -> None:
    part = bed.parts(module.SMOKE, 0)["train"].take(torch.arange(4))
    for name, wanted in (("multi-gate", 5), ("blind", 1), ("dense", 1)):
        model = bed.build(module.SMOKE, 0, module.EXPERTS[name])
        found = bed.fit(model, part, 2, 4, 1e-3, 0)
        assert found.passes == 2 * wanted
        assert set(found.cosine) == {"sparse blocks", "elsewhere"}
        assert all(-1 <= c <= 1 for values in found.cosine.values() for c in values)


@pytest.mark.slow
def test_the_command_trains_on_scenes_with_and_without_experts(tmp_path: Path) -> None:
    given = [
        "--out", str(tmp_path), "--scenes=80", "--set",
        "experts={count: 4, k: 2, mult: 2.0}",
    ]  # fmt: skip
    template = Path(module.__file__).with_name("24_m3vit.yaml")
    text = template.read_text().replace("steps: 300", "steps: 4")
    own = tmp_path / "own"
    own.mkdir()
    assert "steps: 4" in text
    from polytask.systems.m3vit_run import M3ViTRunConfig, made_up

    made_up(M3ViTRunConfig(out=own, scenes=80), print)
    (own / "m3vit.yaml").write_text(text)
    assert main(["run", "m3vit", "--data", str(own / "m3vit.yaml"), *given]) == 0
    folder = tmp_path / "m3vit-experts"
    record = json.loads((folder / "experts.json").read_text())
    assert record["usage"]["tasks"] == ["seg", "depth", "near", "far"]
    for layer in record["usage"]["layers"]:
        assert np.allclose(np.sum(layer["share"], 1), 1, atol=1e-4)
    assert all(0 < r["bytes"] < r["all_bytes"] for r in record["requests"].values())
    assert (folder / "expert-use.png").is_file() and (folder / "experts.html").is_file()
    dense = json.loads((tmp_path / "m3vit-dense" / "config.json").read_text())["config"]["model"]
    assert dense["experts"] is None and dense["ffn_mult"] == 4.0
