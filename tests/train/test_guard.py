"""A non-finite loss or gradient stops before the update and names step, task, term and rows."""

from pathlib import Path

import pytest
import torch
from train_fakes import TASKS, TinyModel, loader_of, make_batch, rows_of

from polytask.errors import NonFiniteError
from polytask.models.batch import Batch
from polytask.train.config import TrainConfig
from polytask.train.guard import Guard
from polytask.train.loader import FunctionLoader
from polytask.train.trackers import read_lines
from polytask.train.trainer import Trainer


def poisoned(bad_steps: dict[int, float], batch_size: int = 8) -> FunctionLoader:
    """Row 3 of the batch has this label in these steps."""

    def function(index: int) -> Batch:
        batch = rows_of(index * batch_size, batch_size)
        if index in bad_steps:
            y = batch.targets["regress"].value.clone()
            y[3] = bad_steps[index]
            batch = make_batch(batch.fields["features.values"], y, batch.task, batch.row)
        return batch

    return FunctionLoader(TASKS, function)


def culprit_of(step: int) -> tuple[str, int]:
    batch = rows_of(step * 8, 8)
    return TASKS[int(batch.task[3])], int(batch.row[3])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_label_stops_before_the_update_and_is_named(tmp_path: Path, value: float) -> None:
    model = TinyModel()
    before: list[torch.Tensor] = []

    def keep(trainer: Trainer, step: int) -> None:
        before[:] = [p.detach().clone() for p in model.parameters()]

    config = TrainConfig(steps=10, batch_size=8, log_every=100)
    trainer = Trainer(model, poisoned({4: value}), config, tmp_path, callbacks=[keep])
    task, row = culprit_of(4)
    with pytest.raises(
        NonFiniteError, match=f"step 5: not finite: loss of task '{task}', term 'mse', rows {row}"
    ):
        trainer.fit()
    for parameter, kept in zip(model.parameters(), before):
        assert torch.equal(parameter, kept)
    event = read_lines(tmp_path / "metrics.jsonl")[-1]
    assert (event["event"], event["step"]) == ("non_finite", 5)
    assert event["culprits"] == [
        {"what": "loss", "task": task, "term": "mse", "rows": [row], "row_count": 1}
    ]


def test_a_finite_loss_with_an_infinite_gradient_is_named(tmp_path: Path) -> None:
    class Root(TinyModel):
        """sqrt has an infinite slope at 0: for one row the prediction is multiplied by 0."""

        def terms(self, batch: Batch):  # type: ignore[no-untyped-def]
            found = super().terms(batch)
            zero = (found.row["mse"] != 19).float()
            found.value["mse"] = (found.value["mse"] * zero).sqrt()
            return found

    trainer = Trainer(Root(), loader_of(8), TrainConfig(steps=5, batch_size=8), tmp_path)
    task = TASKS[int(rows_of(19, 1).task[0])]
    with pytest.raises(NonFiniteError, match=f"step 3: .*gradient of task '{task}'.*rows 19"):
        trainer.fit()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_skipping_is_capped_counted_and_logged(tmp_path: Path) -> None:
    nan = float("nan")
    config = TrainConfig(steps=12, batch_size=8, max_skipped=2)
    result = Trainer(TinyModel(), poisoned({2: nan, 5: nan}), config, tmp_path / "two").fit()
    assert (result.step, result.skipped) == (12, 2)
    lines = read_lines(tmp_path / "two" / "metrics.jsonl")
    assert [x["step"] for x in lines if x.get("event") == "non_finite"] == [3, 6]
    assert all(x["loss"] > 0 for x in lines if x["kind"] == "train")
    with pytest.raises(NonFiniteError, match=r"step 9 \(after 2 skipped steps\)"):
        Trainer(TinyModel(), poisoned({2: nan, 5: nan, 8: nan}), config, tmp_path / "three").fit()


def test_skipping_equals_leaving_the_step_out(tmp_path: Path) -> None:
    config = TrainConfig(steps=6, batch_size=8, max_skipped=1, schedule="constant", warmup=0)
    model = TinyModel()
    Trainer(model, poisoned({5: float("nan")}), config, tmp_path / "a").fit()
    shorter = TinyModel()
    Trainer(shorter, poisoned({}), config.model_copy(update={"steps": 5}), tmp_path / "b").fit()
    for a, b in zip(model.parameters(), shorter.parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("max_skipped", [0, 1])
def test_the_device_side_guard_gives_the_same_weights_as_the_direct_one(
    tmp_path: Path, max_skipped: int
) -> None:
    """What runs on an accelerator, here on the CPU: the fused optimiser skips on a flag."""
    found = {}
    for direct in (True, False):
        model = TinyModel()
        config = TrainConfig(steps=12, batch_size=8, max_skipped=max_skipped, log_every=6)
        trainer = Trainer(model, poisoned({8: float("nan")}), config, tmp_path / str(direct))
        trainer.guard = Guard(torch.device("cpu"), direct, max_skipped)
        if max_skipped:
            assert trainer.fit().skipped == 1
        else:
            with pytest.raises(NonFiniteError, match="step 9: not finite: loss of task"):
                trainer.fit()
        found[direct] = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    assert torch.isfinite(found[True]).all()
    assert torch.equal(found[True], found[False])


def test_the_device_side_guard_never_reads_the_device_within_a_window() -> None:
    """Reading a tensor's value is what would make the host wait."""

    class Untouchable(torch.Tensor):
        def __float__(self) -> float:
            raise AssertionError("read")

        __bool__ = item = tolist = __int__ = __float__  # type: ignore[assignment]

    guard = Guard(torch.device("cpu"), direct=False, max_skipped=0)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], fused=True)
    norm = torch.ones(()).as_subclass(Untouchable)
    for step in range(5):
        assert guard.allows(step, norm, torch.ones(2).as_subclass(Untouchable), optimizer)
    assert guard._bad.shape == ()
