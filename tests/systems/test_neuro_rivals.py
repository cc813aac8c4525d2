"""Rivals of system 01 against definitions, and on circuits whose wiring is known."""

from __future__ import annotations

import numpy as np
import pytest

from polytask.data.circuits import simulate_circuit
from polytask.data.spike_tokens import SpikeTokenizer
from polytask.data.spike_windows import SpikeWindows
from polytask.data.spikes import Recording
from polytask.errors import ConfigError
from polytask.evaluate.spikes import decoding, edge_scores
from polytask.systems.testbeds import circuits
from polytask.systems.testbeds import neuro_rivals as rivals


def test_lagged_correlation_is_that_of_numpy() -> None:
    table = np.random.default_rng(0).poisson(1.0, (4, 200))
    for lag in (0, 1, 7):
        found = rivals.lag_correlation(table, lag)
        for y, p in np.ndindex(4, 4):
            want = np.corrcoef(table[y, lag:], table[p, : 200 - lag])[0, 1]
            assert found[y, p] == pytest.approx(want)
    peak = rivals.peak_correlation(table, 3)
    each = [np.abs(rivals.lag_correlation(table, k)) for k in (1, 2, 3)]
    assert np.array_equal(peak, np.max(each, axis=0))
    with pytest.raises(ConfigError, match="does not fit"):
        rivals.lag_correlation(table, 199)


def test_past_features_see_the_past_only() -> None:
    rng = np.random.default_rng(1)
    table, basis = rng.poisson(1.0, (3, 50)), rivals.raised_cosines(6, 3)
    assert np.allclose(basis.sum(axis=0), 1) and np.allclose(basis[[0, 2], [0, 5]], 1)
    found = rivals.past_features(table, basis)
    want = [sum(basis[1, k - 1] * table[2, 20 - k] for k in range(1, 7))]
    assert found[20, 2 * 3 + 1] == pytest.approx(want[0])
    changed = table.copy()
    changed[:, 20:] = 9
    assert np.array_equal(rivals.past_features(changed, basis)[:21], found[:21])


def test_the_glm_recovers_the_filters_it_generated() -> None:
    rng = np.random.default_rng(2)
    steps, gain = 20_000, 1.2
    table = np.zeros((3, steps))
    table[0] = rng.poisson(0.1, steps)
    for t in range(3, steps):  # unit 1 follows unit 0 by 3 bins; unit 2 is silenced by it
        table[1, t] = rng.poisson(0.05 * np.exp(gain * table[0, t - 3]))
        table[2, t] = rng.poisson(0.3 * np.exp(-gain * table[0, t - 1]))
    glm = rivals.fit_glm(table, 3, bumps=3, alpha=1e-6)
    assert glm.filters[1, 0, 2] == pytest.approx(gain, abs=0.12)
    assert glm.filters[2, 0, 0] == pytest.approx(-gain, abs=0.2)
    assert np.abs(glm.filters[1, 0, :2]).max() < 0.15
    assert np.exp(glm.bias[1]) == pytest.approx(0.05, rel=0.15)
    silent = rivals.fit_glm(np.vstack([table[:2, :500], np.zeros(500)]), 3, bumps=2)
    assert silent.bias[2] == -np.inf and not silent.filters[2].any()


@pytest.mark.slow
def test_the_hard_circuit_is_hard_for_neighbouring_windows_but_not_for_the_glm() -> None:
    made = circuits.hub_circuit(0)
    window = rivals.binned(made.recording, 5)
    fine = rivals.binned(made.recording, 1)
    still = edge_scores(rivals.lag_correlation(window, 0), made.edges)
    lag1 = edge_scores(np.abs(rivals.lag_correlation(window, 1)), made.edges)
    glm = edge_scores(rivals.fit_glm(fine, 12).score, made.edges)
    assert still.direction == pytest.approx(0.0) and lag1.forward < 0.85
    assert glm.forward > 0.95 and glm.direction > 0.3
    easy = circuits.hub_circuit(0, kind="easy")
    plain = rivals.lag_correlation(rivals.binned(easy.recording, 5), 1)
    assert edge_scores(plain, easy.edges).forward > 0.95


@pytest.mark.parametrize("kind", ["ridge", "mlp", "gru"])
def test_decoders_read_speed_from_modulated_neurons(kind: str) -> None:
    made = simulate_circuit(duration=120.0, segments=12, seed=0, modulated=12, speed_gain=0.2)
    windows = SpikeWindows(made.recording, SpikeTokenizer(30), targets=["speed"])
    fit = rivals.fit_decoder(kind, windows, "speed", windows.train, steps=200)
    truth = windows.batch(windows.test).targets["speed"].numpy()
    assert decoding(fit(windows.counts(windows.test, 2)), truth)[0] > 0.5
    again = rivals.fit_decoder(kind, windows, "speed", windows.train, steps=200)
    few = windows.counts(windows.test[:5], 2)
    assert np.array_equal(fit(few), again(few))


def test_ridge_is_the_closed_form() -> None:
    rng = np.random.default_rng(3)
    rec = Recording.from_arrays(
        rng.poisson(0.3, (4, 2000)), behavior={"v": rng.random(400)}, dt_b=0.05
    )
    windows = SpikeWindows(rec, SpikeTokenizer(4), targets=["v"])
    fit = rivals.fit_decoder("ridge", windows, "v", windows.train, lags=1, alpha=2.0)
    x = windows.counts(windows.train, 1)[:, 0].astype(float)
    y = windows.batch(windows.train).targets["v"].numpy().astype(float)
    z, t = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
    weight = np.linalg.solve(z.T @ z + 2.0 * np.eye(4), z.T @ t)
    new = windows.counts(windows.test, 1)
    want = ((new[:, 0] - x.mean(0)) / x.std(0)) @ weight * y.std() + y.mean()
    assert np.allclose(fit(new), want, atol=1e-5)
    with pytest.raises(ConfigError, match="unknown decoder 'lstm'"):
        rivals.fit_decoder("lstm", windows, "v", windows.train)


def test_the_poisson_rival_has_the_true_rates() -> None:
    rates = np.array([1.0, 5.0, 20.0])
    made = rivals.poisson_windows(rates, 0.05, 40_000, 0)
    assert np.allclose(made.mean(0), rates * 0.05, rtol=0.06)
    assert np.allclose(made.var(0), rates * 0.05, rtol=0.08)


def test_recordings_for_the_proof_are_paired_by_seed() -> None:
    one = circuits.seeing_population(1, 20.0)
    assert one.recording.frames is not None and "speed" in one.recording.behavior
    assert circuits.seeing_population(1, 20.0) is one
    assert circuits.speed_population(1, 20.0).recording.frames is None
