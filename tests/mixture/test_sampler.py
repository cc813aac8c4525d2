"""The sampler: exact counts, any row directly, exact resume, no dependence on processes."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mixture_checks import MARGIN, counts_of, fluid, weight_vectors, worst_deviation

from polytask.errors import CheckpointError, ConfigError, PolytaskError
from polytask.mixture import (
    Draw,
    FixedPolicy,
    MixtureConfig,
    MixtureSampler,
    ScoreHistory,
    build_sampler,
    rank_rows,
)

NAMES, SIZES = ("a", "b", "c"), (20, 50, 130)


def sampler_of(batch_size: int = 8, seed: int = 0, **settings: object) -> MixtureSampler:
    return build_sampler(MixtureConfig(**settings), NAMES, SIZES, seed, batch_size)  # type: ignore[arg-type]


def same(one: Draw, two: Draw) -> bool:
    columns = ("group", "index", "epoch")
    return all(np.array_equal(getattr(one, c), getattr(two, c)) for c in columns)


@given(weight_vectors(60), st.integers(0, 10**6), st.lists(st.integers(1, 700), max_size=8))
@settings(max_examples=25, deadline=None)
def test_pieces_drawn_in_any_order_are_the_one_long_draw(
    weights: np.ndarray, start: int, pieces: list[int]
) -> None:
    def fresh() -> MixtureSampler:
        sizes = np.random.default_rng(0).integers(1, 5000, len(weights)).tolist()
        return MixtureSampler(sizes, FixedPolicy(tuple(weights)), 3, 8)

    whole = fresh().draw(start, sum(pieces))
    sampler, first = fresh(), np.cumsum([0, *pieces])
    for at in np.random.default_rng(len(pieces)).permutation(len(pieces)):
        part = slice(first[at], first[at + 1])
        piece = sampler.draw(start + int(first[at]), pieces[at])
        assert same(piece, Draw(whole.group[part], whole.index[part], whole.epoch[part]))


@pytest.mark.parametrize("policy", ["uniform", "proportional", "temperature"])
def test_an_epoch_of_a_group_has_every_row_once_and_the_next_in_another_order(policy: str) -> None:
    draw = sampler_of(policy=policy).draw(0, 3000)
    for group, size in enumerate(SIZES):
        index, epoch = draw.index[draw.group == group], draw.epoch[draw.group == group]
        assert (np.diff(epoch) >= 0).all()
        orders = [index[epoch == e].tolist() for e in range(int(epoch.max()))]
        assert all(sorted(order) == list(range(size)) for order in orders)
        assert len({tuple(order) for order in orders}) == len(orders)


def test_proportional_draws_complete_all_epochs_together() -> None:
    draw = sampler_of(policy="proportional").draw(0, 400)
    assert (draw.epoch == np.repeat([0, 1], 200)).all()


def test_without_shuffling_rows_come_in_order() -> None:
    draw = sampler_of(policy="uniform", shuffle=False).draw(0, 300)
    for group, size in enumerate(SIZES):
        mine = draw.group == group
        np.testing.assert_array_equal(draw.index[mine], np.arange(mine.sum()) % size)


def test_streams_are_read_in_order_beside_groups_of_known_size() -> None:
    sampler = build_sampler(MixtureConfig(policy="uniform"), ("web", "b"), (None, 7), 0, 4)
    draw = sampler.draw(0, 100)
    web = draw.group == 0
    np.testing.assert_array_equal(draw.index[web], np.arange(50))
    assert (draw.epoch[web] == 0).all() and draw.epoch[~web].max() == 7


def test_a_row_at_one_million_is_found_in_milliseconds() -> None:
    weights = tuple(np.random.default_rng(0).random(20))
    taken = []
    for _ in range(5):
        sampler = MixtureSampler([5000] * 20, FixedPolicy(weights), 0, 32)
        begin = time.process_time()
        sampler.draw(10**6, 32)
        taken.append(time.process_time() - begin)
    assert min(taken) < 0.05


@pytest.mark.parametrize(
    "settings",
    [
        {"policy": "temperature"},
        {"policy": "one_task_per_step"},
        {"policy": "all_tasks_per_step"},
        {"policy": "uniform", "stop": {"a": 2, "b": 1.5}},
        {"policy": "hardest", "round_rows": 24},
    ],
)
def test_resume_at_every_step_of_forty_is_the_unbroken_order(settings: dict[str, object]) -> None:
    losses = np.random.default_rng(0).random((40, 3)) + 0.5

    def train(sampler: MixtureSampler, first: int, last: int) -> list[Draw]:
        out = []
        for step in range(first, last):
            out.append(sampler.draw(step * 8, 8))
            sampler.observe(step, losses[step])
        return out

    unbroken = train(sampler_of(**settings), 0, 40)
    for stop in range(40):
        before = sampler_of(**settings)
        train(before, 0, stop)
        state = json.loads(json.dumps(before.state()))
        resumed = sampler_of(**settings)
        resumed.restore(state)
        rest = train(resumed, stop, 40)
        assert all(same(a, b) for a, b in zip(unbroken[stop:], rest, strict=True))


def test_the_state_of_fixed_weights_is_two_integers() -> None:
    state = sampler_of(policy="temperature").state()
    assert set(state) == {"seed", "fingerprint"}
    assert all(isinstance(value, int) for value in state.values())


@pytest.mark.parametrize(
    "other",
    [{"policy": "uniform"}, {"policy": "temperature", "stop": {"a": 1}}, {"shuffle": False}],
)
def test_a_checkpoint_of_another_mixture_is_refused(other: dict[str, object]) -> None:
    state = sampler_of(policy="temperature").state()
    with pytest.raises(CheckpointError, match="another mixture"):
        sampler_of(**other).restore(state)
    with pytest.raises(CheckpointError, match="another mixture"):
        sampler_of(seed=1).restore(state)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_together_draw_the_rows_of_one_process_in_order(world: int) -> None:
    whole = sampler_of(policy="temperature").draw(0, 400)
    groups = []
    for step in range(40):
        for rank in range(world):  # each rank has a sampler of its own
            groups.append(sampler_of(policy="temperature").draw(*rank_rows(step, 10, rank, world)))
    assert np.concatenate([g.group for g in groups]).tolist() == whole.group.tolist()
    assert np.concatenate([g.index for g in groups]).tolist() == whole.index.tolist()


def test_going_on_with_one_process_instead_of_two_keeps_the_order() -> None:
    whole = sampler_of(policy="proportional").draw(0, 160)
    rows = []
    for step in range(10):
        rows += [sampler_of(policy="proportional").draw(*rank_rows(step, 8, r, 2)) for r in (0, 1)]
    one = sampler_of(policy="proportional")
    rows += [one.draw(*rank_rows(step, 8, 0, 1)) for step in range(10, 20)]
    assert np.concatenate([r.index for r in rows]).tolist() == whole.index.tolist()


def test_one_task_per_step_gives_whole_steps_within_one_step_of_the_weights() -> None:
    sampler = sampler_of(policy="one_task_per_step", alpha=1.0)
    draw = sampler.draw(0, 8 * 2000)
    steps = draw.group.reshape(2000, 8)
    assert (steps == steps[:, :1]).all()
    assert worst_deviation(steps[:, 0], np.array(SIZES) / 200) <= 1 + MARGIN
    for group, size in enumerate(SIZES):
        index = draw.index[draw.group == group]
        assert sorted(index[:size].tolist()) == list(range(size))
    later = sampler.draw(8 * 1234 + 3, 11)
    np.testing.assert_array_equal(later.index, draw.index[8 * 1234 + 3 :][:11])


@pytest.mark.parametrize("batch_size", [3, 7, 8, 12])
def test_all_tasks_per_step_shares_every_step_as_evenly_as_possible(batch_size: int) -> None:
    draw = sampler_of(batch_size, policy="all_tasks_per_step").draw(0, batch_size * 500)
    for step in draw.group.reshape(500, batch_size):
        counts = np.bincount(step, minlength=3)
        assert counts.min() >= batch_size // 3 and counts.max() <= -(-batch_size // 3)
    assert worst_deviation(draw.group, np.full(3, 1 / 3)) <= 1 + MARGIN


def test_all_tasks_per_step_needs_room_for_all() -> None:
    with pytest.raises(ConfigError, match="batch_size is 2"):
        sampler_of(2, policy="all_tasks_per_step")


def test_first_exhausted_ends_before_any_row_repeats() -> None:
    sampler = sampler_of(policy="temperature", stop="first_exhausted")
    draw = sampler.draw(0, 10**5)
    assert len(draw) == sampler.total_rows and (draw.epoch == 0).all()
    weights = np.array(SIZES) ** 0.5 / (np.array(SIZES) ** 0.5).sum()
    assert sampler.total_rows == int((np.array(SIZES) / weights).min())
    assert len(sampler.draw(10**5, 8)) == 0


def test_all_exhausted_ends_once_every_row_has_come() -> None:
    sampler = sampler_of(policy="temperature", stop="all_exhausted")
    draw = sampler.draw(0, 10**5)
    for group, size in enumerate(SIZES):
        assert len(np.unique(draw.index[draw.group == group])) == size
    shorter = sampler.draw(0, len(draw) - 3)
    assert len(np.unique(shorter.index[shorter.group == 2])) < SIZES[2]


@pytest.mark.parametrize("policy", ["uniform", "temperature", "all_tasks_per_step"])
def test_a_group_stops_after_its_epochs_and_the_others_share_its_weight(policy: str) -> None:
    sampler = sampler_of(policy=policy, stop={"a": 2, "b": 1.5})
    draw = sampler.draw(0, 1000)
    assert (draw.group == 0).sum() == 40 and (draw.group == 1).sum() == 75
    weights = sampler.weights
    quota = fluid(weights, np.array([40, 75, -1]), 1000)
    assert np.abs(counts_of(draw.group, 3) - quota).max() <= 1 + MARGIN
    np.testing.assert_allclose(sampler.due(700), quota[699], atol=1e-6)
    assert sampler.total_rows is None


def test_a_mixture_whose_groups_all_stop_ends_with_all_of_their_rows() -> None:
    sampler = sampler_of(policy="uniform", stop={"a": 3, "b": 1, "c": 2})
    draw = sampler.draw(0, 10**4)
    assert sampler.total_rows == len(draw) == 60 + 50 + 260
    assert np.bincount(draw.group).tolist() == [60, 50, 260]


def test_one_task_per_step_stops_after_the_step_that_completes_the_epochs() -> None:
    draw = sampler_of(policy="one_task_per_step", stop={"a": 1}).draw(0, 4000)
    assert (draw.group == 0).sum() == 24  # 20 rows in steps of 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stop": {"d": 1}}, "mixture.stop names 'd'"),
        ({"stop": {"a": 0}}, "should be epochs > 0"),
        ({"sizes": {"x": 3}}, "mixture.sizes names 'x'"),
        ({"policy": "hardest", "stop": "all_exhausted"}, "needs fixed weights"),
    ],
)
def test_rules_that_make_no_sense_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sampler_of(**settings)


@pytest.mark.parametrize("stop", ["first_exhausted", "all_exhausted", {"web": 1.0}])
def test_a_stream_has_epochs_only_if_its_size_is_stated(stop: object) -> None:
    config = MixtureConfig(policy="uniform", stop=stop)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="'web' is a stream of unknown length"):
        build_sampler(config, ("web", "b"), (None, 7), 0, 4)
    stated = config.model_copy(update={"sizes": {"web": 12}})
    draw = build_sampler(stated, ("web", "b"), (None, 7), 0, 4).draw(0, 100)
    expected = {"first_exhausted": 7, "all_exhausted": 12}.get(str(stop), 12)
    assert (draw.group == 0).sum() == expected


def test_empty_groups_and_empty_mixtures_are_named() -> None:
    with pytest.raises(ConfigError, match="'b' has no rows"):
        MixtureSampler([3, 0], FixedPolicy((1, 1)), 0, 4, names=("a", "b"))
    with pytest.raises(ConfigError, match="needs groups"):
        MixtureSampler([], FixedPolicy(()), 0, 4)


def test_a_group_of_weight_zero_is_never_drawn() -> None:
    weights = {"a": 1.0, "b": 0.0, "c": 2.5}
    for stop in (None, {"a": 1.0}, "all_exhausted"):
        draw = sampler_of(policy="fixed", weights=weights, stop=stop).draw(0, 500)
        assert not (draw.group == 1).any()


@dataclass(frozen=True)
class Scripted:
    """An adaptive policy whose wishes are known in advance: by the latest observed step."""

    script: tuple[tuple[float, ...], ...]
    adaptive: bool = True
    unit: Literal["row", "step"] = "row"
    every_step: bool = False
    validates: bool = False

    def weights(self, history: ScoreHistory) -> np.ndarray:
        return np.array(self.script[history.step + 1])


def test_an_adaptive_policy_is_followed_on_the_whole_and_at_every_row_of_what_it_dealt() -> None:
    random = np.random.default_rng(0)
    script = random.dirichlet(np.ones(7) * 0.4, 60)
    policy = Scripted(tuple(map(tuple, script)))
    sampler = MixtureSampler([None] * 7, policy, 0, 10, round_rows=30)
    groups, wished = [], np.zeros(7)
    for step in range(150):
        draw = sampler.draw(step * 10, 10)
        groups.append(draw.group)
        counts = counts_of(np.concatenate(groups), 7)
        for row in range(step * 10, step * 10 + 10):
            assert np.abs(counts[row] - sampler.due(row + 1)).max() <= 1 + MARGIN
        if step % 3 == 2:  # a round ends
            wished += script[step // 3] * 30
            assert np.abs(counts[-1] - wished).max() <= 1 + MARGIN
            sampler.observe(step // 3, np.ones(7))


def test_hardest_gives_more_rows_to_the_group_that_does_not_learn() -> None:
    sampler = sampler_of(policy="hardest", round_rows=80, smoothing=0.5)
    counts = np.zeros(3)
    for step in range(100):
        draw = sampler.draw(step * 8, 8)
        if step >= 50:
            counts += np.bincount(draw.group, minlength=3)
        sampler.observe(step, [1.0, 3.0 * 0.95**step, 0.5 * 0.95**step])
    assert counts[0] > 4 * counts[1] and counts[0] > 4 * counts[2]
    assert counts.min() >= 0.1 / 3 * counts.sum() - 3  # the floor


def test_groups_stop_under_an_adaptive_policy_too() -> None:
    stop = {"a": 1.0, "b": 0.5, "c": 0.25}
    sampler = sampler_of(policy="hardest", round_rows=16, stop=stop)
    draw = sampler.draw(0, 10**4)
    assert np.bincount(draw.group).tolist() == [20, 25, 32]
    assert sampler.total_rows == 77


def test_rounds_long_past_are_refused_rather_than_made_up() -> None:
    sampler = sampler_of(policy="hardest", round_rows=8)
    sampler.draw(0, 800)
    with pytest.raises(PolytaskError, match="earliest that an adaptive policy still knows"):
        sampler.draw(0, 8)


@pytest.mark.parametrize("weights", [(0.5, 0.2), (np.nan, 1.0, 0.0), (-0.5, 1.0, 0.5), (1, 1, 1)])
def test_weights_that_are_no_shares_are_our_fault(weights: tuple[float, ...]) -> None:
    sampler = MixtureSampler([9, 9, 9], Scripted((weights,)), 0, 4)
    with pytest.raises(PolytaskError):
        sampler.draw(0, 4)


def test_draws_before_the_start_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot draw"):
        sampler_of().draw(-1, 4)
    with pytest.raises(ValueError, match="rank 2"):
        rank_rows(0, 8, 2, 2)


def test_what_a_draw_returns_is_the_callers_own() -> None:
    sampler = sampler_of()
    before = sampler.draw(0, 8).index.copy()
    sampler.draw(0, 8).index[:] = -1
    np.testing.assert_array_equal(sampler.draw(0, 8).index, before)


def test_memory_and_time_do_not_grow_with_the_position() -> None:
    sampler = MixtureSampler([100] * 5, FixedPolicy((1, 2, 3, 4, np.pi)), 0, 8)
    for start in (0, 10**6, 10**9, 10**12):
        draw = sampler.draw(start, 5000)
        counts = np.bincount(draw.group, minlength=5)
        assert np.abs(counts - sampler.weights * 5000).max() <= 2
        total = sampler.due(start + 5000) - sampler.due(start)
        assert np.abs(counts - total).max() <= 2 + 1e-3
