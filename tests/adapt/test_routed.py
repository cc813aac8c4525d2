"""Routed low-rank updates: against loops over definitions, peft's Poly, finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from polytask.adapt import RoutedLoRA, RowTasks, TaskTable
from polytask.errors import AdaptError

T, S, R, D, K = 3, 5, 2, 12, 8


def layer(blocks: int = 1, mode: str = "sigmoid", **options: object) -> RoutedLoRA:
    modules = T if mode == "own" else S
    table = TaskTable(T, blocks, modules, mode, seed=4)  # type: ignore[arg-type]
    made = RoutedLoRA(D, K, table, RowTasks("abc"), R, 1.0, **options)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        made.lora_B.copy_(torch.randn(made.lora_B.shape, generator=generator))
        if table.module_logits is not None:
            table.module_logits.copy_(torch.randn(T, blocks * S, generator=generator))
    return made


def inputs(rows: int = 6, length: int | None = 3) -> Tensor:
    shape = (rows, D) if length is None else (rows, length, D)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def by_hand(made: RoutedLoRA, x: Tensor, task: int, w: Tensor) -> Tensor:
    """One row (L, d), from the definition: blocks of A tile the input, of B the output."""
    blocks = made.lora_A.shape[0]
    a = torch.cat(
        [sum(w[h, s] * made.lora_A[h, s] for s in range(made.modules_)) for h in range(blocks)]
    )  # type: ignore[misc]
    b = torch.cat(
        [sum(w[h, s] * made.lora_B[h, s] for s in range(made.modules_)) for h in range(blocks)],  # type: ignore[misc]
        dim=1,
    )
    return x @ a @ b / made.rank


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_a_mixed_batch_is_the_definition_row_by_row(blocks: int) -> None:
    made, x, task = layer(blocks), inputs(), torch.tensor([2, 0, 1, 1, 2, 0])
    with made.row_tasks.of(task):
        found = made(x)
    w = made.table(task)
    for i in range(6):
        torch.testing.assert_close(found[i], by_hand(made, x[i], int(task[i]), w[i]))


@pytest.mark.parametrize("mode", ["sigmoid", "straight_through", "l2", "uniform", "own"])
@pytest.mark.parametrize("length", [None, 1, 3])
def test_a_mixed_batch_equals_a_loop_over_tasks(mode: str, length: int | None) -> None:
    made, x, task = layer(1, mode), inputs(length=length), torch.tensor([2, 0, 1, 1, 2, 0])
    with made.row_tasks.of(task):
        together = made(x)
    for number in range(T):
        mine = task == number
        with made.row_tasks.of([number]):
            torch.testing.assert_close(together[mine], made(x[mine]))


@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("training", [False, True])
def test_equals_pefts_poly_on_shared_weights(blocks: int, training: bool) -> None:
    """H = 1 is Poly, H > 1 is MHR; in training both draw the same relaxed gates."""
    from peft import PolyConfig, get_peft_model

    base = nn.Sequential()
    base.add_module("fc", nn.Linear(D, K))
    config = PolyConfig(r=R, n_tasks=T, n_skills=S, n_splits=blocks, target_modules=["fc"])
    theirs = get_peft_model(base, config)
    poly = theirs.base_model.model.fc
    made = layer(blocks, "relaxed").train(training)
    made.table.train(training)
    theirs.train(training)
    with torch.no_grad():
        poly.poly_lora_A["default"].copy_(made.lora_A)
        poly.poly_lora_B["default"].copy_(made.lora_B)
        poly.poly_router["default"].module_logits.copy_(made.table.module_logits)
    x, task = inputs(), torch.tensor([2, 0, 1, 1, 2, 0])
    from torch.distributions.relaxed_bernoulli import RelaxedBernoulli

    if training:  # peft's sampler draws its uniform numbers its own way: give both the same gates
        gates = RelaxedBernoulli(
            1.0, logits=made.table.module_logits[task].view(6, blocks, S)
        ).rsample()  # type: ignore[index]
        made.table._gate = lambda z: gates  # type: ignore[method-assign]
        theirs_weights = gates / (gates.sum(-1, keepdim=True) + 1e-12)
        poly.poly_router["default"].forward = lambda **_: theirs_weights
    base_layer = poly.get_base_layer()
    with made.row_tasks.of(task):
        ours = base_layer(x) + made(x)
    torch.testing.assert_close(ours, theirs.base_model(x, task_ids=task), atol=1e-6, rtol=1e-6)


def test_one_head_of_mhr_is_poly() -> None:
    mhr, poly = layer(1), layer(1)
    task = torch.tensor([0, 1, 2, 0, 1, 2])
    with mhr.row_tasks.of(task), poly.row_tasks.of(task):
        assert torch.equal(mhr(inputs()), poly(inputs()))


def test_parameters_are_mixed_not_outputs() -> None:
    made, after = layer(1), layer(1, combine="outputs")
    x, task = inputs(), torch.tensor([2, 0, 1, 1, 2, 0])
    with made.row_tasks.of(task), after.row_tasks.of(task):
        first, second = made(x), after(x)
    w = made.table(task)[:, 0]
    outputs = torch.einsum("bs,bld,sdr,srk->blk", w, x, after.lora_A[0], after.lora_B[0]) / R
    torch.testing.assert_close(second, outputs)
    assert float((first - second).detach().abs().max()) > 0.01


def test_gradients_agree_with_finite_differences() -> None:
    made = layer(2).double()
    made.table.double()
    x = inputs(4, 2).double().requires_grad_()
    task = torch.tensor([2, 0, 0, 1])
    made.row_tasks.tell(task)
    assert made.table.module_logits is not None
    names = (made.lora_A, made.lora_B, made.table.module_logits)

    def run(x: Tensor, *values: Tensor) -> Tensor:
        old = [p.data for p in names]
        from torch.func import functional_call

        holder = nn.Module()
        holder.layer, holder.table = made, made.table
        given = dict(zip(("layer.lora_A", "layer.lora_B", "table.module_logits"), values))
        assert old
        holder.forward = lambda x: made(x)  # type: ignore[assignment]
        return functional_call(holder, given, (x,))  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(run, (x, *names), atol=1e-7)


@pytest.mark.parametrize("mode", ["sigmoid", "own"])
def test_rows_of_a_mixed_batch_train_only_their_tasks(mode: str) -> None:
    made = layer(1, mode)
    with made.row_tasks.of([0, 0, 2, 2, 2, 0]):
        made(inputs()).square().sum().backward()
    if mode == "own":
        assert not made.lora_B.grad[0, 1].any() and made.lora_B.grad[0, 2].any()  # type: ignore[index]
    else:
        grad = made.table.module_logits.grad  # type: ignore[union-attr]
        assert grad is not None and not grad[1].any() and grad[0].any()


def test_delta_is_what_a_row_of_the_task_gets() -> None:
    for made in (layer(4), layer(1, combine="outputs"), layer(1, "relaxed").train()):
        made.table.eval()
        x = inputs(1, 4)
        with made.row_tasks.of([1]):
            torch.testing.assert_close(x @ made.delta(1).T, made(x))


def test_averaging_modules_keeps_the_uniform_mixture() -> None:
    made = layer(4)
    made.table.make_uniform()
    x = inputs()
    with made.row_tasks.of([0, 1, 2, 0, 1, 2]):
        before = made(x)
        made.average_modules()
        made.table.modules_ = 1
        assert made.modules_ == 1
        torch.testing.assert_close(made(x), before)


@pytest.mark.parametrize("init", ["mttl", "peft"])
def test_initial_modules_are_uniform_within_the_published_bound(init: str) -> None:
    table = TaskTable(2, 8, 32)
    made = RoutedLoRA(256, 64, table, RowTasks("ab"), 4, init=init)  # type: ignore[arg-type]
    bound = math.sqrt(1 / (3 * 256)) if init == "mttl" else math.sqrt(8 / 256)
    assert 0.99 * bound < float(made.lora_A.detach().abs().max()) <= bound
    assert abs(float(made.lora_A.detach().std()) - bound / math.sqrt(3)) < 0.02 * bound
    assert not made.lora_B.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input_gives_half_precision_update(dtype: torch.dtype) -> None:
    made = layer(2)
    with made.row_tasks.of([0, 1, 2, 0, 1, 2]):
        found, exact = made(inputs().to(dtype)), made(inputs())
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), exact, atol=0.1, rtol=0.05)


def test_no_rows_and_nan_rows() -> None:
    made = layer(2)
    with made.row_tasks.of(torch.zeros(0, dtype=torch.int64)):
        assert made(inputs(0)).shape == (0, 3, K)
    x = inputs()
    x[1] = float("nan")
    with made.row_tasks.of([0, 1, 2, 0, 1, 2]):
        found = made(x)
    assert bool(found[1].isnan().all()) and bool(found[[0, 2, 3, 4, 5]].isfinite().all())


def test_heads_that_do_not_divide_name_both_sizes() -> None:
    with pytest.raises(AdaptError, match=r"5 heads must divide its 12 inputs and its 8 outputs"):
        RoutedLoRA(D, K, TaskTable(2, 5, 2), RowTasks("ab"), name="fc")
