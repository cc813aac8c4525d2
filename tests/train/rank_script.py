"""One process of a run that several share; started by the tests with RANK and WORLD_SIZE set."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from train_fakes import TASKS, TinyModel, loader_of

from polytask.train import snapshot
from polytask.train.config import TrainConfig
from polytask.train.distribution import Distribution
from polytask.train.trainer import Trainer


def main(folder: Path, settings: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    pause, stop = settings.pop("pause", 0.0), settings.pop("stop", 0)
    config = TrainConfig(**{"progress": False, "device": "cpu", **settings})
    distribution = Distribution(config.device)
    model = TinyModel(seed=distribution.rank)  # rank 0's weights have to reach everybody
    loader = loader_of(config.micro_batch, TASKS, distribution.rank, distribution.world)
    seen: list[list[int]] = []
    original = loader.function

    def remember(index: int) -> Any:
        batch = original(index)
        seen.append(batch.row.tolist())
        return batch

    loader.function = remember

    def slow(trainer: Trainer, step: int) -> None:
        (folder / f"rank-{distribution.rank}-alive").write_text(str(step))
        time.sleep(pause)
        if step == stop:
            os._exit(7)

    def evaluator(model: Any, step: int) -> dict[str, dict[str, float]]:
        loss = model.terms(loader_of(8).batch(100)[0]).value["mse"].mean()
        return {"alpha": {"mse": float(loss.detach())}}

    trainer = Trainer(
        model,
        loader,
        config,
        folder / "run",
        evaluator=evaluator,
        callbacks=[slow],
        distribution=distribution,
    )
    result = trainer.fit()
    weights = {name: tensor.tolist() for name, tensor in snapshot.pack_model(model).items()}
    out = {
        "kind": distribution.kind,
        "weights": weights,
        "rows": seen,
        "score": result.scores["alpha"]["mse"],
    }
    (folder / f"out-{distribution.world}-{distribution.rank}.json").write_text(json.dumps(out))


if __name__ == "__main__":
    for name, given in json.loads(sys.argv[2]).items():
        where = Path(sys.argv[1]) / name
        where.mkdir(exist_ok=True)
        main(where, given)
