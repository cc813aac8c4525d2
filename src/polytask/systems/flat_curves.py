"""How flat did a run end up? The loss of every task along its own steepest direction, with picture.

Serves sheet 16 on a user's own tasks; any run can be measured, however it was trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polytask.train.flat_config import Norm

if TYPE_CHECKING:
    from torch import Tensor

    from polytask.models.batch import Batch
    from polytask.models.multitask import MultitaskModel
    from polytask.train.sharpness import Sharpness

RADII = (0.02, 0.05, 0.1, 0.2)


def measure(
    model: MultitaskModel,
    batch: Batch,
    rhos: Sequence[float] = RADII,
    adaptive: bool = False,
    norm: Norm = "joint",
) -> Sharpness:
    """Rise of every task's mean loss on a batch, in evaluation mode; the model is left as it was.

    Tasks that have no label in the batch come out as NaN.
    """
    from polytask.train.gradients import count_pairs, task_means
    from polytask.train.sharpness import SharpnessMeter

    tasks = len(model.task_names)

    def losses() -> list[Tensor | None]:
        terms = model.terms(batch)
        present = count_pairs(terms, tasks).tolist()
        means = task_means(terms, tasks)
        return [means[t] if n > 0 else None for t, n in enumerate(present)]

    parameters = dict(model.named_parameters())
    shared = [parameters[name] for name in model.shared_names()]
    heads = [[parameters[name] for name in model.head_names(t)] for t in range(tasks)]
    training = model.training
    model.eval()
    try:
        return SharpnessMeter(rhos, adaptive, norm).measure(losses, shared, heads, model)
    finally:
        model.train(training)


def plain_values(found: Sharpness, names: Sequence[str]) -> dict[str, Any]:
    """JSON: per task the loss and its rise at every radius; None where the task was absent."""
    return {
        name: {
            "loss": _number(float(found.loss[t])),
            "rise": {f"{r:g}": _number(float(found.rise[t, c])) for c, r in enumerate(found.rhos)},
        }
        for t, name in enumerate(names)
    }


def _number(value: float) -> float | None:
    return value if value == value else None


def draw(curves: Mapping[str, Mapping[str, Any]], path: Path) -> Path:
    """Small multiples, one per task: training loss against the distance walked uphill.

    `curves` maps a way of training ('flat', 'plain') to `plain_values`.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    tasks = list(next(iter(curves.values())))
    columns = min(4, len(tasks))
    rows = -(-len(tasks) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.2 * columns, 2.6 * rows), squeeze=False, layout="constrained"
    )
    styles = [("#0072B2", "o", "-"), ("#D55E00", "s", "--"), ("#009E73", "^", ":")]
    for axis, task in zip(axes.flat, tasks, strict=False):
        for (way, values), (colour, mark, line) in zip(curves.items(), styles, strict=False):
            loss = values[task]["loss"]
            if loss is None:
                continue
            points = [(0.0, loss)]
            points += [(float(r), loss + up) for r, up in values[task]["rise"].items()]
            xs, ys = zip(*points, strict=True)
            axis.plot(xs, ys, color=colour, marker=mark, linestyle=line, label=way, markersize=4)
        axis.set_title(task, fontsize=10)
        axis.set_xlabel("distance uphill (rho)")
        axis.set_ylabel("training loss")
    for axis in list(axes.flat)[len(tasks) :]:
        axis.set_axis_off()
    axes.flat[0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
