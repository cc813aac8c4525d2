"""The simulator against closed forms, a slow reference, its own truth, and brian2."""

from __future__ import annotations

import numpy as np
import pytest

from polytask.data import circuits
from polytask.data.circuits import CircuitConfig, Drive, Membrane, integrate, simulate_circuit
from polytask.data.circuits_brian import brian_spikes
from polytask.data.circuits_stimulus import (
    FilmConfig,
    film_for,
    gabor_currents,
    gabor_fields,
    moving_photos,
    photos,
)
from polytask.errors import ConfigError, DataError, MissingExtra

QUIET = Membrane(sigma=0.0)
SMALL = CircuitConfig(duration=10.0, n_units=14, hubs=2, fan_out=4)


def test_a_lone_neuron_fires_with_the_interval_of_the_theory() -> None:
    # v rises as I (1 - (1 - dt/tau)^k) after reset; refractory steps come on top.
    none = np.zeros((1, 1))
    for current in (1.2, 1.5, 3.0):
        _, at, _ = integrate([current], none, none, 400, 0, membrane=QUIET)
        need = np.ceil(np.log(1 - 1 / current) / np.log(0.9) - 1e-12) + 5 - 1
        assert set(np.diff(at)) == {need}


def slow(current: list[float], w: np.ndarray, d: np.ndarray, steps: int) -> list[tuple[int, int]]:
    """The model without noise, neuron by neuron and step by step."""
    n = len(current)
    v, last = [min(c, 1.0) for c in current], [-100] * n
    found: list[tuple[int, int]] = []
    for k in range(steps):
        awake = [k - last[i] >= 5 for i in range(n)]
        for i in range(n):
            if awake[i]:
                v[i] += 0.1 * (current[i] - v[i])
        fires = [awake[i] and v[i] > 1 for i in range(n)]
        for s, p in found:
            for i in range(n):
                if w[i, p] and s + round(d[i, p] * 1000) == k and awake[i] and not fires[i]:
                    v[i] += w[i, p]
        for i in range(n):
            if fires[i]:
                v[i], last[i] = 0.0, k
                found.append((k, i))
    return found


def wired(seed: int) -> tuple[list[float], np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    w = np.where(rng.random((5, 5)) < 0.4, rng.uniform(-0.7, 0.7, (5, 5)), 0.0)
    np.fill_diagonal(w, 0.0)
    return list(rng.uniform(0.9, 1.6, 5)), w, rng.integers(1, 20, (5, 5)) / 1000


@pytest.mark.parametrize("seed", range(4))
def test_spikes_equal_a_slow_reference(seed: int) -> None:
    current, w, d = wired(seed)
    segment, at, unit = integrate(current, w, d, 300, 0, membrane=QUIET, segments=2)
    want = slow(current, w, d, 300)
    assert len(want) > 40
    for s in (0, 1):
        mine = segment == s
        assert list(zip(at[mine], unit[mine], strict=True)) == want


@pytest.mark.slow
def test_brian2_gives_the_same_spikes_without_noise_and_the_same_statistics_with() -> None:
    current, w, d = wired(1)
    try:
        at, unit = brian_spikes(current, w, d, 300, 0, QUIET)
    except MissingExtra as missing:
        # brian2 needs an older NumPy than the other extras' tests run with.
        pytest.skip(str(missing))
    assert sorted(zip(at.tolist(), unit.tolist(), strict=True)) == slow(current, w, d, 300)
    n, steps = 12, 150_000
    w, d = np.zeros((n, n)), np.zeros((n, n))
    w[1:5, 0], d[1:5, 0] = 0.4, 0.020
    w[5:9, 0], d[5:9, 0] = -0.6, 0.030
    bias = np.full(n, 0.5)
    at, unit = brian_spikes(bias, w, d, steps, 1)
    segment, mine_at, mine = integrate(bias, w, d, steps // 10, 2, segments=10)
    theirs, ours = (np.bincount(u, minlength=n) for u in (unit, mine))
    # Rates within five standard errors of two Poisson counts.
    assert np.all(np.abs(theirs - ours) < 5 * np.sqrt(theirs + ours))
    for group in (slice(1, 5), slice(5, 9)):
        a = correlogram(at, unit, steps, group)
        b = correlogram(segment * (steps // 10) + mine_at, mine, steps, group)
        assert np.abs(a - b).max() < 5 * np.sqrt(2 * a.max() / (4 * theirs[0]))
        assert np.argmax(np.abs(a - np.median(a))) == np.argmax(np.abs(b - np.median(b)))


def correlogram(at: np.ndarray, unit: np.ndarray, steps: int, group: slice) -> np.ndarray:
    """Spikes of the group per neuron, 4 ms bins after a spike of neuron 0, over 60 ms."""
    raster = np.zeros((12, steps))
    raster[unit, at] = 1
    total = raster[group].mean(axis=0)
    source = np.flatnonzero(raster[0][: steps - 60])
    return total[source[:, None] + 1 + np.arange(60)].mean(axis=0).reshape(15, 4).sum(axis=1)


def test_a_circuit_is_decided_by_its_seed() -> None:
    one, two, other = (simulate_circuit(SMALL, s) for s in (3, 3, 4))
    assert np.array_equal(one.recording.step, two.recording.step)
    assert np.array_equal(one.weights, two.weights)
    assert not np.array_equal(one.weights, other.weights)


def test_the_truth_has_the_asked_shape() -> None:
    made = simulate_circuit(duration=5.0, seed=1)
    c = made.config
    assert made.edges.sum() == c.hubs * c.fan_out
    assert set(np.flatnonzero(made.edges.any(axis=0))) == set(made.hubs)
    assert not made.edges[made.hubs].any() and not made.edges.diagonal().any()
    assert (made.weights < 0).any(axis=0).sum() == c.inhibitory
    delays = made.delays[made.edges]
    assert delays.min() >= c.delay[0] and delays.max() <= c.delay[1] and len(set(delays)) > 10
    assert made.recording.n_steps == 500


def test_followers_fire_after_their_hub_by_the_edges_delay() -> None:
    made = simulate_circuit(duration=400.0, segments=80, seed=2, inhibitory=0, common=0.0)
    raster = made.recording.raster()
    y, p = np.argwhere(made.edges)[0]
    lags = np.array([np.mean(raster[y, k:] * raster[p, : len(raster[p]) - k]) for k in range(20)])
    assert abs(int(np.argmax(lags)) - made.delays[y, p] / 0.01) <= 1.0


def test_speed_drives_the_modulated_neurons_only() -> None:
    made = simulate_circuit(duration=200.0, segments=40, hubs=0, inhibitory=0, modulated=12)
    speed = made.recording.behavior["speed"]
    assert len(speed) == 4000 and speed.std() == pytest.approx(1, abs=0.2)
    counts = made.recording.raster().reshape(30, -1, 5).sum(axis=2)
    r = np.array([np.corrcoef(c, speed)[0, 1] for c in counts])
    rest = np.setdiff1d(np.arange(30), made.modulated)
    assert r[made.modulated].min() > 0.1 > 0.06 > np.abs(r[rest]).max()


def test_speed_forgets_with_its_time_constant() -> None:
    path = circuits.ar1(1, 200_000, 0.05, np.random.default_rng(0))[0]
    assert np.corrcoef(path[:-20], path[20:])[0, 1] == pytest.approx(np.exp(-1), abs=0.03)


def test_segments_are_trials_and_a_drive_is_held() -> None:
    drive = Drive(np.array([[[0.0], [3.0]], [[3.0], [0.0]]]), 100)
    none = np.zeros((1, 1))
    segment, at, _ = integrate(
        [0.0], none, none, 200, 0, membrane=QUIET, segments=2, drives=[drive]
    )
    assert at[segment == 0].min() >= 100 and at[segment == 1].max() < 100
    made = simulate_circuit(SMALL, 0, segments=2)
    assert made.recording.trials is not None
    assert made.recording.trials.tolist() == [[0, 500], [500, 1000]]


def test_a_common_input_correlates_what_is_not_connected() -> None:
    def lag0(common: float) -> float:
        made = simulate_circuit(
            duration=100.0, segments=20, hubs=0, inhibitory=0, groups=1, common=common
        )
        counts = made.recording.raster().reshape(30, -1, 5).sum(axis=2)
        return float(np.corrcoef(counts)[np.triu_indices(30, 1)].mean())

    assert lag0(0.3) > 0.1 > 0.02 > abs(lag0(0.0))


def test_gabor_fields_are_unit_patches_and_standardise_the_current() -> None:
    fields = gabor_fields(40, 12, 0)
    assert np.allclose(fields.sum(axis=(1, 2)), 0) and np.allclose((fields**2).sum((1, 2)), 1)
    frames = moving_photos(FilmConfig(size=12), 400, 0)
    currents = gabor_currents(frames, fields, 0.2)
    assert currents.shape == (400, 40) and np.allclose(currents.std(axis=0), 0.2)
    by_hand = (frames[7].astype(float) * fields[3]).sum()
    match = np.array([(f * fields[3]).sum() for f in frames.astype(float)])
    assert currents[7, 3] == pytest.approx(0.2 * (by_hand - match.mean()) / match.std(), rel=1e-4)


def test_frames_are_pieces_of_real_photographs_that_drift() -> None:
    frames = moving_photos(FilmConfig(photo_seconds=1.0), 60, 3)
    whole = photos()
    for k in (0, 25, 59):
        views = [np.lib.stride_tricks.sliding_window_view(p, (16, 16)) for p in whole]
        assert any((v == frames[k]).all(axis=(2, 3)).any() for v in views)
    step = np.abs(np.diff(frames, axis=0)).mean(axis=(1, 2))
    assert step[[19, 39]].mean() > 2 * np.delete(step, [19, 39]).mean()  # cuts between photos


def test_a_film_moves_the_neurons_that_see_it() -> None:
    config = CircuitConfig(duration=100.0, segments=20, hubs=0, inhibitory=0, common=0.0)
    film = film_for(config, 1, gain=0.2, share=0.5)
    sees = film.currents.std(axis=0) > 0
    assert sees.sum() == 15
    made = simulate_circuit(config, 1, shown=film)
    assert made.recording.n_shown == 2000
    counts = made.recording.raster().reshape(30, -1, 5).sum(axis=2)
    r = [np.corrcoef(counts[i], film.currents[:, i])[0, 1] for i in np.flatnonzero(sees)]
    assert min(r) > 0.15


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hubs": 11}, "do not fit into 14 neurons"),
        ({"inhibitory": 3}, "more inhibitory hubs"),
        ({"delay": (0.0, 0.01)}, "delay must be two ascending times"),
        ({"n_units": 0}, "n_units must be at least 1"),
        ({"duration": 10.001}, "duration / segments"),
        ({"weigth": 1.0}, "unknown setting 'weigth'"),
    ],
)
def test_mistakes_are_named(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        simulate_circuit(SMALL, 0, **changes)


def test_a_film_of_another_length_and_missing_photos_are_named() -> None:
    film = film_for(SMALL)
    with pytest.raises(ConfigError, match="need 400 frames and currents for 14 neurons"):
        simulate_circuit(SMALL, 0, duration=20.0, shown=film)
    with pytest.raises(ConfigError, match="unknown source of photos 'sklearn'"):
        photos("sklearn")
    with pytest.raises(ConfigError, match="not smaller than the photographs"):
        moving_photos(FilmConfig(size=200), 10, 0)
    try:
        assert len(photos("scikit-image")) == 5
    except DataError as error:
        assert "pip install" in str(error)
