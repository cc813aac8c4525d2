"""Pretraining by tokens seen: exact ledgers, losses against closed forms, and the Trainer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from polytask.errors import NonFiniteError
from polytask.models.lm import LanguageModel, LanguageModelConfig
from polytask.objectives.pairs import Pairs
from polytask.objectives.tokens import token_cross_entropy
from polytask.rng import generator
from polytask.train import FunctionLoader, TrainConfig, Trainer
from polytask.train.batches import StepBatches
from polytask.train.language import LanguageObjective, PretrainConfig, mean_loss, pretrain

V = 11


def model_of(architecture: str = "causal", **given: object) -> LanguageModel:
    options = {"dim": 16, "layers": 1, "heads": 2, "vocab_size": V, **given}
    return LanguageModel(LanguageModelConfig(architecture=architecture, **options), 1)


def counting(step: int, rows: int = 4, length: int = 6) -> Pairs:
    """Chunks that count up: what comes next is certain."""
    first = generator(7, "counting", step).integers(1, V, rows)
    chunks = [[1 + (int(f) + i) % (V - 1) for i in range(length)] for f in first]
    half = length // 2
    source = list(range(rows))
    return Pairs.of([c[:half] for c in chunks], [c[half:] for c in chunks], source=source)


@pytest.mark.parametrize("architecture", ["causal", "prefix", "encdec"])
def test_counting_is_learned_within_the_budget(architecture: str) -> None:
    model = model_of(architecture, dim=32)
    done = pretrain(model, counting, PretrainConfig(tokens=24 * 120, lr=1e-2))
    assert done.tokens == 24 * 120 and done.steps == 120 and done.trained == done.tokens // 2
    assert done.losses[0][1] > 1.5 and done.losses[-1][1] < 0.2


def test_no_more_than_the_budget_is_seen_and_the_ledger_is_exact() -> None:
    done = pretrain(model_of(), counting, PretrainConfig(tokens=100))
    # 24 tokens a step in pairs of 6: four steps, then the 0 pairs that fit into 4 tokens.
    assert (done.tokens, done.steps, done.pairs) == (96, 4, 16)
    more = pretrain(model_of(), counting, PretrainConfig(tokens=110))
    assert (more.tokens, more.steps, more.pairs) == (108, 5, 18)
    assert more.by_source == {0: 30, 1: 30, 2: 24, 3: 24}
    assert sum(more.by_source.values()) == more.tokens


def test_two_runs_of_one_seed_are_the_same_and_dropout_follows_the_seed() -> None:
    def run(seed: int) -> list[float]:
        config = PretrainConfig(tokens=24 * 5, seed=seed)
        return [v for _, v in pretrain(model_of(dropout=0.3), counting, config).losses]

    assert run(0) == run(0) != run(1)


def test_means_by_token_by_pair_and_by_source() -> None:
    pairs = Pairs.of([[1], [2], [3]], [[4, 5, 6, 7], [8], [9, 10]], source=[0, 0, 1])
    weight = np.array([1, 1, 0, 2, 1, 1, 0.5], np.float32)
    pairs = Pairs(*list(vars(pairs).values())[:4], weight=weight, source=pairs.source)
    model = model_of("prefix")
    batch = model.feed(pairs)
    nll = model.token_losses(batch)[0].detach().double().numpy()
    w = weight.astype(float)
    parts = [slice(0, 4), slice(4, 5), slice(5, 7)]
    sums = np.array([(nll[p] * w[p]).sum() for p in parts])
    counts = np.array([w[p].sum() for p in parts])

    def found(**given: object) -> float:
        return float(mean_loss(LanguageObjective(z_loss=0, **given)(model, batch)).detach())

    assert found() == pytest.approx(sums.sum() / counts.sum(), rel=1e-5)
    assert found(mean="sequence") == pytest.approx((sums / counts).mean(), rel=1e-5)
    assert found(mean="sum") == pytest.approx(sums.mean(), rel=1e-5)
    by = sums[:2].sum() / counts[:2].sum() * 2 / 3 + sums[2] / counts[2] / 3
    assert found(by_source=True) == pytest.approx(by, rel=1e-5)


def test_z_loss_and_label_smoothing_against_their_definitions() -> None:
    logits = torch.randn(5, V, dtype=torch.float64)
    label = torch.tensor([0, 3, 10, 3, 1])
    nll, z = token_cross_entropy(logits, label, 0.1)
    target = torch.full((5, V), 0.1 / (V - 1), dtype=torch.float64)
    target[torch.arange(5), label] = 0.9
    log_p = logits.log_softmax(-1)
    kl = (target * (target.log() - log_p)).sum(-1)
    torch.testing.assert_close(nll.double(), kl, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(z.double(), logits.logsumexp(-1) ** 2, rtol=1e-5, atol=1e-5)
    plain, _ = token_cross_entropy(logits, label)
    torch.testing.assert_close(plain.double(), -log_p[torch.arange(5), label], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="smoothing"):
        token_cross_entropy(logits, label, 1.0)


def test_a_loss_that_is_not_finite_stops_before_the_update() -> None:
    model = model_of()
    with torch.no_grad():
        model.embedding.weight[3] = torch.nan
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(NonFiniteError, match="step 1"):
        pretrain(model, counting, PretrainConfig(tokens=100))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) or bool(value.isnan().any())


def test_the_trainer_takes_the_same_objective_and_takes_the_same_steps(tmp_path: Path) -> None:
    tasks = ("a", "b", "c", "d")
    config = TrainConfig(
        steps=6, lr=1e-3, schedule="constant", warmup=0, weight_decay=0, betas=(0.9, 0.98),
        progress=False, log_every=2,
    )  # fmt: skip
    trained = model_of()
    loader = FunctionLoader(tasks, lambda i: trained.feed(counting(i)))
    result = Trainer(trained, loader, config, tmp_path, objective=LanguageObjective()).fit()
    assert result.step == 6
    mine = model_of()
    pretrain(mine, counting, PretrainConfig(tokens=24 * 6, warmup=0))
    for (name, a), b in zip(trained.state_dict().items(), mine.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)
    lines = (tmp_path / "metrics.jsonl").read_text()
    assert '"tokens_per_s"' in lines and '"nll"' in lines


def test_steps_book_pairs_and_tokens_by_source() -> None:
    model = model_of("encdec")
    parts = StepBatches([model.feed(counting(0)), model.feed(counting(1))], torch.device("cpu"))
    assert (parts.rows, parts.tokens) == (8, 48)
    pairs, (source, tokens) = parts.seen()
    assert pairs.tolist() == source.tolist() == [0, 1, 2, 3] * 2
    assert tokens.tolist() == [6] * 8
