"""From a configuration to tasks, processor, model and sampler: all checks, nothing long."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from polytask.errors import ConfigError
from polytask.evaluate.metric import find_metric
from polytask.mixture.policies import MixtureConfig
from polytask.models.multitask import MultitaskModel
from polytask.pipeline import adapting, skill_graphs
from polytask.pipeline.config import RunConfig
from polytask.pipeline.shots import few_shots
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
    base: Path = Path()
    given: RunConfig | None = None  # the configuration before adapters said what trains

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
    config = adapting.resolve(config, base)
    taskset = build_tasks(config.tasks, base, config.seed)
    if config.model.experts is not None and config.model.experts.router != "blind":
        # A gate per task needs a pass per task, also where tasks label the same rows.
        taskset = replace(taskset, groups=TaskSet.of(*taskset.tasks).groups)
    _check_judging(taskset)
    mixture = skill_graphs.resolved(_weighted(config, taskset), taskset, base)
    config = config.model_copy(update={"mixture": mixture})
    leaks = None
    if config.leaks is not None:
        tell("looking for leaks between splits and across tasks")
        leaks = check_leaks(taskset, config.leaks)
    if config.adapt is not None and config.adapt.shots is not None:
        taskset = few_shots(taskset, config.adapt.shots, config.seed)
    processor = fit_processor(config, taskset, base)
    given = config
    config, model = adapting.make_model(given, taskset, processor, base)
    return Prepared(config, taskset, processor, model, leaks, base, given)


def fit_processor(config: RunConfig, taskset: TaskSet, base: Path = Path()) -> Processor:
    """The processor, with the vocabulary of the adapted run or the hub model where there is one."""
    tokenizer: Any = adapting.vocabulary(config, base)
    if tokenizer is not None:
        return Processor.fit(taskset, config.encoding, tokenizer)
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
    given = prepared.given or prepared.config
    config = given.model_copy(update={"mixture": MixtureConfig(policy="uniform")})
    processor = Processor.fit(taskset, config.encoding, prepared.processor.codec)
    config, model = adapting.make_model(config, taskset, processor, prepared.base)
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
