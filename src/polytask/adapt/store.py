"""Adapters on disk: adapter_model.safetensors and adapter_config.json, the names people know.

What `peft` can read it reads: LoRA and IA3, and routed adapters whenever peft's Poly computes the
same in evaluation (gates 'relaxed' or 'sigmoid' with a table per layer or shared, alpha 1). Its
Poly layout is used for all routed adapters; where peft would compute something else, `peft_type`
is one that peft refuses. Bottleneck adapters are written one folder each, as the `adapters`
package names their tensors. Folders are complete when their manifest exists.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from polytask import files
from polytask.adapt.config import PEFT, ROUTED, AdaptConfig
from polytask.adapt.routing import TaskTable
from polytask.adapt.sites import is_norm
from polytask.configs import parse
from polytask.errors import AdaptError, CheckpointError, suggestion

if TYPE_CHECKING:
    from polytask.adapt.adapters import Adapters

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."


def save(adapters: Adapters, folder: Path) -> None:
    """Write a folder; an earlier one is replaced when the new one is complete."""
    from safetensors.torch import save_file

    record = {
        "polytask": {
            "adapt": adapters.config.model_dump(mode="json", by_alias=True, exclude_unset=True),
            "tasks": list(adapters.tasks),
            "sites": list(adapters.sites),
            "sources": _source_names(adapters),
            "uniform": _is_uniform(adapters),
        },
        **_described(adapters),
    }
    with files.building(folder) as aside:
        tensors = {k: t.detach().cpu().contiguous().clone() for k, t in _tensors(adapters).items()}
        save_file(tensors, str(aside / TENSORS), metadata={"format": "pt"})
        files.write_json(aside / CONFIG, record)
        if adapters.config.method == "bottleneck":
            for name in adapters.tasks:
                _write_bottleneck(adapters, name, aside / "adapters" / _safe(name))


def load(model: nn.Module, folder: Path | str, freeze: bool = True) -> Adapters:
    """Attach what a folder holds to a model of the same shape.

    Also reads folders that peft wrote for Poly. Raises `CheckpointError` for a torn or altered
    folder and `AdaptError` when it does not fit the model.
    """
    from polytask.adapt.inserting import attach

    folder = Path(folder)
    record = read_config(folder)
    tensors = read_tensors(folder)
    config, tasks, uniform = _meaning(record, tensors, folder)
    sources = None
    if config.method in ("scalearn", "fusion"):
        sources = _sources_in(tensors, record)
    adapters = attach(model, config, tasks, freeze, sources)
    if uniform:
        modules = next(t.shape[1] for k, t in tensors.items() if k.endswith("poly_lora_A"))
        adapters.to_uniform(collapse=modules == 1)
    _fill(adapters, tensors, folder)
    return adapters


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json; `AdaptError` when the folder has none."""
    path = folder / CONFIG
    if not path.is_file():
        raise AdaptError(f"{folder} holds no adapters: it has no {CONFIG}")
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return found


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """adapter_model.safetensors, checked against the manifest where there is one."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if (folder / files.MANIFEST).is_file():
        files.verify_manifest(folder)
    path = folder / TENSORS
    if not path.is_file():
        raise AdaptError(f"{folder} has no {TENSORS}; pickled adapters (.bin) are not read")
    try:
        return dict(load_file(str(path)))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _source_names(adapters: Adapters) -> list[str]:
    if adapters.config.method not in ("scalearn", "fusion"):
        return []
    return list(next(iter(adapters.banks().values())).bank.names)


def _is_uniform(adapters: Adapters) -> bool:
    tables = [t for t in adapters.tables.values() if isinstance(t, TaskTable)]
    return bool(tables) and all(t.mode == "uniform" for t in tables)


def _described(adapters: Adapters) -> dict[str, Any]:
    """The part of adapter_config.json that peft reads."""
    config = adapters.config
    if config.method in ("lora", "ia3", "peft-poly"):
        from polytask.adapt import peft_bridge

        return peft_bridge.describe(adapters)
    same = (
        config.method in ("mhr", "poly")
        and config.gate in ("relaxed", "sigmoid")
        and config.combine == "parameters"
        and config.scale_alpha == 1
        and not (config.shared_module or config.average_correction)
        and not _is_uniform(adapters)
    )
    if not same:
        return {"peft_type": "POLYTASK"}
    return {
        "peft_type": "POLY",
        "poly_type": "poly",
        "r": config.rank,
        "n_tasks": len(adapters.tasks),
        "n_skills": config.modules,
        "n_splits": config.blocks,
        "target_modules": list(adapters.sites),
        "inference_mode": True,
    }


def _tensors(adapters: Adapters) -> dict[str, Tensor]:
    method = adapters.config.method
    if method in PEFT:
        from polytask.adapt import peft_bridge

        return peft_bridge.tensors(adapters)
    if method in ROUTED:
        found: dict[str, Tensor] = {}
        for name, layer in adapters.routed().items():
            found[f"{_PREFIX}{name}.poly_lora_A"] = layer.lora_A
            found[f"{_PREFIX}{name}.poly_lora_B"] = layer.lora_B
            if layer.table.module_logits is not None:
                found[f"{_PREFIX}{name}.poly_router.module_logits"] = layer.table.module_logits
        return found
    return dict(adapters.state_dict())


def _meaning(
    record: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path
) -> tuple[AdaptConfig, tuple[str, ...], bool]:
    """Configuration, tasks, and whether the mixture is uniform."""
    own = record.get("polytask")
    if own is not None:
        config = parse(AdaptConfig, {**own["adapt"], "targets": own["sites"]}, str(folder / CONFIG))
        if config.method == "prompt":
            config = config.model_copy(update={"targets": ()})
        return config, tuple(own["tasks"]), bool(own["uniform"])
    if str(record.get("peft_type", "")).upper() != "POLY":
        raise AdaptError(
            f"{folder} holds '{record.get('peft_type')}' adapters, which peft itself loads: "
            "peft.PeftModel.from_pretrained(model, folder)"
        )
    names = sorted(
        k.removeprefix(_PREFIX).removesuffix(".poly_lora_A")
        for k in tensors
        if k.endswith("poly_lora_A")
    )
    options = {
        "method": "mhr",
        "targets": names,
        "rank": record["r"],
        "modules": record["n_skills"],
        "heads": record["n_splits"],
    }
    tasks = tuple(f"task {i}" for i in range(int(record["n_tasks"])))
    return parse(AdaptConfig, options, str(folder / CONFIG)), tasks, False


@torch.no_grad()
def _fill(adapters: Adapters, tensors: dict[str, Tensor], folder: Path) -> None:
    if adapters.config.method in PEFT:
        from polytask.adapt import peft_bridge

        peft_bridge.load(adapters, tensors)
        return
    own = _tensors(adapters)
    for name, tensor in own.items():
        if name not in tensors:
            raise AdaptError(f"{folder}: there is no tensor '{name}'.{suggestion(name, tensors)}")
        if tensors[name].shape != tensor.shape:
            raise AdaptError(
                f"{folder}: '{name}' has shape {tuple(tensors[name].shape)}, the model needs "
                f"{tuple(tensor.shape)}"
            )
        tensor.copy_(tensors[name])
    extra = sorted(set(tensors) - set(own))
    if extra:
        raise AdaptError(f"{folder}: the model has no place for tensor '{extra[0]}'")


# -- bottleneck adapters, one by one

_UP = re.compile(r"^(?P<place>.*)\.adapters\.(?P<name>[^.]+)\.adapter_up\.weight$")
_PARTS = {
    "down": "adapter_down.0.weight",
    "down_bias": "adapter_down.0.bias",
    "up": "adapter_up.weight",
    "up_bias": "adapter_up.bias",
}


def _place(site: str, module: nn.Module) -> str:
    """Where the `adapters` package keeps the adapter of a site: in the parent of a norm."""
    return site.rpartition(".")[0] if is_norm(module) else site


def _write_bottleneck(adapters: Adapters, name: str, folder: Path) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    tensors = {}
    for site, layer in adapters.banks().items():
        place = _place(site, adapters._sites[site])
        for part, tensor in layer.bank.get(name).items():
            tensors[f"{place}.adapters.{_safe(name)}.{_PARTS[part]}"] = tensor.cpu().contiguous()
    save_file(tensors, str(folder / "adapter.safetensors"), metadata={"format": "pt"})
    config = {
        "reduction_factor": adapters.config.reduction,
        "non_linearity": "relu",
        "original_ln_before": True,
        "original_ln_after": True,
        "residual_before_ln": True,
        "output_adapter": True,
        "mh_adapter": False,
    }
    record = {"name": _safe(name), "config": config, "polytask": {"sites": list(adapters.sites)}}
    files.write_json(folder / CONFIG, record)


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name)


def read_bottlenecks(
    folders: Sequence[Path | str], sites: Mapping[str, nn.Module]
) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Adapter name -> site -> tensors, from folders of one adapter each, or of several.

    A folder is what `Adapters.save` wrote for method 'bottleneck', one of its `adapters/NAME`, or
    a folder in the format of the `adapters` package (safetensors). Names of the base model's
    modules may have another prefix there ('bert.encoder...').

    Raises:
        AdaptError: there is no adapter, it is pickled, or it stands elsewhere than at `sites`.
    """
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    for folder in map(Path, folders):
        for one in _single_folders(folder):
            name, parts = _read_one(one, sites)
            if name in found:
                raise AdaptError(f"two source adapters are named '{name}' ({one})")
            found[name] = parts
    if not found:
        raise AdaptError("no source adapters were given")
    return found


def _single_folders(folder: Path) -> list[Path]:
    for start in (folder, folder / "model" / "adapters"):  # a run folder keeps them there
        if (start / "adapter.safetensors").is_file():
            return [start]
        inner = sorted(p.parent for p in (start / "adapters").glob("*/adapter.safetensors"))
        if inner:
            return inner
    if not folder.is_dir():
        raise AdaptError(f"sources: there is no folder {folder}")
    pickled = sorted(p.name for p in folder.glob("*.bin"))
    why = f"; {pickled[0]} is a pickle, which is not read" if pickled else ""
    raise AdaptError(f"sources: {folder} holds no bottleneck adapters (adapter.safetensors){why}")


def _read_one(
    folder: Path, sites: Mapping[str, nn.Module]
) -> tuple[str, dict[str, dict[str, Tensor]]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(str(folder / "adapter.safetensors"))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder}/adapter.safetensors cannot be read: {error}") from error
    _check_activation(folder)
    ups = [m for m in map(_UP.match, tensors) if m]
    names = {m["name"] for m in ups}
    if len(names) != 1:
        raise AdaptError(f"{folder} holds {len(names)} adapters, one was expected")
    name = names.pop()
    places = {_place(site, module): site for site, module in sites.items()}
    parts: dict[str, dict[str, Tensor]] = {}
    for match in ups:
        place = match["place"]
        site = next((s for p, s in places.items() if f".{place}".endswith(f".{p}")), None)
        if site is None:
            raise AdaptError(
                f"adapter '{name}' ({folder}) stands at {place}, the model's at "
                f"{next(iter(places))}, ...: its placement differs"
            )
        start = f"{place}.adapters.{name}."
        parts[site] = {part: tensors[start + ending] for part, ending in _PARTS.items()}
    return name, parts


def _check_activation(folder: Path) -> None:
    path = folder / CONFIG
    if not path.is_file():
        return
    config = json.loads(path.read_text(encoding="utf-8")).get("config", {})
    wanted = {"non_linearity": "relu", "original_ln_after": True, "residual_before_ln": True}
    for key, value in wanted.items():
        if config.get(key, value) != value:
            raise AdaptError(f"{path}: {key} is {config[key]!r}; only {value!r} is supported")


def _sources_in(
    tensors: Mapping[str, Tensor], record: Mapping[str, Any]
) -> dict[str, dict[str, dict[str, Tensor]]]:
    """The frozen adapters inside a saved 'scalearn' or 'fusion' folder."""
    from polytask.adapt.sites import key_of

    sites = record["polytask"]["sites"]
    banks = {s: {p: tensors[f"layers.{key_of(s)}.bank.{p}"] for p in _PARTS} for s in sites}
    return {
        name: {s: {p: t[i] for p, t in parts.items()} for s, parts in banks.items()}
        for i, name in enumerate(record["polytask"]["sources"])
    }
