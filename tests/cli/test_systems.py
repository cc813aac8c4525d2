"""`polytask systems`: the table, a card, JSON, nearest names; fast, because nothing heavy loads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from polytask import systems
from polytask.cli import main


def test_the_table_has_a_row_for_each_of_the_64(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["systems"]) == 0
    out = capsys.readouterr().out
    for card in systems.cards():
        assert card.name in out
    assert "planned" in out


def test_json_lists_number_name_stage_modality_and_verdict(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["systems", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["number"] for row in rows] == list(range(1, 65))
    sixteenth = rows[15]
    assert sixteenth["slug"] == "flat-mtl"
    assert sixteenth["stages"] == ["optimise"]
    assert set(sixteenth) == {"number", "slug", "name", "stages", "modalities", "verdict"}


def test_a_card_says_what_it_is_what_it_needs_and_how_to_call_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["systems", "16"]) == 0
    out = capsys.readouterr().out
    for heading in ("What it claims", "What it needs", "How to use it", "What was proved"):
        assert heading in out
    assert "polytask run flat-mtl --data my.yaml" in out
    assert "arxiv.org/abs/2211.13723" in out
    assert all(len(line) <= 100 for line in out.splitlines())


def test_a_planned_card_promises_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    planned = next(card for card in systems.cards() if not systems.is_built(card))
    assert main(["systems", planned.slug]) == 0
    out = capsys.readouterr().out
    assert "no code yet" in out
    assert "How to use it" not in out


def test_a_card_as_json_holds_the_records_sentences(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = {
        "verdict": "not shown",
        "judgements": [{"sentence": "not shown: a beats b"}],
        "notes": {"reported": ["shown: c beats d"]},
    }
    (tmp_path / "16-flat-mtl.json").write_text(json.dumps(record))
    monkeypatch.setattr(systems, "evidence_folders", lambda: (tmp_path,))
    assert main(["systems", "flat-mtl", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["verdict"] == "not shown"
    assert facts["proved"] == ["not shown: a beats b", "reported: shown: c beats d"]
    assert facts["evidence"].endswith("16-flat-mtl.json")


def test_an_unknown_name_gets_the_nearest_and_exit_code_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["systems", "flat-mlt"]) == 2
    assert "Did you mean 'flat-mtl'?" in capsys.readouterr().err


def test_listing_and_cards_do_not_import_torch() -> None:
    code = (
        "import sys\nfrom polytask.cli import main\n"
        "main(['systems', '--json']); main(['systems', '16'])\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
