"""The routing table: every mode against its formula, sampling per row, determinism, errors."""

from __future__ import annotations

import math

import pytest
import torch

from polytask.adapt import RowTasks, TaskTable
from polytask.errors import AdaptError

TASK = torch.tensor([0, 2, 2, 1])


def table(mode: str, **options: object) -> TaskTable:
    made = TaskTable(3, 2, 4, mode, **options)  # type: ignore[arg-type]
    if made.module_logits is not None:
        with torch.no_grad():
            made.module_logits.copy_(torch.randn(3, 8, generator=torch.Generator().manual_seed(5)))
    return made


def logits(made: TaskTable) -> torch.Tensor:
    assert made.module_logits is not None
    return made.module_logits.detach().view(3, 2, 4)[TASK]


def test_weights_are_sigmoids_over_their_sum_in_evaluation() -> None:
    for mode in ("relaxed", "sigmoid"):
        made = table(mode).eval()
        gate = 1 / (1 + torch.exp(-logits(made)))
        torch.testing.assert_close(made(TASK), gate / gate.sum(-1, keepdim=True))


def test_relaxed_gates_follow_the_relaxed_bernoulli_distribution() -> None:
    """P(gate < 1/2) = sigmoid(-z): the threshold of a concrete variable at temperature 1."""
    made = TaskTable(1, 1, 2, "relaxed")
    with torch.no_grad():
        made.module_logits.copy_(torch.tensor([[1.3, -0.4]]))  # type: ignore[union-attr]
    torch.manual_seed(0)
    gates = made._gate(made.module_logits.detach().expand(40_000, -1).view(-1, 1, 2))  # type: ignore[union-attr]
    share = (gates < 0.5).float().mean(0)[0]
    wanted = [1 / (1 + math.exp(1.3)), 1 / (1 + math.exp(-0.4))]
    torch.testing.assert_close(share, torch.tensor(wanted), atol=0.01, rtol=0)


def test_gates_are_sampled_per_row_in_training_and_fixed_in_evaluation() -> None:
    made = table("relaxed").train()
    same = torch.zeros(6, dtype=torch.int64)
    drawn = made(same)
    assert len(torch.unique(drawn[:, 0, 0])) == 6
    assert made.sampled
    made.eval()
    assert torch.equal(made(same), made(same)) and not made.sampled
    assert len(torch.unique(made(same)[:, 0, 0])) == 1


def test_straight_through_rounds_and_passes_the_gradient_of_the_sigmoid() -> None:
    made = table("straight_through")
    found = made(TASK)
    hard = (torch.sigmoid(logits(made)) > 0.5).float()
    torch.testing.assert_close(found, hard / (hard.sum(-1, keepdim=True) + 1e-12))
    z = torch.tensor([[[0.3, -1.0, 2.0, 0.1]]], requires_grad=True)
    made._gate(z).sum().backward()
    s = torch.sigmoid(z.detach())
    torch.testing.assert_close(z.grad, s * (1 - s))


def test_l2_normalises_the_raw_logits() -> None:
    made = table("l2")
    z = logits(made)
    torch.testing.assert_close(made(TASK), z / z.norm(dim=-1, keepdim=True))


def test_uniform_own_shared_module_and_average_correction() -> None:
    assert torch.equal(table("uniform")(TASK), torch.full((4, 2, 4), 0.25))
    own = TaskTable(3, 1, 3, "own")
    assert torch.equal(own(TASK)[:, 0].argmax(-1), TASK)
    assert torch.equal(own(TASK).sum(-1), torch.ones(4, 1))
    shared = table("sigmoid", shared_module=True).eval()
    gate = torch.sigmoid(logits(shared))
    gate[..., -1] = 1
    torch.testing.assert_close(shared(TASK), gate / gate.sum(-1, keepdim=True))
    corrected = table("sigmoid", average_correction=True).eval()
    wanted = torch.sigmoid(logits(corrected)) * math.sqrt(2) / math.sqrt(4)
    torch.testing.assert_close(corrected(TASK), wanted)


def test_dropped_gates_do_not_divide_by_zero() -> None:
    made = table("sigmoid", dropout=0.99).train()
    torch.manual_seed(0)
    found = made(torch.zeros(500, dtype=torch.int64))
    assert bool(found.isfinite().all()) and bool((found.sum(-1) == 0).any())


def test_logits_start_within_a_thousandth_and_depend_on_the_seed() -> None:
    first = TaskTable(5, 2, 3, seed=1).module_logits
    assert first is not None and float(first.abs().max()) <= 1e-3
    assert float(first.std()) > 1e-4
    assert not torch.equal(first, TaskTable(5, 2, 3, seed=2).module_logits)  # type: ignore[arg-type]
    assert torch.equal(first, TaskTable(5, 2, 3, seed=1).module_logits)  # type: ignore[arg-type]


def test_half_precision_tables_give_float_weights() -> None:
    made = table("sigmoid").half().eval()
    assert made(TASK).dtype == torch.float32


def test_more_tasks_than_modules_of_their_own_is_an_error() -> None:
    with pytest.raises(AdaptError, match="module for every task: 2 for 3"):
        TaskTable(3, 1, 2, "own")


def test_rows_name_what_is_wrong() -> None:
    tasks = RowTasks(("alpha", "beta"))
    with pytest.raises(AdaptError, match="does not know the rows' tasks"):
        tasks.rows(3)
    with pytest.raises(AdaptError, match=r"task id 2 is outside 0\.\.1"):
        tasks.tell(torch.tensor([0, 2]))
    with pytest.raises(AdaptError, match=r"no task 'bet'\. Did you mean 'beta'"):
        tasks.tell(["alpha", "bet"])
    with pytest.raises(AdaptError, match="whole numbers"):
        tasks.tell(torch.tensor([0.0, 1.0]))
    with pytest.raises(AdaptError, match="at least one task"):
        RowTasks(())
    tasks.tell([0, 1])
    with pytest.raises(AdaptError, match=r"got 4 rows and 2 task ids.*repeat=beams"):
        tasks.rows(4)


def test_rows_repeat_for_beam_search_and_expand_from_one() -> None:
    tasks = RowTasks(("alpha", "beta"))
    with tasks.of([0, 1], repeat=2):
        assert tasks.rows(2).task.tolist() == [0, 1]
        assert tasks.rows(4).task.tolist() == [0, 0, 1, 1]
    with tasks.of("beta"):
        assert tasks.rows(3).task.tolist() == [1, 1, 1]
    with pytest.raises(AdaptError):
        tasks.rows(3)  # forgotten after the block
    tasks.tell(torch.zeros(0, dtype=torch.int64))
    assert len(tasks.rows(0).task) == 0
