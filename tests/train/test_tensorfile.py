"""Tensor files: the safetensors format, as the safetensors package understands it."""

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from polytask import files
from polytask.errors import CheckpointError
from polytask.train import tensorfile


def every_kind() -> dict[str, Tensor]:
    """All dtypes, with an odd number of entries so that offsets are awkward; scalar and empty."""
    torch.manual_seed(0)
    tensors = {
        f"t.{name}": (torch.randn(3, 5) * 9).to(dtype) for dtype, name in tensorfile.NAMES.items()
    }
    return tensors | {
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "ümlaut/last": torch.arange(7),
        "large": torch.randn(1_100_000),  # more than one block of the checksum
    }


def test_the_safetensors_package_reads_what_is_written(tmp_path: Path) -> None:
    tensors = every_kind()
    checksum = tensorfile.write_file(tmp_path / "a", tensors)
    found = load_file(tmp_path / "a")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert checksum == files.crc32(tmp_path / "a")


def test_what_the_safetensors_package_writes_is_read(tmp_path: Path) -> None:
    tensors = every_kind()
    save_file(tensors, tmp_path / "a", metadata={"format": "pt"})
    found, checksum = tensorfile.read_file(tmp_path / "a")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert checksum == files.crc32(tmp_path / "a")


def test_tensors_are_aligned_as_torch_aligns_them(tmp_path: Path) -> None:
    """`torch.set_rng_state` for one crashes on a tensor that is not."""
    tensorfile.write_file(tmp_path / "a", every_kind())
    found, _ = tensorfile.read_file(tmp_path / "a")
    assert all(tensor.data_ptr() % 64 == 0 for tensor in found.values())


def test_a_dtype_without_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'z' is torch\.complex64"):
        tensorfile.write_file(tmp_path / "a", {"z": torch.zeros(1, dtype=torch.complex64)})


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"[]",
        json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}).encode(),
        json.dumps({"w": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}).encode(),
        json.dumps({"w": {"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]}}).encode(),
        json.dumps({"w": {"dtype": "X9", "shape": [4], "data_offsets": [0, 16]}}).encode(),
        json.dumps({"w": {"shape": [4]}}).encode(),
        json.dumps({"w": 3}).encode(),
    ],
)
def test_a_header_that_lies_names_the_file(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    with pytest.raises(CheckpointError, match=r"bad\.safetensors cannot be read"):
        tensorfile.read_file(path)


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused_cleanly(content: bytes) -> None:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        path = Path(folder) / "any"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="any cannot be read"):
            tensorfile.read_file(path)
