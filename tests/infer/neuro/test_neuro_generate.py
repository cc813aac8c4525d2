"""Drawn activity: filters, the cache against whole windows, free runs, ensembles, slips."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import neuro_examples as make
import neuro_recordings as rec
import numpy as np
import pytest
import torch

from polytask.errors import ConfigError, UserError
from polytask.infer.neuro.generate import Draw, EventGenerator, filtered, pick, turned_round
from polytask.infer.neuro.runs import free_run

INF = float("-inf")


def moved(neuro: Any, scale: float = 0.15, seed: int = 0) -> Any:
    """Weights away from their start, so that windows differ."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in neuro.model.parameters():
            p.add_(scale * torch.randn(p.shape, generator=g))
    return neuro


def test_filters_keep_the_likely() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert (filtered(logits, 2) > INF).tolist() == [[True, True, False, False]]
    assert (filtered(logits, 0, 0.5) > INF).tolist() == [[True, False, False, False]]
    assert (filtered(logits, 0, 0.6) > INF).tolist() == [[True, True, False, False]]
    assert (filtered(logits, 0, 1.0) > INF).all()
    assert (filtered(logits, 9, 1e-9) > INF).tolist() == [[True, False, False, False]]


def test_drawn_classes_have_their_shares() -> None:
    share = torch.tensor([0.5, 0.0, 0.3, 0.2])
    uniform = (torch.arange(1000) + 0.5) / 1000
    for heat in (1.0, 0.5):
        found = pick(share.log().expand(1000, 4), uniform.double(), heat, False)
        wanted = share ** (1 / heat) / (share ** (1 / heat)).sum()
        assert torch.allclose(torch.bincount(found, minlength=4) / 1000, wanted, atol=2e-3)
    assert pick(share.log()[None], torch.tensor([0.99]), 1.0, True).item() == 0


@pytest.mark.parametrize("draw", [{}, {"greedy": True}, {"top_k": 3, "time_top_p": 0.7,
                                                          "temperature": 1.5}])  # fmt: skip
@pytest.mark.parametrize("changes", [{}, rec.EVERYTHING])
def test_the_cache_draws_what_whole_windows_draw(changes: Any, draw: Any) -> None:
    neuro = moved(rec.neuro(**changes))
    fast = neuro.generate(trials=2, true_past=True, **draw)
    slow = neuro.generate(trials=2, true_past=True, cached=False, **draw)
    assert np.array_equal(fast.ids, slow.ids) and np.array_equal(fast.times, slow.times)
    assert fast.counts.sum() > 50


def test_spikes_follow_a_plain_loop() -> None:
    """Greedy, one window at a time, straight from the model's logits."""
    neuro = moved(rec.neuro())
    tok, rows = neuro.windows.tokenizer, neuro.indices("test")[:12]
    found = neuro.generate(rows, true_past=True, greedy=True)
    for n, row in enumerate(rows):
        batch = neuro.store.batch(np.array([row]))
        ids, times = [tok.sos], [0]
        while len(ids) < tok.block - 1:
            now = replace(batch, ids=torch.tensor([[*ids, 0]]), times=torch.tensor([[*times, 0]]))
            out = neuro.model(now)
            order = [i for i in out.ids[0, -1].argsort(descending=True).tolist() if i != tok.sos]
            if order[0] >= tok.eos:
                break
            ids.append(order[0])
            times.append(int(out.times[0, -1, : tok.window_bins].argmax()))
        real = found.ids[0, n] < tok.n_units
        assert found.ids[0, n][real].tolist() == ids[1:]
        assert found.times[0, n][real].tolist() == times[1:]


def test_a_window_does_not_depend_on_its_company_or_on_trials() -> None:
    neuro = moved(rec.neuro())
    rows = neuro.indices("test")
    together = neuro.generate(rows, trials=3, true_past=True)
    alone = neuro.generate(rows[5:6], trials=1, true_past=True)
    assert np.array_equal(together.ids[0, 5], alone.ids[0, 0])
    assert not np.array_equal(together.ids[0], together.ids[1])


def test_a_free_run_reads_its_own_spikes() -> None:
    neuro = moved(rec.neuro())
    tok, rows = neuro.windows.tokenizer, neuro.indices("test")[:30]
    seen: list[Any] = []
    generator = EventGenerator([neuro.model], tok, Draw())
    whole = generator.windows

    def watch(batch: Any, seed: int, trial: Any) -> Any:
        seen.append(batch)
        return whole(batch, seed, trial)

    generator.windows = watch  # type: ignore[method-assign]
    ids, times = free_run(generator, neuro.store, rows, 2, 0, horizon=10)
    assert len(seen) == 10 and all(len(b) == 3 * 2 for b in seen)  # three chains, two trials
    starts = neuro.windows.starts[rows]
    for number, batch in enumerate(seen):
        for line in range(6):
            chain, trial = line // 2, line % 2
            place = chain * 10 + number
            past_ids, past_times = batch.past_ids[line].tolist(), batch.past_times[line].tolist()
            if number == 0:  # the record
                true = neuro.windows.batch(rows[place : place + 1])
                wanted = list(zip(true.past_ids[0].tolist(), true.past_dts[0].tolist()))
            else:
                drawn = zip(times[trial, place - 1].tolist(), ids[trial, place - 1].tolist())
                spikes = sorted((t, u) for t, u in drawn if u < tok.n_units)
                wanted = [(tok.sos, 0), *((u, t) for t, u in spikes), (tok.eos, tok.dt_eos)]
            real = [(u, t) for u, t in zip(past_ids, past_times) if u != tok.pad]
            assert real == [pair for pair in wanted if pair[0] != tok.pad]
    assert starts[1] - starts[0] == tok.window_bins == tok.prev_bins


def test_spikes_have_absolute_bins_inside_their_windows() -> None:
    neuro = moved(rec.neuro())
    found = neuro.generate("test", trials=2, horizon=7)
    assert (found.step >= found.starts[0]).all()
    assert (found.step < found.starts[-1] + found.window_bins).all()
    table = np.zeros_like(found.counts)
    window = np.searchsorted(found.starts, found.step, side="right") - 1
    np.add.at(table, (found.trial, window, found.unit), 1)
    assert np.array_equal(table, found.counts)
    unit, step = found.spikes(1)
    assert len(unit) == (found.trial == 1).sum() and (np.diff(step) >= 0).all()


def test_an_ensemble_averages_logits() -> None:
    one, two = moved(rec.neuro(), seed=1), moved(rec.neuro(), seed=2)
    both = one.generate(true_past=True, ensemble=[two])
    assert np.array_equal(both.ids, two.generate(true_past=True, ensemble=[one]).ids)
    assert not np.array_equal(both.ids, one.generate(true_past=True).ids)
    generator = EventGenerator([one.model, two.model], one.windows.tokenizer, Draw())
    a, b = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.allclose(generator.mixed([(a, b), (b, a)])[0], (a + b) / 2)
    last = EventGenerator([one.model] * 2, one.windows.tokenizer, Draw(official=True))
    assert last.mixed([(a, b), (b, a)])[0] is b  # the published code: the last one's


def sos_lover() -> Any:
    """A model that draws SOS whenever it may: its row of the head points along the states."""
    neuro = rec.neuro()
    with torch.no_grad():
        neuro.model.head_id.weight.zero_()
        for block in neuro.model.stack.state:
            block.norm.bias.fill_(5.0)
        neuro.model.head_id.weight[neuro.windows.tokenizer.sos] = 1.0
        neuro.model.head_id.weight[2] = 0.5
    return neuro


def test_start_tokens_are_forbidden_and_in_the_published_code_repeat_the_unit_before() -> None:
    neuro = sos_lover()
    sos = neuro.windows.tokenizer.sos
    ours = neuro.generate(true_past=True, greedy=True)
    real = ours.ids[0][ours.ids[0] < sos]
    assert (real == 2).all() and len(real)
    theirs = neuro.generate(true_past=True, greedy=True, official=True)
    assert (theirs.ids[0, :, 1] == sos).all()  # the id before SOS is SOS


def test_the_published_codes_past_and_times() -> None:
    batch = make.batch((3, 2))
    turned = turned_round(batch, make.UNITS)
    assert (turned.past_times.diff(dim=1) <= 0).all()
    assert turned.past_ids[0, 0] == make.UNITS + 2 and turned.past_ids[0, -1] == make.UNITS
    assert turned.past_ids.sort(1).values.equal(batch.past_ids.sort(1).values)
    neuro = moved(rec.neuro())
    ours = neuro.generate("test", true_past=True)
    theirs = neuro.generate("test", true_past=True, official=True)
    assert theirs.step.min() >= ours.starts[0] + neuro.windows.tokenizer.window_bins
    free = neuro.generate("test", official=True)
    ahead = neuro.generate("test", true_past=True, official=True)
    assert np.array_equal(free.ids[0, 0], ahead.ids[0, 0])  # the first window is not turned
    assert not np.array_equal(free.ids, ahead.ids)


def test_mistakes_are_named() -> None:
    neuro = rec.neuro()
    for changes, said in (
        ({"temperature": 0.0}, "temperature = 0.0"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"temprature": 1.0}, "Did you mean 'temperature'"),
    ):
        with pytest.raises(ConfigError, match=said):
            neuro.generate(**changes)
    with pytest.raises(UserError, match="trials = 0"):
        neuro.generate(trials=0)
    other = rec.neuro(block=20)
    with pytest.raises(ConfigError, match="differ in units, times, block"):
        neuro.generate(ensemble=[other])
