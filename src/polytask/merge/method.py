"""What a merging method is: a frozen configuration with a pure function over one tensor at a time.

A method sees the K models' versions of one tensor, stacked, never whole models: that is what lets
an engine stream models that do not fit in memory. Methods that need something global (the 80th
percentile of all magnitudes) ask for passes over the tensors first; what a pass gathers are counts,
minima and maxima, which come out the same in any order and from any chunks, so that a streamed
merge equals the one in memory bit for bit.

    for number in range(len(method.passes)):          # none for tensor-local methods
        total = None
        for every tensor (or chunk):                  # any order, any number of threads
            part = method.measure(number, models, base, where, state)
            total = part if total is None else method.combine(number, total, part)
        state = method.finish(number, total, state, names)
    for every tensor (or chunk, if method.elementwise):
        merged = method.merge(models, base, where, state, extra)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from polytask.configs import Config, parse
from polytask.errors import ConfigError, MergeError, suggestion
from polytask.merge.vectors import (
    StateDict,
    check_alike,
    check_finite,
    default_names,
    merge_keys,
    tied_names,
    work_dtype,
)
from polytask.registry import Registry

Finite = Annotated[float, Field(allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Weights = Finite | tuple[Finite, ...]  # one for all models, or one each
Fractions = Fraction | tuple[Fraction, ...]
State = Mapping[str, Any]  # what finished passes found; empty at first
M = TypeVar("M", bound="Method")


@dataclass(frozen=True)
class TensorInfo:
    """Which tensor, or which piece of one, a method is looking at.

    Attributes:
        name: the tensor's name.
        models: names of the K models; random masks are functions of (seed, model, tensor, place),
            so give models names that stay the same when their folders move.
        seed: of the random masks.
        offset: first element, counted in the flattened tensor, when this is a chunk.
    """

    name: str
    models: tuple[str, ...]
    seed: int = 0
    offset: int = 0


class Method(Config):
    """Base of all methods: a subclass has parameters as fields and implements `merge`.

    Attributes of the class:
        title: the method's name as people write it.
        base: whether a base is 'needed', 'used' where one is given, or 'ignored'.
        models: fewest and most models (None: any number), without the base.
        per_model: fields that hold one value for all models or one for each.
        extra: the statistic by tensor name that every model brings ('fisher', 'gram'), or None.
    """

    title: ClassVar[str]
    base: ClassVar[Literal["needed", "used", "ignored"]] = "needed"
    models: ClassVar[tuple[int, int | None]] = (1, None)
    per_model: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str | None] = None

    @property
    def needs_base(self) -> bool:
        return self.base == "needed"

    @property
    def passes(self) -> tuple[str, ...]:
        """What each pass over all tensors before the merge looks for, in words; () if none."""
        return ()

    @property
    def elementwise(self) -> bool:
        """Whether `merge` may be given flat chunks of a tensor instead of the whole."""
        return False

    @property
    def local(self) -> frozenset[str]:
        """Parameters that may differ from tensor to tensor (see `at`)."""
        return frozenset(type(self).model_fields)

    def at(self: M, **params: Any) -> M:
        """The same method with other parameters for one tensor; `ConfigError` if not allowed."""
        if not params:
            return self
        for key in params:
            if key not in self.local:
                known = key in type(self).model_fields
                reason = (
                    "must be the same for all tensors" if known else "is not one of its parameters"
                )
                raise ConfigError(
                    f"{self.title}: '{key}' {reason}.{suggestion(key, sorted(self.local))}"
                )
        return parse(type(self), {**self.model_dump(), **params}, self.title)

    def values(self, field: str, count: int) -> tuple[float, ...]:
        """A per-model field spelt out for `count` models."""
        value = getattr(self, field)
        if not isinstance(value, tuple):
            return (float(value),) * count
        if len(value) != count:
            raise ConfigError(
                f"{self.title}: '{field}' has {len(value)} values for {count} models; give one "
                "value for all or one for each"
            )
        return tuple(float(v) for v in value)

    def check(self, count: int, has_base: bool) -> None:
        """Refuse a number of models, a missing base or lists that cannot work, before any work."""
        fewest, most = self.models
        if count < fewest or (most is not None and count > most):
            wanted = f"{fewest}" if most == fewest else f"{fewest} or more"
            if most is not None and most != fewest:
                wanted = f"{fewest} to {most}"
            raise MergeError(f"{self.title} merges {wanted} models, got {count}")
        if self.needs_base and not has_base:
            raise MergeError(
                f"{self.title} works on what training added to a base: name the base model"
            )
        for field in self.per_model:
            self.values(field, count)

    def identity(self: M, count: int) -> M | None:
        """This method with the parameters under which `count` equal models give that model back.

        None if there are none, because contracting is what the method does. By default lists are
        cut to `count` and everything else stays; a method whose weights need not add up to one, or
        that drops entries, returns a form that does not. See `polytask.merge.identity`.
        """
        cut = {
            key: (getattr(self, key) * count)[:count]
            for key in self.per_model
            if isinstance(getattr(self, key), tuple)
        }
        return self.model_copy(update=cut)

    def measure(
        self, number: int, models: Tensor, base: Tensor | None, where: TensorInfo, state: State
    ) -> Any:
        """Statistics of one tensor or chunk in pass `number`; `models` may be overwritten."""
        raise NotImplementedError(f"{self.title} has no pass {number}")

    def combine(self, number: int, one: Any, other: Any) -> Any:
        """Statistics of both parts; associative and commutative, may reuse `one`'s memory."""
        raise NotImplementedError(f"{self.title} has no pass {number}")

    def finish(self, number: int, total: Any, state: State, names: Sequence[str]) -> State:
        """State after pass `number`; `names` are the models', for messages."""
        raise NotImplementedError(f"{self.title} has no pass {number}")

    def merge(
        self,
        models: Tensor,
        base: Tensor | None,
        where: TensorInfo,
        state: State,
        extra: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Merge one tensor.

        Args:
            models: (K, *shape) float32 or float64. Scratch: it may be overwritten.
            base: (*shape) of the same type, or None. Never written to.
            where: the tensor's name and the models'.
            state: from `finish` of the last pass.
            extra: K tensors, the models' statistics for this tensor, for methods with `extra`;
                None when there are none for it.

        Returns:
            (*shape) of the type of `models`.
        """
        raise NotImplementedError


METHODS: Registry[type[Method]] = Registry("merging method")


def make_method(name: str, params: Mapping[str, Any], where: str = "merge") -> Method:
    """The method called `name` with checked parameters; `ConfigError` names the nearest valid."""
    return parse(METHODS.get(name), params, f"{where}: {name}")


def column(values: Sequence[float], models: Tensor) -> Tensor:
    """(K, 1, ...) of the type of `models` (K, *shape), to multiply it with."""
    made = torch.tensor(values, dtype=models.dtype, device=models.device)
    return made.view(-1, *(1,) * (models.dim() - 1))


def required(base: Tensor | None) -> Tensor:
    """The base, for methods whose `check` has made sure that there is one."""
    if base is None:
        raise MergeError("this method works on task vectors: it needs a base model")
    return base


def weighted_sum(models: Tensor, values: Sequence[float]) -> Tensor:
    """sum_k values_k models_k, added up in the order of the models, in the memory of the first.

    Products are rounded before they are added, so that an element's result does not depend on
    where in a tensor or chunk it stands (fused instructions are used for some places only).
    """
    total = models[0].mul_(values[0])
    for model, value in zip(models[1:], values[1:], strict=True):
        total.add_(model if value == 1 else model.mul_(value))
    return total


def merge_state_dicts(
    method: str | Method,
    experts: Sequence[StateDict],
    base: StateDict | None = None,
    *,
    names: Sequence[str] | None = None,
    keys: Sequence[str] | None = None,
    extras: Sequence[StateDict] | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    **params: Any,
) -> dict[str, Tensor]:
    """Merge state dicts that are in memory.

    Args:
        method: a name from `METHODS` with its parameters in `params`, or a `Method`.
        experts: K state dicts with equal names and shapes.
        base: what they were trained from, for methods that need it.
        names: of the experts, for messages and random masks.
        keys: tensors to merge; the others are the base's (without a base: the first expert's).
            Default: all floating-point ones. Leave out buffers that must not be averaged.
        extras: for each expert a mapping of tensor name to statistic (Fisher, RegMean).
        seed: of random masks.
        dtype: of the merged tensors; default: the base's (without a base: the first expert's).

    Returns:
        A new state dict with every name of the base; tied names share one tensor.

    Raises:
        ConfigError: unknown method, parameter or value.
        MergeError: unlike models, NaN or infinity (model and tensor named), too few models, or a
            result that does not fit into `dtype`.
    """
    if isinstance(method, str):
        method = make_method(method, params)
    elif params:
        raise ConfigError("parameters go into the method when it is not given by name")
    names = default_names(len(experts)) if names is None else tuple(names)
    method.check(len(experts), base is not None)
    frame = experts[0] if base is None else base
    check_alike(frame, experts, names)
    if extras is not None and len(extras) != len(experts):
        raise MergeError(f"{len(extras)} sets of statistics for {len(experts)} experts")
    if method.extra is not None and extras is None:
        raise MergeError(f"{method.title} needs a '{method.extra}' statistic of every expert")
    chosen = merge_keys(frame) if keys is None else _known(keys, frame)
    tensors = _InMemory(experts, base, names, seed)
    state: State = {}
    for number in range(len(method.passes)):
        total: Any = None
        for key in chosen:
            part = method.measure(number, *tensors.read(key), tensors.info(key), state)
            total = part if total is None else method.combine(number, total, part)
        state = method.finish(number, total, state, names)
    merged = dict(frame)
    for key in chosen:
        extra = None
        if extras is not None and all(key in each for each in extras):
            extra = [each[key] for each in extras]
        result = method.merge(*tensors.read(key), tensors.info(key), state, extra)
        merged[key] = cast(result, dtype or frame[key].dtype, key)
    for key, first in tied_names(frame).items():
        merged[key] = merged[first]
    return merged


def cast(result: Tensor, dtype: torch.dtype, key: str) -> Tensor:
    """`result` as `dtype`; `MergeError` naming the tensor when a value does not fit into it."""
    made = result.to(dtype)
    if not bool(torch.isfinite(made).all()):
        raise MergeError(
            f"merged tensor '{key}' does not fit into {dtype}: use smaller weights or a wider type"
        )
    return made


@dataclass(frozen=True)
class _InMemory:
    experts: Sequence[StateDict]
    base: StateDict | None
    names: tuple[str, ...]
    seed: int

    def read(self, key: str) -> tuple[Tensor, Tensor | None]:
        first = self.experts[0][key] if self.base is None else self.base[key]
        dtype = work_dtype(first.dtype)
        base = None
        if self.base is not None:
            base = self.base[key].detach().to(dtype)
            check_finite(base, key, "the base")
        models = torch.empty((len(self.experts), *first.shape), dtype=dtype, device=first.device)
        for row, expert, name in zip(models, self.experts, self.names, strict=True):
            row.copy_(expert[key].detach())
            check_finite(row, key, name)
        return models, base

    def info(self, key: str) -> TensorInfo:
        return TensorInfo(key, self.names, self.seed)


def _known(keys: Sequence[str], frame: StateDict) -> tuple[str, ...]:
    for key in keys:
        if key not in frame:
            raise MergeError(f"no tensor '{key}' to merge.{suggestion(key, frame)}")
        if not frame[key].is_floating_point():
            raise MergeError(f"tensor '{key}' holds {frame[key].dtype}, which cannot be merged")
    return tuple(sorted(set(keys)))
