"""Typed configurations: unknown keys and wrong types are errors that name key, value and remedy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from polytask.errors import ConfigError, suggestion


class Config(BaseModel):
    """Base of every configuration: frozen, no unknown keys, defaults validated."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


C = TypeVar("C", bound=BaseModel)


def parse(model: type[C], data: Mapping[str, Any], where: str) -> C:
    """Validate `data`; a failure becomes one `ConfigError` naming every fault found."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        lines = [_describe(model, item) for item in error.errors()]
        raise ConfigError(f"{where}: " + "; ".join(lines)) from error


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping; syntax errors name the line, duplicate keys are refused."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    def mapping(loader: Loader, node: yaml.MappingNode) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = loader.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            if key in seen:
                line = key_node.start_mark.line + 1
                raise ConfigError(f"{path}, line {line}: '{key}' is given twice")
            seen.add(key)
        loader.flatten_mapping(node)
        return dict(loader.construct_pairs(node, deep=True))  # type: ignore[no-untyped-call]

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    if not path.is_file():
        raise ConfigError(f"there is no configuration file {path}")
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} should hold 'key: value' lines, not {type(data).__name__}")
    return data


def _describe(model: type[BaseModel], item: Any) -> str:
    path = [str(part) for part in item["loc"]]
    key = ".".join(path)
    if item["type"] == "extra_forbidden":
        return f"unknown key '{key}'.{suggestion(path[-1], _fields_at(model, item['loc'][:-1]))}"
    if item["type"] == "missing":
        return f"key '{key}' is required"
    value = repr(item.get("input"))
    message = str(item["msg"]).removeprefix("Value error, ")
    return f"key '{key}' = {value[:80]}: {message}"


def _fields_at(model: type[BaseModel], loc: tuple[Any, ...]) -> list[str]:
    """Field names valid at `loc`, walking through nested models, mappings and unions."""
    here: list[type[BaseModel]] = [model]
    for part in loc:
        following: list[type[BaseModel]] = []
        for current in here:
            field = current.model_fields.get(str(part))
            if field is not None:
                following += _models_in(field.annotation)
        here = following or here
    return sorted(
        {field.alias or name for current in here for name, field in current.model_fields.items()}
    )


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for arg in get_args(annotation) for found in _models_in(arg)]
