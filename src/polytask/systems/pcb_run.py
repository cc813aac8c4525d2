"""`polytask run pcb-merging`: merge a user's checkpoints by competition, or population E.

With `data`, a merge's configuration with `method: pcb`, it does what `polytask merge` does with
that file, can search a weight for each model on labelled rows first, and shows which parameters
survived. Without, it does so for MiniLM's experts and draws accuracy over ratio and scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, NonNegativeInt

from polytask import files
from polytask.errors import UserError
from polytask.systems.base import Outcome, Say, SystemConfig

RATIOS = (0.05, 0.1, 0.2, 0.4)


class PCBRunConfig(SystemConfig):
    """Sheet 36 on one's own checkpoints."""

    search: NonNegativeInt = 0  # scorings to find a weight for each model with; needs labelled rows
    low: float = Field(0.5, allow_inf_nan=False)  # bounds of the weights
    high: float = Field(3.0, allow_inf_nan=False)
    seed: int = 0  # of the search, and of the embedded default
    quick: bool = False  # the embedded default with two tasks and few texts


def pcb_run(config: PCBRunConfig, say: Say) -> Outcome:
    """Merge what the configuration names, or population E."""
    if config.data is not None:
        return merge_configured(config, config.data, say)
    return merge_population(config, say)


def merge_configured(config: PCBRunConfig, path: Path, say: Say) -> Outcome:
    """The merge of a YAML file with `method: pcb`."""
    from polytask.merge.config import CompareConfig, read_recipe
    from polytask.merge.output import write
    from polytask.merge.plan import make_plan
    from polytask.merge.sources import read
    from polytask.merge.survivors import survivors
    from polytask.merge.vectors import TaskVectors
    from polytask.pipeline import merging

    recipe, ours = read_recipe(path)
    if recipe.method != "pcb" or recipe.base is None:
        raise UserError(f"{path}: 'method' is not 'pcb', or there is no base; use 'polytask merge'")
    plan = make_plan(recipe)
    settings = CompareConfig() if ours is None or ours.compare is None else ours.compare
    judged = bool(settings.tasks) or config.search > 0
    judges = merging.find_judges(plan, settings, path.parent) if judged else []
    base = {item.name: read(plan.sources[recipe.base], item.name) for item in plan.merged}
    experts = [
        {n: read(plan.sources[k], plan.matches[k].keys.get(n, n)) for n in base}
        for k in recipe.experts
    ]
    figures: dict[str, Any] = {}
    if config.search:
        from polytask.merge.search import search_weights

        def score(state: Mapping[str, Any]) -> float:
            found = []
            for judge in judges:
                judge.put(plan, lambda name: state[name].float())
                for each in judge.score().values():
                    found.append(each.value if each.higher_is_better else -each.value)
            say(f"mean score {sum(found) / len(found):.4f}")
            return sum(found) / len(found)

        start = plan.method.values("weight", len(experts))
        _, best = search_weights(
            plan.method,
            experts,
            base,
            score,
            init=start,
            bounds=(min(config.low, *start), max(config.high, *start)),
            budget=config.search,
            seed=config.seed,
            names=plan.names,
        )
        figures["weights"] = dict(zip(plan.names, best.best, strict=True))
        plan = make_plan(_with_weights(recipe, best.best))
    vectors = TaskVectors.from_state_dicts(base, experts, names=plan.names)
    kept, overlap = survivors(plan.method, vectors)
    out = None if ours is None or ours.out is None else path.parent / ours.out
    folder = write(plan, out or config.out / path.stem)
    compared = merging.compare(plan, folder, judges, settings, say) if judges else None
    page = merging.report(plan, folder, compared, say)
    figures |= describe(plan.names, kept, overlap)
    pictures = draw(plan.names, kept, overlap, folder / "report")
    return Outcome(folder, figures, lines_of(figures), [page, *pictures])


def _with_weights(recipe: Any, weights: Sequence[float]) -> Any:
    """The recipe with a weight for each model; it has one part, as PCB needs whole models."""
    from dataclasses import replace

    from polytask.merge.recipe import Case, Setting

    (part,) = recipe.parts
    members = tuple(
        replace(m, settings={**m.settings, "weight": Setting((Case(float(w)),))})
        for m, w in zip(part.members, weights, strict=True)
    )
    told = [float(w) for w in weights]
    said = {**recipe.said, "searched weights": told}
    return replace(recipe, parts=(replace(part, members=members),), said=said)


def merge_population(config: PCBRunConfig, say: Say) -> Outcome:
    """The experts of population E: survivors, and accuracy over ratio and scale."""
    from polytask.merge.method import make_method
    from polytask.merge.survivors import survivors
    from polytask.merge.vectors import TaskVectors
    from polytask.systems.testbeds import names, names_merges

    say("loading the experts (trained once, then kept in the cache)")
    bed = names.population(config.seed, config.quick)
    vectors = TaskVectors.from_state_dicts(
        bed.base, list(bed.experts.values()), names=list(bed.experts)
    )
    kept, overlap = survivors(make_method("pcb", {}), vectors)
    ratios, scales = RATIOS, names_merges.MEANS[::2]
    grid = []
    for ratio in ratios[: 2 if config.quick else None]:
        say(f"accuracy at ratio {ratio:g}")
        along = names_merges.direction(bed, "pcb", ratio=ratio)
        grid.append([p.accuracy for p in names_merges.path(bed, along, scales)])
    folder = config.out / "pcb-merging"
    folder.mkdir(parents=True, exist_ok=True)
    figures = describe(vectors.names, kept, overlap)
    figures |= {"ratios": list(ratios[: len(grid)]), "scales": list(scales), "accuracy": grid}
    files.write_json(folder / "result.json", figures)
    pictures = draw(vectors.names, kept, overlap, folder)
    pictures.append(draw_grid(ratios[: len(grid)], scales, grid, folder))
    return Outcome(folder, figures, lines_of(figures), [folder / "result.json", *pictures])


def describe(names: Sequence[str], kept: Mapping[str, Any], overlap: Any) -> dict[str, Any]:
    """Survivors as plain numbers."""
    return {
        "models": list(names),
        "kept": {key: [float(v) for v in row] for key, row in kept.items()},
        "overlap": [[float(v) for v in row] for row in overlap],
    }


def lines_of(figures: Mapping[str, Any]) -> list[str]:
    """For people: who shares parameters with whom, and the weights found."""
    names, overlap = figures["models"], figures["overlap"]
    pairs = [(overlap[i][j], names[i], names[j]) for i in range(len(names)) for j in range(i)]
    most = max(pairs)
    lines = [f"most shared parameters: {most[1]} and {most[2]} ({most[0]:.0%} of their survivors)"]
    if "weights" in figures:
        told = ", ".join(f"{name} {value:.2f}" for name, value in figures["weights"].items())
        lines.append(f"weights found: {told}")
    return lines


def draw(names: Sequence[str], kept: Mapping[str, Any], overlap: Any, folder: Path) -> list[Path]:
    """kept.png (share of surviving parameters by block) and overlap.png."""
    import numpy as np

    from polytask.merge.coefficients import block_of
    from polytask.report import drawing

    blocks: dict[str, list[Any]] = {}
    for key, row in kept.items():
        blocks.setdefault(block_of(key), []).append(row.numpy())
    with drawing.style() as figure_of:
        figure = figure_of(figsize=(drawing.WIDTH, 3.4), layout="constrained")
        ax = figure.add_subplot()
        place = np.arange(len(blocks))
        wide = 0.8 / len(names)
        for k, (name, look) in enumerate(drawing.looks(list(names)).items()):
            heights = [np.mean([row[k] for row in rows]) for rows in blocks.values()]
            ax.bar(
                place + (k - (len(names) - 1) / 2) * wide,
                heights,
                wide,
                color=look.colour,
                label=name,
            )
        shown = place[:: max(1, len(place) // 12)]
        ax.set_xticks(shown, [list(blocks)[i] for i in shown])
        ax.set_ylabel("share of parameters kept\n(mean over tensors)")
        ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
        title = "Which parameters survive the competition"
        ax.set_title(title)
        drawing.finish(figure, folder, "kept", title, "By block of layers.")
        figure = figure_of(
            figsize=(0.75 * len(names) + 2.6, 0.6 * len(names) + 1.6), layout="constrained"
        )
        _map(figure, overlap.numpy(), names, names, "shared survivors / all of both", "{:.2f}")
        title = "Who keeps the same parameters"
        figure.axes[0].set_title(title)
        drawing.finish(figure, folder, "overlap", title, "1: the same; 0: none in common.")
    return [folder / "kept.png", folder / "overlap.png"]


def draw_grid(ratios: Sequence[float], scales: Sequence[float], grid: Any, folder: Path) -> Path:
    """grid.png: validation accuracy over ratio and scale."""
    import numpy as np

    from polytask.report import drawing

    with drawing.style() as figure_of:
        figure = figure_of(figsize=(drawing.WIDTH, 2.8), layout="constrained")
        rows, columns = [f"{r:g}" for r in ratios], [f"{s:g}" for s in scales]
        _map(figure, np.asarray(grid), rows, columns, "accuracy", "{:.3f}")
        ax = figure.axes[0]
        ax.set_xlabel("scale")
        ax.set_ylabel("ratio kept")
        title = "Accuracy on validation texts"
        ax.set_title(title)
        drawing.finish(figure, folder, "grid", title, "Mean over tasks.")
    return folder / "grid.png"


def _map(
    figure: Any, values: Any, rows: Sequence[str], columns: Sequence[str], label: str, form: str
) -> None:
    import numpy as np

    from polytask.report import drawing

    ax = figure.add_subplot()
    # What a model shares with itself would take all of the scale.
    apart = values[~np.eye(len(rows), dtype=bool)] if rows == columns else values
    image = ax.imshow(values, aspect="auto", cmap="viridis", vmin=apart.min(), vmax=apart.max())
    ax.set_xticks(range(len(columns)), columns)
    ax.set_yticks(range(len(rows)), rows)
    ax.grid(False)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            ink = drawing.ink_on(image.cmap(image.norm(value)))
            ax.text(j, i, form.format(value), ha="center", va="center", color=ink, fontsize=8)
    figure.colorbar(image, ax=ax, label=label)
