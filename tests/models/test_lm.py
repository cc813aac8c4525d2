"""Language models: who sees whom is checked by gradients, scores against slow references."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polytask.errors import ConfigError, DataError, UserError
from polytask.models.feed import ARCHITECTURES, Architecture, LanguageBatch, feed
from polytask.models.lm import LanguageModel, LanguageModelConfig
from polytask.models.masks import MaskSpec
from polytask.objectives.pairs import Pairs

VOCABULARY = 23
KINDS = [
    {"positions": "rope"},
    {"positions": "learned", "norm": "rms"},
    {"positions": "none", "gated": True},
    {"positions": "relative", "kv_heads": 2},
    {"positions": "relative", "relative_tables": "layer", "relative_bidirectional": True},
]


def model_of(architecture: Architecture, **given: object) -> LanguageModel:
    options = {"dim": 16, "layers": 2, "heads": 4, "vocab_size": VOCABULARY, **given}
    return LanguageModel(LanguageModelConfig(architecture=architecture, **options), 3).double()


def pairs_of(sizes: list[tuple[int, int]], seed: int = 0) -> Pairs:
    rng = np.random.default_rng(seed)
    make = lambda n: rng.integers(1, VOCABULARY, n)
    return Pairs.of([make(a) for a, _ in sizes], [make(b) for _, b in sizes])


THREE = [(5, 4), (2, 6), (7, 1)]


def losses(model: LanguageModel, batch: LanguageBatch) -> dict[tuple[int, int], float]:
    """-log p by (pair, place of the token among the pairs' targets)."""
    nll, _ = model.token_losses(batch)
    return {
        (p, t): value
        for p, t, value in zip(
            batch.pair.tolist(), batch.target.tolist(), nll.tolist(), strict=True
        )
    }


def test_the_mask_of_the_worked_example() -> None:
    # Two packed examples [6, 7] -> [8] and [3, 4] -> [5], flags on the two prefix slots only.
    mask = MaskSpec(
        causal=True,
        prefix=torch.tensor([[1, 1, 0, 1, 1, 0, 0]]).bool(),
        segments=torch.tensor([[0, 0, 0, 1, 1, 1, -1]]),
    )
    seen, plain = mask.attention(7, torch.device("cpu"))
    assert not plain and seen is not None
    found = [[int(i) + 1 for i in row.nonzero()] for row in seen[0, 0][:6]]
    assert found == [[1, 2], [1, 2], [1, 2, 3], [4, 5], [4, 5], [4, 5, 6]]
    assert seen[0, 0, 6].tolist() == [False] * 6 + [True]  # padding: itself alone, so no NaN


def test_feeding_shifts_right_by_segment_and_the_prefix_takes_one_slot_more() -> None:
    batch = feed(Pairs.of([[6, 7], [3, 4]], [[8], [5]]), "prefix", 7)
    assert batch.ids.tolist() == [[0, 6, 7, 0, 3, 4]]
    assert batch.label.tolist() == [8, 5] and batch.slot.tolist() == [2, 5]
    assert batch.segments is not None and batch.segments.tolist() == [[0, 0, 0, 1, 1, 1]]
    assert batch.positions is not None and batch.positions.tolist() == [[0, 1, 2, 0, 1, 2]]
    assert batch.prefix is not None and batch.prefix.tolist() == [[True] * 6]
    assert (batch.tokens, batch.rows, batch.efficiency) == (6, 2, 1.0)


def test_feeding_without_bos_leaves_the_first_token_of_a_chunk_unscored() -> None:
    batch = feed(Pairs.of([[], [3, 4]], [[8, 9, 7], [5]]), "prefix", bos=None, pack=False)
    assert batch.ids.tolist() == [[8, 9], [3, 4]]
    assert batch.label.tolist() == [9, 7, 5] and batch.target.tolist() == [1, 2, 3]
    assert batch.prefix is not None and batch.prefix.tolist() == [0, 2]


def test_feeding_an_encoder_decoder_packs_both_sides_together() -> None:
    pairs = Pairs.of([[1, 2, 3], [], [4]], [[5], [6, 7], [8, 9, 10]])
    batch = feed(pairs, "encdec", (4, 4))
    assert batch.memory_ids is not None and batch.memory_segments is not None
    assert batch.memory_ids.tolist() == [[1, 2, 3, 4], [0, 0, 0, 0]]
    assert batch.memory_segments.tolist() == [[0, 0, 0, 1], [-1, -1, -1, -1]]
    assert batch.ids.tolist() == [[0, 0, 8, 9], [0, 6, 0, 0]]
    assert batch.label.tolist() == [5, 6, 7, 8, 9, 10]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_packed_pair_scores_as_it_does_alone(
    architecture: Architecture, kind: dict[str, object]
) -> None:
    model, pairs = model_of(architecture, **kind), pairs_of(THREE)
    packed = feed(pairs, architecture, 30)
    assert len(packed.ids) == 1
    together = losses(model, packed)
    padded = losses(model, feed(pairs, architecture, pack=False))
    assert together == pytest.approx(padded, abs=1e-9)
    for index in range(3):
        alone = losses(model, feed(pairs.take([index]), architecture))
        mine = [value for (p, _), value in together.items() if p == index]
        assert list(alone.values()) == pytest.approx(mine, abs=1e-9)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_target_leaks_into_its_own_loss_and_no_pair_into_another(
    architecture: Architecture, kind: dict[str, object]
) -> None:
    """d loss(target t) / d embedding of a fed token is 0 for targets >= t and for other pairs,
    and not 0 for what the architecture lets it see."""
    model, pairs = model_of(architecture, **kind), pairs_of(THREE)
    batch = feed(pairs, architecture, 30)
    inputs = {"ids": batch.ids, "memory_ids": batch.memory_ids}
    leaves: dict[str, torch.Tensor] = {}
    plain = model.embedding.forward

    def watched(ids: torch.Tensor) -> torch.Tensor:
        name = next(n for n, value in inputs.items() if ids is value)
        leaves[name] = plain(ids).detach().requires_grad_()
        return leaves[name]

    model.embedding.forward = watched  # type: ignore[method-assign]
    nll, _ = model.token_losses(batch)
    # What every fed slot holds: (pair, side, place in its side); bos is None.
    starts = np.concatenate([[0], np.cumsum(pairs.target_lengths)])
    owner = owners(batch, pairs)
    for row in range(len(nll)):
        p = int(batch.pair[row])
        t = int(batch.target[row] - starts[p])
        found = torch.autograd.grad(nll[row], list(leaves.values()), retain_graph=True)
        for name, gradient in zip(leaves, found, strict=True):
            sizes = gradient.abs().sum(-1).flatten().tolist()
            for slot, (pair, side, place) in enumerate(owner[name]):
                seen = sizes[slot] > 0
                if pair != p or (side == "target" and place >= t):
                    assert not seen, f"{name} {slot} ({pair}, {side}, {place}) leaks into {p}, {t}"
                elif side in ("input", "target"):
                    assert seen, f"{name} {slot} ({side} {place}) is hidden from target {t}"


def owners(batch: LanguageBatch, pairs: Pairs) -> dict[str, list[tuple[int, str, int]]]:
    """What every slot holds, written out slowly; the pairs stand in order in one row."""
    out: dict[str, list[tuple[int, str, int]]] = {"ids": []}
    for p in range(len(pairs)):
        out["ids"].append((p, "bos", 0))
        if batch.architecture != "encdec":
            out["ids"] += [(p, "input", i) for i in range(int(pairs.input_lengths[p]))]
        out["ids"] += [(p, "target", i) for i in range(int(pairs.target_lengths[p]) - 1)]
    if batch.memory_ids is not None:
        out["memory_ids"] = [
            (p, "input", i) for p in range(len(pairs)) for i in range(int(pairs.input_lengths[p]))
        ]
    return out


def test_only_a_prefix_decoder_reads_its_input_in_both_directions() -> None:
    """Changing the last input token changes what the first input slot becomes, or does not."""
    for architecture, expected in (("causal", False), ("prefix", True)):
        model = model_of(architecture)
        states = []
        for last in (5, 6):
            batch = model.feed(Pairs.of([[2, 3, last]], [[7, 8]]))
            states.append(model.hidden(batch)[0, 1])
        assert bool((states[0] != states[1]).any()) is expected


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_target_without_an_input_is_full_language_modelling(architecture: Architecture) -> None:
    model = model_of(architecture)
    ids = [4, 9, 2, 11, 3]
    batch = model.feed(Pairs.of([[]], [ids]))
    nll, z = model.token_losses(batch)
    # One token at a time: the last slot's logits of every beginning.
    for t, label in enumerate(ids):
        memory = None
        if architecture == "encdec":
            memory = torch.zeros(1, 1, 16).double()
        mask = MaskSpec(causal=True, memory_length=None if memory is None else torch.tensor([0]))
        states = model.decode(torch.tensor([[0, *ids[:t]]]), mask, memory=memory)
        logits = model.scorer()(states[0, -1].double()).double()
        assert float(nll[t]) == pytest.approx(float(-logits.log_softmax(-1)[label]), abs=1e-5)
        assert float(z[t]) == pytest.approx(float(logits.logsumexp(-1)) ** 2, abs=1e-4)


@given(
    sizes=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=12),
    architecture=st.sampled_from(ARCHITECTURES),
    pack=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_every_target_token_is_scored_once_wherever_it_lies(
    sizes: list[tuple[int, int]], architecture: Architecture, pack: bool, seed: int
) -> None:
    pairs = pairs_of(sizes, seed)
    batch = feed(pairs, architecture, 20 if pack else None, pack=pack)
    assert batch.target.tolist() == list(range(len(pairs.target_ids)))
    assert batch.label.tolist() == pairs.target_ids.tolist()
    assert batch.tokens == sum(a + b for a, b in sizes)
    assert len(set(batch.slot.tolist())) == len(batch.slot)
    flat = batch.ids.flatten()
    start = 0
    for p, (a, b) in enumerate(sizes):
        slots = batch.slot[start : start + b].tolist()
        assert slots == list(range(slots[0], slots[0] + b))
        before = flat[slots[0] - (0 if architecture == "encdec" else a) : slots[0] + b].tolist()
        side = [] if architecture == "encdec" else pairs.input(p).tolist()
        assert before == [0, *side, *pairs.target(p).tolist()[:-1]]
        start += b
    # A segment has as many slots as it has tokens: bos comes in, the last one is not fed.
    assert batch.efficiency == pytest.approx(batch.tokens / batch.slots)


def test_faults_of_what_is_fed_are_named() -> None:
    with pytest.raises(DataError, match=r"pair 1 takes 9 tokens, more than the width 8"):
        feed(pairs_of([(2, 2), (4, 5)]), "causal", 8)
    with pytest.raises(DataError, match="pair 1 takes 5 target tokens"):
        feed(pairs_of([(2, 2), (4, 5)]), "encdec", (8, 4))
    with pytest.raises(DataError, match="no pairs"):
        feed(Pairs.of([], []), "causal")
    with pytest.raises(DataError, match="pair 0 has nothing to feed"):
        feed(Pairs.of([[]], [[4]]), "causal", bos=None)
    with pytest.raises(DataError, match="pair 1 has no target"):
        feed(Pairs.of([[1], [2]], [[3], []]), "encdec")
    with pytest.raises(ConfigError, match="'decoder': one of causal, prefix, encdec"):
        feed(pairs_of(THREE), "decoder")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="give bos"):
        feed(pairs_of(THREE), "encdec", bos=None)
    with pytest.raises(ValueError, match="bos_id 40 is outside"):
        LanguageModelConfig(vocab_size=20, bos_id=40)
    model = model_of("causal", positions="learned", max_length=4)
    with pytest.raises(ValueError, match="longer than max_length 4"):
        model.logits(model.feed(pairs_of(THREE)))


def test_scaled_logits_and_tied_embeddings_follow_t5() -> None:
    config = LanguageModelConfig.t5_like(vocab_size=VOCABULARY, dim=16, layers=1, heads=2)
    model = LanguageModel(config, 0)
    assert float(model.embedding.weight.detach().std()) == pytest.approx(1.0, abs=0.1)
    batch = model.feed(pairs_of(THREE))
    states = model.hidden(batch).flatten(0, 1)[batch.slot]
    expected = states @ model.embedding.weight.T / 4.0
    torch.testing.assert_close(model.logits(batch), expected)
    untied = LanguageModel(config.model_copy(update={"tie": False}), 0)
    assert untied.output is not None
    assert len(untied.state_dict()) == len(model.state_dict()) + 1


def test_every_layer_may_have_its_own_relative_table() -> None:
    own = model_of("causal", positions="relative", relative_tables="layer")
    shared = model_of("causal", positions="relative")
    assert own.decoder.relative is not None and shared.decoder.relative is not None
    table, one = own.decoder.relative.bias.weight, shared.decoder.relative.bias.weight
    assert table.shape == (32, 8) and one.shape == (32, 4)
    batch = own.feed(pairs_of(THREE))
    with torch.no_grad():
        shared.load_state_dict({**own.state_dict(), "decoder.relative.bias.weight": one.clone()})
        table.copy_(torch.cat((one, one), 1))
    torch.testing.assert_close(own.logits(batch), shared.logits(batch))
    with torch.no_grad():
        table[:, 4:] += torch.randn(32, 4)
    assert not torch.allclose(own.logits(batch), shared.logits(batch))


def test_a_future_key_of_a_prefix_has_the_bucket_of_distance_nought_unless_both_ways() -> None:
    for both, same in ((False, True), (True, False)):
        model = model_of("prefix", positions="relative", relative_bidirectional=both)
        assert model.decoder.relative is not None
        bucket = model.decoder.relative.bucket(torch.tensor([-1, 0, 1, 5]))
        assert bool((bucket[2:] == bucket[1]).all()) is same


def test_a_saved_model_is_the_same_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    model = model_of("encdec").float()
    model.save(tmp_path / "m")
    again = LanguageModel.load(tmp_path / "m")
    assert again.config == model.config
    batch = model.feed(pairs_of(THREE))
    torch.testing.assert_close(again.logits(batch), model.logits(batch), rtol=0, atol=0)
    (tmp_path / "m" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json"):
        LanguageModel.load(tmp_path / "m")


def test_it_runs_in_bf16() -> None:
    model = model_of("prefix").float()
    batch = model.feed(pairs_of(THREE), 30)
    full, _ = model.token_losses(batch)
    with torch.autocast("cpu", torch.bfloat16):
        low, _ = model.token_losses(batch)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, full, rtol=0.03, atol=0.03)
