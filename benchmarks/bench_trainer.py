"""A training step: polytask's trainer beside a hand-written loop and `transformers.Trainer`.

    python -m benchmarks trainer

Every way trains the same Hugging Face BERT on the same ready batches of 32 rows of 32 tokens with
fused AdamW, gradients clipped to norm 1, a linear schedule and a log line every tenth step. The
eight-task case logs every task's mean loss at every step; `transformers.Trainer` has no such thing
and is left out there. Starting, stopping and saving are outside the timing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.harness import Aim, compare, options_of, show, show_versions
from torch import Tensor, nn
from torch.nn import functional

from polytask.models.batch import Batch, Target, Terms
from polytask.train import FunctionLoader, TrainConfig, Trainer

ROWS, TOKENS, CLASSES = 32, 32, 4
LEAD = 8  # steps before the clock starts
Clock = Callable[[], float]


class Model(nn.Module):
    """BERT with a linear head per task; a row belongs to one task."""

    def __init__(self, hidden: int, tasks: int) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        torch.manual_seed(0)
        heads = max(2, hidden // 32)
        shape = {"hidden_size": hidden, "intermediate_size": 4 * hidden}
        self.bert: Any = BertModel(
            BertConfig(vocab_size=1000, num_hidden_layers=2, num_attention_heads=heads, **shape)
        )
        self.head = nn.Linear(hidden, CLASSES * tasks)
        self.tasks = tasks

    def logits(self, ids: Tensor, task: Tensor) -> Tensor:
        every = self.head(self.bert(input_ids=ids).pooler_output).view(len(ids), self.tasks, -1)
        chosen: Tensor = every[torch.arange(len(ids)), task]
        return chosen

    def forward(self, input_ids: Tensor, task: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """What `transformers.Trainer` calls."""
        logits = self.logits(input_ids, task)
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


def some_batches(tasks: int, count: int = 16) -> list[Batch]:
    torch.manual_seed(1)
    batches = []
    for index in range(count):
        task = torch.randint(tasks, (ROWS,))
        row = torch.arange(index * ROWS, (index + 1) * ROWS)
        own = torch.arange(ROWS)
        labels = torch.randint(CLASSES, (ROWS,))
        fields = {
            "text.ids": torch.randint(1000, (ROWS, TOKENS)),
            "text.length": torch.full((ROWS,), TOKENS),
            "text.sequence": own,
        }
        target = Target(own[:, None], task, row, labels)
        batches.append(Batch(fields, {"classify": target}, task, row, ROWS))
    return batches


def objective(model: Model, batch: Batch) -> Terms:
    target = batch.targets["classify"]
    logits = model.logits(batch.fields["text.ids"], target.task)
    losses = functional.cross_entropy(logits, target.value, reduction="none")
    return Terms({"ce": losses}, {"ce": target.task}, {"ce": target.row})


def by_hand(
    model: Model, batches: list[Batch], steps: int, log_every: int, clock: Clock
) -> Callable[[], float]:
    """The loop as one writes it; with several tasks it logs each task's mean loss."""
    total = LEAD + steps

    def run() -> float:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1 - s / total)
        model.train()
        begun = 0.0
        for step in range(total):
            if step == LEAD:
                begun = clock()
            batch = batches[step % len(batches)]
            target = batch.targets["classify"]
            logits = model.logits(batch.fields["text.ids"], target.task)
            losses = functional.cross_entropy(logits, target.value, reduction="none")
            losses.mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step % log_every == 0:
                one = torch.zeros(model.tasks).index_add_(0, target.task, losses.detach())
                (one / torch.bincount(target.task, minlength=model.tasks)).tolist()
        return clock() - begun

    return run


def ours(
    model: Model, batches: list[Batch], steps: int, log_every: int, clock: Clock, home: Path
) -> Callable[[], float]:
    names = [f"task {t}" for t in range(model.tasks)]
    config = TrainConfig(
        steps=LEAD + steps,
        batch_size=ROWS,
        lr=1e-4,
        schedule="linear",
        warmup=0,
        log_every=log_every,
        checkpoint_every=0,
        progress=False,
        device="cpu",
    )

    def run() -> float:
        times: dict[int, float] = {}

        def note(trainer: Trainer, step: int) -> None:
            if step in (LEAD, LEAD + steps):
                times[step] = clock()

        loader = FunctionLoader(names, lambda index: batches[index % len(batches)])
        with tempfile.TemporaryDirectory(dir=home) as folder:
            Trainer(model, loader, config, folder, objective, callbacks=[note]).fit()
        return times[LEAD + steps] - times[LEAD]

    return run


def transformers_trainer(
    model: Model, batches: list[Batch], steps: int, clock: Clock, home: Path
) -> Callable[[], float]:
    from transformers import Trainer as Peer
    from transformers import TrainerCallback, TrainingArguments

    ready = [
        {
            "input_ids": batch.fields["text.ids"],
            "task": batch.targets["classify"].task,
            "labels": batch.targets["classify"].value,
        }
        for batch in batches
    ]
    data = [ready[step % len(ready)] for step in range(LEAD + steps)]
    settings = TrainingArguments(
        output_dir=str(home / "peer"),
        per_device_train_batch_size=1,  # an entry of the data is a whole batch
        max_steps=LEAD + steps,
        learning_rate=1e-4,
        optim="adamw_torch_fused",
        max_grad_norm=1.0,
        lr_scheduler_type="linear",
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=True,
    )

    def run() -> float:
        times: dict[int, float] = {}

        class Note(TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
                if state.global_step in (LEAD, LEAD + steps):
                    times[state.global_step] = clock()

        peer = Peer(
            model=model,
            args=settings,
            train_dataset=data,
            data_collator=lambda rows: rows[0],
            callbacks=[Note()],
        )
        peer.log = lambda *_, **__: None  # it prints; ours writes a file
        peer.train()
        return times[LEAD + steps] - times[LEAD]

    return run


CASES = ((32, 1, 10, 50), (128, 1, 10, 16), (128, 8, 1, 16))  # hidden, tasks, log_every, steps


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = options_of(__doc__, argv)
    packages = ("torch", "transformers", "accelerate")
    found: dict[str, Any] = {"versions": show_versions(packages)}
    rows = []
    for hidden, tasks, log_every, steps in CASES:
        model, batches = Model(hidden, tasks), some_batches(tasks)
        with tempfile.TemporaryDirectory() as folder:
            home = Path(folder)
            common = (model, batches, steps, log_every, options.clock)
            runs = {"by hand": by_hand(*common), "polytask": ours(*common, home)}
            if tasks == 1:
                runs["transformers.Trainer"] = transformers_trainer(
                    model, batches, steps, options.clock, home
                )
            medians = compare(runs, options.repeats).medians
        rows += [
            {
                "hidden": hidden,
                "tasks": tasks,
                "way": way,
                "ms_per_step": seconds / steps * 1e3,
                "ms_over_by_hand": (seconds - medians["by hand"]) / steps * 1e3,
                "throughput": medians["by hand"] / seconds,
            }
            for way, seconds in medians.items()
        ]
    found["trainer"] = rows
    show(found, options)
    return found


def aims(found: dict[str, Any]) -> list[Aim]:
    return [
        Aim(
            f"{row['hidden']} wide, {row['tasks']} task(s): throughput over a hand-written loop",
            row["throughput"],
            at_least=0.97,
        )
        for row in found["trainer"]
        if row["way"] == "polytask"
    ]


if __name__ == "__main__":
    main()
