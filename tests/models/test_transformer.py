"""The transformer against a slow explicit reference, and its masks by what gradients reach."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from polytask.configs import parse
from polytask.errors import ConfigError
from polytask.models import KVCache, MaskSpec, RouteContext, Transformer, TransformerConfig
from polytask.models.init import initialise

SIZES: dict[str, Any] = {"dim": 32, "layers": 2, "heads": 4}


def build(cross: bool = False, **options: Any) -> Transformer:
    model = Transformer(TransformerConfig(**(SIZES | options)), cross=cross)
    initialise(model, seed=1)
    if model.relative is not None:
        # Large enough for its effect to show.
        torch.nn.init.normal_(model.relative.bias.weight, generator=seeded(5))
    return model


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, length, 32, generator=seeded(seed))


def reaches(model: Transformer, x: Tensor, mask: MaskSpec, row: int, token: int) -> list[int]:
    """Positions of `row` whose input has a gradient from output `token`."""
    x = x.clone().requires_grad_()
    model(x, mask)[row, token].square().sum().backward()
    assert x.grad is not None
    others = [r for r in range(len(x)) if r != row]
    assert not x.grad[others].any(), "rows must not see each other"
    return [int(i) for i in x.grad[row].abs().sum(-1).nonzero()[:, 0]]


VARIANTS: list[dict[str, Any]] = [
    {"positions": "rope"},
    {"positions": "learned", "norm": "rms"},
    {"positions": "relative", "gated": True},
    {"positions": "none", "kv_heads": 2},
]


@pytest.mark.parametrize("options", VARIANTS, ids=lambda o: o["positions"])
class TestMasks:
    def test_bidirectional_tokens_see_every_valid_token(self, options: dict[str, Any]) -> None:
        mask = MaskSpec(length=torch.tensor([7, 4]))
        assert reaches(build(**options), inputs(2, 7), mask, 0, 2) == list(range(7))
        assert reaches(build(**options), inputs(2, 7), mask, 1, 2) == list(range(4))

    def test_causal_tokens_never_see_the_future(self, options: dict[str, Any]) -> None:
        mask = MaskSpec(causal=True, length=torch.tensor([7, 4]))
        for token in range(7):
            found = reaches(build(**options), inputs(2, 7), mask, 0, token)
            assert found == list(range(token + 1))

    def test_a_prefix_is_seen_by_all_and_the_rest_causally(self, options: dict[str, Any]) -> None:
        mask = MaskSpec(causal=True, prefix=torch.tensor([3, 0]), length=torch.tensor([7, 7]))
        model, x = build(**options), inputs(2, 7)
        assert reaches(model, x, mask, 0, 0) == [0, 1, 2]
        assert reaches(model, x, mask, 0, 4) == [0, 1, 2, 3, 4]
        assert reaches(model, x, mask, 1, 0) == [0]

    @pytest.mark.parametrize("causal", [False, True])
    def test_segments_never_see_each_other(self, options: dict[str, Any], causal: bool) -> None:
        segments = torch.tensor([[1, 1, 1, 2, 2, 3, 0]])
        mask = MaskSpec(causal=causal, segments=segments)
        model, x = build(**options), inputs(1, 7)
        assert reaches(model, x, mask, 0, 4) == [3, 4]
        assert reaches(model, x, mask, 0, 1) == ([0, 1] if causal else [0, 1, 2])
        assert reaches(model, x, mask, 0, 5) == [5]

    def test_a_prefix_per_token_holds_within_segments(self, options: dict[str, Any]) -> None:
        early = torch.tensor([[True, True, False, True, True, False, False]])
        segments = torch.tensor([[1, 1, 1, 2, 2, 2, 2]])
        mask = MaskSpec(causal=True, prefix=early, segments=segments)
        model, x = build(**options), inputs(1, 7)
        assert reaches(model, x, mask, 0, 0) == [0, 1]
        assert reaches(model, x, mask, 0, 3) == [3, 4]
        assert reaches(model, x, mask, 0, 5) == [3, 4, 5]

    def test_padding_changes_nothing(self, options: dict[str, Any]) -> None:
        model, x = build(**options), inputs(1, 5)
        longer = torch.cat([x, inputs(1, 6, seed=9) * 100], 1)
        for mask, padded in [
            (MaskSpec(), MaskSpec(length=torch.tensor([5]))),
            (MaskSpec(causal=True), MaskSpec(causal=True, length=torch.tensor([5]))),
        ]:
            torch.testing.assert_close(model(longer, padded)[:, :5], model(x, mask))

    def test_packed_segments_equal_separate_rows(self, options: dict[str, Any]) -> None:
        model = build(**options)
        a, b = inputs(1, 4, seed=1), inputs(1, 3, seed=2)
        mask = MaskSpec(causal=True, segments=torch.tensor([[0] * 4 + [1] * 3]))
        positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
        packed = model(torch.cat([a, b], 1), mask, positions=positions)
        separate = [model(part, MaskSpec(causal=True)) for part in (a, b)]
        torch.testing.assert_close(packed, torch.cat(separate, 1))

    def test_decoding_with_a_cache_equals_a_full_pass(self, options: dict[str, Any]) -> None:
        model, x = build(**options).eval(), inputs(2, 9)
        full = model(x, MaskSpec(causal=True))
        cache = KVCache()
        parts = [x[:, :4], x[:, 4:5], x[:, 5:7], x[:, 7:8], x[:, 8:]]
        steps = [model(part, MaskSpec(causal=True), cache=cache) for part in parts]
        torch.testing.assert_close(torch.cat(steps, 1), full)

    def test_a_cache_holds_rows_of_different_lengths(self, options: dict[str, Any]) -> None:
        model, x = build(**options).eval(), inputs(2, 8)
        length, prefix = torch.tensor([5, 3]), torch.tensor([4, 0])
        cache = KVCache()
        first = MaskSpec(causal=True, length=length, prefix=prefix)
        begun = model(x[:, :5], first, cache=cache)
        tokens = torch.stack([x[0, 5:8], x[1, 3:6]])
        steps = [model(tokens[:, i : i + 1], MaskSpec(causal=True), cache=cache) for i in range(3)]
        full = model(x, MaskSpec(causal=True, prefix=prefix))
        torch.testing.assert_close(begun[0], full[0, :5])
        torch.testing.assert_close(begun[1, :3], full[1, :3])
        torch.testing.assert_close(torch.cat(steps, 1)[0], full[0, 5:8])
        torch.testing.assert_close(torch.cat(steps, 1)[1], full[1, 3:6])

    def test_bfloat16_agrees_with_float32(self, options: dict[str, Any]) -> None:
        model, x = build(**options), inputs(3, 11)
        mask = MaskSpec(causal=True, length=torch.tensor([11, 1, 6]))
        expected = model(x, mask)
        with torch.autocast("cpu", torch.bfloat16):
            found = model(x, mask)
        valid = torch.arange(11) < torch.tensor([11, 1, 6])[:, None]
        error = (found.float() - expected)[valid].abs().mean()
        assert error < 0.03 * expected[valid].abs().mean()

    def test_checkpointing_gives_the_same_gradients(self, options: dict[str, Any]) -> None:
        gradients = []
        for on in (False, True):
            model = build(**options)
            model.gradient_checkpointing = on
            model(inputs(2, 5), MaskSpec(causal=True)).square().sum().backward()
            gradients.append([p.grad for p in model.parameters()])
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b)


def reference(model: Transformer, x: Tensor, visible: Tensor) -> Tensor:
    """Loops over rows, heads and queries; rotary positions by real rotation matrices."""
    c = model.config
    width, groups = c.dim // c.heads, c.heads // (c.kv_heads or c.heads)
    for block in model.blocks:
        out = torch.zeros_like(x)
        for s in range(len(x)):
            h = block.norm1(x[s])
            qkv = h @ block.attention.qkv.weight.T
            heads = qkv.view(len(h), -1, width)
            for head in range(c.heads):
                q = turned(heads[:, head], c.rope_base)
                k = turned(heads[:, c.heads + head // groups], c.rope_base)
                v = heads[:, c.heads + (c.kv_heads or c.heads) + head // groups]
                for i in range(len(h)):
                    score = (k @ q[i]) / math.sqrt(width)
                    score[~visible[s, i]] = -math.inf
                    out[s, i, head * width : (head + 1) * width] = score.softmax(0) @ v
        x = x + out @ block.attention.out.weight.T
        h = block.norm2(x) @ block.feed_forward.up.weight.T
        if c.gated:
            gate, h = h.chunk(2, -1)
            h = gate * torch.sigmoid(gate) * h
        else:
            h = 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))
        x = x + h @ block.feed_forward.down.weight.T
    return model.norm(x)


def turned(x: Tensor, base: float) -> Tensor:
    out = x.clone()
    for position in range(len(x)):
        for i in range(0, x.shape[1], 2):
            angle = position / base ** (i / x.shape[1])
            a, b = x[position, i], x[position, i + 1]
            out[position, i] = a * math.cos(angle) - b * math.sin(angle)
            out[position, i + 1] = a * math.sin(angle) + b * math.cos(angle)
    return out


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kv_heads", [None, 1, 2])
def test_equals_an_explicit_reference(gated: bool, kv_heads: int | None) -> None:
    model = build(gated=gated, kv_heads=kv_heads).double()
    x = inputs(2, 5).double()
    length = torch.tensor([5, 3])
    square = torch.ones(5, 5, dtype=torch.bool)
    valid = (torch.arange(5) < length[:, None])[:, None].expand(2, 5, 5)
    expected = reference(model, x, valid)
    torch.testing.assert_close(model(x, MaskSpec(length=length)), expected)
    expected = reference(model, x, square.tril().expand(2, 5, 5))
    torch.testing.assert_close(model(x, MaskSpec(causal=True)), expected)


def test_relative_buckets_equal_those_of_t5() -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    from polytask.models.positions import RelativeBias

    distance = torch.arange(-300, 301)
    for bidirectional in (True, False):
        ours = RelativeBias(2, 32, 128, bidirectional).bucket(distance)
        theirs = T5Attention._relative_position_bucket(distance, bidirectional, 32, 128)
        assert torch.equal(ours, theirs)


def test_rotary_scores_depend_on_distance_alone() -> None:
    from polytask.models.positions import rotate, rotations

    q, k = torch.randn(2, 1, 1, 1, 8, generator=seeded(3))

    def score(i: int, j: int) -> float:
        return float(
            (
                rotate(q, rotations(torch.tensor([[i]]), 8, 1e4))
                * rotate(k, rotations(torch.tensor([[j]]), 8, 1e4))
            ).sum()
        )

    assert score(3, 7) == pytest.approx(score(103, 107), rel=1e-4)
    assert score(3, 7) != pytest.approx(score(3, 8), rel=1e-2)


def test_nothing_masked_makes_no_mask() -> None:
    cpu = torch.device("cpu")
    assert MaskSpec().attention(8, cpu) == (None, False)
    assert MaskSpec(causal=True).attention(8, cpu) == (None, True)
    assert MaskSpec(causal=True, length=torch.tensor([3])).attention(8, cpu) == (None, True)
    assert MaskSpec().cross_attention(8, cpu) is None


class TestMemory:
    def test_tokens_see_valid_memory_only(self) -> None:
        model, x = build(cross=True), inputs(2, 4)
        memory = inputs(2, 6, seed=3).requires_grad_()
        mask = MaskSpec(causal=True, memory_length=torch.tensor([6, 2]))
        model(x, mask, memory=memory).square().sum().backward()
        assert memory.grad is not None
        seen = memory.grad.abs().sum(-1) > 0
        assert seen.tolist() == [[True] * 6, [True, True] + [False] * 4]

    @pytest.mark.parametrize("bfloat16", [False, True])
    def test_empty_memory_adds_nothing(self, bfloat16: bool) -> None:
        model, x = build(cross=True), inputs(2, 4)
        mask = MaskSpec(causal=True, memory_length=torch.tensor([0, 3]))
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            found = model(x, mask, memory=inputs(2, 6, seed=3))
            without = model(x, MaskSpec(causal=True))
        torch.testing.assert_close(found[0], without[0])
        assert not torch.allclose(found[1], without[1])
        found.float().square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())

    def test_memory_of_another_segment_is_invisible(self) -> None:
        model, x = build(cross=True), inputs(1, 4)
        memory = inputs(1, 5, seed=3).requires_grad_()
        mask = MaskSpec(
            causal=True,
            segments=torch.tensor([[1, 1, 2, 2]]),
            memory_segments=torch.tensor([[1, 1, 2, 2, 2]]),
        )
        model(x, mask, memory=memory)[0, :2].square().sum().backward()
        assert memory.grad is not None
        assert (memory.grad[0].abs().sum(-1) > 0).tolist() == [True, True, False, False, False]

    def test_cached_decoding_equals_a_full_pass(self) -> None:
        model, x, memory = build(cross=True), inputs(2, 6), inputs(2, 5, seed=3)
        mask = MaskSpec(causal=True, memory_length=torch.tensor([5, 2]))
        full = model(x, mask, memory=memory)
        cache = KVCache()
        steps = [model(x[:, i : i + 1], mask, memory=memory, cache=cache) for i in range(6)]
        torch.testing.assert_close(torch.cat(steps, 1), full)


class TestRouting:
    def test_a_route_replaces_the_feed_forward_and_gets_task_ids(self) -> None:
        model, x = build(), inputs(3, 4)
        seen: list[tuple[int, list[int]]] = []

        def route(
            layer: int, feed_forward: torch.nn.Module, h: Tensor, context: RouteContext
        ) -> Tensor:
            assert context.task is not None
            seen.append((layer, context.task.tolist()))
            return feed_forward(h) * (context.task == 2)[:, None, None]

        context = RouteContext(torch.tensor([2, 1, 2]), None)
        found = model(x, route=route, context=context)
        assert seen == [(0, [2, 1, 2]), (1, [2, 1, 2])]
        plain = model(x)
        torch.testing.assert_close(found[[0, 2]], plain[[0, 2]])
        assert not torch.allclose(found[1], plain[1])


def test_upper_blocks_continue_stored_activations() -> None:
    model, x = build(layers=3), inputs(2, 5)
    lower = model(x, stop=2)
    torch.testing.assert_close(model(lower, start=2), model(x))


def test_dropout_only_acts_in_training() -> None:
    model, x = build(dropout=0.5), inputs(2, 5)
    assert torch.equal(model.eval()(x), model(x))
    assert not torch.allclose(model.train()(x), model(x))


def test_output_projections_start_smaller_with_depth() -> None:
    for layers in (2, 8):
        model = build(dim=128, layers=layers)
        for block in model.blocks:
            scale = (128 * 2 * layers) ** -0.5
            assert float(block.attention.out.weight.detach().std()) == pytest.approx(
                scale, rel=0.05
            )
            assert float(block.attention.qkv.weight.detach().std()) == pytest.approx(
                128**-0.5, rel=0.05
            )


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    torch.manual_seed(3)
    small = build(layers=2)
    torch.manual_seed(4)
    again = build(layers=2)
    for (name, a), b in zip(small.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dim": 30}, "30 is not divisible by heads 4"),
        ({"kv_heads": 3}, "heads 4 is not divisible by kv_heads 3"),
        ({"dim": 12, "heads": 4}, "rope needs an even head width, not 3"),
        ({"layer": 2}, "Did you mean 'layers'"),
    ],
)
def test_impossible_sizes_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(TransformerConfig, SIZES | wrong, "model")


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="causal=True"):
        MaskSpec(prefix=torch.tensor([2]))
    with pytest.raises(ValueError, match="needs segments"):
        MaskSpec(memory_segments=torch.tensor([[1]]))
    with pytest.raises(ValueError, match="causal attention without segments"):
        build()(inputs(1, 2), MaskSpec(), cache=KVCache())
    with pytest.raises(ValueError, match="max_length 4"):
        build(positions="learned", max_length=4)(inputs(1, 5))
