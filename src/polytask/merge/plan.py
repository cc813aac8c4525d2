"""The whole plan of a merge, checked from headers and configurations before any tensor is read.

A plan says for every tensor of the result which tensors it is made from, by which method with which
parameters, in which type, and at which byte of which file it will lie. Whatever can be wrong
without looking at numbers is found here.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from polytask import __version__
from polytask.errors import ConfigError, DataError, MergeError, suggestion
from polytask.merge import vocabulary
from polytask.merge.layout import Builder, Item, Shard, shards_of
from polytask.merge.matching import Match, is_head, match
from polytask.merge.method import Method
from polytask.merge.recipe import Recipe, whole_method
from polytask.merge.sources import AdapterSource, FileSource, TensorSource, config_of, open_source
from polytask.merge.vocabulary import AlignedSource, Alignment


@dataclass(frozen=True)
class Plan:
    """A merge that passed all checks.

    Attributes:
        recipe: what was asked for.
        method: with the parameters that hold for all tensors.
        sources: models in the recipe's order (aligned where vocabularies differ).
        names: of the experts, in order: who is in row k of a method's `models`.
        frame: number of the source whose names, configuration and tokenizer the result has.
        items: every stored tensor of the result.
        aliases: further names of a stored tensor -> its name.
        heads: for each source the tensors that stay its own.
        layers: of the result where slices were stacked, else None.
        notes: what a reader should know.
        fingerprint: of everything that decides the result; a work folder of another is not resumed.
    """

    recipe: Recipe
    method: Method
    sources: tuple[TensorSource, ...]
    statistics: tuple[TensorSource, ...] | None
    names: tuple[str, ...]
    frame: int
    items: tuple[Item, ...]
    aliases: Mapping[str, str]
    shards: tuple[Shard, ...]
    heads: tuple[tuple[str, ...], ...]
    matches: tuple[Match, ...]
    alignment: Alignment | None
    layers: int | None
    notes: tuple[str, ...]
    fingerprint: str

    @property
    def size(self) -> int:
        """Bytes of the result's tensor files."""
        return sum(shard.size for shard in self.shards)

    @property
    def merged(self) -> tuple[Item, ...]:
        return tuple(item for item in self.items if item.action == "merge")

    @property
    def uses_base(self) -> bool:
        return any(item.base is not None for item in self.items)


def make_plan(recipe: Recipe, given: Mapping[str, Any] | None = None) -> Plan:
    """Open every model's headers and check everything that can be checked without numbers.

    Args:
        recipe: what to merge.
        given: state dicts or modules by model name, in place of what the recipe says is where.

    Raises:
        MergeError: missing or unlike tensors (model and tensor named), truncated or unsafe files,
            models of another kind, vocabularies that differ.
        ConfigError: parameters that the method cannot take, at all or for some tensors only.
    """
    method = whole_method(recipe, "merge")
    plain = _open(recipe, given or {})
    frame = recipe.base if recipe.base is not None else recipe.experts[0]
    _check_kinds(recipe, plain, frame)
    matches = tuple(
        match(plain[frame], source, recipe.heads)
        if number != frame
        else Match(
            {k: k for k in source.headers if not is_head(k, recipe.heads)},
            tuple(sorted(k for k in source.headers if is_head(k, recipe.heads))),
            frozenset(),
        )
        for number, source in enumerate(plain)
    )
    notes = [*recipe.notes, *(note for m in matches for note in m.notes)]
    sources, alignment = _vocabularies(recipe, plain, matches, frame, notes)
    builder = Builder(recipe, method, sources, matches, frame)
    items = builder.items()
    aliases = _aliases(plain[frame], {item.name for item in items})
    items = tuple(item for item in items if item.name not in aliases)
    statistics = _statistics(recipe, method)
    notes += builder.notes
    return Plan(
        recipe=recipe,
        method=method,
        sources=sources,
        statistics=statistics,
        names=tuple(recipe.models[i].name for i in recipe.experts),
        frame=frame,
        items=items,
        aliases=aliases,
        shards=shards_of(items, aliases, recipe.shard_bytes),
        heads=tuple(m.heads for m in matches),
        matches=matches,
        alignment=alignment,
        layers=builder.layers,
        notes=tuple(notes),
        fingerprint=_fingerprint(recipe, plain, statistics),
    )


def check_disk(plan: Plan, folder: Path, there: int = 0) -> None:
    """`DataError` when the disk that holds `folder` has no room for the result; `there`: bytes of
    it that an interrupted merge has written."""
    home = next(p for p in (folder, *folder.absolute().parents) if p.is_dir())
    free, needed = shutil.disk_usage(home).free, plan.size + 10_000_000 - there
    if free < needed:
        raise DataError(
            f"{home} has {free / 1e9:.2f} GB free, the merged model needs {needed / 1e9:.2f} GB"
        )


def _open(recipe: Recipe, given: Mapping[str, Any]) -> tuple[TensorSource, ...]:
    for name in given:
        if name not in [spec.name for spec in recipe.models]:
            known = [spec.name for spec in recipe.models]
            raise ConfigError(f"there is no model '{name}'.{suggestion(name, known)}")

    def opened(number: int, base: TensorSource | None) -> TensorSource:
        spec = recipe.models[number]
        where = given.get(spec.name, spec.where)
        return open_source(where, spec.name, adapter=spec.adapter, base=base)

    base = None if recipe.base is None else opened(recipe.base, None)
    return tuple(
        base if base is not None and number == recipe.base else opened(number, base)
        for number in range(len(recipe.models))
    )


def _check_kinds(recipe: Recipe, sources: Sequence[TensorSource], frame: int) -> None:
    """Configurations of one kind: another architecture is named before its first tensor is."""
    wanted = config_of(sources[frame].folder).get("model_type")
    for source in sources:
        kind = config_of(source.folder).get("model_type")
        if wanted and kind and kind != wanted:
            raise MergeError(
                f"{source.name} is a model of type '{kind}', {sources[frame].name} of type "
                f"'{wanted}'; only models of one base can be merged"
            )


def _vocabularies(
    recipe: Recipe,
    sources: Sequence[TensorSource],
    matches: Sequence[Match],
    frame: int,
    notes: list[str],
) -> tuple[tuple[TensorSource, ...], Alignment | None]:
    if recipe.vocabulary == "refuse":
        notes += vocabulary.check_equal(sources, frame)
        return tuple(sources), None
    names = [source.name for source in sources]
    target: int | None = frame
    if recipe.vocabulary == "union":
        target = None
    elif recipe.vocabulary != "base" or "base" in names:
        if recipe.vocabulary not in names:
            options = [*names, "refuse", "base", "union"]
            raise ConfigError(
                f"vocabulary: there is no model '{recipe.vocabulary}'."
                f"{suggestion(recipe.vocabulary, options)}"
            )
        target = names.index(recipe.vocabulary)
    alignment = vocabulary.align(sources, frame, target)
    notes += alignment.report
    keys = [m.keys for m in matches]
    return (
        tuple(
            AlignedSource(number, alignment, sources, keys, recipe.base)
            for number in range(len(sources))
        ),
        alignment,
    )


def _aliases(frame: TensorSource, names: set[str]) -> dict[str, str]:
    """Names that share a place -> the one that is stored: the embedding's, else the first."""
    places: dict[tuple[Any, ...], list[str]] = {}
    for name in sorted(names & set(frame.headers)):
        header = frame.headers[name]
        if header.count:
            places.setdefault((*header.place, header.shape), []).append(name)
    found: dict[str, str] = {}
    for shared in places.values():
        kept = next((name for name in shared if "emb" in name or "shared" in name), shared[0])
        found |= {name: kept for name in shared if name != kept}
    return found


def _statistics(recipe: Recipe, method: Method) -> tuple[TensorSource, ...] | None:
    specs = [recipe.models[number] for number in recipe.experts]
    if method.extra is None:
        given = [spec.name for spec in specs if spec.statistics is not None]
        if given:
            raise ConfigError(f"{given[0]}: {method.title} has no use for 'statistics'")
        return None
    lacking = [spec.name for spec in specs if spec.statistics is None]
    if lacking:
        raise ConfigError(
            f"{lacking[0]}: {method.title} needs 'statistics', a safetensors file with the "
            f"'{method.extra}' of every tensor"
        )
    return tuple(
        FileSource(f"statistics of {spec.name}", [spec.statistics])
        for spec in specs
        if spec.statistics is not None
    )


def _fingerprint(
    recipe: Recipe, sources: Sequence[TensorSource], statistics: Sequence[TensorSource] | None
) -> str:
    parts: list[Any] = [__version__, repr(replace(recipe, said={}, notes=()))]
    for source in [*sources, *(statistics or ())]:
        for key, header in sorted(source.headers.items()):
            parts.append([key, header.shape, str(header.dtype)])
        parts.append(_identity(source))
    text = json.dumps(parts, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _identity(source: TensorSource) -> Any:
    """Sizes and times of the files behind a source; something new each time for memory."""
    if isinstance(source, FileSource):
        return [_stamp(path) for path in source.paths]
    if isinstance(source, AdapterSource):
        inside = sorted(p for p in source.adapter_folder.iterdir() if p.is_file())
        return [_identity(source.base), *(_stamp(path) for path in inside)]
    return uuid.uuid4().hex


def _stamp(path: Path) -> list[Any]:
    found = path.stat()
    return [str(path), found.st_size, found.st_mtime_ns]
