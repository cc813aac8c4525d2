"""Neuroformer: spikes drawn per second with and without caches, windows trained on per second.

    python -m benchmarks.bench_neuroformer

Recordings are independent Poisson neurons at 4 Hz: what is timed is the model (width 64, one
encoder block, two of the past, one of each behaviour group, one of its own), windows of 50 ms.

drawing      all windows at once, keys and values kept, against the whole window again per spike;
             the model is untrained, so windows end late and are longer than recorded ones
neurons      training steps of 64 windows, tokenising, and drawing with caches, up to 1,000 neurons
modalities   the forward pass by number of behaviour groups of 4 samples, and a line through it
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from benchmarks.harness import Aim, compare, options_of, show, show_versions

from polytask.data.spikes import Recording
from polytask.infer.neuro import Neuroformer
from polytask.objectives.neuro import neuro_terms

WINDOW, RATE, BATCH, SAMPLES = 0.05, 4.0, 64, 4


def recording(neurons: int, seconds: float, variables: int = 0) -> Recording:
    draw = np.random.default_rng(0)
    return Recording.from_arrays(
        draw.poisson(RATE * 0.01, (neurons, round(seconds / 0.01))),
        behavior={f"v{k}": draw.standard_normal(round(seconds / 0.0125)) for k in range(variables)},
        dt_b=0.0125,
    )


def build(neurons: int, seconds: float = 40.0, groups: int = 0) -> Neuroformer:
    room = 8 + int(neurons * RATE * WINDOW + 6 * np.sqrt(neurons * RATE * WINDOW))
    inputs = {f"g{k}": (f"v{k}",) for k in range(groups)}
    return Neuroformer(
        recording(neurons, seconds, groups), block=room, prev_block=room, inputs=inputs,
        device="cpu",
    )  # fmt: skip


def draw(neuro: Neuroformer, windows: int, cached: bool = True) -> Callable[[], object]:
    rows = neuro.windows.test[:windows]
    return lambda: neuro.generate(rows, true_past=True, cached=cached)


def drawn(neuro: Neuroformer, windows: int) -> int:
    """Spikes that `draw` draws: the same every time."""
    return int(neuro.generate(neuro.windows.test[:windows], true_past=True).counts.sum())


def train(neuro: Neuroformer) -> Callable[[], object]:
    batch, model = neuro.store.batch(neuro.windows.train[:BATCH]), neuro.model
    optimiser = torch.optim.AdamW(model.parameters(), 1e-4)

    def step() -> None:
        model.train()
        loss = sum(term.mean() for term in neuro_terms(model, model(batch), batch).values())
        optimiser.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        optimiser.step()
        model.eval()

    return step


def drawing(options: Any) -> list[dict[str, Any]]:
    """Spikes per second, caches against running the window again for each spike."""
    rows = []
    for neurons in (30, 100, 300):
        neuro = build(neurons)
        spikes = drawn(neuro, options.windows)
        runs = {k: draw(neuro, options.windows, k == "cached") for k in ("cached", "again")}
        taken = compare(runs, options.repeats, clock=options.clock)
        seconds = taken.medians
        rows.append(
            {
                "neurons": neurons,
                "spikes_per_window": spikes / options.windows,
                "spikes_per_s": spikes / seconds["cached"],
                "again_spikes_per_s": spikes / seconds["again"],
                "times_faster": seconds["again"] / seconds["cached"],
                "spread": taken.spread("cached"),
            }
        )
    return rows


def by_neurons(options: Any) -> list[dict[str, Any]]:
    """Training and tokenising, up to a thousand neurons."""
    rows = []
    for neurons in (30, 100, 300, 1000):
        neuro = build(neurons)
        index = np.arange(len(neuro.windows))
        runs = {
            "train": train(neuro),
            "tokens": lambda w=neuro.windows, i=index: w.batch(i),
            "draw": draw(neuro, options.windows),
        }
        taken = compare(runs, options.repeats, clock=options.clock)
        seconds = taken.medians
        rows.append(
            {
                "neurons": neurons,
                "tokens_in": int(neuro.store.batch(neuro.windows.train[:BATCH]).ids.shape[1]) - 1,
                "trained_windows_per_s": BATCH / seconds["train"],
                "tokenised_windows_per_s": len(index) / seconds["tokens"],
                "drawn_spikes_per_s": drawn(neuro, options.windows) / seconds["draw"],
                "spread": taken.spread("train"),
            }
        )
    return rows


def by_modalities(options: Any) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Milliseconds of a forward pass by number of behaviour groups; slope and fit of a line."""
    counts = (0, 1, 2, 4, 8)
    runs: dict[str, Callable[[], object]] = {}
    for groups in counts:
        neuro = build(100, 20.0, groups)
        batch = neuro.store.batch(neuro.windows.train[:BATCH])

        def forward(model: Any = neuro.model, batch: Any = batch) -> None:
            with torch.no_grad():
                model(batch)

        runs[str(groups)] = forward
    taken = compare(runs, options.repeats, clock=options.clock)
    ms = np.array([1e3 * taken.medians[str(groups)] for groups in counts])
    slope, base = np.polyfit(counts, ms, 1)
    line = base + slope * np.array(counts)
    fit = 1 - float(((ms - line) ** 2).sum() / ((ms - ms.mean()) ** 2).sum())
    rows = [
        {"modalities": n, "forward_ms": float(v), "line_ms": float(w)}
        for n, v, w in zip(counts, ms, line, strict=True)
    ]
    return rows, {"ms_per_modality": float(slope), "ms_base": float(base), "r2": fit}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = options_of(__doc__, argv, windows=32)
    found: dict[str, Any] = {"versions": show_versions(("torch", "numpy"))}
    found["drawing"] = drawing(options)
    found["neurons"] = by_neurons(options)
    found["modalities"], found["line"] = by_modalities(options)
    show(found, options)
    return found


def aims(found: dict[str, Any]) -> list[Aim]:
    """Caches pay at every size and more in longer windows; cost is a line in the modalities."""
    cached = [
        Aim(f"{row['neurons']} neurons: spikes per second, cached over again", row["times_faster"],
            at_least=2)
        for row in found["drawing"]
    ]  # fmt: skip
    return [*cached, Aim("modalities: share of cost a straight line explains", found["line"]["r2"],
                         at_least=0.95)]  # fmt: skip


if __name__ == "__main__":
    main()
