"""The composed testbed: exact pixels, disjoint parts, reproducible noise."""

from __future__ import annotations

import numpy as np
import pytest

from polytask.data.glyphs import Glyphs, draw_pairs, glyphs, overlay, replace_labels
from polytask.errors import ConfigError


@pytest.fixture
def items() -> Glyphs:
    """40 distinct 4x4 pictures: item i has the value i + 1 everywhere."""
    image = np.arange(1, 41, dtype=np.uint8)[:, None, None] * np.ones((4, 4), np.uint8)
    return Glyphs(image, np.arange(40) % 10, tuple("abcdefghij"))


def test_a_pair_is_two_items_in_opposite_corners_joined_by_the_larger_pixel(items: Glyphs) -> None:
    pairs = overlay(items, np.array([4]), np.array([9]), 6)
    expected = np.zeros((6, 6), np.uint8)
    for row in range(6):
        for column in range(6):
            left = 5 if row < 4 and column < 4 else 0
            right = 10 if row >= 2 and column >= 2 else 0
            expected[row, column] = max(left, right)
    assert np.array_equal(pairs.image[0], expected)
    assert pairs.label.tolist() == [[4, 9]]


def test_no_item_serves_two_parts(items: Glyphs) -> None:
    parts = draw_pairs(items, {"train": 10, "valid": 4, "test": 6}, 8, seed=3)
    used = np.concatenate([np.r_[p.image[:, 0, 0], p.image[:, -1, -1]] for p in parts.values()])
    assert sorted(used) == list(range(1, 41))
    assert [len(part) for part in parts.values()] == [10, 4, 6]


def test_a_part_does_not_change_when_a_later_one_grows(items: Glyphs) -> None:
    small = draw_pairs(items, {"train": 5, "test": 2}, 8, seed=3)
    large = draw_pairs(items, {"train": 5, "test": 9}, 8, seed=3)
    assert np.array_equal(small["train"].image, large["train"].image)
    assert np.array_equal(small["test"].image, large["test"].image[:2])


def test_seeds_and_streams_give_other_pairs(items: Glyphs) -> None:
    draw = lambda seed, stream: draw_pairs(items, {"p": 20}, 8, seed, stream)["p"].image
    assert np.array_equal(draw(0, "a"), draw(0, "a"))
    assert not np.array_equal(draw(0, "a"), draw(1, "a"))
    assert not np.array_equal(draw(0, "a"), draw(0, "b"))


def test_exactly_the_share_of_labels_is_redrawn_for_one_task_only() -> None:
    many = Glyphs(np.zeros((4000, 2, 2), np.uint8), np.zeros(4000, np.int64), tuple("abcdefghij"))
    clean = draw_pairs(many, {"train": 2000}, 4, seed=0)["train"]
    noisy = replace_labels(clean, task=1, share=0.3, seed=0)
    assert np.array_equal(noisy.label[:, 0], clean.label[:, 0])
    assert np.array_equal(noisy.truth, clean.truth)
    changed = int((noisy.label[:, 1] != clean.label[:, 1]).sum())
    assert 500 <= changed <= 580  # 600 redrawn, a tenth of them to the same class: 540 +- 3 sd
    counts = np.bincount(noisy.label[:, 1], minlength=10)[1:]
    assert counts.min() > 30  # uniform over the classes: 60 expected


def test_digits_come_enlarged() -> None:
    plain, large = glyphs("digits", "train"), glyphs("digits", "train", scale=3)
    assert large.image.shape[1:] == (24, 24)
    assert np.array_equal(large.image[:, 1::3, 1::3], plain.image)


def test_too_few_items_and_too_small_a_canvas_are_named(items: Glyphs) -> None:
    with pytest.raises(ConfigError, match="42 items are needed"):
        draw_pairs(items, {"train": 21}, 8, seed=0)
    with pytest.raises(ConfigError, match="canvas of 3 pixels"):
        overlay(items, np.array([0]), np.array([1]), 3)
    with pytest.raises(ConfigError, match=r"share = 1\.5"):
        replace_labels(overlay(items, np.array([0]), np.array([1]), 8), 0, 1.5, 0)
