"""Models whose tokenizers differ: rows of embeddings and output layers aligned by token string.

Row 317 of two embeddings means one thing only if both tokenizers call the same string 317. Where
they do not, rows are put in the order of one vocabulary (the base's, a named model's, or the union)
before anything is merged. A row that a model lacks is the base's, so that its task vector is zero
there; where the base lacks it too, it is the mean of the models that have it, for every model, so
that no method changes it.

Tensors of the vocabulary are found without a list of architectures: they lie outside numbered
layers, and their first dimension is the vocabulary of the model's config.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polytask.errors import MergeError
from polytask.merge.headers import TensorHeader
from polytask.merge.recipe import layer_of
from polytask.merge.sources import TensorSource, config_of

Tokens = Mapping[str, int]


def tokens_of(folder: Path | None) -> dict[str, int] | None:
    """Token string -> row, from a folder's tokenizer files; None when there are none."""
    if folder is None:
        return None
    try:
        if (folder / "tokenizer.json").is_file():
            from tokenizers import Tokenizer

            return dict(Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab(True))
        added = _json(folder / "added_tokens.json")
        if (folder / "vocab.json").is_file():
            return {**_json(folder / "vocab.json"), **added}
        if (folder / "vocab.txt").is_file():
            lines = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
            return {**{t: i for i, t in enumerate(lines) if t or i < len(lines) - 1}, **added}
    except Exception as error:  # the tokenizers package raises plain exceptions
        raise MergeError(f"the tokenizer in {folder} cannot be read: {error}") from error
    return None


def added_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Tokens that were added to a tokenizer as whole strings, with their properties."""
    entries = _json(folder / "tokenizer.json").get("added_tokens") or []
    return {str(entry["content"]): dict(entry) for entry in entries}


def vocabulary_size(source: TensorSource) -> int | None:
    """Rows of the embedding by config.json; None where that does not say."""
    config = config_of(source.folder)
    found = config.get("vocab_size")
    if found is None:
        nested = config.get("text_config")
        found = nested.get("vocab_size") if isinstance(nested, Mapping) else None
    return found if isinstance(found, int) else None


@dataclass(frozen=True)
class Difference:
    """How a tokenizer differs from another one."""

    moved: tuple[str, ...]  # tokens of both with another row
    missing: tuple[str, ...]  # only in the other
    added: tuple[str, ...]  # only in this one
    clashing: int = 0  # of the added, those on a row that the other uses for another token

    @property
    def harmful(self) -> bool:
        """Whether one row stands for different tokens."""
        return bool(self.moved or self.clashing)

    def __bool__(self) -> bool:
        return bool(self.moved or self.missing or self.added)

    def __str__(self) -> str:
        parts = (("have another row", self.moved), ("are missing", self.missing))
        told = [*parts, ("are additional", self.added)]
        return ", ".join(
            f"{len(tokens):,} tokens {what} (such as {tokens[0]!r})"
            for what, tokens in told
            if tokens
        )


def difference(tokens: Tokens, other: Tokens) -> Difference:
    """What sets `tokens` apart from `other`."""
    used = set(other.values())
    added = tuple(t for t in tokens if t not in other)
    return Difference(
        tuple(t for t, row in tokens.items() if t in other and other[t] != row),
        tuple(t for t in other if t not in tokens),
        added,
        sum(tokens[t] in used for t in added),
    )


@dataclass(frozen=True)
class Alignment:
    """One vocabulary for all models.

    Attributes:
        size: rows of the result.
        rows: for each model, (size,) its row for each row of the result, -1 where it has none.
        tensors: names (in the frame) of the tensors with a row for each token.
        added: tokens that the base's tokenizer is given, with their rows (union only).
        tokenizer: number of the model whose tokenizer the result has.
        report: what was done, for people.
    """

    size: int
    rows: tuple[Tensor, ...]
    tensors: tuple[str, ...]
    added: Mapping[str, int] = field(default_factory=dict)
    tokenizer: int = 0
    report: tuple[str, ...] = ()


def check_equal(sources: Sequence[TensorSource], frame: int) -> list[str]:
    """Notes on tokenizers that differ without harm; `MergeError` where rows mean other tokens."""
    wanted = tokens_of(sources[frame].folder)
    notes: list[str] = []
    if wanted is None:
        return notes
    for source in sources:
        tokens = None if source is sources[frame] else tokens_of(source.folder)
        found = difference(tokens, wanted) if tokens is not None else None
        if not found:
            continue
        if found.harmful:
            raise MergeError(
                f"{source.name}: its tokenizer differs from that of {sources[frame].name}: {found}."
                " Say how to align them: 'vocabulary: base' or 'vocabulary: union'"
            )
        notes.append(f"{source.name}: its tokenizer differs without harm: {found}")
    return notes


def align(sources: Sequence[TensorSource], frame: int, target: int | None) -> Alignment:
    """Put all vocabularies in the order of model `target`, or (None) of the union.

    Raises:
        MergeError: a model without tokenizer or vocabulary size, or a union that no tokenizer can
            express.
    """
    vocabularies, sizes = [], []
    for source in sources:
        tokens, size = tokens_of(source.folder), vocabulary_size(source)
        if tokens is None or size is None:
            lack = "tokenizer.json" if tokens is None else "'vocab_size' in config.json"
            raise MergeError(f"{source.name}: vocabularies cannot be aligned without its {lack}")
        vocabularies.append(tokens)
        sizes.append(size)
    owner = frame if target is None else target
    added = _union(sources, vocabularies, owner) if target is None else {}
    wanted = {**vocabularies[owner], **added}
    size = max(sizes[owner], 1 + max(wanted.values()))
    rows, report = [], []
    for number, (source, tokens) in enumerate(zip(sources, vocabularies, strict=True)):
        place = torch.full((size,), -1, dtype=torch.int64)
        if number == owner:
            place[: sizes[owner]] = torch.arange(sizes[owner])
            for row in added.values():
                place[row] = -1
        else:
            shared = [(row, tokens[t]) for t, row in wanted.items() if t in tokens]
            pairs = torch.tensor([(a, b) for a, b in shared if b < sizes[number]])
            if len(pairs):
                place[pairs[:, 0]] = pairs[:, 1]
        rows.append(place)
        lost = [t for t in tokens if t not in wanted]
        lacks = sum(t not in tokens for t in wanted)
        moved = sum(t in tokens and tokens[t] != row for t, row in wanted.items())
        report.append(
            f"{source.name}: {moved:,} of {len(wanted):,} tokens have another row, {lacks:,} are "
            f"taken from elsewhere, {len(lost):,} are given up"
            + (f" (such as {lost[0]!r})" if lost else "")
        )
    tensors = _tensors(sources[frame], sizes[frame])
    return Alignment(size, tuple(rows), tensors, added, owner, tuple(report))


def _union(
    sources: Sequence[TensorSource], vocabularies: Sequence[Tokens], owner: int
) -> dict[str, int]:
    """Rows of the tokens that the owner's tokenizer lacks: those added to others as whole strings.

    Pieces of another model's own vocabulary cannot be had: no tokenizer cuts text both ways.
    """
    folder = sources[owner].folder
    assert folder is not None
    if not (folder / "tokenizer.json").is_file():
        raise MergeError(f"{sources[owner].name}: a union needs its tokenizer.json")
    found: dict[str, int] = {}
    following = 1 + max(vocabularies[owner].values())
    for source, tokens in zip(sources, vocabularies, strict=True):
        new = [t for t in sorted(tokens, key=tokens.__getitem__) if t not in vocabularies[owner]]
        whole = added_of(source.folder) if source.folder is not None else {}
        pieces = [t for t in new if t not in whole]
        if pieces:
            raise MergeError(
                f"{source.name}: {len(pieces):,} tokens of its own vocabulary (such as "
                f"{pieces[0]!r}) are not in that of {sources[owner].name}; no tokenizer can cut "
                "text into both. Use 'vocabulary: base' or name the model whose tokenizer stays"
            )
        for token in new:
            if token not in found:
                found[token] = following
                following += 1
    return found


def _tensors(frame: TensorSource, size: int) -> tuple[str, ...]:
    found = tuple(
        name
        for name, header in frame.headers.items()
        if header.shape[:1] == (size,) and layer_of(name) is None
    )
    if not found:
        raise MergeError(
            f"{frame.name}: no tensor outside its layers has {size:,} rows, the vocabulary of its "
            "config.json"
        )
    return found


class AlignedSource:
    """A model with the rows of its vocabulary's tensors in the order of an `Alignment`."""

    def __init__(
        self,
        number: int,
        alignment: Alignment,
        sources: Sequence[TensorSource],
        keys: Sequence[Mapping[str, str]],
        base: int | None,
    ) -> None:
        """`keys`: for each model, name in the frame -> its own name."""
        self.inner = sources[number]
        self.name = self.inner.name
        self.folder = self.inner.folder
        self._rows = alignment.rows
        self._number = number
        self._sources = sources
        self._base = base
        self._keys = {keys[number][t]: t for t in alignment.tensors if t in keys[number]}
        self._others = keys
        self.headers = {
            key: TensorHeader((alignment.size, *h.shape[1:]), h.dtype, ("aligned", key))
            if key in self._keys
            else h
            for key, h in self.inner.headers.items()
        }

    def read_into(self, key: str, out: Tensor, start: int = 0) -> None:
        if key not in self._keys:
            self.inner.read_into(key, out, start)
            return
        header = self.headers[key]
        width = header.count // header.shape[0]
        first, last = start // width, -(-(start + out.numel()) // width)
        if start == first * width and out.numel() == (last - first) * width:
            self._fill(key, out.view(-1, width), first)
            return
        whole = torch.empty((last - first, width), dtype=out.dtype)
        self._fill(key, whole, first)
        begin = start - first * width
        out.copy_(whole.view(-1)[begin : begin + out.numel()])

    def _fill(self, key: str, out: Tensor, first: int) -> None:
        """Rows first ... of the result: runs of neighbours are read at once."""
        width = out.shape[1]
        place = self._rows[self._number][first : first + len(out)]
        steps = torch.diff(place, prepend=place[:1] - 2)
        starts = torch.nonzero((steps != 1) | (place < 0)).flatten().tolist()
        for begin, end in zip(starts, [*starts[1:], len(out)], strict=True):
            row = int(place[begin])
            if row < 0:
                self._replace(key, out[begin], first + begin)
            else:
                self.inner.read_into(key, out[begin:end].view(-1), row * width)

    def _replace(self, key: str, out: Tensor, row: int) -> None:
        """A row that this model lacks; zero where nobody has it (padding)."""
        name = self._keys[key]
        having = [n for n, rows in enumerate(self._rows) if rows[row] >= 0]
        if self._base in having:
            having = [n for n in having if n == self._base]
        total = torch.zeros(out.numel(), dtype=torch.float32)
        one = torch.empty_like(total)
        for n in having:
            source_row = int(self._rows[n][row])
            self._sources[n].read_into(self._others[n][name], one, source_row * out.numel())
            total.add_(one)
        out.copy_(total.div_(max(1, len(having))))


def extend_tokenizer(folder: Path, alignment: Alignment, sources: Sequence[TensorSource]) -> None:
    """Give the tokenizer.json in `folder` (a copy of the owner's) the added tokens."""
    if not alignment.added:
        return
    properties: dict[str, dict[str, Any]] = {}
    for source in sources:
        if source.folder is not None:
            properties = {**added_of(source.folder), **properties}
    path = folder / "tokenizer.json"
    content = _json(path)
    for token, row in alignment.added.items():
        content.setdefault("added_tokens", []).append({**properties[token], "id": row})
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")
    settings = folder / "tokenizer_config.json"
    found = _json(settings)
    if isinstance(found.get("added_tokens_decoder"), dict):
        for token, row in alignment.added.items():
            entry = {k: v for k, v in properties[token].items() if k != "id"}
            found["added_tokens_decoder"][str(row)] = entry
        settings.write_text(json.dumps(found, ensure_ascii=False, indent=2), encoding="utf-8")
    if tokens_of(folder) != {
        **(tokens_of(sources[alignment.tokenizer].folder) or {}),
        **(alignment.added),
    }:
        raise MergeError(f"the tokens of the other models cannot be added to {path}")


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else {}
