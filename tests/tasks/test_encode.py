"""What the processor makes of rows, schema by schema, against a reading by hand."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from task_rows import measurements, pictures, reviews

from polytask.errors import CheckpointError, DataError, TaskError
from polytask.rng import derive
from polytask.tasks import Processor, ProcessorConfig, Task, TaskSet, build_tasks
from polytask.tasks.codec import TextCodec
from polytask.tasks.schemas import Regression

SMALL = ProcessorConfig(vocab_size=400, text_length=32, image_size=6, series_length=8)


def fitted(*tasks: Task, config: ProcessorConfig = SMALL, tokenizer: Any = None) -> Processor:
    return Processor.fit(TaskSet.of(*tasks), config, tokenizer)


def ids(processor: Processor, text: str) -> list[int]:
    return processor.codec.encode([text])[0]


def same(a: Any, b: Any) -> bool:
    """Whether two lists of examples hold equal arrays under equal names."""
    if len(a) != len(b):
        return False
    for left, right in zip(a, b, strict=True):
        if left.row != right.row or left.targets.keys() != right.targets.keys():
            return False
        pairs = [(left.targets[k], right.targets[k]) for k in left.targets]
        for one, two in zip(left.sequences, right.sequences, strict=True):
            if one.keys() != two.keys():
                return False
            pairs += [(one[k], two[k]) for k in one]
        for x, y in pairs:
            if np.asarray(x).dtype != np.asarray(y).dtype or not np.array_equal(x, y, True):
                return False
    return True


def test_classification_reads_start_and_text_bidirectionally() -> None:
    rows = reviews()
    processor = fitted(Task.from_rows("r", rows, target="label"))
    examples = processor.encode(0, rows[:5], indices=[3, 1, 4, 1, 5])
    for row, example, number in zip(rows, examples, [3, 1, 4, 1, 5]):
        (sequence,) = example.sequences
        expected = [1, *ids(processor, row["text"])]
        assert sequence["text.ids"].dtype == np.int32
        assert sequence["text.ids"].tolist() == expected
        assert sequence["text.prefix"] == len(expected)
        assert example.targets == {0: ["bad", "good"].index(row["label"])}
        assert example.row == number


def test_pair_texts_are_joined_by_a_separator_and_share_the_room() -> None:
    rows = [
        {"premise": f"one {i} thing", "hypothesis": "other " * (i % 40), "label": i % 2}
        for i in range(1, 60)
    ]
    processor = fitted(Task.from_rows("p", rows, target="label", schema="pair",
                                      inputs={"text": ["premise", "hypothesis"]}))  # fmt: skip
    for row, example in zip(rows, processor.encode(0, rows), strict=True):
        sequence = example.sequences[0]["text.ids"].tolist()
        first = ids(processor, row["premise"])
        assert len(sequence) <= 32
        assert sequence[: len(first) + 2] == [1, *first, 2]
        second = ids(processor, row["hypothesis"])
        assert sequence[len(first) + 2 :] == second[: 30 - len(first)]


def test_choice_gives_one_sequence_per_candidate_and_never_cuts_one() -> None:
    rows = [
        {"q": f"which of these {i} " * 20, "choices": ["red apple", f"pear {i}"], "answer": i % 2}
        for i in range(20)
    ]
    inputs = {"text": "q", "choices": "choices"}
    processor = fitted(Task.from_rows("c", rows, inputs=inputs, target="answer"))
    for row, example in zip(rows, processor.encode(0, rows), strict=True):
        assert len(example.sequences) == 2
        for candidate, sequence in zip(row["choices"], example.sequences, strict=True):
            found = sequence["text.ids"].tolist()
            end = [2, *ids(processor, candidate)]
            assert len(found) <= 32 and found[-len(end) :] == end
        assert example.targets == {0: row["answer"]}


def test_candidates_may_stand_in_columns_of_their_own() -> None:
    rows = [{"q": f"q {i}", "a": "yes", "b": f"no {i}", "answer": "AB"[i % 2]} for i in range(20)]
    inputs = {"text": "q", "choices": ["a", "b"]}
    task = Task.from_rows("c", rows, inputs=inputs, target="answer")
    examples = fitted(task).encode(0, rows)
    assert [e.targets[0] for e in examples] == [0, 1] * 10


def test_tags_stand_at_first_sub_words_and_whole_words_are_kept() -> None:
    words = ["Ω", "unbelievable", "cats", "sat"] * 6
    rows = [{"words": [*words, f"w{i}"], "tags": ["X", "Y", "Z", "X"] * 6 + ["Y"]}
            for i in range(20)]  # fmt: skip
    processor = fitted(Task.from_rows("t", rows, target="tags", inputs={"text": "words"}))
    (example,) = processor.encode(0, rows[:1])
    sequence, labels = example.sequences[0]["text.ids"].tolist(), example.targets[0].tolist()
    expected_ids, expected_labels = [1], [-100]
    for word, tag in zip(rows[0]["words"], rows[0]["tags"], strict=True):
        pieces = ids(processor, word)
        if len(expected_ids) + len(pieces) > 32:
            break
        expected_ids += pieces
        expected_labels += ["XYZ".index(tag), *[-100] * (len(pieces) - 1)]
    assert sequence == expected_ids
    assert labels == expected_labels


def test_tagging_and_classification_share_one_sequence() -> None:
    rows = [{"words": f"fly to city{i}", "tags": "O O C", "intent": ("go", "ask")[i % 2]}
            for i in range(30)]  # fmt: skip
    config = {"data": rows, "inputs": {"text": "words"}}
    taskset = build_tasks({
        "tags": {**config, "target": "tags", "schema": "tagging"},
        "intent": {**config, "target": "intent"},
    })  # fmt: skip
    assert len(taskset.groups) == 1
    (example,) = Processor.fit(taskset, SMALL).encode(0, rows[:1])
    assert len(example.sequences) == 1 and set(example.targets) == {0, 1}


def test_generation_is_prompt_separator_answer_end_with_labels_on_the_answer() -> None:
    rows = [{"prompt": f"say {i} " * 30, "completion": f"number {i}"} for i in range(30)]
    processor = fitted(Task.from_rows("g", rows, target="completion", schema="generation"))
    for row, example in zip(rows, processor.encode(0, rows), strict=True):
        sequence, labels = example.sequences[0], example.targets[0]
        answer = [*ids(processor, row["completion"]), processor.codec.end]
        whole = sequence["text.ids"].tolist()
        assert whole[-len(answer) :] == answer
        assert sequence["text.prefix"] == len(whole) - len(answer)
        assert whole[sequence["text.prefix"] - 1] == processor.codec.sep[0]
        assert labels.tolist() == [-100] * sequence["text.prefix"] + answer
        assert len(whole) <= 32
    for full, prompt in zip(processor.encode(0, rows),
                            processor.encode(0, [{"prompt": r["prompt"]} for r in rows],
                                             with_targets=False), strict=True):  # fmt: skip
        prefix = full.sequences[0]["text.prefix"]
        np.testing.assert_array_equal(
            prompt.sequences[0]["text.ids"], full.sequences[0]["text.ids"][:prefix]
        )
        assert prompt.targets == {}


def test_an_answer_that_does_not_fit_is_found_when_fitting_not_when_training() -> None:
    rows = [{"prompt": f"p {i}", "completion": f"c {i}"} for i in range(30)]
    rows[7]["completion"] = " ".join(f"{n}!" for n in range(40))
    task = Task.from_rows("g", rows, target="completion", schema="generation")
    with pytest.raises(DataError, match=r"task 'g': the answer in memory, row 8 has") as caught:
        fitted(task)
    needed = int(str(caught.value).split("text_length to at least ")[1].split()[0])
    fitted(task, config=SMALL.model_copy(update={"text_length": needed}))


def test_language_modelling_labels_everything_but_the_start() -> None:
    rows = [{"text": f"once upon a time {i}"} for i in range(30)]
    processor = fitted(Task.from_rows("lm", rows, schema="language_model"))
    (example,) = processor.encode(0, rows[:1])
    expected = [1, *ids(processor, rows[0]["text"]), processor.codec.end]
    assert example.sequences[0]["text.ids"].tolist() == expected
    assert example.sequences[0]["text.prefix"] == 0
    assert example.targets[0].tolist() == [-100, *expected[1:]]
    (prompt,) = processor.encode(0, rows[:1], with_targets=False)
    assert prompt.sequences[0]["text.ids"].tolist() == expected[:-1]


def test_matching_gives_two_sequences_and_equal_answers_equal_numbers() -> None:
    rows = [{"question": f"q {i}", "answer": f"answer {i // 2}"} for i in range(30)]
    task = Task.from_rows("m", rows, schema="matching", inputs={"text": ["question", "answer"]})
    processor = fitted(task)
    examples = processor.encode(0, rows)
    assert [len(e.sequences) for e in examples] == [2] * 30
    groups = [e.targets[0] for e in examples]
    assert len(set(groups)) == 15 and groups[0] == groups[1] != groups[2]
    assert examples[3].sequences[1]["text.ids"].tolist() == [1, *ids(processor, "answer 1")]


def test_matching_may_cross_modalities() -> None:
    rows = [{**row, "caption": f"picture number {i}"} for i, row in enumerate(pictures())]
    task = Task.from_rows(
        "m", rows, schema="matching", inputs={"text": "caption", "image": "image"}
    )
    (example,) = fitted(task).encode(0, rows[:1])
    assert set(example.sequences[0]) == {"text.ids", "text.prefix"}
    assert set(example.sequences[1]) == {"image.pixels"}


def test_images_of_any_origin_are_resized_to_three_channels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for i in range(20):
        array = rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)
        path = tmp_path / f"{i}.png"
        Image.fromarray(array).save(path)
        value = (array, str(path), path.read_bytes())[i % 3]
        rows.append({"image": value, "label": i % 2, "array": array})
    task = Task.from_rows("p", rows, target="label", inputs={"image": "image"})
    processor = fitted(task)
    for row, example in zip(rows, processor.encode(0, rows), strict=True):
        pixels = example.sequences[0]["image.pixels"]
        resized = Image.fromarray(row["array"]).resize((6, 6), Image.Resampling.BILINEAR)
        assert pixels.dtype == np.uint8
        np.testing.assert_array_equal(pixels, np.asarray(resized).transpose(2, 0, 1))


def test_grey_and_float_images_become_bytes_of_three_equal_channels() -> None:
    grey = np.arange(36, dtype=np.uint8).reshape(6, 6)
    rows = [{"image": (grey, grey[..., None], grey / 255)[i % 3], "label": i % 2}
            for i in range(21)]  # fmt: skip
    processor = fitted(Task.from_rows("p", rows, target="label", inputs={"image": "image"}))
    for example in processor.encode(0, rows):
        np.testing.assert_array_equal(example.sequences[0]["image.pixels"], np.stack([grey] * 3))


def test_dense_labels_are_grids_beside_their_picture() -> None:
    rows = [{"image": row["image"], "mask": (row["image"] > 127).astype(np.uint8)}
            for row in pictures()]  # fmt: skip
    task = Task.from_rows("d", rows, target="mask", schema="dense", inputs={"image": "image"})
    for row, example in zip(rows, fitted(task).encode(0, rows), strict=True):
        assert example.sequences[0]["image.pixels"].shape == (3, 6, 6)
        np.testing.assert_array_equal(example.targets[0], row["mask"])
        assert example.targets[0].dtype == np.int64


def test_rows_without_a_label_for_a_task_have_no_target_for_it() -> None:
    rows = pictures()
    config = {"data": rows, "inputs": {"image": "image"}}
    taskset = build_tasks(
        {"shape": {**config, "target": "shape"}, "weight": {**config, "target": "weight"}}
    )
    examples = Processor.fit(taskset, SMALL).encode(0, rows)
    for i, example in enumerate(examples):
        assert set(example.targets) == ({0} if i % 4 == 3 else {0, 1})
        assert len(example.sequences) == 1


def test_tables_are_standardised_by_the_train_split_and_gaps_stay() -> None:
    rows = measurements()
    task = Task.from_rows("price", rows, target="price")
    processor = fitted(task)
    train = list(task.splits["train"])  # type: ignore[union-attr]
    ages = np.array([row["age"] for row in train if row["age"] is not None], float)
    for row, example in zip(rows, processor.encode(0, rows), strict=True):
        (sequence,) = example.sequences
        age = math.nan if row["age"] is None else (row["age"] - ages.mean()) / ages.std()
        np.testing.assert_allclose(sequence["table.number"][0], age, rtol=1e-5)
        assert sequence["table.number_id"].tolist() == [0, 1]
        assert sequence["table.category"].tolist() == [
            2 + ["blue", "green", "red"].index(row["colour"])
        ]
        assert example.targets[0].tolist() == [np.float32(row["price"])]
    assert isinstance(task.schema, Regression)


def test_unknown_and_missing_categories_have_ids_of_their_own() -> None:
    processor = fitted(Task.from_rows("price", measurements(), target="price"))
    row = measurements()[1]
    unknown, missing = processor.encode(
        0, [{**row, "colour": "mauve"}, {**row, "colour": None}], with_targets=False
    )
    assert unknown.sequences[0]["table.category"].tolist() == [0]
    assert missing.sequences[0]["table.category"].tolist() == [1]


def test_column_ids_are_global_over_tasks() -> None:
    first = Task.from_rows("one", measurements(), target="price")
    second = Task.from_rows("two", measurements(), target="price", categories=["age"])
    processor = fitted(first, second)
    (example,) = processor.encode(1, measurements()[:1])
    assert example.sequences[0]["table.number_id"].tolist() == [2]
    assert example.sequences[0]["table.category"].min() >= 5
    assert processor.number_columns == 3
    ages = processor.layouts[1].tables["main"].categories[0]
    assert ages.name == "age" and ages.first == 5
    assert processor.category_ids == 5 + ages.size + 5


def test_series_keep_their_last_steps_and_their_gaps() -> None:
    rows = [
        {"past": [None, *range(i, i + 20)], "label": i % 2, "future": np.arange(3.0) + i}
        for i in range(20)
    ]
    task = Task.from_rows("f", rows, target="future", inputs={"series": "past"})
    processor = fitted(task)
    (long,) = processor.encode(0, rows[:1])
    np.testing.assert_array_equal(long.sequences[0]["series.values"][:, 0], np.arange(12, 20))
    (short,) = processor.encode(0, [{"past": [1, None, 3], "future": [1, None, 3]}])
    np.testing.assert_array_equal(
        short.sequences[0]["series.values"], np.float32([[1], [math.nan], [3]])
    )
    np.testing.assert_array_equal(short.targets[0], np.float32([[1], [math.nan], [3]]))


def test_several_series_columns_are_channels_aligned_at_their_end() -> None:
    rows = [{"a": [1, 2, 3], "b": [9, 8], "label": i % 2, "n": i} for i in range(20)]
    for i, row in enumerate(rows):
        row["a"] = [i, 2, 3]
    processor = fitted(Task.from_rows("s", rows, target="label", inputs={"series": ["a", "b"]}))
    (example,) = processor.encode(0, rows[1:2])
    np.testing.assert_array_equal(
        example.sequences[0]["series.values"], np.float32([[1, math.nan], [2, 9], [3, 8]])
    )
    assert processor.series_channels == 2


def test_features_of_two_widths_share_the_wider() -> None:
    narrow = [{"x": np.full(3, float(i)), "label": i % 2} for i in range(20)]
    wide = [{"x": np.full((2, 5), float(i)), "label": i % 2} for i in range(20)]
    processor = fitted(
        *(Task.from_rows(n, rows, target="label", inputs={"features": "x"})
          for n, rows in (("narrow", narrow), ("wide", wide)))
    )  # fmt: skip
    assert processor.feature_width == 5
    (example,) = processor.encode(0, narrow[2:3])
    np.testing.assert_array_equal(example.sequences[0]["features.values"], [[2, 2, 2, 0, 0]])
    (example,) = processor.encode(1, wide[2:3])
    assert example.sequences[0]["features.values"].shape == (2, 5)


def test_inputs_of_several_modalities_stand_in_one_sequence() -> None:
    rows = [{**p, **m, "note": f"a note about {i}"}
            for i, (p, m) in enumerate(zip(pictures(), measurements()))]  # fmt: skip
    task = Task.from_rows(
        "all", rows, target="shape",
        inputs={"image": "image", "text": "note", "table": ["age", "colour"]},
    )  # fmt: skip
    (example,) = fitted(task).encode(0, rows[:1])
    assert set(example.sequences[0]) == {
        "image.pixels", "text.ids", "text.prefix", "table.number", "table.number_id",
        "table.category",
    }  # fmt: skip


def test_templates_are_drawn_per_epoch_and_row_in_training_and_chosen_in_evaluation() -> None:
    rows = reviews()
    task = Task.from_rows("r", rows, target="label", template=["a {text}", "b {text}", "c {text}"])
    processor = fitted(task)
    assert processor.templates(0) == 3

    def first_words(**choice: Any) -> str:
        examples = processor.encode(0, rows, **choice)
        return "".join(processor.decode(e.sequences[0]["text.ids"].tolist())[0] for e in examples)

    assert first_words() == "a" * 60
    assert first_words(template=2) == "c" * 60
    drawn = first_words(epochs=0)
    expected = ["abc"[derive(0, "template", "r", 0, row) % 3] for row in range(60)]
    assert drawn == "".join(expected)
    assert first_words(epochs=[0] * 60) == drawn != first_words(epochs=1)
    assert set(drawn) == set("abc")


def test_encoding_does_not_depend_on_how_rows_are_batched() -> None:
    rows = [{**r, "text": r["text"] * (1 + i % 9)} for i, r in enumerate(reviews())]
    task = Task.from_rows("r", rows, target="label", template=["x {text}", "y {text} z"])
    processor = fitted(task)
    whole = processor.encode(0, rows, epochs=3)
    pieces = [
        e for i in range(60)
        for e in processor.encode(0, rows[i : i + 1], indices=[i], epochs=3)
    ]  # fmt: skip
    assert same(whole, pieces)


@pytest.mark.parametrize("text", ["", "   ", "🦊" * 40, "naïve Ωmega 漢字", "a" * 500, "\x00\n\t"])
def test_odd_texts_encode_within_the_length(text: str) -> None:
    processor = fitted(Task.from_rows("r", reviews(), target="label"))
    (example,) = processor.encode(0, [{"text": text}], with_targets=False)
    sequence = example.sequences[0]["text.ids"]
    assert 1 <= len(sequence) <= 32 and sequence[0] == 1


def test_no_rows_give_no_examples() -> None:
    assert fitted(Task.from_rows("r", reviews(), target="label")).encode(0, []) == []


def test_a_missing_column_names_task_place_and_nearest() -> None:
    processor = fitted(Task.from_rows("r", reviews(), target="label"))
    with pytest.raises(DataError) as caught:
        processor.encode(0, [{"txt": "x"}], lambda _: "new.csv, line 2", with_targets=False)
    assert str(caught.value) == (
        "task 'r': column 'text' is missing in new.csv, line 2 (has: txt). Did you mean 'txt'?"
    )
    with pytest.raises(DataError, match="column 'label' is missing"):
        processor.encode(0, [{"text": "x"}])


def test_a_bad_label_names_the_place() -> None:
    processor = fitted(Task.from_rows("r", reviews(), target="label"))
    with pytest.raises(DataError, match="row 2: label 'goodd' is outside"):
        processor.encode(0, [reviews()[0], {"text": "x", "label": "goodd"}])


def mixed_tasks() -> list[Task]:
    return [
        Task.from_rows("text", reviews(), target="label", template=["{text}", "so: {text}"]),
        Task.from_rows("image", pictures(), target="shape", inputs={"image": "image"}),
        Task.from_rows("table", measurements(), target="price"),
        Task.from_rows(
            "write", [{"prompt": f"p {i}", "completion": f"c {i}"} for i in range(30)],
            target="completion", schema="generation",
        ),
        Task.from_rows(
            "series", [{"s": np.arange(9.0) + i, "future": np.ones(2) * i} for i in range(30)],
            target="future", inputs={"series": "s"},
        ),
    ]  # fmt: skip


def test_a_saved_processor_encodes_identically(tmp_path: Path) -> None:
    tasks = mixed_tasks()
    processor = fitted(*tasks)
    processor.save(tmp_path / "p")
    loaded = Processor.load(tmp_path / "p")
    assert loaded.config == processor.config
    assert loaded.layouts == processor.layouts
    assert (loaded.vocab_size, loaded.pad_id) == (processor.vocab_size, processor.pad_id)
    for number, task in enumerate(tasks):
        rows = list(task.splits["train"])  # type: ignore[arg-type]
        assert same(processor.encode(number, rows, epochs=2), loaded.encode(number, rows, epochs=2))


def test_saving_twice_writes_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        fitted(*mixed_tasks()).save(tmp_path / name)
    for file in ("processor.json", "codec.json", "tokenizer.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_a_damaged_or_missing_processor_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"processor\.json cannot be read"):
        Processor.load(tmp_path)
    (tmp_path / "processor.json").write_text('{"config": {}}')
    with pytest.raises(CheckpointError, match=r"processor\.json cannot be read"):
        Processor.load(tmp_path)


def test_groups_are_found_by_task_name() -> None:
    processor = fitted(*mixed_tasks())
    assert processor.group_of("table") == 2
    assert processor.modalities == ("image", "series", "table", "text")
    with pytest.raises(TaskError, match=r"no task 'tabel'\. Did you mean 'table'"):
        processor.group_of("tabel")


def test_a_given_codec_is_used_as_it_is() -> None:
    codec = TextCodec.train(["something else"], 310)
    processor = fitted(Task.from_rows("r", reviews(), target="label"), tokenizer=codec)
    assert processor.codec is codec and processor.vocab_size == 310


def test_vocabulary_and_scales_see_train_rows_only() -> None:
    def processor(test_word: str, price: float) -> Processor:
        train = [{**m, "text": r["text"]} for m, r in zip(measurements(), reviews())]
        test = [{**row, "text": test_word * 9, "size": price} for row in train]
        data = {"train": train, "test": test}
        inputs = {"text": "text", "table": ["size", "colour"]}
        task = Task.from_rows(
            "r", data, target="price", inputs=inputs, schema="regression", split={"kind": "given"}
        )
        return fitted(task)

    one, two = processor("zyx ", 1.0), processor("wvu ", 1e6)
    assert one.codec.tokenizer.to_str() == two.codec.tokenizer.to_str()
    assert one.layouts == two.layouts


def test_texts_that_are_often_shortened_are_said(caplog: pytest.LogCaptureFixture) -> None:
    rows = [{**row, "text": row["text"] * (9 if i % 4 else 1)} for i, row in enumerate(reviews())]
    fitted(Task.from_rows("r", rows, target="label"))
    assert "of the texts are longer than text_length = 32 tokens" in caplog.text


@pytest.mark.slow
def test_short_texts_encode_fast() -> None:
    rows = reviews(20_000)
    processor = fitted(Task.from_rows("r", rows, target="label"))
    started = time.process_time()
    for start in range(0, 20_000, 64):
        processor.encode(0, rows[start : start + 64])
    assert 20_000 / (time.process_time() - started) > 5_000
