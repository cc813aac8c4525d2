"""TIES, DARE, breadcrumbs, DELLA and PCB against slow references and their own laws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from merge_references import Family, array, banded, families, pcb, trimmed, voted
from torch import Tensor

from polytask.errors import MergeError
from polytask.merge import TaskVectors, merge_state_dicts
from polytask.merge.method import TensorInfo
from polytask.merge.methods.breadcrumbs import keep_band_
from polytask.merge.methods.drop import drop_, rank_drop_
from polytask.merge.methods.pcb import PCB, pcb_shares

WEIGHTS = st.lists(st.sampled_from([0.25, 0.5, 1.0, 2.0]), min_size=4, max_size=4)
VOTES = st.fixed_dictionaries(
    {
        "by": st.sampled_from(["mass", "count"]),
        "weigh": st.sampled_from(["before", "after"]),
        "divide": st.sampled_from(["weights", "counts", "none"]),
    }
)
HERE = TensorInfo("w", ("a", "b"), seed=3)


def one(values: list[float], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {"w": torch.tensor(values, dtype=dtype)}


@given(families(), WEIGHTS, VOTES, st.sampled_from([0.2, 0.5, 1.0]))
def test_ties_trims_elects_and_averages(
    family: Family, weights: list[float], vote: dict[str, Any], density: float
) -> None:
    used = weights[: len(family.experts)]
    merged = merge_state_dicts(
        "ties", family.experts, family.base, weight=used, density=density, scale=0.5, vote=vote
    )
    family.check_rest(merged)
    for key in family.keys:
        thin = np.stack([trimmed(delta, density) for delta in family.deltas(key)])
        wanted = array(family.base[key]) + 0.5 * voted(thin, used, **vote)
        family.check(merged, key, wanted)


@given(families(), st.sampled_from([0.2, 0.7]))
def test_ties_over_the_whole_model_is_the_papers_code(family: Family, density: float) -> None:
    vote = {"draw": "majority", "divide": "counts"}
    merged = merge_state_dicts(
        "ties", family.experts, family.base, density=density, trim="model", vote=vote
    )
    flat = np.concatenate([family.deltas(key) for key in family.keys], axis=1)
    size = flat.shape[1]
    thin = np.empty_like(flat)
    for row, delta in zip(thin, flat, strict=True):
        threshold = np.sort(np.abs(delta))[max(0, size - int(density * size) - 1)]
        row[:] = np.where(np.abs(delta) >= threshold, delta, 0)
    signs = np.sign(thin.sum(0))
    majority = int(np.sign(signs.sum()))
    moved = voted(thin, [1.0] * len(thin), divide="counts", draw=majority or -1)
    start = 0
    for key in family.keys:
        stop = start + family.base[key].numel()
        family.check(merged, key, array(family.base[key]) + moved[start:stop])
        start = stop


def test_the_named_options_give_different_results() -> None:
    base, first, second = one([0.0, 0.0]), one([3.0, 1.0]), one([-1.0, 2.0])
    weight = [0.2, 0.8]

    def merged(**vote: str) -> list[float]:
        found = merge_state_dicts(
            "ties", [first, second], base, density=1.0, weight=weight, vote=vote
        )
        return [round(v, 4) for v in found["w"].tolist()]

    assert merged() == [-1.0, 1.8]  # mass: .6 - .8 < 0 elects minus
    assert merged(weigh="after") == [3.0, 1.8]  # 3 - 1 > 0 elects plus
    assert merged(weigh="after", divide="counts") == [0.6, 0.9]
    assert merged(weigh="after", divide="none") == [0.6, 1.8]
    assert merged(by="count") == [3.0, 1.8]  # a draw of counts goes to plus


def test_a_draw_goes_to_plus_or_to_the_majority() -> None:
    base = one([0.0, 0.0, 0.0])
    experts = [one([1.0, -1.0, -2.0]), one([-1.0, -1.0, -2.0])]
    plus = merge_state_dicts("ties", experts, base, density=1.0)
    minus = merge_state_dicts("ties", experts, base, density=1.0, vote={"draw": "majority"})
    assert plus["w"].tolist() == [1.0, -1.0, -2.0]
    assert minus["w"].tolist() == [-1.0, -1.0, -2.0]


@given(families(), WEIGHTS, st.sampled_from([0.3, 0.6, 1.0]), st.sampled_from([0.0, 0.1, 0.5]))
def test_breadcrumbs_keep_the_band(
    family: Family, weights: list[float], density: float, gamma: float
) -> None:
    used = weights[: len(family.experts)]
    params = {"weight": used, "density": density, "gamma": gamma}
    plain = merge_state_dicts("breadcrumbs", family.experts, family.base, **params)
    vote = merge_state_dicts("breadcrumbs_ties", family.experts, family.base, **params)
    for key in family.keys:
        thin = np.stack([banded(delta, density, gamma) for delta in family.deltas(key)])
        origin = array(family.base[key])
        family.check(plain, key, origin + np.asarray(used) @ thin)
        family.check(vote, key, origin + voted(thin, used))


def test_breadcrumbs_drop_the_outliers_and_the_crumbs() -> None:
    x = torch.tensor([100.0, -50.0, 3.0, -2.0, 1.0, 0.5, 0.1, 0.0, 0.0, 0.0])
    kept = keep_band_(x, 0.3, 0.2)
    assert kept.tolist() == [0, 0, 3.0, -2.0, 1.0, 0, 0, 0, 0, 0]
    assert keep_band_(torch.ones(4), 0.5, 0.25).tolist() == [1.0] * 4  # equal ones all stay
    assert keep_band_(torch.ones(()), 0.5, 0.25).tolist() == 0.0  # half of one entry is none


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della", "della_linear"])
@pytest.mark.parametrize("rescale", ["density", "l1", "none"])
def test_dropping_leaves_the_base_or_the_rescaled_change(name: str, rescale: str) -> None:
    torch.manual_seed(0)
    base = {"w": torch.randn(40, 50)}
    expert = {"w": base["w"] + 0.1 * torch.randn(40, 50)}
    merged = merge_state_dicts(name, [expert], base, density=0.5, rescale=rescale)["w"]
    tau, moved = expert["w"] - base["w"], merged - base["w"]
    kept = moved != 0
    assert 0.45 < float(kept.double().mean()) < 0.55
    ratio = (moved / tau)[kept]
    if rescale == "none":
        wanted = torch.ones_like(ratio)
    elif rescale == "l1":
        wanted = (tau.abs().sum() / tau[kept].abs().sum()).expand_as(ratio)
    elif name.startswith("dare"):
        wanted = torch.full_like(ratio, 2.0)
    else:
        rank = tau.abs().argsort(dim=1).argsort(dim=1).float() / 49
        wanted = 1 / (0.35 + 0.3 * rank[kept])
    torch.testing.assert_close(ratio, wanted, rtol=2e-3, atol=2e-3)
    if rescale == "l1":
        assert float(moved.abs().sum()) == pytest.approx(float(tau.abs().sum()), rel=1e-4)


@pytest.mark.parametrize("name", ["dare_linear", "della_linear"])
def test_the_mean_over_seeds_is_the_expert(name: str) -> None:
    torch.manual_seed(1)
    base = {"w": torch.zeros(5, 20)}
    expert = {"w": torch.randn(5, 20)}
    total = torch.zeros(5, 20)
    for seed in range(1500):
        total += merge_state_dicts(name, [expert], base, density=0.5, seed=seed)["w"]
    error = (total / 1500 - expert["w"]) / expert["w"].abs()
    assert float(error.abs().max()) < 5 * (1 / 0.35) ** 0.5 / 1500**0.5


def test_della_keeps_large_entries_more_often() -> None:
    delta = torch.arange(1.0, 101.0).repeat(2000, 1)
    kept = rank_drop_(delta, 0.5, 0.3, "none", HERE, "a") != 0
    chance = kept.double().mean(0)
    wanted = torch.linspace(0.2, 0.8, 100, dtype=torch.float64)
    assert float((chance - wanted).abs().max()) < 5 * 0.5 / 2000**0.5


def test_della_of_scalars_and_lone_entries_uses_the_density() -> None:
    kept = [
        float(rank_drop_(torch.tensor(1.0), 0.5, 0.3, "none", TensorInfo("w", ("a",), s), "a"))
        for s in range(300)
    ]
    assert 0.4 < np.mean(kept) < 0.6
    column = rank_drop_(torch.ones(4000, 1), 0.5, 0.3, "none", HERE, "a")
    assert 0.46 < float(column.mean()) < 0.54


def test_masks_depend_on_seed_model_and_tensor_only() -> None:
    def mask(where: TensorInfo, model: str) -> Tensor:
        return drop_(torch.ones(5000), 0.5, "none", where, model)

    first = mask(HERE, "a")
    assert torch.equal(first, mask(TensorInfo("w", ("b", "a"), seed=3), "a"))
    for where, model in (
        (HERE, "b"),
        (TensorInfo("v", ("a", "b"), seed=3), "a"),
        (TensorInfo("w", ("a", "b"), seed=4), "a"),
    ):
        same = float((first == mask(where, model)).double().mean())
        assert 0.46 < same < 0.54
    piece = drop_(torch.ones(1000), 0.5, "none", TensorInfo("w", ("a",), 3, offset=1003), "a")
    assert torch.equal(piece, first[1003:2003])


@given(st.data())
def test_pcb_is_the_six_steps(data: st.DataObject) -> None:
    source = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    count, size = data.draw(st.integers(2, 5)), data.draw(st.integers(5, 60))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    options: dict[str, Any] = {
        "ratio": data.draw(st.sampled_from([0.1, 0.5, 1.0])),
        "clip": data.draw(st.sampled_from([0.0, 0.01, 0.2])),
        "inter": data.draw(st.sampled_from(["pairwise", "sum_norm", "sum_raw", "none"])),
        "intra": data.draw(st.booleans()),
        "share": data.draw(st.booleans()),
    }
    taus = source.normal(size=(count, size)) * (source.random((count, size)) > 0.1)
    base = {"w": torch.zeros(size, dtype=dtype)}
    experts = [{"w": torch.from_numpy(tau).to(dtype)} for tau in taus]
    flat = np.stack([array(expert["w"]) for expert in experts])
    wanted, _, near = pcb(flat, [1.2] * count, **options)
    merged = array(merge_state_dicts("pcb", experts, base, weight=1.2, **options)["w"])
    np.testing.assert_allclose(merged[~near], wanted[~near], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("inter", ["pairwise", "sum_norm", "sum_raw", "none"])
@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_pcb_on_continuous_values(inter: str, scope: str) -> None:
    torch.manual_seed(2)
    base = {"a": torch.randn(30, 20), "b": torch.randn(400)}
    experts = [{k: v + 0.1 * torch.randn_like(v) for k, v in base.items()} for _ in range(4)]
    weight = [1.0, 1.2, 0.8, 1.5]
    merged = merge_state_dicts(
        "pcb", experts, base, weight=weight, ratio=0.2, inter=inter, scope=scope
    )
    taus = {k: np.stack([array(e[k] - base[k]) for e in experts]) for k in base}
    if scope == "model":
        moved, shares, _ = pcb(np.concatenate(list(taus.values()), 1), weight, 0.2, 0.01, inter)
        split = {"a": moved[:600], "b": moved[600:]}
        assert ((shares > 0).sum(1) == 1000 - 1 - int(1000 * 0.8)).all()
    else:
        split = {k: pcb(tau, weight, 0.2, 0.01, inter)[0] for k, tau in taus.items()}
    for key, wanted in split.items():
        np.testing.assert_allclose(array(merged[key] - base[key]), wanted, atol=2e-5)


def test_pcb_shares_are_those_of_the_merge() -> None:
    torch.manual_seed(3)
    base = {"a": torch.randn(30, 20), "b": torch.randn(400)}
    experts = [{k: v + torch.randn_like(v) for k, v in base.items()} for _ in range(3)]
    vectors = TaskVectors.from_state_dicts(base, experts)
    method = PCB(weight=1.1, ratio=0.1)
    clamped, shares = pcb_shares(vectors, method)
    assert shares.shape == (3, 1000) and ((shares > 0).sum(1) == 99).all()
    moved = 1.1 * (clamped * shares).sum(0) / shares.sum(0).clamp(min=1e-12)
    merged = merge_state_dicts(method, experts, base)
    found = torch.cat([(merged[k] - base[k]).flatten() for k in base])
    torch.testing.assert_close(found, moved, atol=1e-5, rtol=1e-5)


def test_pcb_of_equal_experts_moves_only_the_strongest() -> None:
    torch.manual_seed(4)
    base = {"w": torch.zeros(1000)}
    expert = {"w": torch.randn(1000)}
    merged = merge_state_dicts("pcb", [expert] * 3, base, weight=1.2, clip=0.0)["w"]
    kept = merged != 0
    torch.testing.assert_close(merged[kept], 1.2 * expert["w"][kept])
    order = expert["w"].abs().argsort(descending=True)
    assert int(kept.sum()) == 99 and bool(kept[order[:99]].all())


def test_pcb_drops_a_task_that_goes_against_the_crowd() -> None:
    torch.manual_seed(5)
    agreed = torch.randn(2000)
    agreed[:100] = 3.0
    taus = agreed.repeat(4, 1) + 0.01 * torch.randn(4, 2000)
    taus[0, :100] = -5.0
    base = {"w": torch.zeros(2000)}
    vectors = TaskVectors.from_state_dicts(base, [{"w": tau} for tau in taus])
    _, shares = pcb_shares(vectors, PCB(ratio=0.2))
    assert int((shares[0, :100] > 0).sum()) == 0  # however strong it is inside its own task


def test_opposite_task_vectors_cancel_and_the_base_stays() -> None:
    torch.manual_seed(6)
    tau = torch.randn(500)
    base = {"w": torch.randn(500)}
    pair = [{"w": base["w"] + tau}, {"w": base["w"] - tau}]
    pair[1]["w"] = 2 * base["w"] - pair[0]["w"]  # exactly opposite up to rounding
    zero = {"w": torch.zeros(500)}
    merged = merge_state_dicts("pcb", [{"w": tau}, {"w": -tau}], zero)
    assert torch.equal(merged["w"], zero["w"])
    assert torch.isfinite(merge_state_dicts("pcb", pair, base)["w"]).all()


def test_pcb_names_an_expert_that_is_the_base() -> None:
    torch.manual_seed(7)
    base = {"w": torch.randn(50), "v": torch.randn(50)}
    expert = {k: v + torch.randn(50) for k, v in base.items()}
    with pytest.raises(
        MergeError, match=r"lazy: all of its changes have.*the model is the base itself"
    ):
        merge_state_dicts("pcb", [expert, base], base, names=["keen", "lazy"])
    with pytest.raises(MergeError, match="PCB-Merging merges 2 or more models"):
        merge_state_dicts("pcb", [expert], base)
    partly = {"w": base["w"], "v": expert["v"]}
    merged = merge_state_dicts("pcb", [expert, partly], base, scope="tensor")
    assert all(torch.isfinite(merged[k]).all() for k in merged)


def test_many_tasks_do_not_overflow_the_exponential() -> None:
    torch.manual_seed(8)
    base = {"w": torch.zeros(300)}
    experts = [{"w": torch.randn(300)} for _ in range(120)]
    assert torch.isfinite(merge_state_dicts("pcb", experts, base)["w"]).all()
