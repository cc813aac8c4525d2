"""Gradient aggregation: one gradient per task for what tasks share, combined by a named rule.

The rules themselves are TorchJD's (`torchjd.aggregation`). What is added here: names with
nearest-name errors, the tasks present in a step only, sums that are exact over micro-batches and
processes (per-task gradients are added up *before* they are combined, so the result is that of the
whole batch), state that can be saved, and reuse of the last weights to bound the cost.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from polytask.errors import ConfigError, UserError, suggestion
from polytask.registry import Registry


@dataclass(frozen=True)
class Rule:
    """How to build a TorchJD aggregator for a number of rows, and its options with defaults."""

    build: Callable[[int, dict[str, float]], Any]
    options: Mapping[str, float] = field(default_factory=dict)
    state: tuple[str, ...] = ()  # attributes of its weighting that are its memory
    degree: Callable[[Mapping[str, float]], float] | None = lambda options: 1.0
    """k of A(s G) = s^k A(G) for every s > 0, from the options; None where there is no such k."""


aggregators: Registry[Rule] = Registry("aggregator")
INSTALL = "pip install torchjd qpsolvers quadprog cvxpy ecos"


def _plain(name: str) -> Callable[[int, dict[str, float]], Any]:
    def build(rows: int, options: dict[str, float]) -> Any:
        import torchjd.aggregation

        return getattr(torchjd.aggregation, name)(**options)

    return build


def _nash(rows: int, options: dict[str, float]) -> Any:
    from torchjd.aggregation import NashMTL

    return NashMTL(
        n_tasks=rows,
        max_norm=options["max_norm"],
        update_weights_every=int(options["update_weights_every"]),
        optim_niter=int(options["optim_niter"]),
    )


def _mgda(rows: int, options: dict[str, float]) -> Any:
    from torchjd.aggregation import MGDA

    return MGDA(epsilon=options["epsilon"], max_iters=int(options["max_iters"]))


for _name, _class in {
    "mean": "Mean",
    "sum": "Sum",
    "random": "Random",
    "upgrad": "UPGrad",
    "dualproj": "DualProj",
    "pcgrad": "PCGrad",
    "graddrop": "GradDrop",
    "imtl_g": "IMTLG",
    "aligned_mtl": "AlignedMTL",
    "config": "ConFIG",
}.items():
    aggregators.add(_name, Rule(_plain(_class)))
aggregators.add("mgda", Rule(_mgda, {"epsilon": 1e-3, "max_iters": 100}))
aggregators.add("cagrad", Rule(_plain("CAGrad"), {"c": 0.4}))
aggregators.add(
    "fairgrad",  # its weights solve (G G^T) w = w^(-1 / alpha)
    Rule(_plain("FairGrad"), {"alpha": 2.0}, degree=lambda o: (1 - o["alpha"]) / (1 + o["alpha"])),
)
aggregators.add("gradvac", Rule(_plain("GradVac"), {"beta": 0.5}, state=("_phi_t",)))
aggregators.add(
    "nash_mtl",
    Rule(
        _nash,
        {"max_norm": 1.0, "update_weights_every": 1, "optim_niter": 20},
        state=("prvs_alpha", "normalization_factor", "step"),
        degree=None,  # 0 in the paper; TorchJD's solver minds the scale, and a long result is cut
    ),
)


class GradientCombiner:
    """Combines task gradients by a named rule: called with (tasks, params), gives (params,).

    A rule with memory keeps one memory per set of tasks it is called with (`rows`).
    """

    def __init__(self, name: str, options: Mapping[str, float] | None = None) -> None:
        self.name = name
        self.rule = aggregators.get(name)
        for key in options or {}:
            if key not in self.rule.options:
                raise ConfigError(
                    f"aggregator '{name}' has no option '{key}'."
                    f"{suggestion(key, self.rule.options) or ' It has none.'}"
                )
        self.options = {**self.rule.options, **(options or {})}
        self._members: dict[tuple[int, ...], Any] = {}
        self._member((0, 1))  # a missing solver shows before training starts

    def __call__(self, matrix: Tensor) -> Tensor:
        """The combined gradient (params,) of a matrix of task gradients (tasks, params)."""
        return self.combine([matrix], range(len(matrix)))[0][0]

    @property
    def weighted(self) -> bool:
        """Whether the result is a weighted sum of the rows, so that weights can be used again."""
        from torchjd.aggregation import WeightedAggregator

        return isinstance(self._member((0, 1)), WeightedAggregator)

    @torch.no_grad()
    def combine(
        self, jacobians: Sequence[Tensor], rows: Sequence[int]
    ) -> tuple[list[Tensor], Tensor | None]:
        """Combine Jacobians kept per parameter, (tasks, *shape) each: the (*shape) gradients, and
        the weights (tasks,) where the rule has some.

        Rules that only look at inner products never need the whole (tasks, params) matrix at once.
        A rule that is homogeneous sees gradients of norm 1 together, since TorchJD's solvers take
        small ones for zero (CAGrad a norm below .01); gradients that are all zero give zero.
        A non-finite Jacobian gives NaN gradients instead of a solver's error, so that whoever
        checks gradients can say whose fault it was.
        """
        from torchjd.aggregation import GramianWeightedAggregator, WeightedAggregator

        member = self._member(tuple(rows))
        flat = [j.flatten(1).float() for j in jacobians]
        gramian = torch.stack([j @ j.T for j in flat]).sum(0)  # (tasks, tasks)
        if not bool(torch.isfinite(gramian).all()):
            return [torch.full_like(j[0], torch.nan) for j in jacobians], None
        size, degree = float(gramian.trace().sqrt()), 1.0
        if size == 0:  # solvers divide by it
            return [torch.zeros_like(j[0]) for j in jacobians], None
        if self.rule.degree is None:
            size = 1.0
        else:
            degree = self.rule.degree(self.options)
        if isinstance(member, GramianWeightedAggregator):
            weights = member.gramian_weighting(gramian / size**2)
        elif isinstance(member, WeightedAggregator):
            with warnings.catch_warnings():  # cvxpy's remark on speed, for Nash-MTL every step
                warnings.filterwarnings("ignore", message=".*parameterized problem.*not DPP")
                weights = member.weighting(torch.cat(flat, 1) / size)
        else:
            vector = member(torch.cat(flat, 1) / size) * size**degree
            parts = vector.split([j.shape[1] for j in flat])
            return [p.view_as(j[0]).to(j.dtype) for p, j in zip(parts, jacobians)], None
        weights = weights.to(flat[0]) * size ** (degree - 1)
        return [(weights @ f).view_as(j[0]).to(j.dtype) for f, j in zip(flat, jacobians)], weights

    def _member(self, rows: tuple[int, ...]) -> Any:
        key = rows if self.rule.state else ()
        if key not in self._members:
            try:
                self._members[key] = self.rule.build(len(rows), dict(self.options))
            except ImportError as error:
                raise UserError(
                    f"aggregator '{self.name}' needs a solver that is not installed ({error}). "
                    f"Install it with: {INSTALL}"
                ) from error
        return self._members[key]

    def state(self) -> dict[str, Any]:
        """The memory of rules that have one, as lists of numbers."""
        found = {}
        for rows, member in self._members.items():
            for name in self.rule.state:
                value = getattr(_memory(member), name)
                if value is not None:
                    plain = torch.as_tensor(value).tolist()
                    found["/".join(["-".join(map(str, rows)), name])] = plain
        return found

    def restore(self, state: Mapping[str, Any]) -> None:
        self._members.clear()
        for key, plain in state.items():
            rows, name = key.split("/")
            member = self._member(tuple(int(r) for r in rows.split("-")))
            _set_memory(_memory(member), name, plain)


def _memory(member: Any) -> Any:
    """The part of a TorchJD aggregator that holds its state."""
    return getattr(member, "gramian_weighting", member.weighting)


def _set_memory(memory: Any, name: str, plain: Any) -> None:
    if name == "_phi_t":
        memory._phi_t = torch.tensor(plain)
        memory._state_key = (len(plain), memory._phi_t.dtype)
    elif name == "step":
        memory.step = plain
        if plain:  # it sets up its problem at step 0 only
            memory._init_optim_problem()
    else:
        setattr(memory, name, torch.tensor(plain, dtype=torch.float64).numpy())


def combiner(name: str, **options: float) -> GradientCombiner:
    """The named rule as a function (tasks, params) -> (params,).

    >>> mean = combiner("mean")
    >>> mean(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    tensor([0.5000, 0.5000])
    """
    return GradientCombiner(name, options)


def per_task_gradients(
    losses: Sequence[Tensor] | Tensor,
    parameters: Sequence[nn.Parameter],
    chunk: int | None = 1,
    retain_graph: bool = False,
) -> list[Tensor]:
    """Jacobian of scalar losses: for each parameter (tasks, *shape), zeros where it plays no part.

    `chunk` losses are differentiated at once (None: all) by TorchJD, which is faster on an
    accelerator and needs memory for that many backward passes.
    """
    count = len(losses)
    if chunk != 1 and count > 1:
        from torchjd.autojac import jac

        return list(
            jac(
                list(losses),
                list(parameters),
                parallel_chunk_size=chunk,
                retain_graph=retain_graph,
            )
        )
    rows = [p.new_zeros(count, *p.shape) for p in parameters]
    for index, loss in enumerate(losses):
        keep = retain_graph or index + 1 < count
        found = torch.autograd.grad(loss, parameters, retain_graph=keep, allow_unused=True)
        for row, gradient in zip(rows, found):
            if gradient is not None:
                row[index] = gradient
    return rows
