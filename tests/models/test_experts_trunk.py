"""Experts in the one transformer: blocks, padding, losses, counts, generation, wrong use."""

from __future__ import annotations

from typing import Any

import model_examples as make
import numpy as np
import pytest
import torch
from model_examples import Row
from test_flops import check

from polytask.configs import parse
from polytask.errors import ConfigError
from polytask.models import (
    Batch,
    HeadSpec,
    InputSpec,
    MaskSpec,
    ModelConfig,
    ModelSpec,
    MultitaskModel,
    RouteContext,
    Transformer,
    TransformerConfig,
)
from polytask.models.collate import Collator
from polytask.models.experts import ExpertsConfig, RoutingRecord
from polytask.models.flops import flops
from polytask.models.init import initialise

EXPERTS: dict[str, Any] = {"count": 6, "k": 2, "mult": 2.0, "task_dim": 5}
HEADS = tuple(HeadSpec(task=n, kind="classify", outputs=2) for n in ("a", "b", "c"))


def model(heads: Any = HEADS, inputs: Any = None, **experts: Any) -> MultitaskModel:
    config = ModelConfig(dim=32, layers=4, heads=4, experts=ExpertsConfig(**(EXPERTS | experts)))
    inputs = inputs or InputSpec(vocab_size=50, end_id=4)
    return MultitaskModel(ModelSpec(config=config, inputs=inputs, heads=heads))


def batch(tasks: list[int], lengths: list[int]) -> Batch:
    r = np.random.default_rng(0)
    rows = [
        Row([make.text(r, n)], {t: int(r.integers(2))}, i)
        for i, (t, n) in enumerate(zip(tasks, lengths, strict=True))
    ]
    return Collator(["classify"] * 3, [(0,), (1,), (2,)])(rows)


def test_every_second_block_has_experts_and_no_dense_feed_forward() -> None:
    trunk = Transformer(TransformerConfig(dim=32, layers=4, experts=EXPERTS), tasks=("a", "b"))  # type: ignore[arg-type]
    assert trunk.sparse == (1, 3)
    names = {n.split(".feed_forward.")[1].split(".")[0] for n, _ in trunk.named_parameters()
             if ".feed_forward." in n and n.startswith(("blocks.1", "blocks.3"))}  # fmt: skip
    assert names == {"router", "experts"}


def test_a_model_without_experts_is_as_it_was() -> None:
    plain = ModelConfig(dim=32, layers=4, heads=4)
    spec = ModelSpec(config=plain, inputs=InputSpec(vocab_size=50), heads=HEADS)
    assert MultitaskModel(spec).sparse == ()
    experts, dense = model(), MultitaskModel(spec)
    theirs = dict(experts.named_parameters())
    shared = [n for n, _ in dense.named_parameters() if ".1.feed" not in n and ".3.feed" not in n]
    assert all(torch.equal(p, theirs[n]) for n, p in dense.named_parameters() if n in shared)


@pytest.mark.parametrize("router", ["multi_gate", "conditioned", "blind"])
def test_rows_of_a_mixed_batch_come_out_as_alone_whatever_the_padding(router: str) -> None:
    net = model(router=router, start="width").eval()
    tasks, lengths = [0, 2, 1, 2], [9, 4, 7, 3]
    mixed = net.shared_features(batch(tasks, lengths))
    r = np.random.default_rng(0)
    for s, (t, n) in enumerate(zip(tasks, lengths, strict=True)):
        row = Row([make.text(r, n)], {t: int(r.integers(2))}, s)
        alone = net.shared_features(Collator(["classify"] * 3, [(0,), (1,), (2,)])([row]))
        assert torch.allclose(mixed.pooled[s], alone.pooled[0], atol=1e-5)


def test_the_balance_term_is_the_tasks_own_loss_for_each_of_its_pairs() -> None:
    net = model(balance=0.3)
    net.train()
    kept: list[RoutingRecord] = []
    net.on_routed = kept.append
    terms = net.terms(batch([0, 2, 2, 0], [9, 4, 7, 5]))
    (record,) = kept
    assert net.config.experts is not None
    wanted = 0.3 * record.balance(3, net.config.experts)
    assert torch.equal(terms.value["balance.classify"], wanted[[0, 2, 2, 0]])
    assert sorted(record.routed) == [1, 3]
    valid = record.routed[1].valid
    assert valid is not None and int(valid.sum()) == 9 + 4 + 7 + 5 + 4  # and a summary token each
    net.eval()
    assert "balance.classify" not in net.terms(batch([0], [4])).value


def test_the_gradient_of_the_whole_is_that_of_terms_with_checkpointing_too() -> None:
    found = []
    for on in (False, True):
        net = model(balance=0.3, noise=2.0)
        net.trunk.gradient_checkpointing = on
        torch.manual_seed(0)
        terms = net.terms(batch([0, 2, 1, 0], [9, 4, 7, 5]))
        torch.stack([v.sum() for v in terms.value.values()]).sum().backward()
        found.append({n: p.grad for n, p in net.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert any("router" in n for n in found[0])
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], atol=1e-6), name


@pytest.mark.parametrize(
    "options",
    [{}, {"router": "conditioned"}, {"router": "blind", "gated": True}, {"every": 1, "k": 3}],
    ids=str,
)
def test_counts_equal_what_runs(options: dict[str, Any]) -> None:
    net = model(**options)
    check(net, batch([0, 1, 2, 2] * 3, [9, 4, 12, 3] * 3))


def test_an_expert_layer_by_hand() -> None:
    """Per token 2 experts of 64 and a gate over 6, in blocks 1 and 3 of 4; padding costs gates."""
    net, given = model(), batch([0, 0], [9, 5])
    plain = MultitaskModel(net.spec.model_copy(
        update={"config": net.config.model_copy(update={"experts": None, "layers": 2})}
    ))  # fmt: skip
    attention = 2 * 2 * (2 * 10) * (4 * 32 * 32) + 2 * 4 * 2 * 10 * 10 * 32
    gates = 2 * 2 * (2 * 10) * 32 * 6
    experts = 2 * (9 + 5 + 2) * 2 * (2 * 32 * 64 + 2 * 64 * 32)
    dense = 2 * (2 * 10) * (2 * 32 * 128 + 2 * 128 * 32)
    assert flops(net, given).forward["trunk"] == 2 * attention + dense + gates + experts
    assert flops(plain, given).forward["trunk"] == attention + dense


def test_experts_generate_with_a_cache_as_without() -> None:
    heads = (HeadSpec(task="s", kind="generate", outputs=0), HeadSpec(task="t", kind="generate",
             outputs=0))  # fmt: skip
    net = model(heads, InputSpec(vocab_size=50, end_id=4, text_length=16), start="width").eval()
    r = np.random.default_rng(1)
    rows = []
    for i in range(4):
        sequence, labels = make.generation(r, 5, 4)
        rows.append(Row([sequence], {i % 2: labels}, i))
    given = Collator(["generate", "generate"], [(0,), (1,)])(rows)
    tokens = net.predict(given, max_new=3)["generate"].value
    for i, row in enumerate(rows):
        ids = list(row.sequences[0]["text.ids"][:5])
        for step in range(3):
            text = {"text.ids": np.array(ids, np.int32), "text.prefix": 5}
            x = net.embed_text(torch.tensor([ids]))
            mask = MaskSpec(causal=True, prefix=torch.tensor([5]))
            context = RouteContext(torch.tensor([i % 2]), None)
            assert isinstance(net.trunk, Transformer) and len(text) == 2
            hidden = net.trunk(x, mask, context=context)[0, -1]
            best = int((hidden @ net.stems["text"].embedding.weight.T).argmax())  # type: ignore[union-attr,operator]
            assert best == int(tokens[i, step])
            if best == 4:
                break
            ids.append(best)


def test_rows_with_labels_of_several_tasks_are_refused() -> None:
    r = np.random.default_rng(0)
    rows = [Row([make.text(r, 4)], {0: 1}, 7), Row([make.text(r, 4)], {0: 1, 1: 0}, 8)]
    shared = Collator(["classify"] * 3, [(0, 1), (2,)])(rows)
    with pytest.raises(ConfigError, match="row 8 has labels for 'a' and 'b'"):
        model().terms(shared)
    model(router="blind").terms(shared)  # which routes them alike anyway


def test_a_pass_without_tasks_is_refused() -> None:
    trunk = Transformer(TransformerConfig(dim=32, layers=2, experts=EXPERTS), tasks=("a",))  # type: ignore[arg-type]
    initialise(trunk, 0)
    with pytest.raises(ConfigError, match="needs to know the task"):
        trunk(torch.randn(2, 3, 32))
    with pytest.raises(ConfigError, match="at least one task"):
        Transformer(TransformerConfig(dim=32, layers=2, experts=EXPERTS))  # type: ignore[arg-type]


def test_a_model_with_experts_is_built_again_from_its_json() -> None:
    net = model(router="conditioned", per_task=4)
    again = MultitaskModel.from_json(net.to_json())
    assert again.spec == net.spec
    assert again.state_dict().keys() == net.state_dict().keys()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layers": 1, "experts": {}}, "none is sparse"),
        ({"experts": {"k": 9}}, "there are only 8"),
        ({"experts": {"kk": 2}}, "Did you mean 'k'"),
        ({"hub": "x", "experts": {}}, "experts need polytask's own trunk"),
    ],
)
def test_impossible_settings_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(ModelConfig, given, "model")
