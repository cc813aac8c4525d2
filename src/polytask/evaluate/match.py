"""Retrieval over a whole split: every a side against every b side, in blocks of rows.

Rows that share a label belong together, so several b sides may be right for one a side. The
similarities of all pairs are never held at once.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from polytask.evaluate.metric import Metric
from polytask.evaluate.parts import Part

BLOCK = 512


def match_part(whole: Part, metrics: Mapping[str, Metric]) -> Part:
    """Summands of the retrieval metrics from raw predictions (n, 2, width) and labels (n,)."""
    vectors, label = whole.raw["prediction"], whole.raw["target"]
    a, b = vectors[:, 0].astype(np.float64), vectors[:, 1].astype(np.float64)
    blocks: dict[str, list[np.ndarray]] = {name: [] for name in metrics}
    for start in range(0, len(label), BLOCK):
        rows = slice(start, start + BLOCK)
        scores = a[rows] @ b.T
        right = label[rows, None] == label[None, :]
        for name, metric in metrics.items():
            assert metric.statistics is not None
            blocks[name].append(metric.statistics(scores, right))
    return Part(whole.rows, {name: np.concatenate(found) for name, found in blocks.items()})
