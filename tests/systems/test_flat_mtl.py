"""System 16: its arms differ in what they claim to differ in, its budgets are measured, it runs."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score

from polytask import systems
from polytask.study import Budget, Claim
from polytask.systems.testbeds import pairs as bed
from polytask.train.flat import FlatMTL

system = systems.load("flat-mtl")
SMALL = bed.Setting(64, "digits", scale=3, valid=32, test=50, batch=32)


@pytest.fixture(scope="module")
def parts() -> dict[str, bed.Part]:
    return bed.pair_parts(SMALL, seed=3)


def run(name: str, seed: int = 3, steps: int = 4):
    return system.arms("smoke")[name].run(seed, Budget(steps=steps))


def test_claims_are_the_sheets_pass_line() -> None:
    found = {(c.better, c.than, c.metric, c.higher_is_better) for c in system.claims}
    expected = set()
    for rule in ("pcgrad", "cagrad"):
        split, plain, longer = f"{rule}-split", f"{rule}-plain", f"{rule}-plain-3n"
        expected |= {
            (split, plain, "accuracy", True),
            (split, longer, "accuracy", True),
            (split, plain, "sharpness_left@0.1", False),
            (split, plain, "sharpness_right@0.1", False),
        }
    assert found == expected
    assert all(c.kind == "claim" and c.confidence == 0.95 for c in system.claims)


def test_every_arm_is_there_in_both_sizes_and_full_arms_use_real_garments() -> None:
    smoke = system.arms("smoke")
    assert len(smoke) == 14
    assert {arm.params["data"] for arm in smoke.values()} == {"digits"}
    assert "64 pairs of digits" in {arm.note for arm in smoke.values()}


def test_batches_pass_over_all_rows_before_any_comes_again() -> None:
    drawn = torch.cat([bed.batch_indices(50, 16, step, seed=1) for step in range(25)])
    for epoch in range(8):
        assert sorted(drawn[50 * epoch : 50 * (epoch + 1)].tolist()) == list(range(50))
    assert not torch.equal(drawn[:50], drawn[50:100])
    assert torch.equal(bed.batch_indices(50, 16, 3, 1), bed.batch_indices(50, 16, 3, 1))


def test_parts_are_paired_over_arms_and_fresh_over_seeds(parts: dict[str, bed.Part]) -> None:
    again, other = bed.pair_parts(SMALL, 3), bed.pair_parts(SMALL, 4)
    assert all(torch.equal(again[k].pixels, parts[k].pixels) for k in parts)
    assert not torch.equal(other["test"].pixels, parts["test"].pixels)
    assert torch.equal(parts["test"].label, parts["test"].truth)
    assert torch.equal(parts["train"].label[:, 0], parts["train"].truth[:, 0])
    noisy = (parts["train"].label[:, 1] != parts["train"].truth[:, 1]).float().mean()
    assert 0.1 < float(noisy) <= 0.3


def test_networks_of_one_seed_start_alike_and_ignore_the_global_generator() -> None:
    torch.manual_seed(1)
    first = bed.PairNet(10, seed=5)
    state = torch.get_rng_state()
    second = bed.PairNet(10, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    assert not torch.equal(next(bed.PairNet(10, 6).parameters()), next(first.parameters()))
    assert sum(p.numel() for p in first.trunk.parameters()) == 820 + 5020 + 25050


def test_calibration_error_equals_a_loop_over_bins() -> None:
    random = np.random.default_rng(0)
    probability = torch.from_numpy(random.dirichlet(np.ones(4) * 0.4, size=400))
    truth = torch.from_numpy(random.integers(0, 4, 400))
    confidence, guess = probability.numpy().max(1), probability.numpy().argmax(1)
    expected = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            right = (guess[inside] == truth.numpy()[inside]).mean()
            expected += inside.mean() * abs(right - confidence[inside].mean())
    assert bed.calibration_error(probability, truth) == pytest.approx(expected, abs=1e-9)
    sure = torch.eye(4)[truth]
    assert bed.calibration_error(sure, truth) == 0.0


def test_accuracies_are_those_of_the_true_labels(parts: dict[str, bed.Part]) -> None:
    net = bed.PairNet(10, 0)
    with torch.no_grad():
        guesses = [out.argmax(1) for out in net(parts["train"].pixels)]
    expected = [accuracy_score(parts["train"].truth[:, t], guesses[t]) for t in range(2)]
    assert bed.accuracies(net, parts["train"]) == pytest.approx(expected)


def test_plain_arms_are_the_combiner_without_a_second_pass() -> None:
    plain = run("pcgrad-plain")
    assert (plain.notes["forward_passes"], plain.notes["backward_passes"]) == (4, 8)
    assert plain.spent.steps == 4
    assert plain.spent.rows == 4 * 32


def test_flat_arms_cost_one_forward_and_one_backward_more_a_task() -> None:
    split, summed = run("pcgrad-split"), run("pcgrad-summed")
    assert (split.notes["forward_passes"], split.notes["backward_passes"]) == (12, 16)
    assert (summed.notes["forward_passes"], summed.notes["backward_passes"]) == (8, 12)
    assert split.spent.steps == 4


def test_three_times_the_steps_cost_more_than_the_flat_arm() -> None:
    split, longer = run("cagrad-split"), run("cagrad-plain-3n")
    assert longer.spent.steps == 12
    assert longer.spent.flops > split.spent.flops > 0
    assert 1 <= longer.notes["kept_step"] <= 12


def test_three_n_keeps_the_best_validation_weights(parts: dict[str, bed.Part]) -> None:
    net = bed.PairNet(10, 3)
    best = bed.BestWeights(net, parts["valid"], every=2)
    seen = {}

    def watch(step: int) -> None:
        best(step)
        seen[step] = bed.mean_accuracy(net, parts["valid"])

    bed.fit(net, FlatMTL("mean", 0.0), parts["train"], 8, 32, seed=3, after=watch)
    kept = best.settle()
    judged = {step: value for step, value in seen.items() if step % 2 == 0}
    assert judged[kept] == max(judged.values()) == bed.mean_accuracy(net, parts["valid"])


def test_a_trial_is_a_function_of_its_seed() -> None:
    first, again, other = run("pcgrad-split"), run("pcgrad-split"), run("pcgrad-split", seed=4)
    assert first.metrics == again.metrics
    assert first.metrics != other.metrics


def test_split_direct_and_summed_train_different_networks() -> None:
    names = ("plain", "split", "direct", "summed")
    losses = {run(f"pcgrad-{name}").metrics["train_loss_left"] for name in names}
    assert len(losses) == len(names)


def test_metrics_hold_what_the_sheet_asks_for() -> None:
    metrics = run("cagrad-split").metrics
    for name in ("accuracy", "ece", "valid_accuracy", "sharpness_left@0.1", "sharpness_right@0.1"):
        assert math.isfinite(metrics[name] or 0.0) and name in metrics
    assert metrics["accuracy"] == pytest.approx(
        (metrics["accuracy_left"] + metrics["accuracy_right"]) / 2
    )


def test_baselines_and_method_were_tuned_alike_on_other_seeds() -> None:
    tuning = system.tuning
    assert set(tuning.trials.values()) == {8}
    assert tuning.metric == "valid_accuracy"
    assert set(tuning.seeds).isdisjoint(range(100))
    for name, arm in system.arms("full").items():
        for key, value in tuning.chosen[name].items():
            assert arm.params[key] == value
    assert Path(system.tuning_file).is_file()


def test_a_claim_against_more_compute_says_so() -> None:
    longer = [c for c in system.claims if c.than.endswith("3n")]
    assert len(longer) == 2
    assert all(c.than_may_spend_more and c.equal == {"flops": 0.02} for c in longer)
    assert all(isinstance(c, Claim) for c in longer)
