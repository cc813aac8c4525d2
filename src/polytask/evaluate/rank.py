"""Rank evaluation: a model answers with the choice that it finds most likely after the prompt.

    log p(choice | prompt) by choice   sum, or mean per token, per byte, or less log p(choice)
    answer                             the highest
    accuracy                           by prompt template; median over templates; mean over sets

The prompt is read once for all of its choices: its cache is copied, and only choices are fed. A tie
is an error that names the example, since an answer that is decided by the order of choices says
nothing; so is a choice without tokens, whose likelihood is 1.

Wang, Roberts et al. 2022 (arXiv 2204.05832), section 3.3: sums, median over prompts, mean over
data sets. The same normalisation has to be used for everything that is compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from polytask.errors import ConfigError, DataError
from polytask.infer.fusion_generate import check_ids, pad_left
from polytask.infer.logit_sources import LogitSource

Norm = Literal["sum", "mean", "bytes", "unconditional"]
Floats = npt.NDArray[np.float64]
NORMS: tuple[Norm, ...] = ("sum", "mean", "bytes", "unconditional")


@dataclass(frozen=True)
class Question:
    """A prompt and its choices as token ids; `answer` is the right one's place. `sizes` are the
    choices' lengths in bytes, for norm 'bytes'. `name` says in errors where it came from."""

    prompt: Sequence[int]
    choices: Sequence[Sequence[int]]
    answer: int
    sizes: Sequence[int] = ()
    name: str = ""


# data set -> prompt template -> its questions
RankTasks = Mapping[str, Mapping[str, Sequence[Question]]]


@dataclass(frozen=True)
class RankScores:
    """Accuracies: `by_prompt` of every template, `by_set` their median, `mean` over data sets.
    `chance` is what guessing gets, over data sets."""

    norm: Norm
    by_prompt: dict[str, dict[str, float]]
    by_set: dict[str, float]
    mean: float
    chance: float
    answers: dict[str, dict[str, list[int]]] = field(default_factory=dict)


def rank_eval(
    source: LogitSource,
    tasks: RankTasks,
    norm: Norm = "sum",
    batch_size: int = 32,
    empty: Sequence[int] = (),
) -> RankScores:
    """Accuracy of every data set and template, and their summary.

    empty: what stands for no prompt in norm 'unconditional': nothing for polytask's own models,
    the first token of a text for a Hugging Face model.

    Errors: `DataError` naming the example for a tie, a choice without tokens, fewer than two
    choices, or an answer that is none; `ConfigError` for nothing to evaluate.
    """
    if not tasks or not all(prompts and all(prompts.values()) for prompts in tasks.values()):
        raise ConfigError("there is nothing to rank: every data set needs a prompt with questions")
    by_prompt: dict[str, dict[str, float]] = {}
    answers: dict[str, dict[str, list[int]]] = {}
    guesses = []
    for name, prompts in tasks.items():
        by_prompt[name], answers[name] = {}, {}
        for template, questions in prompts.items():
            where = f"data set '{name}', prompt '{template}'"
            scores = score_choices(source, questions, norm, batch_size, where, empty)
            chosen = [_winner(s, q, i, where) for i, (s, q) in enumerate(zip(scores, questions))]
            right = [c == q.answer for c, q in zip(chosen, questions, strict=True)]
            by_prompt[name][template] = float(np.mean(right))
            answers[name][template] = chosen
        some = next(iter(prompts.values()))
        guesses.append(float(np.mean([1 / len(q.choices) for q in some])))
    by_set = {name: float(np.median(list(found.values()))) for name, found in by_prompt.items()}
    mean = float(np.mean(list(by_set.values())))
    return RankScores(norm, by_prompt, by_set, mean, float(np.mean(guesses)), answers)


def score_choices(
    source: LogitSource,
    questions: Sequence[Question],
    norm: Norm = "sum",
    batch_size: int = 32,
    where: str = "questions",
    empty: Sequence[int] = (),
) -> list[Floats]:
    """(choices,) scores of every question, higher is better; `batch_size` counts prompts."""
    if norm not in NORMS:
        raise ConfigError(f"normalisation '{norm}': one of {', '.join(NORMS)} is expected")
    for number, question in enumerate(questions):
        _check(question, _name(question, number, where), norm)
    size = len(source.vocabulary)
    check_ids([q.prompt for q in questions], size, "prompt")
    check_ids([c for q in questions for c in q.choices], size, "choice")
    found: list[Floats] = [np.zeros(0)] * len(questions)
    # Prompts of like length together: less padding, and order changes no score.
    order = sorted(range(len(questions)), key=lambda i: len(questions[i].prompt))
    for first in range(0, len(order), batch_size):
        part = order[first : first + batch_size]
        prompts = [questions[i].prompt for i in part]
        sums = _log_likelihoods(source, prompts, [questions[i].choices for i in part])
        for i, total in zip(part, sums, strict=True):
            found[i] = total
    if norm == "unconditional":
        alone = _unconditional(source, questions, empty)
        return [
            total - np.array([alone[tuple(choice)] for choice in q.choices])
            for total, q in zip(found, questions, strict=True)
        ]
    if norm == "sum":
        return found
    return [
        total / np.array(q.sizes if norm == "bytes" else [len(c) for c in q.choices])
        for total, q in zip(found, questions, strict=True)
    ]


def _unconditional(
    source: LogitSource, questions: Sequence[Question], empty: Sequence[int]
) -> dict[tuple[int, ...], float]:
    """log p of every choice that occurs, after no prompt."""
    choices = sorted({tuple(choice) for q in questions for choice in q.choices})
    (total,) = _log_likelihoods(source, [empty], [choices])
    return dict(zip(choices, total.tolist(), strict=True))


@torch.no_grad()
def _log_likelihoods(
    source: LogitSource,
    prompts: Sequence[Sequence[int]],
    choices: Sequence[Sequence[Sequence[int]]],
) -> list[Floats]:
    """Sums of log p of every choice's tokens; each prompt goes through the model once."""
    ids, valid = pad_left(prompts)
    logits, cache = source.forward(ids, None, valid)
    counts = [len(some) for some in choices]
    owner = torch.repeat_interleave(torch.arange(len(prompts)), torch.tensor(counts))
    flat = [choice for some in choices for choice in some]
    lengths = torch.tensor([len(choice) for choice in flat])
    width = int(lengths.max())
    label = torch.zeros(len(flat), width, dtype=torch.long)
    for row, choice in enumerate(flat):
        label[row, : len(choice)] = torch.tensor(list(choice))
    first = logits.double().log_softmax(-1).cpu()[owner]
    total = first.gather(1, label[:, :1])[:, 0]
    if width > 1:
        # Padding is on the right, after the tokens that count: causality keeps it unseen.
        cache = source.select(cache, owner)
        later, _ = source.forward(label[:, :-1], cache, last=False)
        each = _picked(later, label[:, 1:])
        total = total + (each * (torch.arange(1, width) < lengths[:, None])).sum(1)
    parts: list[Floats] = [part.numpy() for part in torch.split(total, counts)]
    return parts


def _picked(logits: Tensor, label: Tensor) -> Tensor:
    label = label.to(logits.device)
    value = logits.gather(2, label[:, :, None])[:, :, 0].double()
    return (value - logits.double().logsumexp(-1)).cpu()


def _winner(scores: Floats, question: Question, number: int, where: str) -> int:
    name = _name(question, number, where)
    if not np.isfinite(scores).all():
        raise DataError(f"{name}: the choices' scores are {scores.tolist()}, not all finite")
    best = np.flatnonzero(scores == scores.max())
    if len(best) > 1:
        raise DataError(
            f"{name}: choices {' and '.join(map(str, best.tolist()))} are equally likely "
            f"({scores.max():.6g}), so the answer would depend on their order. Are two choices the "
            "same tokens?"
        )
    return int(best[0])


def _check(question: Question, name: str, norm: Norm) -> None:
    if len(question.choices) < 2:
        raise DataError(f"{name} has {len(question.choices)} choices: at least 2 are needed")
    for place, choice in enumerate(question.choices):
        if not len(choice):
            raise DataError(f"{name}: choice {place} is empty, so there is nothing to score")
    if not 0 <= question.answer < len(question.choices):
        raise DataError(
            f"{name}: answer {question.answer} is none of its {len(question.choices)} choices"
        )
    if norm == "bytes" and (
        len(question.sizes) != len(question.choices) or min(question.sizes) < 1
    ):
        raise DataError(f"{name}: norm 'bytes' needs the size of each choice in bytes")


def _name(question: Question, number: int, where: str) -> str:
    return question.name or f"{where}: question {number}"
