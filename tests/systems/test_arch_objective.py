"""System 06: cells see equal tokens, adaptations change the mask alone, speed-ups are read off
curves; the command runs on a user's text."""

from __future__ import annotations

import json
from functools import cache
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from polytask import systems
from polytask.cli import main
from polytask.errors import ConfigError
from polytask.study import Budget
from polytask.study.evidence import ArmRecord, Trial
from polytask.systems import arch_cells as cells
from polytask.systems.testbeds import architectures as bed
from polytask.systems.testbeds.prose import Prose
from polytask.tasks.tokenizer_training import train_tokenizer

module = import_module("polytask.systems.06_arch_objective")
system = systems.load("arch-objective")
WORDS = ("the", "a", "small", "red", "old", "house", "dog", "cat", "runs", "under", "river", "and")


def sentences(count: int, seed: int = 0) -> list[str]:
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, 12)) + "." for _ in range(count)]


@cache
def little() -> Prose:
    codec = train_tokenizer(sentences(200), 400, "bpe", 32)
    stream = np.concatenate(
        [np.array([*ids, codec.end], np.int32) for ids in codec.encode(sentences(400))]
    )
    cut = len(stream) * 2 // 3
    return Prose(codec, {"train": stream[:cut], "valid": stream[cut:], "test": stream[cut:]})


def rows(number: int, part: str, limit: int) -> tuple[tuple[dict[str, str], str], ...]:
    choices = bed.TASKS[number].choices
    texts = sentences(limit, number)
    return tuple(
        ({"definition": t, "a": t, "b": t[:20]}, choices[i % len(choices)])
        for i, t in enumerate(texts)
    )


@pytest.fixture
def small_bed(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> type[Any]:
    monkeypatch.setattr(bed, "cache_root", lambda: tmp_path_factory.getbasetemp() / "arch")
    monkeypatch.setattr(bed, "text_of", lambda _: little())
    monkeypatch.setattr(bed, "_rows", rows)
    return Any


def test_claims_are_the_sheets_pass_lines() -> None:
    found = {(c.better, c.than, c.metric, c.kind, c.margin) for c in system.claims}
    assert found == {
        ("nc-a", "nd:mlm", "mlm loss", "claim", 0.0),
        ("nc-a", "nd:mlm", "mlm speed-up", "claim", 0.3),
        ("lm-a", "cd:flm", "flm loss", "claim", 0.0),
        ("lm-a", "cd:flm", "flm speed-up", "claim", 0.3),
        ("nc-a", "nc-a unswitched", "mlm loss", "ablation", 0.0),
        ("nc-a", "nc-a anew", "mlm loss", "ablation", 0.0),
        ("lm-a", "lm-a anew", "flm loss", "ablation", 0.0),
    }


@pytest.mark.parametrize("length", [32, 64])
@pytest.mark.parametrize("name", cells.CELLS)
def test_every_cell_sees_the_same_tokens_per_example(name: str, length: int) -> None:
    cell, scale = cells.Cell.of(name), cells.Scale(length=length, rows=6)
    pairs = cells.draw(little(), cell.objective, scale, 3)(5)
    seen = pairs.input_lengths + pairs.target_lengths
    assert len(pairs) == 6 and abs(seen - length).max() <= 1
    assert (pairs.input_lengths == 0).all() == (cell.objective == "flm")


def test_the_chunk_of_64_seen_tokens_is_56_tokens_of_text() -> None:
    # 8 noise tokens in 3 spans: 48 + 3 + end, 8 + 3 + end.
    assert cells.span_chunk(cells.Scale(), little()) == 56


def test_what_a_model_is_adapted_on_is_not_what_it_was_pretrained_on() -> None:
    scale = cells.Scale(rows=4)
    chunks = {o: cells.draw(little(), o, scale, 1)(0) for o in ("flm", "plm", "mlm")}
    again = cells.draw(little(), "flm", scale, 1)(0)
    assert np.array_equal(again.target_ids, chunks["flm"].target_ids)
    whole = [
        chunks["flm"].target(0).tolist(),
        [*chunks["plm"].input(0).tolist(), *chunks["plm"].target(0).tolist()],
    ]
    assert whole[0] != whole[1]


def test_a_curve_is_reached_between_its_points_and_a_speed_up_may_be_a_bound() -> None:
    scratch = cells.Curve([0, 100, 200, 300], [6.0, 5.0, 4.5, 4.4])
    assert scratch.reaches(4.75) == pytest.approx(150)
    assert scratch.reaches(6.5) == 0 and scratch.reaches(4.3) is None
    assert scratch.at(50) == pytest.approx(5.5)
    assert cells.speed_up(cells.Curve([0, 50], [7, 4.75]), scratch) == (pytest.approx(3.0), True)
    assert cells.speed_up(cells.Curve([0, 50], [7, 4.0]), scratch) == (pytest.approx(6.0), False)


def test_blocks_made_anew_keep_the_embeddings_alone() -> None:
    scale = cells.Scale(dim=16, layers=2, heads=2, t5_like=True)
    model = cells.fresh(little(), "prefix", scale, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    anew = cells.rebuilt(model, 0)
    for name, value in anew.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]) is (name == "embedding.weight"), name
    assert torch.equal(anew.decoder.norm.weight, torch.ones(16))
    assert anew.architecture == "prefix"


def test_a_held_out_score_is_the_mean_over_tokens(small_bed: Any) -> None:
    scale = cells.Scale(dim=16, layers=1, heads=2, held_out=10, length=32)
    model = cells.fresh(little(), "prefix", scale, 0)
    pairs = cells.held_out(little(), "mlm", scale)
    nll, _ = model.token_losses(model.feed(pairs))
    found = cells.score(model, pairs, rows=3)
    own = pairs.is_original
    assert found["loss"] == pytest.approx(float(nll.mean().detach()), rel=1e-5)
    assert found["text"] == pytest.approx(float(nll.detach()[own].mean()), rel=1e-5)
    assert 0 < own.sum() < len(own)


def test_arms_run_share_their_bases_and_spend_the_same(small_bed: Any) -> None:
    arms = system.arms("smoke")
    assert tuple(arms) == (*cells.CELLS, *module.ADAPTATIONS)
    found = {name: arm.run(3, system.budget("smoke")) for name, arm in arms.items()}
    spent = {name: result.spent.measured() for name, result in found.items()}
    assert len({tuple(spent[name].values()) for name in cells.CELLS}) == 1
    assert len({tuple(spent[name].values()) for name in module.ADAPTATIONS}) == 1
    assert spent["nc-a"]["tokens"] == pytest.approx(2 * 4 * 32, abs=8)
    nc, plain = found["nc-a"].notes, found["cd:flm"].notes
    assert nc["before"]["tokens"] == plain["spent"]["tokens"]
    assert plain["parameters"] == found["nd:mlm"].notes["parameters"]
    assert found["ed:mlm"].notes["parameters"] > 1.2 * plain["parameters"]
    # The unswitched arm starts from the very same weights: only the mask tells it from NC-A.
    first = found["nc-a unswitched"].notes["curve"]["loss"][0]
    assert first != nc["curve"]["loss"][0]
    assert 0 <= found["nd:mlm"].metrics["tasks"] <= 1
    again = arms["lm-a"].run(3, system.budget("smoke"))
    assert again.metrics == found["lm-a"].metrics


def test_tasks_are_the_same_for_every_cell_and_answers_end(small_bed: Any) -> None:
    setting = bed.SMOKE
    pairs = bed.task_draw(setting, 4)(1)
    assert len(pairs) == setting.tasks_rows
    assert pairs.input_lengths.max() <= setting.scale.length - 8
    ends = [pairs.target(i)[-1] for i in range(len(pairs))]
    assert set(ends) == {little().codec.end}
    asked = bed.questions(setting, "test")
    assert set(asked) == {"field", "speech", "follows"}
    assert all(len(v) == 2 for v in asked.values())
    text = little().codec.tokenizer.decode(list(asked["field"]["kind"][0].prompt))
    assert text.rstrip().endswith("This is a kind of")


def test_the_grid_has_a_verdict_of_its_own() -> None:
    def trials(values: list[float]) -> ArmRecord:
        found = [Trial(s, {"tasks": v}, Budget(), {}) for s, v in enumerate(values)]
        return ArmRecord({}, found, "")

    arms = {name: trials([0.5, 0.51, 0.49]) for name in cells.CELLS}
    arms["ed:mlm"] = trials([0.6, 0.61, 0.592])
    told = system.reported(SimpleNamespace(size="full", arms=arms))
    assert told[0].endswith("wins: shown") and len(told) == 7
    arms["ed:mlm"] = trials([0.5, 0.4, 0.6])
    assert system.reported(SimpleNamespace(size="full", arms=arms))[0].endswith("not shown")


def test_the_command_runs_on_ones_own_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts").mkdir()
    for number in range(4):
        (tmp_path / "texts" / f"{number}.txt").write_text("\n".join(sentences(60, number)))
    code = main(
        ["run", "arch-objective", "--data", str(tmp_path / "texts"), "--out", str(tmp_path),
         "--cells", "cd:flm nd:mlm ed:mlm", "--budget_tokens", "4096", "--dim", "16",
         "--layers", "1", "--heads", "2", "--vocab", "400", "--rows", "8", "--length", "32",
         "--json"]
    )  # fmt: skip
    assert code == 0
    outcome = json.loads(capsys.readouterr().out)
    figures = outcome["figures"]
    assert set(figures["speed-ups"]) == {"cd:flm -> nd:mlm", "nd:mlm -> cd:flm"}
    seen = {row["cell"]: row["tokens"] for row in figures["rows"]}
    assert seen["cd:flm"] == seen["nd:mlm"] == seen["ed:mlm"] == 4096
    assert seen["cd:flm -> nd:mlm"] == 1024
    assert all(Path(file).is_file() for file in outcome["files"])
    page = (tmp_path / "arch-objective" / "report.html").read_text()
    assert "from scratch" in page and "<svg" in page


def test_faults_of_a_run_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no cell 'nd:flm'"):
        system.run(system.config(cells=("nd:flm",), out=tmp_path))
    with pytest.raises(ConfigError, match="less than one step"):
        system.run(system.config(budget_tokens=100, out=tmp_path))
