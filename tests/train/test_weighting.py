"""Loss weights against closed forms and TorchJD's own scalarizer."""

from pathlib import Path

import pytest
import torch
from torchjd.scalarization import DWA
from train_fakes import TASKS, TinyModel, loader_of, rows_of

from polytask.errors import ConfigError
from polytask.train.config import TrainConfig
from polytask.train.gradients import StepModule, model_terms
from polytask.train.trainer import Trainer
from polytask.train.weighting import DynamicAverage, Uncertainty, build_weighting


def weighting_of(**settings: object) -> torch.nn.Module:
    return build_weighting(TrainConfig(**{"steps": 1, **settings}), TASKS)  # type: ignore[arg-type]


def test_equal_weighs_nothing_and_given_weights_multiply() -> None:
    assert build_weighting(TrainConfig(steps=1), TASKS).weights() is None
    given = build_weighting(TrainConfig(steps=1, task_weights={"beta": 3.0}), TASKS).weights()
    assert given is not None
    assert given.tolist() == [1, 3, 1]


def test_a_weight_of_an_unknown_task_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown task 'bata'. Did you mean 'beta'"):
        weighting_of(task_weights={"bata": 2.0})


def test_given_weights_scale_the_loss_of_their_task(model: TinyModel) -> None:
    config = TrainConfig(steps=1, task_weights={"alpha": 0.0, "gamma": 2.5})
    module = StepModule(model, model_terms, build_weighting(config, TASKS), 3, False)
    batch = rows_of(0, 16)
    loss = module(batch)[0]
    value, task = model.terms(batch).value["mse"], batch.task
    expected = value[task == 1].sum() + 2.5 * value[task == 2].sum()
    torch.testing.assert_close(loss, expected)


def test_uncertainty_starts_as_equal_and_settles_at_the_log_of_twice_the_loss() -> None:
    weighting = weighting_of(weighting="uncertainty")
    assert isinstance(weighting, Uncertainty)
    assert weighting.weights().tolist() == [1, 1, 1]
    assert weighting.penalty().tolist() == [0, 0, 0]
    losses = torch.tensor([0.1, 1.0, 7.0])
    optimizer = torch.optim.Adam(weighting.parameters(), lr=0.05)
    for _ in range(800):
        optimizer.zero_grad()
        (weighting.weights() * losses + weighting.penalty()).sum().backward()
        optimizer.step()
    torch.testing.assert_close(
        weighting.log_variance.detach(), torch.log(2 * losses), atol=1e-3, rtol=0
    )


def test_uncertainty_is_trained_with_the_model(tmp_path: Path) -> None:
    config = TrainConfig(steps=60, batch_size=16, weighting="uncertainty", lr=1e-2)
    trainer = Trainer(TinyModel(), loader_of(16), config, tmp_path)
    trainer.fit()
    found = trainer.weighting.log_variance  # type: ignore[union-attr]
    assert found[0] < found[1] < found[2]  # the tasks' losses grow in this order


def test_dynamic_average_gives_torchjds_weights() -> None:
    """Rounds of two steps, every task equally often; both weigh by the last two rounds' means."""
    ours = weighting_of(weighting="dynamic", weighting_every=2, temperature=2.0)
    assert isinstance(ours, DynamicAverage)
    theirs = DWA(temperature=2.0)
    torch.manual_seed(0)
    count = torch.tensor([2.0, 3.0, 4.0])
    for step in range(9):
        losses = torch.rand(3) + 0.5
        expected = theirs(losses)
        torch.testing.assert_close((ours.weights() * losses).sum(), expected, rtol=1e-4, atol=1e-5)
        ours.observe(losses * count, count)
        if step % 2:
            theirs.step()
        assert ours.weights().sum() == pytest.approx(3)
    assert not torch.equal(ours.weights(), torch.ones(3))


def test_a_task_unseen_in_a_round_counts_as_steady() -> None:
    weighting = weighting_of(weighting="dynamic", weighting_every=1)
    assert isinstance(weighting, DynamicAverage)
    weighting.observe(torch.tensor([1.0, 1.0, 1.0]), torch.ones(3))
    weighting.observe(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, 1.0]))
    torch.testing.assert_close(weighting.weights(), torch.ones(3))


def test_state_comes_back_in_the_middle_of_a_round() -> None:
    torch.manual_seed(0)
    losses = torch.rand(12, 3) + 0.1
    whole, first, second = (weighting_of(weighting="dynamic", weighting_every=3) for _ in range(3))
    for step, value in enumerate(losses):
        if step == 7:
            second.load_state_dict(first.state_dict())
        for one in (whole, first if step < 7 else second):
            assert isinstance(one, DynamicAverage)
            one.observe(value, torch.ones(3))
    assert isinstance(whole, DynamicAverage)
    assert isinstance(second, DynamicAverage)
    assert torch.equal(second.weights(), whole.weights())
    assert not torch.equal(whole.weights(), torch.ones(3))


def test_progress_of_a_slow_task_raises_its_weight() -> None:
    weighting = weighting_of(weighting="dynamic", weighting_every=1)
    assert isinstance(weighting, DynamicAverage)
    weighting.observe(torch.tensor([4.0, 4.0, 4.0]), torch.ones(3))
    weighting.observe(torch.tensor([4.0, 2.0, 1.0]), torch.ones(3))
    falling = weighting.weights()
    assert falling[0] > falling[1] > falling[2]
