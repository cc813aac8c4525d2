"""Emoji of five hands: the same subjects drawn in five styles, with alpha masks.

One subject has five pictures, so the set serves style transfer, domain generalisation, several
label sets per picture and segmentation. SVG is rendered once by the optional package resvg-py.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from polytask.data.embedded.info import EmbeddedInfo, Entry, Splits
from polytask.data.embedded.sources import Bundle, Located, Npm
from polytask.data.embedded.splits import by_split, split_of, subject
from polytask.errors import MissingExtra

STYLES = {
    "noto": "1.2.9",
    "fluent-emoji-flat": "1.2.6",
    "fluent-emoji-high-contrast": "1.2.6",
    "openmoji": "1.2.29",
    "twemoji": "1.2.5",
}
SIZE = 48
CATEGORIES = (
    "Activities",
    "Animals & Nature",
    "Flags",
    "Food & Drink",
    "Objects",
    "People & Body",
    "Smileys & Emotion",
    "Symbols",
    "Travel & Places",
)


@dataclass(frozen=True)
class Icon:
    """One picture as SVG, and the turns an alias asks for."""

    svg: str
    flip_x: bool = False
    flip_y: bool = False
    quarter_turns: int = 0


def read_icons(folder: Path) -> dict[str, Icon]:
    """Name -> icon of an iconify set (https://iconify.design/docs/types/iconify-json.html)."""
    content: dict[str, Any] = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
    icons = {name: Icon(_svg(record, content)) for name, record in content["icons"].items()}
    for name in content.get("aliases", {}):
        alias = _resolve(name, content)
        if alias is not None:
            icons[name] = alias
    return icons


def _svg(record: dict[str, Any], content: dict[str, Any]) -> str:
    box = [record.get(key, content.get(key, default)) for key, default in _BOX.items()]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{" ".join(map(str, box))}" width="{SIZE}" height="{SIZE}">'
        f"{record['body']}</svg>"
    )


_BOX = {"left": 0, "top": 0, "width": 16, "height": 16}


def _resolve(name: str, content: dict[str, Any]) -> Icon | None:
    """Follow an alias to its icon, adding up flips and turns; None when it leads nowhere."""
    flip_x = flip_y = False
    turns = 0
    for _ in range(8):
        record = content["aliases"].get(name) or content["icons"].get(name)
        if record is None:
            return None
        flip_x ^= bool(record.get("hFlip"))
        flip_y ^= bool(record.get("vFlip"))
        turns += int(record.get("rotate", 0))
        if "parent" not in record:
            return Icon(_svg(record, content), flip_x, flip_y, turns % 4)
        name = record["parent"]
    return None


def render(icon: Icon) -> np.ndarray:
    """(48, 48, 4) uint8, colour and alpha (not premultiplied)."""
    try:
        import resvg_py  # type: ignore[import-not-found]
    except ImportError as error:
        raise MissingExtra("resvg-py", "pictures", "Drawing the emoji pictures") from error
    from PIL import Image

    png = bytes(resvg_py.svg_to_bytes(svg_string=icon.svg))
    with Image.open(io.BytesIO(png)) as image:
        pixels = np.asarray(image.convert("RGBA").resize((SIZE, SIZE)))
    pixels = np.rot90(pixels, -icon.quarter_turns)
    pixels = pixels[:, ::-1] if icon.flip_x else pixels
    return np.ascontiguousarray(pixels[::-1] if icon.flip_y else pixels)


def on_white(pixels: np.ndarray) -> np.ndarray:
    """Colour over a white ground: (48, 48, 3) uint8."""
    alpha = pixels[..., 3:].astype(np.uint16)
    colour = pixels[..., :3].astype(np.uint16)
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _build(located: Located) -> Splits:
    folders = {
        style: next(p.parent for p in located.files() if f"-{style}/" in p.as_posix())
        for style in STYLES
    }
    sets = {style: read_icons(folder) for style, folder in folders.items()}
    category = _categories(folders["noto"])
    common = sorted(set(category).intersection(*sets.values()))
    rows: dict[str, list[Any]] = {
        name: [] for name in ("image", "mask", "style", "name", "category")
    }
    drawn: set[bytes] = set()
    for name in common:
        pictures = {style: render(icons[name]) for style, icons in sets.items()}
        keys = {on_white(picture).tobytes() for picture in pictures.values()}
        if keys & drawn:
            continue  # another name for a subject that is here already
        drawn |= keys
        for style, pixels in pictures.items():
            cells = (on_white(pixels), pixels[..., 3], style, name, category[name])
            for column, cell in zip(rows, cells, strict=True):
                rows[column].append(cell)
    splits = [split_of("emoji", subject(name)) for name in rows["name"]]
    columns = {
        "image": np.stack(rows["image"]),
        "mask": np.stack(rows["mask"]),
        "style": rows["style"],
        "name": rows["name"],
        "category": rows["category"],
    }
    return by_split(columns, splits)


def _categories(folder: Path) -> dict[str, str]:
    content = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
    return {
        name: category
        for category, names in content["categories"].items()
        if category in CATEGORIES
        for name in names
    }


def _task(target: str) -> dict[str, Any]:
    return {
        "data": "embedded:emoji-pictures",
        "schema": "classification",
        "inputs": {"image": "image"},
        "target": target,
    }


SETS = (
    Entry(
        EmbeddedInfo(
            name="emoji-pictures",
            title="Emoji in five styles: the same subjects drawn five times, 48x48 with masks",
            licence="noto: Apache-2.0; fluent: MIT; openmoji: CC-BY-SA-4.0; twemoji: CC-BY-4.0",
            modality="image",
            sources=(
                Bundle(
                    "iconify-emoji",
                    tuple(
                        Npm(
                            f"@iconify-json/{style}",
                            ("package/icons.json", "package/metadata.json"),
                            version,
                        )
                        for style, version in STYLES.items()
                    ),
                ),
            ),
            tasks={
                "emoji-category": _task("category"),
                "emoji-style": _task("style") | {"classes": list(STYLES)},
            },
            classes=CATEGORIES,
            fixed=False,
            note="Drawings, not photos. 'mask' is the alpha channel. Split by subject "
            "(man, woman and person are one), the same as its names in cldr-names. Needs "
            'resvg-py to draw them once: pip install "polytask[pictures]".',
        ),
        _build,
        version=2,
    ),
)
