"""The same circuits in brian2, to check our simulator against (needs the extra `neuro`)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from polytask.data.circuits import STEP, Floats, Membrane
from polytask.data.spike_tokens import Ints
from polytask.errors import MissingExtra


def brian_spikes(
    current: ArrayLike,
    weights: Floats,
    delays: Floats,
    steps: int,
    seed: int,
    membrane: Membrane | None = None,
) -> tuple[Ints, Ints]:
    """Step (ms) and unit of every spike, (S,) int64, of `circuits.integrate`'s neurons.

    No drive and no common input: what is compared are membrane, threshold, refractoriness,
    weights and delays. Weights and delays are [target, source]; numpy code generation.

    Raises:
        MissingExtra: brian2 is not installed (2.9 needs numpy below 2.4).
    """
    try:
        import brian2 as b2
    except (ImportError, AttributeError) as error:  # numpy 2.4 breaks its import
        raise MissingExtra("brian2", "neuro", "the comparison with brian2") from error
    cell = membrane or Membrane()
    bias = np.asarray(current, float)
    b2.start_scope()
    b2.prefs.codegen.target = "numpy"
    b2.defaultclock.dt = STEP * b2.second
    b2.seed(seed)
    equations = """
    dv/dt = (I - v) / tau + sigma * sqrt(2 / tau) * xi : 1 (unless refractory)
    I : 1 (constant)
    """
    constants: dict[str, Any] = {
        "tau": cell.tau * b2.second,
        "sigma": cell.sigma,
        "limit": cell.threshold,
        "rest": cell.reset,
    }
    neurons = b2.NeuronGroup(
        len(bias),
        equations,
        threshold="v > limit",
        reset="v = rest",
        refractory=cell.refractory * b2.second,
        method="euler",
        namespace=constants,
    )
    neurons.I = bias
    neurons.v = np.minimum(bias, cell.threshold)
    parts: list[Any] = [neurons]
    source, target = np.nonzero(weights.T)
    if len(source):
        synapses = b2.Synapses(neurons, neurons, "w : 1", on_pre="v_post += w")
        synapses.connect(i=source, j=target)
        synapses.w = weights[target, source]
        synapses.delay = delays[target, source] * b2.second
        parts.append(synapses)
    monitor = b2.SpikeMonitor(neurons)
    network = b2.Network(*parts, monitor)
    network.run(steps * STEP * b2.second)
    at = np.round(np.asarray(monitor.t / b2.second) / STEP).astype(np.int64)
    return at, np.asarray(monitor.i, np.int64)
