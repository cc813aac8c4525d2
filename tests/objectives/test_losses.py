"""Every loss against its closed form, and its gradient against finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from polytask import objectives
from polytask.objectives.numbers import Shape

NAN = math.nan


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def check_gradient(loss: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Central differences of the float32 loss, at a step its precision allows."""
    x = x.float().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x).sum(), x)
    step = 1e-2
    for index in np.ndindex(*x.shape):
        bump = torch.zeros_like(x)
        bump[index] = step
        with torch.no_grad():
            slope = (loss(x + bump).double().sum() - loss(x - bump).double().sum()) / (2 * step)
        assert float(gradient[index]) == pytest.approx(float(slope), abs=2e-3)


class TestCrossEntropy:
    def test_is_minus_log_probability(self) -> None:
        logits, target = normal(5, 4), torch.tensor([0, 3, 1, 2, 2])
        expected = -(logits.exp() / logits.exp().sum(1, keepdim=True)).log()[range(5), target]
        found = objectives.cross_entropy(logits, target)
        torch.testing.assert_close(found, expected.float())
        check_gradient(lambda x: objectives.cross_entropy(x, target), logits)

    @pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
    def test_smoothing_equals_torch(self, smoothing: float) -> None:
        logits, target = normal(5, 4), torch.tensor([0, 3, 1, 2, 2])
        found = objectives.cross_entropy(logits, target, smoothing)
        expected = torch.nn.functional.cross_entropy(
            logits, target, reduction="none", label_smoothing=smoothing
        )
        torch.testing.assert_close(found, expected.float())
        check_gradient(lambda x: objectives.cross_entropy(x, target, smoothing), logits)

    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    def test_classes_of_other_tasks_change_nothing(self, smoothing: float) -> None:
        logits, target = normal(2, 6), torch.tensor([1, 4])
        masked = objectives.mask_classes(logits, torch.tensor([3, 6])).requires_grad_()
        found = objectives.cross_entropy(masked, target, smoothing)
        alone = objectives.cross_entropy(logits[:1, :3], target[:1], smoothing)
        torch.testing.assert_close(found[:1], alone)
        found.sum().backward()
        assert masked.grad is not None and masked.grad.isfinite().all()
        assert not masked.grad[0, 3:].any()

    def test_one_class_has_no_loss(self) -> None:
        assert objectives.cross_entropy(normal(3, 1), torch.zeros(3, dtype=torch.long)).sum() == 0


class TestBinaryCrossEntropy:
    def test_is_the_mean_over_known_labels(self) -> None:
        logits = normal(2, 3)
        target = torch.tensor([[1.0, 0.0, NAN], [NAN, NAN, 1.0]], dtype=torch.float64)
        p = torch.sigmoid(logits)
        first = -(p[0, 0].log() + (1 - p[0, 1]).log()) / 2
        expected = torch.stack([first, -p[1, 2].log()]).float()
        torch.testing.assert_close(objectives.binary_cross_entropy(logits, target), expected)
        check_gradient(lambda x: objectives.binary_cross_entropy(x, target), logits)

    def test_unknown_labels_have_no_gradient_even_at_infinite_logits(self) -> None:
        logits = torch.tensor([[math.inf, 0.5]], requires_grad=True)
        loss = objectives.binary_cross_entropy(logits, torch.tensor([[NAN, 1.0]]))
        loss.sum().backward()
        assert loss.isfinite().all()
        assert logits.grad is not None and float(logits.grad[0, 0]) == 0

    def test_no_known_label_gives_zero(self) -> None:
        logits = normal(1, 2).requires_grad_()
        loss = objectives.binary_cross_entropy(logits, torch.full((1, 2), NAN))
        loss.sum().backward()
        assert float(loss.detach()) == 0 and not logits.grad.any()


def distances(shape: Shape, error: Tensor) -> Tensor:
    if shape == "mse":
        return error**2
    if shape == "mae":
        return error.abs()
    return torch.where(error.abs() < 1, error**2 / 2, error.abs() - 0.5)


@pytest.mark.parametrize("shape", ["mse", "mae", "huber"])
class TestNumbers:
    def test_regression_is_in_standardised_units(self, shape: Shape) -> None:
        prediction = normal(3, 2)
        target = torch.tensor([[12.0, 3.0], [NAN, 1.0], [7.0, NAN]], dtype=torch.float64)
        mean, std = torch.tensor([[10.0, 2.0]] * 3), torch.tensor([[2.0, 0.5]] * 3)
        each = distances(shape, prediction - (target - mean) / std)
        expected = torch.stack([each[0].mean(), each[1, 1], each[2, 0]]).float()
        found = objectives.regression(prediction, target, mean, std, shape)
        torch.testing.assert_close(found, expected)
        check_gradient(
            lambda x: objectives.regression(x, target, mean, std, shape), prediction + 0.11
        )

    def test_forecast_error_is_relative_to_each_series(self, shape: Shape) -> None:
        prediction, target = normal(2, 3, 2), normal(2, 3, 2, seed=1) * 50 + 400
        target[0, 1, 0] = NAN
        loc = torch.tensor([[400.0, 380.0], [410.0, 0.0]])
        scale = torch.tensor([[50.0, 40.0], [30.0, 200.0]])
        each = distances(shape, prediction - (target - loc[:, None]) / scale[:, None])
        expected = each.flatten(1).nanmean(1).float()
        found = objectives.forecast(prediction, target, loc, scale, shape)
        torch.testing.assert_close(found, expected)

    def test_the_forecast_loss_does_not_depend_on_units(self, shape: Shape) -> None:
        prediction, target = normal(2, 3, 1), normal(2, 3, 1, seed=1)
        one, zero = torch.ones(2, 1), torch.zeros(2, 1)
        found = objectives.forecast(prediction, target * 1000 + 5e3, 5e3 + zero, 1e3 * one, shape)
        expected = objectives.forecast(prediction, target, zero, one, shape)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


class TestTokens:
    def test_is_minus_log_probability_and_squared_log_partition(self) -> None:
        logits, label = normal(4, 6), torch.tensor([5, 0, 2, 2])
        nll, z = objectives.token_cross_entropy(logits, label)
        log_z = logits.exp().sum(1).log()
        torch.testing.assert_close(nll, (log_z - logits[range(4), label]).float())
        torch.testing.assert_close(z, log_z.square().float())
        check_gradient(lambda x: objectives.token_cross_entropy(x, label)[0], logits)
        check_gradient(lambda x: objectives.token_cross_entropy(x, label)[1], logits)

    def test_chunks_change_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        results = []
        for held in (2**25, 21):
            monkeypatch.setattr("polytask.objectives.tokens._HELD", held)
            hidden, weight = normal(10, 4).requires_grad_(), normal(7, 4, seed=1).requires_grad_()
            bias = normal(7, seed=2).requires_grad_()
            label = torch.arange(10) % 7
            nll, z = objectives.projected_cross_entropy(hidden, weight, label, bias)
            (nll + 0.1 * z).sum().backward()
            results.append((nll.detach(), z.detach(), hidden.grad, weight.grad, bias.grad))
        for whole, chunked in zip(*results, strict=True):
            torch.testing.assert_close(whole, chunked)

    def test_sequence_mean_weighs_pairs_equally_and_token_mean_tokens(self) -> None:
        each = torch.tensor([1.0, 2.0, 3.0, 10.0, 20.0])
        pair, task = torch.tensor([0, 0, 0, 1, 2]), torch.tensor([7, 7, 3])
        sequence = objectives.per_pair(each, pair, 3, task, "sequence")
        assert sequence.tolist() == [2.0, 10.0, 20.0]
        token = objectives.per_pair(each, pair, 3, task, "token")
        assert float(token[:2].mean()) == pytest.approx((1 + 2 + 3 + 10) / 4)
        assert float(token[2]) == 20.0

    def test_weights_count_tokens(self) -> None:
        each = torch.tensor([1.0, 3.0, 5.0])
        pair, task = torch.tensor([0, 0, 1]), torch.tensor([0, 0])
        weight = torch.tensor([1.0, 3.0, 0.0])
        found = objectives.per_pair(each, pair, 2, task, "sequence", weight)
        assert found.tolist() == [2.5, 0.0]
        found = objectives.per_pair(each, pair, 2, task, "token", weight)
        assert float(found.mean()) == pytest.approx(2.5)


class TestInfoNCE:
    def test_is_symmetric_cross_entropy_over_the_pairs_of_a_task(self) -> None:
        a = torch.nn.functional.normalize(normal(5, 3), dim=1)
        b = torch.nn.functional.normalize(normal(5, 3, seed=1), dim=1)
        task = torch.tensor([0, 1, 0, 1, 0])
        temperature = torch.tensor([0.5, 0.1])[task]
        found = objectives.info_nce(a, b, task, torch.arange(5), temperature)
        for i in range(5):
            mates = [j for j in range(5) if task[j] == task[i]]
            score = {j: float(a[i] @ b[j] / temperature[i]) for j in mates}
            back = {j: float(a[j] @ b[i] / temperature[i]) for j in mates}
            forth_loss = math.log(sum(map(math.exp, score.values()))) - score[i]
            back_loss = math.log(sum(map(math.exp, back.values()))) - back[i]
            assert float(found[i]) == pytest.approx((forth_loss + back_loss) / 2, abs=1e-5)

    def test_pairs_of_one_group_are_no_negatives(self) -> None:
        a, b = normal(3, 4), normal(3, 4, seed=1)
        group, task, t = torch.tensor([9, 9, 5]), torch.zeros(3, dtype=torch.long), torch.ones(3)
        found = objectives.info_nce(a, b, task, group, t)
        without = objectives.info_nce(a[[0, 2]], b[[0, 2]], task[:2], group[[0, 2]], t[:2])
        torch.testing.assert_close(found[0], without[0])

    def test_a_lone_pair_has_no_loss(self) -> None:
        a, b = normal(2, 4).requires_grad_(), normal(2, 4, seed=1)
        task = torch.tensor([0, 1])
        loss = objectives.info_nce(a, b, task, torch.tensor([1, 2]), torch.ones(2))
        loss.sum().backward()
        assert loss.tolist() == [0.0, 0.0]
        assert a.grad is not None and not a.grad.any()

    def test_gradients_are_right(self) -> None:
        b, task = normal(3, 2, seed=1), torch.tensor([0, 0, 0])
        group = torch.tensor([1, 2, 1])
        check_gradient(
            lambda x: objectives.info_nce(x, b, task, group, torch.full((3,), 0.5)), normal(3, 2)
        )


class TestDense:
    def test_cross_entropy_is_the_mean_over_known_pixels(self) -> None:
        logits = normal(2, 3, 2, 2)
        target = torch.tensor([[[0.0, 2.0], [NAN, 1.0]], [[1.0, NAN], [NAN, NAN]]])
        log_p = logits - logits.exp().sum(1, keepdim=True).log()
        first = -(log_p[0, 0, 0, 0] + log_p[0, 2, 0, 1] + log_p[0, 1, 1, 1]) / 3
        expected = torch.stack([first, -log_p[1, 1, 0, 0]]).float()
        torch.testing.assert_close(objectives.dense_cross_entropy(logits, target), expected)
        check_gradient(lambda x: objectives.dense_cross_entropy(x, target), logits)

    def test_absolute_error_is_the_mean_over_known_pixels(self) -> None:
        prediction = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
        target = torch.tensor([[[0.0, NAN], [5.0, 4.5]]])
        found = objectives.dense_absolute(prediction, target)
        assert float(found) == pytest.approx((1 + 2 + 0.5) / 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_losses_are_float32_whatever_comes_in(dtype: torch.dtype) -> None:
    logits, label = normal(3, 4).to(dtype), torch.tensor([0, 1, 2])
    target = torch.zeros(3, 4)
    ones = torch.ones(3, 4)
    losses = [
        objectives.cross_entropy(logits, label),
        objectives.cross_entropy(logits, label, 0.1),
        objectives.binary_cross_entropy(logits, target),
        objectives.regression(logits, target, 0 * ones, ones),
        objectives.forecast(logits[:, :, None], target[:, :, None], ones[:, :1], ones[:, :1]),
        objectives.token_cross_entropy(logits, label)[0],
        objectives.info_nce(logits, logits, label * 0, label, torch.ones(3)),
        objectives.dense_cross_entropy(logits[:, :, None, None], torch.zeros(3, 1, 1)),
        objectives.dense_absolute(logits[:, None], torch.zeros(3, 1, 4)),
    ]
    assert {loss.dtype for loss in losses} == {torch.float32}
    assert {tuple(loss.shape) for loss in losses} == {(3,)}


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_loss"):
        _ = objectives.no_such_loss
