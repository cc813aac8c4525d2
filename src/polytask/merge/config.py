"""`MergeConfig`: a merge in a few lines of YAML. mergekit's files are read by `mergekit`.

method: ties
base: models/base
models:
  reviews: {model: models/reviews, weight: 0.5, density: 0.2}
  topics: {model: models/topics, weight: 0.3}
parameters: {trim: model}
tensors:
  - {match: "*.mlp.*", weight: {layers: [0.2, 0.6]}}
heads: ["classifier.*"]
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, PositiveInt, field_validator

from polytask.configs import Config, load_yaml, parse
from polytask.errors import ConfigError, suggestion
from polytask.merge.method import METHODS
from polytask.merge.recipe import (
    Case,
    Gradient,
    Member,
    ModelSpec,
    Part,
    Recipe,
    Setting,
    bytes_of,
    whole_method,
)
from polytask.tasks.config import TaskConfig


class ModelEntry(Config):
    """One model; besides these keys it may have the method's per-model parameters."""

    model: str
    """Folder, file, run folder, hub id in the cache ('org/name' or 'org/name@revision')."""
    name: str | None = None
    adapter: Path | None = None
    """A PEFT adapter to work into the model."""
    statistics: Path | None = None
    """A safetensors file with what Fisher or RegMean merging needs to know of this model."""
    parameters: dict[str, Any] = Field(default_factory=dict)


class TensorRule(Config):
    """Other parameters for tensors whose name matches (* and ? in `match`).

    The last rule that matches counts, before what a model's entry says. A per-model parameter is
    one value for all or a list with one each; `{layers: [a, b]}` runs from the first layer to the
    last.
    """

    match: str
    parameters: dict[str, Any]


class CompareTask(TaskConfig):
    """A task to compare on (see `tasks`), and whose head answers it."""

    model: str | None = None
    """Name of the model whose head answers; needed where every model has its own head."""


class CompareConfig(Config):
    """What base, experts and merge are scored on."""

    tasks: dict[str, CompareTask] = Field(default_factory=dict)
    """Rows with labels by task. Not needed for polytask runs, which know their own tasks."""
    split: str = "test"
    batch_size: PositiveInt = 64
    limit: PositiveInt | None = None
    """At most this many rows a task."""
    scales: tuple[float, ...] = ()
    """Also score base + s (merge - base) for these s."""

    @field_validator("tasks", mode="before")
    @classmethod
    def _short_form(cls, tasks: Any) -> Any:
        if not isinstance(tasks, Mapping):
            return tasks
        return {n: {"data": t} if isinstance(t, str) else t for n, t in tasks.items()}


class MergeConfig(Config):
    """One merge."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    method: str
    base: str | None = None
    base_adapter: Path | None = None
    models: tuple[ModelEntry, ...] = Field(min_length=1)
    parameters: dict[str, Any] = Field(default_factory=dict)
    tensors: tuple[TensorRule, ...] = ()
    heads: tuple[str, ...] = ()
    """Tensors that stay each model's own (classification heads); * and ? match."""
    dtype: Literal["float64", "float32", "float16", "bfloat16"] | None = None
    """Type of the result; the base's own types when left out. Computed in float32 always."""
    vocabulary: str = "refuse"
    """When tokenizers differ: 'refuse', or align rows by token to the 'base', to the 'union', or to
    the model of this name."""
    check_base: bool = True
    """Refuse a model that lies farther from the base than the base from zero."""
    seed: int = Field(default=0, ge=0)
    shard_size: str | int = "5GB"
    out: Path | None = None
    compare: CompareConfig | None = None


def parse_config(data: Mapping[str, Any], where: str = "the configuration") -> MergeConfig:
    """Validate plain values; `ConfigError` names keys and values with the nearest valid one."""
    given = dict(data)
    if "merge_method" in given:
        raise ConfigError(f"{where} is in mergekit's form; `read_recipe` reads both")
    name = given.get("method")
    if not isinstance(name, str):
        raise ConfigError(f"{where}: key 'method' is required, one of {', '.join(METHODS.names())}")
    if name == "adamerging":
        raise ConfigError(
            f"{where}: AdaMerging learns from inputs, which a merge of files has not; it is "
            "`polytask run adamerging`"
        )
    factory = METHODS.get(name)
    given["models"] = _models(given.get("models"), factory.per_model, where)
    rules = given.get("tensors", ())
    if not isinstance(rules, list | tuple):
        raise ConfigError(f"{where}: 'tensors' is a list of {{match: PATTERN, PARAMETER: VALUE}}")
    local = tuple(factory.model_fields)
    given["tensors"] = [
        _gathered(rule, TensorRule, local, f"{where}: tensors[{i}]") for i, rule in enumerate(rules)
    ]
    unknown = set(given.get("parameters") or {}) - set(local)
    if unknown:
        key = min(unknown)
        raise ConfigError(
            f"{where}: parameters: {name} has no parameter '{key}'.{suggestion(key, local)}"
        )
    return parse(MergeConfig, given, where)


def _models(models: Any, allowed: tuple[str, ...], where: str) -> list[Any]:
    if isinstance(models, Mapping):
        named = [(f"models.{name}", name, entry) for name, entry in models.items()]
    elif isinstance(models, list | tuple):
        named = [(f"models[{i}]", None, entry) for i, entry in enumerate(models)]
    else:
        raise ConfigError(f"{where}: 'models' is a list of models or a mapping of names to models")
    found = []
    for place, name, entry in named:
        made = {"model": entry} if isinstance(entry, str) else entry
        if name is not None and isinstance(made, Mapping):
            made = {"name": str(name), **made}
        found.append(_gathered(made, ModelEntry, allowed, f"{where}: {place}"))
    return found


def _gathered(entry: Any, kind: type[Config], allowed: tuple[str, ...], where: str) -> Any:
    """An entry with the method's parameters, written beside its own keys, under 'parameters'."""
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where} should hold 'key: value' lines, not {entry!r}")
    own = {k: v for k, v in entry.items() if k in kind.model_fields}
    rest = {str(k): v for k, v in entry.items() if k not in kind.model_fields}
    given = own.get("parameters") or {}
    rest = {**given, **rest} if isinstance(given, Mapping) else rest
    for key in rest:
        if key not in allowed:
            known = [k for k in kind.model_fields if k != "parameters"] + list(allowed)
            raise ConfigError(f"{where}: unknown key '{key}'.{suggestion(key, known)}")
    return {**own, "parameters": rest}


def recipe_of(config: MergeConfig, home: Path = Path()) -> Recipe:
    """The recipe behind a configuration; relative paths start at `home`."""
    specs = [_spec(entry, home) for entry in config.models]
    base = None
    if config.base is not None:
        where = located(config.base, home)
        same = [
            i
            for i, spec in enumerate(specs)
            if spec.where == where and spec.adapter is None and config.base_adapter is None
        ]
        if same:
            raise ConfigError(
                f"models: '{specs[same[0]].name}' is the base itself; list only what was trained "
                "from it"
            )
        adapter = None if config.base_adapter is None else home / config.base_adapter
        specs.append(ModelSpec(where, "base", adapter))
        base = len(specs) - 1
    rules = tuple(reversed(config.tensors))
    factory = METHODS.get(config.method)
    members = tuple(
        Member(i, 0, {k: _setting(k, v, rules, i) for k, v in entry.parameters.items()})
        for i, entry in enumerate(config.models)
    )
    named = {k for rule in rules for k in rule.parameters}
    shared = {
        key: _setting(key, config.parameters.get(key), rules, None)
        for key in factory.model_fields
        if key in config.parameters or key in named
    }
    recipe = Recipe(
        method=config.method,
        models=tuple(specs),
        base=base,
        parts=(Part(members),),
        settings=shared,
        heads=config.heads,
        dtype=config.dtype,
        vocabulary=config.vocabulary,
        check_base=config.check_base,
        seed=config.seed,
        shard_bytes=bytes_of(config.shard_size),
        said=config.model_dump(
            mode="json", exclude_defaults=True, exclude={"out", "compare"}, by_alias=True
        ),
    )
    whole_method(recipe, "merge").check(len(members), base is not None)
    return recipe


def _spec(entry: ModelEntry, home: Path) -> ModelSpec:
    where = located(entry.model, home)
    name = entry.name or (where if "/" in where and not Path(where).exists() else Path(where).name)
    return ModelSpec(
        where,
        name or where,
        None if entry.adapter is None else home / entry.adapter,
        None if entry.statistics is None else home / entry.statistics,
    )


def located(where: str, home: Path) -> str:
    """A path relative to `home` when it is there; anything else (hub ids) stays as it is."""
    path = Path(where).expanduser()
    return str(home / path) if (home / path).exists() else where


def _setting(key: str, value: Any, rules: tuple[TensorRule, ...], model: int | None) -> Setting:
    """Rules first (a list has a value for each model), then the value for all tensors."""
    cases = [
        Case(_value(_share(rule.parameters[key], model)), rule.match)
        for rule in rules
        if key in rule.parameters
    ]
    if value is not None:
        cases.append(Case(_value(value)))
    return Setting(tuple(cases))


def _share(value: Any, model: int | None) -> Any:
    if model is None or not isinstance(value, list | tuple):
        return value
    return value[model] if model < len(value) else value


def _value(value: Any) -> Any:
    if isinstance(value, Mapping) and set(value) == {"layers"}:
        given = value["layers"]
        if not isinstance(given, list | tuple) or not given:
            raise ConfigError(f"'layers' is a list of values, first layer to last, not {given!r}")
        return Gradient(tuple(given))
    return tuple(value) if isinstance(value, list) else value


def read_recipe(path: Path) -> tuple[Recipe, MergeConfig | None]:
    """The recipe of a YAML file, ours or mergekit's; with the configuration if it is ours."""
    from polytask.merge import mergekit

    data = load_yaml(path)
    if mergekit.looks_like(data):
        return mergekit.recipe_of(data, path.parent, str(path)), None
    config = parse_config(data, str(path))
    return recipe_of(config, path.parent), config
