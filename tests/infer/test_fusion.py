"""One fusion step against brute-force divergences, and its exact cases."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polytask.errors import ConfigError, DataError
from polytask.infer.fusion import (
    GRID,
    checked_grid,
    divergences,
    fuse_step,
    joint_points,
    parse_grid,
)

F64 = torch.float64


def draw(seed: int, rows: int, vocabulary: int, experts: int, scale: float = 1.0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=F64) * scale

    base = normal(rows, vocabulary)
    return normal(rows, vocabulary) * 2, base, base + normal(experts, rows, vocabulary)


def kl(p: np.ndarray, q: np.ndarray) -> float:
    """sum p log(p / q) as the definition says, 0 log 0 = 0."""
    return float(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))


def softmax(x) -> np.ndarray:
    x = np.asarray(x, np.float64)
    e = np.exp(x - x.max())
    return e / e.sum()


def slow_loss(large, base, experts, alphas) -> float:
    """L(alpha) of one row, straight from the paper's formulas."""
    large, base, experts = (x.numpy() for x in (large, base, experts))
    moved = large + sum(a * (e - base) for a, e in zip(alphas, experts, strict=True))
    p, fused, q = softmax(large), softmax(moved), softmax(base)
    total = 0.0
    for expert in experts:
        q_t = softmax(expert)
        total += (kl(fused, p) - kl(q_t, q)) ** 2 + (kl(p, fused) - kl(q, q_t)) ** 2
    return total


def slow_single(large, base, experts, grid) -> tuple[float, list[float]]:
    """Best loss and strengths over one-expert-at-a-time searches."""
    count = len(experts)
    found = []
    for alpha, t in itertools.product(grid, range(count)):
        strengths = [alpha if i == t else 0.0 for i in range(count)]
        found.append((slow_loss(large, base, experts, strengths), strengths))
    return min(found, key=lambda pair: pair[0])


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(1, 3),
    st.integers(2, 9),
    st.integers(1, 3),
    st.sampled_from([0.05, 1.0, 4.0]),
)
def test_single_search_equals_brute_force(seed, rows, vocabulary, experts, scale) -> None:
    large, base, tuned = draw(seed, rows, vocabulary, experts, scale)
    found = fuse_step(large, base, tuned)
    for row in range(rows):
        one = (large[row], base[row], tuned[:, row])
        loss, _ = slow_single(*one, GRID)
        own = slow_loss(*one, found.alpha[row].tolist())
        assert own == pytest.approx(loss, rel=1e-8, abs=1e-13)
        assert float(found.loss[row]) == pytest.approx(loss, rel=1e-8, abs=1e-13)
        moved = large[row] + (found.alpha[row][:, None] * (tuned[:, row] - base[row])).sum(0)
        assert torch.allclose(found.logits[row], moved)
        assert (found.alpha[row] > 0).sum() <= 1


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3))
def test_joint_search_equals_brute_force(seed, experts) -> None:
    large, base, tuned = draw(seed, 2, 6, experts)
    grid = (0.0, 0.3, 0.9, 1.4)
    found = fuse_step(large, base, tuned, grid, "joint")
    for row in range(2):
        one = (large[row], base[row], tuned[:, row])
        best = min(slow_loss(*one, point) for point in itertools.product(grid, repeat=experts))
        assert float(found.loss[row]) == pytest.approx(best, rel=1e-8, abs=1e-13)


def test_reported_divergences_and_targets_are_the_definitions() -> None:
    large, base, tuned = draw(5, 2, 7, 2)
    found = fuse_step(large, base, tuned, mode="static", alpha=[0.7, 0.2])
    for row in range(2):
        p, fused = softmax(large[row]), softmax(found.logits[row])
        assert found.divergence[row].tolist() == pytest.approx([kl(fused, p), kl(p, fused)])
        for t in range(2):
            q, q_t = softmax(base[row]), softmax(tuned[t, row])
            assert found.target[row, t].tolist() == pytest.approx([kl(q_t, q), kl(q, q_t)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
@pytest.mark.parametrize("vocabulary", [2, 97, 5001])
def test_a_large_model_equal_to_the_base_becomes_the_expert(dtype, vocabulary) -> None:
    _, base, tuned = draw(1, 3, vocabulary, 1)
    base, tuned = base.to(dtype), tuned.to(dtype)
    found = fuse_step(base, base, tuned)
    assert found.alpha.tolist() == [[1.0]] * 3
    assert torch.allclose(found.loss, torch.zeros_like(found.loss), atol=1e-12)
    wide = found.logits.dtype
    assert torch.allclose(found.logits.softmax(-1), tuned[0].to(wide).softmax(-1), atol=1e-6)


@pytest.mark.parametrize("mode", ["single", "joint"])
@pytest.mark.parametrize("refine", ["none", "golden"])
def test_an_expert_equal_to_the_base_gets_strength_zero(mode, refine) -> None:
    if (mode, refine) == ("joint", "golden"):
        pytest.skip("refused, tested below")
    large, base, _ = draw(2, 4, 11, 1)
    found = fuse_step(large, base, torch.stack((base, base)), mode=mode, refine=refine)
    assert found.alpha.abs().max() == 0
    assert torch.equal(found.logits, large)
    assert found.loss.max() < 1e-25


def test_of_two_equal_experts_the_first_acts() -> None:
    _, base, tuned = draw(3, 4, 11, 1)
    found = fuse_step(base, base, torch.cat((tuned, tuned)))
    assert found.alpha.tolist() == [[1.0, 0.0]] * 4


def test_proxy_tuning_is_the_static_mode_with_one() -> None:
    large, base, tuned = draw(4, 3, 8, 1)
    found = fuse_step(large, base, tuned, mode="static", alpha=1.0)
    assert torch.allclose(found.logits, large + tuned[0] - base)
    per_row = torch.tensor([[0.0], [1.0], [2.0]], dtype=F64)
    found = fuse_step(large, base, tuned, mode="static", alpha=per_row)
    assert torch.allclose(found.logits, large + per_row * (tuned[0] - base))


def test_divergences_do_not_fall_with_strength() -> None:
    large, base, tuned = draw(6, 5, 20, 1)
    log_p, shift = large.log_softmax(-1), tuned[0] - base
    seen = torch.stack([torch.stack(divergences(log_p, a * shift)) for a in GRID])
    assert (seen.diff(dim=0) >= -1e-12).all()
    assert seen[0].abs().max() < 1e-15


def test_small_divergences_survive_single_precision() -> None:
    """Divergences near 1e-3 from float32 logits up to 80: the double-precision ones, and strength.

    A difference of two float32 probabilities' logarithms, weighted and summed, would lose them.
    """
    large, base, tuned = draw(7, 64, 1000, 1)
    large, tuned = large * 10, base + (tuned - base) * 0.05
    exact = fuse_step(large, base, tuned)
    single = fuse_step(large.float(), base.float(), tuned.float())
    assert exact.target.max() < 2e-3
    assert torch.allclose(single.target.double(), exact.target, rtol=1e-3, atol=2e-6)
    taken = fuse_step(large, base, tuned, mode="static", alpha=single.alpha.double())
    assert (taken.loss - exact.loss).max() < 1e-8


@pytest.mark.parametrize("refine", ["none", "golden"])
def test_golden_section_is_never_worse_than_the_grid(refine) -> None:
    large, base, tuned = draw(8, 40, 12, 3)
    coarse = fuse_step(large, base, tuned, (0, 0.5, 1, 1.5, 2), refine=refine)
    fine = fuse_step(large, base, tuned, [i / 1000 for i in range(2001)])
    plain = fuse_step(large, base, tuned, (0, 0.5, 1, 1.5, 2))
    assert (coarse.loss <= plain.loss + 1e-12).all()
    if refine == "golden":
        assert (coarse.loss <= fine.loss + 1e-4).float().mean() > 0.8
        assert coarse.loss.mean() < plain.loss.mean()


def test_bounds_keep_each_expert_in_its_range() -> None:
    large, base, tuned = draw(9, 60, 10, 2, 3.0)
    for refine in ("none", "golden"):
        found = fuse_step(large, base, tuned, bounds=[(0, 0.3), (0, 0)], refine=refine)
        assert found.alpha[:, 0].max() <= 0.3 + 1e-6
        assert found.alpha[:, 1].max() == 0
    low = fuse_step(large, base, tuned[:1], bounds=[(0.5, 0.7)])
    assert low.alpha.min() >= 0.5 - 1e-6 and low.alpha.max() <= 0.7 + 1e-6


def test_rows_do_not_depend_on_their_neighbours() -> None:
    large, base, tuned = draw(10, 50, 400, 2)
    large, base, tuned = large.float(), base.float(), tuned.float()
    whole = fuse_step(large, base, tuned)
    for row in (0, 17, 49):
        one = fuse_step(large[row : row + 1], base[row : row + 1], tuned[:, row : row + 1])
        assert torch.equal(one.alpha[0], whole.alpha[row])
        assert torch.allclose(one.logits[0], whole.logits[row])


def test_a_constant_added_to_logits_changes_nothing() -> None:
    large, base, tuned = draw(11, 5, 9, 2)
    plain = fuse_step(large, base, tuned)
    moved = fuse_step(large + 3, base - 7, tuned + torch.tensor([5.0, -2.0])[:, None, None])
    assert torch.allclose(plain.logits.softmax(-1), moved.logits.softmax(-1))
    assert torch.equal(plain.alpha, moved.alpha)


@pytest.mark.parametrize("most_negative", [-math.inf, torch.finfo(torch.float32).min])
def test_banned_tokens(most_negative) -> None:
    large, base, tuned = (x.float() for x in draw(12, 2, 8, 2))
    large[0, 3] = base[0, 3] = most_negative
    tuned[:, 0, 3] = most_negative  # banned by all: inf - inf
    large[1, 0] = most_negative  # by the large model alone
    base[1, 1] = most_negative  # by the base alone
    tuned[1, 1, 2] = most_negative  # by one expert alone
    found = fuse_step(large, base, tuned)
    for value in found:
        assert not value.isnan().any()
    assert found.logits[0, 3] == -math.inf and found.logits[1, 0] == -math.inf
    assert torch.isfinite(found.logits).sum() == 14
    assert found.loss.isfinite().all()
    # What all ban might as well not be there.
    keep = [0, 1, 2, 4, 5, 6, 7]
    less = fuse_step(large[:1, keep], base[:1, keep], tuned[:, :1, keep])
    assert torch.allclose(less.logits[0], found.logits[0, keep])
    assert torch.allclose(less.loss[0], found.loss[0])


def test_what_the_large_model_alone_bans_is_not_compared_either() -> None:
    """On the tokens that are left, the large model is the base: strength 1, no loss."""
    _, base, tuned = draw(15, 3, 9, 1)
    large = base.clone()
    large[:, 2] = -math.inf
    found = fuse_step(large, base, tuned)
    assert found.alpha.tolist() == [[1.0]] * 3
    assert found.loss.max() < 1e-20


def test_an_expert_that_shares_no_token_with_the_base_does_nothing() -> None:
    large = torch.zeros(1, 4)
    base = torch.tensor([[0.0, 0.0, -math.inf, -math.inf]])
    expert = torch.tensor([[[-math.inf, -math.inf, 0.0, 0.0]]])
    found = fuse_step(large, base, expert)
    assert found.alpha.tolist() == [[0.0]] and found.loss.tolist() == [0.0]


def test_swapped_pairing_pairs_forward_with_reverse() -> None:
    large, base, tuned = draw(13, 1, 6, 1, 2.0)
    found = fuse_step(large, base, tuned, mode="static", alpha=0.8, pairing="swapped")
    forward, reverse = found.divergence[0].tolist()
    a, b = found.target[0, 0].tolist()
    assert float(found.loss[0]) == pytest.approx((forward - b) ** 2 + (reverse - a) ** 2)
    plain = fuse_step(large, base, tuned, mode="static", alpha=0.8)
    assert torch.equal(plain.target, found.target)


def test_no_rows() -> None:
    found = fuse_step(torch.zeros(0, 5), torch.zeros(0, 5), torch.zeros(2, 0, 5))
    assert found.logits.shape == (0, 5) and found.alpha.shape == (0, 2)


def test_one_token_vocabulary() -> None:
    found = fuse_step(torch.ones(2, 1), torch.zeros(2, 1), torch.ones(1, 2, 1))
    assert found.alpha.tolist() == [[0.0], [0.0]]


def test_faults_name_what_is_wrong() -> None:
    large, base, tuned = draw(14, 2, 5, 1)
    nan = tuned.clone()
    nan[0, 1, 2] = math.nan
    with pytest.raises(DataError, match="experts hold NaN"):
        fuse_step(large, base, nan)
    with pytest.raises(DataError, match="one size"):
        fuse_step(large, base[:, :4], tuned)
    with pytest.raises(ConfigError, match="at least one expert"):
        fuse_step(large, base, tuned[:0])
    with pytest.raises(DataError, match="row 1: the large model bans every token"):
        fuse_step(torch.stack((large[0], torch.full((5,), -math.inf))), base, tuned)
    with pytest.raises(DataError, match="floats"):
        fuse_step(large.long(), base, tuned)
    with pytest.raises(ConfigError, match="needs alpha"):
        fuse_step(large, base, tuned, mode="static")
    with pytest.raises(ConfigError, match="2 strengths for 1"):
        fuse_step(large, base, tuned, mode="static", alpha=[1, 1])
    with pytest.raises(ConfigError, match="negative"):
        fuse_step(large, base, tuned, mode="static", alpha=-1.0)
    with pytest.raises(ConfigError, match="golden"):
        fuse_step(large, base, tuned, mode="joint", refine="golden")
    with pytest.raises(ConfigError, match="no grid point"):
        fuse_step(large, base, tuned, bounds=[(0.91, 0.99)])
    with pytest.raises(ConfigError, match="2 pairs for 1"):
        fuse_step(large, base, tuned, bounds=[(0, 1), (0, 1)])
    with pytest.raises(ConfigError, match="mode 'single' or a coarser"):
        joint_points(GRID, 4)
    with pytest.raises(ConfigError, match="none of"):
        fuse_step(large, base, tuned, mode="both")


def test_grids() -> None:
    assert parse_grid("0:2:.1") == GRID
    assert parse_grid("0:1:.25") == (0, 0.25, 0.5, 0.75, 1)
    assert parse_grid("1,0,.5,1") == (0, 0.5, 1)
    for text, match in {
        "-1:1:.5": "negative",
        ".5:1:.1": "0 is missing",
        "0:1": "start:stop:step",
        "0:1:0": "start:stop:step",
        "a": "start:stop:step",
        "0,nan": "not finite",
    }.items():
        with pytest.raises(ConfigError, match=match):
            parse_grid(text)
    with pytest.raises(ConfigError, match="no strength"):
        checked_grid(())
