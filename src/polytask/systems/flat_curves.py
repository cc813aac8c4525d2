"""How flat did a run end up, and how did it get there? Numbers and two pictures.

Serves sheet 16 on a user's own tasks: the loss of every task along its own steepest direction, its
sharpness while training, and how the tasks' gradients agreed. Any run can be measured.
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
STYLES = (("#0072B2", "o", "-"), ("#D55E00", "s", "--"), ("#009E73", "^", ":"))
# Okabe and Ito's, safe for the colour-blind
COLOURS = "#000000 #E69F00 #56B4E9 #009E73 #F0E442 #0072B2 #D55E00 #CC79A7"
DASHES = ("-", "--", ":", "-.")


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
    tasks = list(next(iter(curves.values())))
    columns = min(4, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = _figure(3.2 * columns, 2.6 * rows)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, task in zip(axes.flat, tasks, strict=False):
        for (way, values), (colour, mark, line) in zip(curves.items(), STYLES, strict=False):
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
    return _save(figure, path)


def draw_training(lines: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> Path:
    """Left: every task's rise of loss in the step's own ascent, over training, where that was done.
    Right: histogram of the cosines between tasks' gradients.

    `lines` maps a way of training to the lines of its metrics.jsonl.
    """
    figure = _figure(8.4, 3.2)
    left, right = figure.subplots(1, 2)
    rises: dict[str, list[tuple[int, float]]] = {}
    for line in (line for found in lines.values() for line in found):
        if line.get("event") == "sharpness":
            for task, rise in line["rise"].items():
                rises.setdefault(task, []).append((line["step"], rise))
    colours = COLOURS.split()
    for number, (task, points) in enumerate(rises.items()):
        xs, ys = zip(*points, strict=True)
        dash = DASHES[number // 8 % 4]
        left.plot(xs, ys, label=task, color=colours[number % 8], linestyle=dash)
    left.set(xlabel="step", ylabel="rise of the loss uphill", title="sharpness while training")
    left.legend(frameon=False, fontsize=7)
    edges = [-1 + 0.1 * i for i in range(21)]
    for (way, found), (colour, _, _) in zip(lines.items(), STYLES, strict=False):
        values = [v for line in found if line.get("event") == "conflict" for v in _pairs(line)]
        right.hist(values, edges, color=colour, label=way, alpha=0.6, density=True)
    right.set(xlabel="cosine of two tasks' gradients", ylabel="density", title="agreement")
    right.legend(frameon=False)
    return _save(figure, path)


def _pairs(line: Mapping[str, Any]) -> list[float]:
    """Cosines of distinct tasks over all shared parameters, of one conflict event."""
    table = line["cosine"]["all"]
    found = [table[i][j] for i in range(len(table)) for j in range(i)]
    return [value for value in found if value is not None]


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path
