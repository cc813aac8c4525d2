"""Bucketed passes: the same result with less padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from polytask.models import MaskSpec, Transformer, TransformerConfig
from polytask.models.buckets import plan_buckets, run_bucketed, select_rows
from polytask.models.init import initialise


def test_every_sequence_is_in_one_bucket_and_splits_pay() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        length = rng.integers(1, 80, int(rng.integers(1, 100)))
        plan = plan_buckets(length, 64, 0.05)
        assert sorted(np.concatenate(plan).tolist()) == list(range(len(length)))
        padded = sum(len(part) * int(length[part].max()) for part in plan)
        whole = len(length) * int(length.max())
        assert padded <= whole - 64 * (len(plan) - 1)


def test_two_lengths_make_two_buckets() -> None:
    length = np.array([60, 10, 60, 10, 10])
    assert [part.tolist() for part in plan_buckets(length, 100, 0.1)] == [[1, 3, 4], [0, 2]]
    assert len(plan_buckets(length, 151, 0.1)) == 1
    assert len(plan_buckets(length, 100, 0.6)) == 1


@pytest.mark.parametrize("kind", ["bidirectional", "causal", "prefix"])
def test_buckets_change_neither_outputs_nor_gradients(kind: str) -> None:
    model = Transformer(TransformerConfig(dim=16, layers=2, heads=2))
    initialise(model, 0)
    length = np.array([40, 3, 40, 5, 4, 3, 39, 4] * 2)
    x = torch.randn(16, 40, 16, generator=torch.Generator().manual_seed(0))
    valid = torch.arange(40) < torch.from_numpy(length)[:, None]
    prefix = torch.from_numpy(length // 2) if kind == "prefix" else None
    mask = MaskSpec(kind != "bidirectional", torch.from_numpy(length), prefix)
    calls: list[tuple[int, int]] = []
    model.register_forward_pre_hook(lambda _, args: calls.append(tuple(args[0].shape[:2])))
    results = []
    for run in (lambda t: model(t, mask), lambda t: run_bucketed(model, t, mask, length)):
        leaf = x.clone().requires_grad_()
        out = run(leaf)
        out[valid].square().sum().backward()
        results.append((out[valid].detach(), leaf.grad))
    assert calls == [(16, 40), (10, 5), (6, 40)]
    for plain, bucketed in zip(*results, strict=True):
        torch.testing.assert_close(plain, bucketed, rtol=1e-4, atol=1e-5)


def test_packed_rows_are_not_split() -> None:
    mask = MaskSpec(segments=torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="packed sequences"):
        select_rows(mask, torch.tensor([0]), True)
