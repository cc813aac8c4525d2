"""Continual grafts: no forgetting by construction, claims, the folder; and where bits lie."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from polytask.errors import CheckpointError, MergeError
from polytask.merge.graft import Graft
from polytask.merge.graft_continual import GraftMemory
from polytask.merge.graft_delta import Layout, SparseDelta, overlap
from polytask.merge.graft_map import ModuleBits, bits_by_module, place_of

State = dict[str, Tensor]


def model(seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(5, 4, generator=generator), "b": torch.randn(10, generator=generator)}


def learn(memory: GraftMemory, name: str, tuned: State, **options: object) -> GraftMemory:
    graft = Graft.between(memory.base, tuned, count=8, **options)  # type: ignore[arg-type]
    return memory.learn(name, graft.sparse(graft.gamma_b), tuned)


def test_a_known_task_is_not_forgotten_whatever_comes_later() -> None:
    memory = learn(GraftMemory(model(0)), "spam", model(1))
    before = memory.task("spam")
    for number, name in enumerate(("topic", "tone"), start=2):
        memory = learn(memory, name, model(number))
    for key, tensor in memory.task("spam").items():
        assert torch.equal(tensor, before[key])


def test_the_union_gives_a_coordinate_to_who_claimed_it_first() -> None:
    memory = learn(learn(GraftMemory(model(0)), "spam", model(1)), "topic", model(2))
    first, second = memory.grafts
    merged = memory.merged()
    assert torch.allclose(first.taken(merged), first.taken(model(1)))
    rest = second.without(first)
    assert torch.allclose(rest.taken(merged), rest.taken(model(2)))
    assert torch.allclose(second.taken(memory.merged("last")), second.taken(model(2)))


def test_later_tasks_can_be_kept_off_claimed_regions() -> None:
    memory = learn(GraftMemory(model(0)), "spam", model(1))
    assert memory.claimed() is not None
    memory = learn(memory, "topic", model(2), claimed=memory.claimed())
    assert overlap(memory.grafts).tolist() == [[1, 0], [0, 1]]
    assert len(memory.grafts[1]) == 8


def test_claims_over_other_tensors_are_mapped() -> None:
    base = model(0)
    claim = SparseDelta(Layout({"b": (10,), "z": (3,)}), torch.tensor([0, 9, 11]), torch.ones(3))
    graft = Graft.between(base, model(1), sparsity=1.0, claimed=claim)
    left_out = (~graft.gamma_b).nonzero().flatten().tolist()
    assert left_out == [20, 29]


def test_fine_tuning_can_go_on_from_what_there_is() -> None:
    memory = learn(GraftMemory(model(0)), "spam", model(1))
    assert torch.equal(memory.begin("base")["a"], model(0)["a"])
    current = memory.begin("current")
    assert torch.equal(current["a"], memory.merged()["a"])
    tuned = {k: v + 1 for k, v in current.items()}
    graft = Graft.between(current, tuned, count=30)
    memory = memory.learn("topic", graft.sparse(graft.gamma_b), tuned)
    for key, tensor in memory.task("topic").items():  # whole, and relative to the base
        assert torch.allclose(tensor, tuned[key], atol=1e-6)


def test_a_folder_gives_back_the_grafts_in_order(tmp_path: Path) -> None:
    memory = learn(learn(GraftMemory(model(0)), "spam", model(1)), "arc", model(2))
    memory.save(tmp_path / "grafts")
    back = GraftMemory.load(tmp_path / "grafts", model(0))
    assert back.names == ("spam", "arc")
    assert torch.equal(back.merged()["a"], memory.merged()["a"])
    with pytest.raises(MergeError, match="another base"):
        GraftMemory.load(tmp_path / "grafts", model(5))
    file = next((tmp_path / "grafts").glob("*spam*"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="damaged"):
        GraftMemory.load(tmp_path / "grafts", model(0))


def test_mistakes_are_named() -> None:
    memory = learn(GraftMemory(model(0)), "spam", model(1))
    with pytest.raises(MergeError, match="Did you mean 'spam'"):
        memory.task("spqm")
    with pytest.raises(MergeError, match="already"):
        learn(memory, "spam", model(2))
    with pytest.raises(MergeError, match="cannot name a graft"):
        learn(memory, "a/b", model(2))
    assert GraftMemory(model(0)).claimed() is None
    assert torch.equal(GraftMemory(model(0)).merged()["a"], model(0)["a"])


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("bert.encoder.layer.3.output.dense.bias", (3, "output.dense")),
        ("head.weight", (None, "head")),
        ("0.weight", (0, "module")),
        ("blocks.11.weight", (11, "blocks")),
        ("scale", (None, "scale")),
    ],
)
def test_names_tell_layer_and_module(name: str, place: tuple[int | None, str]) -> None:
    assert place_of(name) == place


def test_bits_are_counted_by_module_with_weights_and_biases_together() -> None:
    layout = Layout({"l.0.q.bias": (2,), "l.0.q.weight": (4,), "l.1.q.weight": (4,), "out": (3,)})
    graft = SparseDelta(layout, torch.tensor([0, 2, 3, 10]), torch.ones(4))
    assert bits_by_module(graft) == [
        ModuleBits(None, "out", 1, 3),
        ModuleBits(0, "q", 3, 6),
        ModuleBits(1, "q", 0, 4),
    ]
