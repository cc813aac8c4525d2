"""The catalogue: 64 cards that say something, found by any spelling of their name."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from polytask import systems
from polytask.errors import ConfigError, UserError

STAGES = {
    *("tasks", "mixture", "modality", "backbone", "routing", "objective", "optimise", "adapt"),
    *("merge", "compress", "continual", "align", "infer", "compose", "evaluate"),
}


def test_there_are_64_cards_numbered_without_gaps() -> None:
    assert [card.number for card in systems.cards()] == list(range(1, 65))
    assert len({card.slug for card in systems.cards()}) == 64
    assert len({card.arxiv for card in systems.cards()}) == 64


@pytest.mark.parametrize("card", systems.cards(), ids=lambda card: card.key)
def test_a_card_is_complete_and_in_sentences(card: systems.Card) -> None:
    assert re.fullmatch(r"\d{4}\.\d{5}", card.arxiv)
    # The year is that of the paper or of its publication.
    assert 0 <= card.year - (2000 + int(card.arxiv[:2])) <= 2
    assert card.stages and set(card.stages) <= STAGES
    assert card.modalities
    for text in (card.claim, card.needs, card.limits, card.proof):
        assert text[0].isupper() and text.endswith("."), text
        assert 40 <= len(text) <= 400, text
    assert card.claim.count(". ") == 0  # one sentence
    texts = {card.claim, card.needs, card.limits, card.proof}
    assert len(texts) == 4


@pytest.mark.parametrize(
    "name", ["16", 16, "flat-mtl", "16-flat-mtl", "16_flat_mtl", "FlatMTL", "flat_mtl"]
)
def test_every_spelling_finds_the_card(name: str | int) -> None:
    assert systems.card(name).number == 16


@pytest.mark.parametrize("card", systems.cards(), ids=lambda card: card.key)
def test_number_slug_key_and_name_are_unambiguous(card: systems.Card) -> None:
    for name in (card.number, f"{card.number:02d}", card.slug, card.key, card.name):
        assert systems.card(name) is card


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'flat-mtl'"):
        systems.card("flat-mlt")
    with pytest.raises(ConfigError, match="no system '65'"):
        systems.card(65)


def test_a_planned_system_says_what_is_built() -> None:
    planned = next(card for card in systems.cards() if not systems.is_built(card))
    with pytest.raises(UserError, match=r"is planned.*Built so far: .*flat-mtl"):
        systems.load(planned.number)


def test_built_systems_have_use_in_their_card_and_planned_ones_do_not_pretend() -> None:
    for card in systems.cards():
        assert bool(card.use) == systems.is_built(card), card.key


def test_every_module_has_a_card_of_its_number_and_name() -> None:
    folder = Path(systems.__file__).parent
    modules = [path.stem for path in folder.glob("[0-9][0-9]_*.py")]
    assert "16_flat_mtl" in modules
    for module in modules:
        assert systems.card(module).key.replace("-", "_") == module


def test_status_reads_the_record_and_refuses_a_broken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(systems, "evidence_folders", lambda: (tmp_path / "none", tmp_path))
    planned = next(card for card in systems.cards() if not systems.is_built(card))
    assert systems.status(planned).verdict == systems.PLANNED
    assert systems.status(systems.card(16)).verdict == "not proved yet"
    path = tmp_path / f"{planned.key}.json"
    path.write_text(json.dumps({"verdict": "contradicted"}))
    assert systems.status(planned).verdict == "contradicted"
    path.write_text("{")
    with pytest.raises(UserError, match=rf"{planned.key}\.json is not an evidence record"):
        systems.status(planned)


def test_evidence_is_looked_for_in_the_checkout_first() -> None:
    first, *others = systems.evidence_folders()
    root = Path(__file__).parents[2]
    assert first == root / "evidence"
    assert others == [root / "src" / "polytask" / "evidence"]
