"""Hugging Face data sets, saved by the test; nothing here needs the network."""

import datasets
import numpy as np
import pytest
from PIL import Image

from polytask.data.hub import HubStream, read_hub
from polytask.data.open import open_rows, open_splits
from polytask.data.spec import DataSpec
from polytask.errors import DataError

FEATURES = datasets.Features(
    {
        "text": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["neg", "pos"]),
        "tokens": datasets.List(datasets.Value("string")),
        "vector": datasets.List(datasets.Value("float32")),
    }
)


def made(count: int, first: int = 0) -> datasets.Dataset:
    rows = [
        {"text": f"t{i}", "label": i % 2, "tokens": ["a", str(i)], "vector": [i, i / 2]}
        for i in range(first, first + count)
    ]
    return datasets.Dataset.from_list(rows, features=FEATURES)


def same(row, i):
    assert row["text"] == f"t{i}" and row["label"] == ["neg", "pos"][i % 2]
    assert row["tokens"] == ["a", str(i)]
    np.testing.assert_array_equal(row["vector"], np.float32([i, i / 2]))


def test_a_saved_set_is_read_memory_mapped_with_label_names(tmp_path):
    made(20).save_to_disk(str(tmp_path / "set"))
    source = open_rows(DataSpec.of("set"), tmp_path)
    assert len(source) == 20 and source.columns == ("text", "label", "tokens", "vector")
    for row, i in zip(source.take([7, 0, 7]), [7, 0, 7]):
        same(row, i)
    same(source[-1], 19)
    assert source.where(3) == f"{tmp_path / 'set'}, row 4"
    assert source.take([]) == []
    with pytest.raises(IndexError):
        source[20]


def test_a_saved_dictionary_gives_its_splits(tmp_path):
    parts = {"train": made(8), "validation": made(3, 50), "extra": made(2)}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "set"))
    splits = open_splits(DataSpec.of("set"), tmp_path)
    assert {name: len(rows) for name, rows in splits.items()} == {
        "train": 8, "valid": 3, "extra": 2,
    }  # fmt: skip
    same(splits["valid"][1], 51)
    for name in ("validation", "valid", "dev"):
        same(open_rows(DataSpec.of({"path": "set", "split": name}), tmp_path)[0], 50)
    with pytest.raises(DataError, match="has the splits train, valid, extra; say which one"):
        open_rows(DataSpec.of("set"), tmp_path)
    with pytest.raises(DataError, match=r"no split 'trian'. Did you mean 'train'"):
        open_rows(DataSpec.of({"path": "set", "split": "trian"}), tmp_path)


def test_a_saved_set_can_be_streamed(tmp_path):
    made(300).save_to_disk(str(tmp_path / "set"))
    stream = open_rows(DataSpec.of({"path": "set", "streaming": True}), tmp_path)
    rows = list(stream.read_from(290))
    assert len(rows) == 10
    same(rows[0], 290)


def test_an_iterable_set_is_a_stream_that_skips():
    stream = HubStream(made(30).to_iterable_dataset(num_shards=3), "hub:x")
    assert stream.columns == ("text", "label", "tokens", "vector")
    everything = list(stream.read_from(0))
    assert [row["text"] for row in everything] == [f"t{i}" for i in range(30)]
    for position in (1, 9, 10, 29, 30):
        rows = list(stream.read_from(position))
        assert [row["text"] for row in rows] == [f"t{i}" for i in range(position, 30)]
        assert [row["label"] for row in rows] == [
            ["neg", "pos"][i % 2] for i in range(position, 30)
        ]


def test_hidden_labels_are_missing_and_images_stay_encoded(tmp_path):
    pictures = [np.full((3, 3, 3), i, np.uint8) for i in range(2)]
    data = {"label": [-1, 1], "image": [Image.fromarray(p) for p in pictures]}
    features = datasets.Features({"label": FEATURES["label"], "image": datasets.Image()})
    found = datasets.Dataset.from_dict(data, features=features)
    found.save_to_disk(str(tmp_path / "set"))
    from polytask.data.images import decode_image

    stream = HubStream(found.to_iterable_dataset(), "s")
    for rows in (open_rows(DataSpec.of("set"), tmp_path).take([0, 1]), list(stream.read_from(0))):
        assert [row["label"] for row in rows] == [None, "pos"]
        assert all(isinstance(row["image"], bytes) for row in rows)
        for row, picture in zip(rows, pictures):
            np.testing.assert_array_equal(decode_image(row["image"]), picture)


def test_empty_rows_are_counted(tmp_path):
    found = datasets.Dataset.from_dict({"text": ["a", None, "c"]})
    found.save_to_disk(str(tmp_path / "set"))
    with pytest.raises(DataError, match=r"1 of 3 rows .*\n.*row 2: the row is empty"):
        open_rows(DataSpec.of("set"), tmp_path)
    source = open_rows(DataSpec.of({"path": "set", "max_bad": 0.4}), tmp_path)
    assert [row["text"] for row in source.take([0, 1])] == ["a", "c"]
    assert source.where(1).endswith("row 3")


def test_a_damaged_saved_set_is_named(tmp_path):
    made(5).save_to_disk(str(tmp_path / "set"))
    (tmp_path / "set" / "state.json").unlink()
    with pytest.raises(DataError, match="set is not a whole saved data set"):
        open_rows(DataSpec.of("set"), tmp_path)


def test_ids_are_an_owner_and_a_name_or_a_set_and_its_configuration(monkeypatch):
    calls = []

    def load(*arguments, split, streaming):
        calls.append((arguments, split, streaming))
        if arguments == ("glue/sst2",):
            raise datasets.exceptions.DatasetNotFoundError("not there")
        return {"train": made(4)} if split is None else made(4)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(read_hub("owner/name/config", None, False)["train"]) == 4
    assert len(open_rows(DataSpec.of("hub:glue/sst2"), None)) == 4
    assert len(open_rows(DataSpec.of({"hub": "imdb", "split": "train[:4]"}), None)) == 4
    assert calls == [
        (("owner/name", "config"), None, False),
        (("glue/sst2",), None, False),
        (("glue", "sst2"), None, False),
        (("imdb",), "train[:4]", False),
    ]


def test_without_network_the_error_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"hub:nobody/nothing.*save_to_disk"):
        open_rows(DataSpec.of("hub:nobody/nothing"), tmp_path)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (datasets.exceptions.DatasetNotFoundError("x"), "there is no data set 'a' on the hub"),
        (ValueError('Unknown split "dev". Should be one of [train]'), "Should be one of"),
        (ConnectionError("refused"), "cannot be reached: refused"),
    ],
)
def test_failures_of_the_hub_are_the_users_to_mend(monkeypatch, error, message):
    def load(*arguments, split, streaming):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=message):
        read_hub("a", None, False)
