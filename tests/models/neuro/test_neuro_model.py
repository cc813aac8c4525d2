"""The trunk against a slow reference, its causality by gradients, and padding that is not seen."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import neuro_examples as make
import numpy as np
import pytest
import torch
from torch import Tensor

from polytask.errors import DataError
from polytask.models.neuro import NeuroformerModel, Trace
from polytask.models.neuro.stack import NeuroBlock
from polytask.models.neuro.stems import TimeSinusoid, grid_code, row_code


def norm(x: Any, layer: Any) -> Any:
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-5) * array(layer.weight) + array(layer.bias)


def array(t: Tensor) -> Any:
    return t.detach().double().numpy()


def linear(x: Any, layer: Any) -> Any:
    return x @ array(layer.weight).T + (0 if layer.bias is None else array(layer.bias))


def gelu(x: Any) -> Any:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def block(layer: NeuroBlock, q: Any, kv: Any, seen: Any) -> Any:
    """One window, head by head and query by query; `seen(i, j)` says who looks at whom."""
    a = layer.attention
    query, key, value = (
        linear(norm(q, layer.norm1), a.query),
        linear(kv, a.key),
        linear(kv, a.value),
    )
    width = q.shape[1] // a.heads
    mixed = np.zeros_like(q)
    for h in range(a.heads):
        part = slice(h * width, (h + 1) * width)
        for i in range(len(q)):
            js = [j for j in range(len(kv)) if seen(i, j)]
            score = np.array([query[i, part] @ key[j, part] / math.sqrt(width) for j in js])
            share = np.exp(score - score.max())
            share /= share.sum()
            mixed[i, part] = sum(w * value[j, part] for w, j in zip(share, js))
    x = q + linear(mixed, a.out)
    x = x + linear(gelu(linear(norm(x, layer.norm2), layer.up)), layer.down)
    return norm(x, layer.norm)


def sinusoid(x: float, dim: int) -> Any:
    out = np.zeros(dim)
    for k in range(dim // 2):
        f = 10000.0 ** (-2 * k / dim)
        out[2 * k], out[2 * k + 1] = math.sin(x * f), math.cos(x * f)
    return out


def slow(model: NeuroformerModel, batch: Any, row: int) -> Any:
    """Logits of one window's valid tokens, from past, one group of variables and itself."""
    c, table = model.config, array(model.table.weight)

    def embed(stem: Any, ids: Any, times: Any) -> Any:
        return np.stack(
            [
                table[i] + sinusoid(t, c.dim) + array(stem.place)[0, n]
                for n, (i, t) in enumerate(zip(ids.tolist(), times.tolist()))
            ]
        )

    kept = (batch.ids[row, :-1] != c.pad).nonzero()[:, 0]
    x = embed(model.now, batch.ids[row][kept], batch.times[row][kept])
    there = (batch.past_ids[row] != c.pad).nonzero()[:, 0]
    past = embed(model.past, batch.past_ids[row][there], batch.past_times[row][there])
    for layer in model.encoder:
        x = block(layer, x, x, lambda i, j: j <= i)
    for layer in model.stack.cross["past"]:
        x = block(layer, x, past, lambda i, j: True)
    for group in c.groups:
        tokens = []
        for name in group.variables:
            stem = model.scalars[name]
            for v, o in zip(batch.behavior[name][row].tolist(), batch.offset[name][row].tolist()):
                tokens.append(linear(gelu(linear(np.array([v]), stem.up)), stem.down)
                              + sinusoid(o, c.dim))  # fmt: skip
        half = c.dim // 2
        for n, token in enumerate(tokens):
            tokens[n] = token + np.concatenate([sinusoid(n, half), sinusoid(0, half)])
        for layer in model.stack.cross[group.name]:
            x = block(layer, x, np.stack(tokens), lambda i, j: True)
    for layer in model.stack.state:
        x = block(layer, x, x, lambda i, j: j <= i)
    return linear(x, model.head_id), linear(x, model.head_time), x.mean(0)


def test_the_forward_pass_equals_a_loop_over_heads_queries_and_keys() -> None:
    config = make.rich(video=None, align=())
    model, batch = make.moved(config), make.batch(full=True)
    with torch.no_grad():
        out = model(batch)
    for row in range(len(batch)):
        ids, times, mean = slow(model, batch, row)
        assert np.abs(array(out.ids[row, : len(ids)]) - ids).max() < 2e-4
        assert np.abs(array(out.times[row, : len(ids)]) - times).max() < 2e-4
        speed = linear(mean, model.heads["speed"])
        assert model.answer(out, "speed")[row].item() == pytest.approx(float(speed[0]), abs=2e-4)


@pytest.mark.parametrize("config", [make.small(), make.rich(), make.rich(official=True)])
def test_no_logit_depends_on_a_later_token(config: Any) -> None:
    model, batch = make.moved(config), make.batch((6, 6), full=True)
    held: list[Tensor] = []

    def keep(_: Any, __: Any, output: Tensor) -> Tensor:
        held.append(output)
        output.retain_grad()
        return output

    hook = model.now.register_forward_hook(keep)
    out = model(batch)
    hook.remove()
    for t in range(out.ids.shape[1]):
        total = out.ids[:, t].square().sum() + out.times[:, t].square().sum()
        (gradient,) = torch.autograd.grad(total, held[0], retain_graph=True)
        size = gradient.abs().amax(-1)  # (B, L)
        assert (size[:, t + 1 :] == 0).all()
        assert (size[:, : t + 1] > 0).all()


def test_a_window_gives_the_same_alone_and_in_a_batch_and_without_padding() -> None:
    model, batch = make.moved(make.rich()), make.batch(full=True)
    out = model(batch)
    assert batch.take(torch.tensor([0])).trimmed(make.UNITS + 2).ids.shape[1] == 6
    for row, count in enumerate((3, 0, 6, 1)):
        alone = batch.take(torch.tensor([row])).trimmed(make.UNITS + 2)
        one = model(alone)
        used = count + 1
        assert torch.allclose(one.ids[0, :used], out.ids[row, :used], atol=1e-5)
        assert torch.allclose(model.answer(one, "speed")[0], model.answer(out, "speed")[row],
                              atol=1e-5)  # fmt: skip


def test_padding_of_the_past_is_seen_only_without_the_mask() -> None:
    batch = make.batch((3, 2))
    for mask, same in ((True, True), (False, False)):
        model = make.moved(make.small(mask_pad=mask))
        before = model(batch).ids
        other = replace(
            batch, past_times=batch.past_times.masked_fill(batch.past_ids == make.UNITS + 2, 0)
        )
        assert torch.allclose(model(other).ids, before) is same


def test_a_window_without_any_visible_past_gets_none_of_it() -> None:
    model = make.moved(make.small())
    batch = make.batch((3, 2))
    ids = batch.past_ids.clone()
    ids[0] = make.UNITS + 2
    out = model(replace(batch, past_ids=ids))
    assert out.ids.isfinite().all()
    out.ids.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    other = replace(batch, past_ids=ids, past_times=torch.zeros_like(batch.past_times))
    assert torch.equal(model(other).ids[0], out.ids[0])


def test_absent_modalities_are_skipped() -> None:
    model, batch = make.moved(make.rich()), make.batch(full=True)
    bare = replace(batch, frames=None, behavior={}, offset={})
    out, trace = model(bare), Trace()
    model(bare, trace)
    assert set(trace.weights) == {"past", "state"}
    assert not torch.allclose(out.ids, model(batch).ids)


def test_weights_on_request_change_nothing_and_sum_to_one() -> None:
    model, batch = make.moved(make.rich()), make.batch(full=True)
    trace = Trace()
    with_trace, without = model(batch, trace), model(batch)
    assert torch.allclose(with_trace.ids, without.ids, atol=1e-5)
    assert {n: len(w) for n, w in trace.weights.items()} == {
        "past": 2, "video": 2, "body": 1, "world": 2, "state": 1
    }  # fmt: skip
    for stage in trace.weights.values():
        for weights in stage:
            assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)
    past = trace.weights["past"][0]
    hidden = (batch.past_ids == make.UNITS + 2)[:, None, None].expand_as(past)
    assert (past[hidden] == 0).all() and hidden.any()


@pytest.mark.parametrize("config", [make.small(), make.rich(), make.rich(official=True)])
def test_token_by_token_equals_the_whole_window(config: Any) -> None:
    model, batch = make.moved(config), make.batch((6, 6, 6), full=True)
    with torch.no_grad():
        out, state = model(batch), model.start(batch)
        for t in range(7):
            ids, times = model.advance(state, batch.ids[:, t], batch.times[:, t])
            assert torch.allclose(ids, out.ids[:, t], atol=1e-4)
            assert torch.allclose(times, out.times[:, t], atol=1e-4)
        state = model.start(batch)
        model.advance(state, batch.ids[:, 0], batch.times[:, 0])
        rows = torch.tensor([2, 0])
        state.select(rows)
        ids, _ = model.advance(state, batch.ids[rows, 1], batch.times[rows, 1])
        assert torch.allclose(ids, out.ids[rows, 1], atol=1e-4)


def test_the_sinusoid_and_its_grids() -> None:
    code = TimeSinusoid(8)(torch.tensor([0.0, 1.0, 37.0]))
    for row, x in zip(code, (0.0, 1.0, 37.0)):
        assert np.allclose(row.numpy(), sinusoid(x, 8), atol=1e-5)
    grid = grid_code((2, 3, 4), 12, torch.device("cpu"))
    assert grid.shape == (2, 3, 4, 12)
    assert (grid[:, 0, 0, :4] == grid[:, 2, 3, :4]).all()  # time alone
    assert (grid[0, :, 0, 4:8] == grid[1, :, 3, 4:8]).all()
    assert len({tuple(v.tolist()) for v in grid.reshape(-1, 12)}) == 24  # no two places alike
    assert row_code(5, 16, torch.device("cpu")).shape == (5, 16)


def test_initial_values() -> None:
    model = NeuroformerModel(make.rich(dim=64))
    assert model.table.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert model.encoder[0].up.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert (model.encoder[0].up.bias == 0).all() and (model.now.place == 0).all()
    again = NeuroformerModel(make.rich(dim=64))
    assert torch.equal(again.head_id.weight, model.head_id.weight)
    bare = NeuroformerModel(make.small(dim=64))  # a modality more moves nothing else
    assert torch.equal(bare.head_id.weight, model.head_id.weight)


def test_frames_of_another_size_are_named() -> None:
    model, batch = make.moved(make.rich()), make.batch(full=True)
    with pytest.raises(DataError, match=r"\(4, 5, 6\).*\(4, 6, 6\)"):
        model(replace(batch, frames=batch.frames[:, :, :5]))


def test_bfloat16_is_close() -> None:
    model, batch = make.moved(make.rich()), make.batch(full=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(batch)
    assert (low.ids.float().softmax(-1) - model(batch).ids.softmax(-1)).abs().max() < 0.15
