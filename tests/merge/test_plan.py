"""Whatever can be wrong without looking at numbers is found before any is read."""

from __future__ import annotations

import json
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from merge_samples import bert, llama, near, plan_of, save, some_state, state_folder, tuned
from safetensors.torch import load_file

from polytask.errors import ConfigError, DataError, MergeError
from polytask.merge import merge_state_dicts
from polytask.merge.anatomy import anatomy, check_kinship
from polytask.merge.config import parse_config, recipe_of
from polytask.merge.output import write
from polytask.merge.plan import check_disk, make_plan
from polytask.merge.sources import FileSource, open_source


def folders(home: Path, **changed: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    base = some_state(0)
    states = {"base": base, "a": near(base, 1), "b": near(base, 2), **changed}
    for name, state in states.items():
        state_folder(home / name, state)
    return states


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor may be read."""

    def refuse(*_: object) -> None:
        raise AssertionError("a tensor was read while planning")

    monkeypatch.setattr(FileSource, "read_into", refuse)


@pytest.mark.usefixtures("unread")
def test_a_plan_is_made_from_headers_alone(tmp_path: Path) -> None:
    states = folders(tmp_path)
    plan = plan_of(tmp_path, "ties", shard_size=200)
    floats = sum(v.is_floating_point() for v in states["base"].values())
    assert len(plan.merged) == floats and len(plan.items) == floats + 1
    sizes = sum(v.nbytes for v in states["base"].values())
    assert plan.size == sizes + sum(len(s.header) for s in plan.shards)
    assert plan.names == ("a", "b")


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s: s.pop("layers.0.w"), r"b: tensor 'layers\.0\.w' of the base is missing"),
        (lambda s: s.update(extra=torch.zeros(3)), "b: tensor 'extra' is not in the base"),
        (
            lambda s: s.update({"layers.0.w": torch.zeros(6, 5)}),
            r"b: tensor 'layers\.0\.w' has shape \(6, 5\), the base's has \(5, 6\)",
        ),
        (
            lambda s: s.update({"emb.weight": torch.zeros(8, 6)}),
            "vocabularies that differ, say how to align them",
        ),
        (
            lambda s: s.update({"scalar": torch.tensor(3)}),
            r"b: tensor 'scalar' has type torch\.int64",
        ),
    ],
)
def test_unlike_models_are_named_with_the_tensor(tmp_path: Path, change, told: str) -> None:  # type: ignore[no-untyped-def]
    other = near(some_state(0), 2)
    change(other)
    folders(tmp_path, b=other)
    with pytest.raises(MergeError, match=told):
        plan_of(tmp_path)


@pytest.mark.usefixtures("unread")
def test_another_architecture_is_named_by_its_configuration(tmp_path: Path) -> None:
    save(llama(), tmp_path / "base")
    save(bert(), tmp_path / "a")
    with pytest.raises(MergeError, match="a is a model of type 'bert', base of type 'llama'"):
        plan_of(tmp_path)


def test_a_model_of_another_base_is_refused_when_numbers_are_seen(tmp_path: Path) -> None:
    folders(tmp_path, b=some_state(99))
    with pytest.raises(MergeError, match=r"b differs from the base by .* not trained from this"):
        check_kinship(plan_of(tmp_path, "ties"))
    notes = check_kinship(plan_of(tmp_path, "ties", check_base=False))
    assert len(notes) == 1 and notes[0].startswith("b differs")
    assert check_kinship(plan_of(tmp_path, "ties", models={"a": "a"})) == []


@pytest.mark.usefixtures("unread")
def test_wrappers_that_prefix_every_name_are_matched(tmp_path: Path) -> None:
    model = bert()
    save(model.bert, tmp_path / "base")
    save(model, tmp_path / "a")
    plan = plan_of(tmp_path, heads=["classifier.*"])
    assert all(item.models[0][1] == f"bert.{item.name}" for item in plan.merged)
    assert any("names begin with 'bert.'" in note for note in plan.notes)
    save(model, tmp_path / "b")
    other = plan_of(tmp_path, base="a", models={"x": "base"}, heads=["classifier.*"])
    assert any("lack the base's 'bert.'" in note for note in other.notes)


@pytest.mark.usefixtures("unread")
def test_an_output_layer_that_one_model_stores_and_another_ties_is_left_out(
    tmp_path: Path,
) -> None:
    model = llama(tie_word_embeddings=True)
    save(model, tmp_path / "base")
    state = {**model.state_dict()}
    state["lm_head.weight"] = state["lm_head.weight"].clone()
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    state_folder(tmp_path / "a", state, **config)
    plan = plan_of(tmp_path)
    assert "lm_head.weight" not in [item.name for item in plan.items]
    assert any("'lm_head.weight' is left out, being tied" in note for note in plan.notes)
    again = plan_of(tmp_path, base="a", models={"x": "base"})
    assert "lm_head.weight" not in [item.name for item in again.items]


def test_tied_storages_are_merged_and_stored_once(tmp_path: Path) -> None:
    base = some_state(0)
    base["tied.weight"] = base["emb.weight"]
    experts = []
    for i in range(2):
        state = near(base, i)
        state["tied.weight"] = state["emb.weight"]
        experts.append(state)
    config = {"method": "average", "base": "base", "models": {"a": "a", "b": "b"}}
    given = {"base": base, "a": experts[0], "b": experts[1]}
    plan = make_plan(recipe_of(parse_config(config)), given)
    assert plan.aliases == {"tied.weight": "emb.weight"}
    write(plan, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    want = merge_state_dicts("average", experts, base)
    assert "tied.weight" not in found
    assert torch.equal(found["emb.weight"], want["tied.weight"])


def test_an_output_layer_that_differs_from_its_embedding_is_not_dropped_in_silence(
    tmp_path: Path,
) -> None:
    model = llama(tie_word_embeddings=True)
    save(model, tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    state = {**model.state_dict()}
    state["lm_head.weight"] = state["lm_head.weight"].clone()
    state_folder(tmp_path / "a", state, **config)
    equal = plan_of(tmp_path, method="average", models={"a": "a"})
    write(equal, tmp_path / "out")  # an equal copy is no loss
    state["lm_head.weight"][-1, -1] += 1
    state_folder(tmp_path / "b", state, **config)
    for models in ({"models": {"b": "b"}}, {"base": "b", "models": {"x": "base"}}):
        with pytest.raises(MergeError, match=r"'lm_head.weight' differs from 'model.embed_tokens"):
            write(plan_of(tmp_path, method="average", **models), tmp_path / "again")
        assert not (tmp_path / "again").exists()


def test_names_that_only_the_base_ties_must_hold_the_same_numbers(tmp_path: Path) -> None:
    base = some_state(0)
    base["tied.weight"] = base["emb.weight"]
    expert = near(base, 1)
    expert["tied.weight"] = expert["emb.weight"].clone()
    config = {"method": "average", "base": "base", "models": {"a": "a"}}
    write(make_plan(recipe_of(parse_config(config)), {"base": base, "a": expert}), tmp_path / "o")
    expert["tied.weight"][0] += 1
    plan = make_plan(recipe_of(parse_config(config)), {"base": base, "a": expert})
    with pytest.raises(MergeError, match=r"a: 'tied.weight' and 'emb.weight' are one tensor"):
        write(plan, tmp_path / "again")


def test_integer_buffers_may_be_missing_or_additional(tmp_path: Path) -> None:
    with_ids = near(some_state(0), 1)
    with_ids["position_ids"] = torch.arange(5)
    without = near(some_state(0), 2)
    del without["count"]
    states = folders(tmp_path, a=with_ids, b=without)
    out = write(plan_of(tmp_path), tmp_path / "out")
    found = load_file(out / "model.safetensors")
    assert found.keys() == states["base"].keys()
    assert torch.equal(found["count"], states["base"]["count"])


@pytest.mark.usefixtures("unread")
def test_numbers_of_8_bits_are_refused(tmp_path: Path) -> None:
    for name in ("base", "a"):
        state_folder(tmp_path / name, {"w": torch.ones(3).to(torch.float8_e4m3fn)})
    with pytest.raises(MergeError, match="a: tensor 'w' has 8 bits a value"):
        plan_of(tmp_path)


@pytest.mark.usefixtures("unread")
def test_a_method_that_needs_a_base_or_other_numbers_of_models_says_so(tmp_path: Path) -> None:
    folders(tmp_path)
    with pytest.raises(MergeError, match="name the base model"):
        plan_of(tmp_path, "ties", None)
    with pytest.raises(MergeError, match="SLERP merges 2 models, got 1"):
        plan_of(tmp_path, "slerp", models={"a": "a"})


@pytest.mark.usefixtures("unread")
def test_parameters_may_differ_by_tensor_where_the_method_allows_it(tmp_path: Path) -> None:
    folders(tmp_path)
    rules = [
        {"match": "*.w", "density": 0.5},
        {"match": "layers.*", "weight": {"layers": [0.2, 0.6]}},
        {"match": "scalar", "weight": [0.1, 0.9]},
    ]
    models = {"a": {"model": "a", "weight": 0.3}, "b": "b"}
    plan = plan_of(tmp_path, "ties", tensors=rules, models=models)
    methods = {item.name: item.method for item in plan.merged}
    weight = {name: m.values("weight", 2) for name, m in methods.items() if m is not None}
    density = {name: m.values("density", 2) for name, m in methods.items() if m is not None}
    assert density["layers.0.w"] == (0.5, 0.5) and density["layers.0.b"] == (0.2, 0.2)
    assert weight["layers.1.w"] == (0.6, 0.6)  # a rule goes before a model's own value
    assert weight["layers.0.b"] == (0.2, 0.2)
    assert weight["emb.weight"] == (0.3, 1.0) and weight["scalar"] == (0.1, 0.9)
    with pytest.raises(ConfigError, match=r"tensor 'emb\.weight': TIES: 'trim' must be the same"):
        plan_of(tmp_path, "ties", tensors=[{"match": "emb*", "trim": "model"}])


@pytest.mark.usefixtures("unread")
def test_a_disk_without_room_is_said_before_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders(tmp_path)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**9, 10**9, 1000))
    with pytest.raises(DataError, match=r"has 0\.00 GB free, the merged model needs"):
        check_disk(plan_of(tmp_path), tmp_path / "not" / "there" / "yet")


def test_slices_stack_layers_of_several_models(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from polytask.merge.mergekit import recipe_of as mergekit_recipe

    base = llama(layers=4)
    save(base, tmp_path / "a")
    save(tuned(base, 1), tmp_path / "b")
    data = {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": "a", "layer_range": [0, 3]}]},
            {"sources": [{"model": "b", "layer_range": [1, 4]}]},
        ],
    }
    out = write(make_plan(mergekit_recipe(data, tmp_path)), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.num_hidden_layers == 6
    found, a, b = model.state_dict(), base.state_dict(), tuned(base, 1).state_dict()
    for i, (state, j) in enumerate([(a, 0), (a, 1), (a, 2), (b, 1), (b, 2), (b, 3)]):
        key = "model.layers.{}.mlp.up_proj.weight"
        assert torch.equal(found[key.format(i)], state[key.format(j)])
    assert torch.equal(found["model.embed_tokens.weight"], a["model.embed_tokens.weight"])
    assert torch.equal(found["lm_head.weight"], b["lm_head.weight"])
    data["slices"][0]["sources"][0]["layer_range"] = [2, 5]
    with pytest.raises(MergeError, match="a has 4 layers, no layers 2 to 4"):
        make_plan(mergekit_recipe(data, tmp_path))


def test_anatomy_finds_who_is_in_a_merge_and_what_cancels(tmp_path: Path) -> None:
    base = {"layers.0.w": torch.ones(300, 300)}
    one = {"layers.0.w": base["layers.0.w"] + torch.eye(300)}
    two = {"layers.0.w": base["layers.0.w"] - torch.eye(300)}
    other = {"layers.0.w": base["layers.0.w"] + torch.eye(300).roll(1, 0)}
    for name, state in {"base": base, "a": one, "b": two, "c": other}.items():
        state_folder(tmp_path / name, state)
    plan = plan_of(
        tmp_path, "task_arithmetic", parameters={"weight": [0.5, 0.3]}, models={"a": "a", "c": "c"}
    )
    out = write(plan, tmp_path / "out")
    (found,) = anatomy(plan, open_source(out, "merged"))
    assert found.coefficients == pytest.approx((0.5, 0.3), abs=1e-5)
    assert found.conflict == pytest.approx(0) and found.layer == 0 and found.kind == "w"
    (opposed,) = anatomy(plan_of(tmp_path, "task_arithmetic", models={"a": "a", "b": "b"}))
    assert opposed.conflict == pytest.approx(1)
    assert opposed.sizes == pytest.approx((1 / 300**0.5,) * 2, rel=0.1)
