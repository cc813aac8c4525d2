"""Learning a skill graph of a user's tasks: short runs from one start, and what they changed."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from polytask.errors import ConfigError
from polytask.mixture import LearnedGraph, SkillGraph, learn_graph
from polytask.mixture.graph_learning import GraphMode
from polytask.mixture.policies import MixtureConfig
from polytask.mixture.skillit_config import AUTO
from polytask.pipeline import adapting
from polytask.pipeline.config import RunConfig
from polytask.pipeline.fit import fit, validation_of
from polytask.pipeline.prepare import Prepared, Say
from polytask.train.distribution import Distribution

GRAPH = "graph.json"


def with_graph(prepared: Prepared, folder: Path, say: Say) -> Prepared:
    """The run with its graph: learned now where the configuration says 'auto'.

    The graph and its runs' losses are kept in the run folder, so an interrupted run learns only
    what is missing and a resumed one nothing.
    """
    mixture = prepared.config.mixture
    if mixture.policy != "skillit" or mixture.graph != AUTO:
        return prepared
    path = folder / GRAPH
    if path.is_file():
        graph = SkillGraph.load(path)
    else:
        found = learn(
            prepared,
            folder / "graph",
            mixture.graph_steps,
            mixture.graph_mode,
            eval_only=mixture.eval_only,
            say=say,
        )
        found.save(path)
        graph = found.graph
        say(f"skill graph: {found.runs} runs of {found.steps} steps, kept in {path}")
    chosen = mixture.model_copy(update={"graph": graph.to_dict(), "eval_only": ()})
    return replace(prepared, config=prepared.config.model_copy(update={"mixture": chosen}))


def learn(
    prepared: Prepared,
    folder: Path,
    steps: int,
    mode: GraphMode,
    *,
    eval_only: Sequence[str] = (),
    say: Say,
) -> LearnedGraph:
    """Learn the graph of a prepared configuration's row groups; `folder` holds the runs.

    Every run starts from the same weights and sees a group's rows in the same order.
    """
    names = [group.name for group in prepared.taskset.groups]
    trained = [name for name in names if name not in eval_only]

    def train_fn(shares: Mapping[str, float], steps: int) -> dict[str, float]:
        run = folder / ("run-" + "-".join(str(names.index(name)) for name in shares))
        some = _fresh(prepared, names, shares)
        if steps and fit(some, run, steps).stopped == "interrupted":
            raise KeyboardInterrupt
        found = _losses(some)
        shutil.rmtree(run, ignore_errors=True)
        return found

    judged = tuple(eval_only) or None
    cache = folder / "runs.json"
    return learn_graph(train_fn, trained, steps, mode, eval_skills=judged, cache=cache, say=say)


def _fresh(prepared: Prepared, names: Sequence[str], shares: Mapping[str, float]) -> Prepared:
    """The same tasks and start, a mixture of fixed shares."""
    given: RunConfig = prepared.given or prepared.config
    weights = {name: shares.get(name, 0.0) for name in names}
    if not shares:
        weights = dict.fromkeys(names, 1.0)
    mixture = MixtureConfig(policy="fixed", weights=weights, sizes=given.mixture.sizes)
    config = given.model_copy(update={"mixture": mixture})
    config, model = adapting.make_model(config, prepared.taskset, prepared.processor, prepared.base)
    return replace(prepared, config=config, model=model)


def _losses(prepared: Prepared) -> dict[str, float]:
    """Validation loss of every row group: the mean of its tasks'."""
    distribution = Distribution(prepared.config.train.device)
    loader = prepared.loader(distribution)
    model: Any = prepared.model.to(distribution.device).eval()
    losses = dict(zip(loader.tasks, validation_of(prepared, loader).measure(model)))
    found = {}
    for group in prepared.taskset.groups:
        known = [losses[task.name] for task in group.tasks if not np.isnan(losses[task.name])]
        if not known:
            raise ConfigError(f"'{group.name}' has no labelled validation row to judge it by")
        found[group.name] = float(np.mean(known))
    return found
