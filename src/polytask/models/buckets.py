"""Run a trunk over sequences of similar length together, so that short ones are not padded to the
longest of a mixed batch.

A table row has ten tokens and a text sixty; in one padded batch most of the work would be padding.
Rows do not see each other, so splitting a batch changes no result.

Legend: S sequences, L length, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from polytask.models.masks import MaskSpec

Lengths = npt.NDArray[np.int64]
Trunk = Callable[[Tensor, MaskSpec], Tensor]

# A further pass costs some dozens of kernel launches per layer: worth it from this many padding
# tokens on, and from this share of the batch. Accelerators need large batches to be busy at all.
_CPU = (128, 0.1)
_ACCELERATOR = (16_384, 0.25)


def plan_buckets(length: Lengths, least_gain: int, least_share: float) -> list[Lengths]:
    """Indices of the sequences of each bucket, every sequence once; often a single bucket.

    Splits at the length that saves the most padding, then each part again, while a split saves at
    least `least_gain` tokens and `least_share` of the padded batch.
    """
    order = np.argsort(length, kind="stable")
    least = max(least_gain, least_share * len(length) * int(length.max(initial=0)))
    return _split(order, length[order], least)


def _split(order: Lengths, ascending: Lengths, least: float) -> list[Lengths]:
    if len(order) < 2:
        return [order]
    short = np.arange(1, len(order))  # sequences in the first part
    saved = short * (ascending[-1] - ascending[:-1])
    best = int(saved.argmax())
    if saved[best] < least:
        return [order]
    cut = best + 1
    return _split(order[:cut], ascending[:cut], least) + _split(order[cut:], ascending[cut:], least)


def buckets_for(length: Lengths, device: torch.device) -> list[Lengths]:
    """The plan for a device."""
    return plan_buckets(length, *(_CPU if device.type == "cpu" else _ACCELERATOR))


def run_bucketed(
    trunk: Trunk,
    x_SLD: Tensor,
    mask: MaskSpec,
    length: Lengths,
    announce: Callable[[Tensor | None], None] | None = None,
    whole: bool = False,
) -> Tensor:
    """`trunk(x, mask)`, bucket by bucket; (S, L, D) with zeros beyond a bucket's length.

    `announce` is told before each pass which sequences it is for (None: all of them in order).
    `whole`: one pass, for layers that run again in the backward pass and count on being told what
    was told last.
    """
    plan = [np.arange(len(length))] if whole else buckets_for(length, x_SLD.device)
    if len(plan) == 1:
        if announce is not None:
            announce(None)
        return trunk(x_SLD, mask)
    width = x_SLD.shape[1]
    parts, places = [], []
    for chosen in plan:
        longest = int(length[chosen].max())
        index = torch.from_numpy(chosen).to(x_SLD.device)
        padded = bool((length[chosen] < longest).any())
        if announce is not None:
            announce(index)
        part = trunk(x_SLD.index_select(0, index)[:, :longest], select_rows(mask, index, padded))
        parts.append(part.flatten(0, 1))
        places.append((chosen[:, None] * width + np.arange(longest)).reshape(-1))
    flat = torch.cat(parts)
    place = torch.from_numpy(np.concatenate(places)).to(x_SLD.device)
    room = flat.new_zeros(x_SLD.shape[0] * width, flat.shape[1])
    return room.index_copy(0, place, flat).view(x_SLD.shape[0], width, -1)


def select_rows(mask: MaskSpec, index: Tensor, padded: bool) -> MaskSpec:
    """The mask of some rows, without segments; `padded` says whether lengths still matter."""
    if mask.segments is not None:
        raise ValueError("packed sequences are not split into buckets")
    rows: dict[str, Any] = {"length": None, "prefix": None}
    if padded and mask.length is not None:
        rows["length"] = mask.length[index]
    if mask.prefix is not None:
        rows["prefix"] = mask.prefix[index]
    return replace(mask, **rows)
