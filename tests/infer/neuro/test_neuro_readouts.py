"""Readouts against loops, and a planted connection that every readout finds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import neuro_examples as make
import neuro_recordings as rec
import numpy as np
import pytest
import torch

from polytask.errors import UserError
from polytask.infer.neuro.readouts import _spread, connectivity, rollout, stimulus_attribution
from polytask.models.neuro import Trace


def test_mean_attention_is_summed_by_target_and_source() -> None:
    model, batch = make.moved(make.rich()), make.batch(full=True)
    found, trace, n = connectivity(model, [batch, batch]), Trace(), make.UNITS
    model(batch, trace)
    total, count = np.zeros((n, n)), np.zeros((n, n))
    for b in range(len(batch)):
        for t, y in enumerate(batch.ids[b, 1:].tolist()):
            for k, p in enumerate(batch.past_ids[b].tolist()):
                if y < n and p < n:
                    looks = [w[b, :, t, k].mean().item() for w in trace.weights["past"]]
                    total[y, p] += 2 * np.mean(looks)
                    count[y, p] += 2
    assert np.allclose(found.total, total, atol=1e-5) and np.array_equal(found.count, count)
    seen = count > 0
    assert (
        np.allclose(found.mean[seen], total[seen] / count[seen]) and (found.mean[~seen] == 0).all()
    )


def test_ablation_is_what_a_units_past_spikes_were_worth() -> None:
    model, batch = make.moved(make.rich()), make.batch(full=True)
    found, n = connectivity(model, [batch], "ablation"), make.UNITS
    total, count = np.zeros((n, n)), np.zeros((n, n))

    def log_p(b: int, past: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        one = replace(batch.take(torch.tensor([b])), past_ids=past[None], past_times=times[None])
        with torch.no_grad():
            return model(one).ids[0].log_softmax(-1)

    for b in range(len(batch)):
        past, times = batch.past_ids[b], batch.past_times[b]
        whole = log_p(b, past, times)
        for p in range(n):
            if p not in past.tolist():
                continue
            left = log_p(b, past.masked_fill(past == p, n + 2), times)
            for t, y in enumerate(batch.ids[b, 1:].tolist()):
                if y < n:
                    total[y, p] += float(whole[t, y] - left[t, y])
                    count[y, p] += 1
    assert np.allclose(found.total, total, atol=1e-4) and np.array_equal(found.count, count)
    assert count.sum() > 20


def test_rollout_keeps_half_of_what_was_there_before() -> None:
    g = torch.Generator().manual_seed(0)
    layers = [torch.rand(2, 3, 4, 5, generator=g).softmax(-1) for _ in range(3)]
    shares = [w.amax(1) / w.amax(1).sum(-1, keepdim=True) for w in layers]
    wanted = shares[0] / 8 + shares[1] / 4 + shares[2] / 2
    found = rollout(layers)
    assert torch.allclose(found, wanted / wanted.sum(-1, keepdim=True), atol=1e-6)
    assert torch.allclose(found.sum(-1), torch.ones(2, 4))
    assert torch.allclose(rollout(layers[:1]), shares[0])


def test_the_published_codes_rollout() -> None:
    g = torch.Generator().manual_seed(0)
    square = [torch.rand(1, 2, 4, 4, generator=g).softmax(-1) for _ in range(3)]

    def mixed(w: torch.Tensor) -> torch.Tensor:
        a = (w.amax(1) + torch.eye(w.shape[-2], w.shape[-1])) / 2
        return a / a.sum(-1, keepdim=True)

    wanted = mixed(square[2]) @ mixed(square[1])  # layer 0 is skipped
    assert torch.allclose(rollout(square, 1, official=True), wanted, atol=1e-6)
    wide = [w[..., :3, :] for w in square]
    wanted = mixed(wide[2]) * mixed(wide[1]) * torch.eye(3, 4)
    assert torch.allclose(rollout(wide, 1, official=True), wanted, atol=1e-6)


@pytest.mark.slow
def test_a_planted_connection_is_found_in_its_direction_by_every_readout() -> None:
    neuro = rec.neuro().pretrain(steps=170, lr=1e-2, batch_size=32, validate=False)
    score = neuro.score("test")
    assert score["id"] < neuro.score("test", shuffled=True)["id"] - 0.05
    for kind in ("mean", "rollout", "ablation"):
        found = neuro.connectivity(kind).mean.copy()  # type: ignore[arg-type]
        np.fill_diagonal(found, -np.inf)
        assert np.unravel_index(found.argmax(), found.shape) == (1, 0), kind
        assert found[1, 0] > found[0, 1]


def test_attribution_is_gradient_times_attention_of_patches() -> None:
    model, batch = make.moved(make.rich()), make.batch((3, 2), full=True)
    found = stimulus_attribution(model, batch)
    assert found.shape == (2, 4, 6, 6) and (found >= 0).all() and found.sum() > 0
    trace = Trace()
    out = model(batch, trace)
    real = batch.ids[:, 1:] < make.UNITS
    total = (out.ids.gather(-1, batch.ids[:, 1:, None])[..., 0] * real).sum()
    score = 0
    for w in trace.weights["video"]:
        (slope,) = torch.autograd.grad(total, w, retain_graph=True)
        score = score + ((w * slope).clamp(min=0).mean(1) * real[..., None]).sum(1)[:, 1:]
    patches = score.detach().view(2, 2, 2, 2)
    for b in range(2):
        for t, h, w in np.ndindex(4, 6, 6):
            value = patches[b, t // 2, h // 3, w // 3] / 18
            assert float(found[b, t, h, w]) == pytest.approx(float(value), rel=1e-4, abs=1e-7)


def test_overlapping_patches_add_up_and_uncovered_pixels_get_nothing() -> None:
    patches = torch.tensor([1.0, 2.0]).view(1, 1, 1, 1, 2)
    found = _spread(patches, (1, 1, 4), (1, 1, 2), torch.Size((1, 1, 7)))
    assert torch.allclose(found, torch.tensor([0.25, 0.25, 0.75, 0.75, 0.5, 0.5, 0.0]))


def test_mistakes_are_named() -> None:
    model: Any = make.moved(make.small())
    with pytest.raises(UserError, match="'max' is none of mean"):
        connectivity(model, [], "max")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="past_layers = 0"):
        connectivity(make.moved(make.small(past_layers=0)), [make.batch()])
    with pytest.raises(UserError, match="video blocks"):
        stimulus_attribution(model, make.batch())
