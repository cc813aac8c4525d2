"""Addition: sums of two numbers, where the skill is which digit of the sum is asked for.

    Input : A = 1 0 6 + 0 7 1 , A 0 = ? Output : 7

Digit 0 is the ones; a higher digit needs the carry of those below it. The sum is taken without its
leading carry, so every digit has ten values. Words are tokens (Skill-It, arXiv 2307.14430).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

WORDS = (*"0123456789", "A", "=", "+", ",", "?", "Input:", "Output:")
NAME, EQUALS, PLUS, COMMA, ASKED, INPUT, OUTPUT = range(10, len(WORDS))


def length(digits: int) -> int:
    """Tokens of an item."""
    return 2 * digits + 11


def items(r: np.random.Generator, skill: int, count: int, digits: int = 3) -> Ints:
    """(count, length) token ids that ask for digit `skill` of the sum; the last is the answer."""
    if not 0 <= skill < digits <= 10:
        raise ValueError(f"digit {skill} of sums of {digits} digits")
    low, high = 0, 10**digits
    one, other = r.integers(low, high, count), r.integers(low, high, count)
    place = 10 ** np.arange(digits)[::-1]  # most significant first
    out = np.empty((count, length(digits)), dtype=np.int64)
    out[:, :3] = INPUT, NAME, EQUALS
    out[:, 3 : 3 + digits] = one[:, None] // place % 10
    out[:, 3 + digits] = PLUS
    out[:, 4 + digits : 4 + 2 * digits] = other[:, None] // place % 10
    out[:, 4 + 2 * digits :] = COMMA, NAME, skill, EQUALS, ASKED, OUTPUT, 0
    out[:, -1] = (one + other) // 10**skill % 10
    return out


def words(ids: Ints) -> str:
    """An item as text."""
    return " ".join(WORDS[i] for i in ids)
