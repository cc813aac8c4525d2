"""Rank evaluation against whole forward passes, one choice at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from polytask.errors import ConfigError, DataError
from polytask.evaluate.rank import NORMS, Question, rank_eval, score_choices
from polytask.infer.language_source import LanguageSource
from polytask.models.feed import ARCHITECTURES, Architecture
from polytask.models.lm import LanguageModel, LanguageModelConfig
from polytask.objectives.pairs import Pairs

V = 13


def source(architecture: Architecture = "causal") -> LanguageSource:
    config = LanguageModelConfig(
        architecture=architecture, dim=16, layers=2, heads=4, vocab_size=V, positions="relative"
    )
    model = LanguageModel(config, 4)
    with torch.no_grad():
        model.embedding.weight.mul_(20)
    return LanguageSource(model.double())


def slowly(one: LanguageSource, prompt: list[int], choice: list[int]) -> float:
    """log p(choice | prompt) from one pass over both."""
    model = one.model
    nll, _ = model.token_losses(model.feed(Pairs.of([prompt], [choice])))
    return -float(nll.detach().double().sum())


QUESTIONS = [
    Question([3, 4, 5], [[1, 2], [7], [8, 9, 10]], 1, sizes=(5, 2, 4)),
    Question([6], [[1], [2]], 0, sizes=(1, 3)),
    Question([2, 2, 9, 11, 12], [[5, 5, 5, 5], [6, 7]], 1, sizes=(8, 9)),
]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("norm", NORMS)
def test_scores_are_log_likelihoods_normalised_as_asked(
    architecture: Architecture, norm: str
) -> None:
    one = source(architecture)
    found = score_choices(one, QUESTIONS, norm, batch_size=2)  # type: ignore[arg-type]
    for question, scores in zip(QUESTIONS, found, strict=True):
        for place, choice in enumerate(question.choices):
            expected = slowly(one, list(question.prompt), list(choice))
            if norm == "mean":
                expected /= len(choice)
            elif norm == "bytes":
                expected /= question.sizes[place]
            elif norm == "unconditional":
                expected -= slowly(one, [], list(choice))
            assert scores[place] == pytest.approx(expected, abs=1e-5)


def test_accuracies_are_medians_over_prompts_and_means_over_data_sets() -> None:
    one = source()
    best = [int(np.argmax(s)) for s in score_choices(one, QUESTIONS)]
    right = [Question(q.prompt, q.choices, b) for q, b in zip(QUESTIONS, best, strict=True)]
    wrong = [Question(q.prompt, q.choices, 1 - min(b, 1)) for q, b in zip(QUESTIONS, best)]
    tasks = {
        "a": {"p1": right, "p2": wrong, "p3": [right[0], wrong[1], right[2]]},
        "b": {"p1": wrong},
    }
    found = rank_eval(one, tasks)
    assert found.by_prompt["a"] == {"p1": 1.0, "p2": 0.0, "p3": pytest.approx(2 / 3)}
    assert found.by_set == {"a": pytest.approx(2 / 3), "b": 0.0}
    assert found.mean == pytest.approx(1 / 3)
    assert found.chance == pytest.approx((1 / 3 + 1 / 2 + 1 / 2) / 3)
    assert found.answers["a"]["p1"] == best


def test_every_prompt_is_read_once() -> None:
    one = source()
    rows: list[int] = []
    plain = one.model.decode

    def counted(ids: torch.Tensor, *args: object, **more: object) -> torch.Tensor:
        rows.append(ids.numel())
        return plain(ids, *args, **more)  # type: ignore[arg-type]

    one.model.decode = counted  # type: ignore[method-assign]
    long = Question([1] * 10, [[c, 2] for c in range(1, 9)], 0)
    score_choices(one, [long])
    assert rows == [11, 8]  # the prompt and bos; the first token of each choice


def test_ties_empty_choices_and_wrong_answers_name_the_example() -> None:
    one = source()
    with pytest.raises(DataError, match="data set 'd', prompt 'p': question 1: choices 0 and 1"):
        rank_eval(one, {"d": {"p": [QUESTIONS[1], Question([3], [[1], [1]], 0)]}})
    for question, told in (
        (Question([3], [[1], []], 0, name="row 8"), "row 8: choice 1 is empty"),
        (Question([3], [[1]], 0), "question 0 has 1 choices"),
        (Question([3], [[1], [2]], 2), "answer 2 is none of its 2"),
    ):
        with pytest.raises(DataError, match=told):
            score_choices(one, [question])
    with pytest.raises(DataError, match="needs the size of each choice"):
        score_choices(one, [Question([3], [[1], [2]], 0)], "bytes")
    with pytest.raises(ConfigError, match="nothing to rank"):
        rank_eval(one, {"d": {"p": []}})
    with pytest.raises(ConfigError, match="normalisation 'max'"):
        score_choices(one, QUESTIONS, "max")  # type: ignore[arg-type]
    with torch.no_grad():
        one.model.embedding.weight[1] = torch.nan
    with pytest.raises(DataError, match="not all finite"):
        rank_eval(one, {"d": {"p": [Question([3], [[1], [2]], 0)]}})
