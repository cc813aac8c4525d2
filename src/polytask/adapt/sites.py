"""Which modules of a model are adapted, found by name patterns, and what shape they have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from polytask.errors import AdaptError, suggestion

HOME = "adapters"  # the submodule that holds everything an adapted model learns
_SKIPPED = (HOME, "heads")  # top-level parts whose layers are never meant by 'all'
_READOUTS = ("lm_head", "embed_out", "pooler", "classifier", "score")  # nor are these


def find_sites(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Module]:
    """Modules whose name a pattern matches, by name, in the model's order.

    '*' stands for anything; a pattern also matches the end of a name after a dot, so 'query'
    means every module called query. Raises `AdaptError` for a pattern without a match, with the
    nearest name.
    """
    named = {n: m for n, m in model.named_modules() if n and not _inside(n, (HOME,))}
    found: dict[str, nn.Module] = {}
    for pattern in patterns:
        hits = [n for n in named if _matches(n, pattern)]
        if not hits:
            last = sorted({n.rsplit(".", 1)[-1] for n in named if not _has_children(named[n])})
            near = suggestion(pattern.strip("*."), last)
            raise AdaptError(f"targets: no module of {type(model).__name__} is '{pattern}'.{near}")
        found |= {n: named[n] for n in hits}
    return {n: m for n, m in named.items() if n in found}


def linear_sites(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Module]:
    """Linear layers to adapt; without patterns all of them (heads left out).

    Raises `AdaptError` for a target that is no linear layer, or whose forward is never called.
    """
    if not patterns:
        found = {
            n: m
            for n, m in model.named_modules()
            if is_linear(m)
            and not _inside(n, _SKIPPED)
            and not set(_READOUTS) & set(n.split("."))
            and _bypass(m) is None
        }
        if not found:
            raise AdaptError(f"{type(model).__name__} has no linear layer to adapt")
        return found
    found = {}
    for name, module in find_sites(model, patterns).items():
        if is_linear(module):
            reason = _bypass(module)
            if reason:
                raise AdaptError(f"targets: {name} cannot be adapted: {reason}")
            found[name] = module
        elif not _has_children(module):
            raise AdaptError(
                f"targets: {name} is a {type(module).__name__}; low-rank updates go on linear "
                "layers"
            )
        else:  # a block: its linear layers
            inner = {f"{name}.{n}": m for n, m in module.named_modules() if n and is_linear(m)}
            found |= {n: m for n, m in inner.items() if _bypass(m) is None}
    if not found:
        raise AdaptError(f"targets: {', '.join(patterns)} contain no linear layer")
    return found


def is_linear(module: nn.Module) -> bool:
    """`nn.Linear`, or the transposed `Conv1D` of GPT-2 in transformers."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def linear_shape(module: Any) -> tuple[int, int]:
    """(inputs, outputs)."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return int(module.weight.shape[0]), int(module.weight.shape[1])


def norm_sites(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Module]:
    """Where bottleneck adapters stand; without patterns the normalisation after every
    feed-forward of a post-norm encoder ('output.LayerNorm' in BERT), or every feed-forward.

    Raises `AdaptError` when nothing fits.
    """
    if patterns:
        return find_sites(model, patterns)
    named = {n: m for n, m in model.named_modules() if not _inside(n, _SKIPPED)}
    for ending in _FEED_FORWARD_ENDS:
        found = {n: m for n, m in named.items() if _ends(n, ending)}
        if found:
            return found
    raise AdaptError(
        f"{type(model).__name__} has no feed-forward that is known by name; give 'targets': the "
        "normalisation after each feed-forward, or the feed-forward itself"
    )


# The attention's own '.attention.output.LayerNorm' is no feed-forward, so parents are told apart.
_FEED_FORWARD_ENDS = ("output.LayerNorm", "output_layer_norm", "final_layer_norm", "feed_forward")


def _ends(name: str, ending: str) -> bool:
    return ("." + name).endswith("." + ending) and "attention.output" not in name


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises: an adapter there follows Pfeiffer's placement."""
    return "norm" in type(module).__name__.lower()


def width_of(name: str, module: nn.Module) -> int:
    """Width of what a site puts out; `AdaptError` when it cannot be told."""
    weight = getattr(module, "weight", None)
    if is_norm(module) and weight is not None:
        return int(weight.shape[-1])
    linear = [m for m in module.modules() if is_linear(m)]
    if linear:
        return linear_shape(linear[-1])[1]
    raise AdaptError(
        f"targets: cannot tell how wide the output of {name} ({type(module).__name__}) is; name "
        "the linear layer or normalisation itself"
    )


def group_name(name: str, granularity: str) -> str:
    """Which routing table a layer shares.

    finegrained: its own. blockwise: up to the first number of its path. layerwise: up to the last
    number (T5: a sub-layer; BERT: the same as blockwise). coderwise: up to the part with 'coder'
    in its name. coarsegrained: one for all.

    >>> group_name("encoder.block.3.layer.0.SelfAttention.q", "blockwise")
    'encoder.block.3'
    >>> group_name("encoder.block.3.layer.0.SelfAttention.q", "layerwise")
    'encoder.block.3.layer.0'
    """
    if granularity == "finegrained":
        return name
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    if granularity == "coderwise":
        found = [i for i, part in enumerate(parts) if "coder" in part.lower()]
        return ".".join(parts[: found[0] + 1]) if found else "all"
    if granularity == "coarsegrained" or not numbers:
        return "all"
    last = numbers[0] if granularity == "blockwise" else numbers[-1]
    return ".".join(parts[: last + 1])


def key_of(name: str) -> str:
    """A module's name as a key of `nn.ModuleDict`, which allows no dots."""
    return name.replace(".", "/")


def name_of(key: str) -> str:
    """Back from `key_of`."""
    return key.replace("/", ".")


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def _inside(name: str, tops: Sequence[str]) -> bool:
    return name.split(".", 1)[0] in tops


def _has_children(module: nn.Module) -> bool:
    return any(True for _ in module.children())


def _bypass(module: nn.Module) -> str | None:
    """Why a module's forward is never called, or None."""
    if type(module).__name__ == "NonDynamicallyQuantizableLinear":
        return (
            "nn.MultiheadAttention reads its weight without calling it, so an adapter there would "
            "do nothing"
        )
    return None


def check_alike(own: Mapping[str, int], other: Mapping[str, int], what: str) -> None:
    """`AdaptError` unless adapters stand at the same sites with the same width."""
    missing = sorted(set(own) ^ set(other))
    if missing:
        has = "lacks" if missing[0] in own else "also has"
        raise AdaptError(f"{what} {has} an adapter at {missing[0]}: its placement differs")
    for name, width in own.items():
        if other[name] != width:
            raise AdaptError(f"{what} is {other[name]} wide at {name}, the model is {width}")
