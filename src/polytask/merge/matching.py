"""Which tensor of one model is which of another, decided by names alone.

Models of one base have the same names, but for three things that are put right here: a prefix that
a wrapper class adds ('bert.' before everything), output layers that are stored in one model and
tied to the embedding in another, and integer buffers that some versions store. Everything else
that is missing or additional is an error that names model and tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from polytask.errors import MergeError, nearest
from polytask.merge.headers import TensorHeader
from polytask.merge.sources import TensorSource, config_of

# Output layers that Hugging Face models tie to the input embedding where the configuration says so.
TIED = (
    "lm_head.weight",
    "lm_head.bias",
    "embed_out.weight",
    "predictions.decoder.weight",
    "predictions.decoder.bias",
    "lm_head.decoder.weight",
    "lm_head.decoder.bias",
    "vocab_projector.weight",
    "generator_lm_head.weight",
)


@dataclass(frozen=True)
class Match:
    """How a model's names fit the frame's.

    Attributes:
        keys: name in the frame -> name in the model.
        heads: names in the model that stay its own.
        dropped: names in the frame that the model has tied, so that nobody stores them.
        spare: names in the model that it stores although its configuration ties them.
        notes: what a reader of the plan should know.
    """

    keys: dict[str, str]
    heads: tuple[str, ...]
    dropped: frozenset[str]
    notes: tuple[str, ...] = ()
    spare: tuple[str, ...] = ()


def is_head(name: str, patterns: Sequence[str]) -> bool:
    """Whether a tensor stays its model's own."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def match(frame: TensorSource, source: TensorSource, heads: Sequence[str] = ()) -> Match:
    """Fit a model's names to those of the frame (the base, or the first model).

    Raises:
        MergeError: names the model, the tensor, and what to do.
    """
    own = tuple(sorted(key for key in source.headers if is_head(key, heads)))
    wanted = {key: h for key, h in frame.headers.items() if not is_head(key, heads)}
    given = {key: h for key, h in source.headers.items() if not is_head(key, heads)}
    keys, notes = _named(wanted, given, source.name)
    missing = [k for k in wanted if k not in keys and _counts(wanted[k])]
    used = set(keys.values())
    extra = [k for k in given if k not in used and _counts(given[k])]
    dropped = frozenset(k for k in missing if _tied(frame, k))
    spare = [k for k in extra if _tied(source, k)]
    if dropped or spare:
        shown = ", ".join(f"'{k}'" for k in sorted({*dropped, *spare}))
        notes.append(f"{source.name}: {shown} is left out, being tied to the embedding")
    _refuse_missing(source.name, [k for k in missing if k not in dropped], given)
    _refuse_extra(source.name, [k for k in extra if k not in spare], wanted)
    for name, key in keys.items():
        _check_kind(source.name, key, wanted[name], given[key])
    return Match(keys, own, dropped, tuple(notes), tuple(sorted(spare)))


def _named(
    wanted: dict[str, TensorHeader], given: dict[str, TensorHeader], name: str
) -> tuple[dict[str, str], list[str]]:
    keys = {key: key for key in wanted if key in given}
    absent = [key for key in wanted if key not in given and _counts(wanted[key])]
    if not absent or len(absent) < len(wanted) // 2:
        return keys, []
    first = absent[0]
    longer = {k[: -len(first)] for k in given if k.endswith(f".{first}")}
    shorter = {first[: -len(k)] for k in given if first.endswith(f".{k}")}
    for prefix in sorted(longer, key=len):
        added = {key: prefix + key for key in wanted if prefix + key in given}
        if len(added) > len(keys):
            return added, [f"{name}: its names begin with '{prefix}', the base's do not"]
    for prefix in sorted(shorter, key=len):
        cut = {key: key.removeprefix(prefix) for key in wanted if key.removeprefix(prefix) in given}
        if len(cut) > len(keys):
            return cut, [f"{name}: its names lack the base's '{prefix}'"]
    return keys, []


def _counts(header: TensorHeader) -> bool:
    """Integer buffers (position ids, counters) may be missing or additional."""
    return header.dtype.is_floating_point


def _tied(source: TensorSource, key: str) -> bool:
    config = config_of(source.folder)
    return bool(config and config.get("tie_word_embeddings", True)) and key.endswith(TIED)


def _refuse_missing(name: str, missing: Sequence[str], given: Iterable[str]) -> None:
    if missing:
        like = nearest(missing[0], given)
        hint = f" (it has '{like}')" if like else ""
        raise MergeError(
            f"{name}: tensor {_some(missing)} of the base is missing{hint}. A tensor that is each "
            "model's own, such as a classification head, is named under 'heads'"
        )


def _refuse_extra(name: str, extra: Sequence[str], wanted: Iterable[str]) -> None:
    if extra:
        like = nearest(extra[0], wanted)
        hint = f" (the base has '{like}')" if like else ""
        raise MergeError(
            f"{name}: tensor {_some(extra)} is not in the base{hint}. A tensor that is each "
            "model's own, such as a classification head, is named under 'heads'"
        )


def _check_kind(name: str, key: str, wanted: TensorHeader, given: TensorHeader) -> None:
    if wanted.dtype.is_floating_point != given.dtype.is_floating_point:
        raise MergeError(
            f"{name}: tensor '{key}' has type {given.dtype}, the base's has {wanted.dtype}"
        )


def check_shape(name: str, key: str, wanted: TensorHeader, given: TensorHeader) -> None:
    """`MergeError` when shapes differ; a hint where only the rows do, as with vocabularies."""
    if wanted.shape == given.shape:
        return
    hint = ""
    if wanted.shape and wanted.shape[1:] == given.shape[1:]:
        hint = (
            ". If these are vocabularies that differ, say how to align them: 'vocabulary: base' or "
            "'vocabulary: union'"
        )
    raise MergeError(
        f"{name}: tensor '{key}' has shape {given.shape}, the base's has {wanted.shape}{hint}"
    )


def _some(keys: Sequence[str]) -> str:
    shown = ", ".join(f"'{key}'" for key in sorted(keys)[:3])
    return shown + (f" (and {len(keys) - 3} more)" if len(keys) > 3 else "")
