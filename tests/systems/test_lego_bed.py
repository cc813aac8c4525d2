"""LEGO and addition are exact, and training on them is paired, counted and repeatable."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from polytask.mixture import OnlineMixture, SkillGraph, SkillIt
from polytask.rng import generator
from polytask.systems.testbeds import addition, lego
from polytask.systems.testbeds import skill_training as bed

TINY = bed.Bed(
    dim=16, layers=1, heads=2, batch=4, start_steps=2, round_steps=2, graph_steps=2,
    graph_mode="single", valid=8, test=8,
)  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bed, "cache_root", lambda: tmp_path_factory.getbasetemp() / "lego")


@pytest.mark.parametrize(("chain", "skill"), [(c, s) for c in (1, 3, 5) for s in range(c)])
def test_the_answer_of_every_chain_is_what_following_it_gives(chain: int, skill: int) -> None:
    found = lego.items(generator(1, chain, skill), skill, 300, chain)
    assert found.shape == (300, lego.length(chain))
    for ids in found:
        text = lego.words(ids)
        assert lego.solve(text) == lego.WORDS[ids[-1]]
        names = [clause.split()[0] for clause in text[7:].split(" Output")[0].split(" , ")]
        assert len(set(names)) == chain
        assert _depth(text) == skill


def _depth(text: str) -> int:
    """How many clauses the variable asked for is away from the one with a bit."""
    given, asked = text.removeprefix("Input: ").removesuffix(".").split(" . Output: ")
    what = {c.split()[0]: c.split()[3] for c in given.split(" , ")}
    depth, name = 0, asked.split()[0]
    while what[name] not in "01":
        depth, name = depth + 1, what[name]
    return depth


def test_chains_are_balanced_and_in_random_order() -> None:
    found = lego.items(generator(0, "balance"), 2, 4000, 3)
    assert abs((found[:, -1] == lego.ONE).mean() - 0.5) < 0.04
    clauses = found[:, 1:16].reshape(-1, 3, 5)
    with_bit = (clauses[:, :, 3] >= lego.ZERO).argmax(1)
    assert np.abs(np.bincount(with_bit, minlength=3) / 4000 - 1 / 3).max() < 0.04
    letters = np.bincount(clauses[:, :, 0].ravel(), minlength=26)
    assert letters.min() > 300 and letters.max() < 620  # 462 each are expected


def test_a_skill_beyond_the_chain_is_refused() -> None:
    with pytest.raises(ValueError, match="skill 3 of a chain of 3"):
        lego.items(generator(0), 3, 1, 3)
    assert lego.items(generator(0), 0, 0, 3).shape == (0, 21)


def test_recall_asks_for_every_variable_that_was_given() -> None:
    ids, answers = lego.recall(generator(3), 50, 4)
    assert ids.shape == (50, 42)
    for row in ids:
        given, asked = lego.words(row).removeprefix("Input: ").split(" Output: ")
        pairs = [
            {c.split()[0]: c.split()[3] for c in side.replace(".", ",").split(" ,") if c.strip()}
            for side in (given, asked)
        ]
        assert pairs[0] == pairs[1] and len(pairs[0]) == 4
        assert [lego.WORDS[i] for i in row[answers]] == list(pairs[1].values())


@pytest.mark.parametrize("digits", [1, 3, 4])
def test_digits_of_sums_are_right(digits: int) -> None:
    for skill in range(digits):
        for ids in addition.items(generator(2, digits, skill), skill, 100, digits):
            words = addition.words(ids).split()
            plus, comma = words.index("+"), words.index(",")
            one, other = int("".join(words[3:plus])), int("".join(words[plus + 1 : comma]))
            assert words[comma + 2] == str(skill)
            assert words[-1] == str((one + other) // 10**skill % 10)
    assert addition.words(addition.items(generator(0), 0, 1)[0]).startswith("Input: A = ")
    with pytest.raises(ValueError, match="digit 3 of sums of 3"):
        addition.items(generator(0), 3, 1)


def test_the_nth_item_of_a_skill_is_the_same_however_it_is_reached() -> None:
    one, other = bed.Items(TINY, 5, "train"), bed.Items(TINY, 5, "train")
    whole = one.take(1, 1200)
    other.take(0, 7)
    pieces = [other.take(1, n) for n in (0, 511, 1, 200, 488)]
    assert np.array_equal(np.concatenate(pieces), whole)
    assert not np.array_equal(bed.Items(TINY, 5, "test").take(1, 1200), whole)


def test_rounds_have_whole_counts_by_the_shares() -> None:
    shares = {"depth 1": 0.0, "depth 2": 0.25, "depth 3": 0.75}
    drawn = bed.Items(TINY, 0, "train").round(shares, 40, 0)
    depths = [_depth(lego.words(ids)) for ids in drawn.numpy()]
    assert np.bincount(depths, minlength=3).tolist() == [0, 10, 30]
    by_chance = bed.Items(TINY, 0, "train").round(shares, 400, 0, exact=False)
    counts = np.bincount([_depth(lego.words(i)) for i in by_chance.numpy()], minlength=3)
    assert counts[0] == 0 and 60 < counts[1] < 140 and counts[1] != 100


def test_the_loss_is_that_of_the_next_word_and_weighs_the_answer_most() -> None:
    """One plain step against the gradient of the loss written as a loop."""
    from dataclasses import replace

    setting = replace(TINY, warmup=1)
    ids = torch.from_numpy(lego.items(generator(4), 1, 4, 3))
    model, other = bed.ChainModel(setting, 1), bed.ChainModel(setting, 1)
    bed.train(model, ids, setting, 0.1, torch.optim.SGD(model.parameters(), 0.1), 0)
    logits = other(ids[:, :-1]).log_softmax(-1)
    length = ids.shape[1] - 1
    weight = [setting.context] * (length - 1) + [1.0]
    total = torch.zeros(())
    for row, t in itertools.product(range(4), range(length)):
        total = total - weight[t] * logits[row, t, ids[row, t + 1]]
    (total / (4 * sum(weight))).backward()
    torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(mine, theirs - 0.1 * theirs.grad, atol=1e-6)


def test_words_see_the_past_only() -> None:
    model = bed.ChainModel(TINY, 0)
    ids = torch.from_numpy(lego.items(generator(1), 2, 1, 3))
    changed = ids.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 26
    same = (model(ids) - model(changed)).detach().abs().amax(-1)[0]
    assert float(same[:10].max()) == 0 and float(same[10:].min()) > 0


def test_runs_are_repeatable_and_paired_and_a_learning_mixture_sees_validation_losses(
    tmp_path: Path,
) -> None:
    graph = bed.graph_by_hand(TINY)
    assert graph.A.tolist() == [[1, 0.5, 0], [0, 1, 0.5], [0, 0, 1]]
    equal = dict.fromkeys(TINY.names, 1 / 3)
    first, again = (bed.run(TINY, 3, 4, 1e-3, equal) for _ in range(2))
    assert first == again and first.steps == [0, 2, 4]
    mixture = OnlineMixture(SkillIt(graph))
    learned = bed.run(TINY, 3, 4, 1e-3, mixture)
    assert learned.accuracy[0] == first.accuracy[0]  # the same start
    told = [dict(zip(mixture.policy.names, losses)) for _, losses in mixture.history.evaluations]
    assert told == learned.valid
    assert learned.shares[0] == pytest.approx(OnlineMixture(SkillIt(graph)).shares)
    with pytest.raises(ValueError, match="3 steps are not whole rounds of 2"):
        bed.run(TINY, 3, 3, 1e-3, equal)


def test_the_area_is_the_mean_over_steps() -> None:
    rows = [{"a": 0.0, "b": 0.2}, {"a": 0.5, "b": 0.5}, {"a": 1.0, "b": 0.0}]
    curve = bed.Curve(steps=[0, 2, 6], accuracy=rows)
    assert curve.area() == pytest.approx((2 * (0.1 + 0.5) / 2 + 4 * 0.5) / 6)
    assert curve.area(2) == pytest.approx(0.3)
    assert curve.area(0) == pytest.approx(0.1)
    assert curve.mean() == pytest.approx(0.5)


def test_a_learned_graph_is_kept_and_starts_are_too() -> None:
    found = bed.learned_graph(TINY)
    assert found.runs == 3 and found.graph.shape == (3, 3)
    told: list[str] = []
    assert bed.learned_graph(TINY, told.append).graph == found.graph and not told
    assert isinstance(found.graph, SkillGraph)
    one, other = bed.start(TINY, 9), bed.start(TINY, 9)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))
