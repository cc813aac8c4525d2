"""Fashion-MNIST, whole, from Debian: 60,000 + 10,000 pictures of garments, 28x28 grey."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import numpy as np

from polytask.data.embedded.info import EmbeddedInfo, Entry, Splits
from polytask.data.embedded.sources import Debian, Hub, Located

CLASSES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
_PARTS = {"train": "train", "test": "t10k"}
_FILES = tuple(
    f"usr/share/datasets/fashion-mnist/{part}-{kind}-ubyte.gz"
    for part in _PARTS.values()
    for kind in ("images-idx3", "labels-idx1")
)

_HUB = Hub(
    "zalando-datasets/fashion_mnist",
    tuple(f"fashion_mnist/{split}-00000-of-00001.parquet" for split in _PARTS),
)


def read_idx(path: Path) -> np.ndarray:
    """A gzipped idx file of unsigned bytes (LeCun's format): magic, sizes, then the values."""
    raw = gzip.decompress(path.read_bytes())
    if raw[:3] != b"\0\0\x08":
        raise ValueError(f"{path.name} is not an idx file of bytes")
    axes = raw[3]
    shape = tuple(int(n) for n in np.frombuffer(raw, dtype=">u4", count=axes, offset=4))
    return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * axes).reshape(shape)


def read_hub_parquet(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(images, labels) of the hub's layout: 'image' is {'bytes': PNG, 'path': ...}."""
    import pyarrow.parquet as pq
    from PIL import Image

    table = pq.read_table(path, columns=["image", "label"])
    images = []
    for cell in table["image"].to_pylist():
        with Image.open(io.BytesIO(cell["bytes"])) as picture:
            images.append(np.asarray(picture.convert("L")))
    return np.stack(images), table["label"].to_numpy().astype(np.int64)


def _build(located: Located) -> Splits:
    if located.label == _HUB.package:
        parts = {s: read_hub_parquet(located.one(f"{s}-00000-of-00001.parquet")) for s in _PARTS}
        return {s: {"image": images, "label": labels} for s, (images, labels) in parts.items()}
    return {
        split: {
            "image": read_idx(located.one(f"{part}-images-idx3-ubyte.gz")),
            "label": read_idx(located.one(f"{part}-labels-idx1-ubyte.gz")).astype(np.int64),
        }
        for split, part in _PARTS.items()
    }


SETS = (
    Entry(
        EmbeddedInfo(
            name="fashion-mnist",
            title="Fashion-MNIST: 70,000 garments in 10 classes, 28x28 grey",
            licence="MIT (Zalando SE)",
            modality="image",
            sources=(Debian("dataset-fashion-mnist", _FILES), _HUB),
            tasks={
                "fashion-mnist": {
                    "data": "embedded:fashion-mnist",
                    "schema": "classification",
                    "inputs": {"image": "image"},
                    "target": "label",
                    "verbaliser": {str(label): name for label, name in enumerate(CLASSES)},
                }
            },
            classes=CLASSES,
            note="Train and test as published; a valid part is to be taken from train. No picture "
            "stands in both.",
        ),
        _build,
    ),
)
