"""What the arms of Neuroformer's proof are judged by, and the arms that learn nothing.

auroc      the readout's area under the curve for true edges p -> y, self-edges left out
speed_r    Pearson's r of decoded speed on held-out windows
f1, cell_r activity of held-out windows one window ahead: F1 of the sets of firing units, and
           Pearson's r over all cells of the (window, unit) table of counts, means over trials
id_ce      cross-entropy of the next unit on held-out windows, nats
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from polytask.data.circuits import Circuit
from polytask.evaluate.spikes import edge_scores, population_scores
from polytask.infer.neuro.neuroformer import Neuroformer, agreement
from polytask.rng import generator
from polytask.systems.testbeds import neuro_rivals as rivals
from polytask.systems.testbeds.neuro_models import Plan

Metrics = dict[str, float | None]
GLM_BINS = 20_000  # 200 s: its area is near 1 from there on
LAGS = 12  # bins of 10 ms: all delays and a bin more


def connection_scores(neuro: Neuroformer, circuit: Circuit, plan: Plan) -> Metrics:
    """AUROCs of the three readouts, forward and transposed, and of the unnormalised sums."""
    found: Metrics = {}
    for kind in ("mean", "rollout", "ablation"):
        rows = neuro.indices("all")
        if kind == "ablation":
            rows = rows[: plan.ablation_windows]
        readout = neuro.connectivity(kind, rows)  # type: ignore[arg-type]
        score = np.abs(readout.mean) if kind == "ablation" else readout.mean
        edges = edge_scores(score, circuit.edges)
        name = "auroc" if kind == "mean" else f"{kind} auroc"
        found |= {name: edges.forward, f"{name} transposed": edges.transposed}
        if kind == "mean":
            found["raw auroc"] = edge_scores(readout.total, circuit.edges).forward
    return found


def turned(neuro: Neuroformer, circuit: Circuit) -> Metrics:
    """The readout judged by the graph with its arrows reversed."""
    readout = neuro.connectivity("mean", "all").mean
    return {"auroc": edge_scores(readout, circuit.edges).transposed}


def permuted(neuro: Neuroformer, circuit: Circuit, seed: int) -> Metrics:
    """The readout with the names of the neurons dealt out anew; mean over 20 deals."""
    readout = neuro.connectivity("mean", "all").mean
    found = []
    for deal in range(20):
        order = generator(seed, "permuted names", deal).permutation(len(readout))
        found.append(edge_scores(readout[np.ix_(order, order)], circuit.edges).forward)
    return {"auroc": float(np.mean(found))}


def correlation_scores(circuit: Circuit, name: str) -> Metrics:
    """Rivals that read the spikes themselves: 'lag 0', 'lag 1' (windows of 50 ms), 'peak', 'glm'
    (bins of 10 ms)."""
    recording = circuit.recording
    if name in ("lag 0", "lag 1"):
        score = rivals.lag_correlation(rivals.binned(recording, 5), int(name[-1]))
    elif name == "peak":
        score = rivals.peak_correlation(rivals.binned(recording, 1), LAGS)
    else:
        counts = rivals.binned(recording, 1)[:, :GLM_BINS]
        score = rivals.fit_glm(counts, LAGS).score
    edges = edge_scores(np.abs(score), circuit.edges)
    return {"auroc": edges.forward, "auroc transposed": edges.transposed}


def token_losses(neuro: Neuroformer) -> Metrics:
    """Cross-entropies on held-out windows, with the recorded past and a strange one."""
    own, strange = neuro.score("test"), neuro.score("test", shuffled=True)
    return {
        "id_ce": own["id"],
        "time_ce": own["time"],
        "id_ce shuffled": strange["id"],
        "time_ce shuffled": strange["time"],
    }


def activity(neuro: Neuroformer, plan: Plan, free: bool) -> Metrics:
    """Windows drawn one ahead of the record, and in free runs of `plan.horizon` windows."""
    true = window_counts(neuro)
    ahead = neuro.generate("test", trials=plan.trials, true_past=True).counts
    found = _activity(true, ahead)
    if not free:
        return found
    loose = population_scores(true, neuro.generate("test", horizon=plan.horizon).counts[0])
    return {
        **found,
        "free f1": loose.sets.f1,
        "free rate_r": loose.rate_r,
        "free count_ratio": loose.count_ratio,
    }


def poisson_activity(neuro: Neuroformer, plan: Plan, seed: int) -> Metrics:
    """Independent Poisson neurons with the true rates of the held-out windows."""
    true = window_counts(neuro)
    seconds = neuro.settings.window
    rates = true.mean(0) / seconds
    drawn = [
        rivals.poisson_windows(rates, seconds, len(true), seed * 1000 + n)
        for n in range(plan.trials)
    ]
    return _activity(true, np.stack(drawn))


def _activity(true: NDArray[Any], drawn: NDArray[Any]) -> Metrics:
    each = [population_scores(true, trial) for trial in drawn]
    whole = population_scores(true, drawn.mean(0))
    return {
        "f1": float(np.mean([s.sets.f1 for s in each])),
        "cell_r": whole.cell_r,
        "rate_r": whole.rate_r,
        "count_ratio": float(np.mean([s.count_ratio for s in each])),
    }


def window_counts(neuro: Neuroformer) -> NDArray[Any]:
    """(W, N) spikes of the held-out windows."""
    return neuro.windows.counts(neuro.windows.test, 1)[:, 0]


def decoder_score(
    neuro: Neuroformer, kind: str, rows: NDArray[np.int64], where: str, plan: Plan, **fit: Any
) -> float:
    """r of ridge, MLP or GRU on counts of the same windows (now and the two before)."""
    windows = neuro.windows
    decoder = rivals.fit_decoder(
        kind, windows, "speed", rows, lags=3, seed=neuro.seed, steps=plan.finetune, **fit
    )
    judged = windows.part(where)
    truth = windows.batch(judged).targets["speed"].numpy().astype(float)
    return agreement(decoder(windows.counts(judged, 3)), truth)[0]
