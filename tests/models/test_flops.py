"""FLOP counts from shapes against torch's counter, and the table of parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import model_examples as make
import numpy as np
import pytest
import torch
from model_examples import Row
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from polytask.models import Batch, HeadSpec, InputSpec, ModelConfig, ModelSpec, MultitaskModel
from polytask.models.collate import collate
from polytask.models.flops import flops, flops_by_task, parameter_table


def counted(model: MultitaskModel, batch: Batch) -> tuple[int, int]:
    """Forward and total, from the operations that ran."""
    # Torch's counter does not know the fused CPU kernel.
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            terms = model.terms(batch)
        loss = torch.stack([v.sum() for v in terms.value.values()]).sum()
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    return forward.get_total_flops(), forward.get_total_flops() + backward.get_total_flops()


def check(model: MultitaskModel, batch: Batch) -> None:
    found = flops(model, batch)
    forward, total = counted(model, batch)
    assert sum(found.forward.values()) == pytest.approx(forward, rel=0.01)
    assert found.total == pytest.approx(total, rel=0.01)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gated": True, "kv_heads": 2, "pool": "last"},
        {"positions": "learned", "series_level": False, "forecast_from": "summary"},
        {"decoder_layers": 2},
        {"decoder_layers": 1, "gradient_checkpointing": True},
    ],
)
def test_counts_equal_what_runs(options: dict[str, Any]) -> None:
    model = MultitaskModel(make.spec(**options))
    rows = make.everything()
    check(model, collate(rows * 3, make.KINDS))


def test_counts_hold_for_each_kind_of_row_alone() -> None:
    model = MultitaskModel(make.spec())
    for row in make.everything():
        check(model, collate([row], make.KINDS))


def test_a_routed_model_runs_in_one_pass() -> None:
    model = MultitaskModel(make.spec())
    model.route = lambda layer, feed_forward, x, context: feed_forward(x)
    check(model, collate(make.everything() * 3, make.KINDS))


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "bart"])
def test_hub_models_are_counted(name: str, tmp_path: Path) -> None:
    from test_hub import MODELS, bare, build

    bare(name).save_pretrained(tmp_path)
    generates = MODELS[name][2] != "encoder"
    kinds = ["generate"] if generates else ["classify"]
    model = build(tmp_path, *kinds)
    r = np.random.default_rng(0)
    rows = []
    for i, length in enumerate((9, 14, 11, 25)):
        sequence, labels = make.generation(r, length, 6)
        rows.append(Row([sequence], {0: labels if generates else 1}, i))
    batch = collate(rows, kinds)
    forward, _ = counted(model, batch)
    assert sum(flops(model, batch).forward.values()) == pytest.approx(forward, rel=0.01)


def test_a_transformer_takes_six_per_weight_and_token_and_its_attention() -> None:
    spec = ModelSpec(
        config=ModelConfig(dim=64, layers=3, heads=4, pool="mean"),
        inputs=InputSpec(vocab_size=50),
        heads=(HeadSpec(task="t", kind="classify", outputs=2),),
    )
    model = MultitaskModel(spec)
    r = np.random.default_rng(0)
    batch = collate([Row([make.text(r, 20)], {0: 1}) for _ in range(8)], ["classify"])
    found = flops(model, batch)
    weights = 3 * 12 * 64 * 64
    attention = 3 * 3 * 4 * 8 * 20 * 20 * 64
    assert found.forward["trunk"] + found.backward["trunk"] == 6 * weights * 160 + attention


def test_the_work_booked_on_tasks_adds_up_and_goes_by_length() -> None:
    heads = tuple(HeadSpec(task=name, kind="classify", outputs=2) for name in ("long", "short"))
    spec = ModelSpec(
        config=ModelConfig(dim=64, layers=2, heads=4), inputs=InputSpec(vocab_size=50), heads=heads
    )
    model = MultitaskModel(spec)
    r = np.random.default_rng(0)
    rows = [Row([make.text(r, 30)], {0: 1}) for _ in range(4)]
    rows += [Row([make.text(r, 9)], {1: 1}) for _ in range(4)]
    batch = collate(rows, ["classify", "classify"])
    booked = flops_by_task(model, batch)
    assert booked.sum() == pytest.approx(flops(model, batch).total)
    heads_work = sum(getattr(flops(model, batch), way)["classify"] for way in WAYS) / 2
    assert (booked[0] - heads_work) / (booked[1] - heads_work) == pytest.approx(31 / 10)


WAYS = ("forward", "backward")


def test_the_parameter_table_adds_up() -> None:
    model = MultitaskModel(make.spec())
    for parameter in model.trunk.parameters():
        parameter.requires_grad_(False)
    rows = parameter_table(model)
    total = rows[-1]
    assert total.part == "total"
    assert total.parameters == sum(p.numel() for p in model.parameters())
    assert total.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    by_part = {row.part: row for row in rows}
    assert by_part["heads.classify"].parameters == 13 * 32 + 13
    assert by_part["trunk.blocks"].trainable == 0
