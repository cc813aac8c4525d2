"""Pages stand alone, say what the records say, and leave out what a run does not have."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import report_samples
from PIL import Image

from polytask.errors import DataError
from polytask.report import proof_report, run_report
from polytask.report.words import number, percent, signed

VOID = {"meta", "br", "img", "input", "hr", "link", "path", "use"}


class Checker(HTMLParser):
    """Tags balance; identifiers; everything that would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.fetched: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name in ("src", "href", "xlink:href") and not str(value).startswith("#"):
                self.fetched.append(str(value))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def checked(page: Path) -> tuple[str, str]:
    """(source, visible text) of a page that is well formed and needs nothing from elsewhere."""
    source = page.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(source)
    assert checker.open == []
    assert len(set(checker.ids)) == len(checker.ids)
    assert checker.fetched == []
    assert not re.search(r"@import|url\((?!#)", source)
    for svg in re.findall(r"<svg.*?</svg>", source, flags=re.DOTALL):
        ElementTree.fromstring(svg)
    for name in re.findall(r"url\(#([^)]+)\)", source):
        assert name in checker.ids
    return source, re.sub(r"[ \n]+", " ", " ".join(checker.text))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = report_samples.write_run(tmp_path_factory.mktemp("runs") / "starter")
    return run_report(folder)


def test_the_page_of_a_run_stands_alone_and_has_every_task(finished: Path) -> None:
    _, text = checked(finished)
    assert finished.name == "report.html"
    for task, _, _, _, single, gain, _ in report_samples.TASKS:
        assert task in text
        assert number(single) in text
        assert signed(gain) in text
    assert percent(0.021) in text
    assert "better on 5 and worse on 1" in text
    assert "3 of 5,000 rows of 'topics' were unusable" in text
    for heading in ("Learning", "Do the tasks pull", "Who helps whom", "What was spent"):
        assert heading in text


def test_pictures_are_written_beside_the_page(finished: Path) -> None:
    names = {path.stem for path in (finished.parent / "pictures").iterdir()}
    assert names == {
        "gains",
        "dumbbell",
        "validation",
        "loss",
        "conflict",
        "conflict-parts",
        "transfer",
        "mixture",
    }
    for path in (finished.parent / "pictures").iterdir():
        with Image.open(path) as image:
            image.verify()
            assert image.width > 600
    source, _ = checked(finished)
    assert source.count("<svg") == len(names)


def test_pictures_follow_the_theme(finished: Path) -> None:
    source, _ = checked(finished)
    assert "prefers-color-scheme: dark" in source
    body = source.split("</style>", 1)[1]
    for role in ("--ink", "--soft", "--grid", "--paper"):
        assert f"var({role})" in body
    assert "#1c2024" not in body


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    folder = report_samples.write_run(tmp_path / "run", tasks=3)
    first, again = run_report(folder), run_report(folder, tmp_path / "elsewhere")
    assert again == tmp_path / "elsewhere" / "report.html"
    assert again.read_bytes() == first.read_bytes()


def test_a_run_that_goes_on_has_a_page_without_scores(tmp_path: Path) -> None:
    folder = report_samples.write_run(tmp_path / "run", tasks=2, with_scores=False)
    with (folder / "metrics.jsonl").open("a") as out:
        out.write('{"step": 3020, "kind": "tr')  # torn by a kill
    _, text = checked(run_report(folder))
    assert "no test scores yet" in text
    assert "digits" in text
    assert "Who helps whom" not in text


def test_a_run_with_nothing_logged_has_a_page(tmp_path: Path) -> None:
    folder = report_samples.write_run(tmp_path / "run", with_scores=False, with_lines=False)
    _, text = checked(run_report(folder))
    assert "Configuration as resolved" in text
    assert "Learning" not in text


def test_multitask_scores_without_a_comparison(tmp_path: Path) -> None:
    folder = report_samples.write_run(tmp_path / "run", tasks=3, with_lines=False)
    data = json.loads((folder / "scores.json").read_text())
    for task in data["tasks"]:
        task |= {"single": None, "gain": None, "relative": None}
    data |= {"delta_m": None, "transfer": None, "mixture": [], "ledger": [], "spent": {}}
    (folder / "scores.json").write_text(json.dumps(data))
    _, text = checked(run_report(folder))
    assert "One model for 3 tasks." in text
    assert "alone" not in text


def test_names_cannot_break_the_page(tmp_path: Path) -> None:
    folder = report_samples.write_run(tmp_path / "run", tasks=3)
    nasty = "<b>&\"'$\\frac$"
    for name in ("scores.json", "metrics.jsonl", "config.json"):
        path = folder / name
        path.write_text(path.read_text().replace('"digits"', json.dumps(nasty)))
    source, text = checked(run_report(folder))
    assert "<b>&" not in source
    assert escape(nasty) in source
    assert nasty in text


def test_many_notes_stand_behind_a_line_to_open(tmp_path: Path) -> None:
    folder = report_samples.write_run(tmp_path / "run", tasks=2, with_lines=False)
    data = json.loads((folder / "scores.json").read_text())
    notes = [f"note {i} of the data" for i in range(5)]
    (folder / "scores.json").write_text(json.dumps({**data, "notes": notes}))
    source, text = checked(run_report(folder))
    assert "5 notes on the data" in text
    assert source.index("<details>") < source.index(notes[4]) < source.index("</details>")


def test_what_is_no_run_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no config\.json"):
        run_report(tmp_path)
    folder = report_samples.write_run(tmp_path / "run")
    (folder / "metrics.jsonl").write_text("{\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 1 is not JSON"):
        run_report(folder)
    (folder / "metrics.jsonl").write_text("")
    (folder / "scores.json").write_text('{"tasks": [], "extra": 1}')
    with pytest.raises(DataError, match=r"scores\.json does not fit: 'extra'"):
        run_report(folder)


@pytest.mark.parametrize("correction", ["none", "holm"])
def test_the_page_of_a_proof_has_arms_seeds_claims_and_verdicts(
    tmp_path: Path, correction: str
) -> None:
    evidence = report_samples.evidence(correction)
    page = proof_report(evidence, tmp_path)
    source, text = checked(page)
    assert page.name == "16-flat-mtl.html"
    assert evidence.verdict in text
    for arm in evidence.arms:
        assert arm in text
    for judgement in evidence.judgements:
        assert judgement.claim.text in text
    assert ("p (Holm)" in text) == (correction == "holm")
    assert "three times the steps 2,100" in text
    assert "Runs per arm" in text
    assert "Reported, not claimed with 2,000 pairs the gain is gone" in text
    assert "chosen" in text
    pictures = sorted(path.stem for path in (tmp_path / "16-flat-mtl-pictures").iterdir())
    assert pictures == ["arms-accuracy", "arms-sharpness", "differences"]
    assert source.count("<svg") == 3


def test_every_seed_is_a_dot(tmp_path: Path) -> None:
    source, _ = checked(proof_report(report_samples.evidence(), tmp_path))
    picture = next(
        s for s in re.findall(r"<svg.*?</svg>", source, re.DOTALL) if "of every arm" in s
    )
    dots = picture.count("<use ")
    seeds, arms = 6, 5
    assert dots >= seeds * arms + arms  # each seed of each arm, and a mean per arm


def test_a_proof_whose_run_diverged_still_has_a_page(tmp_path: Path) -> None:
    from dataclasses import replace

    evidence = report_samples.evidence()
    first, *others = evidence.arms["flat, direct"].trials
    broken = [replace(t, metrics={"accuracy": None, "sharpness": None}) for t in (first, *others)]
    arms = {**evidence.arms, "flat, direct": replace(evidence.arms["flat, direct"], trials=broken)}
    _, text = checked(proof_report(replace(evidence, arms=arms), tmp_path))
    assert "no finite value" in text


def test_importing_the_report_is_cheap() -> None:
    code = (
        "import sys, polytask.report as r; r.run_report, r.proof_report, r.score_rows;"
        "print(sorted({'torch', 'matplotlib', 'scipy', 'sklearn'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
