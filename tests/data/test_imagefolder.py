"""Folders of images by class, and tables with a column of paths."""

import json

import numpy as np
import pytest
from PIL import Image

from polytask.data.images import decode_image
from polytask.data.open import open_rows, open_splits
from polytask.data.spec import DataSpec
from polytask.errors import DataError


def draw(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4), value, np.uint8)).save(path)


def opened(folder, **spec):
    return open_rows(DataSpec.of({"path": str(folder), **spec}), folder)


def test_each_sub_folder_is_a_class(tmp_path):
    for kind, value in (("dog", 1), ("cat", 2)):
        for i in range(3):
            draw(tmp_path / kind / "inner" / f"{i}.png", value)
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    draw(tmp_path / ".hidden" / "x.png")
    source = opened(tmp_path, label_column="species")
    rows = source.take(range(len(source)))
    assert [row["species"] for row in rows] == ["cat"] * 3 + ["dog"] * 3
    assert {int(decode_image(row["image"]).mean()) for row in rows[:3]} == {2}
    assert source.columns == ("image", "species")
    assert source.where(0) == str(tmp_path / "cat" / "inner" / "0.png")


def test_broken_and_stray_images_are_bad_rows(tmp_path):
    for i in range(8):
        draw(tmp_path / "a" / f"{i}.png")
    (tmp_path / "a" / "broken.png").write_bytes(b"nothing")
    draw(tmp_path / "stray.png")
    with pytest.raises(
        DataError, match=r"2 of 10 rows .*\n.*stray\.png: it .*\n.*broken\.png: cann"
    ):
        opened(tmp_path)
    source = opened(tmp_path, max_bad=0.2)
    assert len(source) == 8 and source.problems.bad == 2


def test_a_cut_off_image_is_found_by_decoding_and_not_by_its_header(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    path = tmp_path / "a" / "x.jpg"
    path.parent.mkdir()
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:1500])
    assert len(opened(tmp_path, check_images="header")) == 1
    with pytest.raises(DataError, match="1 of 1 rows"):
        opened(tmp_path)


def test_folders_named_like_splits_are_splits(tmp_path):
    for split, count in (("train", 4), ("validation", 2), ("test", 1)):
        for i in range(count):
            draw(tmp_path / split / "a" / f"{i}.png")
    splits = open_splits(DataSpec.of(str(tmp_path)), tmp_path)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 4, "valid": 2, "test": 1}
    assert len(opened(tmp_path, split="valid")) == 2
    assert len(opened(tmp_path, split="validation")) == 2
    with pytest.raises(DataError, match=r"no split 'tests'. Did you mean 'test'"):
        opened(tmp_path, split="tests")


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl"])
def test_a_table_in_the_folder_names_the_images(tmp_path, ending):
    for i in range(3):
        draw(tmp_path / "img" / f"{i}.png", i)
    rows = [{"file": f"img/{i}.png", "age": i / 2, "note": f"n{i}"} for i in range(3)]
    separator = "\t" if ending == "tsv" else ","
    if ending == "jsonl":
        text = "\n".join(map(json.dumps, rows))
    else:
        text = "\n".join(
            separator.join(map(str, r)) for r in [rows[0], *(r.values() for r in rows)]
        )
    (tmp_path / f"labels.{ending}").write_text(text + "\n")
    for spec in ({}, {"table": f"labels.{ending}"}, {"image_column": "file"}):
        source = opened(tmp_path, **spec)
        assert source.columns == ("file", "age", "note") and source.images == ("file",)
        row = source.take([2])[0]
        assert row == {"file": str(tmp_path / "img/2.png"), "age": 1.0, "note": "n2"}
        assert int(decode_image(row["file"]).mean()) == 2
        assert source.column("file") == [str(tmp_path / f"img/{i}.png") for i in range(3)]
        assert "line" in source.where(1)


def test_a_csv_beside_its_images_is_resolved_and_checked(tmp_path):
    for i in range(5):
        draw(tmp_path / "img" / f"{i}.png", i)
    lines = [f"img/{i}.png,{i}" for i in range(6)] + [",7"]
    table = tmp_path / "t.csv"
    table.write_text("path,y\n" + "\n".join(lines) + "\n")
    source = open_rows(DataSpec.of({"path": "t.csv", "max_bad": 0.5}), tmp_path)
    assert [row["y"] for row in source.take(range(len(source)))] == [0, 1, 2, 3, 4, 7]
    assert source[0]["path"] == str(tmp_path / "img/0.png") and source[5]["path"] == ""
    assert source.problems.first == [f"{table}, line 7: image {tmp_path / 'img/5.png'} is missing"]
    stream = open_rows(DataSpec.of({"path": "t.csv", "streaming": True}), tmp_path)
    assert next(stream.read_from(2))["path"] == str(tmp_path / "img/2.png")
    assert stream.where(2) == f"{table}, line 4" and stream.columns == ("path", "y")


def test_a_declared_image_column_is_checked_even_if_no_file_is_there(tmp_path):
    (tmp_path / "t.csv").write_text("p,y\na.png,1\nb.png,2\n")
    spec = {"path": "t.csv", "types": {"p": "image"}}
    with pytest.raises(DataError, match=r"2 of 2 rows .*\n.*line 2: image .*a\.png is missing"):
        open_rows(DataSpec.of(spec), tmp_path)
    assert open_rows(DataSpec.of("t.csv"), tmp_path)[0]["p"] == "a.png"


def test_what_is_missing_is_named(tmp_path):
    draw(tmp_path / "a" / "x.png")
    with pytest.raises(DataError, match=r"no file .*lable.csv. .* has: a"):
        opened(tmp_path, table="lable.csv")
    (tmp_path / "labels.csv").write_text("name,y\nq,1\n")
    with pytest.raises(DataError, match=r"no column of .*labels.csv holds paths of images"):
        opened(tmp_path)
    with pytest.raises(
        DataError, match=r"column 'nam' is missing in labels.csv.*Did you mean 'name'"
    ):
        opened(tmp_path, image_column="nam")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match="has no image files"):
        opened(empty, format="images")
