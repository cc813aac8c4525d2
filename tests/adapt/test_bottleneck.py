"""Banks of bottleneck adapters and their combinations: closed forms, slow references, counts."""

from __future__ import annotations

import pytest
import torch
from adapt_models import bert, hidden, ids, stir
from torch import Tensor, nn
from torch.nn import functional

from polytask.adapt import AdaptConfig, AdapterBank, Fusion, ScaledSum, attach
from polytask.errors import AdaptError

D, M = 8, 3


def bank(names: tuple[str, ...] = ("a", "b"), seed: int = 0) -> AdapterBank:
    made = AdapterBank(names, D, M, "bert", seed)
    stir(made)
    return made


def inputs(rows: int = 4) -> Tensor:
    return torch.randn(rows, 5, D, generator=torch.Generator().manual_seed(1))


def up_of(made: AdapterBank, name: str, x: Tensor) -> Tensor:
    p = made.get(name)
    return functional.relu(x @ p["down"].T + p["down_bias"]) @ p["up"].T + p["up_bias"]


def first(rows: int) -> Tensor:
    return torch.zeros(rows, dtype=torch.int64)


def test_up_projections_are_those_of_each_adapter_without_residual() -> None:
    made, x = bank(), inputs()
    found = made.ups(x)
    for number, name in enumerate(made.names):
        torch.testing.assert_close(found[..., number, :], up_of(made, name, x))


def test_rows_run_through_their_own_adapter() -> None:
    made, x = bank(("a", "b", "c")), inputs()
    index = torch.tensor([2, 0, 2, 1])
    found = made.own(x, index)
    for row in range(4):
        wanted = up_of(made, made.names[int(index[row])], x[row])
        torch.testing.assert_close(found[row], wanted)
    torch.testing.assert_close(made.own(x, first(4), single=True), up_of(made, "a", x))


def test_scaled_sum_has_the_two_source_closed_form() -> None:
    """omega_1 u_1 + omega_2 u_2, whether scales are folded into the weights or not."""
    made, x = bank(), inputs()
    for width in (1, D):
        combine = ScaledSum(3, 2, width, dropout=0.0)
        with torch.no_grad():
            combine.omega.copy_(
                torch.randn(3, 2, width, generator=torch.Generator().manual_seed(4))
            )
        o = combine.omega.detach()
        for target in range(3):
            wanted = o[target, 0] * up_of(made, "a", x) + o[target, 1] * up_of(made, "b", x)
            index = torch.full((4,), target)
            torch.testing.assert_close(combine(made, x, index, True), wanted)
            torch.testing.assert_close(combine(made, x, index, False), wanted)
        mixed = torch.tensor([0, 2, 1, 2])
        found = combine(made, x, mixed, False)
        for row in range(4):
            alone = combine(made, x[row : row + 1], mixed[row : row + 1], True)
            torch.testing.assert_close(found[row : row + 1], alone)


def test_scaling_one_source_scales_only_its_contribution() -> None:
    made, x, combine = bank(), inputs(), ScaledSum(1, 2, D, dropout=0.0)
    before = combine(made, x, first(4), True)
    with torch.no_grad():
        part = combine.omega[0, 1] * up_of(made, "b", x)
        combine.omega[0, 1] *= 3
    torch.testing.assert_close(combine(made, x, first(4), True), before + 2 * part)


def test_scales_start_at_two_over_the_sources_and_sum_to_two() -> None:
    omega = ScaledSum(1, 8, 768).omega.detach()
    assert abs(float(omega.mean()) - 2 / 8) < 1e-4
    assert 0.0009 < float(omega.std()) < 0.0011
    torch.testing.assert_close(omega.sum(1), torch.full((1, 768), 2.0), atol=0.02, rtol=0)


def test_dropout_acts_on_scales_and_rescales_what_is_kept() -> None:
    combine = ScaledSum(1, 4, 1000, dropout=0.3).train()
    torch.manual_seed(0)
    ratio = combine.scales().detach() / combine.omega.detach()
    kept = ratio[ratio != 0]
    assert 0.27 < float((ratio == 0).float().mean()) < 0.33
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / 0.7))
    combine.eval()
    assert torch.equal(combine.scales(), combine.omega)


def test_ablations_normalise_over_sources() -> None:
    combine = ScaledSum(2, 3, 4, dropout=0.0, normalise="softmax")
    torch.testing.assert_close(combine.scales().sum(1), torch.ones(2, 4))
    combine.normalise = "mean"
    torch.testing.assert_close(combine.scales().sum(1), torch.ones(2, 4))


def test_fusion_is_attention_over_sources() -> None:
    made, x = bank(("a", "b", "c")), inputs()
    fusion = Fusion(2, D, dropout=0.0)
    stir(fusion)
    index = torch.tensor([1, 0, 1, 1])
    found = fusion(made, x, index, False)
    for row in range(4):
        t = int(index[row])
        for place in range(5):
            token = x[row, place]
            q = fusion.query[t] @ token + fusion.query_bias[t]
            u = [up_of(made, n, token) for n in made.names]
            scores = torch.stack([(fusion.key[t] @ v + fusion.key_bias[t]) @ q for v in u])
            wanted = sum(w * (fusion.value[t] @ v) for w, v in zip(scores.softmax(0), u))
            torch.testing.assert_close(found[row, place], wanted)
    one = fusion(made, x[:1], index[:1], True)
    torch.testing.assert_close(one, found[:1])


def test_fusion_starts_with_identity_values() -> None:
    fusion = Fusion(1, D)
    torch.testing.assert_close(fusion.value[0].diagonal(), torch.ones(D))
    assert float(fusion.regularizer().detach()) == pytest.approx(
        0.01 * (D * D - D) * 1e-12, rel=1e-3
    )


@pytest.mark.parametrize("combine", ["own", "scaled", "fusion"])
def test_gradients_agree_with_finite_differences(combine: str) -> None:
    made = bank().double()
    index = torch.tensor([0, 1, 0, 1])
    x = inputs().double().requires_grad_()
    if combine == "own":
        run = lambda x, down, up: made.own(x, index)
        torch.autograd.gradcheck(run, (x, made.down, made.up), atol=1e-7)
        return
    part: nn.Module = (
        ScaledSum(2, 2, D, dropout=0.0) if combine == "scaled" else Fusion(2, D, dropout=0.0)
    )
    part.double()
    learned = list(part.parameters())
    one = lambda x, *p: part(made, x, first(4), True)
    mixed = lambda x, *p: part(made, x, index, False)
    assert torch.autograd.gradcheck(one, (x, *learned), atol=1e-7)
    assert torch.autograd.gradcheck(mixed, (x, *learned), atol=1e-7)


def sources(model: nn.Module, names: tuple[str, ...], seed: int = 0) -> dict:  # type: ignore[type-arg]
    adapters = attach(model, AdaptConfig(method="bottleneck", reduction=8), names)
    stir(adapters, seed)
    found = {n: {s: b.bank.get(n) for s, b in adapters.banks().items()} for n in names}
    adapters.detach()
    return found


def test_pfeiffer_placement_uses_the_same_norm_twice() -> None:
    """output = LN(u(LN(h + x)) + h + x) at every feed-forward of a BERT, by hand."""
    model, tokens = bert(), ids()
    adapters = attach(model, AdaptConfig(method="bottleneck", reduction=8), ("a",))
    stir(adapters)
    assert adapters.sites == (
        "encoder.layer.0.output.LayerNorm",
        "encoder.layer.1.output.LayerNorm",
    )
    seen: dict[str, Tensor] = {}
    layer = model.encoder.layer[0]
    layer.intermediate.register_forward_hook(lambda m, i, o: seen.update(x=i[0]))
    layer.output.dense.register_forward_hook(lambda m, i, o: seen.update(h=o))
    layer.register_forward_hook(
        lambda m, i, o: seen.update(out=o[0] if isinstance(o, tuple) else o)
    )
    with adapters.rows("a"):
        hidden(model, tokens)
    norm = layer.output.LayerNorm
    by_hand = lambda s: functional.layer_norm(
        s, norm.normalized_shape, norm.weight, norm.bias, norm.eps
    )
    s = seen["h"] + seen["x"]
    u = up_of(adapters.banks()[adapters.sites[0]].bank, "a", by_hand(s))
    torch.testing.assert_close(seen["out"], by_hand(s + u), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("variant", "count"),
    [("scalearn", 3 * 32 * 2), ("uniform", 3 * 2), ("scalearn++", 3 * 32), ("uniform++", 3)],
)
def test_the_forms_have_the_published_numbers_of_parameters(variant: str, count: int) -> None:
    model = bert()
    found = sources(model, ("a", "b", "c"))
    config = AdaptConfig(method="scalearn", sources=("x",), variant=variant)  # type: ignore[arg-type]
    adapters = attach(model, config, ("target",), sources=found)
    assert adapters.share().parts == {"tables": count}
    tokens = ids()
    with adapters.rows("target"):
        assert hidden(model, tokens).isfinite().all()


def test_one_hot_scales_give_the_single_adapter_model() -> None:
    model, tokens = bert(), ids()
    found = sources(model, ("a", "b"))
    alone = attach(model, AdaptConfig(method="bottleneck", reduction=8), ("b",), sources=None)
    for site, layer in alone.banks().items():
        layer.bank.set("b", found["b"][site])
    with alone.rows("b"):
        wanted = hidden(model, tokens)
    alone.detach()
    adapters = attach(model, AdaptConfig(method="scalearn", sources=("x",)), ("t",), sources=found)
    with torch.no_grad():
        for layer in adapters.banks().values():
            assert isinstance(layer.combine, ScaledSum)
            layer.combine.omega.zero_()
            layer.combine.omega[:, 1] = 1.0
    model.eval()
    with adapters.rows("t"):
        torch.testing.assert_close(hidden(model, tokens), wanted, atol=1e-6, rtol=1e-6)


def test_one_source_at_scale_one_is_bit_equal_to_the_single_adapter_model() -> None:
    model, tokens = bert(), ids()
    found = sources(model, ("a",))
    alone = attach(model, AdaptConfig(method="bottleneck", reduction=8), ("a",))
    for site, layer in alone.banks().items():
        layer.bank.set("a", found["a"][site])
    with alone.rows("a"):
        wanted = hidden(model, tokens)
    alone.detach()
    adapters = attach(model, AdaptConfig(method="scalearn", sources=("x",)), ("t",), sources=found)
    with torch.no_grad():
        for layer in adapters.banks().values():
            assert isinstance(layer.combine, ScaledSum)
            layer.combine.omega.fill_(1.0)
    model.eval()
    with adapters.rows("t"):
        assert torch.equal(hidden(model, tokens), wanted)


def test_sources_of_different_widths_are_padded_with_nothing() -> None:
    model, tokens = bert(), ids()
    wide, narrow = sources(model, ("wide",)), {}
    for site, parts in sources(model, ("narrow",), 7)["narrow"].items():
        narrow[site] = {"down": parts["down"][:2], "down_bias": parts["down_bias"][:2]}
        narrow[site] |= {"up": parts["up"][:, :2], "up_bias": parts["up_bias"]}
    both = {**wide, "narrow": narrow}
    adapters = attach(model, AdaptConfig(method="scalearn", sources=("x",)), ("t",), sources=both)
    x = torch.randn(2, 3, 32)
    site = adapters.banks()[adapters.sites[0]]
    p = narrow[adapters.sites[0]]
    wanted = functional.relu(x @ p["down"].T + p["down_bias"]) @ p["up"].T + p["up_bias"]
    torch.testing.assert_close(site.bank.ups(x)[..., 1, :], wanted)
    with adapters.rows("t"):
        assert hidden(model, tokens).isfinite().all()


def test_only_scales_train_in_stage_two() -> None:
    model = bert()
    found = sources(model, ("a", "b"))
    adapters = attach(model, AdaptConfig(method="scalearn", sources=("x",)), ("t",), sources=found)
    with adapters.rows("t"):
        hidden(model, ids()).square().sum().backward()
    moved = {n for n, p in model.named_parameters() if p.grad is not None}
    assert moved and all(".tables." in f".{n}" for n in moved)
    assert adapters.groups(1e-3)[0]["lr"] == 6e-3
    assert adapters.groups(1e-3, 0.1)[0]["weight_decay"] == 0.0


def test_sources_at_other_places_or_widths_name_the_adapter() -> None:
    model = bert()
    found = sources(model, ("a", "b"))
    config = AdaptConfig(method="scalearn", sources=("x",))
    site = next(iter(found["b"]))
    cut = {"a": found["a"], "b": {s: p for s, p in found["b"].items() if s != site}}
    with pytest.raises(AdaptError, match=r"source adapter 'b' lacks an adapter at .*placement"):
        attach(model, config, ("t",), sources=cut)
    wrong = {"a": found["a"], "b": {s: {**p, "up": p["up"][:16]} for s, p in found["b"].items()}}
    with pytest.raises(AdaptError, match=r"source adapter 'b' is 16 wide at .*the model is 32"):
        attach(model, config, ("t",), sources=wrong)
    with pytest.raises(AdaptError, match="needs source adapters, and there is none"):
        attach(model, config, ("t",))
