"""The transfer matrix: who helps whom, with the sign of each metric, resumable."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from polytask.errors import UserError
from polytask.evaluate import transfer_matrix

ALONE = {"a": 0.5, "b": 2.0, "c": 0.8}
PAIRS = {"ab": {"a": 0.6, "b": 1.5}, "ac": {"a": 0.5, "c": 0.6}, "bc": {"b": 2.2, "c": 0.84}}
UP = {"a": True, "b": False, "c": True}


class Trainer:
    def __init__(self, stop_after: int = 99) -> None:
        self.seen: list[str] = []
        self.stop_after = stop_after

    def __call__(self, subset: tuple[str, ...]) -> Mapping[str, float]:
        if len(self.seen) == self.stop_after:
            raise KeyboardInterrupt
        name = "".join(subset)
        self.seen.append(name)
        if len(subset) == 1:
            return {t: ALONE[t] * (1.0 if t == name else 0.5) for t in ALONE}
        return PAIRS[name]


def test_pairs_trained_together_against_each_alone() -> None:
    trainer = Trainer()
    m = transfer_matrix("abc", trainer, UP)
    expected = [[0.0, 0.25, -0.25], [0.2, 0.0, 0.05], [0.0, -0.1, 0.0]]
    assert m.gain == pytest.approx(np.array(expected))
    assert sorted(trainer.seen) == ["a", "ab", "ac", "b", "bc", "c"]
    assert m.given == pytest.approx([0.0, 0.125, -0.05])
    assert m.received == pytest.approx([0.1, 0.075, -0.1])


def test_direct_transfer_needs_only_the_single_runs() -> None:
    trainer = Trainer()
    m = transfer_matrix("abc", trainer, UP, mode="direct")
    assert sorted(trainer.seen) == ["a", "b", "c"]
    assert m.gain[0] == pytest.approx([0.0, 0.5, -0.5])
    assert (np.diag(m.gain) == 0).all()


def test_an_interrupted_matrix_goes_on(tmp_path: Path) -> None:
    cache = tmp_path / "transfer.json"
    with pytest.raises(KeyboardInterrupt):
        transfer_matrix("abc", Trainer(stop_after=4), UP, cache=cache)
    rest = Trainer()
    m = transfer_matrix("abc", rest, UP, cache=cache)
    assert len(rest.seen) == 2
    assert m.gain == pytest.approx(transfer_matrix("abc", Trainer(), UP).gain)
    assert json.loads(json.dumps(m.to_dict()))["tasks"] == ["a", "b", "c"]
    cache.write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        transfer_matrix("abc", Trainer(), UP, cache=cache)


def test_one_task_transfers_nothing() -> None:
    with pytest.raises(UserError, match="at least two"):
        transfer_matrix("a", Trainer(), UP)
