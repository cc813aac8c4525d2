"""`polytask run adamerging`: learn the merge of a user's checkpoints, or of population E.

With `data`, a merge's configuration with `method: adamerging`, it does what `polytask merge` does
with that file. Without, it learns the merge of MiniLM's experts for six text tasks and shows what
that is worth.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveFloat, PositiveInt

from polytask import files
from polytask.errors import UserError
from polytask.merge.adamerging import AdaMergingConfig
from polytask.systems.base import Outcome, Say, SystemConfig


class AdaMergingRunConfig(SystemConfig):
    """Sheet 17 on one's own checkpoints; the other settings are for the embedded default."""

    granularity: Literal["task", "block", "tensor"] = "tensor"
    steps: PositiveInt = 60
    lr: PositiveFloat = 1e-2
    seed: int = 0
    quick: bool = False  # two tasks and few texts: whether it works at all


def adamerging_run(config: AdaMergingRunConfig, say: Say) -> Outcome:
    """Merge what the configuration names, or population E."""
    if config.data is not None:
        return merge_configured(config.data, config.out, say)
    return merge_population(config, say)


def merge_configured(path: Path, out: Path, say: Say) -> Outcome:
    """The merge that a YAML file with `method: adamerging` asks for, with its page."""
    from polytask.merge.output import write
    from polytask.merge.plan import make_plan
    from polytask.pipeline import learned, merging

    learning = learned.find_learning(path)
    if learning is None:
        raise UserError(f"{path}: 'method' is not '{learned.METHOD}'; use 'polytask merge'")
    plan = make_plan(learning.recipe)
    own = learning.config.out
    folder = out / path.stem if own is None else path.parent / own
    learned.check_free(folder, overwrite=False)
    recipe, found = learning.learn(plan, say)
    plan = make_plan(recipe)
    folder = write(plan, folder)
    learned.write_traces(folder, found)
    page = merging.report(plan, folder, None, say)
    return Outcome(folder, summary(found), lines_of(found), [page])


def merge_population(config: AdaMergingRunConfig, say: Say) -> Outcome:
    """The six tasks of population E: base, experts, fixed and learned merge."""
    from polytask.merge.adamerging import fit
    from polytask.pipeline.learned import write_traces
    from polytask.systems.testbeds import names, names_merges

    say("loading the experts (trained once, then kept in the cache)")
    bed = names.population(config.seed, config.quick)
    settings = AdaMergingConfig(
        granularity=config.granularity, steps=config.steps, lr=config.lr, batches_per_step=1
    )
    say("learning coefficients from unlabelled texts")
    inputs = {task: names_merges.Unlabelled(bed, task, "unlabelled", 8) for task in bed.tasks}
    found = fit(bed.model, bed.base, bed.experts, bed.heads, inputs, settings)
    along = names_merges.direction(bed, "task_arithmetic")
    table = {
        "base": bed.accuracies(bed.base),
        "experts": {task: bed.accuracy(bed.experts[task], task) for task in bed.tasks},
        "arithmetic at 0.3": bed.accuracies(names_merges.moved(bed, along, 0.3)),
        "adamerging": bed.accuracies(found.state),
    }
    folder = config.out / "adamerging"
    folder.mkdir(parents=True, exist_ok=True)
    write_traces(folder, found)
    figures = {**summary(found), "accuracy": table}
    files.write_json(folder / "result.json", figures)
    pictures = draw(found, folder)
    lines = [
        f"{name}: mean accuracy {sum(row.values()) / len(row):.3f}" for name, row in table.items()
    ]
    written = [folder / "coefficients.json", folder / "trace.json", folder / "result.json"]
    return Outcome(folder, figures, [*lines, *lines_of(found)], [*written, *pictures])


def summary(found: Any) -> dict[str, Any]:
    """Mean coefficient and last entropy by task, and what is doubtful."""
    means = sum(found.coefficients.values()) / len(found.coefficients)
    return {
        "coefficient": dict(zip(found.names, [float(c) for c in means], strict=True)),
        "entropy": {task: values[-1] for task, values in found.trace.items()},
        "warnings": list(found.warnings),
    }


def lines_of(found: Any) -> list[str]:
    """For people: the mean coefficients, and warnings."""
    means = summary(found)["coefficient"]
    told = ", ".join(f"{name} {value:.2f}" for name, value in means.items())
    return [f"mean coefficients: {told}", *(f"warning: {text}" for text in found.warnings)]


def draw(found: Any, folder: Path) -> list[Path]:
    """coefficients.png (tensors x experts) and entropy.png."""
    import numpy as np

    from polytask.report import drawing

    rows = np.stack([row.numpy() for row in found.coefficients.values()])
    with drawing.style() as figure_of:
        figure = figure_of(figsize=(drawing.WIDTH, 0.19 * len(rows) + 1.6), layout="constrained")
        ax = figure.add_subplot()
        image = ax.imshow(rows, aspect="auto", cmap="viridis", vmin=0, vmax=max(0.6, rows.max()))
        ax.set_xticks(range(len(found.names)), found.names)
        ax.set_yticks(range(len(rows)), list(found.coefficients), fontsize=7)
        ax.grid(False)
        figure.colorbar(image, ax=ax, label="coefficient")
        title = "How much of each expert goes into each tensor"
        ax.set_title(title)
        drawing.finish(figure, folder, "coefficients", title, "All began at the same value.")
        figure = figure_of(figsize=(drawing.WIDTH, 3.2), layout="constrained")
        ax = figure.add_subplot()
        for name, look in drawing.looks(list(found.trace)).items():
            ax.plot(found.trace[name], color=look.colour, linestyle=look.dash, label=name)
        ax.set_xlabel("step")
        ax.set_ylabel("entropy of predictions (nats)")
        ax.set_ylim(bottom=0)
        ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
        title = "How unsure the merge is, task by task"
        ax.set_title(title)
        drawing.finish(figure, folder, "entropy", title, "Each step on other unlabelled texts.")
    return [folder / "coefficients.png", folder / "entropy.png"]
