"""Devices and processes, through `accelerate`: one place that knows how many of us there are.

Launched by `accelerate launch` or `torchrun` a run has `world` processes; otherwise it has one.
Models and losses know nothing of it: the trainer sums what has to be summed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from polytask.errors import ConfigError, PolytaskError


class Distribution:
    """This process among its siblings.

    `kind` is 'one', 'ddp' or 'fsdp2' (the last two chosen by `accelerate launch`).
    """

    def __init__(self, device: str = "auto") -> None:
        from accelerate import Accelerator, DistributedDataParallelKwargs
        from accelerate.utils import DistributedType

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
        self.kind = "one"
        if self.accelerator.distributed_type == DistributedType.FSDP:
            if not self.accelerator.is_fsdp2:
                raise ConfigError("FSDP version 1 is not supported; launch with --fsdp_version 2")
            self.kind = "fsdp2"
        elif self.world > 1:
            self.kind = "ddp"

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
            with _siblings():
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
            with _siblings(), torch.no_grad():
                for tensor in tensors:
                    dist.broadcast(tensor.detach(), src=0)

    def share(self, value: Any) -> Any:
        """A small Python value of rank 0, on every process."""
        if self.world == 1:
            return value
        box = [value]
        with _siblings():
            dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def barrier(self) -> None:
        if self.world > 1:
            with _siblings():
                self.accelerator.wait_for_everyone()

    def wrap(
        self, module: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The module (and for FSDP2 its optimiser) as this kind of run needs them."""
        if self.kind == "one":
            return module, optimizer
        if self.kind == "ddp":
            return self.accelerator.prepare_model(module), optimizer
        module, prepared = self.accelerator.prepare(module, optimizer)
        return module, prepared.optimizer


class _siblings:
    """Turn a broken connection into a message that says what happened."""

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: Any
    ) -> None:
        if isinstance(error, RuntimeError):
            raise PolytaskError(
                f"another process of this run is gone, so this one stops too ({error}). "
                "Start the command again: it resumes from the newest checkpoint."
            ) from error
