"""What the trainer costs over a hand-written loop, and how it compares with `transformers.Trainer`.

The same small BERT (2 layers, 32 and 128 wide), batch 32 x 32 tokens, AdamW, clipping, bare PyTorch
in the plainest form that is as fast as it gets (fused optimiser, no reading of the loss). polytask
checks every gradient, keeps sums per task and writes a line every ten steps all the while; the
eight-task variant logs eight tasks' losses at every step.

Only steps are timed, not setting up: a stopwatch runs from the end of the first step to the end of
the last.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.harness import compare, show_versions, table

LENGTH, BATCH, VOCABULARY = 32, 32, 1000


class Stopwatch:
    """A clock for `compare` that only moves while it is started."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.total = 0.0
        self._begun = 0.0

    def start(self) -> None:
        self._begun = self.clock()

    def stop(self) -> None:
        self.total += self.clock() - self._begun

    def read(self) -> float:
        return self.total


def bert(width: int) -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=2 * width,
            max_position_embeddings=LENGTH,
            num_labels=4,
        )
    )


class Contenders:
    """The same training in several hands; each method runs `steps` timed steps."""

    def __init__(self, width: int, steps: int, folder: Path, clock: Callable[[], float]) -> None:
        self.width, self.steps, self.folder = width, steps, folder
        self.watch = Stopwatch(clock)
        draw = torch.Generator().manual_seed(0)
        shape = (16, BATCH, LENGTH)
        self.ids = torch.randint(VOCABULARY, shape, generator=draw)
        self.labels = torch.randint(4, shape[:2], generator=draw)

    def by_hand(self) -> None:
        model = bert(self.width).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
        for step in range(self.steps + 1):
            logits = model(self.ids[step % 16]).logits
            loss = torch.nn.functional.cross_entropy(logits, self.labels[step % 16])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step == 0:
                self.watch.start()
        self.watch.stop()

    def polytask(self, tasks: int = 1, log_every: int = 10) -> None:
        from polytask.models.batch import Batch, Target, Terms
        from polytask.train.config import TrainConfig
        from polytask.train.loader import FunctionLoader
        from polytask.train.trainer import Trainer

        rows = torch.arange(BATCH)
        task = rows % tasks
        length = torch.full((BATCH,), LENGTH)
        batches = [
            Batch(
                {"text.ids": ids, "text.length": length},
                {"classify": Target(rows[:, None], task, rows, labels)},
                task,
                rows,
                BATCH,
            )
            for ids, labels in zip(self.ids, self.labels)
        ]

        def objective(model: Any, batch: Batch) -> Terms:
            target = batch.targets["classify"]
            logits = model(batch.fields["text.ids"]).logits
            loss = torch.nn.functional.cross_entropy(logits, target.value, reduction="none")
            return Terms({"ce": loss}, {"ce": target.task}, {"ce": target.row})

        def watch(trainer: Trainer, step: int) -> None:
            if step == 1:
                self.watch.start()
            if step == self.steps + 1:
                self.watch.stop()

        config = TrainConfig(
            steps=self.steps + 1,
            batch_size=BATCH,
            checkpoint_every=0,
            progress=False,
            log_every=log_every,
            device="cpu",
        )
        loader = FunctionLoader([f"task-{t}" for t in range(tasks)], lambda i: batches[i % 16])
        run = Path(tempfile.mkdtemp(dir=self.folder))
        Trainer(bert(self.width), loader, config, run, objective, callbacks=[watch]).fit()
        shutil.rmtree(run)

    def polytask_8_tasks(self) -> None:
        self.polytask(tasks=8, log_every=1)

    def transformers_trainer(self) -> None:
        from transformers import Trainer, TrainerCallback, TrainingArguments

        outer = self

        class Watch(TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step == 1:
                    outer.watch.start()
                if state.global_step == outer.steps + 1:
                    outer.watch.stop()

        rows = [
            {"input_ids": ids, "labels": label}
            for ids, label in zip(self.ids.flatten(0, 1), self.labels.flatten())
        ]
        arguments = TrainingArguments(
            str(self.folder / "hf"),
            max_steps=self.steps + 1,
            per_device_train_batch_size=BATCH,
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
        )
        model = bert(self.width)
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[Watch()])
        trainer.log = lambda *_, **__: None  # printing is not what is compared
        trainer.train()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60, help="timed steps per run")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--cpu-time", action="store_true", help="where other programs share the machine"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    from transformers import logging

    logging.set_verbosity_error()
    found = show_versions(["torch", "transformers", "accelerate"])
    found["threads"] = str(options.threads)
    results: dict[str, Any] = {"versions": found}
    lines = []
    for width in (32, 128):
        with tempfile.TemporaryDirectory() as folder:
            runs = Contenders(width, options.steps, Path(folder), clock)
            result = compare(
                {
                    "by hand": runs.by_hand,
                    "polytask": runs.polytask,
                    "polytask, 8 tasks, logging every step": runs.polytask_8_tasks,
                    "transformers.Trainer": runs.transformers_trainer,
                },
                repeats=options.repeats,
                clock=runs.watch.read,
            )
        results[str(width)] = result.to_dict()
        base = result.medians["by hand"]
        for name, seconds in result.medians.items():
            ms = 1000 * seconds / options.steps
            lines.append((width, name, ms, base / seconds, result.spread(name)))
    if options.json:
        print(json.dumps(results))
    else:
        print(table(["width", "who", "ms per step", "throughput / by hand", "spread"], lines))


if __name__ == "__main__":
    main()
