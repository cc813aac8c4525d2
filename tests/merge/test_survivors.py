"""Who survives PCB-Merging: against shares computed over the flattened model."""

from __future__ import annotations

import pytest
import torch

from polytask.errors import MergeError
from polytask.merge.method import make_method
from polytask.merge.survivors import survivors
from polytask.merge.vectors import TaskVectors


def test_a_tenth_of_each_task_survives_and_overlap_counts_common_places() -> None:
    torch.manual_seed(0)
    base = {"a": torch.zeros(30, 20), "b": torch.zeros(400)}
    experts = [{k: torch.randn_like(v) for k, v in base.items()} for _ in range(3)]
    vectors = TaskVectors.from_state_dicts(base, experts)
    kept, overlap = survivors(make_method("pcb", {"ratio": 0.1}), vectors)
    total = (600 * kept["a"] + 400 * kept["b"]).round()
    # D - 1 - int(D (1 - r)) survive where nothing ties.
    assert total.tolist() == [1000 - 1 - int(1000 * 0.9)] * 3
    assert torch.allclose(overlap, overlap.T) and torch.equal(overlap.diagonal(), torch.ones(3))

    flat = vectors.flatten().double()
    lifted = []
    for row in flat:
        size = row.abs().sort().values
        clamped = row.abs().clamp(size[int(1000 * 0.01)], size[int(1000 * 0.99) - 1])
        lifted.append(row.sign() * (clamped - clamped.min()) / (clamped.max() - clamped.min()))
    t = torch.stack(lifted)
    score = torch.exp(3 * t.square()) * sum(torch.tanh(t * other) for other in t)
    alive = torch.stack([row > row.sort().values[int(1000 * 0.9)] for row in score])
    common = (alive[0] & alive[1]).sum() / (alive[0] | alive[1]).sum()
    assert float(overlap[0, 1]) == pytest.approx(float(common), abs=0.02)


def test_other_methods_have_no_survivors() -> None:
    vectors = TaskVectors.from_state_dicts({"a": torch.zeros(3)}, [{"a": torch.ones(3)}])
    with pytest.raises(MergeError, match="survivors"):
        survivors(make_method("ties", {}), vectors)
