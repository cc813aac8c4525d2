"""A trained model on disk: what its tasks load, and how many experts are in memory."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from polytask.infer.expert_store import open_store, write_store
from polytask.models.experts import ExpertUsage
from polytask.models.experts.vit import MoEViT
from polytask.models.experts.vit_flops import request_cost


def store_facts(model: MoEViT, usage: ExpertUsage, pixels: Tensor) -> dict[str, Any]:
    """Per task: experts loaded for a batch of images, bytes, the largest difference to the whole
    model, and the bytes of all weights the task touches; `peak`: experts in memory at once."""
    with tempfile.TemporaryDirectory() as place:
        stored, store = open_store(write_store(model, Path(place) / "model"), max_resident=2)
        found: dict[str, Any] = {"tasks": {}}
        peak = 0
        for name in model.config.names:
            store.reset()
            gap = float((stored.run(pixels, name) - model.run(pixels, name)).abs().max())
            touched = request_cost(model, name, usage.used(name))
            found["tasks"][name] = {
                "loads": store.stats.loads,
                "bytes": store.stats.bytes,
                "gap": gap,
                "touched": touched.total_bytes,
            }
            peak = max(peak, store.stats.peak)
        store.close()
    return found | {"peak": peak, "experts": sum(map(len, _here(model)))}


def _here(model: MoEViT) -> list[tuple[int, ...]]:
    return [moe.experts.ids for moe in model.sparse_layers.values()]
