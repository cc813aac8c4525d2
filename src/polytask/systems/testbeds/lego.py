"""LEGO: chains of assignments whose depth is the skill that is asked for.

    Input : w = not k , b = val 1 , k = val b . Output : k = val 1

k variables stand in a chain: the first has a bit, each other one is the one before it or its
negation; the clauses come in random order. Skill s asks for the variable at depth s, so skill s
needs what skill s - 1 does (Zhang et al., 2022; as in Skill-It, arXiv 2307.14430). Words are
tokens, an item has 5 k + 6 of them, and the bit at the end is the answer.

`recall` makes the text of the common start: assignments that do not depend on each other, all of
them asked for, so that a small model learns to look a variable up (what a pretrained language model
brings along). Everything is vectorised and exact.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
WORDS = (*LETTERS, "val", "not", "=", "0", "1", ",", ".", "Input:", "Output:")
VAL, NOT, EQUALS, ZERO, ONE, COMMA, STOP, INPUT, OUTPUT = range(len(LETTERS), len(WORDS))
CLAUSE = 5  # tokens of a clause: variable, =, val or not, bit or variable, separator


def length(chain: int) -> int:
    """Tokens of an item."""
    return CLAUSE * chain + 6


def items(r: np.random.Generator, skill: int, count: int, chain: int) -> Ints:
    """(count, length) token ids that ask for the variable at depth `skill` (from 0)."""
    if not 0 <= skill < chain <= len(LETTERS):
        raise ValueError(f"skill {skill} of a chain of {chain} variables")
    letters = _letters(r, count, chain)
    flip = r.integers(0, 2, (count, chain))  # whether a variable negates the one before it
    flip[:, 0] = r.integers(0, 2, count)  # the first variable's bit
    bits = flip.cumsum(1) % 2
    clauses = np.empty((count, chain, CLAUSE), dtype=np.int64)
    clauses[..., 0] = letters
    clauses[..., 1] = EQUALS
    clauses[..., 2] = VAL + flip
    clauses[:, 0, 2] = VAL
    clauses[:, 0, 3] = ZERO + bits[:, 0]
    clauses[:, 1:, 3] = letters[:, :-1]
    clauses = _closed(_shuffled(r, clauses))
    tail = np.empty((count, CLAUSE), dtype=np.int64)
    tail[:, 0] = OUTPUT
    tail[:, 1] = letters[:, skill]
    tail[:, 2], tail[:, 3] = EQUALS, VAL
    tail[:, 4] = ZERO + bits[:, skill]
    first = np.full((count, 1), INPUT)
    return np.concatenate([first, clauses.reshape(count, CLAUSE * chain), tail], axis=1)


def recall(r: np.random.Generator, count: int, chain: int) -> tuple[Ints, Ints]:
    """Independent assignments, all asked for in a random order: ids (count, 10 chain + 2), and the
    columns of the answers (chain,)."""
    clauses = np.empty((count, chain, CLAUSE), dtype=np.int64)
    clauses[..., 0] = _letters(r, count, chain)
    clauses[..., 1], clauses[..., 2] = EQUALS, VAL
    clauses[..., 3] = ZERO + r.integers(0, 2, (count, chain))
    asked = _closed(_shuffled(r, clauses)).reshape(count, CLAUSE * chain)
    given = _closed(clauses).reshape(count, CLAUSE * chain)
    first, middle = np.full((count, 1), INPUT), np.full((count, 1), OUTPUT)
    answers = 2 + CLAUSE * chain + CLAUSE * np.arange(chain) + 3
    return np.concatenate([first, given, middle, asked], axis=1), answers


def words(ids: Ints) -> str:
    """An item as text."""
    return " ".join(WORDS[i] for i in ids)


def solve(text: str) -> str:
    """The answer by following the chain, word by word: an independent reading of an item."""
    given, _, asked = text.partition(" Output: ")
    meaning = {}
    for clause in given.removeprefix("Input: ").replace(".", ",").split(","):
        if clause.strip():
            name, _, word, what = clause.split()
            meaning[name] = (word, what)
    name, turned = asked.split()[0], False
    while True:
        word, what = meaning[name]
        turned ^= word == "not"
        if what in "01":
            return str(int(what) ^ turned)
        name = what


def _letters(r: np.random.Generator, count: int, chain: int) -> Ints:
    """(count, chain) different letters per row."""
    order = np.argsort(r.random((count, len(LETTERS))), axis=1)
    return order[:, :chain].astype(np.int64)


def _shuffled(r: np.random.Generator, clauses: Ints) -> Ints:
    order = np.argsort(r.random(clauses.shape[:2]), axis=1)
    return np.take_along_axis(clauses, order[..., None], axis=1)


def _closed(clauses: Ints) -> Ints:
    """With separators: commas, and a full stop after the last clause."""
    clauses[..., -1] = COMMA
    clauses[:, -1, -1] = STOP
    return clauses
