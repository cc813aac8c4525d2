"""Adapters on any `nn.Module`: attach by name patterns, tell the rows' tasks, train, save, fold.

    adapters = attach(model, AdaptConfig(method="mhr", targets=("query", "value")), ["a", "b"])
    with adapters.rows(["a", "b", "b"]):          # one batch may mix tasks
        model(**batch)
    print(adapters)                               # what trains, and its share of the model

The adapted modules stay where and what they are: a forward hook adds the update to what they put
out. So no parameter of the base is renamed, code that reads `layer.weight` goes on working, and
everything that is learned lives in one submodule, `model.adapters`.

    tables   routing tables or scales, each perhaps shared by several layers
    layers   what stands at each site, under the site's name with '/' for '.'
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from polytask import rng
from polytask.adapt.bottleneck import BottleneckSite
from polytask.adapt.config import BOTTLENECK, PEFT, AdaptConfig
from polytask.adapt.routed import RoutedLoRA
from polytask.adapt.routing import TaskTable
from polytask.adapt.rows import RowTasks
from polytask.adapt.sites import HOME, name_of
from polytask.errors import AdaptError


@dataclass(frozen=True)
class Share:
    """Numbers that train, by part, and numbers altogether."""

    parts: dict[str, int]
    total: int

    @property
    def trained(self) -> int:
        return sum(self.parts.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {count:,}" for name, count in self.parts.items())
        share = self.trained / max(1, self.total)
        return f"trains {self.trained:,} of {self.total:,} numbers ({share:.3%}): {parts or 'none'}"


class Adapters(nn.Module):
    """What `attach` puts into a model as `model.adapters`.

    config: as attached; `tasks`: their names, by id.
    """

    def __init__(self, config: AdaptConfig, tasks: Sequence[str]) -> None:
        super().__init__()
        self.config = config
        self.row_tasks = RowTasks(tasks)
        self.tables = nn.ModuleDict()
        self.layers = nn.ModuleDict()
        self._model: tuple[nn.Module, ...] = ()  # in a tuple: a parent is no submodule
        self._sites: dict[str, nn.Module] = {}
        self._handles: list[Any] = []

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, by id."""
        return self.row_tasks.names

    @property
    def model(self) -> nn.Module:
        """The adapted model; `AdaptError` after `detach`."""
        if not self._model:
            raise AdaptError("these adapters are not attached to a model any more")
        return self._model[0]

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the adapted modules."""
        return tuple(self._sites)

    def forward(self, x: Any) -> Any:
        """`x`: nn.Sequential runs all its children, and these only work through hooks."""
        return x

    # -- rows and parts

    @contextmanager
    def rows(self, tasks: Any, repeat: int = 1) -> Iterator[None]:
        """Within the block, row i of every batch belongs to task `tasks[i]` (ids or names).

        `repeat`: beam search shows decoder layers each row that many times in a row.
        """
        with self.row_tasks.of(tasks, repeat):
            yield

    def routed(self) -> dict[str, RoutedLoRA]:
        """Routed updates by site; empty for other methods."""
        found = {name_of(k): m for k, m in self.layers.items()}
        return {k: m for k, m in found.items() if isinstance(m, RoutedLoRA)}

    def banks(self) -> dict[str, BottleneckSite]:
        """Bottleneck adapters by site; empty for other methods."""
        found = {name_of(k): m for k, m in self.layers.items()}
        return {k: m for k, m in found.items() if isinstance(m, BottleneckSite)}

    def share(self) -> Share:
        """How much of the model trains just now: tables, layers, peft's parts, and the rest."""
        parts: dict[str, int] = {}
        total = 0
        for name, parameter in self.model.named_parameters():
            total += parameter.numel()
            if parameter.requires_grad:
                part = _part(name)
                parts[part] = parts.get(part, 0) + parameter.numel()
        return Share(parts, total)

    def __str__(self) -> str:
        where = f"{len(self._sites)} modules" if self._sites else "no module"
        told = f"{self.config.method} adapters on {where} for {len(self.tasks)} tasks"
        return f"{told}; {self.share()}" if self._model else f"{told}, detached"

    def learning_rates(self, base: float) -> dict[str, float]:
        """Learning rate by name pattern: the routing table learns much faster than the modules.

        With one rate for all, logits near 0 never move and the method is an average.
        """
        rates = {}
        if any(True for _ in self.tables.parameters()):
            rates[f"*{HOME}.tables.*"] = self.config.table_lr
        if self.config.method == "peft-poly":
            rates["*module_logits"] = self.config.table_lr
        rates |= {
            pattern: self.config.lr or base for pattern in self.patterns() if pattern not in rates
        }
        return rates

    def patterns(self) -> tuple[str, ...]:
        """Name patterns of what the adapters learn, as they match in the whole model."""
        if self.config.method in ("lora", "ia3", "peft-poly"):
            return {"lora": ("*lora_*",), "ia3": ("*ia3_l*",), "peft-poly": ("*poly_*",)}[
                self.config.method
            ]
        parts = [
            f"*{HOME}.{part}.*"
            for part in ("tables", "layers")
            if any(p.requires_grad for p in getattr(self, part).parameters())
        ]
        return tuple(parts)

    def groups(self, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Parameter groups for a torch optimiser: tables at their own rate and without decay
        (AdamW's default decay would pull scales to 0), everything else that trains at `lr`."""
        slow: list[nn.Parameter] = []
        fast: list[nn.Parameter] = []
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                of_table = f"{HOME}.tables." in f".{name}" or name.endswith("module_logits")
                (fast if of_table else slow).append(parameter)
        found: list[dict[str, Any]] = [
            {"params": slow, "lr": self.config.lr or lr, "weight_decay": weight_decay}
        ]
        if fast:
            found.append({"params": fast, "lr": self.config.table_lr, "weight_decay": 0.0})
        return [group for group in found if group["params"]]

    # -- new tasks

    def reset(self, tasks: Sequence[str], seed: int = 0, keep: bool = True) -> None:
        """Fresh routing rows for new tasks. `keep` False also draws the modules anew ('rand').

        Raises:
            AdaptError: the method has no routing table.
        """
        if self.config.method not in ("mhr", "poly"):
            raise AdaptError(
                f"'{self.config.method}' adapters have no routing rows to reset for new tasks"
            )
        for name, table in self._task_tables().items():
            table.reset(len(tasks), rng.derive(seed, name))
        self._rename(tasks)
        if not keep:
            for layer in self.routed().values():
                layer.redraw(seed)

    def tune_rows_only(self) -> None:
        """MHR-z: only routing rows train. Refused while the modules are untrained: with B = 0 no
        row can change anything."""
        layers = self.routed()
        if self.config.method not in ("mhr", "poly") or not layers:
            raise AdaptError(f"'{self.config.method}' adapters have no routing rows to tune")
        if all(layer.untrained for layer in layers.values()):
            raise AdaptError(
                "the inventory was never trained (every B is 0), so tuning its routing rows cannot "
                "learn anything: pretrain the adapters on several tasks first, or tune all of it"
            )
        if not any(True for _ in self.tables.parameters()):
            raise AdaptError("the routing is uniform: there are no rows to tune")
        for parameter in self.layers.parameters():
            parameter.requires_grad_(False)

    def to_uniform(self, collapse: bool = True, tasks: Sequence[str] | None = None) -> None:
        """MHR-mu: uniform mixture from now on; modules train, no row does.

        `collapse`: the modules are averaged first and one is tuned. Without it all S stay, with
        gradients of 1 / S each: the same function, other step sizes. `tasks`: new names.
        """
        if self.config.method not in ("mhr", "poly"):
            raise AdaptError(f"'{self.config.method}' adapters have no inventory to average")
        if tasks is not None:
            self._rename(tasks)
        for table in self._task_tables().values():
            table.make_uniform()
            table.tasks = len(self.tasks)
            if collapse:
                table.modules_ = 1
        if collapse:
            for layer in self.routed().values():
                layer.average_modules()

    def _rename(self, tasks: Sequence[str]) -> None:
        self.row_tasks.names = RowTasks(tasks).names
        self.row_tasks.forget()

    def _task_tables(self) -> dict[str, TaskTable]:
        return {k: t for k, t in self.tables.items() if isinstance(t, TaskTable)}

    # -- out of the model

    @torch.no_grad()
    def fold(self, task: str | int) -> None:
        """Add one task's update to the base's weights and detach: the model needs no adapters.

        Raises `AdaptError` where the maths does not allow it (a bottleneck is not linear), before
        anything is changed.
        """
        from polytask.adapt import peft_bridge

        index = self.row_tasks.id_of(task)
        if not 0 <= index < len(self.tasks):
            raise AdaptError(f"task id {index} is outside 0..{len(self.tasks) - 1}")
        if self.config.method in PEFT:
            peft_bridge.fold(self)
            self.detach()
            return
        if self.config.method in BOTTLENECK:
            raise AdaptError(
                f"'{self.config.method}' adapters are not linear: they cannot be folded into "
                "weights. `collapse` makes one bottleneck adapter of a target's scaled sources"
            )
        for name, layer in self.routed().items():
            weight: Any = self._sites[name].weight
            if not weight.is_floating_point():
                raise AdaptError(f"{name} holds {weight.dtype} weights; dequantise it to fold")
            update = layer.delta(index)
            if not isinstance(self._sites[name], nn.Linear):
                update = update.T  # Conv1D keeps (inputs, outputs)
            weight.copy_((weight.double() + update.double()).to(weight.dtype))
        self.detach()

    def detach(self) -> None:
        """Take the adapters out: the model computes what it did before `attach`."""
        from polytask.adapt import peft_bridge

        model = self.model
        if self.config.method in PEFT:
            peft_bridge.remove(self)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        delattr(model, HOME)
        self._model = ()

    def save(self, folder: Path | str) -> None:
        """Only what was learned: adapter_model.safetensors and adapter_config.json."""
        from polytask.adapt.store import save

        save(self, Path(folder))


def _part(name: str) -> str:
    """What a parameter is booked under in `Share`."""
    if f"{HOME}." in name:
        return name.partition(f"{HOME}.")[2].partition(".")[0]
    for mark, part in (("lora_", "lora"), ("ia3_l", "ia3"), ("poly_", "poly")):
        if mark in name:
            return part
    return "base"
