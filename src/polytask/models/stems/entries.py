"""What a stem hands to the splice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
from torch import Tensor

HostArray = npt.NDArray[Any]


@dataclass(frozen=True)
class Entries:
    """Tokens of all entries of one modality.

    tokens    (n, T, D)
    sequence  (n,) host int: the sequence each entry belongs to
    count     (n,) host int: real tokens at the start of each entry; None: all T are real
    valid     (n, T) host bool, if the real tokens have holes between them (instead of `count`)
    loc, scale  (n, channels): what instance norm took out of a series
    """

    tokens: Tensor
    sequence: HostArray
    count: HostArray | None = None
    valid: HostArray | None = None
    loc: Tensor | None = None
    scale: Tensor | None = None
