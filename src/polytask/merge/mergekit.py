"""mergekit's YAML as a `Recipe`, for the methods both have; what we cannot do is refused.

Rules of the format, from mergekit's documentation and source (0.1.5): a parameter is a number, a
list of numbers (interpolated over the layers of a slice), or a list of {filter, value} of which the
first whose filter is part of the tensor's name counts; a model's own setting goes before the
slice's, which goes before the whole file's. Tensors outside layers have relative depth 0.

Two things differ on purpose. Unknown keys are errors here; mergekit ignores them. Arithmetic is in
float32 whatever `dtype` says; mergekit computes in `dtype`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from polytask.errors import ConfigError, suggestion
from polytask.merge.config import located
from polytask.merge.mergekit_forms import (
    ABSENT,
    ARITHMETIC,
    FORMS,
    NORMALIZED,
    RESCALED,
    VOTING,
)
from polytask.merge.recipe import (
    Case,
    Gradient,
    Member,
    ModelSpec,
    Part,
    Recipe,
    Setting,
    whole_method,
)

TOP = (
    "merge_method",
    "models",
    "slices",
    "modules",
    "base_model",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
    "parameters",
)
DTYPES = ("float64", "float32", "float16", "bfloat16")


def looks_like(data: Mapping[str, Any]) -> bool:
    """Whether a YAML mapping is in mergekit's form."""
    return "merge_method" in data or ("method" not in data and "base_model" in data)


def recipe_of(data: Mapping[str, Any], home: Path = Path(), where: str = "mergekit") -> Recipe:
    """The recipe of a mergekit file; `ConfigError` names keys that are unknown or not supported."""
    return _Reader(data, home, where).recipe()


class _Reader:
    def __init__(self, data: Mapping[str, Any], home: Path, where: str) -> None:
        self.data = data
        self.home = home
        self.where = where
        self._known(data, TOP, "")
        name = data.get("merge_method")
        if not isinstance(name, str):
            raise self._fault("key 'merge_method' is required")
        if name in ABSENT:
            raise self._fault(f"polytask has no merge_method '{name}': {ABSENT[name]}")
        if name not in FORMS:
            raise self._fault(f"unknown merge_method '{name}'.{suggestion(name, FORMS)}")
        self.name = name
        self.form = FORMS[name]
        self.specs: list[ModelSpec] = []

    def recipe(self) -> Recipe:
        self._refuse()
        base = None
        if self.data.get("base_model") is not None:
            base = self._model(self.data["base_model"], "base_model")
        if self.form.base == "delta" and base is None:
            raise self._fault(f"'{self.name}' needs 'base_model'")
        if "slices" in self.data:
            parts = tuple(self._slice(s, i, base) for i, s in enumerate(self._list("slices")))
        else:
            parts = (self._whole(base),)
        settings = self._settings(self.data.get("parameters"), "parameters")
        settings = {**self._defaults(), **settings}
        settings, parts = self._translated(settings, parts)
        notes = ["computed in float32 whatever 'dtype' says; mergekit computes in 'dtype'"]
        recipe = Recipe(
            method=self.form.name,
            models=tuple(self.specs),
            base=None if self.form.base == "member" else base,
            parts=parts,
            settings=settings,
            dtype=self._dtype(),
            vocabulary=self._vocabulary(),
            notes=tuple(notes if self.data.get("dtype") else []),
            said=dict(self.data),
        )
        for part in recipe.parts:
            one = whole_method(_with_part(recipe, part), self.where)
            one.check(len(part.members), recipe.base is not None)
        return recipe

    def _refuse(self) -> None:
        data = self.data
        if "modules" in data:
            raise self._fault("'modules' is not supported: give 'models' for the whole model")
        if ("models" in data) == ("slices" in data):
            raise self._fault("give either 'models' or 'slices'")
        if self.name == "passthrough" and "slices" not in data and len(self._list("models")) != 1:
            raise self._fault("'passthrough' copies: one model, or slices of one source each")
        if data.get("chat_template") is not None:
            raise self._fault(
                "'chat_template' is not supported: the base's is copied; edit tokenizer_config.json"
                " of the result"
            )

    def _whole(self, base: int | None) -> Part:
        members = []
        for i, entry in enumerate(self._list("models")):
            place = f"models[{i}]"
            self._known(entry, ("model", "parameters"), place)
            number = self._model(entry.get("model"), place)
            if number == base and self.form.base != "member":
                continue  # mergekit too takes the base as the origin, not as one of the models
            members.append(
                Member(number, 0, self._settings(entry.get("parameters"), f"{place}.parameters"))
            )
        members = self._ordered(members, base, "models")
        self._complete(members, {}, "models")
        return Part(tuple(members))

    def _ordered(self, members: list[Member], base: int | None, place: str) -> list[Member]:
        """SLERP goes from the base to the other model."""
        if self.name != "slerp":
            inside = base in [m.model for m in members]
            if self.form.base == "member" and base is not None and not inside:
                raise self._fault(
                    f"{place}: '{self.name}' merges its models and has no use for another base: "
                    "list base_model among them, or leave it out"
                )
            return members
        if base is None:
            raise self._fault("'slerp' needs 'base_model', the model at t = 0")
        if base not in [m.model for m in members]:
            members = [Member(base), *members]
        return sorted(members, key=lambda m: m.model != base)

    def _slice(self, entry: Any, number: int, base: int | None) -> Part:
        place = f"slices[{number}]"
        self._known(entry, ("sources", "base_model", "residual_weight", "parameters"), place)
        if entry.get("residual_weight") is not None:
            raise self._fault(f"{place}: 'residual_weight' is not supported")
        if entry.get("base_model") is not None and (
            self._model(entry["base_model"], place) != base
        ):
            raise self._fault(
                f"{place}: a base_model of its own is not supported: name one for all"
            )
        sources = entry.get("sources")
        if not isinstance(sources, Sequence) or isinstance(sources, str) or not sources:
            raise self._fault(f"{place}: 'sources' is a list of {{model, layer_range}}")
        members, sizes = [], set()
        for i, source in enumerate(sources):
            at = f"{place}.sources[{i}]"
            self._known(source, ("model", "layer_range", "parameters"), at)
            first, last = self._range(source.get("layer_range"), at)
            sizes.add(last - first)
            model = self._model(source.get("model"), at)
            settings = self._settings(source.get("parameters"), f"{at}.parameters")
            if model == base and self.form.base != "member":
                if first != self._base_start(sources, base):
                    raise self._fault(f"{at}: the base's layers must be those of the models")
                continue
            members.append(Member(model, first, settings))
        if len(sizes) > 1:
            raise self._fault(f"{place}: its sources have different numbers of layers")
        if self.name == "passthrough" and len(members) != 1:
            raise self._fault(f"{place}: 'passthrough' takes one source a slice")
        members = self._ordered(members, base, place) if self.name == "slerp" else members
        shared = self._settings(entry.get("parameters"), f"{place}.parameters")
        self._complete(members, shared, place)
        return Part(tuple(members), sizes.pop(), shared)

    def _base_start(self, sources: Sequence[Any], base: int | None) -> int:
        others = [
            self._range(s.get("layer_range"), "slices")[0]
            for s in sources
            if self._model(s.get("model"), "slices") != base
        ]
        return others[0] if others else 0

    def _range(self, value: Any, place: str) -> tuple[int, int]:
        fits = isinstance(value, Sequence) and len(value) == 2
        if not fits or not all(isinstance(n, int) for n in value) or not 0 <= value[0] < value[1]:
            raise self._fault(
                f"{place}: 'layer_range' is [first, last + 1], for instance [0, 16], not {value!r}"
            )
        return value[0], value[1]

    def _complete(self, members: Sequence[Member], shared: Mapping[str, Setting], at: str) -> None:
        given = {**self._settings(self.data.get("parameters"), "parameters"), **shared}
        for key in self.form.required:
            ours = {**self.form.own, **self.form.shared}[key]
            for member in members:
                if ours not in given and ours not in member.settings:
                    name = self.specs[member.model].name
                    raise self._fault(f"{at}: '{self.name}' needs '{key}' for model '{name}'")

    def _model(self, value: Any, place: str) -> int:
        """The number of a model; 'path+adapter', 'id@revision' or {model: ..., lora: ...}."""
        if isinstance(value, Mapping):
            self._known(value, ("model", "lora"), place)
            path, lora = self._path(value.get("model"), place), value.get("lora")
            lora = None if lora is None else self._path(lora, place)
        elif isinstance(value, str) and value:
            path, _, rest = value.partition("+")
            lora = rest or None
        else:
            raise self._fault(f"{place}: 'model' is a folder or hub id, not {value!r}")
        adapter = None if lora is None else Path(located(lora, self.home))
        found = located(path, self.home)
        for number, spec in enumerate(self.specs):
            if (spec.where, spec.adapter) == (found, adapter):
                return number
        name = path if adapter is None else f"{path}+{lora}"
        self.specs.append(ModelSpec(found, name, adapter))
        return len(self.specs) - 1

    def _path(self, value: Any, place: str) -> str:
        if isinstance(value, Mapping):
            self._known(value, ("path", "revision"), place)
            path, revision = value.get("path"), value.get("revision")
            value = f"{path}@{revision}" if revision else path
        if not isinstance(value, str):
            raise self._fault(f"{place}: a model is a folder or hub id, not {value!r}")
        return value

    def _settings(self, given: Any, place: str) -> dict[str, Setting]:
        """Parameters by our names."""
        if given is None:
            return {}
        if not isinstance(given, Mapping):
            raise self._fault(f"{place} should hold 'key: value' lines, not {given!r}")
        names = {**self.form.own, **self.form.shared}
        found = {}
        for key, value in given.items():
            if key == "int8_mask":
                continue  # how mergekit stores its masks; the result is the same
            if key not in names:
                raise self._fault(
                    f"{place}: '{self.name}' has no parameter '{key}'.{suggestion(str(key), names)}"
                )
            found[names[key]] = self._setting(value, f"{place}.{key}")
        return found

    def _setting(self, value: Any, place: str) -> Setting:
        if isinstance(value, list) and value and all(isinstance(v, Mapping) for v in value):
            return Setting(tuple(self._case(v, place) for v in value))
        if isinstance(value, Mapping):
            return Setting((self._case(value, place),))
        return Setting((Case(self._value(value, place)),))

    def _case(self, entry: Mapping[str, Any], place: str) -> Case:
        self._known(entry, ("value", "filter"), place)
        if "value" not in entry:
            raise self._fault(f"{place}: every {{filter, value}} needs a 'value'")
        wanted = entry.get("filter")
        pattern = None if wanted in (None, "*") else str(wanted)
        return Case(self._value(entry["value"], place), pattern, True)

    def _value(self, value: Any, place: str) -> Any:
        if isinstance(value, list):
            if not value or not all(isinstance(v, int | float) for v in value):
                raise self._fault(f"{place}: a gradient is a list of numbers, not {value!r}")
            return Gradient(tuple(value))
        if not isinstance(value, int | float):
            raise self._fault(f"{place}: should be a number, true or false, not {value!r}")
        return value

    def _defaults(self) -> dict[str, Setting]:
        return {key: Setting((Case(value),)) for key, value in self.form.defaults.items()}

    def _translated(
        self, settings: dict[str, Setting], parts: tuple[Part, ...]
    ) -> tuple[dict[str, Setting], tuple[Part, ...]]:
        """Switches that are another parameter here."""
        inside = [part.settings for part in parts] + [m.settings for p in parts for m in p.members]
        moved = {"normalize", "rescale", "flatten", "row_wise", "filter_wise"}
        for place in inside:
            for key in moved & set(place):
                if key != "normalize" or self.name in VOTING:
                    raise self._fault(f"'{key}' must be the same for the whole model")

        def switch(key: str, default: bool) -> bool:
            setting = settings.pop(key, None)
            if setting is None:
                return default
            if len(setting.cases) != 1 or isinstance(setting.cases[0].value, Gradient):
                raise self._fault(f"'{key}' must be the same for the whole model")
            return bool(setting.cases[0].value)

        made: dict[str, Any] = {}
        if self.name in VOTING:
            divide = switch("normalize", self.name in NORMALIZED)
            made["vote"] = {"divide": "weights" if divide else "none"}
        if self.name in RESCALED:
            made["rescale"] = "l1" if switch("rescale", True) else "none"
        elif self.form.shared is ARITHMETIC and switch("rescale", False):
            raise self._fault(
                f"'rescale' is not supported for '{self.name}': leave it out, or use 'scale'"
            )
        if self.name == "nuslerp":
            flat, row_wise = switch("flatten", True), switch("row_wise", False)
            made["vectors"] = "tensor" if flat else "columns" if row_wise else "rows"
        if self.name == "model_stock":
            made["vectors"] = "rows" if switch("filter_wise", False) else "tensor"
        return {**settings, **{k: Setting((Case(v),)) for k, v in made.items()}}, parts

    def _dtype(self) -> str | None:
        chosen = self.data.get("out_dtype") or self.data.get("dtype")
        for key in ("out_dtype", "dtype"):
            given = self.data.get(key)
            if given is not None and given not in DTYPES:
                raise self._fault(f"'{key}: {given}' is no type.{suggestion(str(given), DTYPES)}")
        return chosen

    def _vocabulary(self) -> str:
        source = self.data.get("tokenizer_source")
        nested = self.data.get("tokenizer")
        if nested is not None:
            if source is not None:
                raise self._fault("give 'tokenizer_source' or 'tokenizer', not both")
            self._known(nested, ("source", "tokens", "pad_to_multiple_of"), "tokenizer")
            for key in ("tokens", "pad_to_multiple_of"):
                if nested.get(key) is not None:
                    raise self._fault(f"'tokenizer.{key}' is not supported")
            source = nested.get("source", "union")
        if source is None or source in ("base", "union"):
            return source or "refuse"
        return self.specs[self._model(source, "tokenizer_source")].name

    def _list(self, key: str) -> list[Any]:
        value = self.data.get(key)
        if not isinstance(value, list) or not value:
            raise self._fault(f"'{key}' should be a list")
        for i, entry in enumerate(value):
            if not isinstance(entry, Mapping):
                raise self._fault(f"{key}[{i}] should hold 'key: value' lines, not {entry!r}")
        return value

    def _known(self, entry: Any, keys: Sequence[str], place: str) -> None:
        if not isinstance(entry, Mapping):
            raise self._fault(f"{place} should hold 'key: value' lines, not {entry!r}")
        for key in entry:
            if key not in keys:
                at = f"{place}: " if place else ""
                raise self._fault(f"{at}unknown key '{key}'.{suggestion(str(key), keys)}")

    def _fault(self, text: str) -> ConfigError:
        return ConfigError(f"{self.where}: {text}")


def _with_part(recipe: Recipe, part: Part) -> Recipe:
    return replace(recipe, parts=(part,))
