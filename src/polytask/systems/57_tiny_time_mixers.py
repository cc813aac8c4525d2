"""57 TTM: a mixer under a million parameters, pretrained once, forecasts series it never saw.

Ekambaram et al. 2024, arXiv 2401.03955. Every channel is an independent window: instance norm,
patches, a token for the resolution, mixers at several patch sizes, a light decoder. Pretraining
mixes data sets and their downsampled copies; few-shot tuning freezes the backbone.

Proved on whole real sets that pretraining never saw: without training against the seasonal naive
forecast, with 5 % of a set's windows against the same network from scratch, each part of the
recipe taken out in turn, and known-future controls with a test that no target leaks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from polytask import rng
from polytask.data.windows import Record, WindowSet
from polytask.infer.series_training import ForecastLoss, train_mixer
from polytask.models.ttm import TinyTimeMixer, TTMConfig
from polytask.study import Arm, Budget, Claim, Evidence, Result, Size
from polytask.study.judge import judge_all
from polytask.systems import card as card_of
from polytask.systems.base import Outcome, Say
from polytask.systems.testbeds import series as bed
from polytask.systems.testbeds import series_exogenous as exogenous
from polytask.systems.testbeds.series_rivals import DLinear, theta
from polytask.systems.ttm_run import TTMRunConfig, ttm_run

MODEL = TTMConfig(
    context_length=bed.CONTEXT,
    prediction_length=bed.HORIZON,
    patch_length=12,
    patch_stride=12,
    d_model=48,
    decoder_d_model=24,
    adaptive_patching_levels=2,
    resolution_prefix_tuning=True,
    frequency_token_vocab_size=14,
    dropout=0.1,
    head_dropout=0.1,
)
# No levels means `num_layers` plain layers; three have about the parameters of 2 + 2 in two levels.
ABLATIONS: Mapping[str, dict[str, Any]] = {
    "no-instance-norm": {"instance_norm": False},
    "no-levels": {"adaptive_patching_levels": 0, "num_layers": 3},
    "shuffled-prefix": {},
    "no-downsampling": {},
}
LOSS = ForecastLoss("huber", scaled=False)
BATCH, TUNING_STEPS = 128, 60
TUNED = ("few-shot", "scratch", "dlinear-5%", "dlinear-100%")
NAMES = ("zero-shot", *TUNED, "seasonal-naive", "theta", *ABLATIONS)


@dataclass(frozen=True)
class Trial:
    """One arm over all held-out sets."""

    name: str
    smoke: bool = False

    def __call__(self, seed: int, budget: Budget) -> Result:
        sets = bed.held_out(self.smoke)
        fitted = self._pretrained(seed, int(budget.steps or 1))
        tuned = self.name in TUNED
        steps = (3 if self.smoke else TUNING_STEPS) if tuned else 0
        found, rows = {}, 0
        for part in sets:
            if self.name == "seasonal-naive":
                found[part.name] = part.naive()
            elif self.name == "theta":
                found[part.name] = theta(part)
            else:
                model = self._tune(fitted, part, seed, steps) if tuned else fitted
                found[part.name] = forecast(model, part, self.name == "shuffled-prefix")
                rows += steps * BATCH
        metrics = score(sets, found)
        if not self.smoke:
            metrics |= bed.m3_official(found["m3-monthly"])
        count = sum(p.numel() for p in fitted.parameters()) if fitted is not None else 0
        points = 0 if self.name in RIVALS else int(budget.steps or 1) * BATCH * bed.CONTEXT
        spent = Budget(steps=steps * len(sets), rows=rows, tokens=points)
        return Result(dict(metrics), spent, {"parameters": count})

    def _pretrained(self, seed: int, steps: int) -> nn.Module | None:
        if self.name in ("seasonal-naive", "theta"):
            return None
        torch.manual_seed(rng.derive(seed, "init"))
        if self.name.startswith("dlinear"):
            return DLinear()
        model = TinyTimeMixer(MODEL.model_copy(update=ABLATIONS.get(self.name, {})))
        if self.name == "scratch":
            return model
        sets = bed.pretraining(seed, self.name != "no-downsampling", self.smoke)
        if self.name == "shuffled-prefix":
            sets = {k: shuffle_tokens(r, seed, k) for k, r in sets.items()}
        windows = WindowSet(sets, bed.CONTEXT, bed.HORIZON)
        train_mixer(
            model,
            windows,
            steps=steps,
            batch_size=BATCH,
            lr=3e-3,
            seed=seed,
            loss=LOSS,
            device="cpu",
        )
        return model

    def _tune(self, start: Any, part: bed.HeldOut, seed: int, steps: int) -> nn.Module:
        """On 5 % (or all) of the training windows of a set; few-shot keeps the backbone."""
        model: nn.Module = DLinear() if isinstance(start, DLinear) else TinyTimeMixer(start.config)
        model.load_state_dict(start.state_dict())
        records = [pad_future(r, bed.HORIZON - part.horizon) for r in part.train]
        whole = WindowSet({part.name: records}, bed.CONTEXT, bed.HORIZON, shortest=8)
        share = 1.0 if self.name.endswith("100%") else 0.05
        windows = Subset(whole, share, seed)
        frozen = ("backbone.*",) if self.name == "few-shot" else ()
        train_mixer(
            model,
            windows,
            steps=steps,
            batch_size=BATCH,
            lr=1e-3,
            seed=seed,
            loss=LOSS,
            freeze=frozen,
            device="cpu",
        )
        return model


RIVALS = ("seasonal-naive", "theta", "scratch", "dlinear-5%", "dlinear-100%")


class Subset:
    """A share of a set's windows, the same for every arm of a seed, at least eight."""

    def __init__(self, windows: WindowSet, share: float, seed: int) -> None:
        self.windows, self.names = windows, windows.names
        count = max(8, round(windows.sizes[0] * share))
        order = rng.generator(seed, "few", windows.names[0]).permutation(windows.sizes[0])
        self.chosen = np.sort(order[:count]).astype(np.int64)
        self.sizes: tuple[int, ...] = (len(self.chosen),)

    def gather(self, dataset: Any, index: Any) -> Any:
        """Window number `index` of the share."""
        return self.windows.gather(dataset, self.chosen[index])


def pad_future(record: Record, steps: int) -> Record:
    """Unknown steps at the end, so that a shorter horizon fits the model's; they are masked."""
    return Record(
        np.pad(record.values, ((0, steps), (0, 0)), constant_values=np.nan), record.frequency
    )


def shuffle_tokens(records: list[Record], seed: int, name: str) -> list[Record]:
    """Every series with the frequency (so the token) of a random resolution."""
    from polytask.data.calendar import TOKENS, Frequency

    names = [n for n in TOKENS if n != "other"]
    drawn = rng.generator(seed, "shuffle", name).integers(0, len(names), len(records))
    return [replace(r, frequency=Frequency.named(names[k])) for r, k in zip(records, drawn)]


@torch.no_grad()
def forecast(model: Any, part: bed.HeldOut, shuffled: bool = False) -> bed.Floats:
    """(n, HORIZON, 1) of all test windows, in evaluation mode."""
    model.eval()
    token = torch.full((len(part.past),), part.frequency.token)
    if shuffled:
        generator = rng.torch_generator(0, "shuffled", part.name)
        token = torch.randint(1, 14, (len(part.past),), generator=generator)
    out = model(torch.from_numpy(part.past), frequency=token)["forecast"]
    return np.asarray(out.numpy())


def score(sets: tuple[bed.HeldOut, ...], found: Mapping[str, bed.Floats]) -> dict[str, float]:
    """mse: geometric mean over sets of the error relative to the seasonal naive forecast (1 is as
    good); mse_unseen: over resolutions never given as such; won: share of sets below 1."""
    ratios = {p.name: p.mse(found[p.name]) / p.mse(p.naive()) for p in sets}
    unseen = [ratios[p.name] for p in sets if p.unseen]
    metrics = {"mse": geometric(list(ratios.values())), "mse_unseen": geometric(unseen)}
    metrics["won"] = sum(r < 1 for r in ratios.values()) / len(ratios)
    return metrics | {f"mse {p.name}": p.mse(found[p.name]) for p in sets}


def geometric(values: list[float]) -> float:
    return math.exp(sum(math.log(v) for v in values) / len(values))


class TTMSystem:
    """The card's claim, its arms, and the method on one's own series."""

    card = card_of("57")
    config = TTMRunConfig
    notes: Mapping[str, Any] = {
        "held out": "m3-monthly, m3-quarterly, sf-temps, seattle-weather, elnino, co2, sunspots; "
        "pretraining series that share a run of values with them are left out",
        "mse": "on standardised values, relative to the seasonal naive forecast, geometric mean",
        "budget": "steps and rows are those of adaptation to the held-out sets; tokens are the "
        "points of pretraining",
        "tuning": "none: every arm has the settings it was first given",
    }

    @property
    def claims(self) -> tuple[Claim, ...]:
        """The sheet's pass lines."""
        none, same = {"steps": 0.0, "rows": 0.0}, {"steps": 0.0, "rows": 0.0}
        pre = {"steps": 0.0, "tokens": 0.0}
        low: dict[str, Any] = {"higher_is_better": False}
        cut: dict[str, Any] = {**low, "kind": "ablation", "equal": pre}
        return (
            Claim("zero-shot", "seasonal-naive", "mse", **low, equal=none),
            Claim("zero-shot", "seasonal-naive", "won", margin=0.69, equal=none),
            Claim("zero-shot", "scratch", "mse", **low, equal=same, than_may_spend_more=True),
            Claim("few-shot", "scratch", "mse", **low, equal=same),
            Claim(
                "exogenous",
                "exogenous-blind",
                "exogenous_log_mse",
                margin=-math.log(0.7),
                **low,
                equal=same,
            ),
            Claim("zero-shot", "no-instance-norm", "mse", **cut),
            Claim("zero-shot", "no-levels", "mse", **cut),
            Claim("zero-shot", "shuffled-prefix", "mse", **cut),
            Claim("zero-shot", "no-downsampling", "mse_unseen", **cut),
        )

    def budget(self, size: Size) -> Budget:
        """Steps of pretraining, 128 windows each."""
        return Budget(steps=1500 if size == "full" else 2)

    def arms(self, size: Size) -> Mapping[str, Arm]:
        smoke = size == "smoke"
        found = {
            n: Arm(n, Trial(n, smoke), {"arm": n, "tuning_steps": TUNING_STEPS}) for n in NAMES
        }
        if smoke:
            del found["theta"]  # needs an extra
        for name in ("exogenous", "exogenous-blind"):
            found[name] = Arm(name, exogenous.Trial(name == "exogenous", smoke), {"arm": name})
        return found

    def reported(self, evidence: Evidence) -> list[str]:
        """Compared but not claimed: strong baselines that train on each set."""
        low: dict[str, Any] = {"higher_is_better": False, "equal": {}}
        extra = [Claim("zero-shot", "theta", "mse", **low)]
        extra += [
            Claim("few-shot", n, "mse", **low) for n in ("dlinear-5%", "dlinear-100%", "theta")
        ]
        extra.append(Claim("zero-shot", "theta", "m3_smape", **low))
        extra = [claim for claim in extra if claim.than in evidence.arms]
        if evidence.size == "smoke":
            extra = [claim for claim in extra if claim.metric == "mse"]
        judged = judge_all(extra, evidence.arms, "none", evidence.size == "full")
        return [judgement.sentence for judgement in judged]

    def run(self, config: TTMRunConfig, say: Say = print) -> Outcome:
        """On the user's table: forecast, backtest, page and model."""
        return ttm_run(config, say)


system = TTMSystem()
