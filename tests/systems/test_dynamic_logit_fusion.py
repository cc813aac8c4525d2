"""System 37: what it claims, what its arms do, its texts and models; its run on users' models."""

from __future__ import annotations

import json
import math
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from polytask import systems
from polytask.cli import main
from polytask.systems.testbeds import domain_models as bed
from polytask.systems.testbeds import domain_scores as scores
from polytask.systems.testbeds import domains as text

module = import_module("polytask.systems.37_dynamic_logit_fusion")
system = systems.load("37")


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    """Models are trained for the tests, never taken from the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLYTASK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def test_claims_are_the_sheets_pass_lines() -> None:
    found = {(c.better, c.than, c.metric, c.kind, c.higher_is_better) for c in system.claims}
    single = {
        ("dynamic", rival, f"bits {d}", "claim", False)
        for d in ("cython", "cmake", "fonts")
        for rival in ("large", "expert")
    }
    switching = {
        ("dynamic", rival, "bits switching new", "claim", False)
        for rival in ("large", "static", "static-average")
    }
    cut = {
        ("dynamic", rival, "bits new", "ablation", False)
        for rival in ("swapped-pairing", "running-minimum", "once-per-prompt")
    }
    assert found == single | switching | cut


def test_characters_come_back_and_strangers_are_marked() -> None:
    assert text.decode(text.encode("a = {1}\n\tb")) == "a = {1}\n    b"
    assert text.decode(text.encode("naïve €")) == "na?ve ?"
    assert len(text.TOKENS) == 97 and text.encode("~\n").max() < 97


@pytest.mark.parametrize("domain", text.DOMAINS)
def test_parts_of_a_domain_share_no_long_passage(domain: str) -> None:
    """Windows of 400 characters of test and valid do not occur in train."""
    parts = {name: ids.tobytes() for name, ids in text.corpus(domain).items()}
    assert all(len(part) > 8_000 for part in parts.values())
    for name in ("valid", "test"):
        for window in text.documents(domain, name, 300, 400, 3):
            assert window.tobytes() in parts[name]
            assert window.tobytes() not in parts["train"]


def test_switching_documents_are_made_of_pieces_in_the_order_told() -> None:
    drawn = text.switching("valid", 6, 250, 100, seed=5)
    order = text.order_of(6, 3, "valid", 5)
    assert drawn.shape == (6, 250) and (np.diff(order, axis=1) != 0).all()
    assert set(order.ravel()) == {0, 1, 2}
    for row, domains in zip(drawn, order, strict=True):
        for k, domain in enumerate(domains):
            piece = row[100 * k : 100 * (k + 1)].tobytes()
            assert piece in text.corpus(text.DOMAINS[domain])["valid"].tobytes()
    assert np.array_equal(drawn, text.switching("valid", 6, 250, 100, seed=5))
    assert not np.array_equal(drawn, text.switching("valid", 6, 250, 100, seed=6))


def test_a_family_is_trained_once_and_its_experts_start_at_the_base() -> None:
    family = bed.family(7, bed.SMOKE)
    again = bed.family(7, bed.SMOKE)
    for a, b in zip(family.models, again.models, strict=True):
        for x, y in zip(a.parameters(), b.parameters(), strict=True):
            assert torch.equal(x, y)
    large, base, *experts = family.models
    assert sum(p.numel() for p in large.parameters()) > sum(p.numel() for p in base.parameters())
    start = bed.character_model(bed.SMOKE, large=False, seed=7)

    def distance(one) -> float:
        with torch.no_grad():
            pairs = zip(one.parameters(), base.parameters(), strict=True)
            return sum(float((p - q).norm()) for p, q in pairs)

    moved, fresh = [distance(expert) for expert in experts], distance(start)
    assert all(0 < m < fresh for m in moved)


def test_logits_of_windows_are_those_of_the_model_itself() -> None:
    family = bed.family(7, bed.SMOKE)
    ids = text.documents("cpp", "valid", 2, 160, 1)
    found = family.logits(ids, range(8))
    half = bed.SMOKE.context // 2
    for source, logits in zip(family.sources, found.values(), strict=True):
        assert logits.shape == (2, 159, 97)
        for place in (0, 40, 2 * half - 1, 2 * half, 130, 158):
            # The window that scores this place begins at the last start that leaves half a context.
            begin = max(0, (place + 1 - 1) // half - 1) * half if place >= 2 * half else 0
            seen = torch.from_numpy(ids[:, begin : place + 1]).long()
            bare, _ = source.forward(seen)
            assert torch.allclose(bare, logits[:, place], atol=1e-5)
    with pytest.raises(ValueError, match="multiple"):
        family.logits(ids[:, :100], [0])


def test_arms_do_what_their_names_say() -> None:
    test, valid = scores.texts(7, "test", True), scores.texts(7, "valid", True)
    found = {name: module.Trial(name, True)(7, system.budget("smoke")) for name in module.NAMES}
    for result in found.values():
        assert result.spent.tokens == 20 * (scores.LENGTH // 2 - scores.PROMPT)
        for kind, names in scores.TEXTS.items():
            parts = [result.metrics[f"bits {name}"] for name in names]
            assert result.metrics[f"bits {kind}"] == pytest.approx(sum(parts) / 4)
    cpp = text.DOMAINS.index("cpp")
    assert test.static("cpp", [cpp], (0.0,)) == pytest.approx(found["large"].metrics["bits cpp"])
    assert test.static("cpp", [cpp], (1.0,)) == pytest.approx(found["proxy"].metrics["bits cpp"])
    assert test.static("switching new", [3, 4, 5], (1 / 3,) * 3) == pytest.approx(
        found["proxy"].metrics["bits switching new"]
    )
    # The expert of fonts by hand, from its own softmax.
    logits = test.logits["fonts"][bed.NAMES.index("fonts")][:, scores.PROMPT - 1 :]
    nll = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), test.ids["fonts"][:, scores.PROMPT :].flatten()
    )
    expected = pytest.approx(float(nll) / math.log(2), rel=1e-5)
    assert found["expert"].metrics["bits fonts"] == expected
    grid = (0.0, 1.0, 2.0)
    own = min(grid, key=lambda a: valid.static("cpp", [cpp], (a,)))
    assert found["static-own"].notes["cpp alpha"] == [own]
    others = min(
        grid, key=lambda a: valid.static("manual", [0], (a,)) + valid.static("python", [1], (a,))
    )
    assert found["static"].notes["cpp alpha"] == [others]
    for kind in scores.SETS:
        assert 0 <= found["dynamic"].notes[f"right expert, {kind}"] <= 1


def test_right_counts_steps_with_the_expert_of_the_place() -> None:
    order = text.order_of(2, 4, "test", 9, text.NEW)
    domain = torch.from_numpy(order).repeat_interleave(200, 1)[:, 40:640].flatten()
    alpha = torch.nn.functional.one_hot(domain, 3).float()
    assert scores.right_expert(alpha, 9, (2, 640), "new") == 1
    assert scores.right_expert(alpha.roll(1, 1), 9, (2, 640), "new") == 0
    alpha[::2] = 0
    assert scores.right_expert(alpha, 9, (2, 640), "new") == 1


def test_run_folders_mix_with_the_hub_model_they_were_trained_from(tmp_path: Path) -> None:
    import sys

    sys.path.insert(0, str(Path(__file__).parents[1] / "infer"))
    from fusion_models import llama, write

    from polytask.errors import ConfigError
    from polytask.pipeline import load_run, parse_config, train
    from polytask.systems.fusion_run import FusionRunConfig, fusion_run, load_sources

    hub = write(tmp_path / "small", llama(1))
    rows = "".join(f"a line of text number {i},{i % 2}\n" for i in range(40))
    (tmp_path / "lines.csv").write_text("body,label\n" + rows)
    task = {"data": "lines.csv", "schema": "language_model", "inputs": {"text": "body"}}
    config: dict = {
        "tasks": {"lines": task},
        "model": {"hub": hub},
        "train": {"steps": 2, "progress": False, "batch_size": 4, "device": "cpu"},
        "evaluate": {"single_task": False},
    }
    train(parse_config(config), tmp_path / "expert", base=tmp_path, say=lambda text: None)
    places = [write(tmp_path / "large", llama(0)), hub, str(tmp_path / "expert")]
    source = load_sources(places)[2]
    ids = torch.tensor([[5, 90, 17, 33]])
    own = load_run(tmp_path / "expert").model.trunk.model.eval()(input_ids=ids).logits
    assert torch.allclose(source.forward(ids, last=False)[0], own, atol=1e-5)
    given = {"large": places[0], "base": hub, "experts": (places[2],), "prompt": "a line"}
    found = fusion_run(FusionRunConfig(**given, out=tmp_path, max_new=4), lambda text: None)
    assert found.figures["tokens"] > 0
    # A run that only classifies cannot continue a text.
    config["tasks"] = {
        "label": {"data": "lines.csv", "inputs": {"text": "body"}, "target": "label"},
    }
    config["model"] = {"dim": 16, "layers": 1}
    train(parse_config(config), tmp_path / "classes", base=tmp_path, say=lambda text: None)
    with pytest.raises(ConfigError, match="no language_model task"):
        load_sources([places[0], hub, str(tmp_path / "classes")])


def test_run_on_folders_of_hugging_face_models(tmp_path: Path, capsys) -> None:
    import sys

    sys.path.insert(0, str(Path(__file__).parents[1] / "infer"))
    from fusion_models import llama, write

    places = [write(tmp_path / f"m{i}", llama(i)) for i in range(4)]
    prompts = tmp_path / "two.jsonl"
    prompts.write_text('{"prompt": "first"}\n\n{"text": "the second"}\n')
    given = ["--data", str(prompts), "--large", places[0], "--base", places[1]]
    given += ["--experts", f"{places[2]},{places[3]}", "--max-new", "5", "--grid", "0:1:.5"]
    code = main(["run", "37", *given, "--out", str(tmp_path / "runs"), "--json"])
    out = json.loads(capsys.readouterr().out)
    assert code == 0
    results = out["figures"]["results"]
    assert [one["prompt"] for one in results] == ["first", "the second"]
    assert all(t["alpha"] in (0.0, 0.5, 1.0) for one in results for t in one["tokens"])
    assert all(Path(path).is_file() for path in out["files"])
