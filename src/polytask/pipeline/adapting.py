"""`adapt:` in a configuration: which model is adapted, what of it trains, and at which rate.

hub model, or the model of a finished run (`adapt.from`) with fresh heads
adapters on its trunk: fresh ones, or the run's own inventory made ready for new tasks
train only adapters, heads, and stems that nothing pretrained
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from polytask.adapt import Adapters, attach, load, read_bottlenecks
from polytask.adapt.config import AdaptConfig
from polytask.adapt.sites import HOME, norm_sites
from polytask.configs import parse
from polytask.errors import AdaptError, CheckpointError, ConfigError
from polytask.models.build import build_model, input_spec
from polytask.models.hub import HubTrunk
from polytask.models.multitask import MultitaskModel
from polytask.models.specs import ModelConfig, ModelSpec, head_spec
from polytask.pipeline.config import RunConfig

INVENTORY = ("mhr", "poly")
# What an inventory was trained with; a run that adapts it takes these as they are.
_STRUCTURE = (
    *("rank", "alpha", "modules", "heads", "gate", "granularity", "combine", "targets"),
    *("shared_module", "average_correction", "init"),
)


def resolve(config: RunConfig, base: Path) -> RunConfig:
    """Fill in what the adapted run decides: its model, its text encoding, its inventory.

    Raises `ConfigError` where the configuration contradicts that run.
    """
    adapt = config.adapt
    if adapt is None:
        return config
    if adapt.source is None:
        if adapt.tune != "full":
            raise ConfigError(f"adapt.tune '{adapt.tune}' needs 'adapt.from': a run with adapters")
        if config.model.hub is None and adapt.base == "frozen":
            raise ConfigError(
                "adapt: there is nothing pretrained to adapt. Give a hub model (model: {hub: ...}) "
                "or a finished run (adapt: {from: runs/...}), or train the base too "
                "(adapt: {base: trained})"
            )
        if "method" not in adapt.model_fields_set and len(config.tasks) == 1:
            adapt = _changed(adapt, method="lora")
        return config.model_copy(update={"adapt": adapt})
    folder = _run_folder(adapt.source, base)
    if config.model.model_copy(update={"seed": 0}) != ModelConfig():
        raise ConfigError(f"'model' is that of {adapt.source} ('adapt.from'); leave it out")
    spec, encoding = _source_spec(folder)
    model = spec.config.model_copy(update={"seed": config.model.seed})
    if model.hub and config.encoding.text_length > encoding.text_length:
        encoding = encoding.model_copy(update={"text_length": config.encoding.text_length})
    encoding = encoding.model_copy(update={"seed": config.encoding.seed})
    adapt = _inherited(adapt, _source_adapters(folder), len(config.tasks))
    return config.model_copy(update={"model": model, "encoding": encoding, "adapt": adapt})


def _source_spec(folder: Path) -> tuple[ModelSpec, Any]:
    """Shape and text encoding of a finished run; `UserError` when it is none."""
    from polytask.pipeline.run import Run

    encoding = Run(folder).processor.config  # checks that the run is there and whole
    text = (folder / "model" / "model.json").read_text(encoding="utf-8")
    return ModelSpec.model_validate_json(text), encoding


def _source_adapters(folder: Path) -> AdaptConfig | None:
    """How a run's adapters were made; None when it has none."""
    from polytask.adapt.store import read_config

    path = folder / "model" / "adapters"
    if not path.is_dir():
        return None
    return AdaptConfig.model_validate(read_config(path)["polytask"]["adapt"])


def _inherited(adapt: AdaptConfig, old: AdaptConfig | None, tasks: int) -> AdaptConfig:
    """The run's inventory with what is asked of it; another method starts fresh adapters."""
    given = adapt.model_fields_set
    if old is not None and old.method in INVENTORY:
        if "method" in given and adapt.method != old.method:
            raise ConfigError(
                f"adapt.method '{adapt.method}': {adapt.source} was trained with "
                f"'{old.method}' adapters, which are adapted as such; leave 'method' out"
            )
        for key in _STRUCTURE:
            if key in given and getattr(adapt, key) != getattr(old, key):
                raise ConfigError(
                    f"adapt.{key} = {getattr(adapt, key)!r}: the inventory of {adapt.source} has "
                    f"{getattr(old, key)!r}; leave it out"
                )
        kept = old.model_dump(by_alias=True, exclude_unset=True)
        kept |= adapt.model_dump(by_alias=True, exclude_unset=True)
        kept["method"] = old.method
        return parse(AdaptConfig, kept, "adapt")
    if adapt.tune != "full":
        raise ConfigError(
            f"adapt.tune '{adapt.tune}': {adapt.source} has no inventory of adapters; train it "
            "with 'adapt: {method: mhr}' or leave 'tune' out"
        )
    if "method" in given:
        return adapt
    if old is not None and old.method == "bottleneck":
        return _changed(adapt, method="scalearn")
    return _changed(adapt, method="lora") if tasks == 1 else adapt


def _changed(adapt: AdaptConfig, **values: Any) -> AdaptConfig:
    given = adapt.model_dump(by_alias=True, exclude_unset=True)
    return parse(AdaptConfig, {**given, **values}, "adapt")


def _run_folder(source: str, base: Path) -> Path:
    """The run that 'adapt.from' names, from the configuration's folder or from here."""
    for folder in (base / source, Path(source)):
        if folder.is_dir():
            return folder
    raise ConfigError(f"adapt.from: there is no run folder {source}")


def vocabulary(config: RunConfig, base: Path) -> Any:
    """The text codec of the adapted run; None where there is none."""
    if config.adapt is None or config.adapt.source is None:
        return None
    from polytask.pipeline.run import Run

    return Run(_run_folder(config.adapt.source, base)).processor.codec


def make_model(
    config: RunConfig, taskset: Any, processor: Any, base: Path
) -> tuple[RunConfig, MultitaskModel]:
    """The model, adapted where the configuration says so, and the configuration with what trains.

    Raises:
        UserError: the run, the adapters or their sources do not fit.
    """
    adapt = config.adapt
    if adapt is None:
        return config, build_model(config.model, taskset, processor)
    old: MultitaskModel | None = None
    if adapt.source is None:
        model = build_model(config.model, taskset, processor)
        pretrained = {n for n, _ in model.named_parameters() if n.startswith("trunk.")}
    else:
        old = _source_model(adapt, base)
        model, pretrained = _like(old, config, taskset, processor)
    if adapt.base == "frozen":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in pretrained)
    adapters = _adapters(model, adapt, taskset.names, base, old is not None)
    model.tell_tasks = adapters.row_tasks.tell
    return config.model_copy(update={"train": _training(config, model, adapters)}), model


def _source_model(adapt: AdaptConfig, base: Path) -> MultitaskModel:
    """The run's model; updates that can be folded into its weights are."""
    from polytask.pipeline.run import Run

    assert adapt.source is not None
    model = Run(_run_folder(adapt.source, base)).model
    found = adapters_of(model)
    if found is not None:
        if found.config.method in ("lora", "ia3"):
            found.fold(0)
        else:
            found.detach()
    return model


def _like(
    old: MultitaskModel, config: RunConfig, taskset: Any, processor: Any
) -> tuple[MultitaskModel, set[str]]:
    """A model of the same shape for other tasks, and the names of what it took over."""
    heads = tuple(head_spec(task.name, task.schema) for task in taskset.tasks)
    spec = ModelSpec(
        config=config.model, inputs=input_spec(processor), heads=heads, hub=old.spec.hub
    )
    model = MultitaskModel(spec)
    have = dict(old.named_parameters()) | dict(old.named_buffers())
    taken = set()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            same = not name.startswith("heads.") and name in have
            if same and have[name].shape == tensor.shape and name != "modality.weight":
                tensor.copy_(have[name])
                taken.add(name)
    lost = [n for n, _ in model.named_parameters() if n.startswith("trunk.") and n not in taken]
    if lost:
        raise CheckpointError(f"the run's trunk does not fit: '{lost[0]}' is missing or differs")
    if _take_modalities(old, model):
        taken.add("modality.weight")
    return model, taken


@torch.no_grad()
def _take_modalities(old: MultitaskModel, new: MultitaskModel) -> bool:
    """Rows of the modality embedding by name: the two models may have other sets of them. Whether
    every row was there."""
    if old.modality is None or new.modality is None:
        return False
    before, names = old.spec.inputs.modalities, new.spec.inputs.modalities
    for row, name in enumerate(names):
        if name in before:
            new.modality.weight[row] = old.modality.weight[before.index(name)]
    return set(names) <= set(before)


def root_of(model: MultitaskModel, method: str) -> nn.Module:
    """Where adapters go: the hub model itself, so that their files fit the bare model; our own
    trunk; for prompts whatever is called with (x, mask)."""
    if isinstance(model.trunk, HubTrunk) and method != "prompt":
        return model.trunk.model
    return model.trunk


def adapters_of(model: MultitaskModel) -> Adapters | None:
    """The adapters of a model, if it has any."""
    for root in (model.trunk, getattr(model.trunk, "model", None)):
        found = getattr(root, HOME, None)
        if isinstance(found, Adapters):
            return found
    return None


def _adapters(
    model: MultitaskModel, adapt: AdaptConfig, tasks: tuple[str, ...], base: Path, from_run: bool
) -> Adapters:
    root = root_of(model, adapt.method)
    if from_run and adapt.method in INVENTORY:
        assert adapt.source is not None
        folder = _run_folder(adapt.source, base) / "model" / "adapters"
        if (folder / "adapter_config.json").is_file():
            return _ready(load(root, folder, freeze=False), adapt, tasks)
    sources = None
    if adapt.method in ("scalearn", "fusion"):
        given = adapt.sources or (str(adapt.source),)
        folders = [base / s if (base / s).is_dir() else Path(s) for s in given]
        sources = read_bottlenecks(folders, norm_sites(root, adapt.targets))
    return attach(root, adapt, tasks, freeze=False, sources=sources)


def _ready(adapters: Adapters, adapt: AdaptConfig, tasks: tuple[str, ...]) -> Adapters:
    """An inventory made ready for new tasks, as `adapt.tune` says."""
    adapters.config = adapt.model_copy(update={"targets": adapters.config.targets})
    if adapt.tune == "mu":
        adapters.to_uniform(adapt.collapse, tasks)
        return adapters
    adapters.reset(tasks, adapt.seed, keep=adapt.tune != "rand")
    if adapt.tune == "z":
        adapters.tune_rows_only()
    return adapters


def _training(config: RunConfig, model: nn.Module, adapters: Adapters) -> Any:
    """The `train` section with what trains and its rates; what the user gave goes first."""
    train = config.train
    learned = adapters.patterns()
    if not learned:
        raise AdaptError("adapt: nothing of the adapters is left to train")
    rates = adapters.learning_rates(train.lr)
    update: dict[str, Any] = {
        "lrs": {**train.lrs, **{k: v for k, v in rates.items() if k not in train.lrs}},
        "no_decay": tuple(dict.fromkeys((*train.no_decay, *_tables(rates)))),
    }
    trains = tuple(n for n, p in model.named_parameters() if p.requires_grad)
    if len(trains) < sum(1 for _ in model.named_parameters()):  # frozen sources stay frozen
        update["trains"] = _short(trains, learned)
        update["stages"] = tuple(
            stage.model_copy(update={"train": update["trains"]}) if stage.train == ("*",) else stage
            for stage in train.stages
        )
    return train.model_copy(update=update)


def _tables(rates: dict[str, float]) -> list[str]:
    return [pattern for pattern in rates if ".tables." in pattern or "module_logits" in pattern]


def _short(names: tuple[str, ...], learned: tuple[str, ...]) -> tuple[str, ...]:
    """The adapters' patterns, and the top parts of everything else that trains."""
    from fnmatch import fnmatchcase

    rest = [n for n in names if not any(fnmatchcase(n, pattern) for pattern in learned)]
    return (*learned, *rest)


def save_adapters(folder: Path, model: MultitaskModel) -> None:
    """The adapters alone, in a folder that also fits the bare model; nothing without adapters."""
    adapters = adapters_of(model)
    if adapters is not None:
        adapters.save(folder)


def reattach(model: MultitaskModel, folder: Path) -> None:
    """Adapters of a saved model, before its tensors are read."""
    from polytask.adapt.store import read_config

    method = read_config(folder)["polytask"]["adapt"].get("method", "mhr")
    adapters = load(root_of(model, method), folder, freeze=False)
    model.tell_tasks = adapters.row_tasks.tell
