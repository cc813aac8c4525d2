from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from polytask import files
from polytask.errors import CheckpointError, UserError


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    with pytest.raises(RuntimeError), files.writing(path) as aside:
        aside.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_json_with_nan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "a.json", {"x": float("nan")})
    assert not list(tmp_path.iterdir())


def test_a_folder_appears_only_when_complete(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    with pytest.raises(RuntimeError), files.building(folder) as aside:
        (aside / "part").write_text("x")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with files.building(folder) as aside:
        (aside / "part").write_text("x")
        assert not folder.exists()
    files.verify_manifest(folder)


def test_rebuilding_replaces_the_folder(tmp_path: Path) -> None:
    for text in ("one", "two"):
        with files.building(tmp_path / "made") as aside:
            (aside / "part").write_text(text)
    assert (tmp_path / "made" / "part").read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["made"]


@pytest.fixture
def made(tmp_path: Path) -> Path:
    with files.building(tmp_path / "made") as aside:
        (aside / "sub").mkdir()
        (aside / "sub" / "part").write_bytes(bytes(range(100)))
    return tmp_path / "made"


def test_one_flipped_bit_is_found(made: Path) -> None:
    part = made / "sub" / "part"
    content = bytearray(part.read_bytes())
    content[50] ^= 1
    part.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"part is damaged: its checksum"):
        files.verify_manifest(made)


def test_a_truncated_file_is_found(made: Path) -> None:
    (made / "sub" / "part").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"1 bytes, expected 100"):
        files.verify_manifest(made)


def test_a_missing_file_is_found(made: Path) -> None:
    (made / "sub" / "part").unlink()
    with pytest.raises(CheckpointError, match=r"part is missing"):
        files.verify_manifest(made)


@pytest.mark.parametrize("content", ["", "{", "[]", json.dumps({"other": 1})])
def test_a_torn_manifest_is_an_error_that_names_it(made: Path, content: str) -> None:
    (made / files.MANIFEST).write_text(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read"):
        files.verify_manifest(made)


def test_a_checksum_is_the_crc32_of_every_block(tmp_path: Path) -> None:
    content = bytes(range(256)) * 40_000  # 10.24 MB: two whole blocks of 4 MiB and a rest
    (tmp_path / "a").write_bytes(content)
    blocks = [content[at : at + (4 << 20)] for at in range(0, len(content), 4 << 20)]
    expected = "".join(f"{zlib.crc32(block):08x}" for block in blocks)
    assert files.crc32(tmp_path / "a") == expected
    in_odd_parts = files.Checksum()
    for at in range(0, len(content), 999_983):
        in_odd_parts.add(memoryview(content)[at : at + 999_983])
    assert in_odd_parts.text == expected
    assert files.checksum(memoryview(content)) == expected
    assert files.Checksum().text == files.checksum(memoryview(b"")) == ""


def test_a_sum_made_while_writing_is_taken_and_checked_against_the_disk(tmp_path: Path) -> None:
    sums: dict[str, str] = {}
    with files.building(tmp_path / "made", sums) as aside:
        (aside / "part").write_bytes(b"what the disk made of it")
        total = files.Checksum()
        total.add(memoryview(b"what was meant"))
        sums["part"] = total.text
    with pytest.raises(CheckpointError, match="part is damaged: its checksum"):
        files.verify_manifest(tmp_path / "made")


def test_manifests_with_sha256_are_still_checked(made: Path) -> None:
    manifest = json.loads((made / files.MANIFEST).read_text())
    entry = manifest["files"]["sub/part"]
    del entry["crc32"]
    files.write_json(made / files.MANIFEST, manifest)
    with pytest.raises(CheckpointError, match="no known checksum of part"):
        files.verify_manifest(made)
    entry["sha256"] = hashlib.sha256(bytes(range(100))).hexdigest()
    files.write_json(made / files.MANIFEST, manifest)
    files.verify_manifest(made)
    (made / "sub" / "part").write_bytes(bytes(reversed(range(100))))
    with pytest.raises(CheckpointError, match="part is damaged: its checksum"):
        files.verify_manifest(made)


def test_a_second_process_cannot_hold_the_lock(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from polytask import files\n"
        f"with files.locked(Path({str(tmp_path)!r})): print('held')"
    )
    with files.locked(tmp_path):
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "in use by another process (pid" in other.stderr
        with pytest.raises(UserError, match="in use"), files.locked(tmp_path):
            pass
    free = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert free.stdout.strip() == "held"
