"""Experts: routing, execution orders, balance losses, against slow references and closed forms."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor

from polytask.configs import parse
from polytask.errors import ConfigError
from polytask.models.experts import (
    BalanceWeights,
    Experts,
    ExpertsConfig,
    ExpertUsage,
    RouterOutput,
    RoutingRecord,
    SparseMoE,
    TaskEmbedding,
    TaskRouter,
    balance_loss,
    select_experts,
)
from polytask.models.experts import balance as losses
from polytask.models.experts.routers import task_ranges


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logits(tokens: int = 12, experts: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(tokens, experts, generator=seeded(seed), dtype=torch.float64)


def bank(count: int = 6, dim: int = 8, hidden: int = 10, **options: Any) -> Experts:
    torch.manual_seed(3)
    return Experts(count, dim, hidden, **options)


class TestSelection:
    def test_weights_are_the_largest_of_a_softmax_over_all_experts(self) -> None:
        clean = logits()
        routed = select_experts(clean, 2)
        p = np.exp(clean.numpy()) / np.exp(clean.numpy()).sum(1, keepdims=True)
        order = np.argsort(-p, 1)[:, :2]
        assert (routed.index.numpy() == order).all()
        assert np.allclose(routed.weight.numpy(), np.take_along_axis(p, order, 1), atol=1e-6)
        assert (routed.weight.sum(1) < 1).all()  # they are not divided by their sum

    def test_renormalised_weights_are_a_softmax_over_the_chosen_logits(self) -> None:
        clean = logits()
        routed = select_experts(clean, 3, gate="renormalised")
        own = clean.gather(1, routed.index).softmax(1)
        assert torch.allclose(routed.weight.double(), own, atol=1e-6)

    def test_low_precision_logits_are_raised_before_the_softmax(self) -> None:
        for kind in (torch.float16, torch.bfloat16):
            clean = logits().to(kind)
            assert select_experts(clean, 2).weight.dtype == torch.float32
            assert torch.equal(
                select_experts(clean, 2).weight, select_experts(clean.float(), 2).weight
            )

    def test_missing_experts_do_not_change_the_weights_of_those_that_are_chosen(self) -> None:
        clean = logits()
        whole = select_experts(clean, 2)
        present = torch.tensor([True, True, False, True, True, False])
        some = select_experts(clean, 2, present=present)
        assert not torch.isin(some.index, torch.tensor([2, 5])).any()
        same = present[whole.index].all(1)
        assert same.any() and not same.all()
        assert torch.equal(some.index[same], whole.index[same])
        assert torch.equal(some.weight[same], whole.weight[same])
        assert torch.equal(some.probability, whole.probability)

    def test_an_expert_takes_its_largest_weights_up_to_its_capacity(self) -> None:
        clean = logits(20, 4)
        routed = select_experts(clean, 2, capacity=0.6)
        room = math.ceil(0.6 * 20 * 2 / 4)
        assert routed.kept is not None
        dropped = 0
        for expert in range(4):
            pairs = [
                (float(routed.weight[m, s]), bool(routed.kept[m, s]))
                for m, s in itertools.product(range(20), range(2))
                if int(routed.index[m, s]) == expert
            ]
            pairs.sort(reverse=True)
            assert [kept for _, kept in pairs] == [n < room for n in range(len(pairs))]
            dropped += max(0, len(pairs) - room)
        assert int(routed.overflow) == dropped > 0
        assert int(routed.counts().sum()) == 40 - dropped

    def test_without_capacity_every_token_is_counted_k_times(self) -> None:
        routed = select_experts(logits(), 3)
        assert int(routed.counts().sum()) == 12 * 3 and int(routed.overflow) == 0

    def test_padding_is_neither_routed_nor_counted(self) -> None:
        valid = torch.arange(12) < 7
        clean = logits()
        routed = select_experts(clean, 2, valid=valid, capacity=1.0)
        alone = select_experts(clean[:7], 2, capacity=1.0)
        assert routed.kept is not None and alone.kept is not None
        assert not routed.kept[7:].any()
        assert torch.equal(routed.kept[:7], alone.kept)
        for fill in (0.0, 1e4):
            changed = torch.where(valid[:, None], clean, fill)
            other = select_experts(changed, 2, valid=valid)
            for name in ("importance", "load", "switch_loss", "z_loss"):
                measure = getattr(losses, name)
                assert torch.allclose(
                    measure(other, 1), measure(select_experts(clean[:7], 2), 1)
                ), name

    def test_small_gates_are_not_run(self) -> None:
        routed = select_experts(logits(), 3, min_gate=0.2)
        assert routed.kept is not None
        assert torch.equal(routed.kept, routed.weight > 0.2)

    @pytest.mark.parametrize("k", [0, 7])
    def test_a_k_that_cannot_be_is_named(self, k: int) -> None:
        with pytest.raises(ConfigError, match=f"k = {k} experts per token, and there are 6"):
            select_experts(logits(), k)

    def test_nan_goes_through_to_the_loss_and_is_not_hidden(self) -> None:
        clean = logits()
        clean[3] = float("nan")
        routed = select_experts(clean, 2)
        assert routed.weight[3].isnan().all() and routed.weight[:3].isfinite().all()

    def test_noise_has_the_deviation_asked_for(self) -> None:
        torch.manual_seed(0)
        routed = select_experts(torch.zeros(20_000, 4), 2, noise_std=0.25)
        assert float(routed.noisy.std()) == pytest.approx(0.25, rel=0.02)


class TestExecution:
    @pytest.mark.parametrize("gated", [False, True])
    @pytest.mark.parametrize("gate", ["raw", "renormalised"])
    def test_all_orders_equal_every_expert_computed_and_masked(self, gate: Any, gated: bool):
        experts = bank(gated=gated)
        x = torch.randn(12, 8, generator=seeded(1))
        routed = select_experts(logits(), 2, gate=gate, capacity=0.7)
        # By hand, with numbers and not with the module.
        assert routed.kept is not None
        wanted = torch.zeros(12, 8, dtype=torch.float64)
        for m, s in itertools.product(range(12), range(2)):
            if routed.kept[m, s]:
                expert: Any = experts[str(int(routed.index[m, s]))].double()
                wanted[m] += float(routed.weight[m, s]) * expert(x[m].double())
        experts.float()
        for order in ("expert", "token", "dense"):
            found = experts(x, routed, order)
            assert torch.allclose(found.double(), wanted, atol=1e-6), order

    def test_gradients_are_those_of_the_dense_form(self) -> None:
        found = []
        for order in ("expert", "dense"):
            experts = bank()
            x = torch.randn(12, 8, generator=seeded(1), requires_grad=True)
            clean = logits().float().requires_grad_()
            routed = select_experts(clean, 2)
            experts(x, routed, order).square().sum().backward()  # type: ignore[arg-type]
            found.append([x.grad, clean.grad, *(p.grad for p in experts.parameters())])
        for a, b in zip(*found, strict=True):
            assert a is not None and b is not None and torch.allclose(a, b, atol=1e-5)

    def test_an_expert_without_tokens_has_no_gradient(self) -> None:
        experts = bank()
        clean = torch.zeros(5, 6)
        clean[:, :2] = 4.0
        experts(torch.randn(5, 8), select_experts(clean, 2)).sum().backward()
        assert [p.grad is not None for p in experts["1"].parameters()] == [True] * 4
        assert all(p.grad is None for p in experts["4"].parameters())

    def test_the_result_is_the_same_bit_for_bit_every_time(self) -> None:
        experts, x = bank(), torch.randn(64, 8, generator=seeded(2))
        routed = select_experts(logits(64), 3)
        first = experts(x, routed)
        assert all(torch.equal(first, experts(x, routed)) for _ in range(3))

    def test_no_token_gives_no_token_and_all_dropped_gives_zeros(self) -> None:
        experts = bank()
        empty = select_experts(torch.zeros(0, 6), 2)
        assert experts(torch.zeros(0, 8), empty).shape == (0, 8)
        routed = select_experts(logits(), 2, valid=torch.zeros(12, dtype=torch.bool))
        for order in ("expert", "token", "dense"):
            assert not experts(torch.randn(12, 8), routed, order).any()

    @pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
    def test_low_precision_comes_out_as_it_came_in(self, kind: torch.dtype) -> None:
        experts = bank()
        x = torch.randn(12, 8, generator=seeded(1))
        routed = select_experts(logits(), 2)
        exact = experts(x, routed)
        found = experts.to(kind)(x.to(kind), routed)
        assert found.dtype == kind
        assert torch.allclose(found.float(), exact, atol=0.03)

    def test_one_expert_is_a_plain_feed_forward_times_its_weight(self) -> None:
        experts = bank(1)
        x = torch.randn(4, 8, generator=seeded(1))
        routed = select_experts(torch.zeros(4, 1), 1)
        assert torch.equal(routed.weight, torch.ones(4, 1))
        assert torch.allclose(experts(x, routed), experts["0"](x))

    def test_an_expert_that_was_left_out_is_named(self) -> None:
        experts = Experts(6, 8, 10, ids=(0, 3))
        with pytest.raises(ConfigError, match=r"expert 1 is not here \(there are 0, 3\)"):
            experts(torch.randn(3, 8), select_experts(torch.eye(6)[[1, 1, 1]], 1))


def router(kind: str = "multi_gate", tasks: tuple[str, ...] = ("a", "b", "c"), **options: Any):
    config = ExpertsConfig(count=6, k=2, router=kind, task_dim=5, **options)  # type: ignore[arg-type]
    return TaskRouter(8, config, tasks)


class TestRouters:
    def test_a_gate_per_task_is_a_matrix_per_task_in_mixed_batches_too(self) -> None:
        gate = router().eval()
        x, task = torch.randn(4, 3, 8, generator=seeded(1)), torch.tensor([2, 0, 2, 1])
        mixed = gate(x, task)
        for s, t in enumerate(task.tolist()):
            wanted = x[s] @ gate.gates[t]
            assert torch.allclose(mixed.clean[3 * s : 3 * s + 3], wanted, atol=1e-6)
            alone = gate(x[s : s + 1], task[s : s + 1])
            assert torch.equal(alone.index, mixed.index[3 * s : 3 * s + 3])

    def test_the_conditioned_gate_sees_the_token_and_its_tasks_embedding(self) -> None:
        torch.manual_seed(0)
        embedding, gate = TaskEmbedding(3, 5), router("conditioned").eval()
        x, task = torch.randn(4, 3, 8, generator=seeded(1)), torch.tensor([2, 0, 2, 1])
        onehot = torch.eye(3)
        hidden = torch.nn.functional.gelu(embedding.first(onehot))
        e = embedding.norm(embedding.second(hidden))
        wanted = torch.cat((x, e[task][:, None].expand(-1, 3, -1)), -1) @ gate.gates[0]
        found = gate(x, task, embedding())
        assert torch.allclose(found.clean, wanted.reshape(12, 6), atol=1e-5)

    def test_a_blind_gate_does_not_know_the_task(self) -> None:
        gate, x = router("blind").eval(), torch.randn(2, 3, 8)
        both = [gate(x, torch.tensor([t, t])).clean for t in (0, 2)]
        assert torch.equal(both[0], both[1])

    def test_a_gate_that_goes_by_task_must_be_told_the_task(self) -> None:
        with pytest.raises(ConfigError, match="needs to know the task"):
            router()(torch.randn(1, 3, 8), None)

    def test_gates_start_within_one_over_the_root_of_the_number_of_experts(self) -> None:
        config = ExpertsConfig(count=6, k=2)
        big = TaskRouter(4000, config, ("a",)).gates[0].detach()
        bound = 6**-0.5
        assert float(big.abs().max()) < bound < 1.01 * float(big.abs().max())
        assert float(big.std()) == pytest.approx(bound / 3**0.5, rel=0.02)
        wide = TaskRouter(4000, config.model_copy(update={"start": "width"}), ("a",)).gates[0]
        assert float(wide.abs().max()) < 4000**-0.5

    def test_a_tasks_gate_starts_alike_whatever_other_tasks_there_are(self) -> None:
        assert torch.equal(router().gates[1], router(tasks=("b",)).gates[0])

    def test_there_is_noise_in_training_and_none_in_evaluation(self) -> None:
        gate, x, task = router(noise=3.0), torch.randn(2, 3, 8), torch.tensor([0, 1])
        assert not torch.equal(gate(x, task).noisy, gate(x, task).noisy)
        assert gate(x, task).noise_std == 3.0 / 6
        gate.eval()
        assert torch.equal(gate(x, task).noisy, gate(x, task).clean)

    def test_ranges_are_evenly_spaced_and_end_with_the_last_expert(self) -> None:
        table = task_ranges(16, 4, 5)
        assert [int(row.nonzero()[0]) for row in table] == [0, 3, 6, 9, 12]
        assert (table.sum(1) == 4).all()
        assert (task_ranges(16, 4, 1)[0].nonzero()[:, 0] == torch.arange(4)).all()

    def test_a_task_with_a_range_never_leaves_it_and_its_probabilities_sum_to_one(self) -> None:
        gate = router(per_task=3).eval()
        task = torch.tensor([0, 1, 2])
        routed = gate(torch.randn(3, 50, 8), task)
        permitted = task_ranges(6, 3, 3)[routed.task]
        assert permitted.gather(1, routed.index).all()
        assert torch.allclose((routed.probability * permitted).sum(1), torch.ones(150))


class TestBalance:
    def routed(self, noise: float = 0.0, seed: int = 0, k: int = 2) -> RouterOutput:
        torch.manual_seed(seed)
        task = torch.tensor([0, 0, 2, 0, 2, 2, 0, 0, 2, 0, 0, 2])
        return select_experts(logits().float(), k, noise_std=noise, task=task)

    def test_cv_squared_is_variance_over_mean_squared(self) -> None:
        value = torch.tensor([[1.0, 2.0, 3.0, 6.0], [2.0, 2.0, 2.0, 2.0]])
        variance = sum((v - 3) ** 2 for v in (1, 2, 3, 6)) / 3
        found = losses.cv_squared(value)
        assert found.tolist() == pytest.approx([variance / 9, 0.0])
        # All on one of N experts: the mean is v / N and CV^2 = N.
        alone = torch.tensor([[5.0, 0, 0, 0, 0, 0, 0, 0]])
        assert float(losses.cv_squared(alone)) == pytest.approx(8.0)
        assert float(losses.cv_squared(torch.tensor([[3.0]]))) == 0.0

    def test_importance_adds_the_chosen_weights_of_each_task(self) -> None:
        routed = self.routed()
        wanted = np.zeros((3, 6))
        assert routed.task is not None
        for m, s in itertools.product(range(12), range(2)):
            wanted[int(routed.task[m]), int(routed.index[m, s])] += float(routed.weight[m, s])
        assert np.allclose(losses.importance(routed, 3).numpy(), wanted, atol=1e-6)

    def test_load_without_noise_counts_tokens(self) -> None:
        routed = self.routed()
        assert float(losses.load(routed, 3).sum()) == 24
        assert torch.equal(losses.load(routed, 3).sum(0).long(), routed.counts())

    def test_load_with_noise_is_the_chance_to_be_chosen(self) -> None:
        """Against the definition: hold the other experts' noise, draw this one's anew."""
        std, k = 0.7, 2
        routed = self.routed(std)
        found = losses.load(replace(routed, task=None), 1)[0]
        clean, noisy = routed.clean.numpy(), routed.noisy.numpy()
        wanted = np.zeros(6)
        for m, e in itertools.product(range(12), range(6)):
            rivals = np.sort(np.delete(noisy[m], e))[::-1]
            wanted[e] += 1 - norm.cdf((rivals[k - 1] - clean[m, e]) / std)
        assert np.allclose(found.numpy(), wanted, atol=1e-4)

    def test_the_published_load_compares_logits_with_probabilities(self) -> None:
        std = 0.7
        routed = self.routed(std)
        found = losses.load(replace(routed, task=None), 1, published=True)[0]
        clean, p = routed.clean.numpy(), routed.probability.numpy()
        wanted = np.zeros(6)
        for m, e in itertools.product(range(12), range(6)):
            top = np.sort(p[m])[::-1]
            inside = routed.noisy[m, e] > top[2]
            wanted[e] += norm.cdf((clean[m, e] - (top[2] if inside else top[1])) / std)
        assert np.allclose(found.numpy(), wanted, atol=1e-4)

    def test_every_expert_chosen_leaves_nothing_to_balance_in_the_load(self) -> None:
        routed = self.routed(0.5, k=6)
        assert torch.equal(losses.cv_squared(losses.load(routed, 3))[[0, 2]], torch.zeros(2))

    def test_switch_loss_is_one_when_even_and_n_when_collapsed(self) -> None:
        even = select_experts(torch.eye(6) * 1e-4, 1)
        assert float(losses.switch_loss(even, 1)) == pytest.approx(1.0, abs=1e-3)
        sure = torch.full((6, 6), -50.0)
        sure[:, 2] = 50.0
        assert float(losses.switch_loss(select_experts(sure, 1), 1)) == pytest.approx(6.0)

    def test_z_loss_is_the_mean_square_of_the_log_partition(self) -> None:
        routed = self.routed()
        wanted = np.log(np.exp(logits().numpy()).sum(1)) ** 2
        assert float(losses.z_loss(replace(routed, task=None), 1)) == pytest.approx(wanted.mean())

    def test_mutual_information_in_closed_form(self) -> None:
        """Each of T tasks has experts of its own: I = log T; all alike: 0."""
        own = torch.eye(3).repeat_interleave(2, 1) / 6
        assert float(losses.mutual_information(own)) == pytest.approx(math.log(3), rel=1e-6)
        alike = torch.full((3, 6), 1 / 18)
        assert float(losses.mutual_information(alike)) == pytest.approx(0.0, abs=1e-6)

    def test_a_collapsed_task_shows_though_all_tasks_together_are_even(self) -> None:
        clean = torch.full((12, 6), -30.0)
        clean[torch.arange(12), torch.arange(12) // 2] = 30.0
        task = torch.arange(12) // 2 // 2
        routed = select_experts(clean, 1, task=task)
        apart = balance_loss(routed, 3, BalanceWeights(load=0.0))
        pooled = balance_loss(replace(routed, task=None), 1, BalanceWeights(load=0.0))
        assert float(pooled[0]) == pytest.approx(0.0, abs=1e-5)
        assert (apart > 1.0).all()

    @pytest.mark.parametrize(
        "weights",
        [
            BalanceWeights(load=0.0),
            BalanceWeights(importance=0.0),
            BalanceWeights(0.0, 0.0, switch=1.0),
            BalanceWeights(0.0, 0.0, z=1.0),
        ],
    )
    def test_gradients_agree_with_finite_differences(self, weights: BalanceWeights) -> None:
        noise = 0.3 * torch.randn(12, 6, generator=seeded(4))
        task = torch.arange(12) % 2
        base = logits(seed=8).float()
        chosen = (base + noise).topk(2).indices

        def value(clean: Tensor) -> Tensor:
            noisy = clean + noise
            p = noisy.softmax(1)
            routed = RouterOutput(
                chosen, p.gather(1, chosen), None, clean, noisy, p, 0.3, task, None, torch.tensor(0)
            )
            return balance_loss(routed, 2, weights).sum()

        clean = base.double().requires_grad_()
        (exact,) = torch.autograd.grad(value(clean), clean)
        for m, e in itertools.product((0, 5, 11), range(6)):
            step = torch.zeros_like(base, dtype=torch.float64)
            step[m, e] = 1e-5
            with torch.no_grad():
                slope = (value(base.double() + step) - value(base.double() - step)) / 2e-5
            assert float(exact[m, e]) == pytest.approx(float(slope), abs=1e-5, rel=1e-3)


class TestUsage:
    def test_counts_shares_and_entropy_against_loops(self) -> None:
        torch.manual_seed(0)
        moe = SparseMoE(8, ExpertsConfig(count=6, k=2, capacity=0.8), ("a", "b"))
        usage = ExpertUsage(("a", "b"), 6)
        wanted = np.zeros((2, 6))
        overflow = 0
        for _ in range(2):
            record = RoutingRecord()
            moe(torch.randn(4, 5, 8), torch.tensor([0, 1, 1, 1]), record=record, layer=3)
            routed = record.routed[3]
            usage.add(record)
            assert routed.kept is not None and routed.task is not None
            for m, s in itertools.product(range(20), range(2)):
                if routed.kept[m, s]:
                    wanted[int(routed.task[m]), int(routed.index[m, s])] += 1
                else:
                    overflow += 1
        assert (usage.count[3] == wanted).all() and usage.overflow[3] == overflow > 0
        assert usage.tokens.tolist() == [10, 30]
        share = wanted / wanted.sum(1, keepdims=True)
        entropy = [-(s[s > 0] * np.log(s[s > 0])).sum() for s in share]
        assert usage.entropy(3).tolist() == pytest.approx(entropy)
        assert usage.used("b")[0] == tuple(np.flatnonzero(share[1] > 0))
        assert usage.overlap()[0, 1] == pytest.approx(np.minimum(*share).sum())
        assert usage.overlap()[0, 0] == pytest.approx(1.0)

    def test_an_unknown_task_is_named(self) -> None:
        with pytest.raises(ConfigError, match="no task 'c' among a, b"):
            ExpertUsage(("a", "b"), 4).used("c")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"count": 2, "k": 3}, "k = 3 experts per token, and there are only 2"),
        ({"per_task": 1, "k": 2}, "per_task = 1 is not between"),
        ({"kept": [[0]]}, "needs at least k = 2 different experts"),
        ({"cuont": 4}, "Did you mean 'count'"),
        ({"router": "multi"}, "multi_gate"),
    ],
)
def test_impossible_settings_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(ExpertsConfig, given, "experts")
