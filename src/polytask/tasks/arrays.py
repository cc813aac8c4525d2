"""Cells to arrays for the modalities that are not text: pictures, series, features.

Each function raises `ValueError` with a reason; the caller adds where the row stands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from polytask.tasks.schemas import brief, is_missing, numbers

Floats = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]


def image_pixels(value: Any, size: int) -> Pixels:
    """(3, size, size) uint8 from an array, encoded bytes or a path; grey is repeated."""
    array = value if isinstance(value, np.ndarray) else _decoded(value)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))) or 0 in array.shape:
        raise ValueError(
            f"the image has shape {array.shape}, expected (height, width) or (height, width, 3)"
        )
    array = _to_uint8(array if array.ndim == 2 else array[:, :, :3])
    if array.shape[:2] != (size, size):
        from PIL import Image

        resized = Image.fromarray(array).resize((size, size), Image.Resampling.BILINEAR)
        array = np.asarray(resized)
    if array.ndim == 2:
        return np.broadcast_to(array, (3, size, size)).copy()
    return np.ascontiguousarray(array.transpose(2, 0, 1))


def _decoded(value: Any) -> npt.NDArray[Any]:
    if is_missing(value):
        raise ValueError("the image is missing")
    if isinstance(value, list):
        return np.asarray(value)
    if not isinstance(value, str | bytes | Path):
        raise ValueError(f"expected an image, not a {type(value).__name__}")
    import io

    from PIL import Image, UnidentifiedImageError

    name = "image" if isinstance(value, bytes) else f"image {value}"
    try:
        with Image.open(io.BytesIO(value) if isinstance(value, bytes) else value) as image:
            return np.asarray(image.convert("RGB"))
    except FileNotFoundError:
        raise ValueError(f"{name} does not exist") from None
    except (OSError, UnidentifiedImageError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} does not decode: {brief(str(error), 100)}") from None


def _to_uint8(array: npt.NDArray[Any]) -> Pixels:
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    values = array.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("the image has values that are not finite")
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 255:
        raise ValueError(f"the image has values from {low:g} to {high:g}, expected 0 to 255")
    if np.issubdtype(array.dtype, np.floating) and high <= 1:
        values = values * 255
    return values.round().astype(np.uint8)


def series_values(row: Mapping[str, Any], columns: Sequence[str]) -> Floats:
    """(steps, channels) float32: one column with (steps,) or (steps, channels), or several
    columns with (steps,) each, padded at the front with NaN to the longest."""
    parts = []
    for column in columns:
        if is_missing(row[column]):
            raise ValueError(f"the series in column '{column}' is missing")
        part = numbers(row[column], "series")
        part = part.reshape(-1, 1) if part.ndim < 2 else part
        if part.ndim != 2 or part.shape[0] == 0:
            raise ValueError(
                f"the series in column '{column}' has shape {part.shape}, "
                "expected (steps,) or (steps, channels)"
            )
        parts.append(part)
    if len(parts) == 1:
        return parts[0].astype(np.float32)
    longest = max(part.shape[0] for part in parts)
    padded = [
        np.pad(part, ((longest - part.shape[0], 0), (0, 0)), constant_values=np.nan)
        for part in parts
    ]
    return np.concatenate(padded, axis=1).astype(np.float32)


def feature_values(row: Mapping[str, Any], column: str, width: int | None = None) -> Floats:
    """(length, width) float32 of precomputed features; one vector is a sequence of length 1.

    With `width`, narrower features are padded with zeros, so tasks of several widths share a stem.
    """
    if is_missing(row[column]):
        raise ValueError(f"the features in column '{column}' are missing")
    array = numbers(row[column], "features")
    array = array.reshape(1, -1) if array.ndim < 2 else array
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"the features have shape {array.shape}, expected (length, width)")
    if np.isnan(array).any():
        raise ValueError("the features hold NaN")
    if width is not None and array.shape[1] != width:
        if array.shape[1] > width:
            raise ValueError(f"the features are {array.shape[1]} wide, in training {width}")
        array = np.pad(array, ((0, 0), (0, width - array.shape[1])))
    return array.astype(np.float32)
