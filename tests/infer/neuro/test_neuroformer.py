"""The user's class: training, resuming, decoding, files, and mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import neuro_recordings as rec
import numpy as np
import pytest
import torch

from polytask.data.spikes import Recording
from polytask.errors import CheckpointError, ConfigError, DataError, UserError
from polytask.infer.neuro import Neuroformer
from polytask.infer.neuro.neuroformer import agreement
from polytask.infer.neuro.training import WindowLoader


def same(a: Neuroformer, b: Neuroformer) -> bool:
    pairs = zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def test_training_lowers_the_loss_and_repeats_by_seed() -> None:
    neuro, again = rec.neuro(), rec.neuro()
    before = neuro.score("test")
    neuro.pretrain(steps=30, lr=1e-2)
    again.pretrain(steps=30, lr=1e-2)
    assert neuro.score("test")["id"] < before["id"] - 0.1
    assert same(neuro, again)
    assert not same(neuro, rec.neuro(seed=1).pretrain(steps=30, lr=1e-2))
    speed = neuro.model.heads["speed"].weight
    assert torch.equal(speed, rec.neuro().model.heads["speed"].weight)  # no loss, no change


def test_an_interrupted_pretraining_resumes_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = rec.neuro(dropout=0.1).pretrain(steps=70, validate=False)
    from polytask.train.trainer import Trainer

    update = Trainer._update

    def stop(self: Trainer, leg: Any) -> None:
        if self.step == 60:
            raise KeyboardInterrupt
        update(self, leg)

    torn = rec.neuro(dropout=0.1)
    monkeypatch.setattr(Trainer, "_update", stop)
    with pytest.raises(KeyboardInterrupt):
        torn.pretrain(steps=70, validate=False, folder=tmp_path / "run")
    monkeypatch.setattr(Trainer, "_update", update)
    resumed = rec.neuro(dropout=0.1)
    steps: list[int] = []

    def count(self: Trainer, leg: Any) -> None:
        steps.append(self.step)
        update(self, leg)

    monkeypatch.setattr(Trainer, "_update", count)
    resumed.pretrain(steps=70, validate=False, folder=tmp_path / "run")
    assert steps[0] == 50 and same(whole, resumed)


def test_every_window_comes_once_an_epoch() -> None:
    neuro = rec.neuro()
    rows = neuro.windows.train[:30]
    loader = WindowLoader(neuro.store, rows, 8, 0)
    starts = np.concatenate([loader.batch(i)[0].row.numpy() for i in range(15)])
    for epoch in range(4):
        part = starts[30 * epoch : 30 * (epoch + 1)]
        assert sorted(part) == sorted(neuro.windows.starts[rows])
    assert (starts[:30] != starts[30:60]).any()
    assert np.array_equal(loader.batch(7)[0].row.numpy(), starts[56:64])


def test_finetuning_the_head_leaves_the_rest_alone() -> None:
    neuro = rec.neuro().pretrain(steps=5)
    before = {n: p.clone() for n, p in neuro.model.named_parameters()}
    neuro.finetune("speed", fraction=0.5, train="head", steps=5)
    changed = {n for n, p in neuro.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"heads.speed.weight", "heads.speed.bias"}
    assert all(p.requires_grad for p in neuro.model.parameters())
    neuro.finetune("state", fraction=0.5, steps=2)
    assert not torch.equal(neuro.model.table.weight, before["table.weight"])
    assert [h["stage"] for h in neuro.history] == ["pretrain", "finetune", "finetune"]
    assert neuro.history[1]["windows"] == round(0.5 * len(neuro.windows.train))


def test_decoding_is_in_the_recordings_units() -> None:
    neuro = rec.neuro()
    neuro.finetune("speed", "state", fraction=1.0, steps=80, lr=1e-2)
    speed, state = neuro.decode("speed"), neuro.decode("state")
    assert speed.r > 0.3 and abs(float(speed.value.mean()) - 10) < 2
    last = neuro.recording.samples_before(speed.start + 5) - 1
    assert np.allclose(speed.truth, neuro.recording.behavior["speed"][last], atol=1e-4)
    assert state.accuracy > 0.6 and set(np.unique(state.value)) <= {0, 1}


def test_agreement() -> None:
    r, r2 = agreement(np.array([1.0, 2.0, 4.0]), np.array([1.0, 2.0, 3.0]))
    assert r == pytest.approx(np.corrcoef([1, 2, 4], [1, 2, 3])[0, 1])
    assert r2 == pytest.approx(0.5)
    assert agreement(np.ones(3), np.array([1.0, 2.0, 3.0]))[0] == 0
    assert np.isnan(agreement(np.ones(3), np.ones(3))[0])


def test_all_modalities_train_align_embed_and_attribute() -> None:
    neuro = rec.neuro(**rec.EVERYTHING)
    neuro.pretrain(steps=6, lr=3e-3, losses=("id", "time", "align", "speed"))
    found = neuro.embed("test")
    rows = len(neuro.windows.test)
    assert {n: v.shape for n, v in found.items()} == dict.fromkeys(
        ("spikes", "video", "pupil"), (rows, 16)
    )
    assert np.allclose(np.linalg.norm(found["spikes"], axis=1), 1, atol=1e-4)
    assert neuro.attribution("test").shape == (4, 6, 6)
    assert set(rec.neuro().embed("val")) == {"spikes"}


def test_saving_and_loading(tmp_path: Path) -> None:
    neuro = rec.neuro(**rec.EVERYTHING).pretrain(steps=3)
    folder = neuro.save(tmp_path / "model")
    again = Neuroformer.load(folder, rec.recording(), device="cpu")
    assert same(neuro, again) and again.history == neuro.history
    assert again.settings == neuro.settings
    assert np.array_equal(again.decode("speed").value, neuro.decode("speed").value)
    assert np.array_equal(again.generate(horizon=3).ids, neuro.generate(horizon=3).ids)
    with pytest.raises(CheckpointError, match=r"6 units .* 4 in bins"):
        Neuroformer.load(folder, rec.recording(units=4))
    (folder / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="damaged"):
        Neuroformer.load(folder, rec.recording())


def test_a_recording_without_a_single_spike_in_a_window_works() -> None:
    counts = np.zeros((3, 1000), int)
    counts[0, ::50] = 1
    neuro = Neuroformer(Recording.from_arrays(counts, 0.01), dim=8, heads=1, dropout=0.0)
    neuro.pretrain(steps=3)
    assert np.isfinite(neuro.score()["loss"])
    assert neuro.generate(true_past=True).ids.shape[2] == 101
    assert np.isfinite(neuro.connectivity("ablation").mean).all()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"targets": {"sped": "regression"}}, "no behaviour 'sped'.*Did you mean 'speed'"),
        ({"inputs": {"a": ("speed",)}}, "both an input and a target|given away"),
        ({"targets": {"state": "regression"}}, "holds labels"),
        ({"targets": {"speed": "classification"}}, "holds numbers"),
        ({"align": ("spikes", "video")}, "no modality"),
        ({"dim": 15}, "multiple of heads"),
        ({"blok": 3}, "Did you mean 'block'"),
        ({"window": 0.013}, "whole number of bins"),
        ({"block": 4, "prev_block": 4}, "find no room"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises((ConfigError, DataError), match=said):
        rec.neuro(**changes)


def test_mistakes_of_use_are_named() -> None:
    neuro = rec.neuro()
    with pytest.raises(UserError, match=r"'sped' is no loss here. Did you mean 'speed'"):
        neuro.finetune("sped")
    with pytest.raises(UserError, match="neither 'head' nor 'all'"):
        neuro.finetune("speed", train="heads")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no target 'pupil'"):
        neuro.decode("pupil")
    with pytest.raises(UserError, match="no term 'tim'"):
        neuro.pretrain(steps=1, losses=("tim",))
    with pytest.raises(UserError, match="no target; give"):
        rec.neuro(targets={}).finetune()
    with pytest.raises(UserError, match="at least 2 windows"):
        rec.neuro(**rec.EVERYTHING).pretrain(steps=1, batch_size=1)
    with pytest.raises(ConfigError, match="not both"):
        Neuroformer(rec.recording(), neuro.settings, dim=8)
