"""The same numbers as mergekit and PEFT, where they implement the same definition.

Both are only called, as packages that the tests may find installed. Where their choice among equal
magnitudes is arbitrary, the values here are all different. Their random masks are replaced by ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from polytask.merge import merge_state_dicts, select
from polytask.merge.vectors import default_names

WEIGHT = [0.6, 0.3, 0.5]
SHAPE = (31, 40)


@pytest.fixture
def case() -> tuple[Tensor, list[Tensor]]:
    source = torch.Generator().manual_seed(0)
    base = torch.randn(SHAPE, generator=source)
    return base, [base + 0.1 * torch.randn(SHAPE, generator=source) for _ in WEIGHT]


def ours(method: str, base: Tensor | None, experts: list[Tensor], **params: Any) -> Tensor:
    origin = None if base is None else {"w": base}
    return merge_state_dicts(method, [{"w": e} for e in experts], origin, **params)["w"]


def mergekits(method: str, base: Tensor | None, experts: list[Tensor], **params: Any) -> Tensor:
    """Lists are spread over the experts."""
    methods = pytest.importorskip("mergekit.merge_methods")
    start = 0 if base is None else 1
    spread = {
        key: {start + k: v for k, v in enumerate(value)} if isinstance(value, list) else value
        for key, value in params.items()
    }
    tensors = [*([] if base is None else [base]), *experts]
    made: Tensor = methods.merge_tensors(
        tensors, method, parameters=spread, base_index=None if base is None else 0
    )
    return made


def our_masks(stream: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch.bernoulli draw, expert after expert, what our masks are drawn from."""
    draws: Iterator[Tensor] = (
        select.uniform(SHAPE[0] * SHAPE[1], 0, 0, stream, name, "w").view(SHAPE)
        for name in default_names(len(WEIGHT))
    )

    def bernoulli(chance: Tensor) -> Tensor:
        return (next(draws) < chance).to(chance)

    monkeypatch.setattr(torch, "bernoulli", bernoulli)


MERGEKIT: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("task_arithmetic", {"scale": 0.7}, {"lambda": 0.7}),
    ("task_arithmetic", {"normalize": True}, {"normalize": True}),
    ("ties", {"density": 0.3}, {"density": 0.3}),
    ("ties", {"density": [0.3, 0.5, 1.0]}, {"density": [0.3, 0.5, 1.0]}),
    ("ties", {"density": 0.3, "vote": {"divide": "none"}}, {"density": 0.3, "normalize": False}),
    ("breadcrumbs", {"density": 0.5, "gamma": 0.1}, {"density": 0.5, "gamma": 0.1}),
    ("breadcrumbs", {"density": 0.9, "gamma": 0.3}, {"density": 0.9, "gamma": 0.3}),
    (
        "breadcrumbs_ties",
        {"density": 0.5, "gamma": 0.1, "vote": {"divide": "none"}},
        {"density": 0.5, "gamma": 0.1},
    ),
]


@pytest.mark.parametrize(("method", "params", "theirs"), MERGEKIT)
def test_mergekit_on_task_vectors(
    method: str,
    params: dict[str, Any],
    theirs: dict[str, Any],
    case: tuple[Tensor, list[Tensor]],
) -> None:
    torch.testing.assert_close(
        ours(method, *case, weight=WEIGHT, **params),
        mergekits(method, *case, weight=WEIGHT, **theirs),
        rtol=1e-6,
        atol=1e-6,
    )


@pytest.mark.parametrize(
    ("method", "stream", "params", "theirs"),
    [
        ("dare_linear", "drop", {"rescale": "l1"}, {}),
        ("dare_linear", "drop", {"rescale": "none"}, {"rescale": False}),
        ("dare_ties", "drop", {"rescale": "l1", "vote": {"divide": "none"}}, {}),
        ("della_linear", "rank", {"rescale": "l1", "epsilon": 0.2}, {"epsilon": 0.2}),
        ("della", "rank", {"rescale": "l1", "epsilon": 0.2}, {"epsilon": 0.2}),
    ],
)
def test_mergekit_with_the_same_masks(
    method: str,
    stream: str,
    params: dict[str, Any],
    theirs: dict[str, Any],
    case: tuple[Tensor, list[Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = ours(method, *case, weight=WEIGHT, density=0.4, **params)
    our_masks(stream, monkeypatch)
    wanted = mergekits(method, *case, weight=WEIGHT, density=0.4, **theirs)
    # A draw that float32 cannot tell from the chance may fall on either side.
    differs = (found - wanted).abs() > 1e-5
    assert int(differs.sum()) <= 1
    torch.testing.assert_close(found[~differs], wanted[~differs], rtol=1e-5, atol=1e-5)


def test_mergekits_averages_and_spheres(case: tuple[Tensor, list[Tensor]]) -> None:
    base, experts = case[0].double(), [expert.double() for expert in case[1]]
    pairs: list[tuple[Tensor, Tensor]] = [
        (
            ours("linear", None, experts, weight=WEIGHT),
            mergekits("linear", None, experts, weight=WEIGHT),
        ),
        (
            ours("linear", None, experts, weight=WEIGHT, normalize=False),
            mergekits("linear", None, experts, weight=WEIGHT, normalize=False),
        ),
        (
            ours("slerp", None, [base, -experts[0]], t=0.3),
            mergekits("slerp", base, [-experts[0]], t=0.3),
        ),
        (
            ours("slerp", None, [base, experts[0]], t=0.3),
            mergekits("slerp", base, experts[:1], t=0.3),
        ),
        (
            ours("karcher", None, experts, iterations=10, tolerance=1e-5),
            mergekits("karcher", None, experts),
        ),
        (
            ours("multislerp", base, experts, weight=WEIGHT),
            mergekits("multislerp", base, experts, weight=WEIGHT),
        ),
        (
            ours("multislerp", None, experts, weight=WEIGHT),
            mergekits("multislerp", None, experts, weight=WEIGHT),
        ),
        (ours("model_stock", base, experts), mergekits("model_stock", base, experts)),
        (
            ours("model_stock", base, experts, vectors="rows"),
            mergekits("model_stock", base, experts, filter_wise=True),
        ),
    ]
    for vectors, switches in {
        "tensor": {},
        "rows": {"nuslerp_flatten": False},
        "columns": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
    }.items():
        for origin in (base, None):
            found = ours("nuslerp", origin, experts[:2], weight=WEIGHT[:2], vectors=vectors)
            pairs.append(
                (found, mergekits("nuslerp", origin, experts[:2], weight=WEIGHT[:2], **switches))
            )
    for found, wanted in pairs:
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-7)


def test_mergekits_trim_keeps_the_same_entries() -> None:
    sparsify = pytest.importorskip("mergekit.sparsify")
    x = torch.randn(50, 60, generator=torch.Generator().manual_seed(1))
    for density in (0.0001, 0.2, 0.77, 1.0):
        assert torch.equal(select.keep_largest_(x.clone(), density), sparsify.magnitude(x, density))


def peft(name: str) -> Callable[..., Tensor]:
    made: Callable[..., Tensor] = getattr(pytest.importorskip("peft.utils.merge_utils"), name)
    return made


@pytest.mark.parametrize(("by", "theirs"), [("mass", "total"), ("count", "frequency")])
def test_pefts_ties(by: str, theirs: str, case: tuple[Tensor, list[Tensor]]) -> None:
    base, experts = case
    taus = [expert - base for expert in experts]
    wanted = peft("ties")(taus, torch.tensor(WEIGHT), 0.3, theirs)
    vote = {"by": by, "weigh": "after", "divide": "counts"}
    found = ours("ties", base, experts, weight=WEIGHT, density=0.3, vote=vote)
    torch.testing.assert_close(found - base, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_pefts_dare_with_the_same_masks(
    method: str, case: tuple[Tensor, list[Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts = case
    vote = {"vote": {"weigh": "after", "divide": "counts"}} if method == "dare_ties" else {}
    found = ours(method, base, experts, weight=WEIGHT, density=0.4, **vote)
    our_masks("drop", monkeypatch)
    wanted = peft(method)([expert - base for expert in experts], torch.tensor(WEIGHT), 0.4)
    torch.testing.assert_close(found - base, wanted, rtol=1e-4, atol=1e-5)
