"""Counter-based randomness: a number is a function of (seed, stream, index), never of history.

That is what makes resuming exact, arms of a comparison paired, and results independent of the
number of processes: nobody has to replay anything to know the draw of step one million.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

Key = int | str


def derive(seed: int, *keys: Key) -> int:
    """A 63-bit seed that depends on every key; equal keys give equal seeds on every machine."""
    text = "/".join([str(int(seed)), *(f"{type(k).__name__[0]}{k}" for k in keys)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, *keys: Key) -> np.random.Generator:
    """A NumPy generator (Philox) for the stream named by the keys."""
    return np.random.Generator(np.random.Philox(key=derive(seed, *keys)))


def torch_generator(seed: int, *keys: Key, device: str = "cpu") -> torch.Generator:
    """A torch generator for the stream named by the keys."""
    import torch

    return torch.Generator(device=device).manual_seed(derive(seed, *keys))
