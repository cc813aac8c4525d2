"""System 54: what its arms differ in, on a testbed of a few texts."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from polytask import systems
from polytask.errors import MergeError
from polytask.merge.graft import Graft
from polytask.study import Budget
from polytask.systems.testbeds import names_grafts
from polytask.systems.testbeds.names_grafts import Bed

system = systems.load("skill-grafting")
module: Any = importlib.import_module("polytask.systems.54_skill_grafting")


@pytest.fixture(scope="module")
def bed() -> Bed:
    return names_grafts.bed(module.SMOKE, 0)


def state(name: str, bed: Bed, task: str) -> tuple[dict[str, torch.Tensor], int]:
    made: tuple[dict[str, torch.Tensor], int] = module.Trial(name, "smoke").state(bed, task)
    return made


def flat(values: Any) -> torch.Tensor:
    return torch.cat([values[name].reshape(-1) for name in sorted(values)])


def test_claims_are_the_sheets_pass_line() -> None:
    claims = [(c.better, c.than, c.metric, c.kind) for c in system.claims]
    assert claims == [
        ("graft", "95% of the gain", "accuracy", "claim"),
        ("graft", "fine-tuned", "ece", "claim"),
        ("graft", "movement", "accuracy", "claim"),
        ("20% of the gain", "random mask", "accuracy", "claim"),
        ("multitask", "overlap 0.3", "overlap", "claim"),
        ("multitask", "overlap 0.3", "purge_drop", "claim"),
        ("graft", "sign dropped", "accuracy", "ablation"),
        ("graft", "random delta", "accuracy", "ablation"),
    ]


def test_masks_of_one_size_differ_only_in_place(bed: Bed) -> None:
    task = bed.tasks[0]
    base, tuned = flat(bed.base), flat(bed.finetuned(task))
    size = int(0.01 * int((base != tuned).sum()) + 0.01 * int((base == tuned).sum()))
    for name in ("graft", "movement", "random mask"):
        made, count = state(name, bed, task)
        values = flat(made)
        moved = values != base
        assert count <= size + 1
        assert int(moved.sum()) <= count
        # base + (tuned - base) rounds, so that the copied values are the tuned ones but for a bit
        assert torch.allclose(values[moved], tuned[moved], atol=1e-6)


def test_a_random_delta_has_the_mask_and_norm_but_not_the_direction(bed: Bed) -> None:
    task = bed.tasks[0]
    graft, found = bed.learned(task, 0.01)
    made = names_grafts.random_delta(graft, found.mask, seed=1)
    assert not made[~found.mask].any()
    kept = graft.delta * found.mask
    assert float(made.norm()) == pytest.approx(float(kept.norm()), rel=1e-4)
    assert abs(float(torch.cosine_similarity(made, kept, dim=0))) < 0.2


def test_not_rounding_leaks_a_little_of_everything(bed: Bed) -> None:
    task = bed.tasks[0]
    leaked, rounded = (flat(state(n, bed, task)[0]) for n in ("not rounded", "graft"))
    delta = flat(bed.finetuned(task)) - flat(bed.base)
    share = float(torch.sigmoid(torch.tensor(-10.0)))
    assert float((leaked - rounded).abs().max()) <= 1.01 * share * float(delta.abs().max()) + 1e-6


def test_the_ablation_drops_the_sign_and_nothing_else() -> None:
    base = {"a": torch.zeros(4)}
    graft = Graft.between(base, {"a": torch.tensor([4.0, 3.0, 2.0, 1.0])}, count=2)
    plain = {f: getattr(graft, f) for f in graft.__dataclass_fields__}
    unsigned = names_grafts.Unsigned(**plain)
    assert graft.sign().tolist() == [-1, -1, 1, 1]
    assert unsigned.sign().tolist() == [1, 1, 1, 1]
    scores = torch.tensor([3.0, 12.0, 3.0, 12.0])
    assert torch.equal(graft.soft(scores), unsigned.soft(scores))
    assert torch.equal(graft.hard(scores), unsigned.hard(scores))


def test_the_lines_are_shares_of_the_gain(bed: Bed) -> None:
    def mean(states: dict[str, Any]) -> float:
        return sum(bed.judge(states[t], t)[1] for t in bed.tasks) / len(bed.tasks)

    before = mean(dict.fromkeys(bed.tasks, bed.base))
    after = mean({t: bed.finetuned(t) for t in bed.tasks})
    arm = system.arms("smoke")["20% of the gain"]
    found = arm.run(0, Budget(steps=3)).metrics["accuracy"]
    assert found == pytest.approx(before + 0.2 * (after - before))


def test_purging_and_overlap_come_from_one_model(bed: Bed) -> None:
    result = system.arms("smoke")["multitask"].run(0, Budget(steps=3))
    shares = torch.tensor(result.notes["overlap"])
    assert torch.equal(shares.diagonal(), torch.ones(len(bed.tasks), dtype=shares.dtype))
    assert result.metrics["overlap"] == pytest.approx(float(shares.sum() - len(bed.tasks)) / 2)
    drop = torch.tensor(result.notes["whole"]) - torch.tensor(result.notes["purged"])
    expected = float(drop.diagonal().mean() - (drop.sum() - drop.diagonal().sum()) / 2)
    assert result.metrics["purge_drop"] == pytest.approx(expected, abs=1e-6)


def test_heads_and_lower_layers_are_frozen(bed: Bed) -> None:
    task = bed.tasks[0]
    names = set(bed.graft(task, 0.01).layout.shapes)
    assert names <= set(bed.base)
    assert all(name.startswith(("layer.4.", "layer.5.")) for name in names)


def test_a_configuration_of_ones_own_is_that_of_localize(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("base: a\nfinetuned: b\ndata: c\nsparsity: 2\n")
    with pytest.raises(Exception, match="sparsity"):
        system.run(module.GraftRunConfig(data=tmp_path / "my.yaml"), lambda text: None)
    with pytest.raises(MergeError, match="smallest usable"):
        bed = names_grafts.bed(module.SMOKE, 0)
        bed.graft(bed.tasks[0], 1e-9)
