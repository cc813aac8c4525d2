"""Slow references in float64, element by element, written from the papers' equations; and random
state dicts with everything that goes wrong: zeros, equal magnitudes, opposite signs, scalars,
integers, tied names, narrow types."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import strategies as st
from torch import Tensor

Array = npt.NDArray[np.float64]
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SHAPES = ((), (1,), (7,), (3, 4), (1, 5), (6, 1), (2, 3, 2, 2), (0,), (11, 13))
ROUNDING = {
    torch.float64: 1e-12,
    torch.float32: 3e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}


@dataclass(frozen=True)
class Family:
    """A base and its experts; 'w*' are to be merged, 'steps' is an integer, 'x_tied' is 'w0'."""

    base: dict[str, Tensor]
    experts: list[dict[str, Tensor]]
    dtype: torch.dtype

    @property
    def keys(self) -> list[str]:
        return [key for key in self.base if key.startswith("w")]

    def deltas(self, key: str) -> Array:
        """(K, n) exact."""
        origin = array(self.base[key])
        return np.stack([array(expert[key]) - origin for expert in self.experts])

    def check(self, merged: dict[str, Tensor], key: str, wanted: Array) -> None:
        """The merged tensor is `wanted` (n,), in the base's type, within its rounding."""
        found = merged[key]
        assert found.dtype == self.dtype and found.shape == self.base[key].shape
        scale = max(1.0, float(np.abs(wanted).max(initial=0)))
        np.testing.assert_allclose(array(found), wanted, rtol=0, atol=ROUNDING[self.dtype] * scale)

    def check_rest(self, merged: dict[str, Tensor]) -> None:
        """Every name is there, integers are the base's, tied names are one tensor."""
        assert merged.keys() == self.base.keys()
        assert torch.equal(merged["steps"], self.base["steps"])
        assert merged["x_tied"] is merged["w0"]


def array(x: Tensor) -> Array:
    return x.detach().double().reshape(-1).numpy()


@st.composite
def families(draw: st.DrawFn, least: int = 1, most: int = 4) -> Family:
    """Values are multiples of 1/8 in a small range, so that differences are exact in every type
    and equal magnitudes, zeros and draws of votes are common; or of 2^-6, where they are rare."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from(DTYPES))
    coarse = draw(st.booleans())
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3))
    count = draw(st.integers(least, most))

    def values(shape: tuple[int, ...]) -> Tensor:
        # bfloat16 has 8 digits: up to 127 / 64 in steps of 1 / 64, and twice that for a sum.
        top, step = (4, 8) if coarse else (63, 64)
        return torch.from_numpy(np.asarray(rng.integers(-top, top + 1, shape) / step))

    base: dict[str, Tensor] = {}
    experts: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for number, shape in enumerate(shapes):
        origin = values(shape)
        base[f"w{number}"] = origin.to(dtype)
        for expert in experts:
            change = values(shape) * (1 if rng.random() > 0.1 else 0)
            expert[f"w{number}"] = (origin + change).to(dtype)
    for state in (base, *experts):
        state["steps"] = torch.tensor(rng.integers(0, 9))
        state["x_tied"] = state["w0"]
    if base["w0"].numel() == 0:  # an empty tensor has no storage that could be shared
        for state in (base, *experts):
            state["w0"] = torch.ones(1, dtype=dtype)
            state["x_tied"] = state["w0"]
    return Family(base, experts, dtype)


def trimmed(delta: Array, density: float) -> Array:
    """The `density` largest magnitudes, equal ones at the threshold included."""
    if density >= 1 or not delta.size:
        return delta
    count = max(1, int(density * delta.size))
    threshold = sorted(np.abs(delta), reverse=True)[count - 1]
    return np.where(np.abs(delta) >= threshold, delta, 0)


def banded(delta: Array, density: float, gamma: float) -> Array:
    """Breadcrumbs."""
    n = delta.size
    if density >= 1 or not n:
        return delta
    keep = int(density * n)
    if keep == 0:
        return np.zeros_like(delta)
    bottom = max(0, n - keep - int(gamma * n))
    order = np.sort(np.abs(delta))
    low, high = order[bottom], order[bottom + keep - 1]
    return np.where((np.abs(delta) >= low) & (np.abs(delta) <= high), delta, 0)


def voted(
    deltas: Array,
    weights: Sequence[float],
    by: str = "mass",
    weigh: str = "before",
    divide: str = "weights",
    draw: int = 1,
) -> Array:
    """TIES' election and disjoint mean, one coordinate after the other."""
    merged = np.zeros(deltas.shape[1])
    for place in range(deltas.shape[1]):
        entries = deltas[:, place]
        ballots = [w * e if weigh == "before" else e for w, e in zip(weights, entries, strict=True)]
        vote = math.fsum(np.sign(ballots)) if by == "count" else math.fsum(ballots)
        elected = np.sign(vote) or draw
        total = divisor = 0.0
        for w, e, b in zip(weights, entries, ballots, strict=True):
            if np.sign(b) == elected:
                total += w * e
                divisor += {"weights": w, "counts": 1.0, "none": 0.0}[divide]
        merged[place] = total / divisor if divisor else total
    return merged


def slerp(a: Array, b: Array, t: float, linear_above: float = 0.9995) -> Array:
    """Shoemake's formula on raw vectors."""
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    if lengths == 0:
        return (1 - t) * a + t * b
    cosine = np.clip(a @ b / lengths, -1, 1)
    if abs(cosine) > linear_above:
        return (1 - t) * a + t * b
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def pcb(
    taus: Array,
    weights: Sequence[float],
    ratio: float,
    clip: float,
    inter: str = "pairwise",
    intra: bool = True,
    share: bool = True,
) -> tuple[Array, Array, npt.NDArray[np.bool_]]:
    """Steps 1 to 6 of the mechanism over (N, D), by sorting: the merged vector, s, and where a
    score is at its threshold up to float32's rounding, which decides alone whether it survives."""
    count, size = taus.shape

    def bounds(row: Array, low: float, high: float) -> tuple[float, float]:
        order = np.sort(row)
        return order[int(size * low)], order[max(0, int(size * (1 - high) - 1))]

    def norm(row: Array) -> Array:
        return (row - row.min()) / (row.max() - row.min())

    a = np.stack([np.clip(np.abs(row), *bounds(np.abs(row), clip, clip)) for row in taus])
    clamped = np.sign(taus) * a
    strength = np.stack([norm(row) for row in a])
    t = np.sign(taus) * strength
    agreement = {
        "pairwise": lambda: sum(np.tanh(t * t[j]) for j in range(count)),
        "sum_norm": lambda: np.tanh(taus * t.sum(0)),
        "sum_raw": lambda: np.tanh(taus * taus.sum(0)),
        "none": lambda: np.ones_like(taus),
    }[inter]()
    score = (np.exp(count * strength**2) if intra else 1.0) * agreement
    s = np.zeros_like(taus)
    near = np.zeros(size, dtype=bool)
    for i in range(count):
        low = np.sort(score[i])[int(size * (1 - ratio))]
        top = score[i].max()
        if top > low:
            s[i] = (np.clip(score[i], low, top) - low) / (top - low)
            scale = max(top - low, np.abs(score[i]).max())
            near |= (np.abs(score[i] - low) < 1e-5 * scale) & (s[i] < 1e-5)
    scaled = np.asarray(weights)[:, None] * s * clamped
    merged = scaled.sum(0)
    return (merged / np.maximum(s.sum(0), 1e-12) if share else merged), s, near
