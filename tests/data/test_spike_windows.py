"""Windows: what is in them, what never is, and how they are split."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from polytask.data.spike_tokens import SpikeTokenizer
from polytask.data.spike_windows import SpikeBatch, SpikeWindows
from polytask.data.spikes import Recording
from polytask.errors import ConfigError, DataError

STEPS, UNITS = 800, 5


def recording(seed: int = 0, steps: int = STEPS, **more: object) -> Recording:
    rng = np.random.default_rng(seed)
    return Recording.from_arrays(
        rng.poisson(0.1, (UNITS, steps)),
        0.01,
        **{
            "frames": rng.random((steps // 5, 3, 4)),
            "frame_rate": 20.0,
            "behavior": {
                "speed": rng.standard_normal(steps // 5),
                "angle": rng.standard_normal(steps // 5),
                "place": np.array(["left", "right"])[rng.integers(0, 2, steps // 5)],
            },
            "dt_b": 0.05,
            **more,
        },  # type: ignore[arg-type]
    )


def tokenizer(**more: float) -> SpikeTokenizer:
    return SpikeTokenizer(UNITS, **{"dt": 0.01, "window": 0.05, "prev_window": 0.1, **more})


def windows(rec: Recording | None = None, **more: object) -> SpikeWindows:
    options = {"inputs": ["angle"], "targets": ["speed", "place"], "frame_window": 0.15, **more}
    return SpikeWindows(rec or recording(), tokenizer(), **options)  # type: ignore[arg-type]


def test_a_batch_holds_what_the_window_names() -> None:
    rec, found = recording(), windows()
    batch = found.batch([0, 7, 20])
    raster = rec.raster()
    for b, start in enumerate(batch.start.tolist()):
        now, before = raster[:, start : start + 5], raster[:, start - 10 : start]
        real = batch.ids[b][batch.ids[b] < UNITS]
        assert torch.equal(real, torch.from_numpy(np.repeat(*_events(now))))
        assert (batch.past_ids[b] < UNITS).sum() == before.sum()
        end = start + 5  # a frame and a sample every 5 bins
        assert batch.frames is not None and rec.frames is not None
        assert np.array_equal(batch.frames[b].numpy(), rec.frames[end // 5 - 3 : end // 5])
        assert batch.behavior["angle"][b].tolist() == [rec.behavior["angle"][start // 5]]
        assert batch.behavior_offset["angle"][b].tolist() == [0.0]
        assert batch.targets["speed"][b] == rec.behavior["speed"][start // 5]
        assert rec.classes["place"][batch.targets["place"][b]] in ("left", "right")
    assert batch.targets["place"].dtype == torch.int64
    assert batch.ids.shape == (3, 101) and batch.past_ids.shape == (3, 700)


def _events(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    step, unit = np.nonzero(counts.T)
    return unit, counts[unit, step]


def test_windows_tile_time_and_splits_follow_it() -> None:
    found = windows()
    assert np.all(np.diff(found.starts) == 5)
    ends = found.starts + 5
    assert ends[found.train].max() <= (found.starts - 10)[found.val].min()
    assert ends[found.val].max() <= (found.starts - 10)[found.test].min()
    assert len(found.train) + len(found.val) + len(found.test) < len(found)  # borders left out
    assert ends.max() == STEPS


def test_a_random_split_covers_every_window_once() -> None:
    found = windows(split="random", fractions=(0.8, 0.0, 0.2), seed=3)
    both = np.concatenate([found.train, found.test])
    assert np.array_equal(np.sort(both), np.arange(len(found)))
    assert not np.array_equal(found.train, windows(split="random", seed=4).train)


def perturbed(rec: Recording, after: int) -> Recording:
    """Everything from bin `after` on is replaced."""
    other = recording(99)
    raster = np.concatenate([rec.raster(0, after), other.raster(after, STEPS)], axis=1)
    cut = after // 5
    assert rec.frames is not None and other.frames is not None
    fresh = Recording.from_arrays(raster, 0.01)
    join = {k: np.concatenate([v[:cut], other.behavior[k][cut:]]) for k, v in rec.behavior.items()}
    frames = np.concatenate([rec.frames[:cut], other.frames[cut:]])
    return replace(rec, unit=fresh.unit, step=fresh.step, frames=frames, behavior=join)


def same(a: SpikeBatch, b: SpikeBatch) -> bool:
    flat = []
    for one in (a, b):
        rows = []
        for value in vars(one).values():
            rows += list(value.values()) if isinstance(value, dict) else [value]
        flat.append(rows)
    return all(torch.equal(x, y) for x, y in zip(*flat, strict=True))


@pytest.mark.parametrize("after", [100, 305, 400])
def test_the_future_changes_nothing_in_past_windows(after: int) -> None:
    rec = recording()
    one, two = windows(rec), windows(perturbed(rec, after))
    past = np.flatnonzero(one.starts + 5 <= after)
    assert len(past) > 10 and same(one.batch(past), two.batch(past))
    later = np.flatnonzero(one.starts >= after)
    assert not same(one.batch(later), two.batch(later))


def test_frames_that_end_late_do_leak_and_need_asking_for() -> None:
    rec = recording()
    one, two = (windows(r, frame_end=0.05) for r in (rec, perturbed(rec, 400)))
    at = np.flatnonzero(one.starts == 395)
    frames = [w.batch(at).frames for w in (one, two)]
    assert frames[0] is not None and frames[1] is not None
    assert not torch.equal(frames[0], frames[1])


def test_no_window_crosses_a_trial() -> None:
    rec = recording(trials=[(0.0, 2.0), (2.5, 4.03)])
    found = windows(rec)
    first, second = found.starts[found.starts < 200], found.starts[found.starts >= 200]
    assert first.min() >= 10 and first.max() + 5 <= 200
    assert second.min() - 10 >= 250 and second.max() + 5 <= 403


def test_many_samples_a_window_carry_their_offsets() -> None:
    rng = np.random.default_rng(1)
    rec = recording(
        behavior={"speed": rng.random(STEPS // 2)}, dt_b=0.02, frames=None, frame_rate=None
    )
    found = SpikeWindows(rec, tokenizer(window=0.04), inputs=["speed"])
    batch = found.batch([3])
    start = int(batch.start[0])
    assert torch.allclose(batch.behavior_offset["speed"], torch.tensor([[0.0, 0.02]]))
    assert np.array_equal(
        batch.behavior["speed"][0].numpy(), rec.behavior["speed"][start // 2 : start // 2 + 2]
    )


def test_samples_slower_than_windows_give_the_latest_one() -> None:
    rng = np.random.default_rng(1)
    rec = recording(
        behavior={"speed": rng.random(STEPS // 20)}, dt_b=0.2, frames=None, frame_rate=None
    )
    found = SpikeWindows(rec, tokenizer(), inputs=["speed"])
    batch = found.batch(np.arange(len(found)))
    end = batch.start.numpy() + 5
    latest = (end - 1) // 20
    assert np.array_equal(batch.behavior["speed"][:, 0].numpy(), rec.behavior["speed"][latest])
    offset = latest * 0.2 - batch.start.numpy() * 0.01
    assert np.allclose(batch.behavior_offset["speed"][:, 0].numpy(), offset, atol=1e-6)


def test_repeated_movies_are_stored_once() -> None:
    rec = recording()
    shown = np.tile(np.arange(40), 4)
    again = replace(rec, shown=shown, frames=rec.frames[:40] if rec.frames is not None else None)
    full = replace(rec, frames=rec.frames[shown] if rec.frames is not None else None)
    one, two = windows(again).batch([5, 60]), windows(full).batch([5, 60])
    assert same(one, two)


def test_the_few_shot_set_is_nested_and_inside_train() -> None:
    found = windows()
    small, large = found.subset(0.1, seed=2), found.subset(0.5, seed=2)
    assert set(small) <= set(large) <= set(found.train)
    assert len(found.subset(0.0001)) == 2
    with pytest.raises(ConfigError, match="fraction"):
        found.subset(0.0)


def test_counts_equal_the_raster() -> None:
    rec, found = recording(), windows()
    table = found.counts([0, 9], lags=4)
    for b, start in enumerate(found.starts[[0, 9]]):
        for lag in range(4):
            first = start - 5 * (3 - lag)
            want = rec.raster(max(first, 0), first + 5).sum(axis=1) if first > -5 else 0
            assert (table[b, lag] == want).all()


def test_the_scale_is_that_of_the_train_windows() -> None:
    rec, found = recording(), windows()
    seen = rec.behavior["speed"][found.starts[found.train] // 5]
    assert found.scale("speed") == pytest.approx((seen.mean(), seen.std()), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"inputs": ["sped"]}, DataError, "no behaviour 'sped'. Did you mean 'speed'"),
        ({"inputs": ["speed"]}, ConfigError, "'speed' is both an input and a target"),
        ({"split": "blocks"}, ConfigError, "unknown split 'blocks'"),
        ({"fractions": (0.5, 0.1, 0.1)}, ConfigError, "add up to 1"),
        ({"frame_window": -1.0}, ConfigError, "frame_window"),
        ({"frame_end": 0.003}, ConfigError, "frame_end = 0.003 s is not a whole number of bins"),
    ],
)
def test_mistakes_are_named(options: dict[str, object], kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        windows(**options)


def test_frames_that_are_not_there_and_windows_that_do_not_fit_are_named() -> None:
    bare = recording(frames=None, frame_rate=None)
    with pytest.raises(DataError, match="the recording has none"):
        windows(bare)
    with pytest.raises(DataError, match="no window fits"):
        windows(recording(steps=10), frame_window=0.0)
    with pytest.raises(DataError, match="knows 3 units"):
        SpikeWindows(bare, SpikeTokenizer(3, 0.01, 0.05, 0.1))
    with pytest.raises(ConfigError, match=r"dt is 0\.02"):
        SpikeWindows(bare, SpikeTokenizer(UNITS, 0.02, 0.04, 0.1))
    with pytest.raises(DataError, match=r"numbered 0 to"):
        windows().batch([10_000])


def test_a_full_past_block_is_refused_before_training() -> None:
    with pytest.raises(DataError, match=r"the pasts \(prev_block = 4\) find no room"):
        SpikeWindows(recording(), tokenizer(prev_block=4))
    with pytest.warns(UserWarning, match="find no room"):
        found = SpikeWindows(recording(), tokenizer(prev_block=4, allow_truncation=True))
    assert found.truncated["past"] > 0.05
