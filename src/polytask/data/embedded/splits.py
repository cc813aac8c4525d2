"""Which rows are train, valid and test: decided by a counter-based draw per group, once for all.

A group (an English message, a series, identical pictures) lies in one split whole. The draw of a
group depends on its key alone, so adding rows in a newer package version moves no other row, and
data sets that share keys and stream (language and translation pairs, say) share the split.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from polytask.rng import derive

SPLITS = ("train", "valid", "test")


def draw(stream: str, key: str) -> float:
    """Uniform in [0, 1) for a key; the same on every machine."""
    return derive(0, "embedded", stream, key) / 2**63


def split_of(stream: str, key: str, valid: float = 0.1, test: float = 0.2) -> str:
    """The split of one group: test below `test`, valid below `test + valid`, else train."""
    u = draw(stream, key)
    return "test" if u < test else "valid" if u < test + valid else "train"


def stratified(
    stream: str,
    strata: Sequence[Hashable],
    groups: Sequence[str],
    valid: float = 0.1,
    test: float = 0.2,
) -> np.ndarray:
    """Split name per row with the shares met in every stratum to within one group.

    `groups` names each row's group; groups with several rows belong to their first row's stratum.
    """
    first: dict[str, Hashable] = {}
    for group, stratum in zip(groups, strata, strict=True):
        first.setdefault(group, stratum)
    members: dict[Hashable, list[str]] = {}
    for group, stratum in first.items():
        members.setdefault(stratum, []).append(group)
    chosen: dict[str, str] = {}
    for names in members.values():
        names.sort(key=lambda name: draw(stream, name))
        tests = round(len(names) * test)
        valids = round(len(names) * valid)
        for rank, name in enumerate(names):
            chosen[name] = SPLITS[2 if rank < tests else 1 if rank < tests + valids else 0]
    return np.array([chosen[group] for group in groups])


def by_split(columns: Mapping[str, Any], split: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Cut columns (arrays or lists) into the splits that occur, rows in their order."""
    names = np.asarray(list(split))
    result: dict[str, dict[str, Any]] = {}
    for name in (*SPLITS, "all"):
        index = np.flatnonzero(names == name)
        if len(index):
            result[name] = {
                column: cells[index]
                if isinstance(cells, np.ndarray)
                else [cells[i] for i in index.tolist()]
                for column, cells in columns.items()
            }
    return result


def normal(text: str) -> str:
    """Text with case, punctuation and spacing levelled: what counts as 'the same text'."""
    return " ".join(re.sub(r"[\W_]+", " ", text.casefold()).split())


_PERSONS = frozenset(["man", "woman", "men", "women", "person", "people", "boy", "girl"])


def subject(name: str) -> str:
    """What an emoji's English name shows: 'man: teacher', 'woman-teacher', 'teacher' are one.

    Letters and digits only, so that 'Woman’s hat' and 'womans-hat' meet.
    """
    words = normal(name.replace("’", "").replace("'", "")).split()
    return "".join(word for word in words if word not in _PERSONS) or "".join(words)


class Linked:
    """Union-find over keys: things that must not be parted by a split."""

    def __init__(self) -> None:
        self._parent: dict[Hashable, Hashable] = {}

    def find(self, key: Hashable) -> Hashable:
        """The representative of the key's group."""
        root = key
        while self._parent.setdefault(root, root) != root:
            root = self._parent[root]
        while self._parent[key] != root:
            self._parent[key], key = root, self._parent[key]
        return root

    def names(self) -> dict[Hashable, str]:
        """Key -> a name of its group that does not depend on the order of joining."""
        least: dict[Hashable, str] = {}
        for key in self._parent:
            root = self.find(key)
            least[root] = min(least.get(root, repr(key)), repr(key))
        return {key: least[self.find(key)] for key in self._parent}

    def join(self, one: Hashable, other: Hashable) -> None:
        """Put both keys' groups together."""
        self._parent[self.find(other)] = self.find(one)
