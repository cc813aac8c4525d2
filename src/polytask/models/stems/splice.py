"""Entries of all modalities to one padded batch of sequences, with one vectorised scatter.

A sequence is its images, then its series, table, features and text, then one summary token. The
summary stands last because there it sees everything under every mask: bidirectional, causal and
prefix; and causal text never sees it.

Legend: S sequences, L length, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from polytask.models.masks import MaskSpec
from polytask.models.stems.entries import Entries, HostArray


@dataclass(frozen=True)
class Layout:
    """Where everything stands. Host arrays, but for what the device needs."""

    sequences: int
    width: int  # L
    length: HostArray  # (S,) tokens of each sequence, the summary included
    start: dict[str, HostArray]  # modality -> (n,) place of each entry's first token
    sequence: dict[str, HostArray]  # modality -> (n,)
    count: dict[str, HostArray]  # modality -> (n,) real tokens of each entry
    place: HostArray = field(repr=False)  # flat place of every token; S * L for padding

    def entry(self, modality: str) -> HostArray:
        """(S,) index of each sequence's first entry of a modality; -1 where it has none."""
        found = np.full(self.sequences, -1)
        where = self.sequence.get(modality, np.zeros(0, np.int64))
        found[where[::-1]] = np.arange(len(where))[::-1]
        return found


def plan_layout(entries: Mapping[str, Entries], sequences: int, summary: bool = True) -> Layout:
    """Compute the places of all tokens; `entries` in the order they shall stand in a sequence."""
    width = {name: int(e.tokens.shape[1]) for name, e in entries.items()}
    counts = {name: _count(e, width[name]) for name, e in entries.items()}
    owner = np.concatenate([e.sequence for e in entries.values()] or [np.zeros(0, np.int64)])
    count = np.concatenate([*counts.values()] or [np.zeros(0, np.int64)])
    tail = int(summary)
    length = np.bincount(owner, count, sequences).astype(np.int64) + tail
    if not length.all():
        raise ValueError(f"sequence {int(np.argmin(length))} of the batch has no tokens")
    order = np.argsort(owner, kind="stable")
    before = np.cumsum(count[order]) - count[order]
    first = np.cumsum(length - tail) - (length - tail)  # tokens of all sequences before this one
    start = np.empty_like(count)
    start[order] = before - first[owner[order]]
    longest = int(length.max(initial=1))
    places, starts, at = [], {}, 0
    for name, e in entries.items():
        n = len(e.sequence)
        starts[name] = start[at : at + n]
        places.append(_places(e, width[name], starts[name], longest, sequences * longest))
        at += n
    if summary:
        places.append(np.arange(sequences) * longest + length - 1)
    return Layout(
        sequences=sequences,
        width=longest,
        length=length,
        start=starts,
        sequence={name: e.sequence for name, e in entries.items()},
        count=counts,
        place=np.concatenate(places),
    )


def _count(e: Entries, width: int) -> HostArray:
    if e.valid is not None:
        total: HostArray = e.valid.sum(1)
        return total
    return np.full(len(e.sequence), width) if e.count is None else e.count


def _places(e: Entries, width: int, start: HostArray, longest: int, nowhere: int) -> HostArray:
    step = np.arange(width)
    offset = (e.sequence * longest + start)[:, None]
    if e.valid is not None:
        return np.where(e.valid, offset + np.cumsum(e.valid, 1) - 1, nowhere).reshape(-1)
    place = offset + step
    if e.count is not None:
        place = np.where(step < e.count[:, None], place, nowhere)
    return place.reshape(-1)


def splice(entries: Mapping[str, Entries], layout: Layout, summary_SD: Tensor | None) -> Tensor:
    """(S, L, D) with zeros at padding. Padding tokens of the entries go to one spare place."""
    parts = [e.tokens.flatten(0, 1) for e in entries.values()]
    if summary_SD is not None:
        parts.append(summary_SD)
    dtype = parts[0].dtype
    for part in parts[1:]:
        dtype = torch.promote_types(dtype, part.dtype)
    flat = torch.cat([part.to(dtype) for part in parts])
    place = torch.from_numpy(layout.place).to(flat.device, non_blocking=True)
    room = flat.new_zeros(layout.sequences * layout.width + 1, flat.shape[1])
    return room.index_copy(0, place, flat)[:-1].view(layout.sequences, layout.width, -1)


def mask_of(layout: Layout, prefix: HostArray | None, device: torch.device) -> MaskSpec:
    """The mask of a batch. `prefix` (n,) is text.prefix; None: no text.

    A text whose prefix is its length is bidirectional, as are sequences without text. Otherwise
    what precedes the text and the first `prefix` tokens of it are seen by all, the rest causally.
    """
    length = layout.length
    padded = None if (length == layout.width).all() else torch.from_numpy(length).to(device)
    if prefix is None:
        return MaskSpec(length=padded)
    whole = prefix >= layout.count["text"]
    if whole.all():
        return MaskSpec(length=padded)
    seen = length.copy()
    causal = ~whole
    owner = layout.sequence["text"][causal]
    np.minimum.at(seen, owner, (layout.start["text"] + prefix)[causal])
    if not seen.any():
        return MaskSpec(causal=True, length=padded)
    return MaskSpec(causal=True, length=padded, prefix=torch.from_numpy(seen).to(device))
