"""A film of moving photographs, and neurons that see it through Gabor fields.

The photographs are real: those that come with scikit-image, or the two that come with
scikit-learn. A square of `size` pixels drifts over a photo, turning slowly, and goes on to
another photo every few seconds. A neuron's current is the match of the frame with its Gabor
patch, standardised over the film.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polytask import rng
from polytask.data.circuits import CircuitConfig, Floats, Shown
from polytask.data.embedded.sources import Wheel, fetched
from polytask.data.spike_tokens import whole_bins
from polytask.errors import ConfigError, DataError, suggestion

_FILES = {
    "scikit-image": Wheel(
        "scikit-image",
        tuple(
            f"skimage/data/{name}"
            for name in ("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "rocket.jpg")
        ),
    ),
    "scikit-learn": Wheel(
        "scikit-learn",
        tuple(f"sklearn/datasets/images/{name}" for name in ("china.jpg", "flower.jpg")),
    ),
}


def photos(source: str = "scikit-learn", side: int = 96) -> list[NDArray[np.float32]]:
    """Grey photographs, the shorter side `side` pixels, each of mean 0 and deviation 1.

    Args:
        source: 'scikit-learn' (two photos, always here) or 'scikit-image' (five, if installed).

    Raises:
        DataError: the package is not installed. ConfigError: an unknown source.
    """
    from PIL import Image

    if source not in _FILES:
        raise ConfigError(f"unknown source of photos '{source}'.{suggestion(source, _FILES)}")
    wheel = _FILES[source]
    located = wheel.installed() or fetched(wheel)
    if located is None:
        raise DataError(f"{source} is not installed: pip install --no-deps {source}")
    found = []
    for path in located.files():
        with Image.open(Path(path)) as picture:
            grey = picture.convert("L")
            scale = side / min(grey.size)
            size = tuple(max(side, round(edge * scale)) for edge in grey.size)
            values = np.asarray(grey.resize((size[0], size[1]), Image.Resampling.BOX), np.float32)
        found.append((values - values.mean()) / values.std())
    return found


@dataclass(frozen=True)
class FilmConfig:
    """A film: pixels a side, frames per second, seconds a photo, pixels per frame of drift."""

    size: int = 16
    frame_rate: float = 20.0
    photo_seconds: float = 2.0
    speed: float = 1.0
    source: str = "scikit-learn"


def moving_photos(config: FilmConfig, count: int, seed: int) -> NDArray[np.float32]:
    """(count, size, size) frames of squares that drift over photographs."""
    pictures = photos(config.source)
    if any(min(p.shape) <= config.size for p in pictures):
        raise ConfigError(f"size = {config.size} is not smaller than the photographs")
    draw = rng.generator(seed, "film")
    each = max(1, round(config.photo_seconds * config.frame_rate))
    found = np.empty((count, config.size, config.size), np.float32)
    for begin in range(0, count, each):
        length = min(each, count - begin)
        picture = pictures[draw.integers(len(pictures))]
        room = np.array(picture.shape) - config.size
        turn = draw.uniform(0, 2 * np.pi) + np.cumsum(0.15 * draw.standard_normal(length))
        steps = config.speed * np.stack([np.sin(turn), np.cos(turn)], axis=1)
        place = draw.uniform(0, room) + np.cumsum(steps, axis=0)
        place = room - np.abs(place % (2 * room) - room)  # turn round at the edges
        at = np.clip(np.round(place), 0, room).astype(int)
        views = np.lib.stride_tricks.sliding_window_view(picture, (config.size, config.size))
        found[begin : begin + length] = views[at[:, 0], at[:, 1]]
    return found


def gabor_fields(n_units: int, size: int, seed: int) -> Floats:
    """(N, size, size) Gabor patches of random place, orientation, frequency and phase.

    exp(-(x'^2 + y'^2 / 4) / (2 s^2)) cos(2 pi f x' + phase), mean 0, norm 1.
    """
    draw = rng.generator(seed, "gabor fields")
    grid = np.arange(size) - (size - 1) / 2
    y, x = np.meshgrid(grid, grid, indexing="ij")
    centre = draw.uniform(-size / 4, size / 4, (2, n_units, 1, 1))
    angle = draw.uniform(0, np.pi, (n_units, 1, 1))
    period = draw.uniform(size / 4, size / 2, (n_units, 1, 1))
    phase = draw.uniform(0, 2 * np.pi, (n_units, 1, 1))
    along = (x - centre[0]) * np.cos(angle) + (y - centre[1]) * np.sin(angle)
    across = (y - centre[1]) * np.cos(angle) - (x - centre[0]) * np.sin(angle)
    width = period * 0.4
    patch = np.exp(-(along**2 + across**2 / 4) / (2 * width**2))
    patch = patch * np.cos(2 * np.pi * along / period + phase)
    patch -= patch.mean(axis=(1, 2), keepdims=True)
    found: Floats = patch / np.sqrt((patch**2).sum(axis=(1, 2), keepdims=True))
    return found


def gabor_currents(
    frames: NDArray[np.float32], fields: Floats, gain: float | NDArray[np.floating[Any]] = 0.12
) -> Floats:
    """(F, N) currents: match of every frame with every field, standardised, times `gain`."""
    match = np.einsum("fhw,nhw->fn", frames, fields, optimize=True)
    spread = match.std(axis=0)
    found: Floats = gain * (match - match.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    return found


def film_for(
    circuit: CircuitConfig,
    seed: int = 0,
    film: FilmConfig | None = None,
    *,
    gain: float = 0.12,
    share: float = 1.0,
) -> Shown:
    """A film as long as the circuit's recording, seen by a `share` of its neurons.

    Give it to `simulate_circuit(circuit, seed, shown=...)`.
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"share must be between 0 and 1, not {share}")
    chosen = film or FilmConfig()
    each = whole_bins(circuit.duration / circuit.segments, 1 / chosen.frame_rate, "a segment")
    frames = moving_photos(chosen, each * circuit.segments, seed)
    fields = gabor_fields(circuit.n_units, chosen.size, seed)
    sees = rng.generator(seed, "who sees").permutation(circuit.n_units) < share * circuit.n_units
    return Shown(frames, chosen.frame_rate, gabor_currents(frames, fields, gain * sees))
