"""Batches by index: `batch(i)` is a function of i alone, so nothing about data has to be replayed.

`Loader` draws rows from a mixture sampler, encodes what it has not seen yet (encoded examples are
kept as long as they fit in memory), and pads them into a batch. Processes take consecutive parts of
the same draw, so the rows of a step do not depend on how many processes share them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from polytask.data.rows import Row, RowSource, StreamSource
from polytask.errors import ConfigError, DataError, suggestion
from polytask.tasks.task import TaskSet

Array = npt.NDArray[Any]


class BatchSource(Protocol):
    """What the trainer asks of a loader."""

    tasks: Sequence[str]
    rows_per_epoch: int | None

    def batch(self, index: int) -> tuple[Any, Any]:
        """Micro-batch number `index` of this process, and the draw it came from."""

    def select(self, tasks: Sequence[str]) -> None:
        """Give rows of these tasks only from now on; none given: of all."""

    def done(self, index: int, tokens: Array | None, seconds: float) -> None:
        """The micro-batch was trained on: for the ledger."""

    def observe(self, step: int, losses: Array) -> None:
        """Mean loss per task (tasks,) since the last call, NaN where unseen."""

    def state(self) -> dict[str, Any]:
        """JSON values that a resumed run needs."""

    def restore(self, state: Mapping[str, Any]) -> None: ...


class FunctionLoader:
    """A loader from a function index -> batch, for data that has no mixture."""

    def __init__(
        self,
        tasks: Sequence[str],
        function: Callable[[int], Any],
        rows_per_epoch: int | None = None,
    ) -> None:
        self.tasks = tuple(tasks)
        self.function = function
        self.rows_per_epoch = rows_per_epoch

    def batch(self, index: int) -> tuple[Any, Any]:
        return self.function(index), None

    def select(self, tasks: Sequence[str]) -> None:
        if tasks:
            raise ConfigError("this loader has the same batches for every stage: leave out 'tasks'")

    def done(self, index: int, tokens: Array | None, seconds: float) -> None:
        return None

    def observe(self, step: int, losses: Array) -> None:
        return None

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        return None


class RowReader:
    """Rows of one group's split by index, from a map-style source or a stream.

    A stream is read on from where it stands; it is opened anew to go back or far ahead, and starts
    over at its end.
    """

    FAR = 10_000  # rows worth skipping one by one instead of opening the stream again

    def __init__(self, source: RowSource | StreamSource) -> None:
        self.source = source
        self._stream: Iterator[Row] | None = None
        self._position = 0
        self._length: int | None = None

    def take(self, indices: Sequence[int]) -> list[Row]:
        if isinstance(self.source, RowSource):
            return self.source.take(indices)
        return [self._next(self.source, index) for index in indices]

    def _next(self, source: StreamSource, index: int) -> Row:
        if self._length is not None:
            index %= self._length
        ahead = index - self._position
        if self._stream is None or not 0 <= ahead <= self.FAR:
            self._stream, self._position = source.read_from(index), index
        for row in self._stream:
            self._position += 1
            if self._position > index:
                return row
        return self._start_over(source, index)

    def _start_over(self, source: StreamSource, index: int) -> Row:
        if self._length is None:
            self._length = sum(1 for _ in source.read_from(0))
            if not self._length:
                raise DataError(f"{source.name} has no rows")
        self._stream = None
        return self._next(source, index)


class Loader:
    """Batches of a task set, drawn by a sampler.

    Args:
        taskset, processor: what is encoded, and how.
        sampler: `draw(start_row, n)` gives group, index and epoch of n rows; pure in `start_row`.
        batch_size: rows of a micro-batch, over all processes.
        rank, world: this process among how many.
        restrict: builds the sampler of a stage that trains on some groups only.
        cache_bytes: encoded examples kept in memory.
        prefetch: batches prepared ahead in a thread; 0 for samplers that learn.
        ledger: counts what was trained on.
    """

    def __init__(
        self,
        taskset: TaskSet,
        processor: Any,
        sampler: Any,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        split: str = "train",
        restrict: Callable[[tuple[int, ...]], Any] | None = None,
        cache_bytes: int = 1 << 30,
        prefetch: int = 0,
        ledger: Any = None,
    ) -> None:
        from polytask.models.collate import Collator

        if batch_size < world:
            raise ConfigError(f"{batch_size} rows cannot be shared by {world} processes")
        self.taskset = taskset
        self.processor = processor
        self.tasks = taskset.names
        self.batch_size, self.rank, self.world = batch_size, rank, world
        self.ledger = ledger
        self._restrict = restrict
        self._samplers: dict[tuple[int, ...], Any] = {}
        self._groups: tuple[int, ...] = tuple(range(len(taskset.groups)))
        self._samplers[self._groups] = sampler
        self._keep: frozenset[int] | None = None  # task ids of the stage; None: all
        self._readers = [RowReader(group.splits[split]) for group in taskset.groups]
        self._collate = Collator.of(taskset, int(getattr(processor, "pad_id", 0) or 0))
        self._cache = ExampleCache(cache_bytes)
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(1) if prefetch else None
        self._ahead = prefetch
        self._waiting: dict[int, Future[tuple[Any, Any]]] = {}
        self._draws: dict[int, Any] = {}

    @property
    def rows_per_epoch(self) -> int | None:
        """Rows of all groups together; None when one of them is a stream."""
        sources = [reader.source for reader in self._readers]
        sizes = [len(s) for s in sources if isinstance(s, RowSource)]
        return sum(sizes) if len(sizes) == len(sources) else None

    @property
    def sampler(self) -> Any:
        return self._samplers[self._groups]

    def batch(self, index: int) -> tuple[Any, Any]:
        """Micro-batch `index` of this process and its draw (group, index and epoch of each row)."""
        if self._pool is None:
            return self._make(index)
        future = self._waiting.pop(index, None)
        for later in range(index + 1, index + 1 + self._ahead):
            if later not in self._waiting:
                self._waiting[later] = self._pool.submit(self._make, later)
        for stale in [i for i in self._waiting if not index < i <= index + self._ahead]:
            self._waiting.pop(stale).cancel()
        return self._make(index) if future is None else future.result()

    def _make(self, index: int) -> tuple[Any, Any]:
        with self._lock:
            draw = self._slice(self.sampler.draw(index * self.batch_size, self.batch_size))
            examples = self._examples(draw)
        return self._collate(examples, draw.group), draw

    def _slice(self, draw: Any) -> Any:
        """This process's part of a draw, with the groups' ids in the task set."""
        from polytask.mixture.sampler import Draw

        first = self.batch_size * self.rank // self.world
        last = self.batch_size * (self.rank + 1) // self.world
        groups = np.asarray(self._groups)[np.asarray(draw.group[first:last])]
        return Draw(groups, draw.index[first:last], draw.epoch[first:last])

    def _examples(self, draw: Any) -> list[Any]:
        keys = list(zip(draw.group.tolist(), draw.index.tolist(), draw.epoch.tolist()))
        found = [self._cache.get(key) for key in keys]
        missing: dict[int, list[int]] = {}
        for place, example in enumerate(found):
            if example is None:
                missing.setdefault(keys[place][0], []).append(place)
        for group, places in missing.items():
            fresh = self._encode(group, [keys[p] for p in places])
            for place, example in zip(places, fresh):
                found[place] = example
                self._cache.put(keys[place], example)
        return found if self._keep is None else [self._masked(e, self._keep) for e in found]

    def _encode(self, group: int, keys: Sequence[tuple[int, int, int]]) -> list[Any]:
        reader = self._readers[group]
        indices = [index for _, index, _ in keys]
        rows = reader.take(indices)
        encoded: list[Any] = self.processor.encode(
            group,
            rows,
            lambda i: reader.source.where(indices[i]),
            indices=indices,
            epochs=[epoch for _, _, epoch in keys],
        )
        return encoded

    @staticmethod
    def _masked(example: Any, keep: frozenset[int]) -> Any:
        targets = {task: value for task, value in example.targets.items() if task in keep}
        return type(example)(example.sequences, targets, example.row)

    def select(self, tasks: Sequence[str]) -> None:
        """Rows of these tasks only; a row that several tasks label keeps only their labels."""
        for name in tasks:
            if name not in self.tasks:
                raise ConfigError(f"stage: unknown task '{name}'.{suggestion(name, self.tasks)}")
        ids = [t for t, name in enumerate(self.tasks) if not tasks or name in tasks]
        owner = [g for g, group in enumerate(self.taskset.groups) for _ in group.tasks]
        groups = tuple(sorted({owner[t] for t in ids}))
        if groups not in self._samplers:
            if self._restrict is None:
                raise ConfigError("a stage with 'tasks' needs a loader built with 'restrict'")
            self._samplers[groups] = self._restrict(groups)
        self._waiting.clear()
        self._groups = groups
        self._keep = frozenset(ids) if len(ids) < len(self.tasks) else None

    def done(self, index: int, tokens: Array | None, seconds: float) -> None:
        return None

    def observe(self, step: int, losses: Array) -> None:
        """Tell a learning sampler each group's mean loss (of its tasks)."""
        ends = np.cumsum([len(group.tasks) for group in self.taskset.groups])
        parts = np.split(np.asarray(losses, float), ends[:-1])
        means = np.array([_nanmean(part) for part in parts])
        self.sampler.observe(step, means[list(self._groups)])

    def state(self) -> dict[str, Any]:
        samplers = {"-".join(map(str, key)): s.state() for key, s in self._samplers.items()}
        ledger = None if self.ledger is None else self.ledger.state()
        return {"samplers": samplers, "ledger": ledger}

    def restore(self, state: Mapping[str, Any]) -> None:
        for key, value in state["samplers"].items():
            groups = tuple(int(part) for part in key.split("-"))
            if groups not in self._samplers and self._restrict is not None:
                self._samplers[groups] = self._restrict(groups)
            self._samplers[groups].restore(value)
        if self.ledger is not None:
            self.ledger.restore(state["ledger"])


def _nanmean(values: Array) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


class ExampleCache:
    """Encoded examples up to a number of bytes. Nothing is evicted: with passes over the data in
    random order, throwing out one example for another gains nothing."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._held: dict[tuple[int, int, int], Any] = {}

    def get(self, key: tuple[int, int, int]) -> Any:
        return self._held.get(key)

    def put(self, key: tuple[int, int, int], example: Any) -> None:
        size = 512 + sum(getattr(v, "nbytes", 8) for s in example.sequences for v in s.values())
        if self.used + size <= self.limit:
            self._held[key] = example
            self.used += size
