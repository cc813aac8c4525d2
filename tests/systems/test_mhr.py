"""System 19: claims of the sheet, equal budgets, the testbed's structure, ablations as named."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from polytask import systems
from polytask.adapt import AdaptConfig, attach
from polytask.study import Budget
from polytask.systems.testbeds import skills as bed

system = systems.load("mhr")
module = import_module("polytask.systems.19_mhr")


def test_claims_are_the_sheets_pass_lines() -> None:
    found = {(c.better, c.than, c.metric, c.kind) for c in system.claims}
    assert found == {
        ("mhr", "lora", "accuracy", "claim"),
        ("mhr", "lora", "alignment", "claim"),
        ("mhr-z", "base", "accuracy", "claim"),
        ("mhr-z", "mhr", "accuracy+0.03 for z", "claim"),
        ("mhr-mu", "mhr", "accuracy+0.02 for mu", "claim"),
        ("mhr", "mhr-mu", "accuracy+0.02 for the whole", "claim"),
        ("mhr", "mhr-one-rate", "accuracy", "ablation"),
        ("mhr", "mhr-shuffled-tasks", "accuracy", "ablation"),
    }


def test_shared_lora_poly_and_mhr_have_equally_many_module_parameters() -> None:
    """And rows of z are less than 2 % of what MHR tunes."""
    counts = {}
    for name in ("lora", "poly", "mhr", "mhr-16"):
        net = torch.nn.Sequential(
            torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 128)
        )
        adapters = attach(net, AdaptConfig(**module.METHODS[name].options), ("new",))
        parts = adapters.share().parts
        counts[name] = parts["layers"]
        if name == "mhr":
            assert parts["tables"] / adapters.share().trained < 0.02
    assert len(set(counts.values())) == 1


def test_skills_are_orthogonal_and_act_on_their_block_only() -> None:
    place = bed.world(bed.SMOKE, 3)
    for view in place.views:
        torch.testing.assert_close(view @ view.T, torch.eye(64), atol=1e-5, rtol=0)
        off = view.clone()
        for b in range(4):
            off[16 * b : 16 * b + 16, 16 * b : 16 * b + 16] = 0
        assert not off.any()
    assert not set(place.names) & {f"task {i}" for i in place.new_ids}
    images = [place.image[p] for p in ("train", "few", "test")]
    assert [len(x) for x in images] == [1000, 300, 497]


def test_answers_sum_the_probabilities_of_digits() -> None:
    logits = torch.randn(7, 10, generator=torch.Generator().manual_seed(0))
    p = logits.softmax(-1).numpy()
    digit = torch.arange(7)
    for modulus in (2, 5):
        sums = np.stack([p[:, np.arange(10) % modulus == r].sum(1) for r in range(modulus)], 1)
        assert (bed.answers(logits, modulus).numpy() == sums.argmax(1)).all()
        loss = bed.answer_loss(logits, digit, torch.full((7,), modulus))
        wanted = -np.log(sums[np.arange(7), digit.numpy() % modulus])
        np.testing.assert_allclose(loss.numpy(), wanted, rtol=1e-5)


@pytest.mark.slow
def test_arms_run_with_equal_budgets_and_z_changes_rows_only() -> None:
    results = {
        name: module.Trial(name, 1e-2, 3e-3, True)(0, Budget(steps=1)) for name in module.METHODS
    }
    spent = {(r.spent.steps, r.spent.rows) for r in results.values()}
    assert len(spent) == 1
    z, whole = results["mhr-z"].metrics, results["mhr"].metrics
    assert z["accuracy+0.03 for z"] == pytest.approx(z["accuracy"] + 0.03)
    assert whole["accuracy+0.03 for z"] == whole["accuracy"]
    assert results["mhr"].metrics["alignment"] == z["alignment"]


def test_the_tuning_on_record_is_that_of_every_tuned_arm() -> None:
    assert set(system.tuning.chosen) == {"lora", "poly", "mhr", "mhr-16"}
    assert not set(system.tuning.seeds) & set(range(20, 25))
    arms = system.arms("full")
    for name in ("mhr-z", "mhr-mu", "mhr-shuffled-tasks"):
        assert arms[name].run.lr == arms["mhr"].run.lr  # type: ignore[attr-defined]


def test_polytask_run_mhr_uses_the_configuration_with_an_inventory(tmp_path: Path) -> None:
    import yaml

    default = yaml.safe_load((Path(module.__file__).parent / "19_mhr.yaml").read_text())
    assert len(default["tasks"]) == 3 and "adapt" not in default
    config = system.config(data=tmp_path / "none.yaml", out=tmp_path)
    from polytask.errors import ConfigError

    with pytest.raises(ConfigError, match="no configuration file"):
        system.run(config, lambda text: None)
