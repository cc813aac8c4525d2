"""Does a method, as configured, do what no merge may fail at? Asked before anything is written.

Equal models merged must give that model, and one expert at weight 1 must give that expert; a
method that cannot do this on a few hundred random numbers would silently spoil billions. Where
dropping entries is what a method does, the identity is asked of its form without dropping, and the
configured form must not move any coordinate against the expert's change.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from polytask import rng
from polytask.errors import MergeError
from polytask.merge.method import Method, merge_state_dicts

TOLERANCE = 1e-5  # of the largest weight; float32 sums of differences are good to a few 1e-7
SHAPES = {"bias": (17,), "scale": (), "weight": (12, 9)}


@dataclass(frozen=True)
class Identity:
    """What was checked.

    Attributes:
        copies: largest difference from the model when `count` copies of it are merged, relative to
            the largest weight; None for methods that contract by design.
        single: the same for one expert at weight 1; None for methods that need more models.
        kept: fraction of the expert's changes that the configured method passes on.
        text: the findings in one sentence.
    """

    copies: float | None
    single: float | None
    kept: float
    text: str


def check_identity(method: Method, count: int, has_base: bool = True, seed: int = 0) -> Identity:
    """Try `method` for `count` models on random tensors (a matrix, a vector, a scalar).

    Args:
        method: as configured for the whole merge or for one tensor.
        count: models that it is going to merge.
        has_base: whether there will be a base.
        seed: of the tensors and of random masks.

    Raises:
        MergeError: names the method and how far off it is. ConfigError: parameters do not fit.
    """
    method.check(count, has_base)
    source = rng.torch_generator(seed, "identity")
    base = {name: torch.randn(shape, generator=source) for name, shape in SHAPES.items()}
    expert = {
        name: value + 0.1 * torch.randn(value.shape, generator=source)
        for name, value in base.items()
    }
    origin = base if has_base and method.base != "ignored" else None

    def merged(form: Method, models: int) -> dict[str, Tensor]:
        return merge_state_dicts(
            form, [expert] * models, origin, extras=_extras(method, models, source), seed=seed
        )

    errors: dict[int, float | None] = {}
    for models in sorted({count, 1}, reverse=True):
        form = method.identity(models)
        if form is None or models < method.models[0]:
            errors[models] = None
            continue
        found = merged(form, models)
        errors[models] = error = _difference(found, expert)
        if not error <= TOLERANCE:
            what = "one expert at weight 1" if models == 1 else f"{models} copies of one model"
            raise MergeError(
                f"{method.title}: {what} should give that model, but differ from it by "
                f"{error:.1e} of its largest weight; nothing was written"
            )
    kept = 1.0
    if origin is not None and method.identity(count) != method:
        kept = _kept(merged(method, count), origin, expert, method)
    return Identity(errors[count], errors[1], kept, _sentence(errors[count], kept))


def _extras(method: Method, count: int, source: torch.Generator) -> list[dict[str, Tensor]] | None:
    if method.extra is None:
        return None
    made = []
    for _ in range(count):
        if method.extra == "gram":
            width = SHAPES["weight"][0 if getattr(method, "inputs", "last") == "first" else -1]
            inputs = torch.randn(40, width, generator=source)
            made.append({"weight": inputs.T @ inputs})
        else:
            made.append({n: torch.rand(shape, generator=source) for n, shape in SHAPES.items()})
    return made


def _difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    largest = max(float(value.abs().max()) for value in wanted.values())
    return max(float((found[n] - wanted[n]).abs().max()) for n in wanted) / largest


def _kept(
    found: dict[str, Tensor], base: dict[str, Tensor], expert: dict[str, Tensor], method: Method
) -> float:
    weights = getattr(method, "weight", 1.0)
    if min(weights if isinstance(weights, tuple) else (weights,)) < 0:
        return 1.0  # turning changes around is what negative weights are for
    if getattr(method, "scale", 1.0) < 0:
        return 1.0
    moved = torch.cat([(found[n] - base[n]).flatten() for n in base])
    change = torch.cat([(expert[n] - base[n]).flatten() for n in base])
    against = moved * change.sign() < -TOLERANCE * float(change.abs().max())
    if bool(against.any()):
        raise MergeError(
            f"{method.title}: merging copies of one model moves {int(against.sum())} of "
            f"{change.numel()} weights against that model's change; nothing was written"
        )
    return float((moved != 0).double().mean())


def _sentence(copies: float | None, kept: float) -> str:
    said = "contracts by design, so that copies of a model do not give the model"
    if copies is not None:
        said = f"copies of a model give the model (largest relative difference {copies:.0e})"
    return said if kept == 1 else f"{said}; as configured {kept:.0%} of a model's changes stay"
