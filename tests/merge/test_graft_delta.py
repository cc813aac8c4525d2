"""Sparse deltas: application, files, and the algebra of regions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from polytask.errors import CheckpointError, MergeError
from polytask.merge.graft import Graft
from polytask.merge.graft_delta import Layout, SparseDelta, aligned, overlap, union

LAYOUT = Layout({"a": (4, 3), "b": (), "c": (0,), "d": (7,)})  # 20 coordinates
BASE = {"a": torch.randn(4, 3), "b": torch.randn(()), "c": torch.zeros(0), "d": torch.randn(7)}

regions = st.sets(st.integers(0, LAYOUT.size - 1))


def delta(region: set[int], name: str = "g", scale: float = 1.0) -> SparseDelta:
    """A graft whose value at coordinate i is a function of i: what one multitask model gives."""
    indices = torch.tensor(sorted(region), dtype=torch.int64)
    return SparseDelta(LAYOUT, indices, scale * (indices + 1).float(), facts={"name": name})


def region_of(graft: SparseDelta) -> set[int]:
    return set(graft.indices.tolist())


def test_a_layout_counts_tensors_in_the_order_of_their_names() -> None:
    assert LAYOUT.size == 20
    assert LAYOUT.starts == {"a": 0, "b": 12, "c": 13, "d": 13}
    pieces = list(LAYOUT.pieces(torch.tensor([0, 11, 12, 13, 19])))
    assert [(n, p.tolist()) for n, _, p in pieces] == [("a", [0, 11]), ("b", [0]), ("d", [0, 6])]
    assert LAYOUT.counts(torch.tensor([0, 11, 12])) == {"a": 2, "b": 1, "c": 0, "d": 0}


@settings(max_examples=50, deadline=None)
@given(regions)
def test_apply_adds_the_values_there_and_nothing_elsewhere(region: set[int]) -> None:
    made = delta(region).apply(BASE)
    before = torch.cat([BASE[n].reshape(-1) for n in sorted(BASE)])
    after = torch.cat([made[n].reshape(-1) for n in sorted(BASE)])
    expected = before.clone()
    for i in region:
        expected[i] += i + 1
    assert torch.equal(after, expected)


@settings(max_examples=80, deadline=None)
@given(regions, regions, regions)
def test_regions_of_one_model_form_a_set_algebra(a: set[int], b: set[int], c: set[int]) -> None:
    one, two, three = delta(a), delta(b), delta(c)
    both = union([one, two])
    assert region_of(both) == a | b
    assert torch.equal(both.values, union([two, one]).values)  # commutes: values agree
    left, right = union([union([one, two]), three]), union([one, union([two, three])])
    assert torch.equal(left.indices, right.indices)
    assert torch.equal(left.values, right.values)
    assert region_of(union([one, one])) == a
    assert region_of(one.within(two)) == a & b
    assert region_of(one.without(two)) == a - b
    for conflict in ("last", "mean"):
        assert torch.equal(union([one, two], conflict).values, both.values)


@settings(max_examples=50, deadline=None)
@given(regions, regions)
def test_conflicting_values_go_to_first_last_mean_or_sum(a: set[int], b: set[int]) -> None:
    one, two = delta(a), delta(b, scale=3.0)
    expected = {
        "first": lambda i: (i + 1) * (1 if i in a else 3),
        "last": lambda i: (i + 1) * (3 if i in b else 1),
        "sum": lambda i: (i + 1) * ((i in a) + 3 * (i in b)),
        "mean": lambda i: (i + 1) * ((i in a) + 3 * (i in b)) / ((i in a) + (i in b)),
    }
    for conflict, value in expected.items():
        made = union([one, two], conflict)  # type: ignore[arg-type]
        assert made.values.tolist() == [value(i) for i in sorted(a | b)]


@settings(max_examples=50, deadline=None)
@given(regions, regions)
def test_purging_a_grafted_region_gives_the_base_back_exactly(a: set[int], b: set[int]) -> None:
    grafted = union([delta(a), delta(b)]).apply(BASE)
    purged = delta(a).purge(grafted, BASE)
    rest = delta(b).without(delta(a)).apply(BASE)
    for name in BASE:
        assert torch.equal(purged[name], rest[name])


def test_overlap_is_the_papers_matrix() -> None:
    found = overlap([delta({0, 1, 2, 3}), delta({2, 3}), delta({9})])
    expected = [[1.0, 1.0, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 1.0]]
    assert found.tolist() == expected  # row i, column j: |i and j| / |j|
    assert torch.isnan(overlap([delta({1}), delta(set())])[0, 1])
    assert overlap([]).shape == (0, 0)


def test_grafts_over_different_tensors_of_one_base_are_aligned() -> None:
    small = SparseDelta(Layout({"d": (7,)}), torch.tensor([0, 6]), torch.tensor([1.0, 2.0]))
    one, two = aligned([small, delta({13, 19})])
    assert torch.equal(one.indices, two.indices)
    assert overlap([small, delta({13})]).tolist() == [[1.0, 1.0], [0.5, 1.0]]
    other = SparseDelta(Layout({"d": (8,)}), torch.tensor([0]), torch.tensor([1.0]))
    with pytest.raises(MergeError, match=r"'d' has shape \(7,\) in graft and \(8,\)"):
        union([small, other])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_file_gives_back_what_was_saved(tmp_path: Path, dtype: torch.dtype) -> None:
    tuned = {k: v + 1 for k, v in BASE.items()}
    graft = Graft.between(BASE, tuned, count=6)
    made = graft.sparse(graft.gamma_b, "spam").to(dtype)
    path = tmp_path / "spam.safetensors"
    made.save(path)
    back = SparseDelta.load(path)
    assert back.facts == made.facts
    assert back.layout == made.layout
    for mine, theirs in ((back.indices, made.indices), (back.values, made.values)):
        assert torch.equal(mine, theirs)
        assert mine.dtype == theirs.dtype
    assert back.origin is not None and made.origin is not None
    assert torch.equal(back.origin, made.origin)
    assert path.stat().st_size < 1000
    for name, tensor in made.apply(BASE).items():
        assert torch.equal(tensor, back.apply(BASE)[name])


def test_a_full_graft_is_the_fine_tuned_model_bit_for_bit_in_bfloat16() -> None:
    base = {"w": torch.randn(1000).bfloat16()}
    tuned = {"w": base["w"] + (0.01 * torch.randn(1000)).bfloat16()}
    graft = Graft.between(base, tuned, sparsity=1.0)
    made = graft.sparse(torch.ones(graft.size, dtype=torch.bool)).apply(base)
    assert made["w"].dtype == torch.bfloat16
    assert torch.equal(made["w"], tuned["w"])


def test_values_that_do_not_fit_a_type_are_refused() -> None:
    with pytest.raises(MergeError, match="infinite values"):
        SparseDelta(LAYOUT, torch.tensor([0]), torch.tensor([1e6])).to(torch.float16)


def test_another_base_is_recognised_and_a_rounded_one_is_not_mistaken() -> None:
    tuned = {k: v + 1 for k, v in BASE.items()}
    graft = Graft.between(BASE, tuned, count=12)
    made = graft.sparse(graft.gamma_b)
    for dtype in (torch.float16, torch.bfloat16):
        made.apply({k: v.to(dtype) for k, v in BASE.items()})
    other = {k: torch.randn(v.shape) for k, v in BASE.items()}
    with pytest.raises(MergeError, match="cut from another base: 1"):
        made.apply(other)
    made.apply(other, check=False)


def test_tied_names_stay_tied_and_the_model_is_not_changed() -> None:
    shared = torch.zeros(4)
    base = {"embed": shared, "head": shared}
    made = SparseDelta(Layout({"embed": (4,)}), torch.tensor([1]), torch.tensor([2.0])).apply(base)
    assert made["head"] is made["embed"]
    assert made["embed"].tolist() == [0, 2, 0, 0]
    assert not shared.any()


def test_from_model_cuts_the_same_region_out_of_another_model() -> None:
    other = {k: v * 3 for k, v in BASE.items()}
    cut = delta({0, 12, 19}).from_model(other, BASE)
    flat = torch.cat([BASE[n].reshape(-1) for n in sorted(BASE)])
    assert torch.allclose(cut.values, 2 * flat[[0, 12, 19]])


def test_heads_that_differ_cannot_be_united() -> None:
    from dataclasses import replace

    one = replace(delta({0}, "spam"), dense={"head": torch.zeros(2)})
    two = replace(delta({1}, "topic"), dense={"head": torch.ones(2)})
    with pytest.raises(MergeError, match=r"'head'.*differs between the grafts"):
        union([one, two])
    assert union([one, one]).dense.keys() == {"head"}


def test_mistakes_are_named(tmp_path: Path) -> None:
    one = torch.tensor([1.0])
    with pytest.raises(MergeError, match="must ascend"):
        SparseDelta(LAYOUT, torch.tensor([3, 3]), torch.tensor([1.0, 2.0]))
    with pytest.raises(MergeError, match="outside of its 20"):
        SparseDelta(LAYOUT, torch.tensor([20]), one)
    with pytest.raises(MergeError, match="one value for each"):
        SparseDelta(LAYOUT, torch.tensor([1, 2]), one)
    with pytest.raises(MergeError, match="holds NaN"):
        SparseDelta(LAYOUT, torch.tensor([1]), torch.tensor([float("nan")]))
    with pytest.raises(MergeError, match="nothing to unite"):
        union([])
    with pytest.raises(MergeError, match="no tensor 'd'"):
        delta({19}).apply({k: v for k, v in BASE.items() if k != "d"})
    with pytest.raises(MergeError, match=r"tensor 'd' of the model has shape \(8,\)"):
        delta({19}).apply({**BASE, "d": torch.zeros(8)})
    with pytest.raises(CheckpointError, match="there is no graft file"):
        SparseDelta.load(tmp_path / "none.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(CheckpointError, match="cannot be read as a graft"):
        SparseDelta.load(tmp_path / "torn.safetensors")
    save_file({"w": one}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="no graft"):
        SparseDelta.load(tmp_path / "model.safetensors")
