"""Batches by index: `batch(i)` is a function of i alone, so nothing about data has to be replayed.

`Loader` draws rows from a mixture sampler, encodes what it has not seen yet (encoded examples are
kept as long as they fit in memory), and pads them into a batch. Processes take consecutive parts of
the same draw, so the rows of a step do not depend on how many processes share them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from polytask.data.rows import RowSource
from polytask.errors import ConfigError, suggestion
from polytask.mixture.ledger import Ledger
from polytask.mixture.policies import MixtureConfig
from polytask.mixture.sampler import Draw, MixtureSampler, build_sampler, rank_rows
from polytask.mixture.skills import restricted
from polytask.tasks.task import TaskSet
from polytask.train.config import TrainConfig
from polytask.train.reading import ExampleCache, Key, RowReader

Array = npt.NDArray[Any]
V = TypeVar("V")
_ENDLESS = 1 << 62  # micro-batches of a loader that no run has planned yet


@dataclass(frozen=True)
class Span:
    """Micro-batches `first` to `last` (not included) train on `tasks` (none named: on all)."""

    tasks: tuple[str, ...]
    first: int
    last: int


class DataEnded(Exception):
    """The mixture has no whole batch left; `batch` raises it on every process alike."""


class BatchSource(Protocol):
    """What the trainer asks of a loader."""

    @property
    def tasks(self) -> Sequence[str]:
        """Names, in the order of task ids."""

    @property
    def ledger(self) -> Ledger | None:
        """Where what was trained on is booked."""

    @property
    def learns(self) -> bool:
        """Whether `observe` is to be called."""

    @property
    def rows_per_epoch(self) -> int | None:
        """Rows of all data together; None for streams."""

    @property
    def total_rows(self) -> int | None:
        """Rows after which the data ends for good; None while it goes on."""

    def plan(self, spans: Sequence[Span]) -> None:
        """What the run is going to ask for; called once, before the first batch."""

    def batch(self, index: int) -> tuple[Any, Any]:
        """Micro-batch number `index` of this process, and the draw it came from; `DataEnded` where
        a stopping rule that nobody could foresee has ended the data."""

    def waits_for_losses(self, index: int) -> bool:
        """Whether `batch(index)` depends on losses that `observe` has not been given yet."""

    def observe(self, step: int, losses: Array) -> None:
        """Mean loss per task (tasks,) of one step, NaN where absent; steps come in order."""

    def state(self) -> dict[str, Any]:
        """JSON values that a resumed run needs."""

    def restore(self, state: Mapping[str, Any]) -> None: ...


class FunctionLoader:
    """A loader from a function index -> batch, for data that has no mixture."""

    ledger: Ledger | None = None
    total_rows: int | None = None
    learns = False

    def __init__(
        self,
        tasks: Sequence[str],
        function: Callable[[int], Any],
        rows_per_epoch: int | None = None,
    ) -> None:
        self.tasks = tuple(tasks)
        self.function = function
        self.rows_per_epoch = rows_per_epoch

    def plan(self, spans: Sequence[Span]) -> None:
        if any(span.tasks for span in spans):
            raise ConfigError("this loader has the same batches for every stage: drop 'tasks'")

    def batch(self, index: int) -> tuple[Any, Any]:
        return self.function(index), None

    def waits_for_losses(self, index: int) -> bool:
        return False

    def observe(self, step: int, losses: Array) -> None:
        return None

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        return None


@dataclass
class _Part:
    """A sampler over some groups, and which micro-batches are its own."""

    groups: Array  # ids in the task set of the sampler's groups
    sampler: MixtureSampler


class Loader:
    """Batches of a task set, drawn by a mixture sampler.

    Args:
        taskset, processor: what is encoded, and how.
        sampler: of the whole task set's groups.
        batch_size: rows of a micro-batch, over all processes.
        rank, world: this process among how many.
        accumulate: micro-batches per step, for a sampler that learns from steps.
        restrict: builds the sampler of a stage that trains on some groups only.
        cache_bytes: encoded examples kept in memory.
        prefetch: batches prepared ahead in a thread.
    """

    def __init__(
        self,
        taskset: TaskSet,
        processor: Any,
        sampler: MixtureSampler,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        split: str = "train",
        restrict: Callable[[tuple[int, ...]], MixtureSampler] | None = None,
        cache_bytes: int = 1 << 30,
        prefetch: int = 0,
    ) -> None:
        from polytask.models.collate import Collator

        if batch_size < world:
            raise ConfigError(f"{batch_size} rows cannot be shared by {world} processes")
        self.taskset, self.processor = taskset, processor
        self.tasks = taskset.names
        self.batch_size, self.rank, self.world = batch_size, rank, world
        self.accumulate = accumulate
        self._readers = [RowReader(group.splits[split]) for group in taskset.groups]
        sizes = [_size(reader) for reader in self._readers]
        per_task = [s for s, group in zip(sizes, taskset.groups) for _ in group.tasks]
        self.ledger: Ledger | None = Ledger(self.tasks, per_task)
        self._owner = np.repeat(
            np.arange(len(taskset.groups)), [len(group.tasks) for group in taskset.groups]
        )
        self._restrict = restrict
        self._all = tuple(range(len(taskset.groups)))
        self._parts = {self._all: _Part(np.asarray(self._all), sampler)}
        self._spans: list[tuple[Span, tuple[int, ...], int, frozenset[int] | None]] = []
        self._collate = Collator.of(taskset, int(getattr(processor, "pad_id", 0) or 0))
        self._cache = ExampleCache(cache_bytes)
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(1) if prefetch else None
        self._ahead = prefetch
        self._waiting: dict[int, Future[tuple[Any, Draw]]] = {}
        self.plan([Span((), 0, _ENDLESS)])

    @property
    def sampler(self) -> MixtureSampler:
        """The sampler over all groups."""
        return self._parts[self._all].sampler

    @property
    def learns(self) -> bool:
        return bool(self.sampler.policy.adaptive)

    @property
    def rows_per_epoch(self) -> int | None:
        sizes = [_size(reader) for reader in self._readers]
        known = [size for size in sizes if size is not None]
        return sum(known) if len(known) == len(sizes) else None

    @property
    def total_rows(self) -> int | None:
        return self._parts[self._all].sampler.total_rows

    # Which rows ---------------------------------------------------------------------------------

    def plan(self, spans: Sequence[Span]) -> None:
        """Each set of groups has a sampler of its own, which goes on where it last stopped."""
        self._spans.clear()
        used: dict[tuple[int, ...], int] = {}
        for span in spans:
            for name in span.tasks:
                if name not in self.tasks:
                    hint = suggestion(name, self.tasks)
                    raise ConfigError(f"a stage names the unknown task '{name}'.{hint}")
            ids = [t for t, name in enumerate(self.tasks) if not span.tasks or name in span.tasks]
            groups = tuple(sorted({int(self._owner[t]) for t in ids}))
            if groups not in self._parts:
                if self._restrict is None:
                    raise ConfigError("a stage with 'tasks' needs a loader built with 'restrict'")
                self._parts[groups] = _Part(np.asarray(groups), self._restrict(groups))
            start = used.get(groups, 0)
            used[groups] = start + span.last - span.first
            keep = frozenset(ids) if len(ids) < len(self.tasks) else None
            self._spans.append((span, groups, start, keep))
            self._check_end(span, groups, used[groups])

    def _check_end(self, span: Span, groups: tuple[int, ...], micro_batches: int) -> None:
        """`ConfigError` where a span is known to need more rows than the mixture has."""
        total = self._parts[groups].sampler.total_rows
        if span.last < _ENDLESS and total is not None and micro_batches * self.batch_size > total:
            of = f" of {', '.join(span.tasks)}" if span.tasks else ""
            raise ConfigError(
                f"the stages take {micro_batches * self.batch_size} rows from the mixture{of}, "
                f"which ends after {total} ('mixture.stop'): plan at most "
                f"{total // (self.batch_size * self.accumulate)} steps on it, or drop 'stop'"
            )

    def _where(self, index: int) -> tuple[_Part, int, frozenset[int] | None]:
        """The sampler of a micro-batch, the micro-batch's number there, and the tasks to keep."""
        for span, groups, start, keep in self._spans:
            if span.first <= index < span.last:
                return self._parts[groups], start + index - span.first, keep
        raise IndexError(f"micro-batch {index} is not planned")

    def draw(self, index: int) -> Draw:
        """This process's rows of a micro-batch: group (in the task set), index and epoch."""
        part, number, _ = self._where(index)
        first, count = rank_rows(number, self.batch_size, self.rank, self.world)
        found = part.sampler.draw(first, count)
        end = part.sampler.total_rows  # an adaptive policy knows it when it has decided so far
        if end is not None and (number + 1) * self.batch_size > end:
            raise DataEnded(
                f"the mixture ended after {end} rows ('mixture.stop'), before micro-batch "
                f"{index + 1} of {self.batch_size} rows"
            )
        return Draw(part.groups[found.group], found.index, found.epoch)

    def waits_for_losses(self, index: int) -> bool:
        part, number, _ = self._where(index)
        ready = part.sampler.ready_rows()
        return ready is not None and (number + 1) * self.batch_size > ready

    # Batches ------------------------------------------------------------------------------------

    def batch(self, index: int) -> tuple[Any, Draw]:
        """Micro-batch `index` of this process and its draw."""
        if self._pool is None:
            return self._make(index)
        future = self._waiting.pop(index, None)
        for stale in [i for i in self._waiting if not index < i <= index + self._ahead]:
            self._waiting.pop(stale).cancel()
        for later in range(index + 1, index + 1 + self._ahead):
            if later >= self._spans[-1][0].last or self.waits_for_losses(later):
                break
            if later not in self._waiting:
                self._waiting[later] = self._pool.submit(self._make, later)
        return self._make(index) if future is None else future.result()

    def _make(self, index: int) -> tuple[Any, Draw]:
        with self._lock:
            draw = self.draw(index)
            examples = self._examples(draw)
        keep = self._where(index)[2]
        if keep is not None:
            examples = [_masked(example, keep) for example in examples]
        return self._collate(examples, draw.group), draw

    def _examples(self, draw: Draw) -> list[Any]:
        # Only where a row's template is drawn anew does an epoch change its example.
        varies = np.array([self.processor.templates(g) > 1 for g in range(len(self._readers))])
        epoch = np.where(varies[draw.group], draw.epoch, 0)
        keys = list(zip(draw.group.tolist(), draw.index.tolist(), epoch.tolist()))
        found = [self._cache.get(key) for key in keys]
        missing: dict[int, list[int]] = {}
        for place, example in enumerate(found):
            if example is None:
                missing.setdefault(keys[place][0], []).append(place)
        for group, places in missing.items():
            fresh = self._encode(group, [keys[place] for place in places])
            for place, example in zip(places, fresh):
                found[place] = example
                self._cache.put(keys[place], example)
        return found

    def _encode(self, group: int, keys: Sequence[Key]) -> list[Any]:
        reader = self._readers[group]
        indices = [index for _, index, _ in keys]
        encoded: list[Any] = self.processor.encode(
            group,
            reader.take(indices),
            lambda i: reader.source.where(indices[i]),
            indices=indices,
            epochs=[epoch for _, _, epoch in keys],
        )
        return encoded

    # What the policy learns ---------------------------------------------------------------------

    def observe(self, step: int, losses: Array) -> None:
        """Tell the step's sampler each group's mean loss (of its tasks)."""
        part, number, _ = self._where(step * self.accumulate)
        part.sampler.observe(number // self.accumulate, self._by_group(losses)[part.groups])

    def _by_group(self, losses: Array) -> Array:
        """(groups,) means of the known losses of each group's tasks; NaN where none is."""
        known = ~np.isnan(losses)
        total = np.bincount(self._owner, np.where(known, losses, 0.0), len(self._all))
        count = np.bincount(self._owner, known, len(self._all))
        means: Array = np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0)
        return means

    def wants_validation(self, step: int) -> bool:
        """Whether the step's mixture wants losses on validation rows before the step."""
        sampler, own, last = self._own_step(step)[1:]
        return sampler.wants_validation(own, last)

    def validated(self, step: int, losses: Array) -> dict[str, float]:
        """Give the step's mixture the validation losses (tasks,) before the step, where it wants
        them; the shares that hold from here on, by group."""
        part, sampler, own, last = self._own_step(step)
        shares = sampler.evaluate(own, last, self._by_group(losses)[part.groups])
        return dict(zip(sampler.names, map(float, shares)))

    def _own_step(self, step: int) -> tuple[_Part, MixtureSampler, int, int]:
        """A step's sampler, the step's number there, and its last row."""
        part, number, _ = self._where(step * self.accumulate)
        last = (number + self.accumulate) * self.batch_size - 1
        return part, part.sampler, number // self.accumulate, last

    def state(self) -> dict[str, Any]:
        return {"-".join(map(str, key)): part.sampler.state() for key, part in self._parts.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        for key, part in self._parts.items():
            part.sampler.restore(state["-".join(map(str, key))])


def _size(reader: RowReader) -> int | None:
    return len(reader.source) if isinstance(reader.source, RowSource) else None


def _masked(example: Any, keep: frozenset[int]) -> Any:
    """The example with the labels of the stage's tasks only."""
    targets = {task: value for task, value in example.targets.items() if task in keep}
    return type(example)(example.sequences, targets, example.row)


def make_loader(
    taskset: TaskSet,
    processor: Any,
    train: TrainConfig,
    mixture: MixtureConfig,
    rank: int = 0,
    world: int = 1,
) -> Loader:
    """The loader of a configuration's `train:` and `mixture:` sections."""
    names = [group.name for group in taskset.groups]
    sizes = [_size(RowReader(group.splits["train"])) for group in taskset.groups]

    def sampler(groups: tuple[int, ...]) -> MixtureSampler:
        chosen = [names[g] for g in groups]
        some = mixture
        if len(groups) < len(names):
            some = mixture.model_copy(
                update={
                    "weights": _only(mixture.weights, chosen),
                    "sizes": _only(mixture.sizes, chosen),
                    "stop": _only(mixture.stop, chosen)
                    if isinstance(mixture.stop, Mapping)
                    else mixture.stop,
                    "prior": _only(mixture.prior, chosen),
                    "targets": tuple(n for n in mixture.targets if n in chosen),
                    "order": tuple(n for n in mixture.order if n in chosen),
                    "graph": restricted(mixture.graph, chosen),
                }
            )
        return build_sampler(some, chosen, [sizes[g] for g in groups], train.seed, train.batch_size)

    _check_rounds(train, mixture)
    return Loader(
        taskset,
        processor,
        sampler(tuple(range(len(names)))),
        train.micro_batch,
        rank,
        world,
        train.accumulate,
        restrict=sampler,
        prefetch=train.prefetch,
    )


def _check_rounds(train: TrainConfig, mixture: MixtureConfig) -> None:
    """`update_steps` has to divide every stage whose length is stated in steps."""
    stages = train.stages or (train.plan() if train.steps else ())
    for stage in stages:
        if mixture.update_steps and stage.steps % mixture.update_steps:
            raise ConfigError(
                f"mixture.update_steps = {mixture.update_steps} does not divide the {stage.steps} "
                f"steps of stage '{stage.name}': the last round would be cut short"
            )


def _only(table: Mapping[str, V], names: Sequence[str]) -> dict[str, V]:
    return {name: value for name, value in table.items() if name in names}
