"""A method gives the same bits in one piece, in chunks, in any order and with any threads."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from polytask.errors import ConfigError, MergeError
from polytask.merge import METHODS, Method, check_identity, make_method, merge_state_dicts
from polytask.merge.identity import TOLERANCE
from polytask.merge.method import State, TensorInfo
from polytask.merge.methods.averages import Average
from polytask.merge.methods.consensus import Thinned

SHAPES = {"bias": (701,), "scale": (), "big": (90, 401), "conv": (7, 3, 5, 5)}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in METHODS.names()),
    ("ties", {"trim": "model", "vote": {"draw": "majority"}}),
    ("ties", {"vote": {"draw": "majority", "by": "count", "weigh": "after"}, "weight": 0.3}),
    ("dare_ties", {"rescale": "l1", "vote": {"divide": "none", "draw": "majority"}}),
    ("dare_linear", {"normalize": True, "weight": [0.3, 0.4]}),
    ("pcb", {"inter": "sum_norm", "intra": False}),
    ("pcb", {"inter": "sum_raw", "scope": "tensor"}),
    ("nuslerp", {"vectors": "rows"}),
    ("karcher", {"vectors": "columns"}),
    ("model_stock", {"vectors": "rows"}),
]
NAMES = ("first", "second")


def models(seed: int = 0) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    torch.manual_seed(seed)
    base = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    return base, [{k: v + 0.05 * torch.randn_like(v) for k, v in base.items()} for _ in NAMES]


def statistics(method: Method) -> list[dict[str, Tensor]] | None:
    torch.manual_seed(9)
    if method.extra == "gram":
        inputs = torch.randn(2, 500, 401)
        return [{"big": x.T @ x} for x in inputs]
    if method.extra == "fisher":
        return [{k: torch.rand(shape) for k, shape in SHAPES.items()} for _ in NAMES]
    return None


def streamed(method: Method, seed: int) -> dict[str, Tensor]:
    """What an engine does: flat chunks where the method allows them, in random order."""
    base, experts = models()
    extras = statistics(method)
    order = random.Random(seed)
    used = None if method.base == "ignored" else base

    def pieces(chunked: bool) -> list[tuple[str, int, int]]:
        found = []
        for name, tensor in base.items():
            step = order.choice([8192, 20_001, 70_001]) if chunked else max(1, tensor.numel())
            found += [(name, start, step) for start in range(0, tensor.numel(), step)]
        order.shuffle(found)
        return found

    def read(name: str, start: int, step: int) -> tuple[Tensor, Tensor | None, TensorInfo]:
        shape = SHAPES[name] if step >= base[name].numel() else (-1,)

        def cut(x: Tensor) -> Tensor:
            return x.reshape(-1)[start : start + step].clone().view(shape)

        stacked = torch.stack([cut(expert[name]) for expert in experts])
        where = TensorInfo(name, NAMES, 5, start)
        return stacked, None if used is None else cut(used[name]), where

    state: State = {}
    for number in range(len(method.passes)):
        total: Any = None
        for piece in pieces(chunked=method.elementwise):
            part = method.measure(number, *read(*piece), state)
            total = part if total is None else method.combine(number, total, part)
        state = method.finish(number, total, state, NAMES)
    merged = {name: torch.empty(tensor.numel()) for name, tensor in base.items()}
    for name, start, step in pieces(chunked=method.elementwise):
        extra = None
        if extras is not None and name in extras[0]:
            extra = [each[name] for each in extras]
            if method.elementwise:
                extra = [x.reshape(-1)[start : start + step] for x in extra]
        made = method.merge(*read(name, start, step), state, extra)
        merged[name][start : start + step] = made.reshape(-1)
    return {name: merged[name].view(shape) for name, shape in SHAPES.items()}


@pytest.mark.parametrize(("name", "params"), VARIANTS)
def test_streamed_equals_in_memory_bit_for_bit(name: str, params: dict[str, Any]) -> None:
    method = make_method(name, params)
    base, experts = models()
    whole = merge_state_dicts(method, experts, base, names=NAMES, seed=5, extras=statistics(method))
    for seed in (0, 1):
        found = streamed(method, seed)
        for key in SHAPES:
            assert torch.equal(found[key], whole[key]), key


@pytest.mark.parametrize(
    ("name", "params"),
    [
        # Those that add up over a tensor: everything else is judged by the chunks above.
        ("slerp", {}),
        ("dare_linear", {"rescale": "l1"}),
        ("model_stock", {"vectors": "rows"}),
    ],
)
def test_threads_do_not_change_a_bit(name: str, params: dict[str, Any]) -> None:
    method, threads = make_method(name, params), torch.get_num_threads()
    base, experts = models(3)
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(merge_state_dicts(method, experts, base, extras=statistics(method)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0][key], found[1][key]) for key in SHAPES)


@pytest.mark.parametrize(("name", "params"), VARIANTS)
def test_every_method_passes_its_identity_check(name: str, params: dict[str, Any]) -> None:
    method = make_method(name, params)
    most = method.models[1]
    for count in (2, most or 5):
        if any(isinstance(getattr(method, field), tuple) for field in method.per_model):
            count = 2
        found = check_identity(method, count, seed=count)
        assert found.copies is None or found.copies <= TOLERANCE
        assert (found.copies is None) == (name == "pcb")
        assert (found.single is None) == (method.models[0] > 1)
        assert 0 < found.kept <= 1 and found.text
    if isinstance(method, Thinned):
        assert "of a model's changes stay" in found.text
    if method.base == "used":
        assert check_identity(method, 2, has_base=False).copies is not None


class Shrinking(Average):
    """A merge with a wrong divisor."""

    def merge(self, models: Tensor, *rest: Any) -> Tensor:
        return super().merge(models, *rest).mul_(0.999)


class Turning(Thinned):
    """A method that is right without dropping and turns changes around when it drops."""

    title = "Turning"

    def thinned(self, deltas: Tensor, where: TensorInfo, state: State) -> Tensor:
        return deltas if self.density == 1.0 else deltas.neg_()


def test_a_method_that_spoils_copies_is_caught() -> None:
    with pytest.raises(MergeError, match="Average: 3 copies of one model should give that model"):
        check_identity(Shrinking(), 3)
    with pytest.raises(MergeError, match="Average: one expert at weight 1"):
        check_identity(Shrinking(), 1)
    with pytest.raises(MergeError, match=r"Turning: .* moves .* against that model's change"):
        check_identity(Turning(), 2)
    assert check_identity(Turning(weight=-1.0), 2).kept == 1.0  # asked for: nothing to object
    assert check_identity(Turning(scale=-1.0), 2).kept == 1.0


def test_the_identity_check_refuses_what_the_method_refuses() -> None:
    with pytest.raises(MergeError, match="SLERP merges 2 models"):
        check_identity(make_method("slerp", {}), 3)
    with pytest.raises(ConfigError, match="'weight' has 2 values for 3 models"):
        check_identity(make_method("ties", {"weight": [1, 2]}), 3)
    with pytest.raises(MergeError, match="TIES works on what training added"):
        check_identity(make_method("ties", {}), 2, has_base=False)
