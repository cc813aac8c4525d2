"""System 01: claims, arms that differ in what they say, controls, tuning, the command."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from polytask import systems
from polytask.cli import main
from polytask.data.spikes import Recording
from polytask.study import Budget
from polytask.systems.neuro_run import NeuroRunConfig, _settings, _targets, _with_file
from polytask.systems.testbeds import neuro_models as bed
from polytask.systems.testbeds import neuro_scores as scores

module = import_module("polytask.systems.01_neuroformer")
system = systems.load("neuroformer")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bed, "cache_root", lambda: tmp_path_factory.getbasetemp() / "neuro")


def test_claims_are_the_sheets_pass_lines() -> None:
    found = {(c.better, c.than, c.metric, c.margin, c.kind) for c in system.claims}
    assert found == {
        ("neuroformer", "transposed", "auroc", 0.2, "claim"),
        ("neuroformer", "permuted", "auroc", 0.3, "claim"),
        ("neuroformer", "shuffled past", "auroc", 0.0, "ablation"),
        ("neuroformer", "untrained", "auroc", 0.0, "ablation"),
        ("neuroformer", "no past", "id_ce", 0.0, "ablation"),
        ("pretrained", "scratch", "speed_r", 0.0, "claim"),
        ("pretrained", "shuffled labels", "speed_r", 0.0, "ablation"),
        ("neuroformer", "poisson", "f1", 0.0, "claim"),
        ("neuroformer", "poisson", "cell_r", 0.0, "claim"),
    }


def test_every_claimed_metric_is_measured_and_budgets_agree() -> None:
    arms, results = system.arms("smoke"), {}
    for claim in system.claims:
        for name in (claim.better, claim.than):
            if name not in results:
                results[name] = arms[name].run(3, Budget(steps=2))
            assert results[name].metrics[claim.metric] is not None, (name, claim.metric)
        spent = [results[n].spent.measured() for n in (claim.better, claim.than)]
        assert claim.equal is not None
        assert all(spent[0][quantity] == spent[1][quantity] for quantity in claim.equal)
    again = arms["pretrained"].run(3, Budget(steps=2))
    assert again.metrics == results["pretrained"].metrics
    assert again.metrics["speed_r"] != results["scratch"].metrics["speed_r"]
    own = results["neuroformer"].metrics
    assert results["transposed"].metrics["auroc"] == own["auroc transposed"]


def test_controls_take_away_what_they_say() -> None:
    neuro = bed.fresh("spikes", bed.SMOKE, 0)
    rows = neuro.windows.train[:40]
    plain = neuro.store.batch(rows)
    strange = bed.ChangedStore(neuro, bed.strangers).batch(rows)
    assert torch.equal(strange.ids, plain.ids)
    width = min(plain.past_ids.shape[1], strange.past_ids.shape[1])
    assert not torch.equal(strange.past_ids[:, :width], plain.past_ids[:, :width])
    renamed = bed.ChangedStore(neuro, bed.renamed).batch(rows)
    n = neuro.recording.n_units
    assert torch.equal(renamed.times, plain.times)
    assert torch.equal(renamed.ids[plain.ids >= n], plain.ids[plain.ids >= n])
    for row in range(10):
        names: dict[int, set[int]] = {}
        for old, new in ((plain.ids, renamed.ids), (plain.past_ids, renamed.past_ids)):
            for a, b in zip(old[row].tolist(), new[row].tolist()):
                names.setdefault(a, set()).add(b)
        assert all(len(found) == 1 for found in names.values())  # one renaming per window
    assert not torch.equal(renamed.ids, plain.ids)


def test_variants_differ_in_modalities_and_losses() -> None:
    models = {name: bed.fresh(name, bed.SMOKE, 0).model for name in bed.VARIANTS}
    assert len(models["no-past"].stack.cross["past"]) == 0
    assert models["past"].video is None and models["+stimulus"].video is not None
    assert not models["+stimulus"].config.groups
    assert models["+behaviour"].config.variables == ("speed",)
    assert models["+alignment"].config.align == ("spikes", "video", "speed")
    shared = dict(models["spikes"].named_parameters())
    for name, parameter in models["joint"].named_parameters():
        assert torch.equal(parameter, shared[name])


def test_a_model_of_the_cache_is_the_one_that_was_trained() -> None:
    first = bed.trained("spikes", bed.SMOKE, 5, 1e-3)
    again = bed.trained("spikes", bed.SMOKE, 5, 1e-3)
    for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert bed._key("spikes", bed.SMOKE, 5, 1e-3) != bed._key("spikes", bed.SMOKE, 5, 2e-3)
    assert bed._key("spikes", bed.SMOKE, 5, 1e-3) != bed._key("joint", bed.SMOKE, 5, 1e-3)


def test_the_permuted_control_is_near_chance_for_any_readout() -> None:
    class Readout:
        mean = np.random.default_rng(0).random((30, 30))

    circuit = bed.population("spikes", bed.SMOKE, 0)
    neuro = bed.fresh("spikes", bed.SMOKE, 0)
    neuro.connectivity = lambda *_: Readout  # type: ignore[assignment, return-value, method-assign]
    found = scores.permuted(neuro, circuit, 0)["auroc"]
    assert found == pytest.approx(0.5, abs=0.06)


def test_tuning_gives_every_learning_arm_the_same_grid() -> None:
    record = system.tuning
    assert set(record.points) == set(module.TUNED) and record.seeds == [1000]
    for name, points in record.points.items():
        assert {p.params["lr"] for p in points} == set(module.LRS)
        own = [len(values) for values in module.OWN.get(name, {}).values()]
        assert len(points) == 3 * int(np.prod(own, dtype=int))
    arms = system.arms("full")
    assert arms["shuffled past"].run.lr == record.chosen["neuroformer"]["lr"]
    assert arms["scratch"].run.lr == record.chosen["scratch"]["lr"]


def recording(tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    counts = (draw.random((5, 2000)) < 0.05).astype(int)
    run = np.sin(np.arange(400) / 6)
    found = Recording.from_arrays(
        counts,
        0.01,
        frames=draw.normal(size=(400, 8, 8)).astype(np.float32),
        frame_rate=20.0,
        behavior={"speed": run, "state": np.where(run > 0, "run", "rest")},
        dt_b=0.05,
    )
    return found.save(tmp_path / "mouse.npz")


def test_settings_follow_the_recording_and_the_file(tmp_path: Path) -> None:
    recording(tmp_path)
    path = tmp_path / "my.yaml"
    path.write_text("data: mouse.npz\ntarget: [speed, state]\nsteps: 7\nmodel: {dim: 16}\n")
    config = _with_file(NeuroRunConfig(config=path, steps=3))
    assert config.steps == 3 and config.data == tmp_path / "mouse.npz"
    found = Recording.from_file(config.data)
    targets = _targets(config, found)
    assert targets == {"speed": "regression", "state": "classification"}
    settings = _settings(config, found, targets)
    assert settings.dim == 16 and settings.frame_window == pytest.approx(0.15)
    assert settings.kernel == (3, 2, 2) and settings.prev_window == 0.1
    still = _settings(config.model_copy(update={"stimulus": False}), found, targets)
    assert still.frame_window == 0


@pytest.mark.slow
def test_the_command_on_a_recording(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recording(tmp_path)
    given = ["run", "neuroformer", "--data", str(path), "--out", str(tmp_path / "runs"),
             "--target", "speed,state", "--steps", "4", "--finetune-steps", "2", "--trials", "1",
             "--set", "model={dim: 16, block: 20, prev_block: 20}"]  # fmt: skip
    assert main(given) == 0
    folder = tmp_path / "runs" / "neuroformer-mouse"
    figures = json.loads((folder / "figures.json").read_text())
    assert set(figures["decode state"]) == {"accuracy"} and "edges" not in figures
    for name in (
        "report.html",
        "connectivity.npz",
        "generated.npz",
        "raster.png",
        "loss.png",
        "attribution.png",
        "model/model.safetensors",
        "decoder-speed/model.safetensors",
    ):
        assert (folder / name).is_file(), name  # fmt: skip
    for wrong, hint in (
        (["--target", "sped"], "Did you mean 'speed'"),
        (["--read", "{frame: 1}"], "Did you mean 'frames'"),
        (["--stepps", "3"], "Did you mean 'steps'"),
    ):
        assert main([*given[:6], *wrong]) == 2
        assert hint in capsys.readouterr().err
