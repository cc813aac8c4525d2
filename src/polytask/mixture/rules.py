"""When a mixture ends: what groups must look like, and what a stopping rule means in slots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from polytask.errors import ConfigError, suggestion
from polytask.mixture.policies import Policy, Stop
from polytask.mixture.quota import Floats, Ints, Shares


def check_groups(
    names: tuple[str, ...], sizes: tuple[int | None, ...], policy: Policy, batch_size: int
) -> None:
    if not sizes or len(names) != len(sizes):
        raise ConfigError(f"a mixture needs groups: {len(names)} names, {len(sizes)} sizes")
    if batch_size < 1:
        raise ConfigError(f"batch_size = {batch_size}: should be at least 1")
    for name, size in zip(names, sizes):
        if size is not None and size < 1:
            raise ConfigError(f"'{name}' has no rows to train on")
    if policy.every_step and batch_size < len(sizes):
        raise ConfigError(
            f"all_tasks_per_step puts each of {len(sizes)} groups into every step, but batch_size "
            f"is {batch_size}; raise it, or choose 'uniform'"
        )


def stop_slots(
    stop: Stop, names: tuple[str, ...], lengths: Sequence[int | None], width: int
) -> Ints:
    """Slots after which each group stops, (groups,); -1 never."""
    limits = np.full(len(names), -1, dtype=np.int64)
    if not isinstance(stop, Mapping):
        return limits
    for name, epochs in stop.items():
        if name not in names:
            raise ConfigError(f"mixture.stop names '{name}'.{suggestion(name, names)}")
        length = lengths[names.index(name)]
        if not epochs > 0 or not np.isfinite(epochs):
            raise ConfigError(f"mixture.stop.{name} = {epochs}: should be epochs > 0")
        if length is None:
            raise ConfigError(
                f"mixture.stop: '{name}' is a stream of unknown length, so it has no epochs; state "
                "its rows in mixture.sizes"
            )
        limits[names.index(name)] = -(-max(1, round(epochs * length)) // width)
    return limits


def slots_to_end(
    rule: str,
    shares: Shares,
    weights: Floats,
    lengths: Sequence[int | None],
    width: int,
    names: tuple[str, ...],
) -> int:
    """Slots until one group would repeat a row, or until all have been gone through."""
    for name, length, weight in zip(names, lengths, weights):
        if length is None and weight > 0:
            raise ConfigError(
                f"mixture.stop '{rule}': '{name}' is a stream of unknown length; state its rows in "
                "mixture.sizes"
            )
    drawn = np.flatnonzero(weights > 0)
    known = np.array([length or 0 for length in lengths], dtype=np.int64)
    if rule == "first_exhausted":
        end = min(shares.slots_until(known // width, int(i)) for i in drawn)
        if end == 0:
            raise ConfigError(
                f"mixture.stop '{rule}' leaves no rows: a group is smaller than a step"
            )
        return end
    slots = -(-known // width)
    return max(-(-int(slots[i]) * shares.modulus // int(shares.rate[i])) for i in drawn)
