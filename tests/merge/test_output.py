"""The folder of a merge loads with `from_pretrained`, whatever the architecture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from merge_samples import bert, llama, near, plan_of, save, some_state, state_folder, tuned
from safetensors.torch import load_file

from polytask.errors import MergeError
from polytask.merge import merge_state_dicts
from polytask.merge.config import read_recipe
from polytask.merge.output import load_with_head, write
from polytask.merge.plan import make_plan


def family(home: Path, model: torch.nn.Module, **options: object) -> dict[str, torch.nn.Module]:
    models = {"base": model, "a": tuned(model, 1), "b": tuned(model, 2)}
    for name, one in models.items():
        save(one, home / name, **options)
    return models


def merged_state(models: dict[str, torch.nn.Module], method: str) -> dict[str, torch.Tensor]:
    states = {name: model.state_dict() for name, model in models.items()}
    return merge_state_dicts(method, [states["a"], states["b"]], states["base"], names="ab")


@pytest.mark.parametrize("shards", [{}, {"shard_size": "20KB"}])
def test_a_merged_llama_loads_with_transformers(tmp_path: Path, shards: dict[str, str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    models = family(tmp_path, llama().bfloat16())
    out = write(plan_of(tmp_path, "ties", **shards), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(out)
    want = merged_state(models, "ties")
    assert model.dtype == torch.bfloat16
    assert all(torch.equal(v, want[k]) for k, v in model.state_dict().items())
    assert AutoTokenizer.from_pretrained(out)("w3 w4")["input_ids"] == [8, 9]
    assert (out / "generation_config.json").is_file()
    assert model(input_ids=torch.tensor([[8, 9]])).logits.shape == (1, 2, 40)


def test_a_merged_bert_classifier_loads_with_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    models = family(tmp_path, bert(labels=3))
    out = write(plan_of(tmp_path, "average"), tmp_path / "out")
    model = AutoModelForSequenceClassification.from_pretrained(out)
    want = merged_state(models, "average")
    assert all(torch.equal(v, want[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("pickled", [False, True])
def test_tied_embeddings_stay_tied(tmp_path: Path, pickled: bool) -> None:
    from transformers import AutoModelForCausalLM

    models = family(tmp_path, llama(tie_word_embeddings=True))
    if pickled:
        for name, model in models.items():
            (tmp_path / name / "model.safetensors").unlink()
            torch.save(model.state_dict(), tmp_path / name / "pytorch_model.bin")
    out = write(plan_of(tmp_path, "ties"), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    want = merged_state(models, "ties")
    assert torch.equal(model.lm_head.weight, want["lm_head.weight"])


def test_the_type_is_written_into_the_configuration(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    family(tmp_path, llama())
    out = write(plan_of(tmp_path, dtype="float16"), tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.float16


def test_heads_stay_each_models_own_and_go_on_the_merged_trunk(tmp_path: Path) -> None:
    trunk = bert()
    save(trunk.bert, tmp_path / "base")
    models = {}
    for i, name in enumerate("ab"):
        models[name] = bert(labels=2 + i, seed=i)
        models[name].bert.load_state_dict(tuned(trunk.bert, i).state_dict())
        save(models[name], tmp_path / name)
    out = write(plan_of(tmp_path, "average", heads=["classifier.*"]), tmp_path / "out")
    want = merge_state_dicts(
        "average", [models[n].bert.state_dict() for n in "ab"], trunk.bert.state_dict()
    )
    for i, name in enumerate("ab"):
        found = load_with_head(out, name)
        assert found.config.num_labels == 2 + i
        assert torch.equal(found.classifier.weight, models[name].classifier.weight)
        assert all(torch.equal(found.bert.state_dict()[k], v) for k, v in want.items())
    with pytest.raises(MergeError, match=r"no head 'c' \(it has: a, b\)"):
        load_with_head(out, "c")


def test_the_bases_own_head_is_not_taken_for_an_experts(tmp_path: Path) -> None:
    """The base is a classifier too: its head is in the main file, the experts' in theirs."""
    models = family(tmp_path, bert())
    out = write(plan_of(tmp_path, "average", heads=["classifier.*"]), tmp_path / "out")
    found = load_with_head(out, "b")
    assert torch.equal(found.classifier.weight, models["b"].classifier.weight)
    from transformers import AutoModelForSequenceClassification

    whole = AutoModelForSequenceClassification.from_pretrained(out)
    assert torch.equal(whole.classifier.weight, models["base"].classifier.weight)


def test_the_cards_recipe_makes_the_same_bytes(tmp_path: Path) -> None:
    family(tmp_path, llama())
    data = {
        "method": "dare_ties",
        "base": "base",
        "models": {"x": {"model": "a", "weight": 0.3}, "y": "b"},
        "tensors": [{"match": "*mlp*", "density": {"layers": [0.2, 0.9]}}],
        "seed": 5,
    }
    (tmp_path / "first.yaml").write_text(yaml.safe_dump(data))
    out = write(make_plan(read_recipe(tmp_path / "first.yaml")[0]), tmp_path / "out")
    card = (out / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert "merge" in front["tags"] and "DARE" in card
    said = card.split("```yaml\n")[1].split("```")[0]
    (tmp_path / "again.yaml").write_text(said)
    again = write(make_plan(read_recipe(tmp_path / "again.yaml")[0]), tmp_path / "again")
    assert (out / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()


def test_files_of_the_base_come_along_and_no_weights(tmp_path: Path) -> None:
    family(tmp_path, llama())
    extra = {"1_Pooling/config.json": "{}", "chat_template.jinja": "x", "modeling_x.py": "y = 1",
             "optimizer.pt": "z", "checkpoint-3/a.json": "{}", ".git/config": "q",
             "README.md": "old", "trainer_state.json": "{}"}  # fmt: skip
    for name, text in extra.items():
        path = tmp_path / "base" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    out = write(plan_of(tmp_path), tmp_path / "out")
    there = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert {"1_Pooling/config.json", "chat_template.jinja", "modeling_x.py"} <= there
    assert not there & {"optimizer.pt", "checkpoint-3/a.json", ".git/config", "trainer_state.json"}
    assert (out / "README.md").read_text() != "old"


def test_plain_tensors_without_any_configuration_merge_too(tmp_path: Path) -> None:
    for i, name in enumerate(["base", "a", "b"]):
        state_folder(tmp_path / name, near(some_state(0), i))
    out = write(plan_of(tmp_path, "ties"), tmp_path / "out")
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md", "manifest.json", "merge.json", "model.safetensors",
    ]  # fmt: skip
    assert json.loads((out / "merge.json").read_text())["method"] == "ties"


def test_adapters_are_worked_into_the_base_as_they_are_read(tmp_path: Path) -> None:
    """LoRA folders, alone or beside their model, against PEFT's own merging."""
    import peft

    base = llama()
    save(base, tmp_path / "base")
    states = []
    for i, name in enumerate("ab"):
        options = peft.LoraConfig(
            r=2 + i, lora_alpha=5, target_modules=["q_proj", "up_proj"], use_rslora=bool(i)
        )
        torch.manual_seed(i)
        model = peft.get_peft_model(llama(), options)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    parameter.normal_(std=0.05)
        model.save_pretrained(tmp_path / name)
        states.append(model.merge_and_unload().state_dict())
    plan = plan_of(tmp_path, "task_arithmetic", parameters={"weight": 0.5})
    found = load_file(write(plan, tmp_path / "out") / "model.safetensors")
    want = merge_state_dicts("task_arithmetic", states, base.state_dict(), weight=0.5)
    for key, value in want.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)
    beside = {n: {"model": "base", "adapter": str(tmp_path / n)} for n in "ab"}
    again = plan_of(tmp_path, "task_arithmetic", parameters={"weight": 0.5}, models=beside)
    write(again, tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (
        tmp_path / "out/model.safetensors"
    ).read_bytes()
    with pytest.raises(MergeError, match="holds an adapter, no model"):
        plan_of(tmp_path, "average", None)
