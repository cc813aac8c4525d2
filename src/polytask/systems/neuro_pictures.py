"""What `polytask run neuroformer` shows: from a model and its results to the page's record."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polytask.infer.neuro.neuroformer import Decoded, Neuroformer
from polytask.infer.neuro.readouts import Connectivity
from polytask.infer.neuro.runs import Generated
from polytask.report.neuro_figures import Activity, Latent, Trace, Wiring
from polytask.report.neuro_page import NeuroRecord

SECONDS = 10.0  # of the raster
GROUP = 20  # windows a bin of the rates has
NAMES = {"ahead": "ahead", "free": "free run"}
READOUTS = {"mean": "attention", "rollout": "attention rollout", "ablation": "ablation"}
Rates = tuple[NDArray[Any], Mapping[str, NDArray[Any]]]


def neuro_record(
    name: str,
    neuro: Neuroformer,
    drawn: Mapping[str, Generated],
    readouts: Mapping[str, Connectivity],
    decoded: Mapping[str, Decoded],
    figures: Mapping[str, Any],
    lines: Sequence[str],
    edges: NDArray[np.bool_] | None,
    run: Path,
) -> NeuroRecord:
    """Everything the page shows."""
    recording = neuro.recording
    facts = {
        "neurons": str(recording.n_units),
        "seconds": f"{recording.duration:.0f} in bins of {1000 * recording.dt:g} ms",
        "mean rate": f"{recording.rates.mean():.2f} spikes per second",
        "windows": f"{len(neuro.windows)} of {1000 * neuro.settings.window:g} ms, "
        f"{len(neuro.windows.test)} held out (the last)",
        "modalities": ", ".join(["past", *_modalities(neuro)]),
    }
    scored = {k: (v["auroc"], v["transposed"]) for k, v in figures.get("edges", {}).items()}
    tables = {READOUTS[k]: np.abs(v.mean) for k, v in readouts.items()}
    attribution = None
    if neuro.model.config.video is not None and neuro.model.config.video.layers:
        attribution = neuro.attribution("test")
    return NeuroRecord(
        name,
        lead=" ".join(f"{line[0].upper()}{line[1:]}." for line in lines[:2]),
        facts=facts,
        scores=_tables(figures),
        activity=_activity(neuro, drawn),
        psth=rates(neuro, drawn),
        traces=[_trace(neuro, found) for found in decoded.values() if np.isfinite(found.r)],
        wiring=Wiring(tables, edges, {READOUTS[k]: v for k, v in scored.items()}),
        latent=_latent(neuro, decoded),
        losses=losses(run / "metrics.jsonl", neuro),
        attribution=attribution,
        notes=[
            "Attention is a hypothesis about connectivity, not a measurement of it. Common inputs "
            "that the model is not shown look like connections.",
            "Everything is judged on the last part of the recording, which training never saw.",
            "Within a bin spikes are sorted by neuron, so a loss looks good without any past: "
            "compare it with the one for a strange past.",
        ],
    )


def _modalities(neuro: Neuroformer) -> list[str]:
    c = neuro.model.config
    return [*(["video"] if c.video is not None else []), *(group.name for group in c.groups)]


def _tables(figures: Mapping[str, Any]) -> dict[str, list[tuple[str, float | None]]]:
    names = {
        "test": "Next spike, held out",
        "test shuffled past": "Next spike after a strange past",
        "generated ahead": "Activity drawn one window ahead",
        "generated free": "Activity running free",
    }
    found: dict[str, list[tuple[str, float | None]]] = {}
    for key, values in figures.items():
        if key == "edges":
            rows = [
                (f"{READOUTS[k]}, {n}", v) for k, pair in values.items() for n, v in pair.items()
            ]
            found["True edges"] = rows
        elif key in names or key.startswith("decode "):
            found[names.get(key, key.capitalize())] = list(values.items())
    return found


def _activity(neuro: Neuroformer, drawn: Mapping[str, Generated]) -> Activity:
    recording, dt = neuro.recording, neuro.recording.dt
    begin = float(neuro.windows.starts[neuro.windows.test[0]] * dt)
    generated = {}
    for name, one in drawn.items():
        unit, step = one.spikes(0)
        generated[NAMES[name]] = (unit, step * dt)
    true = (recording.unit, recording.step * dt)
    end = min(begin + SECONDS, recording.duration)
    return Activity(recording.n_units, begin, end, true, generated)


def rates(neuro: Neuroformer, drawn: Mapping[str, Generated]) -> Rates | None:
    """Spikes per second of every neuron over groups of held-out windows: recorded, generated."""
    true = neuro.windows.counts(neuro.windows.test, 1)[:, 0]
    group = min(GROUP, len(true))
    whole = len(true) // group * group

    def grouped(counts: NDArray[Any]) -> NDArray[Any]:
        mean = counts[:whole].reshape(-1, group, counts.shape[1]).mean(1).T
        found: NDArray[Any] = mean / neuro.settings.window
        return found

    return grouped(true), {NAMES[n]: grouped(one.counts.mean(0)) for n, one in drawn.items()}


def _trace(neuro: Neuroformer, found: Decoded) -> Trace:
    said = f"r = {found.r:.3f}, R2 = {found.r2:.3f} on held-out windows."
    return Trace(found.name, found.start * neuro.recording.dt, found.truth, found.value, said)


def _latent(neuro: Neuroformer, decoded: Mapping[str, Decoded]) -> Latent | None:
    vectors = neuro.embed("test")["spikes"]
    if len(vectors) < 3:
        return None
    if decoded:
        name, one = next(iter(decoded.items()))
        return Latent(vectors, one.truth.astype(float), name)
    counts = neuro.windows.counts(neuro.windows.test, 1)[:, 0].sum(1)
    return Latent(vectors, counts, "spikes in the window")


def losses(path: Path, neuro: Neuroformer) -> dict[str, list[tuple[float, float]]]:
    """'train id' -> [(step, nats)] from a run's metrics; weights of the sum taken out again."""
    c = neuro.model.config
    aligned = c.align_share if c.align or c.always_quarter else 0.0
    spikes = c.spike_weight * (1 - aligned)
    weight = {"id": spikes * c.id_share, "time": spikes * (1 - c.id_share), "align": aligned}
    weight |= {name: c.target_weights.get(name, 1.0) for name in c.targets}
    found: dict[str, list[tuple[float, float]]] = {}
    if not path.is_file():
        return found
    learned = set(neuro.history[-1]["losses"]) if neuro.history else set(weight)
    for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        if line["kind"] == "train":
            values = {
                f"train {name}": value / weight[name]
                for terms in line["terms"].values()
                for name, value in terms.items()
                if name in learned and weight.get(name) and value is not None
            }
        elif line["kind"] == "eval":
            values = {f"validation {n}": v for n, v in line["metrics"].items() if n in learned}
        else:
            continue
        for name, value in values.items():
            found.setdefault(name, []).append((float(line["step"]), float(value)))
    return found
