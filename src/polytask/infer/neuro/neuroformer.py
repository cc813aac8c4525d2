"""A Neuroformer on a recording: pretrain, finetune, generate, decode, read out, keep.

    >>> neuro = Neuroformer(recording, targets={"speed": "regression"})       # doctest: +SKIP
    >>> neuro.pretrain(steps=900)                                             # doctest: +SKIP
    >>> neuro.finetune("speed", fraction=0.01)                                # doctest: +SKIP
    >>> neuro.decode("speed").r                                               # doctest: +SKIP
    >>> neuro.generate(trials=5, horizon=20)                                  # doctest: +SKIP
    >>> neuro.connectivity("mean").mean                                       # doctest: +SKIP

Everything is judged on the last fifth of the recording by default, which training never sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from polytask import rng
from polytask.configs import parse
from polytask.data.spikes import Recording
from polytask.errors import ConfigError, DataError, UserError, suggestion
from polytask.infer.neuro import readouts, runs, saving
from polytask.infer.neuro.generate import Draw, EventGenerator
from polytask.infer.neuro.runs import Generated
from polytask.infer.neuro.settings import NeuroSettings, model_config, windows_of
from polytask.infer.neuro.training import Units, WindowStore, fit
from polytask.models.neuro.model import NeuroformerModel
from polytask.objectives.neuro import token_scores

Ints = NDArray[np.int64]
Where = str | Sequence[int] | Ints  # 'train', 'val', 'test', 'all', or window indices


@dataclass(frozen=True)
class Decoded:
    """A target on W windows: `start` (W,) bins, `value` and `truth` (W,) in the recording's units
    (classes as codes). `r`, `r2` of a regression, `accuracy` of a classification; else NaN."""

    name: str
    start: Ints
    value: NDArray[Any]
    truth: NDArray[Any]
    r: float = float("nan")
    r2: float = float("nan")
    accuracy: float = float("nan")


class Neuroformer:
    """See the module's text.

    Args:
        recording: spikes, and whatever frames and behaviour go with them.
        settings: `NeuroSettings`, or its fields as keyword arguments.
        seed: of weights, batches, dropout and drawn spikes.
        device: 'auto' takes the accelerator there is.

    Raises:
        ConfigError, DataError: the settings do not fit each other or the recording.
    """

    def __init__(
        self,
        recording: Recording,
        settings: NeuroSettings | None = None,
        *,
        seed: int = 0,
        device: str = "auto",
        **fields: Any,
    ) -> None:
        if settings is not None and fields:
            raise ConfigError(f"give settings or their fields ({', '.join(fields)}), not both")
        self.settings = settings or parse(NeuroSettings, fields, "Neuroformer")
        self.seed, self.device = seed, device
        self.recording = recording
        self.windows = windows_of(recording, self.settings, seed)
        self.units: Units = self._units()
        self.model = NeuroformerModel(model_config(self.windows, self.settings), seed).eval()
        self.store = WindowStore(self.windows, self.units, self.model.config.mask_pad)
        self.history: list[dict[str, Any]] = []

    def _units(self) -> dict[str, tuple[float, float]]:
        names = [name for group in self.settings.inputs.values() for name in group]
        names += [n for n, kind in self.settings.targets.items() if kind == "regression"]
        return {name: self.windows.scale(name) for name in names}

    # Training ------------------------------------------------------------------------------------

    def pretrain(
        self,
        steps: int = 900,
        *,
        losses: Sequence[str] | None = None,
        batch_size: int = 64,
        lr: float = 2e-3,
        validate: bool = True,
        folder: Path | str | None = None,
        **options: Any,
    ) -> Neuroformer:
        """Learn to predict spikes (and to align, where `align` is set) on the train windows.

        Args:
            losses: terms to learn from; None: 'id', 'time' and 'align'. Name targets as well to
                train jointly.
            validate: look at the loss of the validation windows and keep the best weights.
            folder: run folder, in which an interrupted training resumes.
            options: of `polytask.infer.neuro.training.fit`.
        """
        if losses is None:
            losses = ("id", "time", "align") if self.model.config.align else ("id", "time")
        return self._fit("pretrain", self.windows.train, steps, losses, ("*",), batch_size, lr,
                         validate, folder, options)  # fmt: skip

    def finetune(
        self,
        *losses: str,
        fraction: float = 0.01,
        train: Literal["head", "all"] = "all",
        steps: int = 200,
        batch_size: int = 64,
        lr: float = 1e-3,
        validate: bool = False,
        folder: Path | str | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> Neuroformer:
        """Learn from a few windows: a share of the train windows, drawn once by `seed`.

        Args:
            losses: terms to learn from, as 'speed'; none named: all targets.
            train: 'head' leaves everything but the targets' heads as it is.

        Raises:
            UserError: a loss that is no target of this model (nor 'id', 'time', 'align').
        """
        names = tuple(losses) or tuple(self.model.config.targets)
        known = ("id", "time", "align", *self.model.config.targets)
        if not names:
            raise UserError("finetune: this model has no target; give targets={'speed': ...}")
        for name in names:
            if name not in known:
                raise UserError(f"finetune: '{name}' is no loss here.{suggestion(name, known)}")
        if train not in ("head", "all"):
            raise UserError(f"finetune: train = '{train}' is neither 'head' nor 'all'")
        heads = tuple(f"heads.{n}.*" for n in names if n in self.model.config.targets)
        if train == "head" and not heads:
            raise UserError("finetune: train='head' needs a target among the losses")
        rows = self.windows.subset(fraction, self.seed if seed is None else seed)
        patterns = heads if train == "head" else ("*",)
        return self._fit("finetune", rows, steps, names, patterns, batch_size, lr, validate,
                         folder, options)  # fmt: skip

    def _fit(
        self,
        stage: str,
        rows: Ints,
        steps: int,
        losses: Sequence[str],
        train: tuple[str, ...],
        batch_size: int,
        lr: float,
        validate: bool,
        folder: Path | str | None,
        options: dict[str, Any],
    ) -> Neuroformer:
        held_out = self.windows.val if validate and len(self.windows.val) else None
        found = fit(
            self.model,
            self.store,
            rows,
            steps=steps,
            losses=tuple(losses),
            train=train,
            batch_size=batch_size,
            lr=lr,
            held_out=held_out,
            folder=None if folder is None else Path(folder),
            device=self.device,
            seed=rng.derive(self.seed, stage, len(self.history)),
            **options,
        )
        self.history.append(
            {
                "stage": stage,
                "windows": len(rows),
                "steps": found.step,
                "losses": list(losses),
                "lr": lr,
                "best_step": found.best_step,
            }
        )
        return self

    # Use -----------------------------------------------------------------------------------------

    def indices(self, where: Where = "test") -> Ints:
        """Window indices of a split, of 'all', or as given."""
        if isinstance(where, str):
            return np.arange(len(self.windows)) if where == "all" else self.windows.part(where)
        return np.sort(np.asarray(where, np.int64))

    def score(self, where: Where = "test", shuffled: bool = False) -> dict[str, float]:
        """Cross-entropy of the next 'id' and 'time' in nats per token, and losses of targets.

        `shuffled`: with the past of another window of the same split, a control: neighbours within
        a bin are sorted, so a loss looks good without any past.
        """
        rows = self.indices(where)
        batches = self._batches(rows)
        if shuffled:
            batches = self._strangers(rows)
        return token_scores(self.model, batches)

    def decode(self, name: str, where: Where = "test") -> Decoded:
        """A target on held-out windows.

        Raises:
            UserError: the model has no such target.
        """
        targets = self.model.config.targets
        if name not in targets:
            raise UserError(f"decode: no target '{name}'.{suggestion(name, targets)}")
        rows, found, truth = self.indices(where), [], []
        with torch.no_grad():
            for batch in self._batches(rows):
                found.append(self.model.answer(self.model(batch), name).float().cpu())
                truth.append(batch.targets[name].cpu())
        answer, true = torch.cat(found).numpy(), torch.cat(truth).numpy()
        start = self.windows.starts[rows]
        if targets[name].kind == "classification":
            guess = answer.argmax(1)
            return Decoded(name, start, guess, true, accuracy=float((guess == true).mean()))
        loc, scale = self.units[name]
        value, true = answer[:, 0] * scale + loc, true * scale + loc
        return Decoded(name, start, value, true, *agreement(value, true))

    def generate(
        self,
        where: Where = "test",
        *,
        trials: int = 1,
        true_past: bool = False,
        horizon: int | None = None,
        seed: int | None = None,
        ensemble: Sequence[Neuroformer] = (),
        **draw: Any,
    ) -> Generated:
        """Spikes of some windows, drawn from the model.

        Args:
            true_past: every window after its recorded past; else after what was drawn before it.
            horizon: windows that run freely before starting again from the record; None: all
                neighbouring ones.
            ensemble: further models of the same recording; logits are averaged.
            draw: fields of `Draw` (temperatures, top_k, top_p, greedy, official).
        """
        if trials < 1 or (horizon is not None and horizon < 1):
            raise UserError(f"generate: trials = {trials}, horizon = {horizon}: both at least 1")
        rows = self.indices(where)
        if not len(rows):
            raise DataError("generate: there is no window to generate")
        options = parse(Draw, {"official": self.settings.official, **draw}, "generate").checked()
        models = [self.model, *(other.model for other in ensemble)]
        tok = self.windows.tokenizer
        generator = EventGenerator(models, tok, options)
        seed = self.seed if seed is None else seed
        if true_past:
            tokens = runs.true_ahead(generator, self.store, rows, trials, seed)
        elif options.official:
            tokens = runs.turned_ahead(generator, self.store, rows, trials, seed)
        else:
            tokens = runs.free_run(generator, self.store, rows, trials, seed, horizon)
        return runs.collected(*tokens, self.windows.starts[rows], tok, options.official)

    def connectivity(
        self, kind: readouts.Kind = "mean", where: Where = "all"
    ) -> readouts.Connectivity:
        """Directed readout [target, source]; `.mean` is the one to use, `.total` counts rates."""
        return readouts.connectivity(self.model, self._batches(self.indices(where)), kind)

    def attribution(self, where: Where = "test") -> NDArray[np.float32]:
        """(T, H, W) mean share of pixels of the frames before a window in driving its spikes."""
        parts, count = [], 0
        for batch in self._batches(self.indices(where), 64):
            parts.append(readouts.stimulus_attribution(self.model, batch).sum(0))
            count += len(batch)
        if not count:
            raise DataError("attribution: there is no window")
        found: NDArray[np.float32] = (torch.stack(parts).sum(0) / count).cpu().numpy()
        return found

    def embed(self, where: Where = "test") -> dict[str, NDArray[np.float32]]:
        """(W, E) unit vectors of the aligned modalities; without alignment 'spikes' alone, the mean
        state of each window."""
        found: dict[str, list[torch.Tensor]] = {}
        with torch.no_grad():
            for batch in self._batches(self.indices(where)):
                out = self.model(batch)
                if self.model.config.align:
                    vectors = self.model.vectors(out)
                else:
                    vectors = {"spikes": self.model.pooled(out.hidden, out.valid)}
                for name, vector in vectors.items():
                    found.setdefault(name, []).append(vector.float().cpu())
        return {name: torch.cat(parts).numpy() for name, parts in found.items()}

    def _batches(self, rows: Ints, size: int = 256) -> Any:
        device = next(self.model.parameters()).device
        return (batch.to(device) for batch in self.store.chunks(rows, size))

    def _strangers(self, rows: Ints) -> Any:
        from dataclasses import replace

        other = rows[rng.generator(self.seed, "shuffled past").permutation(len(rows))]
        for mine, theirs in zip(self._batches(rows), self._batches(other), strict=True):
            yield replace(mine, past_ids=theirs.past_ids, past_times=theirs.past_times)

    # Files ---------------------------------------------------------------------------------------

    def save(self, folder: Path | str) -> Path:
        """Weights (safetensors) and settings (JSON), whole or not at all. The data stay outside."""
        return saving.save(self, Path(folder))

    @classmethod
    def load(cls, folder: Path | str, recording: Recording, device: str = "auto") -> Neuroformer:
        """What `save` wrote, on the same recording or another of the same units."""
        return saving.load(cls, Path(folder), recording, device)


def agreement(value: NDArray[Any], truth: NDArray[Any]) -> tuple[float, float]:
    """Pearson r and R2; NaN where the truth is constant, r = 0 for a constant answer."""
    spread = float(np.var(truth))
    if spread == 0 or len(truth) < 2:
        return float("nan"), float("nan")
    r2 = 1 - float(np.mean((truth - value) ** 2)) / spread
    if float(np.var(value)) == 0:
        return 0.0, r2
    return float(np.corrcoef(value, truth)[0, 1]), r2
