"""Devices and processes, through `accelerate`: one place that knows how many of us there are.

Launched by `accelerate launch` or `torchrun` a run has `world` processes; otherwise it has one.
Models and losses know nothing of it: the trainer sums what has to be summed. `accelerate launch
--use_fsdp --fsdp_version 2` shards parameters, gradients and optimiser state (torch's
`fully_shard`, a unit per layer), also on CPUs, for which accelerate itself has no FSDP.
"""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from polytask.errors import ConfigError, PolytaskError


class Distribution:
    """This process among its siblings.

    `kind` is 'one', 'ddp' or 'fsdp2', as launched.
    """

    def __init__(self, device: str = "auto") -> None:
        from accelerate import Accelerator, DistributedDataParallelKwargs

        if device not in ("auto", "cpu"):
            raise ConfigError(f"unknown device '{device}'. Known: auto, cpu.")
        # Tasks absent from a step leave their heads unused, on some ranks or on all.
        unused = DistributedDataParallelKwargs(find_unused_parameters=True)
        # Autocast is ours (see `gradients.StepModule`), so arms of different precision can share
        # a process: accelerate's own setting is one per process.
        self.accelerator: Any = Accelerator(
            cpu=device == "cpu", mixed_precision="no", kwargs_handlers=[unused]
        )
        self.device: torch.device = self.accelerator.device
        self.rank: int = self.accelerator.process_index
        self.world: int = self.accelerator.num_processes
        self.kind = "one" if self.world == 1 else "ddp"
        if self.world > 1:
            atexit.register(_leave)
        if self.world > 1 and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
            if os.environ.get("FSDP_VERSION", "1") != "2":
                raise ConfigError("FSDP version 1 is not supported; launch with --fsdp_version 2")
            self.kind = "fsdp2"

    @property
    def main(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Sum tensors over all processes, in place, as one message per dtype."""
        if self.world == 1:
            return
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_dtype.setdefault(tensor.dtype, []).append(tensor)
        for group in by_dtype.values():
            flat = torch.cat([t.reshape(-1) for t in group])
            dist.all_reduce(flat)
            for tensor, part in zip(group, torch.split(flat, [t.numel() for t in group])):
                tensor.copy_(part.view_as(tensor))

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process."""
        if self.world == 1:
            return flag
        tensor = torch.tensor([float(flag)], device=self.device)
        self.sum_([tensor])
        return bool(tensor.item() > 0)

    def share_weights(self, tensors: Sequence[Tensor]) -> None:
        """Give every process the tensors of rank 0 (what DDP does when it wraps a model)."""
        if self.world > 1:
            with torch.no_grad():
                for tensor in tensors:
                    dist.broadcast(tensor.detach(), src=0)

    def share(self, value: Any) -> Any:
        """A small Python value of rank 0, on every process."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def barrier(self) -> None:
        if self.world > 1:
            self.accelerator.wait_for_everyone()

    def shard(self, module: nn.Module) -> None:
        """Shard a module in place (FSDP2): the entries of its module lists, and the rest."""
        from torch.distributed.fsdp import FSDPModule, fully_shard

        mesh = dist.device_mesh.init_device_mesh(self.device.type, (self.world,))
        layers = [
            layer
            for part in module.modules()
            if isinstance(part, nn.ModuleList)
            for layer in part
            if any(True for _ in layer.parameters())
        ]
        for layer in layers:
            if not isinstance(layer, FSDPModule):
                fully_shard(layer, mesh=mesh)
        fully_shard(module, mesh=mesh)

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module as this run calls it: inside DDP where there are several processes."""
        if self.kind != "ddp":
            return module
        wrapped: nn.Module = self.accelerator.prepare_model(module)
        return wrapped

    @contextmanager
    def whole(self, module: Any) -> Iterator[None]:
        """Within the block, parts of a sharded module can be called without its own forward."""
        if self.kind == "fsdp2":
            module.unshard()
        try:
            yield
        finally:
            if self.kind == "fsdp2":
                module.reshard()


LOST = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "process group")


@contextmanager
def lost_siblings() -> Iterator[None]:
    """Turn a broken connection to another process into a message that says what to do."""
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error).lower() for sign in LOST):
            raise
        raise PolytaskError(
            f"another process of this run is gone, so this one stops too ({error}). "
            "Start the command again: it resumes from the newest checkpoint."
        ) from error


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
    # The group's threads may still wait for the interpreter lock, to let go of tensors of the last
    # message; one that gets it only when the interpreter is gone aborts a run that was finished.
    time.sleep(0.1)
