"""Texts that fit: encode documents made of templates, shortening only what stands in slots.

A document is one or two segments (question and candidate, premise and hypothesis); they share the
room. Documents that fit are encoded in one pass; the others are shortened slot by slot, longest
first, and encoded again until they fit, because cutting a text can change how its end is split.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from polytask.errors import DataError
from polytask.tasks.codec import TextCodec
from polytask.tasks.templates import Template, shares

# Cutting here first keeps a megabyte of text from being tokenised for the sake of its first line.
# Where it turns out that more characters would have fitted, more are taken.
CHARACTERS_PER_TOKEN = 8


@dataclass(frozen=True, slots=True)
class Segment:
    """A template with what stands in its slots; `fixed` contents are never shortened."""

    template: Template
    contents: Sequence[str]
    fixed: bool = False

    @property
    def text(self) -> str:
        return self.template.fill(self.contents)


Document = Sequence[Segment]


def encode_documents(
    codec: TextCodec, documents: Sequence[Document], room: int, where: Callable[[int], str]
) -> list[list[list[int]]]:
    """Ids per document and segment, at most `room` ids a document (special tokens not counted).

    Raises `DataError` with `where(document)` when the words that must stay need more than `room`.
    """
    result: list[list[list[int]]] = [[] for _ in documents]
    waiting, limit = list(range(len(documents))), max(room, 1) * CHARACTERS_PER_TOKEN
    while waiting:
        clipped = [_clip(documents[i], limit) for i in waiting]
        fitted = _fit(codec, clipped, room, waiting, where)
        again = []
        for i, start, (document, parts) in zip(waiting, clipped, fitted, strict=True):
            result[i] = parts
            if start is not documents[i] and _could_hold_more(start, document, limit):
                again.append(i)
        waiting, limit = again, limit * 4
    return result


def _fit(
    codec: TextCodec,
    documents: Sequence[Document],
    room: int,
    numbers: Sequence[int],
    where: Callable[[int], str],
) -> list[tuple[Document, list[list[int]]]]:
    """Documents that fit, with their ids, per segment."""
    flat = iter(codec.encode([segment.text for document in documents for segment in document]))
    result = [(document, [next(flat) for _ in document]) for document in documents]
    over = [k for k, (_, parts) in enumerate(result) if _length(parts) > room]
    while over:
        shortened = _shorten(
            codec, [result[k][0] for k in over], room, [where(numbers[k]) for k in over]
        )
        for k, fitted in zip(over, shortened, strict=True):
            result[k] = fitted
        over = [k for k in over if _length(result[k][1]) > room]
    return result


def _length(parts: Sequence[Sequence[int]]) -> int:
    return sum(len(part) for part in parts)


def _clip(document: Document, limit: int) -> Document:
    """The document itself, or one whose slots hold at most `limit` characters."""
    long = [not s.fixed and any(len(c) > limit for c in s.contents) for s in document]
    if not any(long):
        return document
    return [
        Segment(s.template, [content[:limit] for content in s.contents]) if cut else s
        for s, cut in zip(document, long, strict=True)
    ]


def _could_hold_more(clipped: Document, fitted: Document, limit: int) -> bool:
    """Whether a slot was clipped before encoding and then not shortened any further."""
    return any(
        len(kept) == limit
        for before, after in zip(clipped, fitted, strict=True)
        if not before.fixed
        for kept in after.contents
    )


def _shorten(
    codec: TextCodec, documents: Sequence[Document], room: int, places: Sequence[str]
) -> list[tuple[Document, list[list[int]]]]:
    """One round: cut the slots of every document by as much as it is over, encode again."""
    encoded = iter(codec.encode_offsets([s.text for document in documents for s in document]))
    shorter = [
        _cut(document, [next(encoded) for _ in document], room, place)
        for document, place in zip(documents, places, strict=True)
    ]
    ids = iter(codec.encode([s.text for document in shorter for s in document]))
    return [(document, [next(ids) for _ in document]) for document in shorter]


Offsets = list[tuple[int, int]]


def _cut(
    document: Sequence[Segment], parts: Sequence[tuple[list[int], Offsets]], room: int, place: str
) -> list[Segment]:
    slots: list[tuple[int, int, Offsets]] = []  # segment, slot, offsets within its content
    for number, (segment, (_, offsets)) in enumerate(zip(document, parts, strict=True)):
        if segment.fixed:
            continue
        for slot, (start, end) in enumerate(segment.template.spans(segment.contents)):
            # A token belongs to the slot that its last character stands in: byte-level tokens
            # begin with the space before a word, which may be the template's.
            inside = [(max(a, start) - start, b - start) for a, b in offsets if start < b <= end]
            slots.append((number, slot, inside))
    lengths = [len(inside) for _, _, inside in slots]
    total = sum(len(ids) for ids, _ in parts)
    if not any(document[n].contents[s] for n, s, _ in slots):
        raise DataError(
            f"{place}: the words that must stay (template and label) need {total} tokens and "
            f"there is room for {room}. Shorten them or raise text_length."
        )
    kept = shares(lengths, room - (total - sum(lengths)))
    contents = [list(segment.contents) for segment in document]
    for (number, slot, inside), keep in zip(slots, kept, strict=True):
        if keep < len(inside) or keep == 0:
            contents[number][slot] = contents[number][slot][: _boundary(inside, keep)]
    return [
        Segment(segment.template, content, segment.fixed)
        for segment, content in zip(document, contents, strict=True)
    ]


def _boundary(offsets: Offsets, keep: int) -> int:
    """The character after at most `keep` tokens that is no token's inside."""
    while keep > 0 and keep < len(offsets) and offsets[keep][0] < offsets[keep - 1][1]:
        keep -= 1
    return offsets[keep - 1][1] if keep > 0 else 0
