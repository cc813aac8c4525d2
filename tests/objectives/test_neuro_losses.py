"""The Neuroformer's losses against plain formulas and finite differences."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from polytask.errors import DataError, UserError
from polytask.objectives.neuro import NeuroLoss, alignment, next_token, token_scores

sys.path.insert(0, str(Path(__file__).parents[1] / "models" / "neuro"))
import neuro_examples as make


def test_terms_are_the_formula_of_the_paper() -> None:
    model, batch = make.moved(make.rich()), make.batch(full=True)
    terms, out = NeuroLoss()(model, batch), model(batch)
    ids, times = batch.ids[:, 1:], batch.times[:, 1:]
    ce_id = F.cross_entropy(out.ids.flatten(0, 1), ids.flatten(), ignore_index=make.UNITS + 2)
    ce_time = F.cross_entropy(out.times.flatten(0, 1), times.flatten(), ignore_index=make.TIMES + 2)
    n = 4
    found = {name: float(value.mean()) for name, value in terms.value.items()}
    assert set(found) == {"id", "time", "align", "speed", "state"}
    assert found["id"] == pytest.approx(float((1 - 1 / n) * 3 / 5 * ce_id), rel=1e-5)
    assert found["time"] == pytest.approx(float((1 - 1 / n) * 2 / 5 * ce_time), rel=1e-5)
    speed = F.mse_loss(model.answer(out, "speed")[:, 0], batch.targets["speed"])
    assert found["speed"] == pytest.approx(float(speed), rel=1e-5)
    state = F.cross_entropy(model.answer(out, "state"), batch.targets["state"])
    assert found["state"] == pytest.approx(float(state), rel=1e-5)
    scores = token_scores(
        model, [batch.take(torch.tensor([0, 1])), batch.take(torch.tensor([2, 3]))]
    )
    assert scores["id"] == pytest.approx(float(ce_id), rel=1e-5)
    assert scores["speed"] == pytest.approx(float(speed), rel=1e-5)
    wanted = 0.6 * ce_id + 0.4 * ce_time + speed + state
    assert scores["loss"] == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize("symmetric", [False, True])
def test_alignment_is_infonce_over_all_pairs(symmetric: bool) -> None:
    g = torch.Generator().manual_seed(0)
    vectors = {n: F.normalize(torch.randn(6, 8, generator=g), dim=-1) for n in "abc"}
    wanted = []
    for i, j in combinations("abc", 2):
        s = vectors[i] @ vectors[j].T / 0.5
        loss = -s.diagonal() + torch.logsumexp(s, 1)
        if symmetric:
            loss = (loss - s.diagonal() + torch.logsumexp(s, 0)) / 2
        wanted.append(loss)
    found = alignment(vectors, 0.5, symmetric)
    assert torch.allclose(found, torch.stack(wanted).mean(0), atol=1e-6)


def test_alignment_needs_two_windows_and_two_modalities() -> None:
    one = {"spikes": torch.ones(1, 2), "video": torch.ones(1, 2)}
    with pytest.raises(UserError, match="at least 2 windows"):
        alignment(one, 0.5, False)
    with pytest.raises(UserError, match="two modalities, the batch has spikes"):
        alignment({"spikes": torch.ones(3, 2)}, 0.5, False)


def test_pre_fusion_alignment_sees_nothing_of_the_video() -> None:
    batch = make.batch(full=True)
    other = replace(batch, frames=batch.frames + 1)
    for pool, leaks in (("post_fusion", True), ("pre_fusion", False)):
        model = make.moved(make.rich(pool=pool))
        spikes = [model.vectors(model(b))["spikes"] for b in (batch, other)]
        assert torch.allclose(*spikes) is not leaks


def test_only_named_losses_give_gradients() -> None:
    model, batch = make.moved(make.rich()), make.batch(full=True)
    terms = NeuroLoss(("speed",))(model, batch)
    torch.stack([v.sum() for v in terms.value.values()]).sum().backward()
    assert model.heads["speed"].weight.grad is not None
    assert model.head_id.weight.grad is None and model.heads["state"].weight.grad is None
    everything = NeuroLoss()(model, batch)
    assert all(torch.equal(v, everything.value[n]) for n, v in terms.value.items())
    with pytest.raises(UserError, match=r"no term 'sped'. Did you mean 'speed'"):
        NeuroLoss(("sped",))(model, batch)


def test_gradients_against_finite_differences() -> None:
    model, batch = make.moved(make.rich()).double(), make.batch(full=True)

    def total() -> torch.Tensor:
        terms = NeuroLoss()(model, batch).value.values()
        return torch.stack([v.double().sum() for v in terms]).sum()

    total().backward()
    checked = 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        at = int(parameter.grad.abs().argmax())
        flat, h = parameter.data.view(-1), 1e-3
        before = float(flat[at])
        ends = []
        for x in (before + h, before - h):
            flat[at] = x
            ends.append(float(total().detach()))
        flat[at] = before
        slope = float(parameter.grad.view(-1)[at])
        assert (ends[0] - ends[1]) / (2 * h) == pytest.approx(slope, rel=0.05, abs=5e-3), name
        checked += 1
    assert checked > 100


def test_an_all_padding_target_and_a_foreign_class() -> None:
    logits = torch.randn(2, 3, 4)
    assert (next_token(logits, torch.full((2, 3), 3), 3) == 0).all()
    model, batch = make.moved(make.rich()), make.batch(full=True)
    wrong = replace(batch, targets={"state": torch.tensor([0, 1, 2, 3])})
    with pytest.raises(DataError, match=r"'state' has a class outside of 0 .. 2"):
        NeuroLoss()(model, wrong)
