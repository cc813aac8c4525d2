"""Schemas whose labels are numbers and arrays, and matching, whose label is a partner."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from polytask.tasks.schemas.base import SCHEMAS, Schema, brief, is_missing, label_key

Floats = npt.NDArray[np.float32]


def numbers(value: Any, what: str) -> npt.NDArray[np.float64]:
    """Numbers in a cell as float64, None as NaN; `ValueError` when something is not a number."""
    if isinstance(value, str):
        try:
            return np.asarray(float(value.strip()))
        except ValueError:
            raise ValueError(f"{what} {brief(value)} is not a number") from None
    if isinstance(value, bytes | dict | set):
        raise ValueError(f"{what} is not a number but a {type(value).__name__}")
    if isinstance(value, list | tuple) and not any(isinstance(v, list | tuple) for v in value):
        value = [math.nan if v is None else v for v in value]
    try:
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{what} {brief(value)} is not made of numbers in even rows") from None
    if np.isinf(array).any():
        raise ValueError(f"{what} is infinite")
    return array


@SCHEMAS.register("regression")
@dataclass(frozen=True)
class Regression(Schema):
    """One or more numbers. `mean` and `std` are the train split's, so heads can work in
    standardised units; labels and predictions stay in raw units."""

    kind: ClassVar[str] = "regression"
    head: ClassVar[str] = "regress"
    metrics: ClassVar[tuple[str, ...]] = ("rmse", "mae", "r2", "spearman")
    primary: ClassVar[str] = "rmse"
    higher_is_better: ClassVar[bool] = False

    outputs: int = 1
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if not len(self.mean) == len(self.std) == self.outputs:
            raise ValueError(
                f"{self.outputs} outputs need as many means and deviations, "
                f"not {len(self.mean)} and {len(self.std)}"
            )
        if not all(math.isfinite(m) and s > 0 for m, s in zip(self.mean, self.std, strict=True)):
            raise ValueError("means must be finite and deviations positive")

    def read(self, value: Any) -> Floats:
        """(outputs,) float32 in raw units."""
        if is_missing(value):
            raise ValueError("the target is missing (NaN)")
        array = numbers(value, "target").reshape(-1)
        if array.shape[0] != self.outputs:
            raise ValueError(f"the target has {array.shape[0]} numbers, expected {self.outputs}")
        if np.isnan(array).any():
            raise ValueError("the target is missing (NaN)")
        return array.astype(np.float32)

    def show(self, prediction: Any) -> float | list[float]:
        values = [float(v) for v in np.asarray(prediction).reshape(-1)]
        return values[0] if self.outputs == 1 else values


@SCHEMAS.register("matching")
@dataclass(frozen=True)
class Matching(Schema):
    """Two sides of a row belong together; other rows' sides do not. `temperature` starts the
    contrastive loss. Rows with the same label (or the same b side) are not each other's negatives.
    """

    kind: ClassVar[str] = "matching"
    head: ClassVar[str] = "match"
    metrics: ClassVar[tuple[str, ...]] = ("recall@1", "recall@5", "mrr")
    primary: ClassVar[str] = "mrr"

    temperature: float = 0.07

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature must be positive, not {self.temperature}")

    def read(self, value: Any) -> int:
        """A positive 63-bit number, equal for equal labels."""
        if is_missing(value):
            raise ValueError("the match label is missing")
        digest = hashlib.blake2b(label_key(value).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1


@SCHEMAS.register("forecasting")
@dataclass(frozen=True)
class Forecasting(Schema):
    """The next `horizon` steps of `channels` series, in raw units; NaN where unknown."""

    kind: ClassVar[str] = "forecasting"
    head: ClassVar[str] = "forecast"
    metrics: ClassVar[tuple[str, ...]] = ("smape", "mase", "mae")
    primary: ClassVar[str] = "smape"
    higher_is_better: ClassVar[bool] = False

    horizon: int
    channels: int = 1

    def __post_init__(self) -> None:
        if self.horizon < 1 or self.channels < 1:
            raise ValueError("horizon and channels must be at least 1")

    def read(self, value: Any) -> Floats:
        """(horizon, channels) float32."""
        if is_missing(value):
            raise ValueError("the future is missing")
        array = numbers(value, "future")
        if array.ndim == 0:
            array = array[None]
        if array.ndim == 1:
            array = array[:, None]
        if array.shape != (self.horizon, self.channels):
            raise ValueError(
                f"the future has shape {array.shape}, expected "
                f"{(self.horizon, self.channels)} (steps, channels)"
            )
        if np.isnan(array).all():
            raise ValueError("the future is missing (all NaN)")
        return array.astype(np.float32)


@SCHEMAS.register("dense")
@dataclass(frozen=True)
class Dense(Schema):
    """A label per pixel on a (height, width) grid: a class, or a number where `classes` is None.

    A cell is an array, a path or encoded bytes of a one-channel picture whose values are class
    numbers (or heights, depths ...). Other sizes are resampled by nearest neighbour.
    """

    kind: ClassVar[str] = "dense"
    head: ClassVar[str] = "dense"
    metrics: ClassVar[tuple[str, ...]] = ("miou", "accuracy", "rmse")
    primary: ClassVar[str] = "miou"

    classes: tuple[str, ...] | None
    height: int
    width: int

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise ValueError("height and width must be at least 1")
        numeric = self.classes is None
        override = object.__setattr__
        override(self, "metrics", ("rmse", "mae") if numeric else ("miou", "pixel_accuracy"))
        override(self, "primary", "rmse" if numeric else "miou")
        override(self, "higher_is_better", not numeric)

    def read(self, value: Any) -> npt.NDArray[Any]:
        """(height, width): int64 classes with -100 = unknown, or float32 with NaN = unknown."""
        if is_missing(value):
            raise ValueError("the map is missing")
        array = plane_of(value)
        rows = (np.arange(self.height) * array.shape[0]) // self.height
        columns = (np.arange(self.width) * array.shape[1]) // self.width
        array = np.asarray(array[rows[:, None], columns[None, :]])
        if self.classes is None:
            return np.asarray(array, np.float32)
        known = ~np.isnan(array) & (array != -100)
        if not known.any():
            raise ValueError("the map is missing (no pixel has a class)")
        values = array[known]
        bad = (values < 0) | (values >= len(self.classes)) | (values != np.floor(values))
        if bad.any():
            raise ValueError(
                f"pixel value {values[bad][0]:g} is no class number (0 to {len(self.classes) - 1})"
            )
        array[~known] = -100
        return np.asarray(array, np.int64)


def plane_of(value: Any) -> npt.NDArray[np.float64]:
    """A two-dimensional float64 array from an array, a path or encoded bytes."""
    if isinstance(value, str | bytes | Path):
        import io

        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(io.BytesIO(value) if isinstance(value, bytes) else value) as image:
                array = np.asarray(image, np.float64)
        except (OSError, UnidentifiedImageError) as error:
            raise ValueError(f"the map {brief(value, 120)} does not decode: {error}") from None
    else:
        array = numbers(value, "map")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"the map has shape {array.shape}, expected (height, width)")
    return array
