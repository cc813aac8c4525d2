"""`adapt:` in configurations: hub models and finished runs get adapters; only these learn."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from polytask import cli
from polytask.adapt import load as load_adapters
from polytask.errors import AdaptError, CheckpointError, ConfigError, DataError
from polytask.pipeline import load_config, load_run, train
from polytask.pipeline.adapting import adapters_of
from polytask.pipeline.prepare import prepare

Write = Callable[..., Path]
WORDS = "the a it was great lovely fine awful dull bad red blue green one two three four".split()  # noqa: SIM905


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with a tokenizer, as a hub folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("hub")
    names = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", *WORDS]
    plain = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=plain,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        mask_token="[MASK]",
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(names),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory, hub: Path) -> Write:
    """Files of three tasks of words, and a configuration with changes."""
    import random

    tmp_path = tmp_path_factory.mktemp("adapting")

    draw = random.Random(0)

    def rows(pick: dict[str, list[str]]) -> list[dict[str, str]]:
        found = []
        for i in range(160):
            label = list(pick)[i % len(pick)]
            words = [
                draw.choice(pick[label]),
                *draw.choices(WORDS[:4], k=draw.randint(1, 9)),
                str(i),
            ]
            found.append({"text": " ".join(words), "label": label})
        return found

    tables = {
        "mood": {"good": WORDS[4:7], "bad": WORDS[7:10]},
        "colour": {"warm": ["red"], "cold": ["blue", "green"]},
        "number": {"odd": ["one", "three"], "even": ["two", "four"]},
    }
    for name, pick in tables.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows(pick))))

    def make(name: str, tasks: list[str], **sections: Any) -> Path:
        content: dict[str, Any] = {
            "name": name,
            "tasks": {t: {"data": f"{t}.jsonl", "target": "label"} for t in tasks},
            "model": {"hub": str(hub)},
            "encoding": {"text_length": 20, "vocab_size": 400},
            "train": {"steps": 6, "batch_size": 16, "progress": False, "lr": 0.003},
            "evaluate": {"single_task": False, "max_valid": 0},
            "leaks": None,
        }
        content |= sections
        path = tmp_path / f"{name}.yaml"
        path.write_text(
            yaml.safe_dump({k: v for k, v in content.items() if v != "none"}, sort_keys=False)
        )
        return path

    return make


def go(path: Path, **options: Any) -> Any:
    config = load_config(path)
    return train(config, path.parent / "runs" / config.name, base=path.parent, **options)


@pytest.fixture(scope="module")
def many(write: Write) -> Any:
    """A multitask run with an inventory of adapters, at runs/many."""
    return go(write("many", ["mood", "colour", "number"], adapt=MHR))


@pytest.fixture(scope="module")
def stage1(write: Write) -> Any:
    """A run with one bottleneck adapter a task, at runs/stage1."""
    return go(write("stage1", ["mood", "colour"], adapt={"method": "bottleneck", "reduction": 8}))


MHR = {"method": "mhr", "heads": 4, "modules": 4, "rank": 2}


def bare(hub: Path) -> Any:
    from transformers import BertModel

    return BertModel.from_pretrained(hub, add_pooling_layer=False).eval()


def test_only_adapters_and_heads_learn_and_the_base_stays_as_it_was(many: Any, hub: Path) -> None:
    run = many
    adapters = adapters_of(run.model)
    assert adapters is not None and adapters.tasks == ("mood", "colour", "number")
    assert not any(layer.untrained for layer in adapters.routed().values())
    own = run.model.trunk.model.state_dict()
    for name, tensor in bare(hub).state_dict().items():
        assert torch.equal(own[name], tensor), name
    stage = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    (told,) = [line for line in stage if line.get("event") == "stage"]
    assert told["trained_numbers"] == sum(p.numel() for p in adapters.parameters()) + sum(
        p.numel() for n, p in run.model.named_parameters() if n.startswith("heads.")
    )


def test_the_saved_adapters_fit_the_bare_hub_model(many: Any, hub: Path) -> None:
    run = many
    model = bare(hub)
    adapters = load_adapters(model, run.folder / "model" / "adapters")
    ids = torch.randint(5, 20, (3, 6), generator=torch.Generator().manual_seed(0))
    own = adapters_of(run.model)
    assert own is not None
    with adapters.rows([0, 1, 1]), own.rows([0, 1, 1]), torch.no_grad():
        wanted = run.model.trunk.model(input_ids=ids).last_hidden_state
        assert torch.equal(model(input_ids=ids).last_hidden_state, wanted)


def test_a_mixed_batch_of_many_lengths_equals_one_row_at_a_time(many: Any, write: Write) -> None:
    """Buckets of the trunk are told their own rows' tasks."""
    run, folder = many, many.folder.parents[1]
    rows = [json.loads(line) for line in (folder / "mood.jsonl").read_text().splitlines()[:24]]
    together = run.predict("mood", rows)
    alone = [run.predict("mood", [row])[0] for row in rows]
    for a, b in zip(together, alone):
        assert a["probability"] == pytest.approx(b["probability"], abs=1e-5)
    assert {round(a["probability"], 3) for a in together} != {0.5}


def test_routing_learns_at_its_own_rate(write: Write) -> None:
    prepared = prepare(
        load_config(write("rates", ["mood", "colour"], adapt=MHR)), write("x", ["mood"]).parent
    )
    train_config = prepared.config.train
    assert train_config.lrs["*adapters.tables.*"] == 0.1
    assert "*adapters.tables.*" in train_config.no_decay
    path = write("slow", ["mood", "colour"], adapt={**MHR, "routing_lr": 0.02, "lr": 0.5})
    lrs = prepare(load_config(path), path.parent).config.train.lrs
    assert (lrs["*adapters.tables.*"], lrs["*adapters.layers.*"]) == (0.02, 0.5)


@pytest.mark.parametrize("tune", ["full", "z", "mu", "rand"])
def test_a_run_is_adapted_to_a_new_task_with_a_few_rows(
    tune: str, many: Any, write: Write, hub: Path
) -> None:
    path = write(
        f"few-{tune}",
        ["number"],
        model="none",
        adapt={"from": "runs/many", "tune": tune, "shots": 8},
    )
    run = go(path)
    adapters = adapters_of(run.model)
    assert adapters is not None and adapters.tasks == ("number",)
    ledger = json.loads((run.folder / "ledger.json").read_text())
    assert ledger["tasks"][0]["epochs"] == pytest.approx(6 * 16 / 16)  # 8 of each of two classes
    before = adapters_of(many.model)
    assert before is not None
    same = all(
        torch.equal(a.lora_A, b.lora_A)
        for a, b in zip(adapters.routed().values(), before.routed().values())
    )
    assert same == (tune == "z")
    own = run.model.trunk.model.state_dict()
    assert all(torch.equal(own[n], t) for n, t in bare(hub).state_dict().items())
    assert {a["prediction"] for a in run.predict("number", [{"text": "one"}])} <= {"odd", "even"}
    again = load_run(run.folder)
    first = run.predict("number", [{"text": "the two"}])
    assert again.predict("number", [{"text": "the two"}]) == first


def test_a_plain_multitask_run_is_adapted_with_fresh_adapters(write: Write) -> None:
    sizes = {"dim": 32, "layers": 2, "heads": 4}
    many = go(write("plain", ["mood", "colour"], model=sizes))
    adapt = {"from": "runs/plain", "shots": 8}
    run = go(write("few-plain", ["number"], model="none", adapt=adapt))
    adapters = adapters_of(run.model)
    assert adapters is not None and adapters.config.method == "lora"
    old = dict(many.model.named_parameters())
    for name, tensor in run.model.named_parameters():
        plain = name.replace(".base_layer", "")
        if plain in old and not name.startswith("heads."):
            assert torch.equal(tensor, old[plain]), name
    assert run.predict("number", [{"text": "two"}])


@pytest.mark.parametrize("variant", ["scalearn", "uniform++"])
def test_bottlenecks_of_a_run_become_the_sources_of_a_new_task(
    variant: str, stage1: Any, write: Write
) -> None:
    adapt = {"method": "scalearn", "variant": variant, "sources": ["runs/stage1"]}
    run = go(write(f"few-{variant.strip('+')}", ["number"], adapt=adapt))
    adapters = adapters_of(run.model)
    assert adapters is not None
    assert adapters.banks()[adapters.sites[0]].bank.names == ("colour", "mood")
    record = json.loads((run.folder / "adapters.json").read_text())
    assert record["sources"] == ["colour", "mood"]
    assert len(record["routing"]["weight"]) == (2 if variant == "scalearn" else 1)
    assert (run.folder / "routing.png").is_file()


def test_sources_stay_frozen_even_where_the_base_trains(stage1: Any, write: Write) -> None:
    adapt = {"method": "scalearn", "sources": ["runs/stage1"], "base": "trained"}
    run = go(write("trained", ["number"], adapt=adapt))
    before, after = adapters_of(stage1.model), adapters_of(run.model)
    assert before is not None and after is not None
    for site, layer in after.banks().items():
        kept = before.banks()[site].bank
        assert torch.equal(layer.bank.get("mood")["up"], kept.get("mood")["up"])
    moved = run.model.trunk.model.state_dict()["encoder.layer.0.output.dense.weight"]
    assert not torch.equal(
        moved, stage1.model.trunk.model.state_dict()["encoder.layer.0.output.dense.weight"]
    )


def test_settings_that_an_inherited_method_does_not_read_are_named(
    stage1: Any, many: Any, write: Write
) -> None:
    for name, source, key in (("i1", "stage1", "rank"), ("i2", "many", "reduction")):
        path = write(name, ["number"], model="none", adapt={"from": f"runs/{source}", key: 8})
        with pytest.raises(ConfigError, match=f"'{key}' has no meaning for method"):
            prepare(load_config(path), path.parent)


@pytest.mark.parametrize("method", ["lora", "ia3", "peft-poly", "prompt", "fusion", "task-lora"])
def test_every_other_method_trains_saves_and_predicts(
    method: str, stage1: Any, write: Write
) -> None:
    adapt: dict[str, Any] = {"method": method}
    if method == "peft-poly":
        adapt["heads"] = 4
    if method == "ia3":
        adapt["targets"] = ["query", "value"]
    if method == "fusion":
        adapt["sources"] = ["runs/stage1"]
    run = go(write(f"by-{method}", ["mood", "colour"], adapt=adapt))
    found = load_run(run.folder).predict("mood", [{"text": "the great"}])
    assert found == run.predict("mood", [{"text": "the great"}])


def test_a_prompt_changes_answers_without_changing_lengths(write: Write) -> None:
    run = go(write("prompted", ["mood"], adapt={"method": "prompt", "tokens": 5}))
    adapters = adapters_of(run.model)
    assert adapters is not None
    with_prompt = run.predict("mood", [{"text": "the great"}, {"text": "it was a dull one two"}])
    adapters.detach()
    without = run.predict("mood", [{"text": "the great"}, {"text": "it was a dull one two"}])
    assert [a["probability"] for a in with_prompt] != [a["probability"] for a in without]


def test_the_page_shows_routing_tree_and_alignment(many: Any) -> None:
    run = many
    page = (run.folder / "adapters.html").read_text()
    for name in ("routing", "task-tree", "alignment"):
        assert (run.folder / f"{name}.png").is_file()
    assert "mhr adapters on 12 modules for 3 tasks" in page
    record = json.loads((run.folder / "adapters.json").read_text())
    assert record["alignment"]["tasks"] == ["mood", "colour", "number"]
    weight = torch.tensor(next(iter(record["routing"]["weight"].values())))
    torch.testing.assert_close(weight.sum(-1), torch.ones(3, 4), atol=1e-3, rtol=0)


@pytest.mark.slow
def test_single_task_models_of_an_adapted_run_are_adapted_alike(write: Write) -> None:
    run = go(
        write("alone", ["mood", "colour"], adapt=MHR, evaluate={"resamples": 20, "max_valid": 0})
    )
    assert all(row["single"] is not None for row in run.scores["tasks"])


def test_a_finished_adapted_run_is_found_again(many: Any, write: Write) -> None:
    path = write("many", ["mood", "colour", "number"], adapt=MHR)
    said: list[str] = []
    go(path, say=said.append)
    assert any("is finished" in text for text in said)
    with pytest.raises(CheckpointError, match=r"another configuration .*adapt.* differ"):
        go(write("many", ["mood", "colour", "number"], adapt={**MHR, "rank": 4}))


@pytest.mark.parametrize(
    ("tasks", "sections", "said"),
    [
        (["mood"], {"model": {"dim": 32}, "adapt": MHR}, "nothing pretrained to adapt"),
        (["mood"], {"adapt": {"from": "runs/no", "tune": "z"}, "model": "none"}, "no run folder"),
        (["mood"], {"adapt": {**MHR, "tune": "z"}}, "needs 'adapt.from'"),
        (["mood"], {"adapt": {"method": "lora", "heads": 2}}, "'heads' has no meaning"),
    ],
)
def test_contradictions_are_named(tasks: list[str], sections: Any, said: str, write: Write) -> None:
    with pytest.raises(ConfigError, match=said):
        path = write("wrong", tasks, **sections)
        prepare(load_config(path), path.parent)


def test_what_does_not_fit_the_adapted_run_is_named(many: Any, write: Write) -> None:
    changed = {"from": "runs/many", "rank": 16}
    with pytest.raises(ConfigError, match=r"adapt.rank = 16: the inventory .* has 2"):
        path = write("w1", ["number"], model="none", adapt=changed)
        prepare(load_config(path), path.parent)
    with pytest.raises(ConfigError, match="'model' is that of runs/many"):
        path = write("w2", ["number"], adapt={"from": "runs/many"})
        prepare(load_config(path), path.parent)
    with pytest.raises(ConfigError, match="adapted as such"):
        path = write("w3", ["number"], model="none", adapt={"from": "runs/many", "method": "lora"})
        prepare(load_config(path), path.parent)
    with pytest.raises(DataError, match=r"has \d+ training rows, 500 are asked for"):
        path = write("w4", ["number"], model="none", adapt={"from": "runs/many", "shots": 500})
        prepare(load_config(path), path.parent)
    with pytest.raises(AdaptError, match="holds no bottleneck adapters"):
        adapt = {"method": "scalearn", "sources": ["runs/many"]}
        path = write("w5", ["number"], adapt=adapt)
        prepare(load_config(path), path.parent)


def test_polytask_adapt_prints_scores_and_the_share(
    many: Any, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write("few-cli", ["number"], model="none")
    out = path.parent / "out"
    given = ["adapt", str(path), "--from", str(many.folder), "--tune", "z", "--shots", "8"]
    assert cli.main([*given, "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["adapters"]["share"]["parts"]["tables"] == 12 * 4 * 4
    assert found["scores"]["tasks"][0]["task"] == "number"
    assert cli.main(["adapt", str(path), "--from", str(path.parent / "nowhere")]) == 2
    assert "there is no run folder" in capsys.readouterr().err
