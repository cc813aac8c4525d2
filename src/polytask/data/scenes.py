"""Scenes: garments and digits placed at depths, with everything in the picture known exactly.

The testbed behind the proofs on dense tasks. A scene has a textured ground and one to several items
of real pixels (Fashion-MNIST, MNIST, digits), each at a place and a depth: an item at depth z is
drawn `reach / z` pixels high, nearer ones cover farther ones, and a tilted item is shaded by
its angle to the light. Labels per pixel: class, depth, instance, edge, normal; per scene: class,
box, depth and visible share of every item, nearest first.

Scene i of a (seed, stream) is the same however many are drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from polytask.data.glyphs import GlyphName, glyphs
from polytask.errors import ConfigError
from polytask.rng import generator

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
_BLOCK = 256  # scenes whose random numbers are drawn together
_INK = 20  # pixels of an item below this are not part of it
_TRIES = 8  # places that are drawn for each scene; the first that keeps items apart is taken
_SIDE = 28  # pixels of an item before it is scaled


@dataclass(frozen=True)
class SceneSetting:
    """What scenes look like.

    items: fewest and most items. depth: nearest and farthest item; the ground is at `ground`.
    reach: height in pixels of an item at depth 1. apart: items' centres are at least this share
    of the canvas apart where a place for that is found. tilt: largest slope of an item's plane;
    0: all face the viewer. texture, noise: contrast of the ground, and of noise on everything.
    """

    size: int = 32
    sources: tuple[GlyphName, ...] = ("fashion-mnist",)
    items: tuple[int, int] = (2, 2)
    depth: tuple[float, float] = (1.0, 2.0)
    ground: float = 3.0
    reach: float = 22.0
    apart: float = 0.35
    tilt: float = 0.0
    texture: float = 70.0
    noise: float = 6.0

    def __post_init__(self) -> None:
        low, high = self.items
        if not 1 <= low <= high:
            raise ConfigError(f"items = {self.items}: give the fewest and the most, at least 1")
        if not 0 < self.depth[0] <= self.depth[1] < self.ground:
            raise ConfigError(
                f"depth = {self.depth}: nearest and farthest must be above 0 and before the ground "
                f"at {self.ground}"
            )
        if self.size < 8 or self.reach < 4:
            raise ConfigError(f"a scene of {self.size} pixels, items of {self.reach}: too small")
        if not self.sources or len(set(self.sources)) != len(self.sources):
            raise ConfigError(f"sources = {self.sources}: name each set once, at least one")


@dataclass(frozen=True)
class Scenes:
    """n scenes of (H, W) pixels with up to K items; unused items have label -1.

    Items stand nearest first. `seg` is 0 on the ground and 1 + class on items; `instance` is 0 on
    the ground and 1 + the item's place in the order; `edge` marks pixels with a neighbour (left,
    right, above, below) of another instance; `box` is x0, y0, x1, y1 of the visible pixels, ends
    excluded, -1 where nothing is visible.
    """

    image: npt.NDArray[np.uint8]  # (n, H, W)
    seg: Ints  # (n, H, W)
    depth: Floats  # (n, H, W)
    instance: Ints  # (n, H, W)
    edge: npt.NDArray[np.bool_]  # (n, H, W)
    normal: Floats  # (n, H, W, 3) unit length; (0, 0, 1) faces the viewer
    label: Ints  # (n, K)
    distance: Floats  # (n, K) depth of items; NaN where there is none
    box: Ints  # (n, K, 4)
    visible: Floats  # (n, K) share of an item's pixels that is not covered or outside
    classes: tuple[str, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.image)

    @property
    def near(self) -> Ints:
        """(n,) class of the nearest item."""
        return self.label[:, 0]

    @property
    def far(self) -> Ints:
        """(n,) class of the farthest item."""
        last = (self.label >= 0).sum(1) - 1
        found: Ints = self.label[np.arange(len(self)), last]
        return found

    def take(self, index: Any) -> Scenes:
        """The scenes at `index` (a slice, numbers or a mask)."""
        parts = {f.name: getattr(self, f.name)[index] for f in fields(self) if f.name != "classes"}
        return replace(self, **parts)

    def grid(self, cell: int) -> Scenes:
        """Labels per cell of `cell` x `cell` pixels: the commonest class and instance, the mean
        depth and normal, an edge where any pixel has one. The picture stays as it is."""
        height, width = self.image.shape[1:]
        if height % cell or width % cell:
            raise ConfigError(f"cells of {cell} pixels do not divide {height} x {width}")
        normal = np.stack([_cells(self.normal[..., c], cell).mean(-1) for c in range(3)], -1)
        normal /= np.maximum(1e-9, np.linalg.norm(normal, axis=-1, keepdims=True))
        return replace(
            self,
            seg=_commonest(_cells(self.seg, cell)),
            instance=_commonest(_cells(self.instance, cell)),
            depth=_cells(self.depth, cell).mean(-1).astype(np.float32),
            edge=np.asarray(_cells(self.edge, cell).any(-1)),
            normal=normal.astype(np.float32),
        )


def draw_scenes(
    setting: SceneSetting, split: str, count: int, seed: int, stream: str = "scenes", start: int = 0
) -> Scenes:
    """Scenes start ... start + count - 1 of (seed, stream), of items of one split.

    Raises:
        ConfigError: a setting that cannot be.
        DataError: a source that is not here, with how to get it.
    """
    if count < 0 or start < 0:
        raise ConfigError(f"scenes {start} to {start + count}: numbers start at 0")
    pool, labels, classes = _pool(setting.sources, split)
    first, last = start // _BLOCK, max(start // _BLOCK, (start + count - 1) // _BLOCK)
    parts = [
        _block(setting, pool, labels, classes, seed, stream, number)
        for number in range(first, last + 1)
    ]
    names = [f.name for f in fields(Scenes) if f.name != "classes"]
    joined = Scenes(
        **{name: np.concatenate([getattr(p, name) for p in parts]) for name in names},
        classes=classes,
    )
    return joined.take(slice(start - first * _BLOCK, start - first * _BLOCK + count))


def _pool(
    sources: Sequence[GlyphName], split: str
) -> tuple[npt.NDArray[np.uint8], Ints, tuple[str, ...]]:
    """All items at 28 x 28, with labels over the classes of all sources."""
    images, labels = [], []
    classes: list[str] = []
    for name in sources:
        found = glyphs(name, split)
        images.append(_resized(found.image, _SIDE))
        labels.append(found.label + len(classes))
        several = len(sources) > 1
        classes += [f"{name}: {c}" if several else c for c in found.classes]
    return np.concatenate(images), np.concatenate(labels), tuple(classes)


def _resized(image: npt.NDArray[np.uint8], side: int) -> npt.NDArray[np.uint8]:
    """(n, side, side), bilinear."""
    if image.shape[1:] == (side, side):
        return image
    place = (np.arange(side) + 0.5) * image.shape[1] / side - 0.5
    low = np.clip(np.floor(place).astype(int), 0, image.shape[1] - 1)
    high = np.clip(low + 1, 0, image.shape[1] - 1)
    share = np.clip(place - low, 0, 1)
    rows = image[:, low] * (1 - share)[:, None] + image[:, high] * share[:, None]
    both = rows[:, :, low] * (1 - share) + rows[:, :, high] * share
    found: npt.NDArray[np.uint8] = both.round().astype(np.uint8)
    return found


def _block(
    setting: SceneSetting,
    pool: npt.NDArray[np.uint8],
    labels: Ints,
    classes: tuple[str, ...],
    seed: int,
    stream: str,
    number: int,
) -> Scenes:
    """Block `number` of 256 scenes, drawn and painted together."""
    draws = generator(seed, "scenes", stream, number)
    n, most, size = _BLOCK, setting.items[1], setting.size
    count = draws.integers(setting.items[0], most + 1, n)
    item = draws.integers(0, len(pool), (n, most))
    distance = np.sort(draws.uniform(*setting.depth, (n, most)), axis=1).astype(np.float32)
    slope = draws.uniform(-setting.tilt, setting.tilt, (n, most, 2))
    there = np.arange(most) < count[:, None]
    height = setting.reach / distance  # (n, K) pixels
    centre = _places(setting, draws, height, there)
    image = _ground(setting, draws)
    noise = draws.normal(0, setting.noise, (n, size, size))
    normal = np.concatenate((slope, np.ones((n, most, 1))), -1)
    normal = (normal / np.linalg.norm(normal, axis=-1, keepdims=True)).astype(np.float32)

    seg = np.zeros((n, size, size), np.int64)
    instance = np.zeros_like(seg)
    depth = np.full((n, size, size), setting.ground, np.float32)
    facing = np.zeros((n, size, size, 3), np.float32)
    facing[..., 2] = 1
    area = np.zeros((n, most))
    label = np.where(there, labels[item], -1)
    for k in reversed(range(most)):  # the farthest is painted first
        ink, whole = _placed(pool[item[:, k]], centre[:, k], height[:, k], size)
        mask = (ink >= _INK) & there[:, k, None, None]
        area[:, k] = whole
        lit = 0.55 + 0.45 * (normal[:, k] @ np.array([0.6, 0.0, 0.8], np.float32))
        np.copyto(image, ink * np.minimum(1.0, lit)[:, None, None], where=mask)
        np.copyto(seg, 1 + label[:, k, None, None], where=mask)
        np.copyto(instance, 1 + k, where=mask)
        np.copyto(depth, distance[:, k, None, None], where=mask)
        if setting.tilt:
            np.copyto(facing, normal[:, k, None, None], where=mask[..., None])
    box, seen = _boxes(instance, most)
    return Scenes(
        image=(image + noise).round().clip(0, 255).astype(np.uint8),
        seg=seg,
        depth=depth,
        instance=instance,
        edge=edges(instance),
        normal=facing,
        label=label,
        distance=np.where(there, distance, np.nan).astype(np.float32),
        box=box,
        visible=np.where(there, seen / np.maximum(1, area), 0).clip(0, 1).astype(np.float32),
        classes=classes,
    )


def _places(
    setting: SceneSetting, draws: np.random.Generator, height: Floats, there: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float64]:
    """(n, K, 2) centres (y, x): inside the canvas, the first of several draws with items apart."""
    n, most = height.shape
    half = np.minimum(height / 2, setting.size / 2)[:, None, :, None]
    drawn = draws.random((n, _TRIES, most, 2))
    centre = half + drawn * (setting.size - 2 * half)
    gap = np.linalg.norm(centre[:, :, :, None] - centre[:, :, None], axis=-1)  # (n, tries, K, K)
    ignored = np.eye(most, dtype=bool) | ~(there[:, :, None] & there[:, None])[:, None]
    closest = np.where(ignored, np.inf, gap).min((2, 3))  # (n, tries)
    good = closest >= setting.apart * setting.size
    chosen = np.where(good.any(1), good.argmax(1), closest.argmax(1))
    found: npt.NDArray[np.float64] = centre[np.arange(n), chosen]
    return found


def _ground(setting: SceneSetting, draws: np.random.Generator) -> npt.NDArray[np.float64]:
    """(n, size, size) coarse blotches, smoothly joined."""
    coarse = draws.uniform(0, setting.texture, (_BLOCK, 5, 5))
    place = np.linspace(0, 4, setting.size)
    low = np.minimum(place.astype(int), 3)
    share = place - low
    rows = coarse[:, low] * (1 - share)[:, None] + coarse[:, low + 1] * share[:, None]
    found: npt.NDArray[np.float64] = rows[:, :, low] * (1 - share) + rows[:, :, low + 1] * share
    return found


def _placed(
    item: npt.NDArray[np.uint8], centre: npt.NDArray[np.float64], height: Floats, size: int
) -> tuple[npt.NDArray[np.float64], Ints]:
    """Items (n, 28, 28) scaled to `height` around `centre`: (n, size, size) with 0 outside, by
    nearest neighbour, and how many pixels they have on a canvas without end."""
    pixel = np.arange(size) + 0.5
    scale = _SIDE / height

    def source(axis: int) -> Ints:
        found = (pixel - centre[:, axis, None]) * scale[:, None] + _SIDE / 2
        return np.floor(found).astype(np.int64)  # (n, size)

    y, x = source(0), source(1)
    inside = ((y >= 0) & (y < _SIDE))[:, :, None] & ((x >= 0) & (x < _SIDE))[:, None]
    n = np.arange(len(item))[:, None, None]
    ink = item[n, y.clip(0, _SIDE - 1)[:, :, None], x.clip(0, _SIDE - 1)[:, None]]
    ink = np.where(inside, ink, 0).astype(np.float64)
    return ink, (ink >= _INK).sum((1, 2))


def edges(instance: Ints) -> npt.NDArray[np.bool_]:
    """(n, H, W) pixels with a direct neighbour of another instance."""
    found = np.zeros(instance.shape, bool)
    across = instance[:, :, 1:] != instance[:, :, :-1]
    down = instance[:, 1:] != instance[:, :-1]
    found[:, :, 1:] |= across
    found[:, :, :-1] |= across
    found[:, 1:] |= down
    found[:, :-1] |= down
    return found


def _boxes(instance: Ints, most: int) -> tuple[Ints, Ints]:
    """(n, K, 4) boxes of what is visible, and (n, K) visible pixels."""
    box = np.full((len(instance), most, 4), -1, np.int64)
    seen = np.zeros((len(instance), most), np.int64)
    for k in range(most):
        mask = instance == 1 + k
        seen[:, k] = mask.sum((1, 2))
        some = seen[:, k] > 0
        for place, axis in ((0, 1), (1, 2)):  # x from columns, y from rows
            line = mask.any(axis)
            box[some, k, place] = line.argmax(1)[some]
            box[some, k, place + 2] = (line.shape[1] - line[:, ::-1].argmax(1))[some]
    return box, seen


def _cells(plane: npt.NDArray[Any], cell: int) -> npt.NDArray[Any]:
    """(n, H, W) to (n, H / cell, W / cell, cell * cell)."""
    n, height, width = plane.shape
    grid = plane.reshape(n, height // cell, cell, width // cell, cell)
    return grid.transpose(0, 1, 3, 2, 4).reshape(n, height // cell, width // cell, -1)


def _commonest(cells: Ints) -> Ints:
    """The commonest value along the last axis, the smallest of equally common ones."""
    most = int(cells.max(initial=0)) + 1
    count = np.stack([(cells == value).sum(-1) for value in range(most)], -1)
    found: Ints = count.argmax(-1)
    return found
