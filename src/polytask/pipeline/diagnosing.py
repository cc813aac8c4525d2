"""What adapters learned, as a file and a page of the run folder: adapters.json, adapters.html."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polytask import files
from polytask.adapt import Adapters
from polytask.adapt.diagnose import gradient_alignment, routing_of, shared_parameters
from polytask.pipeline.adapting import adapters_of

ROWS = 256  # training rows on which gradients are compared
MOST = 24  # tasks whose gradients are compared: one pass each


def diagnose(prepared: Any, folder: Path) -> None:
    """Write what trains, the routing of every task, and whether tasks' gradients agree."""
    from polytask.report.adapt_page import adapt_report

    adapters = adapters_of(prepared.model)
    if adapters is None:
        return
    share = adapters.share()
    record: dict[str, Any] = {
        "name": prepared.config.name,
        "method": adapters.config.method,
        "tasks": list(adapters.tasks),
        "sites": list(adapters.sites),
        "share": {"parts": share.parts, "trained": share.trained, "total": share.total},
        "told": str(adapters),
        "routing": None,
        "sources": _sources(adapters),
        "alignment": None,
    }
    if adapters.config.method in ("mhr", "poly", "scalearn"):
        record["routing"] = routing_of(adapters).to_dict()
    shared = [p for p in shared_parameters(adapters) if p.requires_grad]
    if shared and adapters.config.method != "task-lora" and 1 < len(adapters.tasks) <= MOST:
        record["alignment"] = _alignment(prepared, shared)
    files.write_json(folder / "adapters.json", record)
    adapt_report(folder, record)


def _sources(adapters: Adapters) -> list[str]:
    banks = list(adapters.banks().values())
    return list(banks[0].bank.names) if banks else []


def _alignment(prepared: Any, shared: list[torch.nn.Parameter]) -> dict[str, Any] | None:
    """Cosines on one mixed training batch; tasks that it lacks are left out."""
    from dataclasses import replace

    from polytask.train.distribution import Distribution
    from polytask.train.gradients import count_pairs, task_means

    plan = prepared.config.train.model_copy(update={"batch_size": ROWS, "accumulate": 1})
    some = replace(prepared, config=prepared.config.model_copy(update={"train": plan}))
    batch = some.loader(Distribution("cpu")).batch(0)[0]
    model = prepared.model
    device = next(model.parameters()).device
    batch = batch.to(device)
    names = prepared.taskset.names
    training = model.training
    model.eval()

    def loss(task: str) -> Tensor:
        return task_means(model.terms(batch), len(names))[names.index(task)]

    try:
        with torch.no_grad():
            pairs = count_pairs(model.terms(batch), len(names))
        present = [n for n, count in zip(names, pairs.tolist(), strict=True) if count]
        if len(present) < 2:
            return None
        found = gradient_alignment(loss, present, shared)
    finally:
        model.train(training)
    cosine = [[None if v != v else round(float(v), 4) for v in row] for row in found.cosine]
    return {"tasks": list(found.tasks), "cosine": cosine}
