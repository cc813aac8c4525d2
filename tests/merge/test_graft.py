"""Grafts: base patch, gamma of S, and the mistakes that are refused by name."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from polytask.errors import ConfigError, MergeError
from polytask.merge.graft import Graft, parameter_names, random_mask, top_movement

State = dict[str, Tensor]


def pair(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[State, State]:
    generator = torch.Generator().manual_seed(seed)
    base = {
        "a.weight": torch.randn(3, 4, generator=generator).to(dtype),
        "b.bias": torch.randn(5, generator=generator).to(dtype),
        "c.scale": torch.randn((), generator=generator).to(dtype),
        "steps": torch.tensor(7),
    }
    tuned = {
        k: v + 0.1 * torch.randn(v.shape, generator=generator).to(dtype)
        if v.is_floating_point()
        else v
        for k, v in base.items()
    }
    return base, tuned


# -- top movement


def slow_top(delta: list[float], count: int) -> set[int]:
    ranked = sorted(range(len(delta)), key=lambda i: (-abs(delta[i]), i))
    return {i for i in ranked[:count] if delta[i] != 0}


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 1e-30, 0.5]), min_size=1, max_size=30
    ),
    st.data(),
)
def test_top_movement_is_the_sorted_top_with_ties_by_index(
    values: list[float], data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, len(values)))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        delta = torch.tensor(values).to(dtype)
        mask = top_movement(delta, count)
        assert set(mask.nonzero().flatten().tolist()) == slow_top(delta.tolist(), count)


def test_top_movement_takes_exactly_the_count_where_all_tie() -> None:
    mask = top_movement(torch.full((100,), -0.25), 7)
    assert mask.nonzero().flatten().tolist() == list(range(7))


def test_the_published_base_patch_is_one_short_and_loses_ties() -> None:
    delta = torch.tensor([5.0, 4.0, 3.0, 3.0, 1.0])
    assert int(top_movement(delta, 2, strict=True).sum()) == 1
    assert int(top_movement(delta, 4, strict=True).sum()) == 2
    assert int(top_movement(delta, 4).sum()) == 4


def test_movement_is_global_not_per_tensor() -> None:
    base, tuned = {"a": torch.zeros(4), "b": torch.zeros(4)}, {}
    tuned = {"a": torch.full((4,), 0.1), "b": torch.full((4,), 2.0)}
    graft = Graft.between(base, tuned, count=4)
    assert graft.gamma_b.tolist() == [False] * 4 + [True] * 4


def test_float64_values_that_tie_in_float32_are_told_apart() -> None:
    delta = torch.tensor([1.0, 1.0 + 1e-12, 1.0 - 1e-12], dtype=torch.float64)
    assert top_movement(delta, 1).tolist() == [False, True, False]


def test_random_masks_have_the_size_and_only_what_moved() -> None:
    delta = torch.cat([torch.zeros(50), torch.ones(50)])
    mask = random_mask(delta, 20, seed=1)
    assert int(mask.sum()) == 20
    assert not mask[:50].any()
    assert torch.equal(mask, random_mask(delta, 20, seed=1))
    assert not torch.equal(mask, random_mask(delta, 20, seed=2))
    with pytest.raises(MergeError, match="draw 60 of 50"):
        random_mask(delta, 60, seed=1)


# -- gamma


def test_gamma_is_the_papers_equation() -> None:
    graft = Graft.between(*pair(), count=5)
    scores = torch.linspace(-5, 25, graft.size)
    patch = graft.gamma_b.float()
    pushed = torch.sigmoid(scores - 10)
    expected = patch * (1 - pushed) + (1 - patch) * pushed
    assert torch.allclose(graft.soft(scores), expected, atol=1e-7)
    assert torch.equal(graft.hard(scores), expected.round().bool())


def test_gamma_starts_at_the_base_patch_up_to_the_dense_leak() -> None:
    graft = Graft.between(*pair(), count=5)
    start = graft.soft(torch.zeros(graft.size))
    leak = 1 / (1 + torch.tensor(10.0).exp())
    assert torch.allclose(start, (graft.gamma_b.float() - leak).abs(), atol=1e-7)
    assert torch.equal(graft.hard(torch.zeros(graft.size)), graft.gamma_b)


def test_a_limit_keeps_the_largest_gamma_even_where_gamma_saturates() -> None:
    base = {"a": torch.zeros(4)}
    graft = Graft.between(base, {"a": torch.tensor([4.0, 3.0, 2.0, 1.0])}, count=2)
    scores = torch.tensor([9.0, -30.0, 500.0, 400.0])  # logits of gamma: 1, 40, 490, 390
    assert graft.hard(scores).tolist() == [True] * 4
    assert graft.hard(scores, limit=2).tolist() == [False, False, True, True]
    assert graft.hard(scores, limit=3).tolist() == [False, True, True, True]


def test_half_is_rounded_down_as_torch_rounds() -> None:
    graft = Graft.between({"a": torch.zeros(2)}, {"a": torch.tensor([2.0, 1.0])}, count=1)
    scores = torch.full((2,), 10.0)
    assert graft.soft(scores).tolist() == [0.5, 0.5]
    assert graft.hard(scores).tolist() == [False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_ends_of_gamma_are_the_two_models(dtype: torch.dtype) -> None:
    base, tuned = pair(dtype=dtype)
    graft = Graft.between(base, tuned, sparsity=0.5)
    for gamma, model in ((torch.zeros(graft.size), base), (torch.ones(graft.size), tuned)):
        state = graft.state(gamma)
        assert state.keys() == base.keys()
        for name in graft.layout.shapes:
            assert torch.allclose(state[name], model[name].to(state[name]), atol=1e-6)
        assert torch.equal(state["steps"], base["steps"])


def test_state_is_differentiable_in_gamma() -> None:
    base, tuned = pair()
    graft = Graft.between(base, tuned, count=3)
    gamma = torch.rand(graft.size, requires_grad=True)
    state = graft.state(gamma)
    sum(state[name].sum() for name in graft.layout.shapes).backward()  # type: ignore[union-attr]
    assert gamma.grad is not None
    assert torch.allclose(gamma.grad, graft.delta)


# -- what takes part


def test_frozen_and_tied_tensors_are_not_counted() -> None:
    shared = torch.randn(6)
    base = {"embed": shared, "head": shared, "layer": torch.randn(8), "frozen": torch.randn(100)}
    moved = shared + 1
    tuned = {**base, "embed": moved, "head": moved, "layer": base["layer"] + 0.5}
    graft = Graft.between(base, tuned, sparsity=0.5)
    assert graft.size == 6 + 8
    state = graft.state(torch.ones(graft.size))
    assert state["head"] is state["embed"]


def test_buffers_keep_the_bases_values_and_are_named() -> None:
    base_model, tuned_model = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    with torch.no_grad():
        tuned_model.weight += 1
        tuned_model.running_mean += 3  # type: ignore[operator]
        tuned_model.num_batches_tracked += 5  # type: ignore[operator]
    base, tuned = base_model.state_dict(), tuned_model.state_dict()
    graft = Graft.between(base, tuned, sparsity=0.5, parameters=parameter_names(base_model))
    assert list(graft.layout.shapes) == ["weight"]
    assert "running_mean" in graft.notes[0]
    assert torch.equal(graft.state(torch.ones(graft.size))["running_mean"], base["running_mean"])


def test_tensors_outside_that_changed_are_refused_kept_or_copied() -> None:
    base, tuned = pair()
    with pytest.raises(MergeError, match=r"leaves out \('b.bias'\)"):
        Graft.between(base, tuned, sparsity=0.5, exclude=["b.*"])
    kept = Graft.between(base, tuned, sparsity=0.5, exclude=["b.*"], outside="base")
    assert torch.equal(kept.state(torch.ones(kept.size))["b.bias"], base["b.bias"])
    copied = Graft.between(base, tuned, sparsity=0.5, exclude=["b.*"], outside="finetuned")
    assert torch.equal(copied.state(torch.zeros(copied.size))["b.bias"], tuned["b.bias"])
    assert "b.bias" in copied.notes[0]


def test_a_head_that_the_base_lacks_is_taken_whole_only_when_asked() -> None:
    base, tuned = pair()
    tuned["head.weight"] = torch.ones(2, 2)
    with pytest.raises(MergeError, match=r"no tensor 'head.weight'.*outside='finetuned'"):
        Graft.between(base, tuned, sparsity=0.5)
    graft = Graft.between(base, tuned, sparsity=0.5, outside="finetuned")
    assert torch.equal(graft.state(torch.zeros(graft.size))["head.weight"], torch.ones(2, 2))


def test_a_smaller_patch_leaves_room_to_grow() -> None:
    graft = Graft.between(*pair(), count=8, patch=0.25)
    assert int(graft.gamma_b.sum()) == 2
    assert int(graft.movement().sum()) == graft.asked == 8
    assert graft.movement()[graft.gamma_b].all()
    with pytest.raises(MergeError, match="patch = 0 is not a share"):
        Graft.between(*pair(), count=8, patch=0)


def test_mistakes_are_named() -> None:
    base, tuned = pair()
    with pytest.raises(MergeError, match=r"smallest usable sparsity is 0.0556"):
        Graft.between(base, tuned, sparsity=1e-4)
    with pytest.raises(MergeError, match="equals the base"):
        Graft.between(base, dict(base), sparsity=0.5)
    with pytest.raises(MergeError, match=r"'a.weight' has shape"):
        Graft.between(base, {**tuned, "a.weight": torch.zeros(4, 4)}, sparsity=0.5)
    with pytest.raises(MergeError, match=r"'b.bias' of the base is missing"):
        Graft.between(base, {k: v for k, v in tuned.items() if k != "b.bias"}, sparsity=0.5)
    with pytest.raises(MergeError, match=r"'b.bias' holds NaN"):
        Graft.between(base, {**tuned, "b.bias": torch.full((5,), float("nan"))}, sparsity=0.5)
    with pytest.raises(MergeError, match="'steps'"):
        Graft.between(base, {**tuned, "steps": torch.tensor(8)}, sparsity=0.5)
    with pytest.raises(MergeError, match="one of sparsity, count"):
        Graft.between(base, tuned)
    with pytest.raises(MergeError, match="not a share"):
        Graft.between(base, tuned, sparsity=1.5)
    with pytest.raises(MergeError, match="cannot take 19 of 18"):
        Graft.between(base, tuned, count=19)
    with pytest.raises(ConfigError, match="matches no parameter"):
        Graft.between(base, tuned, sparsity=0.5, include=["d.*"])


def test_tied_in_the_base_and_untied_by_fine_tuning_is_refused() -> None:
    shared = torch.randn(6)
    base = {"embed": shared, "head": shared}
    with pytest.raises(MergeError, match="'head' and 'embed' are one tensor in the base"):
        Graft.between(base, {"embed": shared + 1, "head": shared + 2}, sparsity=0.5)


def test_the_achieved_count_is_told() -> None:
    base = {"a": torch.zeros(10)}
    tuned = {"a": torch.tensor([1.0, 1.0] + [0.0] * 8)}
    graft = Graft.between(base, tuned, count=5)
    assert int(graft.gamma_b.sum()) == 2
    assert graft.notes == (
        "5 coordinates were asked for, 2 are in the base patch: no others moved",
    )
