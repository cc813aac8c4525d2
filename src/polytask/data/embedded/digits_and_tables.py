"""scikit-learn's bundled sets: 8x8 digits and three tables, read from its files directly.

Reading the files keeps scikit-learn out of the import path; the values are those of
`sklearn.datasets.load_*` (diabetes in its raw units: `load_diabetes(scaled=False)`).
"""

from __future__ import annotations

import csv
import gzip
from pathlib import Path
from typing import Any

import numpy as np

from polytask.data.embedded.info import EmbeddedInfo, Entry, Splits
from polytask.data.embedded.sources import Located, Wheel
from polytask.data.embedded.splits import by_split, stratified

_FOLDER = "sklearn/datasets/data"
_UCI = "CC-BY-4.0 (UCI Machine Learning Repository); package scikit-learn: BSD-3-Clause"

_CELL = (
    "radius",
    "texture",
    "perimeter",
    "area",
    "smoothness",
    "compactness",
    "concavity",
    "concave_points",
    "symmetry",
    "fractal_dimension",
)
BREAST_CANCER = tuple(f"{stat}_{part}" for stat in ("mean", "error", "worst") for part in _CELL)
WINE = (
    "alcohol",
    "malic_acid",
    "ash",
    "alcalinity_of_ash",
    "magnesium",
    "total_phenols",
    "flavanoids",
    "nonflavanoid_phenols",
    "proanthocyanins",
    "color_intensity",
    "hue",
    "od280_od315",
    "proline",
)
DIABETES = ("age", "sex", "bmi", "blood_pressure", "s1", "s2", "s3", "s4", "s5", "s6")


def _wheel(*names: str) -> tuple[Wheel, ...]:
    return (Wheel("scikit-learn", tuple(f"{_FOLDER}/{name}" for name in names)),)


def _same_rows(values: np.ndarray) -> list[str]:
    """A group key per row: equal rows share it, so copies never stand in two splits."""
    return [row.tobytes().hex() for row in np.ascontiguousarray(values)]


def _gzipped_numbers(path: Path, delimiter: str | None = None) -> np.ndarray:
    with gzip.open(path, "rt", encoding="ascii") as handle:
        return np.loadtxt(handle, delimiter=delimiter)


def _digits(located: Located) -> Splits:
    numbers = _gzipped_numbers(located.one("digits.csv.gz"), ",").astype(np.uint8)
    images, labels = numbers[:, :64], numbers[:, 64].astype(np.int64)
    split = stratified("digits", labels.tolist(), _same_rows(images))
    return by_split({"image": _to_grey(images.reshape(-1, 8, 8)), "label": labels}, split)


def _to_grey(sixteenths: np.ndarray) -> np.ndarray:
    """0..16 ink counts as 0..255 grey values, so that they read like any other picture."""
    return np.rint(sixteenths.astype(np.float64) * (255 / 16)).astype(np.uint8)


def _table_with_header(path: Path) -> tuple[np.ndarray, list[str]]:
    """scikit-learn's csv layout: a first line 'rows,columns,class names', the label last."""
    with path.open(encoding="utf-8", newline="") as handle:
        reader = csv.reader(handle)
        rows, width, *classes = next(reader)
        numbers = np.array([[float(cell) for cell in row] for row in reader])
    if numbers.shape != (int(rows), int(width) + 1):
        raise ValueError(f"{path.name} announces {rows} x {width}, holds {numbers.shape}")
    return numbers[:, :-1], [classes[int(label)] for label in numbers[:, -1]]


def _classes(located: Located, file: str, columns: tuple[str, ...], target: str) -> Splits:
    values, labels = _table_with_header(located.one(file))
    table: dict[str, Any] = {name: values[:, i] for i, name in enumerate(columns)}
    table[target] = labels
    return by_split(table, stratified(file, labels, _same_rows(values)))


def _breast_cancer(located: Located) -> Splits:
    return _classes(located, "breast_cancer.csv", BREAST_CANCER, "diagnosis")


def _wine(located: Located) -> Splits:
    return _classes(located, "wine_data.csv", WINE, "cultivar")


def _diabetes(located: Located) -> Splits:
    values = _gzipped_numbers(located.one("diabetes_data_raw.csv.gz"))
    progression = _gzipped_numbers(located.one("diabetes_target.csv.gz"))
    thirds = np.searchsorted(np.quantile(progression, (1 / 3, 2 / 3)), progression)
    table: dict[str, Any] = {name: values[:, i] for i, name in enumerate(DIABETES)}
    table["progression"] = progression
    return by_split(table, stratified("diabetes", thirds.tolist(), _same_rows(values)))


def _task(name: str, schema: str, inputs: dict[str, Any], target: str) -> dict[str, Any]:
    return {
        name: {
            "data": f"embedded:{name}",
            "schema": schema,
            "inputs": inputs,
            "target": target,
        }
    }


SETS = (
    Entry(
        EmbeddedInfo(
            name="digits",
            title="Handwritten digits, 8x8 grey (UCI optical recognition, test part)",
            licence=_UCI,
            modality="image",
            sources=_wheel("digits.csv.gz"),
            tasks=_task("digits", "classification", {"image": "image"}, "label"),
            classes=tuple("0123456789"),
            note="Grey values are the 0..16 ink counts times 255/16. Writers are not given, so "
            "the split is by picture, not by writer.",
        ),
        _digits,
    ),
    Entry(
        EmbeddedInfo(
            name="breast-cancer",
            title="Breast cancer Wisconsin (diagnostic): 30 cell measurements",
            licence=_UCI,
            modality="table",
            sources=_wheel("breast_cancer.csv"),
            tasks=_task(
                "breast-cancer", "classification", {"table": list(BREAST_CANCER)}, "diagnosis"
            ),
            classes=("malignant", "benign"),
            note="Linearly nearly separable: small gains need many seeds to show.",
        ),
        _breast_cancer,
    ),
    Entry(
        EmbeddedInfo(
            name="wine",
            title="Wine recognition: 13 chemical measurements, 3 cultivars",
            licence=_UCI,
            modality="table",
            sources=_wheel("wine_data.csv"),
            tasks=_task("wine", "classification", {"table": list(WINE)}, "cultivar"),
            classes=("class_0", "class_1", "class_2"),
            note="178 rows: the test split has 35, one error is 3 %.",
        ),
        _wine,
    ),
    Entry(
        EmbeddedInfo(
            name="diabetes",
            title="Diabetes progression after one year (Efron et al. 2004), raw units",
            licence="not stated by the authors; package scikit-learn: BSD-3-Clause",
            modality="table",
            sources=_wheel("diabetes_data_raw.csv.gz", "diabetes_target.csv.gz"),
            tasks=_task("diabetes", "regression", {"table": list(DIABETES)}, "progression"),
            note="Raw units, not the scaled columns of load_diabetes(); 'sex' is coded 1 and 2.",
        ),
        _diabetes,
    ),
)
