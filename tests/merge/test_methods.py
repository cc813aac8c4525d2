"""Averages, merges on the sphere, Fisher and RegMean against slow references."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from merge_references import Family, array, families, slerp
from torch import Tensor

from polytask.errors import ConfigError, MergeError
from polytask.merge import METHODS, make_method, merge_state_dicts
from polytask.merge.methods.averages import ema_weights

WEIGHTS = st.lists(st.sampled_from([0.25, 0.5, 1.0, 2.0]), min_size=4, max_size=4)


def pair(a: list[float], b: list[float]) -> list[dict[str, Tensor]]:
    return [{"w": torch.tensor(a)}, {"w": torch.tensor(b)}]


@given(families(), WEIGHTS, st.booleans())
def test_linear_and_average_are_weighted_sums(
    family: Family, weights: list[float], normalize: bool
) -> None:
    used = weights[: len(family.experts)]
    merged = merge_state_dicts(
        "linear", family.experts, weight=used, normalize=normalize, dtype=family.dtype
    )
    mean = merge_state_dicts("average", family.experts, family.base)
    for key in family.keys:
        models = np.stack([array(expert[key]) for expert in family.experts])
        wanted = np.asarray(used) @ models
        family.check(merged, key, wanted / sum(used) if normalize else wanted)
        family.check(mean, key, models.mean(0))
    family.check_rest(mean)


@given(families(), WEIGHTS, st.booleans())
def test_task_arithmetic_adds_scaled_task_vectors(
    family: Family, weights: list[float], normalize: bool
) -> None:
    used = weights[: len(family.experts)]
    merged = merge_state_dicts(
        "task_arithmetic", family.experts, family.base, weight=used, scale=0.5, normalize=normalize
    )
    family.check_rest(merged)
    for key in family.keys:
        moved = np.asarray(used) @ family.deltas(key) * 0.5
        moved = moved / sum(used) if normalize else moved
        family.check(merged, key, array(family.base[key]) + moved)


def test_a_negative_weight_forgets_a_task() -> None:
    base, expert = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([2.0, 0.0])}
    merged = merge_state_dicts("task_arithmetic", [expert], base, weight=-1.0)
    assert merged["w"].tolist() == [0.0, 4.0]


@given(st.integers(1, 6), st.floats(0, 0.99))
def test_ema_weights_are_those_of_the_recursion(count: int, decay: float) -> None:
    unit = np.eye(count)
    state = unit[0]
    for step in unit[1:]:
        state = decay * state + (1 - decay) * step
    assert ema_weights(count, decay) == pytest.approx(state.tolist())
    states = [{"w": torch.tensor(row)} for row in unit]
    merged = merge_state_dicts("ema", states, decay=decay)
    assert merged["w"].tolist() == pytest.approx(state.tolist())


def test_ratatouille_counts_each_training_once() -> None:
    states = [{"w": torch.tensor(value)} for value in (0.0, 3.0, 10.0)]
    runs = ["a", "a", "b"]
    assert float(merge_state_dicts("ratatouille", states, runs=runs)["w"]) == 5.75
    ema = merge_state_dicts("ratatouille", states, runs=runs, inside="ema", decay=0.5)
    assert float(ema["w"]) == 5.75
    ema = merge_state_dicts("ratatouille", states, runs=runs, inside="ema", decay=0.75)
    assert float(ema["w"]) == pytest.approx((0.25 * 3 + 10) / 2)
    assert float(merge_state_dicts("ratatouille", states)["w"]) == pytest.approx(13 / 3)
    with pytest.raises(ConfigError, match="2 names for 3 models"):
        merge_state_dicts("ratatouille", states, runs=["a", "b"])


@given(families(least=2, most=2), st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_slerp_is_shoemakes_formula(family: Family, t: float) -> None:
    merged = merge_state_dicts("slerp", family.experts, family.base, t=t)
    family.check_rest(merged)
    for key in family.keys:
        a, b = (array(expert[key]) for expert in family.experts)
        family.check(merged, key, slerp(a, b, t))


@given(families(least=2, most=2), st.sampled_from([0.25, 1.0, 3.0]))
def test_nuslerp_turns_task_vectors(family: Family, weight: float) -> None:
    merged = merge_state_dicts("nuslerp", family.experts, family.base, weight=[1.0, weight])
    for key in family.keys:
        a, b = family.deltas(key)
        moved = slerp(a, b, weight / (1 + weight), 1 - 1e-12)
        family.check(merged, key, array(family.base[key]) + moved)


@pytest.mark.parametrize(("vectors", "axis"), [("rows", 1), ("columns", 0)])
def test_nuslerp_of_rows_or_columns(vectors: str, axis: int) -> None:
    torch.manual_seed(0)
    models = [{"w": torch.randn(4, 3)} for _ in range(2)]
    merged = merge_state_dicts("nuslerp", models, weight=[1.0, 2.0], vectors=vectors)["w"]
    a, b = (model["w"].double().numpy() for model in models)
    for place in range(a.shape[1 - axis]):
        pick = (place, slice(None)) if axis == 1 else (slice(None), place)
        wanted = slerp(a[pick], b[pick], 2 / 3)
        np.testing.assert_allclose(merged.numpy()[pick], wanted, rtol=1e-5, atol=1e-6)
    kernel = [{"w": torch.randn(4, 3, 2)} for _ in range(2)]
    assert merge_state_dicts("nuslerp", kernel, vectors=vectors)["w"].shape == (4, 3, 2)


def test_the_karcher_mean_of_two_of_equal_length_is_slerp() -> None:
    torch.manual_seed(1)
    models = [{"w": v / v.norm() * 3} for v in torch.randn(2, 50)]
    merged = merge_state_dicts("karcher", models, weight=[0.3, 0.7])["w"]
    wanted = slerp(array(models[0]["w"]), array(models[1]["w"]), 0.7)
    np.testing.assert_allclose(merged.numpy(), wanted, rtol=0, atol=1e-6)


def test_the_karcher_mean_balances_the_directions_to_the_models() -> None:
    torch.manual_seed(2)
    models = [{"w": v} for v in torch.randn(4, 30) + 0.5]
    weights = np.array([0.1, 0.2, 0.3, 0.4])
    merged = array(merge_state_dicts("karcher", models, weight=weights.tolist())["w"])
    lengths = [np.linalg.norm(array(model["w"])) for model in models]
    assert np.linalg.norm(merged) == pytest.approx(weights @ lengths, rel=1e-6)
    mean = merged / np.linalg.norm(merged)
    pull = np.zeros(30)
    for weight, model, length in zip(weights, models, lengths, strict=True):
        unit = array(model["w"]) / length
        angle = np.arccos(unit @ mean)
        pull += weight * angle / np.sin(angle) * (unit - (unit @ mean) * mean)
    assert np.linalg.norm(pull) < 1e-6


def test_the_sphere_has_defined_poles() -> None:
    zero = merge_state_dicts("karcher", pair([0.0, 0.0], [0.0, 2.0]))["w"]
    assert zero.tolist() == [0.0, 1.0]  # direction of the one that has one, mean length
    assert merge_state_dicts("karcher", pair([0.0], [0.0]))["w"].tolist() == [0.0]
    opposite = merge_state_dicts("karcher", pair([2.0, 0.0], [-2.0, 0.0]))["w"]
    assert opposite.tolist() == [2.0, 0.0]
    assert merge_state_dicts("slerp", pair([0.0, 0.0], [0.0, 2.0]))["w"].tolist() == [0.0, 1.0]
    assert merge_state_dicts("slerp", pair([1.0], [-1.0]), t=0.25)["w"].tolist() == [0.5]
    assert merge_state_dicts("multislerp", pair([1.0, 0.0], [-1.0, 0.0]))["w"].tolist() == [0, 0]
    three = [{"w": torch.tensor([np.cos(a), np.sin(a)])} for a in np.arange(3) * 2 * np.pi / 3]
    with pytest.raises(MergeError, match="tensor 'w' the weighted directions of the models cancel"):
        merge_state_dicts("multislerp", three)


def test_multislerp_points_along_the_mean_of_directions_with_the_mean_length() -> None:
    torch.manual_seed(3)
    models = [{"w": v} for v in torch.randn(3, 40) + 1]
    weights = np.array([0.5, 0.2, 0.3])
    merged = array(merge_state_dicts("multislerp", models, weight=weights.tolist())["w"])
    lengths = np.array([np.linalg.norm(array(model["w"])) for model in models])
    along = sum(w * array(m["w"]) / n for w, m, n in zip(weights, models, lengths, strict=True))
    wanted = along / np.linalg.norm(along) * (weights @ lengths)
    np.testing.assert_allclose(merged, wanted, rtol=1e-5, atol=1e-6)


@given(families(least=2))
def test_model_stock_interpolates_by_the_mean_angle(family: Family) -> None:
    merged = merge_state_dicts("model_stock", family.experts, family.base)
    for key in family.keys:
        deltas = family.deltas(key)
        count = len(deltas)
        cosines = []
        for i in range(count):
            for j in range(i + 1, count):
                lengths = np.linalg.norm(deltas[i]) * np.linalg.norm(deltas[j])
                cosines.append(deltas[i] @ deltas[j] / lengths if lengths else 0.0)
        cosine = float(np.mean(cosines))
        below = 1 + (count - 1) * cosine
        if abs(below) < 1e-3:
            continue  # near the pole any rounding shows; the pole itself is tested below
        wanted = array(family.base[key]) + count * cosine / below * deltas.mean(0)
        scale = max(1.0, 1 / abs(below))
        np.testing.assert_allclose(array(merged[key]), wanted, atol=0.02 * scale, rtol=0.01)
        if family.dtype == torch.float32:
            np.testing.assert_allclose(array(merged[key]), wanted, atol=1e-5 * scale, rtol=1e-5)


def test_model_stock_keeps_the_base_at_the_pole_and_works_by_rows() -> None:
    base = {"w": torch.tensor([5.0, 5.0])}
    opposite = pair([6.0, 5.0], [4.0, 5.0])
    assert merge_state_dicts("model_stock", opposite, base)["w"].tolist() == [5.0, 5.0]
    torch.manual_seed(4)
    origin, models = torch.randn(3, 6), torch.randn(3, 3, 6)
    rows = merge_state_dicts(
        "model_stock", [{"w": m} for m in models], {"w": origin}, vectors="rows"
    )["w"]
    for row in range(3):
        one = merge_state_dicts("model_stock", [{"w": m[row]} for m in models], {"w": origin[row]})[
            "w"
        ]
        torch.testing.assert_close(rows[row], one)


@given(families(), WEIGHTS)
def test_fisher_weighs_each_coordinate(family: Family, weights: list[float]) -> None:
    rng = np.random.default_rng(0)
    used = weights[: len(family.experts)]
    fishers = []
    for expert in family.experts:
        values = {k: np.exp(rng.normal(-8, 4, tuple(expert[k].shape))) for k in family.keys}
        fishers.append({k: torch.from_numpy(np.asarray(v)) for k, v in values.items()})
    merged = merge_state_dicts("fisher", family.experts, extras=fishers, weight=used)
    for key in family.keys:
        models = np.stack([array(expert[key]) for expert in family.experts])
        shares = np.stack(
            [w * array(f[key]).clip(1e-6) for w, f in zip(used, fishers, strict=True)]
        )
        family.check(merged, key, (shares * models).sum(0) / shares.sum(0))


def test_fisher_without_interest_is_the_average_and_faults_are_named() -> None:
    models = pair([1.0, 2.0], [3.0, 6.0])
    zeros = [{"w": torch.zeros(2)}] * 2
    assert merge_state_dicts("fisher", models, extras=zeros)["w"].tolist() == [2.0, 4.0]
    with pytest.raises(MergeError, match="needs a 'fisher' statistic"):
        merge_state_dicts("fisher", models)
    with pytest.raises(MergeError, match="no Fisher information for tensor 'w'"):
        merge_state_dicts("fisher", models, extras=[{}, {}])
    plain = merge_state_dicts("fisher", models, extras=[{}, {}], missing="average")
    assert plain["w"].tolist() == [2.0, 4.0]
    for wrong, said in (
        (torch.ones(3), r"has shape \(3,\), the tensor has \(2,\)"),
        (torch.tensor([-1.0, 1.0]), "'w' is negative"),
        (torch.tensor([float("nan"), 1.0]), "holds NaN"),
    ):
        with pytest.raises(MergeError, match=f"expert 2.*{said}"):
            merge_state_dicts("fisher", models, extras=[zeros[0], {"w": wrong}])


def test_regmean_minimises_the_distance_to_each_models_outputs() -> None:
    torch.manual_seed(5)
    inputs = [torch.randn(60, 5) @ torch.randn(5, 5) for _ in range(3)]
    models = [{"w": torch.randn(4, 5), "b": torch.randn(4)} for _ in range(3)]
    grams = [{"w": x.T @ x} for x in inputs]
    merged = merge_state_dicts("regmean", models, extras=grams, reduce=1.0)
    stacked = torch.cat(inputs).double()
    wanted = torch.cat([x @ m["w"].T for x, m in zip(inputs, models, strict=True)]).double()
    least = torch.linalg.lstsq(stacked, wanted).solution.T
    torch.testing.assert_close(merged["w"].double(), least, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merged["b"], sum(m["b"] for m in models) / 3)
    turned = [{"w": m["w"].T.contiguous(), "b": m["b"]} for m in models]
    first = merge_state_dicts("regmean", turned, extras=grams, reduce=1.0, inputs="first")
    torch.testing.assert_close(first["w"].T, merged["w"])


def test_regmean_reduces_the_off_diagonal_and_averages_inputs_that_never_occurred() -> None:
    torch.manual_seed(6)
    x = torch.randn(2, 30, 3)
    grams = [each.T @ each for each in x]
    models = [{"w": torch.randn(2, 3)} for _ in range(2)]
    merged = merge_state_dicts("regmean", models, extras=[{"w": g} for g in grams], reduce=0.0)
    shares = torch.stack([g.diagonal() for g in grams])
    wanted = sum(m["w"] * s for m, s in zip(models, shares, strict=True)) / shares.sum(0)
    torch.testing.assert_close(merged["w"], wanted, rtol=1e-5, atol=1e-6)
    for gram in grams:
        gram[2], gram[:, 2] = 0, 0
    merged = merge_state_dicts("regmean", models, extras=[{"w": g} for g in grams])
    mean = (models[0]["w"][:, 2] + models[1]["w"][:, 2]) / 2
    torch.testing.assert_close(merged["w"][:, 2], mean, rtol=1e-2, atol=1e-2)
    none = merge_state_dicts("regmean", models, extras=[{"w": torch.zeros(3, 3)}] * 2)
    torch.testing.assert_close(none["w"], (models[0]["w"] + models[1]["w"]) / 2)
    with pytest.raises(MergeError, match=r"gram matrix of 'w' has shape \(2, 2\)"):
        merge_state_dicts("regmean", models, extras=[{"w": torch.ones(2, 2)}] * 2)


@pytest.mark.parametrize(
    ("name", "params", "error", "said"),
    [
        ("tise", {}, ConfigError, "unknown merging method 'tise'. Did you mean 'ties'"),
        ("ties", {"densty": 0.2}, ConfigError, "unknown key 'densty'. Did you mean 'density'"),
        ("ties", {"density": 0.0}, ConfigError, "density"),
        ("ties", {"density": 1.1}, ConfigError, "density"),
        ("ties", {"vote": {"dvide": "none"}}, ConfigError, "Did you mean 'divide'"),
        ("ties", {"weight": [1, 2, 3]}, ConfigError, "'weight' has 3 values for 2 models"),
        ("ties", {"weight": [1, -1]}, ConfigError, "dividing by the weights"),
        ("ties", {"normalize": True}, ConfigError, "with a vote"),
        ("linear", {"weight": [1, -1]}, ConfigError, "add up to zero"),
        ("linear", {"weight": float("nan")}, ConfigError, "weight"),
        ("karcher", {"weight": [1, -1]}, ConfigError, "must not be negative"),
        ("della", {"density": 0.9}, ConfigError, "must lie between 0 and 1"),
        ("pcb", {"ratio": 0.0}, ConfigError, "ratio"),
        ("slerp", {"t": 2}, ConfigError, "t"),
    ],
)
def test_parameters_that_cannot_work_are_named(
    name: str, params: dict[str, Any], error: type[Exception], said: str
) -> None:
    models = pair([1.0, 2.0], [3.0, 5.0])
    with pytest.raises(error, match=said):
        merge_state_dicts(name, models, {"w": torch.zeros(2)}, **params)


def test_numbers_of_models_and_a_missing_base_are_checked() -> None:
    three = [{"w": torch.ones(1)}] * 3
    with pytest.raises(MergeError, match="SLERP merges 2 models, got 3"):
        merge_state_dicts("slerp", three)
    with pytest.raises(MergeError, match="Model stock merges 2 or more models, got 1"):
        merge_state_dicts("model_stock", three[:1], three[0])
    with pytest.raises(MergeError, match="TIES works on what training added to a base"):
        merge_state_dicts("ties", three)
    with pytest.raises(ConfigError, match="parameters go into the method"):
        merge_state_dicts(make_method("average", {}), three, weight=1)
    with pytest.raises(MergeError, match="1 sets of statistics for 3"):
        merge_state_dicts("fisher", three, extras=[{}])


def test_a_result_that_overflows_its_type_names_the_tensor() -> None:
    base = {"w": torch.zeros(1, dtype=torch.float16)}
    expert = {"w": torch.tensor([60000.0], dtype=torch.float16)}
    with pytest.raises(MergeError, match=r"'w' does not fit into torch.float16"):
        merge_state_dicts("task_arithmetic", [expert, expert], base, weight=1.0)
    wide = merge_state_dicts(
        "task_arithmetic", [expert, expert], base, weight=1.0, dtype=torch.float32
    )
    assert wide["w"].tolist() == [120000.0]


def test_chosen_keys_only_are_merged() -> None:
    base = {"a": torch.zeros(2), "b": torch.zeros(2), "n": torch.tensor(1)}
    expert = {"a": torch.ones(2), "b": torch.ones(2), "n": torch.tensor(2)}
    merged = merge_state_dicts("task_arithmetic", [expert], base, keys=["a"], weight=1.0)
    assert merged["a"].tolist() == [1, 1] and merged["b"].tolist() == [0, 0]
    for key, said in (("c", "no tensor 'c'"), ("n", "cannot be merged")):
        with pytest.raises(MergeError, match=said):
            merge_state_dicts("average", [expert], base, keys=[key])


def test_one_tensor_may_have_other_parameters_where_that_makes_sense() -> None:
    method = make_method("ties", {"trim": "model"})
    assert method.at() is method
    assert method.at(weight=(0.5, 2.0)).weight == (0.5, 2.0)  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="TIES: 'density' must be the same for all tensors"):
        method.at(density=0.3)
    with pytest.raises(ConfigError, match="'wieght' is not one of its parameters"):
        method.at(wieght=1.0)
    with pytest.raises(ConfigError, match="weight"):
        method.at(weight=float("inf"))


@pytest.mark.parametrize("name", METHODS.names())
def test_inputs_are_never_written_to(name: str) -> None:
    torch.manual_seed(7)
    base = {"w": torch.randn(6, 5), "b": torch.randn(6)}
    experts = [{k: v + torch.randn_like(v) for k, v in base.items()} for _ in range(2)]
    kept = [{k: v.clone() for k, v in state.items()} for state in (base, *experts)]
    extras = {"fisher": [kept[1], kept[2]], "gram": [{"w": torch.eye(5)}] * 2}
    statistic = METHODS.get(name).extra
    given = [{k: v.abs() for k, v in e.items()} for e in extras[statistic]] if statistic else None
    merge_state_dicts(name, experts, base, extras=given)
    for state, copy in zip((base, *experts), kept, strict=True):
        assert all(torch.equal(state[k], copy[k]) for k in copy)
