"""Six kinds of real text that every machine with polytask has, character by character.

    manual   the language reference that Python carries for its `help()` (English prose)
    python   the modules of the standard library
    cpp      the C++ headers of torch (core and the public interface)
    cython   sources of scikit-learn in Cython
    cmake    build files of torch
    fonts    metrics of the fonts of matplotlib (tables of numbers and names)

The first three are `KNOWN` to the models that a proof calls generalists, the others are `NEW`.
One vocabulary: a padding id, newline and the 95 printable ASCII characters; anything else is '?'.
Files (of manual and cmake, blocks without repeated paragraphs) are split once for all; runs of four
lines that stand in training text too are taken out of the other parts. Documents are windows
of a part, or change their domain every so often.
"""

from __future__ import annotations

import importlib.util
import sysconfig
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from polytask import rng
from polytask.data.embedded.splits import split_of
from polytask.errors import DataError

Ids = npt.NDArray[np.uint8]

KNOWN = ("manual", "python", "cpp")
NEW = ("cython", "cmake", "fonts")
DOMAINS = (*KNOWN, *NEW)
PARTS = ("train", "valid", "test")
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
PAD = 0  # id of no character: what a text opens with where nothing stands before it
TOKENS: tuple[str, ...] = ("[PAD]", *CHARACTERS)
_COPIED = 4  # lines in a row that make a copy
_BLOCK = 4000  # characters that stay together
_TABLE = np.full(256, TOKENS.index("?"), np.uint8)
_TABLE[[ord(c) for c in CHARACTERS]] = np.arange(1, len(TOKENS))


def encode(text: str) -> Ids:
    """Ids of a text: tabs are four blanks, what is not in the vocabulary is '?'."""
    plain = text.replace("\r\n", "\n").replace("\t", "    ")
    return _TABLE[np.frombuffer(plain.encode("ascii", "replace"), np.uint8)]


def decode(ids: Sequence[int]) -> str:
    """Text of ids; padding is nothing."""
    return "".join(CHARACTERS[i - 1] for i in ids if i != PAD)


@cache
def corpus(domain: str) -> dict[str, Ids]:
    """The characters of each part of a domain, its texts one after the other."""
    texts = _topics() if domain == "manual" else _read(*_place(domain))
    if domain in ("manual", "cmake"):  # few and uneven texts
        texts = _blocks(texts)
    lines: dict[str, list[str]] = {part: [] for part in PARTS}
    for key, text in sorted(texts.items()):
        lines[split_of(f"domains-{domain}", key)] += text.splitlines()
    trained = set(_runs(lines["train"]))
    for part in ("valid", "test"):
        lines[part] = _without(lines[part], trained)
    empty = [part for part, rest in lines.items() if not rest]
    if empty:
        raise DataError(f"the domain '{domain}' has no text for {', '.join(empty)}")
    return {part: encode("\n".join(rest) + "\n") for part, rest in lines.items()}


def _runs(lines: Sequence[str]) -> list[tuple[str, ...]]:
    """Every run of `_COPIED` lines, blanks at their ends aside."""
    plain = [line.strip() for line in lines]
    return [tuple(plain[i : i + _COPIED]) for i in range(len(plain) - _COPIED + 1)]


def _without(lines: Sequence[str], trained: set[tuple[str, ...]]) -> list[str]:
    """The lines that belong to no run which training text has as well: licences, copied files."""
    copied = np.zeros(len(lines), bool)
    for first, run in enumerate(_runs(lines)):
        if run in trained:
            copied[first : first + _COPIED] = True
    return [line for line, drop in zip(lines, copied, strict=True) if not drop]


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            "this Python has no pydoc_data (the text of help()), which belongs to the standard "
            "library; some systems have it in a package of its own"
        ) from error
    return dict(topics)


def _blocks(texts: Mapping[str, str]) -> dict[str, str]:
    """Blocks of paragraphs. Texts repeat each other's, so each paragraph counts once."""
    paragraphs = dict.fromkeys(
        paragraph for _, text in sorted(texts.items()) for paragraph in text.split("\n\n")
    )
    blocks, running = [], ""
    for paragraph in paragraphs:
        running += paragraph + "\n\n"
        if len(running) >= _BLOCK:
            blocks.append(running)
            running = ""
    return {f"{number:05d}": block for number, block in enumerate([*blocks, running])}


def _place(domain: str) -> tuple[Path, tuple[str, ...]]:
    """Folder and patterns of a domain that is made of files."""

    def package(name: str) -> Path:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:
            raise DataError(f"the domain '{domain}' needs the package {name}, a dependency")
        return Path(found.origin).parent

    if domain == "python":
        return Path(sysconfig.get_paths()["stdlib"]), ("*.py",)
    if domain == "cpp":
        return package("torch") / "include", ("c10/**/*.h", "torch/csrc/api/**/*.h")
    if domain == "cython":
        return package("sklearn"), ("**/*.pyx", "**/*.pxd")
    if domain == "cmake":
        return package("torch") / "share" / "cmake", ("**/*.cmake",)
    return package("matplotlib") / "mpl-data" / "fonts", ("**/*.afm",)


def _read(root: Path, patterns: tuple[str, ...]) -> dict[str, str]:
    files = sorted({path for pattern in patterns for path in root.glob(pattern)})
    return {
        path.relative_to(root).as_posix(): path.read_text(encoding="utf-8", errors="replace")
        for path in files
        if path.is_file()
    }


def windows(texts: Sequence[Ids], length: int, count: int, seed: int, *stream: str | int) -> Ids:
    """(count, length) windows of texts in turn, at places that depend on (seed, stream)."""
    random = rng.generator(seed, "windows", *stream)
    places = random.random(count)
    found = []
    for row, place in enumerate(places):
        text = texts[row % len(texts)]
        start = int(place * (len(text) - length + 1))
        found.append(text[start : start + length])
    return np.stack(found)


def documents(domain: str, part: str, count: int, length: int, seed: int) -> Ids:
    """(count, length) windows of one domain's part."""
    return windows([corpus(domain)[part]], length, count, seed, domain, part)


def order_of(
    count: int, pieces: int, part: str, seed: int, names: Sequence[str] = KNOWN
) -> npt.NDArray[np.int64]:
    """(count, pieces) place in `names` of each piece's domain in the `switching` documents;
    neighbours differ."""
    random = rng.generator(seed, "switching", part, *names)
    first = random.integers(len(names), size=(count, 1))
    steps = random.integers(1, len(names), size=(count, pieces - 1))
    found: npt.NDArray[np.int64] = np.concatenate((first, steps), 1).cumsum(1) % len(names)
    return found


def switching(
    part: str, count: int, length: int, every: int, seed: int, names: Sequence[str] = KNOWN
) -> Ids:
    """(count, length) documents that go on in another domain after every `every` characters."""
    rows = []
    for number, order in enumerate(order_of(count, -(-length // every), part, seed, names)):
        pieces = [corpus(names[domain])[part] for domain in order]
        drawn = windows(pieces, every, len(pieces), seed, "switching", part, *names, number)
        rows.append(drawn.reshape(-1)[:length])
    return np.stack(rows)
