"""What gradient aggregation costs over bare TorchJD, and how to bound it.

A trunk 784-512-512 with a linear head a task, batch 128, every row labelled by every task: features
are shared, so this is the case that TorchJD's `mtl_backward` is made for. "bare" is its documented
recipe (`mtl_backward`, then `jac_to_grad`); polytask does the same from one `Terms` record, with
sums per task, heads' own gradients and parameters that no task reached left alone. "sum" is one
ordinary backward pass. One timed run is a number of forward and backward passes without an update.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from benchmarks.harness import compare, show_versions, table
from torch import Tensor, nn

from polytask.models.batch import Terms
from polytask.train.aggregation import GradientCombiner
from polytask.train.config import TrainConfig
from polytask.train.distribution import Distribution
from polytask.train.gradients import StepModule, SumGradients
from polytask.train.jacobian import AggregatedGradients
from polytask.train.weighting import build_weighting

ROWS, WIDTH, CLASSES = 128, 512, 10


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
        "bare, all at once": bare(None),
        "bare, one by one": bare(1),
        "polytask, all at once": ours(chunk=None),
        "polytask, one by one": ours(chunk=1),
        "polytask, every 4th step": ours(chunk=1, aggregate_every=4),
        "polytask, sum": plain(),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--passes", type=int, default=8, help="forward and backward passes a run")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--cpu-time", action="store_true", help="where other programs share the machine"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    found = show_versions(["torch", "torchjd"])
    found["threads"] = str(options.threads)
    results: dict[str, Any] = {"versions": found}
    lines = []
    for tasks in (2, 8):
        for rule in ("upgrad", "pcgrad", "mgda"):
            runs = passes(tasks, rule, options.passes)
            result = compare(runs, repeats=options.repeats, clock=clock)
            results[f"{rule}, {tasks} tasks"] = result.to_dict()
            medians = result.medians
            for name, seconds in medians.items():
                peer = "bare, one by one" if "all at once" not in name else "bare, all at once"
                lines.append(
                    (
                        rule,
                        tasks,
                        name,
                        1000 * seconds / options.passes,
                        seconds / medians[peer],
                        seconds / medians["polytask, sum"],
                    )
                )
    if options.json:
        print(json.dumps(results))
    else:
        print(table(["rule", "tasks", "who", "ms", "/ same bare", "/ sum"], lines))


if __name__ == "__main__":
    main()
