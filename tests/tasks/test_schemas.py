"""What each schema accepts as a label, what it refuses and why, and that it survives JSON."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from polytask.errors import ConfigError
from polytask.tasks.schemas import (
    SCHEMAS,
    Choice,
    Classification,
    Dense,
    Forecasting,
    Generation,
    LanguageModel,
    Matching,
    MultiLabel,
    Pair,
    Regression,
    Schema,
    Tagging,
    is_missing,
    label_key,
    schema_from_json,
)

EXAMPLES: list[Schema] = [
    Classification(("bad", "good"), (("0", "bad"), ("1", "good"))),
    MultiLabel(("red", "green", "blue")),
    Regression(2, (1.5, -2.0), (0.5, 3.0)),
    Pair(("no", "yes")),
    Choice("options"),
    Tagging(("O", "NAME")),
    Generation((("1", "one"),)),
    LanguageModel(),
    Matching(0.1),
    Forecasting(12, 2),
    Dense(("sky", "sea"), 4, 6),
    Dense(None, 3, 3),
]


def test_eleven_schemas_are_registered_by_name() -> None:
    assert SCHEMAS.names() == (
        "choice", "classification", "dense", "forecasting", "generation", "language_model",
        "matching", "multilabel", "pair", "regression", "tagging",
    )  # fmt: skip


def test_a_misspelt_schema_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'classification'"):
        SCHEMAS.get("clasification")


@pytest.mark.parametrize("schema", EXAMPLES, ids=lambda s: s.kind)
def test_json_round_trip_gives_the_same_schema(schema: Schema) -> None:
    assert schema_from_json(json.loads(json.dumps(schema.to_json()))) == schema


@pytest.mark.parametrize("schema", EXAMPLES, ids=lambda s: s.kind)
def test_schemas_are_frozen_and_have_a_primary_metric_and_a_head(schema: Schema) -> None:
    assert schema.primary in schema.metrics
    assert schema.head in {
        "classify", "multilabel", "regress", "choice", "tag", "generate", "match", "forecast",
        "dense",
    }  # fmt: skip
    for field in dataclasses.fields(schema):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(schema, field.name, None)


@pytest.mark.parametrize("schema", EXAMPLES, ids=lambda s: s.kind)
@pytest.mark.parametrize("value", [None, math.nan, "", "  ", np.float32("nan")])
def test_missing_labels_are_refused_with_that_reason(schema: Schema, value: object) -> None:
    with pytest.raises(ValueError, match="missing"):
        schema.read(value)


def test_missing_is_none_nan_and_blank_but_not_zero_or_false() -> None:
    assert all(is_missing(v) for v in (None, math.nan, "", " \n", np.nan, np.array(np.nan)))
    assert not any(is_missing(v) for v in (0, False, "0", "nan", [], np.zeros(2)))


@pytest.mark.parametrize("value", [1, 1.0, "1", np.int64(1), np.float32(1), " 1 "])
def test_a_class_is_the_same_however_a_file_spells_its_type(value: object) -> None:
    assert Classification(("0", "1")).read(value) == 1


@pytest.mark.parametrize("value", [True, "True", "TRUE", "true", np.bool_(True)])
def test_booleans_are_classes_true_and_false(value: object) -> None:
    assert Classification((label_key(False), label_key(True))).read(value) == 1


def test_classification_reads_raw_labels_and_words_alike() -> None:
    schema = Classification(("negative", "positive"), (("0", "negative"), ("4", "positive")))
    assert [schema.read(v) for v in (0, 4, "negative", "positive")] == [0, 1, 0, 1]
    assert schema.show(1) == "positive"


def test_a_label_outside_the_verbaliser_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'postive' is outside.*Did you mean 'positive'"):
        Classification(("negative", "positive")).read("postive")


def test_a_list_is_no_single_label() -> None:
    with pytest.raises(ValueError, match="not a list"):
        Classification(("a", "b")).read(["a"])


def test_classes_must_be_distinct_and_cover_the_verbaliser() -> None:
    with pytest.raises(ValueError, match="'1' is given twice"):
        Classification(("1", "1.0".removesuffix(".0")))
    with pytest.raises(ValueError, match="'maybe', which is not a class"):
        Classification(("no", "yes"), (("2", "maybe"),))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (["red", "blue"], [1, 0, 1]),
        ("red; blue", [1, 0, 1]),
        ("green", [0, 1, 0]),
        ([], [0, 0, 0]),
        ([0, 1, 1], [0, 1, 1]),
        (np.array([True, False, False]), [1, 0, 0]),
        ([1, None, 0], [1, math.nan, 0]),
    ],
)
def test_multilabel_reads_lists_strings_and_vectors(value: object, expected: list[float]) -> None:
    np.testing.assert_array_equal(
        MultiLabel(("red", "green", "blue")).read(value), np.array(expected, np.float32)
    )


def test_multilabel_refuses_unknown_labels_and_vectors_without_any_label() -> None:
    schema = MultiLabel(("red", "green"))
    with pytest.raises(ValueError, match="Did you mean 'green'"):
        schema.read(["gren"])
    with pytest.raises(ValueError, match="missing"):
        schema.read([None, math.nan])
    assert schema.show([0.9, 0.2]) == ["red"]


@pytest.mark.parametrize("value", [2.5, "2.5", np.float64(2.5), [2.5], np.array([2.5])])
def test_regression_reads_a_number(value: object) -> None:
    np.testing.assert_array_equal(Regression().read(value), np.float32([2.5]))


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("abc", "not a number"),
        (math.inf, "infinite"),
        ([1, 2], "2 numbers, expected 1"),
        ({"a": 1}, "not a number"),
        ([math.nan], "missing"),
    ],
)
def test_regression_refuses_what_is_no_finite_number(value: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Regression().read(value)


def test_choice_takes_position_letter_or_text() -> None:
    options = ["red wine", "beer", "42"]
    resolve = Choice().resolve
    assert resolve(1, options) == resolve("1", options) == resolve("B", options) == 1
    assert resolve("beer", options) == 1
    assert resolve("42", options) == 2
    with pytest.raises(ValueError, match="Did you mean 'beer'"):
        resolve("beeer", options)
    with pytest.raises(ValueError, match="past the 3 candidates"):
        resolve(3, options)


def test_a_number_that_is_position_and_text_of_different_candidates_is_refused() -> None:
    with pytest.raises(ValueError, match="both a position and the text"):
        Choice().resolve(1, ["1", "2", "3"])
    assert Choice().resolve("1", ["1", "2", "3"]) == 0
    assert Choice().resolve(1, ["0", "1", "2"]) == 1


def test_tagging_reads_lists_and_strings_and_leaves_gaps_unlabelled() -> None:
    schema = Tagging(("O", "NAME"))
    np.testing.assert_array_equal(schema.read("O NAME O"), [0, 1, 0])
    np.testing.assert_array_equal(schema.read(["O", None, "NAME"]), [0, -100, 1])
    with pytest.raises(ValueError, match="empty"):
        schema.read([])
    assert schema.show([0, -100, 1]) == ["O", "NAME"]


def test_generation_maps_labels_to_words_and_refuses_others() -> None:
    schema = Generation((("0", "negative"), ("1", "positive")))
    assert [schema.read(v) for v in (1, "0", "positive")] == ["positive", "negative", "positive"]
    with pytest.raises(ValueError, match="outside the verbaliser"):
        schema.read("2")
    assert Generation().read("any text") == "any text"
    with pytest.raises(ValueError, match="should be text, not a list"):
        Generation().read(["a"])


def test_equal_match_labels_get_equal_numbers_that_fit_in_int64() -> None:
    schema = Matching()
    assert schema.read("a") == schema.read("a") != schema.read("b")
    assert 0 <= schema.read("a") < 2**63


def test_forecasting_reads_steps_by_channels_and_keeps_gaps() -> None:
    np.testing.assert_array_equal(
        Forecasting(3).read([1, None, 3]), np.float32([[1], [math.nan], [3]])
    )
    assert Forecasting(2, 2).read(np.ones((2, 2))).shape == (2, 2)
    with pytest.raises(ValueError, match=r"shape \(2, 1\), expected \(3, 1\)"):
        Forecasting(3).read([1, 2])
    with pytest.raises(ValueError, match="all NaN"):
        Forecasting(2).read([math.nan, None])
    with pytest.raises(ValueError, match="even rows"):
        Forecasting(2).read([[1, 2], [3]])


def test_dense_reads_arrays_paths_and_bytes(tmp_path: Path) -> None:
    plane = np.array([[0, 1], [1, 0]], np.uint8)
    path = tmp_path / "map.png"
    Image.fromarray(plane).save(path)
    schema = Dense(("sky", "sea"), 2, 2)
    for value in (plane, plane.tolist(), str(path), path.read_bytes()):
        np.testing.assert_array_equal(schema.read(value), plane)
    assert schema.read(plane).dtype == np.int64


def test_dense_resamples_by_nearest_neighbour_and_never_invents_classes() -> None:
    plane = np.array([[0, 1], [1, 0]])
    big = Dense(("sky", "sea"), 4, 4).read(plane)
    np.testing.assert_array_equal(big, np.kron(plane, np.ones((2, 2))))


def test_dense_refuses_unknown_classes_and_broken_files(tmp_path: Path) -> None:
    schema = Dense(("sky", "sea"), 2, 2)
    with pytest.raises(ValueError, match=r"pixel value 7 is no class number \(0 to 1\)"):
        schema.read([[0, 7], [1, 1]])
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG not really")
    with pytest.raises(ValueError, match=r"broken\.png' does not decode"):
        schema.read(str(broken))
    with pytest.raises(ValueError, match="missing"):
        schema.read([[-100, -100], [-100, -100]])
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        schema.read([1, 2])


def test_dense_numbers_keep_gaps_and_judge_by_error() -> None:
    schema = Dense(None, 1, 2)
    np.testing.assert_array_equal(schema.read([[1.5, math.nan]]), np.float32([[1.5, math.nan]]))
    assert (schema.primary, schema.higher_is_better) == ("rmse", False)
    buffer = io.BytesIO()
    Image.fromarray(np.array([[3, 9]], np.uint8)).save(buffer, "PNG")
    np.testing.assert_array_equal(schema.read(buffer.getvalue()), [[3, 9]])
