"""`polytask infer fuse`: from prompt to page; faults are said before weights are read."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest

from polytask.cli import main

sys.path.insert(0, str(Path(__file__).parents[1] / "infer"))
from fusion_models import byte_tokenizer, llama, write


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for number, name in enumerate(("large", "small", "maths", "law")):
        write(folder / name, llama(number))
    return folder


def arguments(models: Path, out: Path, *more: str) -> list[str]:
    names = {name: str(models / name) for name in ("large", "small", "maths", "law")}
    return [
        *("infer", "fuse", "--large", names["large"], "--base", names["small"]),
        *("--experts", names["maths"], names["law"], "--out", str(out), *more),
    ]


def test_json_table_and_page(models, tmp_path, capsys) -> None:
    more = ("--prompt", "one", "--prompt", "two <b>", "--max-new", "6", "--json")
    assert main(arguments(models, tmp_path, *more)) == 0
    out = json.loads(capsys.readouterr().out)
    figures = out["figures"]
    assert figures["models"]["experts"].keys() == {"maths", "law"}
    assert figures["vocabulary"] == 257
    assert figures["tokens"] == sum(len(r["tokens"]) for r in figures["results"])
    folder = Path(out["folder"])
    assert json.loads((folder / "fusion.json").read_text()) == figures
    with (folder / "tokens.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert len(rows) == figures["tokens"]
    assert {"alpha maths", "alpha law", "moved", "back", "loss"} <= set(rows[0])
    for row in rows:
        expected = row["alpha maths"] if row["expert"] == "maths" else row["alpha law"]
        assert float(row["alpha"]) == float(expected) or row["expert"] == "large model"
    page = (folder / "report.html").read_text()
    assert "two &lt;b&gt;" in page and "<b>" not in page
    assert "color-mix" in page and page.count("<svg") == 2
    assert (folder / "strength.png").is_file() and (folder / "shares.png").is_file()


def test_text_is_streamed_and_a_table_follows(models, tmp_path, capsys) -> None:
    assert main(arguments(models, tmp_path, "--prompt", "hello", "--max-new", "5")) == 0
    out = capsys.readouterr().out
    assert out.startswith("hello")
    assert "strength" in out and "tokens in" in out


def test_scoring_a_file(models, tmp_path, capsys) -> None:
    file = tmp_path / "given.txt"
    file.write_text("some text")
    assert main(arguments(models, tmp_path, "--file", str(file), "--score", "--json")) == 0
    result = json.loads(capsys.readouterr().out)["figures"]["results"][0]
    assert len(result["tokens"]) == len("some text") - 1
    assert all(token["nll"] > 0 for token in result["tokens"])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--prompt", "x", "--grid", "-1:1:.5"), "negative"),
        (("--prompt", "x", "--grid", ".5:1:.1"), "0 is missing"),
        (("--prompt", "x", "--mode", "static"), "needs alpha"),
        (("--prompt", "x", "--mode", "static", "--alpha", "1,1,1"), "one for each of 2 experts"),
        (("--prompt", "x", "--mode", "sometimes"), "mode"),
        (("--prompt", "x", "--bounds", "0:1"), "1 pairs for 2 experts"),
        (("--prompt", "x", "--bounds", "zero"), "low:high"),
        (("--prompt", ""), "prompt 1 is empty"),
        (("--file", "nowhere.txt"), "cannot read nowhere.txt"),
        ((), "nothing to continue"),
        (("--prompt", "x", "--max-new", "500"), "128 positions"),
        (("--prompt", "x", "--dtype", "int8"), "dtype"),
    ],
)
def test_faults_are_named(models, tmp_path, capsys, more, said) -> None:
    assert main(arguments(models, tmp_path, *more)) == 2
    assert said in capsys.readouterr().err


def test_missing_models_and_other_vocabularies(models, tmp_path, capsys) -> None:
    assert main(["infer", "fuse", "--large", str(models / "large"), "--prompt", "x"]) == 2
    assert "--base, --experts missing" in capsys.readouterr().err
    other = tmp_path / "other"
    write(other, llama(5, padded=2), byte_tokenizer(("w1", "w2")))
    given = arguments(models, tmp_path, "--prompt", "x")
    given[given.index(str(models / "law"))] = str(other)
    # Weights are not even looked at.
    (other / "model.safetensors").write_bytes(b"nothing")
    assert main(given) == 2
    assert "id 257, 'w1', is only in one" in capsys.readouterr().err
    assert main(["infer", "fuse", "stray", "--prompt", "x"]) == 2
    assert "'stray' belongs to no option" in capsys.readouterr().err
