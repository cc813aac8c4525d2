"""Sparse experts: latency of a single-task request beside dense layers, and against the FLOP count.

    python -m benchmarks.bench_experts

A ViT-small (width 384, 12 blocks, 197 tokens) with 16 experts of ratio 1, 4 per token, against

dense, equal operations   the dense ViT of ratio 4: what the request's operations cost densely
dense, all experts        the same experts, every one on every token, masked: what 'sparse' saves

The aim is a ratio of wall-clock times within 1.2 of the ratio of operations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from benchmarks.harness import Aim, compare, options_of, show, show_versions

from polytask.models.experts import ExpertsConfig
from polytask.models.experts.vit import MoEViT, MoEViTConfig, VisionTask
from polytask.models.experts.vit_flops import vit_flops

TASKS = (VisionTask(name="kind", outputs=10, head="image"),)


def build(dim: int, depth: int, experts: ExpertsConfig | None) -> MoEViT:
    config = MoEViTConfig(dim=dim, depth=depth, heads=dim // 64, experts=experts, tasks=TASKS)
    return MoEViT(config).eval()


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = options_of(__doc__, argv, dim=384, depth=12, count=16, k=4, batch=1)
    used = show_versions(["torch"])
    # Gates of width 1/sqrt(D): tokens of random images spread over the experts.
    experts = ExpertsConfig(count=options.count, k=options.k, mult=4 / options.k, start="width")
    sparse = build(options.dim, options.depth, experts)
    dense = build(options.dim, options.depth, None)
    masked = build(options.dim, options.depth, experts)
    for moe in masked.sparse_layers.values():
        moe.order = "dense"
    masked.load_state_dict(sparse.state_dict())
    images = torch.randn(options.batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    gap = float((sparse.run(images, "kind") - masked.run(images, "kind")).abs().max())
    taken = compare(
        {
            "dense, equal operations": lambda: dense.run(images, "kind"),
            "sparse": lambda: sparse.run(images, "kind"),
            "dense, all experts": lambda: masked.run(images, "kind"),
        },
        options.repeats,
        clock=options.clock,
    )
    work = {
        "dense, equal operations": sum(vit_flops(dense.config, "kind").values()),
        "sparse": sum(vit_flops(sparse.config, "kind").values()),
    }
    more = vit_flops(sparse.config, "kind")
    all_experts = more["experts"] * options.count // options.k
    work["dense, all experts"] = sum(more.values()) - more["experts"] + all_experts
    rows = [
        {
            "way": name,
            "ms": 1e3 * seconds,
            "gflops": work[name] / 1e9,
            "gflops_per_s": work[name] / 1e9 / seconds,
            "spread": taken.spread(name),
        }
        for name, seconds in taken.medians.items()
    ]
    found = {"versions": used, "rows": rows, "largest_difference": gap}
    show(found, options)
    return found


def aims(figures: Mapping[str, Any]) -> list[Aim]:
    """As much time as operations, within a fifth."""
    rows = {row["way"]: row for row in figures["rows"]}
    sparse = rows["sparse"]
    return [
        Aim(
            f"sparse to {name}: time over operations",
            (sparse["ms"] / rows[name]["ms"]) / (sparse["gflops"] / rows[name]["gflops"]),
            at_most=1.2,
        )
        for name in ("dense, equal operations", "dense, all experts")
    ]


if __name__ == "__main__":
    main()
