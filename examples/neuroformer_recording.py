"""From a recording of spikes to a trained model, decoded speed, generated spikes and connections.

Cells (`# %%`) run one by one in an editor or notebook, or all at once: python
examples/neuroformer_recording.py. Without `--data` a circuit is simulated whose wiring is known, so
that every answer can be checked; with `--data session.nwb` (or .npz) it is your recording. Pictures
and a page are left in `neuroformer-example/`. About three minutes on two cores.
"""

# %% What this run should do
from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from polytask.data.circuits import CircuitConfig, simulate_circuit
from polytask.data.spikes import Recording
from polytask.evaluate.spikes import cosmic_by_unit, edge_scores, population_scores
from polytask.infer.neuro import Neuroformer
from polytask.report.neuro_figures import Activity, Latent, Trace, Wiring
from polytask.report.neuro_page import NeuroRecord, neuro_report

parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
parser.add_argument("--data", type=Path, help="a recording: .nwb or .npz")
parser.add_argument("--target", default="speed", help="behaviour to decode")
parser.add_argument("--steps", type=int, default=600, help="of pretraining")
parser.add_argument("--seconds", type=float, default=300.0, help="of the simulated recording")
parser.add_argument("--out", type=Path, default=Path("neuroformer-example"))
options = parser.parse_args()

# %% A recording: yours, or four hubs that drive eight neurons each, and an animal that runs
circuit = None
if options.data:
    recording = Recording.from_file(options.data)
else:
    wiring = CircuitConfig(common=0.25, common_tau=0.05, segments=10, modulated=12)
    circuit = simulate_circuit(wiring, seed=7, duration=options.seconds)
    recording = circuit.recording
    recording.save(options.out / "recording.npz")  # what --data takes
print(f"{recording.n_units} neurons, {recording.duration:.0f} s, {recording.rates.mean():.1f} Hz")

# %% Pretrain on spikes alone. The last fifth of the time is never trained on.
neuro = Neuroformer(recording, targets={options.target: "regression"}, prev_window=0.1, dropout=0.0)
neuro.pretrain(options.steps, lr=4e-3)
own, strange = neuro.score("test"), neuro.score("test", shuffled=True)
print(f"next neuron: {own['id']:.3f} nats, {strange['id']:.3f} after the past of another time")

# %% Who drives whom? Before finetuning, which would change what the model looks at.
attention = neuro.connectivity("mean").mean
ablation = neuro.connectivity("ablation", neuro.windows.train[:1500]).mean
judged = {}
if circuit is not None:
    for name, found in (("attention", attention), ("ablation", np.abs(ablation))):
        score = edge_scores(found, circuit.edges)
        judged[name] = (score.forward, score.transposed)
        said = f"{score.forward:.2f}, against reversed arrows {score.transposed:.2f}"
        print(f"{name}: AUROC {said}, among each hub's targets {score.within:.2f}")

# %% Generate the held-out part, window by window after its recorded past, and running free
ahead = neuro.generate("test", trials=4, true_past=True)
free = neuro.generate("test", trials=4, horizon=20)
true = neuro.windows.counts(neuro.windows.test)[:, 0]
scores = []
for name, drawn in (("one window ahead", ahead), ("running free", free)):
    found = population_scores(true, drawn.counts[0])
    scores += [(f"{name}, F1", found.sets.f1), (f"{name}, rates r", found.rate_r)]
    print(f"{name}: F1 {found.sets.f1:.2f}, {found.count_ratio:.2f} times the recorded spikes")
first = int(neuro.windows.starts[neuro.windows.test[0]])
held_out = recording.step >= first
events = (recording.unit[held_out], recording.step[held_out] * recording.dt)
one = ahead.spikes(0)
overlap = cosmic_by_unit(events, (one[0], one[1] * recording.dt), recording.n_units, width=0.05)
scores.append(("one window ahead, CosMIC at 50 ms", float(overlap.mean())))

# %% Decode behaviour from a tenth of the labels
neuro.finetune(options.target, fraction=0.1, steps=150, lr=2e-3)
decoded = neuro.decode(options.target)
print(f"{options.target} from spikes: r = {decoded.r:.2f}, R2 = {decoded.r2:.2f}")
scores.append((f"{options.target}, r", decoded.r))

# %% Look at it
group = min(20, len(true))  # windows per bin of the rates
whole = len(true) // group * group


def per_second(counts: np.ndarray) -> np.ndarray:
    """(W, N) counts as (N, bins) spikes per second."""
    return counts[:whole].reshape(-1, group, recording.n_units).mean(1).T / neuro.settings.window


begin = first * recording.dt
record = NeuroRecord(
    "the simulated circuit" if circuit is not None else options.data.stem,
    scores={"On the held-out part": scores},
    activity=Activity(
        recording.n_units,
        begin,
        min(begin + 10.0, recording.duration),
        (recording.unit, recording.step * recording.dt),
        {"one window ahead": (one[0], one[1] * recording.dt)},
    ),
    psth=(
        per_second(true),
        {
            "one window ahead": per_second(ahead.counts.mean(0)),
            "running free": per_second(free.counts.mean(0)),
        },
    ),
    traces=[
        Trace(
            options.target,
            decoded.start * recording.dt,
            decoded.truth,
            decoded.value,
            f"r = {decoded.r:.2f}.",
        )
    ],
    wiring=Wiring(
        {"attention": attention, "ablation": np.abs(ablation)},
        None if circuit is None else circuit.edges,
        judged,
    ),
    latent=Latent(neuro.embed("test")["spikes"], decoded.truth, options.target),
    notes=["Attention is a hypothesis about connections, not a measurement of them."],
)
print(f"look at {neuro_report(options.out, record)}")
