"""`attach`: put adapters into a model, by forward hooks on the modules that patterns name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from polytask import rng
from polytask.adapt import peft_bridge
from polytask.adapt.adapters import Adapters
from polytask.adapt.bottleneck import AdapterBank, BottleneckSite, Fusion, ScaledSum
from polytask.adapt.config import BOTTLENECK, PEFT, ROUTED, AdaptConfig
from polytask.adapt.routed import RoutedLoRA
from polytask.adapt.routing import TaskTable
from polytask.adapt.rows import RowTasks
from polytask.adapt.sites import (
    HOME,
    check_alike,
    group_name,
    is_norm,
    key_of,
    linear_shape,
    linear_sites,
    norm_sites,
    width_of,
)
from polytask.errors import AdaptError


def attach(
    model: nn.Module,
    config: AdaptConfig | None = None,
    tasks: Sequence[str] = ("default",),
    freeze: bool = True,
    sources: Mapping[str, Mapping[str, dict[str, Tensor]]] | None = None,
) -> Adapters:
    """Put adapters into a model, which starts as it was, bit for bit.

    Args:
        model: any module; transformers' models and nn.TransformerEncoder among them.
        config: which adapters, where.
        tasks: names; a row's task is told by `Adapters.rows`.
        freeze: the base's parameters stop training (unless `config.base` is 'trained').
        sources: for 'scalearn' and 'fusion': adapter name -> site -> tensors, as
            `store.read_bottlenecks` gives them.

    Raises:
        AdaptError: a pattern matches nothing (the nearest name is given), a target has the wrong
            type, heads do not divide a layer, sources differ in placement, or the model has
            adapters already.
    """
    config = config or AdaptConfig()
    if hasattr(model, HOME):
        raise AdaptError(f"{type(model).__name__} has '{HOME}' already; detach or fold those first")
    adapters = Adapters(config, tasks)
    adapters._model = (model,)
    if config.method in ROUTED:
        _attach_routed(model, adapters)
    elif config.method in BOTTLENECK:
        _attach_bottlenecks(model, adapters, sources or {})
    if freeze and config.base == "frozen":
        for parameter in model.parameters():
            parameter.requires_grad_(False)
    if config.method in PEFT:
        peft_bridge.insert(model, adapters)
    _follow(adapters, model)
    model.add_module(HOME, adapters)
    return adapters


def _follow(adapters: Adapters, model: nn.Module) -> None:
    """Put the adapters where the base is, in its mode (training or not); they stay float32."""
    adapters.train(model.training)
    first = next(model.parameters(), None)
    if first is not None:
        adapters.to(first.device)


def _attach_routed(model: nn.Module, adapters: Adapters) -> None:
    config, count = adapters.config, len(adapters.tasks)
    own = config.method == "task-lora"
    for name, module in linear_sites(model, config.targets).items():
        group = group_name(name, "coarsegrained" if own else config.granularity)
        key = key_of(group)
        if key not in adapters.tables:
            adapters.tables[key] = TaskTable(
                count,
                1 if own else config.blocks,
                count if own else config.modules,
                "own" if own else config.gate,
                dropout=config.gate_dropout,
                shared_module=config.shared_module,
                average_correction=config.average_correction,
                seed=rng.derive(config.seed, group),
            )
        table = adapters.tables[key]
        assert isinstance(table, TaskTable)
        layer = _routed(name, module, adapters, table, config.seed)
        adapters.layers[key_of(name)] = layer
        adapters._sites[name] = module
        adapters._handles.append(module.register_forward_hook(_AddUpdate(layer)))


def _routed(
    name: str, module: nn.Module, adapters: Adapters, table: TaskTable, seed: int
) -> RoutedLoRA:
    config = adapters.config
    return RoutedLoRA(
        *linear_shape(module),
        table,
        adapters.row_tasks,
        config.rank,
        config.scale_alpha,
        combine=config.combine,
        init=config.init,
        seed=seed,
        name=name,
    )


def _attach_bottlenecks(
    model: nn.Module, adapters: Adapters, sources: Mapping[str, Mapping[str, dict[str, Tensor]]]
) -> None:
    config, tasks = adapters.config, adapters.tasks
    found = norm_sites(model, config.targets)
    widths = {name: width_of(name, module) for name, module in found.items()}
    frozen = config.method != "bottleneck"
    if frozen and not sources:
        raise AdaptError(f"'{config.method}' needs source adapters, and there is none")
    for name, parts in sources.items():
        other = {site: int(tensors["up"].shape[0]) for site, tensors in parts.items()}
        check_alike(widths, other, f"source adapter '{name}'")
    for site, module in found.items():
        width = widths[site]
        names = tuple(sources) if frozen else tasks
        narrow = max(1, width // config.reduction)
        if frozen:
            narrow = max(int(parts[site]["down"].shape[0]) for parts in sources.values())
        bank = AdapterBank(names, width, narrow, config.init_up, config.seed, site)
        for name, parts in sources.items():
            bank.set(name, parts[site])
        bank.requires_grad_(not frozen)
        combine = _combiner(adapters, site, width, len(names)) if frozen else None
        layer = BottleneckSite(bank, combine, site)
        adapters.layers[key_of(site)] = layer
        adapters._sites[site] = module
        hook = _BeforeNorm if is_norm(module) else _AfterModule
        adapters._handles.append(module.register_forward_hook(hook(layer, adapters.row_tasks)))


def _combiner(adapters: Adapters, site: str, width: int, sources: int) -> ScaledSum | Fusion:
    """What combines a bank; the forms with ++ share one set of scales over all layers."""
    config, count = adapters.config, len(adapters.tasks)
    shared = config.method == "scalearn" and config.variant.endswith("++")
    key = "shared" if shared else key_of(site)
    if key not in adapters.tables:
        if config.method == "fusion":
            adapters.tables[key] = Fusion(count, width, seed=rng.derive(config.seed, site))
        else:
            adapters.tables[key] = ScaledSum(
                count,
                sources,
                1 if config.variant.startswith("uniform") else width,
                scale=config.scale,
                dropout=config.omega_dropout,
                normalise=config.normalise,
                seed=config.seed,
                key=key,
            )
    found = adapters.tables[key]
    assert isinstance(found, ScaledSum | Fusion)
    if isinstance(found, ScaledSum) and found.omega.shape[2] not in (1, width):
        raise AdaptError(
            f"variant '{config.variant}' shares scales over layers, and {site} is {width} wide "
            f"where another is {found.omega.shape[2]}"
        )
    return found


class _AddUpdate:
    """Hook: y + update(x)."""

    def __init__(self, layer: RoutedLoRA) -> None:
        self.layer = layer

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        update: Tensor = self.layer(inputs[0])
        return output + update


class _AfterModule:
    """Hook: y + u(y)."""

    def __init__(self, layer: BottleneckSite, tasks: RowTasks) -> None:
        self.layer, self.tasks = layer, tasks

    def added(self, x: Tensor) -> Tensor:
        rows = self.tasks.rows(x.shape[0], self.layer.name)
        found: Tensor = self.layer(x, rows.task, rows.single)
        return found

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + self.added(output)


class _BeforeNorm(_AfterModule):
    """Hook on a normalisation: LN(s + u(LN(s))), Pfeiffer's placement."""

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        forward: Any = module.forward  # without the hooks: this one must not be called again
        again: Tensor = forward(inputs[0] + self.added(output))
        return again
