"""From a configuration to tasks, processor, model and sampler: all checks, nothing long."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from polytask.errors import ConfigError
from polytask.evaluate.metric import find_metric
from polytask.mixture.policies import MixtureConfig
from polytask.models.build import build_model
from polytask.models.multitask import MultitaskModel
from polytask.pipeline.config import RunConfig
from polytask.tasks import LeakReport, Processor, TaskSet, build_tasks, check_leaks
from polytask.tasks.task import RowGroup
from polytask.train.distribution import Distribution
from polytask.train.loader import Loader, make_loader

Say = Callable[[str], None]


@dataclass(frozen=True)
class Prepared:
    """What a configuration becomes before the first step."""

    config: RunConfig
    taskset: TaskSet
    processor: Processor
    model: MultitaskModel
    leaks: LeakReport | None

    def loader(self, distribution: Distribution) -> Loader:
        """Batches of the mixture, for this process; the ledger counts them."""
        return make_loader(
            self.taskset,
            self.processor,
            self.config.train,
            self.config.mixture,
            distribution.rank,
            distribution.world,
        )


def prepare(config: RunConfig, base: Path = Path(), say: Say | None = None) -> Prepared:
    """Open data, check it, fit the processor, build the model.

    Args:
        config: what to prepare.
        base: relative paths in the configuration start here.
        say: is told what is being done.

    Raises:
        UserError: whatever is wrong with configuration or data, before anything long.
    """
    tell = say or (lambda text: None)
    tell(f"reading {len(config.tasks)} tasks")
    taskset = build_tasks(config.tasks, base, config.seed)
    _check_judging(taskset)
    config = config.model_copy(update={"mixture": _weighted(config, taskset)})
    leaks = None
    if config.leaks is not None:
        tell("looking for leaks between splits and across tasks")
        leaks = check_leaks(taskset, config.leaks)
    processor = fit_processor(config, taskset)
    model = build_model(config.model, taskset, processor)
    return Prepared(config, taskset, processor, model, leaks)


def fit_processor(config: RunConfig, taskset: TaskSet) -> Processor:
    """The processor, with the hub model's own tokenizer where there is one."""
    tokenizer: Any = None
    if config.model.hub is not None:
        from transformers import AutoTokenizer

        from polytask.models.hub import locate

        tokenizer = AutoTokenizer.from_pretrained(locate(config.model.hub))
    return Processor.fit(taskset, config.encoding, tokenizer)


def subset(prepared: Prepared, names: Sequence[str]) -> Prepared:
    """The same recipe for some tasks: own processor (same vocabulary), own fresh model.

    Their rows come in equal shares; one task alone is what a run is compared with.
    """
    groups = []
    for group in prepared.taskset.groups:
        tasks = tuple(task for task in group.tasks if task.name in names)
        if tasks:
            groups.append(RowGroup(group.name, tasks))
    taskset = TaskSet(tuple(groups))
    config = prepared.config.model_copy(update={"mixture": MixtureConfig(policy="uniform")})
    processor = Processor.fit(taskset, config.encoding, prepared.processor.codec)
    model = build_model(config.model, taskset, processor)
    return replace(prepared, config=config, taskset=taskset, processor=processor, model=model)


def _check_judging(taskset: TaskSet) -> None:
    """Every task is scored during training and at the end: rows and measures must exist."""
    for task in taskset.tasks:
        for split in ("valid", "test"):
            if split not in task.splits:
                raise ConfigError(
                    f"task '{task.name}' has no {split} rows; give 'split: {{{split}: 0.1}}'"
                )
        for metric in task.metrics:
            try:
                find_metric(metric, task.schema.head)
            except ConfigError as error:
                raise ConfigError(f"task '{task.name}': {error}") from None


def _weighted(config: RunConfig, taskset: TaskSet) -> MixtureConfig:
    """The mixture with the tasks' own weights, where its policy goes by given weights."""
    given = {name: task.weight for name, task in config.tasks.items() if task.weight != 1}
    mixture = config.mixture
    if not given:
        return mixture
    first = next(iter(given))
    if mixture.policy != "fixed":
        raise ConfigError(
            f"tasks.{first}.weight counts only with 'mixture: {{policy: fixed}}'; the policy is "
            f"'{mixture.policy}'"
        )
    if mixture.weights:
        raise ConfigError(f"give tasks.{first}.weight or mixture.weights, not both")
    weights = {g.name: max(config.tasks[t.name].weight for t in g.tasks) for g in taskset.groups}
    return mixture.model_copy(update={"weights": weights})
