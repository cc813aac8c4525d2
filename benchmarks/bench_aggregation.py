"""Gradient aggregation: what it costs over bare TorchJD, and how to bound it.

    python -m benchmarks aggregation

A trunk 784-512-512 with a linear head a task, batch 128, every row labelled by every task: features
are shared, so this is the case that TorchJD's `mtl_backward` is made for. "bare" is its documented
recipe (`mtl_backward`, then `jac_to_grad`); polytask does the same from one `Terms` record, with
sums per task, heads' own gradients and parameters that no task reached left alone. "sum" is one
ordinary backward pass. One timed run is a number of forward and backward passes without an update.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from benchmarks.harness import Aim, compare, options_of, show, show_versions
from torch import Tensor, nn

from polytask.models.batch import Terms
from polytask.train.aggregation import GradientCombiner
from polytask.train.config import TrainConfig
from polytask.train.distribution import Distribution
from polytask.train.gradients import StepModule, SumGradients
from polytask.train.jacobian import AggregatedGradients
from polytask.train.weighting import build_weighting

ROWS, WIDTH, CLASSES = 128, 512, 10
BARE = "bare, all at once"  # TorchJD's default


class Shared(nn.Module):
    """A trunk and a head per task; `terms` gives every row a pair per task."""

    def __init__(self, tasks: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(
            nn.Linear(784, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU()
        )
        self.heads = nn.ModuleList(nn.Linear(WIDTH, CLASSES) for _ in range(tasks))

    def shared_names(self) -> list[str]:
        return [name for name, _ in self.named_parameters() if name.startswith("trunk")]

    def losses(self, x: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Features, and (rows,) losses of each task."""
        features = self.trunk(x)
        found = [
            nn.functional.cross_entropy(head(features), y[:, t], reduction="none")
            for t, head in enumerate(self.heads)
        ]
        return features, found

    def terms(self, batch: tuple[Tensor, Tensor]) -> Terms:
        values = self.losses(*batch)[1]
        task = torch.arange(len(values)).repeat_interleave(ROWS)
        return Terms({"ce": torch.cat(values)}, {"ce": task}, {"ce": task})


def passes(tasks: int, rule: str, count: int) -> dict[str, Callable[[], None]]:
    """The contenders; each does `count` passes."""
    from torchjd.autojac import jac_to_grad, mtl_backward

    draw = torch.Generator().manual_seed(0)
    batch = (
        torch.randn(ROWS, 784, generator=draw),
        torch.randint(CLASSES, (ROWS, tasks), generator=draw),
    )
    names = [str(t) for t in range(tasks)]
    distribution = Distribution("cpu")

    def bare(chunk: int | None) -> Callable[[], None]:
        model = Shared(tasks)
        member = GradientCombiner(rule)._member((0, 1))

        def run() -> None:
            for _ in range(count):
                features, losses = model.losses(*batch)
                mtl_backward(
                    [loss.mean() for loss in losses],
                    features=features,
                    parallel_chunk_size=chunk,
                )
                jac_to_grad(list(model.trunk.parameters()), member)
                model.zero_grad()

        return run

    def ours(**settings: Any) -> Callable[[], None]:
        model = Shared(tasks)
        config = TrainConfig(steps=1, aggregator=rule, **settings)
        weighting = build_weighting(config, names)
        module = StepModule(model, lambda m, b: m.terms(b), weighting, tasks, False)
        gradients = AggregatedGradients(model, tasks, config, distribution)

        def run() -> None:
            for step in range(count):
                gradients(step, module, [batch], tasks)  # type: ignore[arg-type]
                model.zero_grad()

        return run

    def plain() -> Callable[[], None]:
        model = Shared(tasks)
        weighting = build_weighting(TrainConfig(steps=1), names)
        module = StepModule(model, lambda m, b: m.terms(b), weighting, tasks, False)
        gradients = SumGradients(distribution)

        def run() -> None:
            for step in range(count):
                gradients(step, module, [batch], tasks)  # type: ignore[arg-type]
                model.zero_grad()

        return run

    return {
        BARE: bare(None),
        "bare, one by one": bare(1),
        "polytask, all at once": ours(chunk=None),
        "polytask, one by one": ours(chunk=1),
        "polytask, every 4th step": ours(chunk=1, aggregate_every=4),
        "polytask, sum": plain(),
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = options_of(__doc__, argv, passes=5)
    found: dict[str, Any] = {"versions": show_versions(("torch", "torchjd"))}
    rows = []
    for tasks in (2, 8):
        for rule in ("upgrad", "pcgrad", "mgda"):
            runs = passes(tasks, rule, options.passes)
            medians = compare(runs, options.repeats, clock=options.clock).medians
            for way, seconds in medians.items():
                peer = BARE if "all at once" in way else "bare, one by one"
                rows.append(
                    {
                        "tasks": tasks,
                        "rule": rule,
                        "way": way,
                        "ms": seconds / options.passes * 1e3,
                        "over_same_bare": seconds / medians[peer],
                        "over_sum": seconds / medians["polytask, sum"],
                    }
                )
    found["aggregation"] = rows
    show(found, options)
    return found


def aims(found: dict[str, Any]) -> list[Aim]:
    """Every rule and number of tasks, differentiated as the peer does it."""
    ways = ("polytask, one by one", "polytask, all at once")
    return [
        Aim(
            f"{row['rule']}, {row['tasks']} tasks, {row['way'].partition(', ')[2]}: "
            "time over bare TorchJD",
            row["over_same_bare"],
            at_most=1.05,
        )
        for row in found["aggregation"]
        if row["way"] in ways
    ]


if __name__ == "__main__":
    main()
