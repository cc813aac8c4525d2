"""MoEViT: passes per task, costs against hand counts and torch's, export, wrong use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from polytask.configs import parse
from polytask.errors import CheckpointError, ConfigError
from polytask.models.experts import ExpertsConfig, ExpertUsage, RoutingRecord
from polytask.models.experts.saving import export_task, load_vit, save_vit, single_task
from polytask.models.experts.vit import MoEViT, MoEViTConfig, VisionTask
from polytask.models.experts.vit_flops import request_cost, vit_flops

TASKS = (
    VisionTask(name="seg", outputs=5),
    VisionTask(name="depth", outputs=1, head="pup", stages=2),
    VisionTask(name="kind", outputs=3, head="image"),
)
SIZES: dict[str, Any] = {
    "image_size": 16, "patch": 4, "channels": 1, "dim": 32, "depth": 4, "heads": 2, "tasks": TASKS
}  # fmt: skip


def build(seed: int = 0, **changes: Any) -> MoEViT:
    experts = ExpertsConfig(count=6, k=2, mult=2.0, task_dim=7)
    given = {"experts": experts} | SIZES | changes
    return MoEViT(MoEViTConfig(seed=seed, **given))


def pixels(count: int = 3, channels: int = 1, size: int = 16) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(0))


def used_by(model: MoEViT, x: Tensor) -> ExpertUsage:
    usage = ExpertUsage(model.config.names, 6)
    for task in model.config.names:
        record = RoutingRecord()
        model.run(x, task, record)
        usage.add(record)
    return usage


def test_blocks_1_3_are_sparse_and_every_task_has_an_output_of_its_own() -> None:
    model = build()
    assert list(model.sparse_layers) == ["blocks.1.feed_forward", "blocks.3.feed_forward"]
    shapes = [tuple(model(pixels(), name).shape) for name in ("seg", "depth", "kind")]
    assert shapes == [(3, 5, 4, 4), (3, 1, 16, 16), (3, 3)]


@pytest.mark.parametrize("kind", ["multi_gate", "conditioned"])
def test_a_mixed_batch_of_features_is_each_tasks_own_pass(kind: Any) -> None:
    model = build(experts=ExpertsConfig(count=6, k=2, router=kind, start="width")).eval()
    x, task = pixels(4), torch.tensor([2, 0, 2, 1])
    mixed = model.features(x, task)
    for s, t in enumerate(task.tolist()):
        assert torch.allclose(mixed[s], model.features(x[s : s + 1], t)[0], atol=1e-5)


@pytest.mark.parametrize("kind", ["multi_gate", "conditioned", "blind", None])
def test_all_tasks_together_are_each_tasks_own_pass(kind: Any) -> None:
    experts = None if kind is None else ExpertsConfig(count=6, k=2, router=kind)
    model, x, record = build(experts=experts).eval(), pixels(4), RoutingRecord()
    together = model.features_by_task(x, ("kind", "seg"), record)
    balance, gradients = torch.zeros(3), []
    for name, found in zip(("kind", "seg"), together, strict=True):
        alone = RoutingRecord()
        assert torch.allclose(found, model.features(x, name, alone), atol=1e-5)
        if experts is not None:
            balance += alone.balance(3, experts)
    if experts is not None and kind != "blind":
        assert torch.allclose(record.balance(3, experts), balance, atol=1e-5)
    for outputs in (together, [model.features(x, name) for name in ("kind", "seg")]):
        model.zero_grad()
        sum(o.square().sum() for o in outputs).backward()  # type: ignore[union-attr]
        gradients.append(model.patches.weight.grad)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-4)  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "alike"), [("multi_gate", False), ("blind", True)])
def test_tasks_are_routed_apart_and_a_blind_router_routes_them_alike(
    kind: Any, alike: bool
) -> None:
    model = build(experts=ExpertsConfig(count=6, k=2, router=kind)).eval()
    found = []
    for task in ("seg", "kind"):
        record = RoutingRecord()
        model.run(pixels(), task, record)
        found.append(record.routed[1].index)
    assert torch.equal(*found) == alike


def test_run_is_without_noise_and_leaves_the_mode() -> None:
    model = build(experts=ExpertsConfig(count=6, k=2, noise=9.0)).train()
    assert torch.equal(model.run(pixels(), "seg"), model.run(pixels(), "seg"))
    assert not torch.equal(model(pixels(), "seg"), model(pixels(), "seg"))
    assert model.training


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("router", ["multi_gate", "conditioned", "blind"])
def test_operations_are_those_that_torch_counts(router: Any, gated: bool) -> None:
    model = build(experts=ExpertsConfig(count=6, k=2, router=router, gated=gated, task_dim=7))
    for task in model.config.names:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model.run(pixels(1), task)
        assert sum(vit_flops(model.config, task).values()) == counter.get_total_flops(), task


def test_operations_by_hand() -> None:
    """16 patches and a class token, width 32, 4 blocks of which 2 have 2 of 6 experts of 64."""
    found = vit_flops(build().config, "seg")
    tokens = 17
    assert found["patches"] == 2 * 16 * (1 * 4 * 4) * 32
    assert found["attention"] == 4 * (tokens * 2 * 4 * 32 * 32 + 2 * 2 * tokens * tokens * 32)
    assert found["dense"] == 2 * tokens * 2 * (32 * 128 + 128 * 32)
    assert found["experts"] == 2 * tokens * 2 * 2 * (32 * 64 + 64 * 32)
    assert found["gates"] == 2 * tokens * 2 * 32 * 6
    assert found["head"] == 2 * 16 * 32 * 5
    dense = vit_flops(build(experts=None).config, "seg")
    assert dense["dense"] == found["dense"] + found["experts"]  # k * mult = the dense ratio
    assert "experts" not in dense


def test_bytes_count_only_what_a_task_touches() -> None:
    model = build()
    cost = request_cost(model, "seg", [(0, 4), (1, 2, 3)])
    expert = (32 * 64 + 64 + 64 * 32 + 32) * 4
    assert cost.bytes["experts"] == 5 * expert
    assert cost.bytes["gates"] == 2 * 32 * 6 * 4
    assert cost.bytes["head"] == (32 * 5 + 5) * 4
    whole = request_cost(model, "seg")
    assert whole.bytes["experts"] == 12 * expert
    heads = sum(p.nbytes for p in model.heads.parameters())
    gates = 3 * whole.bytes["gates"]
    everything = sum(p.nbytes for p in model.parameters())
    assert whole.bytes["dense"] + whole.bytes["experts"] + heads + gates == everything


def test_gates_and_heads_start_alike_whatever_other_tasks_there_are() -> None:
    whole, alone = build(), build(tasks=TASKS[2:])
    assert torch.equal(whole.heads[2].weight, alone.heads[0].weight)  # type: ignore[arg-type]
    theirs = dict(whole.named_parameters())
    trunk = {n: p for n, p in alone.named_parameters() if "experts" in n or "attention" in n}
    assert trunk and all(torch.equal(p, theirs[n]) for n, p in trunk.items())
    gates = [m.sparse_layers["blocks.1.feed_forward"].router.gates for m in (whole, alone)]
    assert torch.equal(gates[0][2], gates[1][0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ()}, "at least one task"),
        ({"tasks": (TASKS[0], TASKS[0])}, "two tasks share a name"),
        ({"image_size": 17}, "not a multiple of 4"),
        ({"heads": 3}, "not divisible by heads 3"),
        ({"depth": 1}, "none is sparse"),
        ({"experts": {"count": 2, "k": 4}}, "k = 4 experts per token, and there are only 2"),
    ],
)
def test_impossible_models_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(MoEViTConfig, SIZES | changes, "model")


def test_wrong_calls_are_named() -> None:
    model = build()
    with pytest.raises(ConfigError, match=r"no task 'sge'\. Did you mean 'seg'"):
        model.run(pixels(), "sge")
    with pytest.raises(ConfigError, match="no task number 3"):
        model.run(pixels(), 3)
    with pytest.raises(ConfigError, match=r"pixels are \(3, 3, 16, 16\)"):
        model.run(pixels(channels=3), "seg")


def test_the_balance_loss_is_weighted_and_reaches_only_the_gate_of_its_task() -> None:
    model = build(experts=ExpertsConfig(count=6, k=2, balance=0.5))
    record = RoutingRecord()
    model(pixels(), "depth", record)
    model.balance(record).backward()
    gates = model.sparse_layers["blocks.3.feed_forward"].router.gates
    assert [g.grad is not None and bool(g.grad.any()) for g in gates] == [False, True, False]
    config = model.config.experts
    assert config is not None
    whole = record.balance(3, config)
    assert model.balance(record).item() == pytest.approx(0.5 * whole.sum().item())
    assert float(build(experts=None).balance(record)) == 0


@pytest.mark.parametrize("router", ["multi_gate", "conditioned"])
def test_one_task_alone_with_the_experts_it_uses_answers_the_same(
    router: Any, tmp_path: Path
) -> None:
    model = build(experts=ExpertsConfig(count=6, k=2, router=router))
    x = pixels(1)
    usage = used_by(model, x)
    for task in ("depth", "kind"):
        used = usage.used(task)
        alone = load_vit(export_task(model, tmp_path / task, task, used))
        assert alone.config.names == (task,)
        assert [m.experts.ids for m in alone.sparse_layers.values()] == list(used)
        assert torch.allclose(alone.run(x, task), model.run(x, task), atol=1e-6)
    save_vit(model, tmp_path / "whole")
    size = {n: (tmp_path / n / "model.safetensors").stat().st_size for n in ("kind", "whole")}
    missing = 12 - sum(map(len, usage.used("kind")))
    assert size["kind"] < size["whole"] - missing * 4 * 32 * 64 * 2


def test_a_token_that_would_choose_a_missing_expert_takes_the_next() -> None:
    model = build().eval()
    alone = single_task(model, "seg", [(0, 1, 3), (2, 4)])
    record, whole = RoutingRecord(), RoutingRecord()
    alone.run(pixels(8), "seg", record)
    model.run(pixels(8), "seg", whole)
    assert set(record.routed[1].index.unique().tolist()) <= {0, 1, 3}
    assert set(record.routed[3].index.unique().tolist()) == {2, 4}
    # The first sparse layer sees the same tokens: probabilities are those of all six experts.
    assert torch.equal(record.routed[1].probability, whole.routed[1].probability)


def test_ranges_say_which_experts_a_task_may_use() -> None:
    model = build(experts=ExpertsConfig(count=6, k=2, per_task=2)).eval()
    alone = single_task(model, "kind")
    assert [m.experts.ids for m in alone.sparse_layers.values()] == [(4, 5), (4, 5)]
    assert torch.allclose(alone.run(pixels(), "kind"), model.run(pixels(), "kind"), atol=1e-6)


def test_too_few_experts_are_named() -> None:
    with pytest.raises(ConfigError, match="uses 1 experts of block 3"):
        single_task(build(), "seg", [(0, 1), (2,)])


def test_a_damaged_folder_is_named(tmp_path: Path) -> None:
    folder = save_vit(build(), tmp_path / "m")
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        load_vit(folder)
    with pytest.raises(CheckpointError, match="holds no saved model"):
        load_vit(tmp_path)
