"""Training on windows: the trainer's loop over batches that are a function of their number."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from polytask import rng
from polytask.data.spike_windows import SpikeWindows
from polytask.errors import DataError, UserError
from polytask.models.neuro.batch import NeuroBatch
from polytask.models.neuro.model import NeuroformerModel
from polytask.objectives.neuro import NeuroLoss, token_scores
from polytask.train.config import EarlyStopping, StageConfig, TrainConfig
from polytask.train.loader import FunctionLoader
from polytask.train.trainer import Trainer, TrainResult

Ints = NDArray[np.int64]
Units = Mapping[str, tuple[float, float]]  # variable -> mean and deviation
CHUNK = 256  # windows that are scored at once


class WindowStore:
    """Batches of a recording's windows, behaviour in units of its train windows.

    Tokens of all windows are made once; frames are fetched batch by batch.
    """

    def __init__(self, windows: SpikeWindows, units: Units, trim: bool) -> None:
        self.windows, self.units, self.trim = windows, dict(units), trim
        self._held: NeuroBatch | None = None

    def batch(self, indices: Ints) -> NeuroBatch:
        """The windows with these indices."""
        if self.windows.frame_count:
            found = self._scaled(NeuroBatch.of(self.windows.batch(indices)))
        else:
            if self._held is None:
                every = np.arange(len(self.windows))
                self._held = self._scaled(NeuroBatch.of(self.windows.batch(every)))
            found = self._held.take(torch.from_numpy(np.asarray(indices, np.int64)))
        return found.trimmed(self.windows.tokenizer.pad) if self.trim else found

    def chunks(self, indices: Ints, size: int = CHUNK) -> Any:
        """All of them, `size` at a time."""
        for at in range(0, len(indices), size):
            yield self.batch(indices[at : at + size])

    def _scaled(self, batch: NeuroBatch) -> NeuroBatch:
        from dataclasses import replace

        def table(values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {
                name: (v - self.units[name][0]) / self.units[name][1] if name in self.units else v
                for name, v in values.items()
            }

        return replace(batch, behavior=table(batch.behavior), targets=table(batch.targets))


class WindowLoader(FunctionLoader):
    """Batch i of windows: every window once an epoch, in an order of that epoch's own."""

    def __init__(self, store: WindowStore, rows: Ints, batch_size: int, seed: int) -> None:
        super().__init__(("windows",), self._take, len(rows))
        self.store, self.rows, self.size, self.seed = store, rows, batch_size, seed
        self._order: dict[int, Ints] = {}

    def _take(self, index: int) -> NeuroBatch:
        place = np.arange(index * self.size, (index + 1) * self.size)
        epoch, within = np.divmod(place, len(self.rows))
        chosen = np.array([self._epoch(int(e))[w] for e, w in zip(epoch, within, strict=True)])
        return self.store.batch(self.rows[chosen])

    def _epoch(self, number: int) -> Ints:
        if number not in self._order:
            draw = rng.generator(self.seed, "windows of an epoch", number)
            self._order = {k: v for k, v in self._order.items() if k >= number - 1}
            self._order[number] = draw.permutation(len(self.rows))
        return self._order[number]


class Judge:
    """Cross-entropies and target losses on held-out windows: an evaluator of `Trainer`."""

    def __init__(self, store: WindowStore, rows: Ints, losses: tuple[str, ...]) -> None:
        self.store, self.rows, self.losses = store, rows, losses

    def __call__(self, model: Any, step: int) -> dict[str, dict[str, float]]:
        device = next(model.parameters()).device
        found = token_scores(model, (b.to(device) for b in self.store.chunks(self.rows)))
        c = model.config
        shares = {"id": c.spike_weight * c.id_share, "time": c.spike_weight * (1 - c.id_share)}
        shares |= {name: c.target_weights.get(name, 1.0) for name in c.targets}
        used = [n for n in shares if n in found and (not self.losses or n in self.losses)]
        found["loss"] = sum(shares[n] * found[n] for n in used)
        return {"windows": found}


def fit(
    model: NeuroformerModel,
    store: WindowStore,
    rows: Ints,
    *,
    steps: int,
    batch_size: int = 64,
    lr: float = 2e-3,
    weight_decay: float = 0.05,
    warmup: float | int = 0.1,
    seed: int = 0,
    losses: tuple[str, ...] = (),
    train: tuple[str, ...] = ("*",),
    held_out: Ints | None = None,
    looks: int = 10,
    folder: Path | None = None,
    device: str = "auto",
    precision: Literal["fp32", "bf16"] = "fp32",
    progress: bool = False,
) -> TrainResult:
    """Train in place with AdamW (betas .9, .95), warm-up, a cosine to 10 %, clipping at 1.

    Args:
        rows: windows to learn from; a batch holds each at most once unless there are fewer.
        losses: terms to learn from; empty: all.
        train: patterns of the parameters that learn.
        held_out: windows whose loss is looked at `looks` times; the best weights are kept.
        folder: run folder (metrics, checkpoints) in which an interrupted training resumes and then
            equals the uninterrupted one bit for bit. None keeps nothing.

    Raises:
        DataError: there is no window to learn from.
        UserError: a loss that does not exist, or a batch of one with alignment, before any step.
    """
    if not len(rows):
        raise DataError(
            "there is no window to train on: the recording or the fraction is too short"
        )
    size = min(batch_size, len(rows))
    aligned = bool(model.config.align) and (not losses or "align" in losses)
    if model.config.align and size < 2:
        raise UserError("alignment needs batches of at least 2 windows; raise batch_size")
    config = TrainConfig(
        stages=(StageConfig(name="fit", steps=steps, train=train),),
        batch_size=size,
        seed=seed,
        device=device,
        precision=precision,
        lr=lr,
        schedule="cosine",
        warmup=warmup,
        floor=0.1,
        betas=(0.9, 0.95),
        weight_decay=weight_decay,
        no_decay=_undecayed(model),
        log_every=max(1, min(25, steps)),
        checkpoint_every=0 if folder is None else max(50, steps // 5),
        evaluate_every=0 if held_out is None else max(1, steps // looks),
        early_stopping=None if held_out is None else _stopping(looks),
        keep=1,
        progress=progress,
    )
    loader = WindowLoader(store, rows, size, seed)
    NeuroLoss(losses)(model, loader.batch(0)[0].to(next(model.parameters()).device))  # faults now
    judge = None if held_out is None else Judge(store, held_out, losses)
    place = tempfile.TemporaryDirectory() if folder is None else nullcontext(str(folder))
    identity = {"model": model.config.model_dump(mode="json"), "aligned": aligned}
    with place as run:
        result = Trainer(
            model, loader, config, run, NeuroLoss(losses), judge, identity=identity
        ).fit()
    model.requires_grad_(True)
    model.eval()
    if result.stopped == "interrupted":
        kept = "nothing is kept" if folder is None else f"start again to go on in {folder}"
        raise UserError(f"training was interrupted at step {result.step} of {steps}; {kept}")
    return result


def _undecayed(model: NeuroformerModel) -> tuple[str, ...]:
    """Weight decay is for linear maps only."""
    names = ("table.weight", "*.place")
    return names if model.video is None else (*names, "video.conv.weight")


def _stopping(looks: int) -> EarlyStopping:
    """Never stops; the best weights are kept."""
    return EarlyStopping(metric="loss", patience=looks + 1, higher_is_better=False)
