"""Skill-It against its closed form, and what it must not be: Hedge, memoryless, or transposed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polytask.configs import parse
from polytask.errors import ConfigError, PolytaskError
from polytask.mixture import (
    Curriculum,
    MixtureConfig,
    MixtureSampler,
    OnlineMixture,
    ScoreHistory,
    SkillGraph,
    SkillIt,
    build_sampler,
)

NAMES = ("a", "b", "c")
MATRIX = ((1.0, 0.5, 0.2), (0.0, 1.0, 0.7), (0.1, 0.0, 1.0))
LOSSES = ((2.0, 1.5, 3.0), (1.0, 1.4, 2.5), (0.4, 1.1, 2.2), (0.1, 0.9, 1.7), (0.1, 0.3, 1.1))
GRAPH = SkillGraph(MATRIX, NAMES)


def closed_form(
    eta: float, window: int, t: int, losses: Sequence[Sequence[float]], A: Sequence[Sequence[float]]
) -> list[float]:
    """p_{t+1} with plain loops: exp(eta * sum over the last `window` rounds of A L), normalised."""
    raw = []
    for row in A:
        score = 0.0
        if t == 0:
            score = sum(row)
        for tau in range(max(0, t - window), t):
            score += sum(a * loss for a, loss in zip(row, losses[tau], strict=True))
        raw.append(math.exp(eta * score))
    return [value / sum(raw) for value in raw]


def played(policy: SkillIt, losses: Sequence[Sequence[float]]) -> list[list[float]]:
    """Shares of every round for a table of losses at the rounds' ends."""
    mixture = OnlineMixture(policy)
    out = [list(mixture.shares.values())]
    for t, row in enumerate(losses):
        shares = mixture.update(dict(zip(policy.names, row)), step=100 * (t + 1))
        out.append(list(shares.values()))
    return out


@pytest.mark.parametrize("window", [1, 2, 3, 10])
@pytest.mark.parametrize("eta", [0.1, 0.5, 2.0])
def test_shares_are_the_closed_form_to_twelve_digits(window: int, eta: float) -> None:
    found = played(SkillIt(GRAPH, eta=eta, window=window), LOSSES)
    for t, shares in enumerate(found):
        assert shares == pytest.approx(closed_form(eta, window, t, LOSSES, MATRIX), abs=1e-12)


def test_it_is_not_hedge_and_forgets_what_left_the_window() -> None:
    """Multiplying by the previous shares would keep the first loss for ever."""
    table = [(50.0, 0.0, 0.0)] + [(1.0, 1.0, 1.0)] * 3
    shares = played(SkillIt(SkillGraph.identity(NAMES), eta=0.5, window=3), table)
    assert shares[1][0] > 0.999
    assert shares[3][0] > 0.999  # still in the window
    assert shares[4] == pytest.approx([1 / 3] * 3, abs=1e-12)
    hedge = np.full(3, 1 / 3)
    for row in table:
        hedge = hedge * np.exp(0.5 * np.array(row))
        hedge /= hedge.sum()
    assert hedge[0] > 0.999 and abs(shares[4][0] - hedge[0]) > 0.6


def test_a_window_of_three_differs_from_one_and_from_none() -> None:
    by = {w: np.array(played(SkillIt(GRAPH, window=w), LOSSES)[-1]) for w in (1, 3, 5)}
    assert np.abs(by[1] - by[3]).max() > 0.05
    assert np.abs(by[5] - by[3]).max() > 0.05


def test_mass_goes_to_prerequisites_and_not_to_followers() -> None:
    """a -> b, and only b is still unlearned: a is trained on. Transposed it would not be."""
    graph = SkillGraph([[1, 1], [0, 1]], ["a", "b"])
    hard = [(0.0, 2.0)]
    shares = played(SkillIt(graph, eta=1.0), hard)[-1]
    assert shares == pytest.approx([0.5, 0.5])
    wrong = played(SkillIt(graph.transposed(), eta=1.0), hard)[-1]
    assert wrong[0] == pytest.approx(1 / (1 + math.exp(2.0)), abs=1e-12)


def test_a_skill_without_edges_is_never_starved() -> None:
    graph = SkillGraph([[0, 0], [0, 1]], ["a", "b"])
    shares = played(SkillIt(graph, eta=1.0), [(9.0, 2.0)])[-1]
    assert shares[0] == pytest.approx(1 / (1 + math.exp(2.0)), abs=1e-12)


def test_targets_keep_their_columns_and_average_the_window() -> None:
    found = played(SkillIt(GRAPH, eta=0.5, window=3, targets=("c",), names=NAMES), LOSSES)
    column = [[row[2]] for row in MATRIX]
    mean = [[sum(row[2] for row in LOSSES[2:5]) / 3]]
    assert found[-1] == pytest.approx(closed_form(0.5, 1, 1, mean, column), abs=1e-12)
    summed = SkillIt(GRAPH, eta=0.5, targets=("c",), reduce="sum", names=NAMES)
    total = [[sum(row[2] for row in LOSSES[2:5])]]
    expected = closed_form(0.5, 1, 1, total, column)
    assert played(summed, LOSSES)[-1] == pytest.approx(expected, abs=1e-12)


def test_out_of_domain_skills_are_judged_and_not_trained_on() -> None:
    graph = SkillGraph([[0.3, 0.0], [0.1, 0.9]], ["p", "q"], ["x", "y"])
    policy = SkillIt(graph, eta=0.2)
    assert policy.names == ("p", "q", "x", "y")
    mixture = OnlineMixture(policy)
    shares = mixture.update({"x": 1.0, "y": 2.0}, step=10)
    raw = np.exp(0.2 * np.array([0.3 * 1.0, 0.1 * 1.0 + 0.9 * 2.0]))
    assert list(shares.values()) == pytest.approx([*(raw / raw.sum()), 0, 0], abs=1e-12)


def test_a_prior_multiplies_the_shares() -> None:
    prior = {"a": 3.0, "c": 0.0}
    found = played(SkillIt(GRAPH, prior=prior), LOSSES)
    for t, shares in enumerate(found):
        plain = np.array(closed_form(0.5, 3, t, LOSSES, MATRIX)) * [3.0, 1.0, 0.0]
        assert shares == pytest.approx(list(plain / plain.sum()), abs=1e-12)
    first = played(SkillIt(GRAPH, prior={"a": 3.0}, official=True), [])[0]
    raw = np.array([3.0, 1.0, 1.0]) * np.exp(0.5 * np.array(MATRIX) @ [3.0, 1.0, 1.0])
    assert first == pytest.approx(list(raw / raw.sum()), abs=1e-12)


def test_losses_relative_to_the_start_and_the_schedule_of_eta() -> None:
    start, rounds = LOSSES[0], LOSSES[1:]
    for option in ("normalize_loss", "eta_schedule"):
        mixture = OnlineMixture(SkillIt(GRAPH, **{option: True}))  # type: ignore[arg-type]
        mixture.update(dict(zip(NAMES, start)), 0)
        for t, row in enumerate(rounds):
            shares = mixture.update(dict(zip(NAMES, row)), t + 1)
        if option == "normalize_loss":
            table = [[x / s for x, s in zip(row, start)] for row in rounds]
            expected = closed_form(0.5, 3, 4, table, MATRIX)
        else:
            eta = 0.5 * sum(start) / sum(rounds[-1])
            expected = closed_form(eta, 3, 4, rounds, MATRIX)
        assert list(shares.values()) == pytest.approx(expected, abs=1e-12)


def test_edges_are_halved_after_every_round() -> None:
    found = played(SkillIt(GRAPH, dynamic_lambda=True), LOSSES[:2])
    halved = [[a if i == j else a / 4 for j, a in enumerate(row)] for i, row in enumerate(MATRIX)]
    assert found[2] == pytest.approx(closed_form(0.5, 3, 2, LOSSES, halved), abs=1e-12)


def test_lone_skills_keep_an_equal_share() -> None:
    graph = SkillGraph([[1, 0.5, 0], [0, 1, 0], [0, 0, 1]], NAMES)
    found = played(SkillIt(graph, ignore_lone_nodes=True), [(1.0, 2.0, 9.0)])[-1]
    two = np.exp(0.5 * np.array([1.0 + 0.5 * 2.0, 2.0]))
    assert found == pytest.approx([*(2 / 3 * two / two.sum()), 1 / 3], abs=1e-12)
    alone = SkillIt(SkillGraph.identity(NAMES), ignore_lone_nodes=True)
    assert played(alone, LOSSES)[-1] == pytest.approx([1 / 3] * 3)


def test_exponents_of_any_size_are_safe() -> None:
    shares = played(SkillIt(SkillGraph.identity(NAMES), eta=100.0), [(50.0, 50.0, 49.9)])[-1]
    assert shares[2] == pytest.approx(math.exp(-10.0) / (2 + math.exp(-10.0)), rel=1e-6)
    assert sum(shares) == pytest.approx(1)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(st.floats(0, 1e4), min_size=3, max_size=3), min_size=1, max_size=6),
    st.floats(1e-3, 10),
    st.integers(1, 5),
)
def test_shares_are_a_distribution_for_any_losses(
    table: list[list[float]], eta: float, window: int
) -> None:
    for shares in played(SkillIt(GRAPH, eta=eta, window=window), table):
        assert min(shares) >= 0 and sum(shares) == pytest.approx(1)


@pytest.mark.parametrize("loss", [float("nan"), -0.1, float("inf")])
def test_a_loss_that_is_none_names_the_skill(loss: float) -> None:
    mixture = OnlineMixture(SkillIt(GRAPH))
    with pytest.raises(PolytaskError, match="skill 'b' at step 7"):
        mixture.update({"a": 1.0, "b": loss, "c": 1.0}, 7)


def test_mistakes_in_settings_are_told() -> None:
    with pytest.raises(ConfigError, match="window = 0"):
        SkillIt(GRAPH, window=0)
    with pytest.raises(ConfigError, match="eta = 0"):
        SkillIt(GRAPH, eta=0)
    with pytest.raises(ConfigError, match="prior names 'd'"):
        SkillIt(GRAPH, prior={"d": 1.0})
    with pytest.raises(ConfigError, match=r"prior\.a = -1"):
        SkillIt(GRAPH, prior={"a": -1.0})
    with pytest.raises(ConfigError, match="neither a row nor a column for 'd'"):
        SkillIt(GRAPH, names=(*NAMES, "d"))
    with pytest.raises(ConfigError, match="neither a row nor a column for 'd'"):
        SkillIt(GRAPH, targets=("a",), names=(*NAMES, "d"))
    with pytest.raises(ConfigError, match="names 'c', which is no task"):
        SkillIt(GRAPH, names=("a", "b"))
    with pytest.raises(ConfigError, match="no evaluation skill 'd'"):
        SkillIt(GRAPH, targets=("d",))
    with pytest.raises(ConfigError, match="ignore_lone_nodes"):
        SkillIt(GRAPH, targets=("a",), ignore_lone_nodes=True)
    with pytest.raises(ConfigError, match="a loss is given for 'x'"):
        OnlineMixture(SkillIt(GRAPH)).update({"x": 1.0}, 1)
    with pytest.raises(ConfigError, match="window"):
        parse(MixtureConfig, {"policy": "skillit", "window": 0}, "mixture")
    with pytest.raises(ConfigError, match="loss_every"):
        parse(MixtureConfig, {"policy": "skillit", "loss_every": 5}, "mixture")


# In the sampler


def made(**options: object) -> MixtureSampler:
    given = {"policy": "skillit", "graph": GRAPH.to_dict(), "update_steps": 5, **options}
    return build_sampler(parse(MixtureConfig, given, "mixture"), NAMES, [50, 60, 70], 1, 4)


def run(sampler: MixtureSampler, losses: Sequence[Sequence[float]], start: int = 0) -> np.ndarray:
    """Rows per round and group, told validation losses where the sampler asks for them."""
    counts = []
    for t in range(start, len(losses)):
        rows = np.zeros(3, dtype=int)
        for step in range(5 * t, 5 * t + 5):
            last = 4 * step + 3
            if sampler.wants_validation(step, last):
                sampler.evaluate(step, last, losses[t])
            rows += np.bincount(sampler.draw(4 * step, 4).group, minlength=3)
        counts.append(rows)
    return np.array(counts)


def test_rounds_of_the_sampler_have_exactly_the_policys_rows() -> None:
    counts = run(made(), LOSSES)
    assert (counts.sum(1) == 20).all()
    dealt = np.zeros(3)
    for t, rows in enumerate(counts):
        # Losses told before round 1 are those of the start and do not count.
        dealt += 20 * np.array(closed_form(0.5, 3, t, LOSSES[1:], MATRIX))
        assert np.abs(counts[: t + 1].sum(0) - dealt).max() <= 1
        assert rows.min() >= 0


def test_a_resumed_sampler_goes_on_as_if_nothing_had_happened() -> None:
    whole = run(made(), LOSSES)
    first = made()
    run(first, LOSSES[:3])
    state = json.loads(json.dumps(first.state()))
    second = made()
    second.restore(state)
    assert np.array_equal(run(second, LOSSES, start=3), whole[3:])


def test_the_authors_code_sees_checkpoints_before_the_rounds_end() -> None:
    """Every 5 steps = every round: the newest loss is the one from the start of the round."""
    sampler = made(official=True, loss_every=5)
    counts = run(sampler, LOSSES)
    for t in range(len(LOSSES)):
        dealt = sum(20 * np.array(closed_form(0.5, 3, n, LOSSES, MATRIX)) for n in range(t + 1))
        assert np.abs(counts[: t + 1].sum(0) - dealt).max() <= 1
    often = made(official=True, loss_every=2)
    assert [s for s in range(9) if often.wants_validation(s, 4 * s + 3)] == [0, 2, 4, 6, 8]


def test_a_graph_that_is_to_be_learned_cannot_be_used_as_it_is() -> None:
    with pytest.raises(ConfigError, match="'auto' is learned"):
        made(graph="auto")
    assert made(graph=None).policy.graph == SkillGraph.identity(NAMES)  # type: ignore[attr-defined]


# Curricula


def test_a_curriculum_adds_a_group_per_phase() -> None:
    policy = Curriculum(NAMES, ("c", "a", "b"), phase_steps=10)
    history = ScoreHistory(3)
    seen = []
    for step in (9, 19, 29, 39):
        seen.append(policy.weights(history).tolist())
        history.observe(step, [1.0, 1.0, 1.0])
    third = 1 / 3
    assert seen == [[0, 0, 1], [0.5, 0, 0.5], [third, third, third], [third, third, third]]
    alone = Curriculum(NAMES, ("c", "a", "b"), phase_steps=40, cumulative=False)
    assert alone.weights(history).tolist() == [1, 0, 0]


def test_a_curriculum_by_losses_begins_with_the_lowest() -> None:
    policy = Curriculum(NAMES, phase_steps=10)
    assert policy.validates
    mixture = OnlineMixture(policy)
    with pytest.raises(PolytaskError, match="validation losses first"):
        _ = mixture.shares
    assert mixture.update({"a": 2.0, "b": 0.5, "c": 1.0}, 0) == {"a": 0, "b": 1, "c": 0}
    assert mixture.update({"a": 0.0, "b": 0.5, "c": 1.0}, 10) == {"a": 0, "b": 0.5, "c": 0.5}
    with pytest.raises(ConfigError, match="every task once"):
        Curriculum(NAMES, ("a", "b"))
