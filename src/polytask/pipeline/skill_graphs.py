"""The skill graph that a configuration names: read, put in its place, checked against the tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from polytask.errors import ConfigError, suggestion
from polytask.mixture import SkillGraph
from polytask.mixture.policies import Groups, MixtureConfig
from polytask.mixture.skillit import skillit_policy
from polytask.mixture.skillit_config import AUTO
from polytask.tasks import TaskSet


def resolved(mixture: MixtureConfig, taskset: TaskSet, base: Path) -> MixtureConfig:
    """The mixture with its graph in it instead of a file's name, and checked against the tasks;
    'auto' stays until it is learned.

    Tasks that label the same rows are one skill, called as their row group.
    """
    if mixture.policy != "skillit":
        return mixture
    names = [group.name for group in taskset.groups]
    for name in mixture.eval_only:
        if name not in names:
            raise ConfigError(f"mixture.eval_only names '{name}'.{suggestion(name, names)}")
    if mixture.graph == AUTO:
        _check_auto(mixture, names)
        return mixture
    if mixture.eval_only:
        raise ConfigError(
            "mixture.eval_only goes with 'graph: auto'; a given graph says by its rows what is "
            "trained on"
        )
    if isinstance(mixture.graph, str):
        graph = SkillGraph.load(base / mixture.graph, mixture.clip_graph)
        mixture = mixture.model_copy(update={"graph": graph.to_dict()})
    skillit_policy(mixture, Groups(tuple(names), (None,) * len(names)))  # raises what is wrong
    return mixture


def _check_auto(mixture: MixtureConfig, names: Sequence[str]) -> None:
    """What can be known of a graph before it is learned: its names, and all the settings."""
    trained = [name for name in names if name not in mixture.eval_only]
    judged = list(mixture.eval_only or names)
    if not trained:
        raise ConfigError("mixture.eval_only names every task: there is nothing to train on")
    likely = SkillGraph(np.ones((len(trained), len(judged))), trained, judged)
    skillit_policy(mixture, Groups(tuple(names), (None,) * len(names)), likely)
