"""Simulated spiking populations whose wiring and inputs are known.

Leaky integrate-and-fire neurons under noise, all neurons (and all segments) at once:

    v <- v + dt/tau (I - v) + sigma sqrt(2 dt/tau) xi       unless refractory
    v > 1: spike, v <- 0, silent for `refractory` s
    a spike of p reaches y after delay[y, p]: v_y <- v_y + weight[y, p]

(Euler-Maruyama with the defaults of the paper's kind of simulation: tau 10 ms, refractory 5 ms,
1 ms steps. A spike that arrives while a neuron is refractory has no effect, as in brian2.)

Matrices of connections are written [target, source]: `weights[y, p]` is what p does to y.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from polytask import rng
from polytask.data.spike_tokens import Ints, whole_bins
from polytask.data.spikes import Recording
from polytask.errors import ConfigError

Floats = NDArray[np.float64]
STEP = 0.001  # seconds of an integration step
CHUNK = 512  # steps whose noise is drawn at once


@dataclass(frozen=True)
class Membrane:
    """Constants of the neurons. Seconds; voltages in units of the threshold."""

    tau: float = 0.010
    sigma: float = 0.22
    threshold: float = 1.0
    reset: float = 0.0
    refractory: float = 0.005


@dataclass(frozen=True)
class CircuitConfig:
    """A circuit of hubs that drive followers, with what makes finding it hard.

    `inhibitory` of the `hubs` inhibit. Every edge has a delay of its own, uniform in `delay`.
    Each of `groups` groups of neurons shares a common input of standard deviation `common` and
    correlation time `common_tau`, which correlates neurons that are not connected. `modulated`
    neurons are driven by an animal's speed, an AR(1) process with time constant `speed_tau`, by
    `speed_gain` per standard deviation.
    """

    n_units: int = 30
    hubs: int = 4
    inhibitory: int = 1
    fan_out: int = 8
    weight: float = 0.4
    inhibition: float = 0.6
    delay: tuple[float, float] = (0.015, 0.095)
    current: float = 0.40
    hub_current: float = 0.55
    groups: int = 3
    common: float = 0.15
    common_tau: float = 0.020
    modulated: int = 0
    speed_gain: float = 0.10
    speed_tau: float = 1.0
    duration: float = 300.0
    segments: int = 1
    dt: float = 0.01
    dt_b: float = 0.05
    membrane: Membrane = field(default_factory=Membrane)

    def __post_init__(self) -> None:
        for name in ("n_units", "segments", "hubs", "fan_out", "inhibitory", "groups", "modulated"):
            least = 1 if name in ("n_units", "segments") else 0
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if self.hubs + (self.fan_out if self.hubs else 0) > self.n_units:
            raise ConfigError(
                f"{self.hubs} hubs with {self.fan_out} followers that are no hubs do not fit into "
                f"{self.n_units} neurons"
            )
        if self.inhibitory > self.hubs or self.modulated > self.n_units:
            raise ConfigError("more inhibitory hubs than hubs, or more modulated neurons than all")
        low, high = self.delay
        if not STEP <= low <= high:
            raise ConfigError(
                f"delay must be two ascending times of {STEP} s or more: {self.delay}"
            )
        whole_bins(self.dt, STEP, "dt")
        whole_bins(self.dt_b, STEP, "dt_b")
        whole_bins(self.duration / self.segments, max(self.dt, self.dt_b), "duration / segments")


@dataclass(frozen=True)
class Circuit:
    """A simulated recording with its truth.

    `weights`, `delays`: (N, N) float64 [target, source], delays in seconds. `hubs`: (hubs,)
    units that drive others. `modulated`: units that speed drives.
    """

    recording: Recording
    weights: Floats
    delays: Floats
    hubs: Ints
    modulated: Ints
    config: CircuitConfig

    @property
    def edges(self) -> NDArray[np.bool_]:
        """(N, N) bool [target, source]."""
        found: NDArray[np.bool_] = self.weights != 0
        return found


def simulate_circuit(
    config: CircuitConfig | None = None,
    seed: int = 0,
    *,
    shown: Shown | None = None,
    **changes: Any,
) -> Circuit:
    """A hub circuit, its labels permuted, simulated for `config.duration` seconds.

    Args:
        config: the circuit; `changes` override its fields.
        seed: decides wiring, labels and noise.
        shown: frames and the currents they cause (`circuits_stimulus.moving_photos` and
            `gabor_currents`).

    The recording has the behaviour variable 'speed' where `modulated` is above 0, and trials
    where `segments` is above 1 (segments are simulated side by side, which is faster).
    """
    base = config or CircuitConfig()
    known = {f.name for f in fields(CircuitConfig)}
    if set(changes) - known:
        raise ConfigError(f"unknown setting '{sorted(set(changes) - known)[0]}' of a circuit")
    chosen = CircuitConfig(**{f.name: getattr(base, f.name) for f in fields(base)} | changes)
    weights, delays, hubs, order = wiring(chosen, seed)
    draw = rng.generator(seed, "circuit inputs")
    current = np.full(chosen.n_units, chosen.current)
    current[hubs] = chosen.hub_current
    modulated = np.sort(order[: chosen.modulated])
    length = whole_bins(chosen.duration / chosen.segments, STEP, "duration / segments")
    speed, drives = None, []
    if chosen.modulated:
        hold = whole_bins(chosen.dt_b, STEP, "dt_b")
        speed = ar1(chosen.segments, length // hold, chosen.dt_b / chosen.speed_tau, draw)
        gain = np.zeros(chosen.n_units)
        gain[modulated] = chosen.speed_gain
        drives.append(Drive(speed[..., None] * gain, hold))
    if shown is not None:
        drives.append(shown.drive(chosen.segments, length, chosen.n_units))
    spikes = integrate(
        current,
        weights,
        delays,
        length,
        seed,
        membrane=chosen.membrane,
        segments=chosen.segments,
        drives=drives,
        common=_common(chosen, draw),
    )
    recording = recording_of(
        spikes,
        length,
        chosen.segments,
        chosen.dt,
        chosen.n_units,
        behavior=None if speed is None else {"speed": speed.reshape(-1)},
        dt_b=None if speed is None else chosen.dt_b,
        frames=None if shown is None else shown.frames,
        frame_rate=None if shown is None else shown.frame_rate,
    )
    return Circuit(recording, weights, delays, hubs, modulated, chosen)


def wiring(config: CircuitConfig, seed: int) -> tuple[Floats, Floats, Ints, Ints]:
    """Weights and delays [target, source], the hubs' labels, and all labels in random order."""
    draw = rng.generator(seed, "circuit wiring")
    n = config.n_units
    labels = draw.permutation(n)
    hubs, others = labels[: config.hubs], labels[config.hubs :]
    weights, delays = np.zeros((n, n)), np.zeros((n, n))
    low, high = (whole_bins(d, STEP, "delay") for d in config.delay)
    for number, hub in enumerate(hubs):
        followers = draw.choice(others, config.fan_out, replace=False)
        excites = number >= config.inhibitory
        weights[followers, hub] = config.weight if excites else -config.inhibition
        delays[followers, hub] = draw.integers(low, high + 1, config.fan_out) * STEP
    return weights, delays, np.sort(hubs), draw.permutation(n)


def ar1(rows: int, samples: int, rate: float, draw: np.random.Generator) -> Floats:
    """(rows, samples) AR(1) of variance 1 whose correlation falls by e over 1 / rate samples."""
    keep = float(np.exp(-rate))
    path = draw.standard_normal((rows, samples))  # column 0 is stationary as it is
    path[:, 1:] *= np.sqrt(1 - keep**2)
    for k in range(1, samples):
        path[:, k] += keep * path[:, k - 1]
    return path


@dataclass(frozen=True)
class Drive:
    """Current that changes with time: `values` (segments, samples, N), each held `hold` steps."""

    values: Floats
    hold: int


@dataclass(frozen=True)
class Shown:
    """A film and what it does: `frames` (F, H, W) at `frame_rate` Hz, `currents` (F, N)."""

    frames: NDArray[np.float32]
    frame_rate: float
    currents: Floats

    def drive(self, segments: int, steps: int, n_units: int) -> Drive:
        """The currents of `segments` stretches of `steps` integration steps, one after another.

        Raises:
            ConfigError: the film has another length, or currents for other neurons.
        """
        hold = whole_bins(1 / self.frame_rate, STEP, "1 / frame_rate")
        wanted = segments * (steps // hold)
        if steps % hold or self.currents.shape != (wanted, n_units) or len(self.frames) != wanted:
            raise ConfigError(
                f"{segments} x {steps * STEP:g} s at {self.frame_rate} Hz need {wanted} frames and "
                f"currents for {n_units} neurons; got {len(self.frames)} frames and currents "
                f"{self.currents.shape}"
            )
        return Drive(self.currents.reshape(segments, -1, n_units), hold)


@dataclass(frozen=True)
class Common:
    """Shared noise: neuron i receives `size[i]` times the process `group[i]`; tau in seconds."""

    group: Ints
    size: Floats
    tau: float


def _common(config: CircuitConfig, draw: np.random.Generator) -> Common | None:
    if not config.groups or config.common == 0:
        return None
    group = draw.permutation(np.arange(config.n_units) % config.groups)
    return Common(group, np.full(config.n_units, config.common), config.common_tau)


def integrate(
    current: ArrayLike,
    weights: Floats,
    delays: Floats,
    steps: int,
    seed: int,
    *,
    membrane: Membrane | None = None,
    segments: int = 1,
    drives: Sequence[Drive] = (),
    common: Common | None = None,
) -> tuple[Ints, Ints, Ints]:
    """Run the neurons; the spikes' segment, step (ms) and unit, each (S,) int64.

    Args:
        current: (N,) constant input.
        weights, delays: (N, N) [target, source]; delays in seconds, at least one step.
        steps: integration steps of 1 ms per segment.
        segments: independent copies simulated side by side (own noise, same wiring).
    """
    cell = membrane or Membrane()
    bias = np.asarray(current, float)
    n, draw = len(bias), rng.generator(seed, "membrane noise")
    leak, noise = STEP / cell.tau, cell.sigma * np.sqrt(2 * STEP / cell.tau)
    rest = whole_bins(cell.refractory, STEP, "refractory")
    post, wait, size = _fan(weights, delays)
    depth = int(wait.max(initial=0)) + 1
    arrivals = np.zeros((depth, segments, n))
    v = bias + cell.sigma * draw.standard_normal((segments, n))
    np.clip(v, None, cell.threshold, out=v)
    silent = np.zeros((segments, n), np.int64)  # steps until it integrates again
    if common is not None:
        groups = int(common.group.max()) + 1
        shared = draw.standard_normal((segments, groups))
        keep = float(np.exp(-STEP / common.tau))
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for begin in range(0, steps, CHUNK):
        length = min(CHUNK, steps - begin)
        xi = draw.standard_normal((length, segments, n)) * noise
        if common is not None:
            fresh = draw.standard_normal((length, segments, groups)) * np.sqrt(1 - keep**2)
        for k in range(length):
            step = begin + k
            total = bias
            for drive in drives:
                total = total + drive.values[:, step // drive.hold]
            if common is not None:
                shared = keep * shared + fresh[k]
                total = total + common.size * shared[:, common.group]
            awake = silent <= 0
            v += awake * (leak * (total - v) + xi[k])
            spikes = awake & (v > cell.threshold)
            silent -= 1
            slot = step % depth
            v += (awake & ~spikes) * arrivals[slot]
            arrivals[slot] = 0
            segment, unit = np.nonzero(spikes)
            if len(unit):
                v[segment, unit] = cell.reset
                silent[segment, unit] = rest - 1
                found.append((segment, np.full(len(unit), step), unit))
                if size.shape[1]:
                    places = (step + wait[unit]) % depth, segment[:, None], post[unit]
                    np.add.at(arrivals, places, size[unit])
    if not found:
        none = np.zeros(0, np.int64)
        return none, none, none
    segment, at, unit = (np.concatenate(part) for part in zip(*found, strict=True))
    return segment, at, unit


def _fan(weights: Floats, delays: Floats) -> tuple[Ints, Ints, Floats]:
    """Per source, padded with zero weights: targets, delays in steps, weights, each (N, most)."""
    n = len(weights)
    source, target = np.nonzero(weights.T)
    count = np.bincount(source, minlength=n)
    most = int(count.max(initial=0))
    place = np.arange(len(source)) - np.repeat(np.cumsum(count) - count, count)
    post, wait = np.zeros((n, most), np.int64), np.ones((n, most), np.int64)
    size = np.zeros((n, most))
    post[source, place] = target
    wait[source, place] = np.maximum(1, np.round(delays[target, source] / STEP)).astype(np.int64)
    size[source, place] = weights[target, source]
    return post, wait, size


def recording_of(
    spikes: tuple[Ints, Ints, Ints],
    steps: int,
    segments: int,
    dt: float,
    n_units: int,
    **more: Any,
) -> Recording:
    """A recording from `integrate`'s spikes: segments one after the other, as trials."""
    segment, at, unit = spikes
    seconds = steps * STEP
    bounds = np.arange(segments)[:, None] * seconds + np.array([0.0, seconds])
    return Recording.from_arrays(
        units=unit,
        times=(segment * steps + at) * STEP,
        dt=dt,
        n_units=n_units,
        duration=segments * seconds,
        trials=bounds if segments > 1 else None,
        **more,
    )
