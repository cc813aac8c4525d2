"""Policies by name, their configuration, and the scores that adaptive ones read."""

from __future__ import annotations

import json

import numpy as np
import pytest

from polytask.configs import parse
from polytask.errors import ConfigError, PolytaskError
from polytask.mixture import POLICIES, Groups, HardestPolicy, MixtureConfig, ScoreHistory

GROUPS = Groups(("small", "large", "huge"), (100, 400, 10_000))


def weights_of(**settings: object) -> np.ndarray:
    config = parse(MixtureConfig, {**settings}, "mixture")
    policy = POLICIES.get(config.policy)(config, GROUPS)
    return policy.weights(ScoreHistory(3))


def test_there_is_a_policy_for_every_name_in_the_documentation() -> None:
    assert set(POLICIES.names()) == {
        "uniform",
        "proportional",
        "temperature",
        "fixed",
        "one_task_per_step",
        "all_tasks_per_step",
        "hardest",
        "stratified",
        "skillit",
        "curriculum",
    }


@pytest.mark.parametrize(
    ("settings", "ratio"),
    [
        ({"policy": "uniform"}, [1, 1, 1]),
        ({"policy": "all_tasks_per_step"}, [1, 1, 1]),
        ({"policy": "proportional"}, [100, 400, 10_000]),
        ({"policy": "proportional", "cap": 200}, [100, 200, 200]),
        ({"policy": "temperature", "alpha": 0.5}, [10, 20, 100]),
        ({"policy": "temperature", "alpha": 0.5, "cap": 900}, [10, 20, 30]),
        ({"policy": "temperature", "alpha": 0}, [1, 1, 1]),
        ({"policy": "temperature", "alpha": 1}, [100, 400, 10_000]),
        ({"policy": "one_task_per_step", "alpha": 0.5}, [10, 20, 100]),
        (
            {"policy": "one_task_per_step", "weights": {"small": 1, "large": 2, "huge": 3}},
            [1, 2, 3],
        ),
        ({"policy": "fixed", "weights": {"small": 2, "large": 0, "huge": 6}}, [1, 0, 3]),
    ],
)
def test_weights_follow_the_closed_form(settings: dict[str, object], ratio: list[float]) -> None:
    np.testing.assert_allclose(weights_of(**settings), np.array(ratio) / sum(ratio), rtol=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy": "temprature"}, "Did you mean 'temperature'"),
        ({"stop": "first_exausted"}, "Did you mean 'first_exhausted'"),
        ({"alfa": 1}, "Did you mean 'alpha'"),
        ({"policy": "fixed"}, "no weight for 'small', 'large', 'huge'"),
        ({"policy": "fixed", "weights": {"smal": 1}}, "Did you mean 'small'"),
        ({"policy": "fixed", "weights": {"small": -1}}, "should be a number >= 0"),
        ({"policy": "fixed", "weights": {"small": float("nan")}}, "should be a number >= 0"),
        (
            {"policy": "fixed", "weights": {"small": 0, "large": 0, "huge": 0}},
            "nothing to draw",
        ),
        ({"round_rows": 0}, "round_rows"),
        ({"smoothing": 1.0}, "smoothing"),
    ],
)
def test_a_wrong_configuration_is_one_clear_message(
    settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        weights_of(**settings)


@pytest.mark.parametrize("policy", ["proportional", "temperature", "one_task_per_step"])
def test_weighing_a_stream_by_size_needs_its_size(policy: str) -> None:
    config = MixtureConfig(policy=policy)
    with pytest.raises(ConfigError, match="'web' is a stream of unknown length"):
        POLICIES.get(policy)(config, Groups(("web", "b"), (None, 3)))


def test_smoothed_losses_are_weighted_means_without_start_up_bias() -> None:
    history = ScoreHistory(2, smoothing=0.8)
    values = np.random.default_rng(0).random(12)
    for step, value in enumerate(values):
        history.observe(step, [value, np.nan])
    weights = 0.8 ** np.arange(11, -1, -1)
    assert history.smoothed[0] == pytest.approx(np.average(values, weights=weights))
    assert history.first[0] == values[0]
    assert np.isnan(history.smoothed[1]) and np.isnan(history.first[1])


def test_a_history_survives_json_bit_for_bit() -> None:
    random = np.random.default_rng(1)
    whole, first = ScoreHistory(3), ScoreHistory(3)
    losses = [np.where(random.random(3) < 0.3, np.nan, random.random(3)) for _ in range(30)]
    for step, loss in enumerate(losses):
        whole.observe(step, loss)
        if step < 15:
            first.observe(step, loss)
    resumed = ScoreHistory(3)
    resumed.restore(json.loads(json.dumps(first.state())))
    for step in range(15, 30):
        resumed.observe(step, losses[step])
    assert resumed.state() == whole.state()


@pytest.mark.parametrize(
    ("step", "losses", "error"),
    [(0, [1.0], ValueError), (0, [1.0, np.inf], ValueError), (-1, [1.0, 1.0], PolytaskError)],
)
def test_a_history_refuses_what_it_cannot_use(
    step: int, losses: list[float], error: type[Exception]
) -> None:
    with pytest.raises(error):
        ScoreHistory(2).observe(step, losses)


def test_losses_of_a_step_cannot_be_told_twice() -> None:
    history = ScoreHistory(1)
    history.observe(3, [1.0])
    with pytest.raises(PolytaskError, match="step 3 came after those of step 3"):
        history.observe(3, [1.0])


def test_hardest_favours_what_has_come_down_least_whatever_the_scale() -> None:
    history = ScoreHistory(3, smoothing=0.0)
    history.observe(0, [100.0, 1.0, 2.0])
    history.observe(1, [50.0, 0.25, 2.0])  # ratios 1/2, 1/4, 1
    policy = HardestPolicy(3, sharpness=1.0, floor=0.3)
    raw = np.array([0.5, 0.25, 1.0])
    np.testing.assert_allclose(policy.weights(history), 0.1 + 0.7 * raw / raw.sum())


def test_hardest_is_uniform_before_anything_is_known_and_bounded_below_after() -> None:
    history = ScoreHistory(4)
    policy = HardestPolicy(4, sharpness=3.0, floor=0.2)
    np.testing.assert_allclose(policy.weights(history), 0.25)
    history.observe(0, [1, 1, 0.0, -2.0])  # a ratio to a first loss <= 0 says nothing
    history.observe(1, [1e-9, 1, 1, 1])
    weights = policy.weights(history)
    assert weights.sum() == pytest.approx(1) and (weights >= 0.05 - 1e-12).all()
