"""Carry out a plan: tensors stream from the models' files into the files of the result.

    for each pass the method needs:                 # none for most methods
        measure every tensor, piece by piece        # counts that add up in any order
    for each tensor (several at once, within a budget of memory):
        for each piece (a chunk where the method allows it, else the whole tensor):
            read K versions and the base, check them, merge, write at the place the plan gave it

Pieces are the methods' own unit of work and every file position is known beforehand, so nothing
waits for its turn and the result does not depend on the order: it equals the merge in memory bit
for bit. A journal of finished tensors lies beside the result; what was killed goes on there.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polytask import files
from polytask.errors import DataError
from polytask.merge.layout import CHUNK, Item
from polytask.merge.method import State, TensorInfo, cast
from polytask.merge.plan import Plan, check_disk
from polytask.merge.vectors import check_finite

Progress = Callable[[str, int, int], None]  # what is done, bytes done, bytes in all
RESULT, JOURNAL, PLAN = "result", "journal.jsonl", "plan.json"
FLOOR = 256 << 20  # bytes of working memory that are used although no tensor needs them
PASS_CHUNKS = 8  # chunks that one measurement takes at a time


def work_folder(out: Path) -> Path:
    """Where an unfinished merge lies: beside its result, hidden."""
    return out.with_name(f".{out.name}.merging")


def execute(
    plan: Plan,
    out: Path,
    finish: Callable[[Path], None],
    *,
    workers: int | None = None,
    memory: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    sync_bytes: int = 1 << 28,
) -> Path:
    """Write the merged model; `out` appears only when it is complete.

    Args:
        plan: from `make_plan`.
        out: folder to make. One that exists is refused unless `overwrite`.
        finish: puts everything but the tensors into the folder it is given.
        workers: tensors in work at once; default: one for each core.
        memory: bytes for the models' tensors in work together; never below what the largest needs.
            Default: that, or 256 MB if it is less.
        progress: called as work proceeds.
        sync_bytes: after so many bytes of the result the journal is brought up to date.

    Raises:
        MergeError: NaN or infinity in a model (tensor and model named), overflow of the result.
        DataError: the disk is full or cannot be written; the work so far is kept and resumed.
    """
    if out.exists() and not overwrite:
        raise DataError(f"{out} exists already: choose another folder, or say --overwrite")
    work = work_folder(out)
    try:
        with files.locked(work):
            done = _prepare(plan, work)
            check_disk(plan, out, sum(i.nbytes for i in plan.items if i.name in done))
            folder = work / RESULT
            run = _Run(plan, work, done, workers, memory, progress, sync_bytes)
            run.go()
            finish(folder)
            files.write_manifest(folder, {s.file: run.sum_of(s.file) for s in plan.shards})
            _publish(folder, out)
    except OSError as error:
        raise _told(error, work) from error
    shutil.rmtree(work, ignore_errors=True)
    return out


def _prepare(plan: Plan, work: Path) -> set[str]:
    """Names that an interrupted merge of the same plan has finished; a clean folder otherwise."""
    path = work / PLAN
    try:
        same = json.loads(path.read_text(encoding="utf-8"))["fingerprint"] == plan.fingerprint
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        for old in (path, work / JOURNAL):
            old.unlink(missing_ok=True)
        shutil.rmtree(work / RESULT, ignore_errors=True)
        (work / RESULT).mkdir()
        for shard in plan.shards:
            with (work / RESULT / shard.file).open("wb") as handle:
                handle.write(shard.header)
                handle.truncate(shard.size)
        files.write_json(path, {"fingerprint": plan.fingerprint})
        return set()
    found = set()
    if (work / JOURNAL).is_file():
        for line in (work / JOURNAL).read_bytes().split(b"\n")[:-1]:  # the last may be torn
            found |= set(json.loads(line))
    return found & {item.name for item in plan.items}


def _publish(folder: Path, out: Path) -> None:
    old = None
    if out.exists():
        old = out.with_name(f".{out.name}.{os.getpid()}.old")
        out.rename(old)
    folder.rename(out)
    if old is not None:
        shutil.rmtree(old)


def _told(error: OSError, work: Path) -> Exception:
    reasons = {
        errno.ENOSPC: "no space left on the device",
        errno.EDQUOT: "the disk quota is used up",
        errno.EFBIG: "the limit on file sizes is reached",
        errno.EACCES: "permission denied",
        errno.EROFS: "the file system is read-only",
    }
    if error.errno not in reasons:
        return error
    return DataError(
        f"cannot write {error.filename or work}: {reasons[error.errno]}. What is done is kept in "
        f"{work}: make room and run the same command again"
    )


class _Stopped(Exception):
    """Another worker failed, or the user interrupted."""


class _Budget:
    """Bytes that may be in use at once."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.free = total

    def take(self, wanted: int) -> bool:
        if wanted > self.free and self.free < self.total:
            return False
        self.free -= wanted
        return True


class _Run:
    def __init__(
        self,
        plan: Plan,
        work: Path,
        done: set[str],
        workers: int | None,
        memory: int | None,
        progress: Progress | None,
        sync_bytes: int,
    ) -> None:
        self.plan = plan
        self.folder = work / RESULT
        self.journal = work / JOURNAL
        self.done = done
        self.workers = max(1, workers or len(os.sched_getaffinity(0)))
        largest = max((item.memory for item in plan.items), default=0)
        self.memory = max(largest, FLOOR if memory is None else memory)
        self.progress = progress or (lambda what, done, total: None)
        self.sync_bytes = sync_bytes
        self.places = {n: (s.file, at) for s in plan.shards for n, at in s.places.items()}
        self.stop = threading.Event()
        self._own = threading.local()
        self._handles: dict[str, int] = {}

    def go(self) -> None:
        """Passes, then tensors. Raises what went wrong first."""
        try:
            for shard in self.plan.shards:
                self._handles[shard.file] = os.open(self.folder / shard.file, os.O_RDWR)
            todo = [item for item in self.plan.items if item.name not in self.done]
            state = self._passes() if any(item.action == "merge" for item in todo) else {}
            self._merge(todo, state)
        finally:
            for handle in self._handles.values():
                os.close(handle)

    def _passes(self) -> State:
        method, state = self.plan.method, dict[str, Any]()
        total_bytes = sum(item.nbytes for item in self.plan.merged)
        for number, what in enumerate(method.passes):
            total: Any = None
            seen = 0
            task = partial(self._measured, number=number, state=state)
            for item, part in self._spread(self.plan.merged, task):
                if part is not None:
                    total = part if total is None else method.combine(number, total, part)
                seen += item.nbytes
                self.progress(f"looking for {what}", seen, total_bytes)
            state = dict(method.finish(number, total, state, self.plan.names))
        return state

    def _merge(self, todo: Sequence[Item], state: State) -> None:
        fresh: list[str] = []
        fresh_bytes, since = 0, time.monotonic()
        total = sum(item.nbytes for item in self.plan.items)
        written = total - sum(item.nbytes for item in todo)
        self.progress("merging", written, total)
        try:
            for item, _ in self._spread(todo, partial(self._made, state=state)):
                fresh.append(item.name)
                fresh_bytes += item.nbytes
                written += item.nbytes
                self.progress("merging", written, total)
                if fresh_bytes >= self.sync_bytes or time.monotonic() - since > 10:
                    self._note(fresh)
                    fresh, fresh_bytes, since = [], 0, time.monotonic()
        finally:
            if fresh and len(self.done) + len(fresh) < len(self.plan.items):
                self._note(fresh)

    def _note(self, names: list[str]) -> None:
        """Write names into the journal once their bytes are on the disk."""
        for handle in self._handles.values():
            os.fdatasync(handle)
        with self.journal.open("ab") as journal:
            journal.write(json.dumps(names).encode() + b"\n")
            journal.flush()
            os.fsync(journal.fileno())
        self.done.update(names)

    def _spread(
        self, items: Sequence[Item], task: Callable[[Item], Any]
    ) -> Iterator[tuple[Item, Any]]:
        """Items with their results as they are ready, large ones first, within the budget."""
        waiting = sorted(items, key=lambda item: -item.memory)
        budget = _Budget(self.memory)
        running: dict[Future[Any], Item] = {}
        threads = torch.get_num_threads()
        with ThreadPoolExecutor(self.workers, initializer=self._begin) as pool:
            try:
                while waiting or running:
                    at = 0
                    while at < len(waiting) and len(running) < self.workers:
                        if budget.take(waiting[at].memory):
                            item = waiting.pop(at)
                            running[pool.submit(task, item)] = item
                        else:
                            at += 1
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        item = running.pop(future)
                        budget.free += item.memory
                        yield item, future.result()
            except BaseException:
                self.stop.set()
                raise
            finally:
                torch.set_num_threads(threads)

    def _begin(self) -> None:
        if self.workers > 1:
            torch.set_num_threads(1)  # of this worker; there is one for each core

    def _pieces(self, item: Item, size: int) -> Iterator[tuple[int, int]]:
        step = item.count if item.whole else size
        for start in range(0, item.count, max(1, step)):
            if self.stop.is_set():
                raise _Stopped
            yield start, min(step, item.count - start)
        if not item.count:
            yield 0, 0

    def _measured(self, item: Item, number: int, state: State) -> Any:
        assert item.method is not None
        total: Any = None
        for start, count in self._pieces(item, CHUNK * PASS_CHUNKS):
            models, base = self._read(item, start, count)
            part = item.method.measure(number, models, base, self._where(item, start), state)
            total = part if total is None else item.method.combine(number, total, part)
        return total

    def _made(self, item: Item, state: State) -> None:
        for start, count in self._pieces(item, CHUNK):
            if item.action == "copy":
                number, key = item.models[0]
                made = torch.empty(count, dtype=item.work)
                self.plan.sources[number].read_into(key, made, start)
            else:
                assert item.method is not None
                models, base = self._read(item, start, count)
                extra = self._extra(item, start, count)
                where = self._where(item, start)
                made = item.method.merge(models, base, where, state, extra)
            self._write(item, start, _as(made.reshape(-1), item))

    def _where(self, item: Item, start: int) -> TensorInfo:
        names = tuple(self.plan.recipe.models[number].name for number, _ in item.models)
        return TensorInfo(item.name, names, self.plan.recipe.seed, start)

    def _read(self, item: Item, start: int, count: int) -> tuple[Tensor, Tensor | None]:
        """(K, ...) and (...): whole tensors, or flat pieces of them."""
        keys = [*item.models, *([item.base] if item.base else [])]
        room = self._room(len(keys) * count, item.work, item.whole).view(len(keys), count)
        for row, (number, key) in zip(room, keys, strict=True):
            source = self.plan.sources[number]
            source.read_into(key, row, start)
            if not math.isfinite(float(row.sum())):  # far cheaper than asking each element
                check_finite(row, key, source.name)
        shape = item.shape if item.whole else (count,)
        models = room[: len(item.models)].view(len(item.models), *shape)
        return models, room[-1].view(shape) if item.base else None

    def _room(self, count: int, dtype: torch.dtype, whole: bool) -> Tensor:
        """Memory for one piece; this thread's own and used again for chunks."""
        if whole:
            return torch.empty(count, dtype=dtype)
        rooms: dict[torch.dtype, Tensor] = self._own.__dict__.setdefault("rooms", {})
        if dtype not in rooms or rooms[dtype].numel() < count:
            rooms[dtype] = torch.empty(count, dtype=dtype)
        return rooms[dtype][:count]

    def _extra(self, item: Item, start: int, count: int) -> list[Tensor] | None:
        statistics = self.plan.statistics
        if statistics is None or not all(item.name in each.headers for each in statistics):
            return None
        found = []
        for source in statistics:
            header = source.headers[item.name]
            size = header.count if item.whole else count
            one = torch.empty(size, dtype=item.work)
            source.read_into(item.name, one, start)
            check_finite(one, item.name, source.name)
            found.append(one.view(header.shape) if item.whole else one)
        return found

    def _write(self, item: Item, start: int, made: Tensor) -> None:
        file, place = self.places[item.name]
        array: Any = made.contiguous().view(torch.uint8).numpy()
        view, at = memoryview(array), place + start * item.dtype.itemsize
        while len(view):
            with _naming(self.folder / file):
                count = os.pwrite(self._handles[file], view, at)
            view, at = view[count:], at + count

    def sum_of(self, file: str) -> str:
        """The manifest's checksum of a finished file, blocks in parallel."""
        path = self.folder / file
        size = path.stat().st_size
        handle = os.open(path, os.O_RDONLY)
        try:
            with ThreadPoolExecutor(self.workers) as pool:
                places = range(0, size, files.BLOCK)
                return "".join(pool.map(lambda at: _block_sum(handle, at), places))
        finally:
            os.close(handle)


def _block_sum(handle: int, at: int) -> str:
    total = files.Checksum()
    for place in range(at, at + files.BLOCK, files.PIECE):
        piece = os.pread(handle, files.PIECE, place)
        if not piece:
            break
        total.add(memoryview(piece))
    return total.text


def _as(made: Tensor, item: Item) -> Tensor:
    """In the type of the result; `MergeError` when a value does not fit."""
    if made.dtype == item.dtype and item.action == "copy":
        return made
    result = made.to(item.dtype)
    wide = result.sum(dtype=torch.float32) if result.dtype != torch.float64 else result.sum()
    if not math.isfinite(float(wide)):
        return cast(made, item.dtype, item.name)
    return result


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Give an error of the system the name of its file."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise
