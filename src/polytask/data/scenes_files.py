"""Scenes as files that `polytask train` reads: pictures, maps as pictures, a table."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from polytask import files
from polytask.data.scenes import Scenes


def write_scenes(folder: Path, scenes: Scenes, cell: int = 4) -> Path:
    """Write scenes.csv (image, seg, depth, edge, near, far) and the pictures it names.

    Maps have one pixel per cell of `cell` x `cell` pixels; depth is a TIFF of float32 numbers, the
    others are PNG. The folder is whole or not there.
    """
    from PIL import Image

    grid = scenes.grid(cell)
    maps: dict[str, npt.NDArray[Any]] = {
        "seg": grid.seg.astype(np.uint8),
        "depth": grid.depth,
        "edge": grid.edge.astype(np.uint8),
    }
    with files.building(folder) as aside:
        for kind in ("image", *maps):
            (aside / kind).mkdir()
        rows = []
        for i in range(len(scenes)):
            row: dict[str, str] = {}
            for kind, arrays in {"image": scenes.image, **maps}.items():
                name = f"{kind}/{i:05d}.{'tif' if kind == 'depth' else 'png'}"
                Image.fromarray(arrays[i]).save(aside / name)
                row[kind] = name
            row["near"] = scenes.classes[scenes.near[i]]
            row["far"] = scenes.classes[scenes.far[i]]
            rows.append(row)
        with (aside / "scenes.csv").open("w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, ["image", *maps, "near", "far"])
            writer.writeheader()
            writer.writerows(rows)
    return folder / "scenes.csv"
