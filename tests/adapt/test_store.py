"""Adapter folders: exact round trips, files that peft reads and writes, torn and foreign ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adapt_models import TASKS, bert, hidden, ids, stir

from polytask.adapt import AdaptConfig, attach, load, read_bottlenecks
from polytask.adapt.sites import norm_sites
from polytask.errors import AdaptError, CheckpointError

TASK = torch.tensor([0, 2, 1, 1, 0])
EVERY = [
    {"method": "mhr", "heads": 4},
    {"method": "mhr", "heads": 4, "granularity": "blockwise", "gate": "l2"},
    {"method": "poly", "combine": "outputs", "gate": "straight_through"},
    {"method": "task-lora"},
    {"method": "bottleneck"},
    {"method": "lora", "targets": ("query",)},
    {"method": "ia3", "targets": ("query", "value")},
    {"method": "peft-poly", "heads": 4},
]


def made(options: dict, folder: Path):  # type: ignore[no-untyped-def, type-arg]
    model = bert()
    adapters = attach(model, AdaptConfig(**options), TASKS)
    with torch.no_grad():
        for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            draw = torch.Generator().manual_seed(number)
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
    if options.get("granularity") or options["method"] == "bottleneck":
        pass
    model.eval()
    with adapters.rows(TASK):
        found = hidden(model, ids())
    adapters.save(folder)
    return model, adapters, found


@pytest.mark.parametrize("options", EVERY, ids=lambda o: o["method"])
def test_a_folder_brings_back_the_same_outputs_bit_for_bit(options: dict, tmp_path: Path) -> None:  # type: ignore[type-arg]
    _, adapters, wanted = made(options, tmp_path / "a")
    assert {p.name for p in (tmp_path / "a").iterdir()} >= {
        "adapter_model.safetensors",
        "adapter_config.json",
        "manifest.json",
    }
    model = bert()
    again = load(model, tmp_path / "a")
    model.eval()
    assert again.tasks == adapters.tasks and again.sites == adapters.sites
    with again.rows(TASK):
        assert torch.equal(hidden(model, ids()), wanted)


@pytest.mark.parametrize("collapse", [True, False])
def test_uniform_inventories_round_trip(collapse: bool, tmp_path: Path) -> None:
    model = bert()
    adapters = attach(model, AdaptConfig(heads=4), TASKS)
    stir(adapters)
    adapters.to_uniform(collapse)
    with adapters.rows(TASK):
        wanted = hidden(model.eval(), ids())
    adapters.save(tmp_path / "a")
    again_model = bert()
    again = load(again_model, tmp_path / "a")
    with again.rows(TASK):
        assert torch.equal(hidden(again_model.eval(), ids()), wanted)


def test_peft_reads_what_we_wrote(tmp_path: Path) -> None:
    from peft import PeftModel

    _, _, wanted = made({"method": "mhr", "heads": 4, "gate": "sigmoid"}, tmp_path / "a")
    theirs = PeftModel.from_pretrained(bert(), str(tmp_path / "a")).eval()
    found = theirs.base_model(input_ids=ids(), task_ids=TASK).last_hidden_state
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)


def test_peft_reads_our_lora_folder(tmp_path: Path) -> None:
    from peft import PeftModel

    _, _, wanted = made({"method": "lora", "targets": ("query",)}, tmp_path / "a")
    theirs = PeftModel.from_pretrained(bert(), str(tmp_path / "a")).eval()
    torch.testing.assert_close(hidden(theirs, ids()), wanted, atol=1e-6, rtol=1e-6)


def test_we_read_what_pefts_poly_wrote(tmp_path: Path) -> None:
    from peft import PolyConfig, get_peft_model

    config = PolyConfig(
        r=4,
        n_tasks=3,
        n_skills=5,
        n_splits=2,
        target_modules=["query", "value"],
        init_weights=False,
    )
    torch.manual_seed(0)
    theirs = get_peft_model(bert(), config).eval()
    wanted = theirs.base_model(input_ids=ids(), task_ids=TASK).last_hidden_state
    theirs.save_pretrained(str(tmp_path / "p"))
    model = bert()
    adapters = load(model, tmp_path / "p")
    with adapters.rows(TASK):
        torch.testing.assert_close(hidden(model.eval(), ids()), wanted, atol=1e-6, rtol=1e-6)


def test_peft_refuses_what_it_would_compute_otherwise(tmp_path: Path) -> None:
    from peft import PeftModel

    made({"method": "mhr", "heads": 4, "gate": "l2"}, tmp_path / "a")
    with pytest.raises(Exception, match="POLYTASK"):
        PeftModel.from_pretrained(bert(), str(tmp_path / "a"))


def test_bottlenecks_are_read_back_as_sources_whatever_the_prefix(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    _, adapters, _ = made({"method": "bottleneck"}, tmp_path / "a")
    sites = norm_sites(bert(), ())
    found = read_bottlenecks([tmp_path / "a"], sites)
    assert set(found) == set(TASKS)
    for name in TASKS:
        for site, layer in adapters.banks().items():
            assert torch.equal(found[name][site]["up"], layer.bank.get(name)["up"])
    one = tmp_path / "a" / "adapters" / "beta"
    tensors = load_file(str(one / "adapter.safetensors"))
    assert "encoder.layer.0.output.adapters.beta.adapter_down.0.weight" in tensors
    other = tmp_path / "foreign"
    other.mkdir()
    save_file({f"bert.{k}": t for k, t in tensors.items()}, str(other / "adapter.safetensors"))
    assert set(read_bottlenecks([other], sites)) == {"beta"}


def test_scalearn_folders_hold_their_sources(tmp_path: Path) -> None:
    made({"method": "bottleneck"}, tmp_path / "a")
    model = bert()
    found = read_bottlenecks([tmp_path / "a"], norm_sites(model, ()))
    config = AdaptConfig(method="scalearn", sources=(str(tmp_path / "a"),), variant="uniform++")
    adapters = attach(model, config, ("x", "y"), sources=found)
    stir(adapters.tables)
    rows = [0, 1, 1, 0, 1]
    with adapters.rows(rows):
        wanted = hidden(model.eval(), ids())
    adapters.save(tmp_path / "s")
    again_model = bert()
    again = load(again_model, tmp_path / "s")
    with again.rows(rows):
        assert torch.equal(hidden(again_model.eval(), ids()), wanted)


def test_bad_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(AdaptError, match="holds no adapters"):
        load(bert(), tmp_path)
    with pytest.raises(AdaptError, match="there is no folder"):
        read_bottlenecks([tmp_path / "nowhere"], {})
    (tmp_path / "pytorch_adapter.bin").write_bytes(b"x")
    with pytest.raises(AdaptError, match=r"pytorch_adapter.bin is a pickle"):
        read_bottlenecks([tmp_path], {})
    made({"method": "mhr", "heads": 4}, tmp_path / "a")
    from transformers import BertConfig, BertModel

    small = BertModel(
        BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
        )
    )
    with pytest.raises(AdaptError, match="has shape"):
        load(small, tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="damaged"):
        load(bert(), tmp_path / "a")


def test_other_kinds_of_peft_adapters_are_left_to_peft(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    get_peft_model(bert(), LoraConfig(target_modules=["query"])).save_pretrained(
        str(tmp_path / "l")
    )
    with pytest.raises(AdaptError, match="which peft itself loads"):
        load(bert(), tmp_path / "l")


def test_adapters_that_activate_otherwise_are_refused(tmp_path: Path) -> None:
    made({"method": "bottleneck"}, tmp_path / "a")
    one = tmp_path / "a" / "adapters" / "beta"
    record = json.loads((one / "adapter_config.json").read_text())
    record["config"]["non_linearity"] = "swish"
    (one / "adapter_config.json").write_text(json.dumps(record))
    with pytest.raises(AdaptError, match="non_linearity is 'swish'"):
        read_bottlenecks([one], norm_sites(bert(), ()))
