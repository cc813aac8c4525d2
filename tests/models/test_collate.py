"""Collation: what stands where in a batch, what is left out, and how fast."""

from __future__ import annotations

import time
from dataclasses import replace

import model_examples as make
import numpy as np
import pytest
import torch
from model_examples import Row

from polytask.models import Collator
from polytask.models.collate import collate

KINDS = make.KINDS


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_texts_are_padded_and_keep_length_and_prefix() -> None:
    r = rng()
    rows = [Row([make.text(r, 3)], {0: 1}, 7), Row([make.text(r, 5, 2)], {0: 0}, 9)]
    batch = collate(rows, KINDS, pad_id=4)
    ids = batch.fields["text.ids"]
    assert ids.dtype == torch.int64 and ids.shape == (2, 5)
    assert ids[0].tolist() == [*rows[0].sequences[0]["text.ids"], 4, 4]
    assert batch.fields["text.length"].tolist() == [3, 5]
    assert batch.fields["text.prefix"].tolist() == [3, 2]
    assert batch.row.tolist() == [7, 9] and batch.rows == 2 and batch.complete


def test_each_modality_says_which_sequence_it_belongs_to() -> None:
    batch = collate(make.everything(), KINDS)
    sequences = [s for row in make.everything() for s in row.sequences]
    assert batch.sequences == len(sequences)
    for modality in ("text", "image", "series", "table", "features"):
        holders = [
            i for i, s in enumerate(sequences) if any(k.startswith(modality + ".") for k in s)
        ]
        assert batch.fields[f"{modality}.sequence"].tolist() == holders


def test_a_row_with_several_labels_gives_several_pairs_of_one_sequence() -> None:
    batch = collate(make.everything()[:1], KINDS)
    assert batch.sequences == 1
    assert {kind: len(t) for kind, t in batch.targets.items()} == {
        "classify": 1,
        "multilabel": 1,
        "regress": 1,
    }
    assert all(t.sequence.tolist() == [[0]] for t in batch.targets.values())
    assert all(t.row.tolist() == [10] for t in batch.targets.values())


def test_choices_and_matches_point_to_their_sequences() -> None:
    batch = collate(make.everything()[2:4] + make.everything()[7:8], KINDS)
    assert batch.targets["choice"].sequence.tolist() == [[0, 1, 2], [3, 4, -1]]
    assert batch.targets["match"].sequence.tolist() == [[5, 6]]
    assert batch.targets["choice"].task.tolist() == [3, 3]


@pytest.mark.parametrize(
    ("task", "unknown"),
    [
        (0, None),
        (0, -1),
        (1, np.full(4, np.nan, np.float32)),
        (2, np.full(2, np.nan, np.float32)),
        (4, np.full(3, -100)),
        (5, np.full(3, -100)),
        (7, np.full((6, 2), np.nan, np.float32)),
        (8, np.full((8, 8), -100)),
        (9, np.full((6, 5), np.nan, np.float32)),
    ],
)
def test_a_label_without_anything_known_makes_no_pair(task: int, unknown: object) -> None:
    r = rng()
    row = Row([make.text(r, 3) | make.image(r) | make.series(r, 8)], {task: unknown, 10: 3})
    targets = collate([row], KINDS).targets
    assert {kind: t.task.tolist() for kind, t in targets.items()} == {"classify": [10]}


def test_prediction_keeps_pairs_without_labels() -> None:
    r = rng()
    collator = Collator(KINDS, groups=[(0, 1, 2), (5,)])
    rows = [Row([make.text(r, 3)], {2: np.ones(2, np.float32)}, 4), Row([make.text(r, 2)], {}, 5)]
    batch = collator(rows, [0, 1], unlabelled=True)
    assert not batch.complete
    assert batch.task.tolist() == [0, 5]
    assert {k: t.task.tolist() for k, t in batch.targets.items()} == {
        "classify": [0],
        "multilabel": [1],
        "regress": [2],
        "generate": [5],
    }
    assert batch.targets["classify"].value.tolist() == [-1]
    assert batch.targets["regress"].value.tolist() == [[1.0, 1.0]]


def test_tables_with_other_columns_share_a_batch() -> None:
    r = rng()
    rows = [Row([make.table(r, 3, 1)]), Row([make.table(r, 1, 2)])]
    fields = collate(rows, KINDS).fields
    assert fields["table.number_id"].tolist() == [[0, 1, 2], [0, -1, -1]]
    assert fields["table.number"][1].isnan().all()
    assert (fields["table.category"] >= 0).tolist() == [[True, False], [True, True]]


def test_series_of_other_lengths_and_channels_share_a_batch() -> None:
    r = rng()
    one = {"series.values": np.arange(3, dtype=np.float32)}
    fields = collate([Row([one]), Row([make.series(r, 5)])], KINDS).fields
    assert fields["series.length"].tolist() == [3, 5]
    assert fields["series.channels"].tolist() == [1, 2]
    assert fields["series.values"][0, :3, 0].tolist() == [0, 1, 2]
    assert fields["series.values"][0, 3:].isnan().all()
    assert fields["series.values"][0, :, 1].isnan().all()


def test_dense_classes_become_floats_with_nan_for_unknown() -> None:
    batch = collate(make.everything()[12:13], KINDS)
    dense = batch.targets["dense"]
    assert dense.value.dtype == torch.float32 and dense.value.shape == (2, 8, 8)
    assert dense.value[0, 0].isnan().all() and not dense.value[0, 1:].isnan().any()
    assert dense.size is not None and dense.size.tolist() == [[8, 8], [6, 5]]


def test_moving_to_a_device_keeps_what_layouts_need_on_the_host() -> None:
    batch = collate(make.everything(), KINDS)
    moved = batch.to("meta")  # no numbers there: an answer can only come from the host copies
    for name in ("text.length", "text.sequence", "series.length", "table.category", "task"):
        assert np.array_equal(moved.known(name), batch.known(name))
    for kind in batch.targets:
        assert np.array_equal(moved.known(f"{kind}.sequence"), batch.known(f"{kind}.sequence"))
    assert np.array_equal(moved.known("generate.value"), batch.known("generate.value"))


def test_a_replaced_field_is_not_answered_from_an_old_copy() -> None:
    moved = collate(make.everything(), KINDS).to("meta")
    length = moved.fields["text.length"].clone()
    changed = replace(moved, fields=moved.fields | {"text.length": length})
    with pytest.raises(NotImplementedError, match="meta"):
        changed.known("text.length")


def test_64_texts_take_under_two_milliseconds() -> None:
    r = rng()
    rows = [Row([make.text(r, int(r.integers(20, 64)))], {0: 1, 1: np.ones(4)}) for _ in range(64)]
    collator = Collator(KINDS)
    times = []
    for _ in range(15):
        begin = time.perf_counter()
        collator(rows)
        times.append(time.perf_counter() - begin)
    assert min(times) < 0.002
