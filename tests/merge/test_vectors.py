"""Task vectors and what must be alike to have them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from merge_references import Family, families
from torch import Tensor

from polytask.errors import MergeError
from polytask.merge import TaskVectors, check_alike, merge_keys, ties_vectors
from polytask.merge.vectors import tied_names


def state(**changes: Tensor) -> dict[str, Tensor]:
    shared = torch.arange(6.0).reshape(2, 3)
    plain = {"a": shared, "b": torch.tensor(2.0), "head": shared, "n": torch.tensor(4)}
    return {**plain, **changes}


def test_floats_take_part_and_tied_storages_once() -> None:
    assert merge_keys(state()) == ("a", "b")
    assert tied_names(state()) == {"head": "a"}
    weight = torch.ones(2)
    assert tied_names({"a": weight, "tok_embeddings": weight}) == {"a": "tok_embeddings"}
    shifted = torch.arange(7.0)
    assert tied_names({"x": shifted[:6], "y": shifted[1:]}) == {}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"c": torch.ones(1)}, "second: tensor 'c' is not in the base"),
        ({"a": torch.ones(3, 2)}, r"second: tensor 'a' has shape \(3, 2\), the base's has \(2, 3"),
        ({"b": torch.tensor(2)}, "second: tensor 'b' has type torch.int64"),
    ],
)
def test_unlike_experts_are_named(changes: dict[str, Tensor], said: str) -> None:
    with pytest.raises(MergeError, match=said):
        check_alike(state(), [state(), state(**changes)], ["first", "second"])


def test_an_expert_that_broke_a_tie_of_the_base_is_named() -> None:
    with pytest.raises(MergeError, match=r"expert 1: 'head' and 'a' are one tensor in the base"):
        check_alike(state(), [state(head=torch.zeros(2, 3))])
    check_alike(state(), [state(head=state()["a"].clone())])


def test_a_missing_tensor_and_no_experts_are_errors() -> None:
    lacking = state()
    del lacking["b"]
    with pytest.raises(MergeError, match="expert 1: tensor 'b' of the base is missing"):
        check_alike(state(), [lacking])
    with pytest.raises(MergeError, match="no expert"):
        check_alike(state(), [])
    with pytest.raises(MergeError, match="2 experts were given, but 1 names"):
        check_alike(state(), [state(), state()], ["x"])


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "NaN"), (float("inf"), "infinite")])
def test_values_that_are_not_finite_name_tensor_and_model(value: float, kind: str) -> None:
    with pytest.raises(MergeError, match=f"mine: tensor 'b' holds {kind}"):
        TaskVectors.from_state_dicts(state(), [state(b=torch.tensor(value))], names=["mine"])
    with pytest.raises(MergeError, match="the base: tensor 'b'"):
        TaskVectors.from_state_dicts(state(b=torch.tensor(value)), [state()])


def test_keys_and_names_are_checked() -> None:
    with pytest.raises(MergeError, match=r"no tensor 'aa' in the base. Did you mean 'a'"):
        TaskVectors.from_state_dicts(state(), [state()], keys=["aa"])
    with pytest.raises(MergeError, match=r"'n' holds torch.int64"):
        TaskVectors.from_state_dicts(state(), [state()], keys=["n"])
    with pytest.raises(MergeError, match="a name of its own"):
        TaskVectors.from_state_dicts(state(), [state(), state()], names=["x", "x"])
    with pytest.raises(MergeError, match="no floating-point tensor"):
        TaskVectors.from_state_dicts({"n": torch.tensor(1)}, [{"n": torch.tensor(2)}])


@given(families())
def test_adding_each_vector_gives_its_expert_back(family: Family) -> None:
    vectors = TaskVectors.from_state_dicts(family.base, family.experts)
    assert list(vectors.deltas) == family.keys and len(vectors) == len(family.experts)
    for k, expert in enumerate(family.experts):
        chosen = torch.zeros(len(vectors))
        chosen[k] = 1
        made = vectors.add(chosen)
        family.check_rest(made)
        for key in family.keys:
            torch.testing.assert_close(made[key], expert[key].to(made[key]), rtol=0, atol=1e-6)


@given(families())
def test_flattening_can_be_undone(family: Family) -> None:
    vectors = TaskVectors.from_state_dicts(family.base, family.experts)
    flat = vectors.flatten()
    assert flat.shape[0] == len(vectors)
    for key, delta in vectors.unflatten(flat).items():
        assert torch.equal(delta, vectors.deltas[key])
    for key, one in vectors.unflatten(flat[0]).items():
        assert torch.equal(one, vectors.deltas[key][0])
    with pytest.raises(MergeError, match="values is needed"):
        vectors.unflatten(flat[:, :-1])


def test_adding_is_differentiable_per_tensor_and_per_task() -> None:
    experts = [state(a=torch.randn(2, 3)), state(b=torch.tensor(5.0))]
    for expert in experts:
        expert["head"] = expert["a"]
    vectors = TaskVectors.from_state_dicts(state(), experts)
    weights = {key: torch.tensor([0.3, 0.2], requires_grad=True) for key in vectors.deltas}
    made = vectors.add(weights)
    assert made["head"] is made["a"]
    (made["a"].square().sum() + made["b"] * 2).backward()
    gradient = [(2 * made["a"] * delta).sum() for delta in vectors.deltas["a"]]
    torch.testing.assert_close(weights["a"].grad, torch.stack(gradient).detach())
    assert weights["b"].grad is not None and weights["b"].grad.tolist() == [0.0, 6.0]


def test_coefficients_that_do_not_fit_are_named() -> None:
    vectors = TaskVectors.from_state_dicts(state(), [state(), state()])
    assert torch.equal(vectors.add(0.5)["a"], state()["a"])
    with pytest.raises(MergeError, match="2 coefficients are needed"):
        vectors.add(torch.ones(3))
    with pytest.raises(MergeError, match="no coefficients for tensor 'b'"):
        vectors.add({"a": torch.ones(2)})


def official_ties(flat: Tensor, keep: float) -> Tensor:
    """Trim and elect as the code of the TIES paper does, by sorting."""
    count = flat.shape[1]
    rank = max(1, count - int(keep * count))
    thresholds = flat.abs().sort(dim=1).values[:, rank - 1 : rank]
    kept = torch.where(flat.abs() >= thresholds, flat, torch.zeros(()))
    sign = kept.sum(0).sign()
    sign[sign == 0] = sign.sum().sign()
    return torch.where(torch.where(sign > 0, kept > 0, kept < 0), kept, torch.zeros(()))


@given(families())
def test_ties_vectors_equal_the_official_preprocessing(family: Family) -> None:
    vectors = TaskVectors.from_state_dicts(family.base, family.experts)
    for keep in (0.2, 0.7, 1.0):
        found = ties_vectors(vectors, keep).flatten()
        assert torch.equal(found.float(), official_ties(vectors.flatten().float(), keep))


def test_ties_vectors_leave_their_input_alone() -> None:
    experts = [state(a=torch.tensor([[1.0, -2.0, 3.0], [0.0, 5.0, 5.5]])), state()]
    for expert in experts:
        expert["head"] = expert["a"]
    vectors = TaskVectors.from_state_dicts(state(), experts)
    before = vectors.flatten()
    ties_vectors(vectors, 0.5)
    assert torch.equal(vectors.flatten(), before)
    with pytest.raises(MergeError, match="keep is a fraction"):
        ties_vectors(vectors, 0.0)
