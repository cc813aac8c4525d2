"""Training configurations: what is refused, and what a plan is."""

import pytest

from polytask.configs import parse
from polytask.errors import ConfigError
from polytask.train.config import HARMLESS, StageConfig, TrainConfig


def test_exactly_one_length_is_given() -> None:
    with pytest.raises(ConfigError, match="exactly one of 'steps', 'epochs', 'stages'"):
        parse(TrainConfig, {}, "train")
    with pytest.raises(ConfigError, match="steps and epochs"):
        parse(TrainConfig, {"steps": 3, "epochs": 1}, "train")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"learning_rate": 0.1}, "unknown key 'learning_rate'"),
        ({"shedule": "cosine"}, "Did you mean 'schedule'"),
        ({"schedule": "cosin"}, "'schedule' = 'cosin'"),
        ({"lr": -1}, "'lr' = -1"),
        ({"batch_size": 10, "accumulate": 4}, "not a multiple"),
        ({"aggregate_every": 4}, "needs an 'aggregator'"),
        ({"aggregator": "mean", "weighting": "uncertainty"}, "excludes an aggregator"),
    ],
)
def test_impossible_settings_are_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(TrainConfig, {"steps": 5, **given}, "train")


def test_two_stages_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="two stages share a name: a, a"):
        parse(
            TrainConfig,
            {"stages": [{"name": "a", "steps": 1}, {"name": "a", "steps": 2}]},
            "train",
        )


def test_epochs_become_steps_by_the_number_of_rows() -> None:
    config = TrainConfig(epochs=1.5, batch_size=10)
    assert config.plan(200) == (StageConfig(steps=30),)
    with pytest.raises(ConfigError, match="give 'steps' for a stream"):
        config.plan(None)


def test_harmless_keys_are_keys() -> None:
    assert set(TrainConfig.model_fields) >= HARMLESS
