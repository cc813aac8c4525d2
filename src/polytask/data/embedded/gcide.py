"""The GNU version of Webster's dictionary: 40 MB of English prose, one document an entry."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator

from polytask.data.embedded.info import EmbeddedInfo, Entry, Splits
from polytask.data.embedded.sources import Debian, Located
from polytask.data.embedded.splits import by_split, split_of

_ACCENT = re.compile(r"\[[`'^\"~=.,*()|\-]+([A-Za-z])\]|\[([ao]e)\]", re.IGNORECASE)
_BRACKETS = re.compile(r"\[[^\[\]]*\]")
_PRONUNCIATION = re.compile(r"\\[^\\]*\\")
_AUTHOR = re.compile(r"\s--\s?[A-Z(][^.]{0,30}(\.[^.]{0,20}){0,2}\.?\s*$")
_PARTS = r"v\. t|v\. i|p\. pr|p\. p|vb\. n|prop|n|a|v|adv|prep|conj|interj|pron|imp|pl"
_GRAMMAR = re.compile(rf"(?<!\w)({_PARTS})\.(?=[\s,;&]|$)")
_SPOKEN = re.compile(r"\([^()]*[\"*`][^()]*\)|(?<=\s)\S+[*`]\S*[\"`]\S*")
_SPACE = re.compile(r"\s+")
_LEAST_WORDS = 8


def entries(text: str) -> Iterator[tuple[str, str]]:
    """(headword, prose) of every entry: definitions and quotations as running text.

    Pronunciations, etymologies and other remarks in brackets, names of quoted authors and the
    marks of the print are left out. An entry begins at a line that is not indented.
    """
    block: list[str] = []
    for line in text.splitlines():
        if line and not line[0].isspace() and block:
            yield _entry(block)
            block = []
        if line.strip() or block:
            block.append(line)
    if block:
        yield _entry(block)


def _entry(lines: list[str]) -> tuple[str, str]:
    head = re.split(r"\s*[\\\[{(]|\s{2,}|,\s", lines[0].strip(), maxsplit=1)[0]
    paragraphs = "\n".join(lines).split("\n\n")
    prose = [_prose(paragraph) for paragraph in paragraphs]
    return head, _SPACE.sub(" ", " ".join(filter(None, prose))).strip()


def _prose(paragraph: str) -> str:
    text = _ACCENT.sub(lambda match: match[1] or match[2], paragraph)
    previous = ""
    while previous != text:  # remarks within remarks
        previous, text = text, _BRACKETS.sub(" ", text)
    text = _SPOKEN.sub(" ", _PRONUNCIATION.sub(" ", text))
    text = _AUTHOR.sub(" ", text.rstrip())
    text = _GRAMMAR.sub(" ", text)
    text = re.sub(r"(?m)^\s*(\d+\.|\([a-z]\))\s", " ", text)
    text = text.translate(str.maketrans("", "", "{}\\[]"))
    text = re.sub(r"\s+([,;:.])", r"\1", text)
    text = re.sub(r"([,;:])[,;:]+", r"\1", text)
    return text.strip(" \n,;:")


def _build(located: Located) -> Splits:
    """Entries of at least 8 words, each text once; a headword lies in one split whole."""
    with gzip.open(located.one("gcide.dict.dz"), "rt", encoding="utf-8", errors="replace") as file:
        text = file.read()
    heads, texts, splits = [], [], []
    seen: set[str] = set()
    for head, prose in entries(text):
        words = prose.split()
        if len(words) < _LEAST_WORDS or prose in seen or head.startswith("00-database"):
            continue
        seen.add(prose)
        heads.append(head)
        texts.append(prose)
        splits.append(split_of("gcide", head.casefold(), valid=0.02, test=0.05))
    return by_split({"headword": heads, "text": texts}, splits)


SETS = (
    Entry(
        EmbeddedInfo(
            name="gcide",
            title="Webster's dictionary (1913, with later additions): English prose by entry",
            licence="GPL-2+ (GCIDE 0.48)",
            modality="text",
            sources=(Debian("dict-gcide", ("usr/share/dictd/gcide.dict.dz",)),),
            tasks={
                "gcide": {
                    "data": "embedded:gcide",
                    "schema": "generation",
                    "inputs": {"text": "headword"},
                    "target": "text",
                }
            },
            note="For language pretraining: definitions and quotations, without pronunciation, "
            "etymology and sources. 5 % of the headwords are test, 2 % valid.",
        ),
        _build,
    ),
)
