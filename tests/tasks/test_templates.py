"""Templates: parsing, filling, and truncation that shortens slots and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polytask.errors import DataError, TaskError
from polytask.tasks.codec import TextCodec
from polytask.tasks.fitting import Segment, encode_documents
from polytask.tasks.templates import Template, cell_text, default_template, shares

CODEC = TextCodec.train(["the cat sat on the mat", "question answer text"] * 5, 400)
QUESTION = Template.parse("Question: {q} Context: {c} Answer:")


def test_parse_finds_literals_slots_and_escaped_braces() -> None:
    template = Template.parse("{{x}} {a}-{b}")
    assert template.literals == ("{x} ", "-", "")
    assert template.slots == ("a", "b")
    assert template.fill(["1", "2"]) == "{x} 1-2"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("no slot", "has no slot"),
        ("{}", "empty slot"),
        ("{a", "without its partner"),
        ("a}", "without its partner"),
    ],
)
def test_malformed_templates_are_refused(text: str, reason: str) -> None:
    with pytest.raises(TaskError, match=reason):
        Template.parse(text)


def test_a_missing_column_is_named_with_the_nearest() -> None:
    with pytest.raises(TaskError, match=r"slot '\{titel\}'.*Did you mean 'title'"):
        Template.parse("{titel}: {body}").check(["title", "body"], "task 'news'")


def test_the_default_template_names_columns_only_where_there_are_several() -> None:
    assert default_template(["text"]) == "{text}"
    assert default_template(["title", "body"]) == "title: {title} body: {body}"


def test_cells_become_text() -> None:
    assert [cell_text(v) for v in ("a", None, 3.0, 2.5, ["x", 1], float("nan"))] == [
        "a", "", "3", "2.5", "x 1", "",
    ]  # fmt: skip


@given(st.lists(st.integers(0, 50), min_size=1, max_size=6), st.integers(0, 120))
def test_shares_fill_the_room_and_take_from_the_longest_first(
    lengths: list[int], room: int
) -> None:
    kept = shares(lengths, room)
    assert sum(kept) == min(room, sum(lengths))
    assert all(0 <= k <= n for k, n in zip(kept, lengths, strict=True))
    cut = [k for k, n in zip(kept, lengths, strict=True) if k < n]
    if cut:  # nobody who was cut has less than somebody kept, but for the rounding unit
        assert max(kept) - min(cut) <= 1


texts = st.text(min_size=0, max_size=120)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=4), st.integers(24, 60))
def test_truncation_shortens_only_what_stands_in_slots(
    pairs: list[tuple[str, str]], room: int
) -> None:
    documents = [[Segment(QUESTION, [q, c])] for q, c in pairs]
    encoded = encode_documents(CODEC, documents, room, str)
    for (question, context), (ids,) in zip(pairs, encoded, strict=True):
        assert len(ids) <= room
        literal = CODEC.tokenizer.decode(ids).removeprefix(" ")
        assert literal.startswith("Question: ")
        assert literal.endswith(" Answer:")
        middle = literal.removeprefix("Question: ").removesuffix(" Answer:")
        assert any(
            middle == f"{question[:i]} Context: {context[:j]}"
            for i in range(len(question) + 1)
            for j in range(len(context) + 1)
            if i + j + len(" Context: ") == len(middle)
        )
        whole = CODEC.encode([QUESTION.fill([question, context])])[0]
        if len(whole) <= room:
            assert ids == whole


def test_the_longest_slot_gives_first() -> None:
    short, long = "the cat", "sat on the mat " * 30
    (ids,) = encode_documents(CODEC, [[Segment(QUESTION, [short, long])]], 40, str)[0]
    text = CODEC.tokenizer.decode(ids)
    assert f"Question: {short} Context: sat on" in text


def test_fixed_segments_are_never_cut() -> None:
    label = "the whole candidate stays as it is"
    question, fixed = Template.parse("{q}"), Template.parse("{a}")
    document = [Segment(question, ["the cat " * 100]), Segment(fixed, [label], fixed=True)]
    first, second = encode_documents(CODEC, [document], 60, str)[0]
    assert second == CODEC.encode([label])[0]
    assert 0 < len(first) <= 60 - len(second)


def test_words_that_must_stay_and_do_not_fit_are_an_error_with_the_place() -> None:
    with pytest.raises(DataError, match=r"row 7: the words that must stay.*raise text_length"):
        encode_documents(CODEC, [[Segment(QUESTION, ["a", "b"])]], 3, lambda _: "row 7")


def test_multi_byte_characters_are_cut_whole() -> None:
    template = Template.parse("{t}")
    for room in range(1, 12):
        (ids,) = encode_documents(CODEC, [[Segment(template, ["😀😀😀"])]], room, str)[0]
        assert "�" not in CODEC.tokenizer.decode(ids)
        assert len(ids) <= room


def test_a_megabyte_costs_no_more_than_its_first_lines() -> None:
    seen: list[int] = []

    class Counting(TextCodec):
        def encode(self, texts):  # type: ignore[no-untyped-def]
            seen.append(sum(map(len, texts)))
            return super().encode(texts)

    codec = Counting(**{n: getattr(CODEC, n) for n in CODEC.__dataclass_fields__})
    document = [Segment(Template.parse("{t}"), ["the cat sat " * 100_000])]
    (ids,) = encode_documents(codec, [document], 32, str)[0]
    assert len(ids) == 32
    assert sum(seen) < 3000


def test_long_runs_that_make_few_tokens_still_fill_the_room() -> None:
    codec = TextCodec.train(["abcdefghijklmnopqrstuvwxyz" * 40] * 50, 400)
    document = [Segment(Template.parse("{t}"), ["abcdefghijklmnopqrstuvwxyz" * 400])]
    (ids,) = encode_documents(codec, [document], 16, str)[0]
    assert len(ids) == 16
