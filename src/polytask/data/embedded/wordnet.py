"""WordNet 3.0: definitions with their field of meaning, and related pairs as an NLI-like task.

A pair's relation is 'entails' (a is a kind of b), 'contradicts' (antonyms) or 'neutral' (two
kinds of the same thing). Source: Miller 1995; file format in `man 5 wndb`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from polytask.data.embedded.info import EmbeddedInfo, Entry, Splits
from polytask.data.embedded.sources import Debian, Located
from polytask.data.embedded.splits import SPLITS, Linked, by_split, draw, normal, split_of

_FIELDS = (
    "adj.all adj.pert adv.all noun.Tops noun.act noun.animal noun.artifact noun.attribute "
    "noun.body noun.cognition noun.communication noun.event noun.feeling noun.food noun.group "
    "noun.location noun.motive noun.object noun.person noun.phenomenon noun.plant "
    "noun.possession noun.process noun.quantity noun.relation noun.shape noun.state "
    "noun.substance noun.time verb.body verb.change verb.cognition verb.communication "
    "verb.competition verb.consumption verb.contact verb.creation verb.emotion verb.motion "
    "verb.perception verb.possession verb.social verb.stative verb.weather adj.ppl"
)
FIELDS = tuple(_FIELDS.split())
_PARTS = ("noun", "verb", "adj", "adv")
_EXAMPLE = re.compile(r'"([^"]+)"')


@dataclass(frozen=True)
class Synset:
    """One meaning: `key` is part of speech and offset, pointers are (symbol, key) pairs."""

    key: str
    field: str
    lemmas: tuple[str, ...]
    definition: str
    examples: tuple[str, ...]
    pointers: tuple[tuple[str, str], ...]


def read_synsets(path: Path) -> Iterator[Synset]:
    """Synsets of a `data.*` file; lines that begin with two spaces are the licence."""
    with path.open(encoding="utf-8") as handle:
        for line in handle:
            if not line.startswith("  "):
                yield _synset(line)


def _synset(line: str) -> Synset:
    head, _, gloss = line.partition(" | ")
    cells = head.split()
    words = int(cells[3], 16)
    lemmas = tuple(cells[4 + 2 * i].split("(")[0].replace("_", " ") for i in range(words))
    at = 4 + 2 * words
    pointers = []
    for i in range(int(cells[at])):
        symbol, offset, part = cells[at + 1 + 4 * i : at + 4 + 4 * i]
        pointers.append((symbol, _key(part, offset)))
    examples = tuple(_EXAMPLE.findall(gloss))
    definition = gloss.split('; "')[0].strip().strip(";").strip()
    key = _key(cells[2], cells[0])
    return Synset(key, FIELDS[int(cells[1])], lemmas, definition, examples, tuple(pointers))


def _key(part: str, offset: str) -> str:
    return ("a" if part == "s" else part) + offset


def _synsets(located: Located) -> dict[str, Synset]:
    found = (s for part in _PARTS for s in read_synsets(located.one(f"data.{part}")))
    return {synset.key: synset for synset in found}


def _definitions(located: Located) -> Splits:
    synsets = _synsets(located)
    splits = synset_splits(synsets)
    first = {normal(s.definition): s for s in list(synsets.values())[::-1]}
    kept = list(first.values())[::-1]
    columns = {
        "synset": [s.key for s in kept],
        "lemmas": [", ".join(s.lemmas) for s in kept],
        "definition": [s.definition for s in kept],
        "example": [s.examples[0] if s.examples else "" for s in kept],
        "field": [s.field for s in kept],
    }
    return by_split(columns, [splits[s.key] for s in kept])


def _pairs(located: Located) -> Splits:
    everything = _synsets(located)
    splits = synset_splits(everything)
    synsets = {k: s for k, s in everything.items() if k[0] in "nv"}
    rows: dict[str, list[Any]] = {
        name: [] for name in ("a", "b", "relation", "a_synset", "b_synset")
    }
    split_names = []
    for part in "nv":
        for split in SPLITS:
            pools = _pools({k: s for k, s in synsets.items() if k[0] == part}, splits, split)
            size = len(pools["contradicts"])
            for relation, pool in pools.items():
                chosen = sorted(pool, key=lambda pair: draw("wordnet-pairs", "/".join(pair)))
                for a, b in chosen[:size]:
                    rows["a"].append(f"{synsets[a].lemmas[0]}: {synsets[a].definition}")
                    rows["b"].append(f"{synsets[b].lemmas[0]}: {synsets[b].definition}")
                    rows["relation"].append(relation)
                    rows["a_synset"].append(a)
                    rows["b_synset"].append(b)
                    split_names.append(split)
    return by_split(rows, split_names)


def synset_splits(synsets: dict[str, Synset]) -> dict[str, str]:
    """A split per synset, for both tasks; antonyms share one, and so do equal definitions."""
    linked = Linked()
    for key, synset in synsets.items():
        linked.join(("definition", normal(synset.definition)), key)
        for symbol, other in synset.pointers:
            if symbol == "!":
                linked.join(key, other)
    names = linked.names()
    return {key: split_of("wordnet", names[key]) for key in synsets}


def _pools(
    synsets: dict[str, Synset], splits: dict[str, str], split: str
) -> dict[str, list[tuple[str, str]]]:
    """Ordered pairs of one part of speech within a split, by relation."""
    here = {key for key in synsets if splits[key] == split}
    entails, contradicts = [], []
    kinds: dict[str, list[str]] = {}
    for key in sorted(here):
        for symbol, other in synsets[key].pointers:
            if symbol == "@":
                kinds.setdefault(other, []).append(key)
                if other in here:
                    entails.append((key, other))
            elif symbol == "!" and other in here and key < other:
                swap = draw("wordnet-order", key + other) < 0.5
                contradicts.append((other, key) if swap else (key, other))
    opposed = {frozenset(pair) for pair in contradicts}
    neutral = []
    for siblings in kinds.values():
        order = sorted(siblings, key=lambda key: draw("wordnet-siblings", key))
        neutral += [p for p in pairwise(order) if frozenset(p) not in opposed]
    return {
        "entails": entails,
        "neutral": neutral,
        "contradicts": list(dict.fromkeys(contradicts)),
    }


_SOURCES = (Debian("wordnet-base", tuple(f"usr/share/wordnet/data.{p}" for p in _PARTS)),)
_LICENCE = "WordNet 3.0 licence (permissive, Princeton University)"

SETS = (
    Entry(
        EmbeddedInfo(
            name="wordnet",
            title="WordNet definitions: which of 45 fields of meaning (noun.animal, verb.motion)",
            licence=_LICENCE,
            modality="text",
            sources=_SOURCES,
            tasks={
                "wordnet": {
                    "data": "embedded:wordnet",
                    "schema": "classification",
                    "inputs": {"text": "definition"},
                    "target": "field",
                }
            },
            classes=tuple(sorted(FIELDS)),
            note="Definitions occur once, antonyms lie in one split. 'adj.all' is a seventh of the "
            "rows, some fields have fewer than 100: look at macro scores.",
        ),
        _definitions,
    ),
    Entry(
        EmbeddedInfo(
            name="wordnet-pairs",
            title="WordNet pairs: is a a kind of b, its opposite, or its sibling?",
            licence=_LICENCE,
            modality="text",
            sources=_SOURCES,
            tasks={
                "wordnet-pairs": {
                    "data": "embedded:wordnet-pairs",
                    "schema": "pair",
                    "inputs": {"text": ["a", "b"]},
                    "target": "relation",
                }
            },
            classes=("entails", "neutral", "contradicts"),
            note="Built from nouns and verbs, balanced within both and within splits; no synset is "
            "in two splits. Not natural-language inference as people annotate it.",
        ),
        _pairs,
    ),
)
