"""Adapters on whole models: untouched at the start, mixed batches, new tasks, folding, errors."""

from __future__ import annotations

import copy

import pytest
import torch
from adapt_models import TASKS, bert, gpt2, hidden, ids, perceptron, stir
from torch import nn

from polytask.adapt import AdaptConfig, attach
from polytask.errors import AdaptError, ConfigError

EVERY = [
    {"method": "mhr", "heads": 4},
    {"method": "poly"},
    {"method": "task-lora"},
    {"method": "bottleneck"},
    {"method": "lora"},
    {"method": "ia3", "targets": ("query", "value")},
    {"method": "peft-poly", "heads": 4},
]


def config(**options: object) -> AdaptConfig:
    return AdaptConfig(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", EVERY, ids=lambda o: o["method"])
def test_an_adapted_model_starts_as_its_base_bit_for_bit(options: dict) -> None:  # type: ignore[type-arg]
    model, tokens = bert(), ids()
    before = hidden(model, tokens)
    adapters = attach(model, config(**options), TASKS)
    model.eval()
    with adapters.rows(["alpha", "gamma", "beta", "beta", "alpha"]):
        assert torch.equal(hidden(model, tokens), before)
    adapters.detach()
    assert not hasattr(model, "adapters")
    assert torch.equal(hidden(model, tokens), before)


@pytest.mark.parametrize("options", EVERY[:4], ids=lambda o: o["method"])
def test_a_mixed_batch_equals_one_batch_per_task(options: dict) -> None:  # type: ignore[type-arg]
    model, tokens = bert(), ids()
    adapters = attach(model, config(**options), TASKS)
    stir(adapters)
    model.eval()
    task = torch.tensor([0, 2, 1, 1, 0])
    with adapters.rows(task):
        together = hidden(model, tokens)
    base = bert()
    assert float((together - hidden(base, tokens)).detach().abs().max()) > 0.01
    for number in range(3):
        with adapters.rows(number):
            alone = hidden(model, tokens[task == number])
        torch.testing.assert_close(together[task == number], alone, atol=1e-5, rtol=1e-5)


def test_conv1d_layers_of_gpt2_are_adapted() -> None:
    model, tokens = gpt2(), ids()
    adapters = attach(model, config(method="mhr", heads=4, targets=("c_attn",)), TASKS)
    stir(adapters)
    assert adapters.sites == ("h.0.attn.c_attn", "h.1.attn.c_attn")
    with adapters.rows("beta"):
        wanted = hidden(model.eval(), tokens)
    adapters.fold("beta")
    torch.testing.assert_close(hidden(model, tokens), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", EVERY[:3] + EVERY[4:6], ids=lambda o: o["method"])
def test_folding_leaves_a_plain_model_with_the_same_outputs(options: dict) -> None:  # type: ignore[type-arg]
    model, tokens = bert(), ids()
    adapters = attach(model, config(**options), TASKS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(
                    0.1
                    * torch.randn(
                        parameter.shape, generator=torch.Generator().manual_seed(len(name))
                    )
                )
    model.eval()
    with adapters.rows("gamma"):
        wanted = hidden(model, tokens)
    adapters.fold("gamma")
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in bert().named_parameters()}
    torch.testing.assert_close(hidden(model, tokens), wanted, atol=1e-5, rtol=1e-5)
    with pytest.raises(AdaptError, match="not attached"):
        adapters.fold("gamma")


def test_bottlenecks_cannot_be_folded() -> None:
    model = bert()
    adapters = attach(model, config(method="bottleneck"), TASKS)
    with pytest.raises(AdaptError, match="not linear"):
        adapters.fold("alpha")
    assert hasattr(model, "adapters")


@pytest.mark.parametrize(
    ("granularity", "tables"),
    [
        ("finegrained", 12),
        ("blockwise", 2),
        ("layerwise", 2),
        ("coderwise", 1),
        ("coarsegrained", 1),
    ],
)
def test_granularity_decides_which_layers_share_a_table(granularity: str, tables: int) -> None:
    model = bert()
    adapters = attach(model, config(heads=4, granularity=granularity), TASKS)
    assert (len(adapters.tables), len(adapters.layers)) == (tables, 12)
    parts = adapters.share().parts
    assert parts["tables"] == tables * 3 * 4 * 8  # T * H * S each


def test_parameter_counts_are_those_of_the_sheet() -> None:
    """Per linear S r (d + k) + T H S; MHR adds T S (H - 1) to Poly."""
    counts = {}
    for name, heads in (("poly", 1), ("mhr", 4)):
        options = {"heads": heads} if name == "mhr" else {}
        adapters = attach(perceptron(), config(method=name, rank=2, modules=5, **options), TASKS)
        counts[name] = adapters.share().trained
    assert counts["poly"] == 5 * 2 * (12 + 8) + 5 * 2 * (8 + 4) + 2 * 3 * 5
    assert counts["mhr"] - counts["poly"] == 2 * 3 * 5 * 3


def test_the_share_that_trains_is_told() -> None:
    adapters = attach(perceptron(), config(method="poly", rank=2, modules=4), TASKS)
    text = str(adapters)
    assert text.startswith("poly adapters on 2 modules for 3 tasks; trains 280 of 420 numbers")
    assert "tables 24" in text and "layers 256" in text


def test_routing_learns_at_its_own_rate_without_decay() -> None:
    adapters = attach(perceptron(), config(heads=4, lr=1e-3), TASKS)
    slow, fast = adapters.groups(5e-4, weight_decay=0.01)
    assert (slow["lr"], slow["weight_decay"]) == (1e-3, 0.01)
    assert (fast["lr"], fast["weight_decay"]) == (0.1, 0.0)
    assert adapters.learning_rates(5e-4) == {"*adapters.tables.*": 0.1, "*adapters.layers.*": 1e-3}


def test_at_the_routing_rate_gates_move_and_at_the_adapters_rate_they_do_not() -> None:
    moved = {}
    for rate in (0.1, 1e-3):
        torch.manual_seed(0)
        model = perceptron()
        adapters = attach(model, config(method="poly", gate="sigmoid", routing_lr=rate), TASKS)
        optimizer = torch.optim.AdamW(adapters.groups(1e-3))
        x, task = torch.randn(30, 12), torch.arange(30) % 3
        y = torch.randn(3, 4)[task]
        for _ in range(60):
            with adapters.rows(task):
                loss = (model(x) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        weights = [t.table() for t in adapters._task_tables().values()]
        moved[rate] = max(float((w - 1 / 8).abs().max()) for w in weights)
    assert moved[0.1] > 0.05 and moved[1e-3] < 0.02


def trained() -> tuple[nn.Module, object]:
    model = perceptron()
    adapters = attach(model, config(heads=4, gate="sigmoid"), TASKS)
    stir(adapters)
    return model, adapters


def test_new_tasks_get_fresh_rows_and_keep_the_inventory() -> None:
    model, adapters = trained()
    kept = {n: layer.lora_A.clone() for n, layer in adapters.routed().items()}  # type: ignore[attr-defined]
    adapters.reset(("new",))  # type: ignore[attr-defined]
    assert adapters.tasks == ("new",)  # type: ignore[attr-defined]
    for table in adapters._task_tables().values():  # type: ignore[attr-defined]
        assert table.module_logits.shape == (1, 32)
        assert float(table.module_logits.detach().abs().max()) <= 1e-3
    for name, layer in adapters.routed().items():  # type: ignore[attr-defined]
        assert torch.equal(layer.lora_A, kept[name])
    with adapters.rows("new"):  # type: ignore[attr-defined]
        model(torch.randn(2, 12))
    adapters.reset(("other",), keep=False)  # type: ignore[attr-defined]
    assert all(layer.untrained for layer in adapters.routed().values())  # type: ignore[attr-defined]


def test_z_tuning_trains_rows_only_and_refuses_an_untrained_inventory() -> None:
    _, adapters = trained()
    adapters.reset(("new",))  # type: ignore[attr-defined]
    adapters.tune_rows_only()  # type: ignore[attr-defined]
    assert adapters.share().parts == {"tables": 2 * 1 * 4 * 8}  # type: ignore[attr-defined]
    fresh = attach(perceptron(), config(heads=4), TASKS)
    with pytest.raises(AdaptError, match="never trained"):
        fresh.tune_rows_only()


@pytest.mark.parametrize("collapse", [True, False])
def test_mu_is_the_averaged_module_and_differs_in_step_size_only(collapse: bool) -> None:
    model, adapters = trained()
    adapters.to_uniform(collapse)  # type: ignore[attr-defined]
    x = torch.randn(6, 12)
    with adapters.rows([0, 1, 2, 0, 1, 2]):  # type: ignore[attr-defined]
        found = model(x)
    other_model, other = trained()
    other.to_uniform(not collapse)  # type: ignore[attr-defined]
    with other.rows([0, 1, 2, 0, 1, 2]):  # type: ignore[attr-defined]
        torch.testing.assert_close(found, other_model(x))
    assert "tables" not in adapters.share().parts  # type: ignore[attr-defined]
    found.sum().backward()
    with other.rows([0, 1, 2, 0, 1, 2]):  # type: ignore[attr-defined]
        other_model(x).sum().backward()
    one, many = (adapters, other) if collapse else (other, adapters)
    for name, layer in one.routed().items():  # type: ignore[attr-defined]
        spread = many.routed()[name].lora_B.grad  # type: ignore[attr-defined]
        torch.testing.assert_close(layer.lora_B.grad / 8, spread[:, :1], atol=1e-6, rtol=1e-4)


def test_a_copied_model_uses_its_own_adapters() -> None:
    model, adapters = trained()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in adapters.parameters():  # type: ignore[attr-defined]
            parameter.zero_()
    x = torch.randn(3, 12)
    with twin.adapters.rows([0, 1, 2]):  # type: ignore[union-attr, operator]
        assert not torch.allclose(twin(x), perceptron()(x))
    with adapters.rows([0, 1, 2]):  # type: ignore[attr-defined]
        torch.testing.assert_close(model(x), perceptron()(x))


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    grads = []
    for on in (False, True):
        model = bert()
        adapters = attach(model, config(method="mhr", heads=4, gate="sigmoid"), TASKS)
        stir(adapters)
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        with adapters.rows([0, 2, 1, 1, 0]):
            hidden(model, ids()).square().mean().backward()
        grads.append([p.grad.clone() for p in adapters.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 12
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def test_a_torch_encoder_is_adapted_and_what_bypasses_forward_is_refused() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(3, 5, 16)
    before = model(x)
    with pytest.raises(AdaptError, match="MultiheadAttention reads its weight"):
        attach(model, config(heads=4, targets=("out_proj",)), TASKS)
    adapters = attach(model, config(heads=4), TASKS)
    assert all("linear" in site for site in adapters.sites)
    with adapters.rows([0, 1, 2]):
        assert torch.allclose(model(x), before, atol=1e-6)
    stir(adapters)
    with adapters.rows([0, 1, 2]), torch.no_grad():
        assert not torch.allclose(model(x), before, atol=1e-2)


def test_mistakes_are_named() -> None:
    model = bert()
    with pytest.raises(AdaptError, match=r"'qury'. Did you mean 'query'"):
        attach(model, config(targets=("qury",), heads=1), TASKS)
    with pytest.raises(AdaptError, match="LayerNorm; low-rank updates go on linear layers"):
        attach(model, config(targets=("LayerNorm",), heads=1), TASKS)
    with pytest.raises(AdaptError, match="7 heads must divide its 32 inputs and its 32 outputs"):
        attach(model, config(heads=7), TASKS)
    with pytest.raises(AdaptError, match="has no linear layer"):
        attach(nn.Sequential(nn.ReLU()), config(), TASKS)
    with pytest.raises(AdaptError, match="no feed-forward that is known by name"):
        attach(perceptron(), config(method="bottleneck"), TASKS)
    adapters = attach(model, config(heads=4), TASKS)
    with pytest.raises(AdaptError, match="has 'adapters' already"):
        attach(model, config(heads=4), TASKS)
    with pytest.raises(AdaptError, match="does not know the rows' tasks"):
        hidden(model, ids())
    with pytest.raises(AdaptError, match="got 5 rows and 2 task ids"), adapters.rows([0, 1]):
        hidden(model, ids())
    with pytest.raises(AdaptError, match="no routing rows"):
        attach(perceptron(), config(method="task-lora"), TASKS).reset(("new",))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"method": "lora", "heads": 4}, "'heads' has no meaning for method 'lora'"),
        ({"method": "poly", "heads": 4}, "'heads' has no meaning for method 'poly'"),
        ({"combine": "outputs"}, "heads must be 1"),
        ({"gate": "own"}, "heads must be 1"),
        ({"method": "scalearn"}, "needs 'sources'"),
        ({"rnk": 4}, "unknown key 'rnk'. Did you mean 'rank'"),
        ({"method": "mhrr"}, "method"),
        ({"gate_dropout": 1.0}, "gate_dropout"),
    ],
)
def test_settings_that_mean_nothing_are_errors(given: dict, said: str) -> None:  # type: ignore[type-arg]
    from polytask.configs import parse

    with pytest.raises(ConfigError, match=said):
        parse(AdaptConfig, given, "adapt")
