"""Checkpoints: whole or refused, with the reason; never a silent fresh part."""

import json
import resource
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from train_fakes import TinyModel, loader_of

from polytask.errors import CheckpointError, DataError, UserError
from polytask.train import checkpoints, snapshot
from polytask.train.checkpoints import Checkpoint
from polytask.train.config import TrainConfig
from polytask.train.trackers import read_lines
from polytask.train.trainer import Trainer


def some(step: int, size: int = 4) -> Checkpoint:
    tensors = {"model": {"w": torch.full((size,), float(step))}, "rest": {"r": torch.arange(3)}}
    return Checkpoint(step, tensors, {"a": [1, None], "b": 0.1}, {"train": {"lr": 0.1}})


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    folder = checkpoints.save(tmp_path, some(7), keep=2)
    found = checkpoints.load(folder)
    assert (found.step, found.state, found.config) == (7, some(7).state, some(7).config)
    assert torch.equal(found.tensors["model"]["w"], some(7).tensors["model"]["w"])
    assert found.tensors["rest"]["r"].dtype == torch.int64


def test_older_ones_go_after_the_new_one_is_complete(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        checkpoints.save(tmp_path, some(step), keep=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000003",
        "step-00000010",
    ]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "no manifest", "bad manifest"])
def test_the_newest_valid_one_wins_and_the_refused_are_named(tmp_path: Path, damage: str) -> None:
    checkpoints.save(tmp_path, some(1), keep=5)
    newest = checkpoints.save(tmp_path, some(2, size=100), keep=5)
    part = newest / "model.safetensors"
    if damage == "flip":
        raw = bytearray(part.read_bytes())
        raw[-20] ^= 1
        part.write_bytes(raw)
    elif damage == "truncate":
        part.write_bytes(part.read_bytes()[:-1])
    elif damage == "remove":
        part.unlink()
    elif damage == "no manifest":
        (newest / "manifest.json").unlink()
    else:
        (newest / "manifest.json").write_text("{")
    found, refused = checkpoints.load_newest(tmp_path)
    assert found is not None
    assert found.step == 1
    assert len(refused) == 1
    assert "step-00000002" in refused[0]
    with pytest.raises(CheckpointError, match="step-00000002"):
        checkpoints.load(newest)


def test_no_valid_checkpoint_is_an_error_and_none_at_all_is_not(tmp_path: Path) -> None:
    assert checkpoints.load_newest(tmp_path) == (None, [])
    folder = checkpoints.save(tmp_path, some(1), keep=1)
    (folder / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"none is valid: .*state.json is missing"):
        checkpoints.load_newest(tmp_path)


def test_tied_weights_are_written_once_and_come_back_twice(tmp_path: Path) -> None:
    shared = torch.randn(1000)
    bare, _ = checkpoints.write_tensors(tmp_path / "a.safetensors", {"x": shared, "y": shared})
    assert bare == {"y": "x"}
    assert (tmp_path / "a.safetensors").stat().st_size < 4500
    found = checkpoints.read_tensors(tmp_path / "a.safetensors", bare)
    assert torch.equal(found["y"], shared)


def test_views_of_a_bigger_tensor_are_written_alone(tmp_path: Path) -> None:
    big = torch.randn(100, 10)
    tensors = {"row": big[3], "column": big[:, 2], "transposed": big.T}
    aliases, _ = checkpoints.write_tensors(tmp_path / "a.safetensors", tensors)
    found = checkpoints.read_tensors(tmp_path / "a.safetensors", aliases)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_matrix_and_its_transpose_in_the_same_memory_are_two_tensors(tmp_path: Path) -> None:
    square = torch.randn(5, 5)
    tensors = {"a": square, "b": square.T, "bits": square.view(torch.int32)}
    aliases, _ = checkpoints.write_tensors(tmp_path / "a.safetensors", tensors)
    found = checkpoints.read_tensors(tmp_path / "a.safetensors", aliases)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_another_configuration_is_refused_and_the_keys_named() -> None:
    with pytest.raises(CheckpointError, match=r"train.lr \(checkpoint: 0.1, now: 0.2\)") as error:
        checkpoints.refuse_other_config(
            {"train": {"lr": 0.1, "keep": 1, "x": [1]}, "tasks": ["a"]},
            {"train": {"lr": 0.2, "keep": 9, "x": (1,)}, "tasks": ["a", "b"]},
            Path("run"),
            frozenset({"keep"}),
        )
    assert "tasks" in str(error.value)
    assert "keep" not in str(error.value)
    assert "train.x" not in str(error.value)


def test_model_parts_that_do_not_fit_are_named() -> None:
    model = TinyModel()
    tensors = snapshot.pack_model(model)
    fewer = {n: t for n, t in tensors.items() if n != "trunk.0.bias"}
    with pytest.raises(CheckpointError, match=r"'trunk.0.bias' is missing \(1 in all\)"):
        snapshot.unpack_model(model, fewer, "here")
    more = {**tensors, "trunk.0.bais": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"Did you mean 'trunk\.0\.bias'"):
        snapshot.unpack_model(model, more, "here")
    other = {**tensors, "trunk.0.bias": torch.zeros(9)}
    with pytest.raises(CheckpointError, match=r"is float32 \[9\], expected float32 \[8\]"):
        snapshot.unpack_model(model, other, "here")


def test_optimiser_state_comes_back_bit_for_bit_or_is_refused() -> None:
    def trained(model: TinyModel) -> torch.optim.AdamW:
        return torch.optim.AdamW(model.parameters(), fused=True)

    model = TinyModel()
    optimizer = trained(model)
    sum((p**2).sum() for p in model.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    names = {id(p): n for n, p in model.named_parameters()}
    packed = snapshot.pack_optimizer(optimizer, names)
    assert len(packed) == 3 * 10
    fresh = trained(model)
    snapshot.unpack_optimizer(fresh, names, packed, "here")
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            assert torch.equal(fresh.state[parameter][key], value)
    with pytest.raises(CheckpointError, match="'gone', which does not train"):
        snapshot.unpack_optimizer(fresh, names, {"gone/step": torch.zeros(())}, "here")


def test_generators_continue_where_they_were() -> None:
    import random

    import numpy as np

    def draw() -> tuple[Any, ...]:
        return (
            torch.rand(3).tolist(),
            np.random.randn(3).tolist(),  # noqa: NPY002
            random.gauss(0, 1),
        )

    draw()
    tensors, plain = snapshot.pack_random(torch.device("cpu"))
    plain = json.loads(json.dumps(plain))
    expected = draw()
    draw()
    snapshot.unpack_random(torch.device("cpu"), tensors, plain)
    assert draw() == expected


# The trainer and its folder -------------------------------------------------------------------


def train(folder: Path, **settings: object) -> tuple[Trainer, Any]:
    config = TrainConfig(
        **{"steps": 12, "batch_size": 8, "checkpoint_every": 4, **settings}  # type: ignore[arg-type]
    )
    trainer = Trainer(TinyModel(), loader_of(8), config, folder)
    return trainer, trainer.fit()


def test_a_damaged_newest_checkpoint_is_told_and_the_older_one_used(tmp_path: Path) -> None:
    first, _ = train(tmp_path)
    part = checkpoints.folder_of(tmp_path, 12) / "optimizer.safetensors"
    part.write_bytes(part.read_bytes()[:-9])
    second, result = train(tmp_path)
    assert result.resumed_from == 8
    for a, b in zip(first.model.parameters(), second.model.parameters()):
        assert torch.equal(a, b)
    event = next(x for x in read_lines(tmp_path / "metrics.jsonl") if x.get("event") == "resumed")
    assert event["step"] == 8
    assert "optimizer.safetensors is damaged" in event["refused"][0]


def test_a_missing_optimiser_never_means_a_fresh_one(tmp_path: Path) -> None:
    train(tmp_path, keep=1)
    (checkpoints.folder_of(tmp_path, 12) / "optimizer.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors is missing"):
        train(tmp_path, keep=1)


def test_a_run_of_another_configuration_is_refused_and_untouched(tmp_path: Path) -> None:
    train(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=r"train.lr \(checkpoint: 0.001, now: 0.5\)"):
        train(tmp_path, lr=0.5)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    train(tmp_path, keep=1, checkpoint_every=3)  # what changes no update may change


def test_a_run_folder_in_use_is_refused(tmp_path: Path) -> None:
    def again(trainer: Trainer, step: int) -> None:
        with pytest.raises(UserError, match="in use by another process"):
            train(tmp_path)

    config = TrainConfig(steps=1, batch_size=8)
    Trainer(TinyModel(), loader_of(8), config, tmp_path, callbacks=[again]).fit()


def test_leftovers_of_killed_saves_are_cleared(tmp_path: Path) -> None:
    train(tmp_path)
    for suffix in ("tmp", "old"):
        left = tmp_path / "checkpoints" / f".step-00000004.1234.{suffix}"
        left.mkdir()
        (left / "model.safetensors").write_bytes(b"half")
    train(tmp_path)
    assert all(p.name.startswith("step-") for p in (tmp_path / "checkpoints").iterdir())


def full_disk_run(folder: Path) -> None:
    """A run whose second checkpoint does not fit."""

    def grow(trainer: Trainer, step: int) -> None:
        if step == 6:
            trainer.loader.state = lambda: {"big": "x" * 4_000_000}  # type: ignore[method-assign]

    config = TrainConfig(steps=12, batch_size=8, checkpoint_every=4, log_every=1)
    Trainer(TinyModel(), loader_of(8), config, folder, callbacks=[grow]).fit()


def check_after_full_disk(folder: Path) -> None:
    found, refused = checkpoints.load_newest(folder)
    assert found is not None
    assert found.step == 4
    assert refused == []
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-00000004"]
    steps = [x["step"] for x in read_lines(folder / "metrics.jsonl") if x["kind"] == "train"]
    assert steps == list(range(1, 9))


def test_a_file_size_limit_gives_a_clean_error_and_keeps_the_last_checkpoint(
    tmp_path: Path,
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(DataError, match=r"cannot write .*step-00000008.*Nothing half-written"):
            full_disk_run(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    check_after_full_disk(tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A tmpfs of 2 MB; skips by name where mounting is not allowed."""
    mount = tmp_path / "disk"
    mount.mkdir()
    made = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(mount)], capture_output=True
    )
    if not made or made.returncode:
        pytest.skip("mounting a tmpfs needs privileges")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_full_disk_gives_a_clean_error_and_keeps_the_last_checkpoint(small_disk: Path) -> None:
    with pytest.raises(DataError, match="no space left on the device"):
        full_disk_run(small_disk / "run")
    check_after_full_disk(small_disk / "run")


def test_a_full_disk_while_writing_tensors_is_told_apart(small_disk: Path) -> None:
    tensors: dict[str, dict[str, Tensor]] = {"model": {"w": torch.zeros(1_000_000)}}
    with pytest.raises(DataError, match="no space left on the device"):
        checkpoints.save(small_disk, Checkpoint(1, tensors, {}, {}), keep=1)
    assert list((small_disk / "checkpoints").iterdir()) == []
