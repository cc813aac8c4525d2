"""Who uses which expert in a finished run: experts.json and experts.html of the run folder.

Test rows of every task go through the trunk; what the routers say is counted per layer, task and
expert. Beside it stand operations and bytes of one row's request, by task.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from polytask import files
from polytask.evaluate import evaluate
from polytask.models.batch import Batch
from polytask.models.experts import ExpertUsage, RoutingRecord
from polytask.models.experts.moe import moe_layers
from polytask.models.flops import flops_by_task
from polytask.models.multitask import MultitaskModel

ROWS = 512  # test rows per task


def diagnose_experts(prepared: Any, folder: Path) -> dict[str, Any]:
    """Write the record and its page into the run folder; returns the record."""
    from polytask.report.experts_page import experts_report

    model: MultitaskModel = prepared.model
    experts = model.config.experts
    assert experts is not None
    names = model.task_names
    usage = ExpertUsage(names, experts.count)
    work = np.zeros(len(names))
    rows = np.zeros(len(names))

    def count(record: RoutingRecord) -> None:
        usage.add(record)

    def watch(batch: Batch) -> None:
        # A backward pass takes twice a forward: a third of the work is one request's.
        work[:] += flops_by_task(model, batch) / 3
        rows[:] += np.bincount(batch.known("task"), minlength=len(names))

    model.on_routed = count
    hook = _Watched(model, watch)
    try:
        with hook:
            evaluate(
                model,
                prepared.taskset,
                prepared.processor,
                "test",
                prepared.config.evaluate.batch_size,
                limit=ROWS,
                texts=False,
            )
    finally:
        model.on_routed = None
    record = {
        "name": prepared.config.name,
        "router": experts.router,
        "k": experts.k,
        "usage": usage.to_dict(),
        "requests": {
            name: {"flops": float(work[t] / max(1, rows[t])), **_bytes(model, usage, name)}
            for t, name in enumerate(names)
        },
    }
    files.write_json(folder / "experts.json", record)
    experts_report(folder, record)
    return record


class _Watched:
    """Tells `watch` of every batch that the model predicts."""

    def __init__(self, model: MultitaskModel, watch: Any) -> None:
        self.model = model
        self.watch = watch

    def __enter__(self) -> None:
        inner = self.model.predict

        def predict(batch: Batch, *rest: Any, **named: Any) -> Any:
            self.watch(batch)
            return inner(batch, *rest, **named)

        self.model.__dict__["predict"] = predict

    def __exit__(self, *raised: object) -> None:
        del self.model.__dict__["predict"]


def _bytes(model: MultitaskModel, usage: ExpertUsage, task: str) -> dict[str, int]:
    """Bytes of the weights a task's requests touch, and of the whole model."""
    whole = sum(p.nbytes for p in model.parameters())
    number = model.task_names.index(task)
    touched = 0
    for name, parameter in model.named_parameters():
        if ".experts." not in name and ".router." not in name and not name.startswith("heads."):
            touched += parameter.nbytes
    named = dict(model.named_parameters())
    for name, part in model.head_rows(task).items():
        touched += named[name][part].nbytes
    for used, moe in zip(usage.used(task), moe_layers(model).values(), strict=True):
        gates = moe.router.gates
        touched += gates[number if len(gates) > 1 else 0].nbytes
        touched += sum(p.nbytes for e in used for p in moe.experts[str(e)].parameters())
    return {"bytes": touched, "all_bytes": whole}
