"""Experts on disk, a bounded number of them in memory: how a device answers one task at a time.

    for e in experts that have tokens, in order:
        wait until e is loaded; start loading the next one      (double buffer)
        run e once on its whole queue; put the results back; let e go

M3ViT's reordered execution (arXiv 2210.14793, section 3.3): the expert is the outer loop, so two
experts are enough memory however many there are and whatever the task, and changing the task loads
nothing but the experts that its tokens go to. The results are those of the whole model.

    folder/config.json             the `MoEViTConfig`
    folder/rest.safetensors        everything but the experts: stays in memory
    folder/block-B.expert-E.safetensors
    folder/manifest.json           sizes and checksums, written last
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from polytask import files
from polytask.errors import CheckpointError, ConfigError
from polytask.models.experts.bank import Expert, Experts
from polytask.models.experts.saving import CONFIG, read_config
from polytask.models.experts.vit import MoEViT
from polytask.train.tensorfile import read_file, write_file

REST = "rest.safetensors"
Key = tuple[int, int]  # block, expert


@dataclass
class StoreStats:
    """What a store did since `reset`: `peak` experts were in memory at once, at most."""

    loads: int = 0
    bytes: int = 0
    peak: int = 0


class ExpertStore:
    """Gives experts one at a time; at most `max_resident` are in memory, the least recently used
    goes first. With two or more, the next expert is loaded while one computes.

    Args:
        folder: what `write_store` wrote.
        shape: makes an empty expert (all have one shape).
        max_resident: experts in memory at once.
        verify: read everything once and compare checksums.

    Raises:
        CheckpointError: the folder is incomplete or damaged.
        ConfigError: `max_resident` below 1.
    """

    def __init__(
        self, folder: Path, shape: Any, max_resident: int = 2, verify: bool = True
    ) -> None:
        if max_resident < 1:
            raise ConfigError(f"max_resident = {max_resident}: at least one expert has to fit")
        self.folder = folder
        self.max_resident = max_resident
        self.sizes = {name: int(e["bytes"]) for name, e in files.read_manifest(folder).items()}
        if verify:
            files.verify_manifest(folder)
        self.stats = StoreStats()
        self._shape = shape
        self._free: list[nn.Module] = []
        self._made = 0
        self._held: OrderedDict[Key, tuple[Future[nn.Module], nn.Module]] = OrderedDict()
        self._busy: set[Key] = set()
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="experts")

    def ids(self, block: int) -> tuple[int, ...]:
        """The experts of a block."""
        start, end = f"block-{block}.expert-", ".safetensors"
        return tuple(sorted(
            int(name.removeprefix(start).removesuffix(end))
            for name in self.sizes if name.startswith(start)
        ))  # fmt: skip

    @property
    def resident(self) -> tuple[Key, ...]:
        """(block, expert) of those in memory, the least recently used first."""
        return tuple(self._held)

    def reset(self) -> None:
        """Start counting anew; what is in memory stays."""
        self.stats = StoreStats(peak=len(self._held))

    @contextmanager
    def using(self, block: int, expert: int, following: int | None = None) -> Iterator[nn.Module]:
        """An expert, for the length of the block; `following` is fetched meanwhile."""
        key = (block, expert)
        future = self._request(key)
        if future is None:
            raise ConfigError(
                f"max_resident = {self.max_resident} experts are all in use at the same time"
            )
        self._busy.add(key)
        try:
            module = future.result()
            if following is not None and self.max_resident > 1:
                self._request((block, following))
            yield module
        finally:
            self._busy.discard(key)
            if future.exception() is not None:  # its memory holds nothing of use
                self._free.append(self._held.pop(key)[1])

    def close(self) -> None:
        """Forget everything; the loading thread ends."""
        self._loader.shutdown(wait=True)
        self._held.clear()
        self._free.clear()

    def _request(self, key: Key) -> Future[nn.Module] | None:
        """The expert's memory, being filled or full; None where all is in use."""
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key][0]
        name = f"block-{key[0]}.expert-{key[1]}.safetensors"
        if name not in self.sizes:
            raise ConfigError(
                f"{self.folder} has no expert {key[1]} of block {key[0]}: it was exported without "
                "it; export again with the data it is to be used on"
            )
        slot = self._slot()
        if slot is None:
            return None
        self.stats.loads += 1
        self.stats.bytes += self.sizes[name]
        future = self._loader.submit(_load, self.folder / name, slot, self.sizes[name])
        self._held[key] = (future, slot)
        self.stats.peak = max(self.stats.peak, len(self._held))
        return future

    def _slot(self) -> nn.Module | None:
        """Memory for one expert: new, or of the least recently used that nobody needs now."""
        if self._free:
            return self._free.pop()
        if len(self._held) < self.max_resident:
            slot: nn.Module = self._shape()
            return slot
        idle = next((key for key in self._held if key not in self._busy), None)
        if idle is None:
            return None
        future, slot = self._held.pop(idle)
        future.exception()  # wait until nobody writes to it
        return slot


@torch.no_grad()
def _load(path: Path, slot: nn.Module, size: int) -> nn.Module:
    """Copy a mapped file into an expert's own memory; the map is gone afterwards."""
    if not path.is_file() or path.stat().st_size != size:
        raise CheckpointError(f"{path} is missing or changed since the store was opened")
    tensors, _ = read_file(path, check=False)
    for name, parameter in slot.named_parameters():
        parameter.copy_(tensors[name])
    return slot


class StoredExperts(Experts):
    """A bank whose experts come from a store, one after another."""

    def __init__(self, bank: Experts, store: ExpertStore, block: int) -> None:
        super().__init__(bank.count, bank.dim, bank.hidden, bank.gated, ids=())
        self.store = store
        self.block = block
        self._next: dict[int, int] = {}

    @property
    def ids(self) -> tuple[int, ...]:
        return self.store.ids(self.block)

    def upcoming(self, experts: Sequence[int]) -> None:
        self._next = dict(pairwise(experts))

    @contextmanager
    def using(self, expert: int) -> Iterator[nn.Module]:
        with self.store.using(self.block, expert, self._next.get(expert)) as module:
            yield module


def write_store(model: MoEViT, folder: Path) -> Path:
    """Write a model with experts for `open_store`; the folder is whole or not there."""
    if model.config.experts is None:
        raise ConfigError("the model has no experts to store")
    with files.building(folder) as aside:
        (aside / CONFIG).write_text(model.config.model_dump_json(indent=2), encoding="utf-8")
        rest = {n: t for n, t in model.state_dict().items() if ".feed_forward.experts." not in n}
        write_file(aside / REST, rest)
        for block, moe in zip(model.config.sparse, model.sparse_layers.values(), strict=True):
            for number in moe.experts.ids:
                state = moe.experts[str(number)].state_dict()
                write_file(aside / f"block-{block}.expert-{number}.safetensors", state)
    return folder


def open_store(
    folder: Path, max_resident: int = 2, verify: bool = True
) -> tuple[MoEViT, ExpertStore]:
    """The model of a stored folder with its experts on disk, and the store that counts loads.

    The model is for inference: experts have no gradients, and only one thread may run it.
    """
    config = read_config(folder)
    experts = config.experts
    if experts is None:
        raise CheckpointError(f"{folder} holds a model without experts")
    shape = (config.dim, experts.width(config.dim), experts.gated, experts.bias)

    def empty() -> nn.Module:
        return Expert(*shape).requires_grad_(False)

    store = ExpertStore(folder, empty, max_resident, verify)
    # Built with as few experts as a model may have, which then make room for those on disk.
    few = tuple(tuple(range(experts.k)) for _ in config.sparse)
    slim = config.model_copy(update={"experts": experts.model_copy(update={"kept": few})})
    model = MoEViT(slim)
    model.config = config
    for block, number in zip(config.sparse, range(len(config.sparse)), strict=True):
        moe: Any = model.blocks[block].feed_forward
        moe.experts = StoredExperts(moe.experts, store, block)
        moe.config = moe.router.config = experts
        present = None
        if experts.kept is not None:
            present = torch.zeros(experts.count, dtype=torch.bool)
            present[list(experts.kept[number])] = True
        moe.router.present = present
    rest, _ = read_file(folder / REST)
    try:
        model.load_state_dict(rest)
    except RuntimeError as error:
        raise CheckpointError(f"{folder / REST} does not fit {CONFIG}: {error}") from error
    return model.requires_grad_(False).eval(), store
