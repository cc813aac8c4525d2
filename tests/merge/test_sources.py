"""Headers first, tensors on demand, and every kind of broken file named."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from merge_samples import llama, near, save, some_state, state_folder
from safetensors.torch import load_file, save_file

from polytask.errors import MergeError
from polytask.merge.headers import make_header, read_header
from polytask.merge.sources import FileSource, StateSource, open_source, read


def test_tensors_read_equal_those_of_the_safetensors_package(tmp_path: Path) -> None:
    state = {**some_state(0), **{f"{d}": some_state(1, d)["emb.weight"] for d in
             (torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn)}}  # fmt: skip
    folder = state_folder(tmp_path / "m", state)
    source = open_source(folder, "m")
    want = load_file(folder / "model.safetensors")
    assert set(source.headers) == set(want)
    for key, tensor in want.items():
        found = read(source, key)
        assert found.dtype == tensor.dtype and found.shape == tensor.shape
        assert (
            torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))
            if tensor.dim()
            else (found == tensor)
        )


def test_a_piece_is_converted_on_the_way_wherever_it_starts(tmp_path: Path) -> None:
    value = torch.randn(300_000).bfloat16()  # more than a block
    source = open_source(state_folder(tmp_path / "m", {"w": value}), "m")
    for start, count in ((0, 300_000), (1, 299_999), (262_143, 7), (5, 0)):
        out = torch.full((count,), torch.nan)
        source.read_into("w", out, start)
        assert torch.equal(out, value[start : start + count].float())


def test_shards_are_one_model(tmp_path: Path) -> None:
    model = llama()
    save(model, tmp_path / "m", max_shard_size="20KB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 2
    source = open_source(tmp_path / "m", "m")
    for key, tensor in model.state_dict().items():
        assert torch.equal(read(source, key), tensor)


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    save(llama(), tmp_path / "m", max_shard_size="20KB")
    shard = sorted((tmp_path / "m").glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(MergeError, match=rf"{shard.name} is truncated: [\d,]+ bytes where"):
        open_source(tmp_path / "m", "m")
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(MergeError, match=f"{shard.name} is truncated"):
        open_source(tmp_path / "m", "m")


def test_a_missing_shard_and_a_tensor_that_the_index_lies_about_are_named(tmp_path: Path) -> None:
    save(llama(), tmp_path / "m", max_shard_size="20KB")
    path = tmp_path / "m" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["ghost"] = next(iter(index["weight_map"].values()))
    path.write_text(json.dumps(index))
    with pytest.raises(MergeError, match="has no tensor 'ghost'"):
        open_source(tmp_path / "m", "m")
    index["weight_map"]["ghost"] = "model-9.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(MergeError, match=r"model-9\.safetensors is missing"):
        open_source(tmp_path / "m", "m")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        ((20).to_bytes(8, "little") + b"{" + b" " * 19, "damaged header"),
        (b"PK\x03\x04" + b"\xff" * 60, "is not a safetensors file"),
    ],
)
def test_what_is_no_safetensors_file_is_said(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(MergeError, match=told):
        open_source(path, "m")


def test_an_entry_that_does_not_fit_its_bytes_is_refused(tmp_path: Path) -> None:
    header, _ = make_header({"w": (torch.float32, (2,))}, {})
    broken = header.replace(b"[2]", b"[3]")
    (tmp_path / "m.safetensors").write_bytes(broken + b"\0" * 8)
    with pytest.raises(MergeError, match="tensor 'w' of shape"):
        read_header(tmp_path / "m.safetensors")


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    folder = state_folder(tmp_path / "m", {"w": torch.zeros(1000)})
    source = open_source(folder, "m")
    with (folder / "model.safetensors").open("rb+") as handle:
        handle.truncate(500)
    with pytest.raises(MergeError, match="became shorter"):
        read(source, "w")


def test_a_pickle_of_tensors_is_loaded_safely(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    state = some_state(0)
    state["tied"] = state["emb.weight"]
    torch.save(state, tmp_path / "m" / "pytorch_model.bin")
    source = open_source(tmp_path / "m", "m")
    assert isinstance(source, StateSource)
    assert source.headers["tied"].place == source.headers["emb.weight"].place
    for key, tensor in state.items():
        assert torch.equal(read(source, key), tensor)


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "ran",)  # type: ignore[return-value]

    (tmp_path / "m").mkdir()
    torch.save({"w": Evil()}, tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(MergeError, match="cannot be loaded safely"):
        open_source(tmp_path / "m", "m")
    assert not (tmp_path / "ran").exists()


def test_pickles_of_other_things_and_torn_ones_are_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "a.bin")
    with pytest.raises(MergeError, match="something else than named tensors"):
        open_source(tmp_path / "a.bin", "m")
    with zipfile.ZipFile(tmp_path / "b.bin", "w") as archive:
        archive.writestr("b/data.pkl", b"torn")
    with pytest.raises(MergeError, match="cannot be loaded safely"):
        open_source(tmp_path / "b.bin", "m")


def test_quantised_models_are_refused(tmp_path: Path) -> None:
    folder = state_folder(
        tmp_path / "m", some_state(0), quantization_config={"quant_method": "gptq"}
    )
    with pytest.raises(MergeError, match=r"quantised \(gptq\)"):
        open_source(folder, "m")


def test_what_is_not_there_is_said_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(MergeError, match="expert: there is no file or folder"):
        open_source(tmp_path / "none", "expert")
    with pytest.raises(MergeError, match="hf download nobody/nothing --revision v2"):
        open_source("nobody/nothing@v2", "expert")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MergeError, match="holds no weights"):
        open_source(tmp_path / "empty", "expert")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(MergeError, match="no safetensors file"):
        open_source(tmp_path / "notes.txt", "expert")


def test_a_hub_id_is_found_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "models--me--mine"
    folder = cache / "snapshots" / ("0" * 40)
    state_folder(folder, {"w": torch.arange(3.0)}, model_type="x")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    source = open_source("me/mine", "m")
    assert torch.equal(read(source, "w"), torch.arange(3.0))


def test_modules_and_state_dicts_are_sources() -> None:
    model = llama(tie_word_embeddings=True)
    source = open_source(model, "m")
    tied = [source.headers[k].place for k in ("lm_head.weight", "model.embed_tokens.weight")]
    assert tied[0] == tied[1]
    state = near(some_state(0), 1)
    assert torch.equal(read(open_source(state, "s"), "layers.0.w"), state["layers.0.w"])


def test_two_files_with_one_tensor_are_refused(tmp_path: Path) -> None:
    for name in ("x", "y"):
        save_file({"w": torch.zeros(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(MergeError, match=r"tensor 'w' is in two files, y\.safetensors and x"):
        FileSource("m", [tmp_path / "x.safetensors", tmp_path / "y.safetensors"])


def test_headers_made_here_are_read_by_the_safetensors_package(tmp_path: Path) -> None:
    values = {"b": torch.arange(4.0), "a": torch.arange(3, dtype=torch.int8)}
    header, places = make_header({k: (v.dtype, tuple(v.shape)) for k, v in values.items()}, {})
    content = bytearray(header + b"\0" * 19)
    for name, value in values.items():
        raw = np.asarray(value).tobytes()
        content[places[name] : places[name] + len(raw)] = raw
    (tmp_path / "m.safetensors").write_bytes(content)
    found = load_file(tmp_path / "m.safetensors")
    assert all(torch.equal(found[k], v) for k, v in values.items())
