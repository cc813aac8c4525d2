"""Where tensors come from: files, folders, the hub's cache, modules, adapters on a base.

Every source tells shapes and types first, from headers alone, and gives tensors, or pieces of them,
on demand. Files are read at positions, a cache-sized block at a time, straight into the caller's
memory in the caller's type: nothing of a model stays in memory, not even as mapped pages, a torn
file is an error instead of a bus error, and threads do not wait for each other.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from polytask.errors import MergeError
from polytask.merge.headers import TensorHeader, read_header

BLOCK = 1 << 18  # bytes read at a time where the type changes on the way
INDEX = "model.safetensors.index.json"


class TensorSource(Protocol):
    """A model's tensors by name. `folder`: where its configuration and tokenizer are, if any."""

    name: str
    folder: Path | None

    @property
    def headers(self) -> Mapping[str, TensorHeader]:
        """Every tensor, unread."""
        ...

    def read_into(self, key: str, out: Tensor, start: int = 0) -> None:
        """Fill `out`, flat and contiguous, of any type, with elements `start` ... of `key`."""
        ...


def read(source: TensorSource, key: str) -> Tensor:
    """A whole tensor in its own type."""
    header = source.headers[key]
    out = torch.empty(header.count, dtype=header.dtype)
    source.read_into(key, out)
    return out.view(header.shape)


class FileSource:
    """Tensors of one or more safetensors files."""

    def __init__(self, name: str, paths: list[Path], folder: Path | None = None) -> None:
        self.name = name
        self.folder = folder
        self.paths = paths
        self.headers: dict[str, TensorHeader] = {}
        self._handles: dict[str, int] = {}
        self._opening = threading.Lock()
        self._own = threading.local()
        for path in paths:
            for key, header in read_header(path)[0].items():
                if key in self.headers:
                    raise MergeError(
                        f"{name}: tensor '{key}' is in two files, {path.name} and "
                        f"{Path(self.headers[key].place[0]).name}"
                    )
                self.headers[key] = header

    def read_into(self, key: str, out: Tensor, start: int = 0) -> None:
        header = self.headers[key]
        path, begin, _ = header.place
        size = header.dtype.itemsize
        if out.dtype == header.dtype:
            self._fill(path, _memory(out), begin + start * size, key)
            return
        room = self._room()
        for at in range(0, out.numel(), BLOCK // size):
            count = min(BLOCK // size, out.numel() - at)
            piece = room[: count * size]
            self._fill(path, _memory(piece), begin + (start + at) * size, key)
            out[at : at + count].copy_(piece.view(header.dtype))

    def _room(self) -> Tensor:
        """This thread's own block of bytes."""
        room: Tensor | None = getattr(self._own, "room", None)
        if room is None:
            room = self._own.room = torch.empty(BLOCK, dtype=torch.uint8)
        return room

    def _fill(self, path: str, view: memoryview, at: int, key: str) -> None:
        handle = self._handles.get(path)
        if handle is None:
            with self._opening:
                handle = self._handles.get(path)
                if handle is None:
                    handle = self._handles[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        while len(view):
            try:
                count = os.preadv(handle, [view], at)
            except OSError as error:
                raise MergeError(f"{path} cannot be read: {error.strerror or error}") from error
            if not count:
                raise MergeError(
                    f"{path} became shorter while it was read: tensor '{key}' is missing"
                )
            view, at = view[count:], at + count

    def close(self) -> None:
        """Give the files back to the system; they are opened again when read."""
        while self._handles:
            os.close(self._handles.popitem()[1])

    def __del__(self) -> None:
        self.close()


class StateSource:
    """Tensors that are in memory (or mapped by someone else): a state dict."""

    def __init__(self, name: str, state: Mapping[str, Tensor], folder: Path | None = None) -> None:
        self.name = name
        self.folder = folder
        self.state = {key: tensor.detach() for key, tensor in state.items()}
        self.headers = {key: _header_of(key, tensor) for key, tensor in self.state.items()}

    def read_into(self, key: str, out: Tensor, start: int = 0) -> None:
        out.copy_(self.state[key].reshape(-1)[start : start + out.numel()])


class AdapterSource:
    """A base with a PEFT adapter worked into its weights, tensor by tensor, as they are read."""

    def __init__(self, name: str, base: TensorSource, folder: Path) -> None:
        from polytask.merge.adapters import read_adapter

        self.name = name
        self.folder = base.folder
        self.adapter_folder = folder
        self.base = base
        self.adapter = read_adapter(folder, base.headers)
        changed = self.adapter.changed
        self.headers = {
            key: TensorHeader(h.shape, h.dtype, (str(folder), key), True) if key in changed else h
            for key, h in base.headers.items()
        }

    def read_into(self, key: str, out: Tensor, start: int = 0) -> None:
        if key not in self.adapter.changed:
            self.base.read_into(key, out, start)
            return
        header = self.base.headers[key]
        weight = torch.empty(
            header.count,
            dtype=torch.float64 if header.dtype == torch.float64 else torch.float32,
        )
        self.base.read_into(key, weight)
        made = self.adapter.apply(key, weight.view(header.shape))
        out.copy_(made.reshape(-1)[start : start + out.numel()])


def open_source(
    where: str | Path | Mapping[str, Tensor] | nn.Module,
    name: str,
    *,
    adapter: Path | None = None,
    base: TensorSource | None = None,
) -> TensorSource:
    """The tensors behind a path, a hub id that is in the cache, a state dict or a module.

    Args:
        where: a safetensors file; a folder with one, with shards and their index, or with a pickle
            that loads as plain tensors; a polytask run folder; 'embedded:NAME'; a hub id, 'ID' or
            'ID@revision'; a folder with a PEFT adapter, which is then applied to `base`.
        name: what messages call it.
        adapter: folder of a PEFT adapter to work into the weights.
        base: what an adapter that stands alone is applied to.

    Raises:
        MergeError: nothing there, not cached, truncated (file named), unsafe pickle, quantised.
    """
    if isinstance(where, nn.Module):
        return StateSource(name, where.state_dict(keep_vars=True))
    if isinstance(where, Mapping):
        return StateSource(name, where)
    path = find(str(where), name)
    if path.is_dir() and (path / "adapter_config.json").is_file() and not _weights(path):
        if base is None or adapter is not None:
            raise MergeError(
                f"{name}: {path} holds an adapter, no model. Give the model it was trained on as "
                "'model' and this folder as 'adapter', or as 'base' of the merge"
            )
        return AdapterSource(name, base, path)
    source = _open_folder(path, name) if path.is_dir() else _open_file(path, name)
    return source if adapter is None else AdapterSource(name, source, adapter)


def find(where: str, name: str) -> Path:
    """The file or folder of a model; run folders and hub ids are resolved."""
    if where.startswith("embedded:"):
        from polytask.data.embedded import weights

        return Path(weights(where.removeprefix("embedded:")))
    path = Path(where).expanduser()
    if (path / "model" / "model.json").is_file():
        return path / "model"  # a polytask run folder
    if path.exists():
        return path
    identity, _, revision = where.partition("@")
    if where.startswith((".", "/", "~")) or identity.count("/") != 1:
        raise MergeError(f"{name}: there is no file or folder {where}")
    return _cached(identity, revision or None, name)


def _cached(identity: str, revision: str | None, name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(identity, revision=revision, local_files_only=True))
    except Exception as error:  # the package raises a different one for every reason
        chosen = f" --revision {revision}" if revision else ""
        raise MergeError(
            f"{name}: there is no folder {identity}, and no such model in the hub's cache. Fetch "
            f"it with: hf download {identity}{chosen}"
        ) from error


def _weights(folder: Path) -> list[Path]:
    """Files of a folder that hold the model's own weights."""
    skipped = ("adapter_model", "training_args", "optimizer", "scheduler", "rng_state", "scaler")
    kinds = (".safetensors", ".bin", ".pt", ".pth")
    return sorted(
        p
        for p in folder.iterdir()
        if p.suffix in kinds and not p.name.startswith(skipped) and p.is_file()
    )


def _open_folder(folder: Path, name: str) -> TensorSource:
    _refuse_quantised(folder, name)
    if (folder / INDEX).is_file():
        return _open_shards(folder, name)
    found = _weights(folder)
    tensors = [p for p in found if p.suffix == ".safetensors"]
    single = [p for p in tensors if p.name == "model.safetensors"]
    if tensors:
        return FileSource(name, single or tensors, folder)
    if found:
        return _unpickled(found, folder, name)
    inside = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
    raise MergeError(f"{name}: {folder} holds no weights in safetensors (it has: {inside})")


def _open_file(path: Path, name: str) -> TensorSource:
    if path.suffix == ".safetensors":
        return FileSource(name, [path])
    if path.suffix in (".bin", ".pt", ".pth"):
        return _unpickled([path], None, name)
    raise MergeError(f"{name}: {path} is no safetensors file, and no folder with one")


def _open_shards(folder: Path, name: str) -> FileSource:
    path = folder / INDEX
    try:
        table: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(table.values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise MergeError(f"{name}: {path} cannot be read: {error}") from error
    for shard in shards:
        if not (folder / shard).is_file():
            raise MergeError(f"{name}: {folder / shard} is missing, {INDEX} names it")
    source = FileSource(name, [folder / shard for shard in shards], folder)
    for key, shard in table.items():
        if key not in source.headers:
            raise MergeError(f"{name}: {folder / shard} has no tensor '{key}', {INDEX} says it has")
    return source


def _unpickled(paths: list[Path], folder: Path | None, name: str) -> StateSource:
    """Pickles that hold nothing but tensors, loaded by torch's restricted reader and mapped."""
    state: dict[str, Tensor] = {}
    for path in paths:
        try:
            try:
                found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # the format before torch 1.6 cannot be mapped
                found = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a torn or hostile pickle makes of the reader
            raise MergeError(
                f"{name}: {path} is a pickle that cannot be loaded safely. Where you trust it, "
                "convert it: model.save_pretrained(folder, safe_serialization=True)"
            ) from error
        if not isinstance(found, Mapping) or not all(
            isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items()
        ):
            raise MergeError(f"{name}: {path} is a pickle of something else than named tensors")
        state |= found
    return StateSource(name, state, folder)


def _refuse_quantised(folder: Path, name: str) -> None:
    found = config_of(folder).get("quantization_config")
    if found:
        kind = found.get("quant_method", "unknown") if isinstance(found, Mapping) else found
        raise MergeError(
            f"{name}: {folder} is quantised ({kind}): its numbers are codes, which cannot be "
            "averaged. Merge the models it was made from and quantise the result"
        )


def config_of(folder: Path | None) -> dict[str, Any]:
    """A Hugging Face folder's config.json; empty without one."""
    path = None if folder is None else folder / "config.json"
    if path is None or not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MergeError(f"{path} cannot be read: {error}") from error
    return found if isinstance(found, dict) else {}


def _header_of(key: str, tensor: Tensor) -> TensorHeader:
    shape = tuple(tensor.shape)
    if tensor.numel() == 0 or tensor.device.type == "meta":
        return TensorHeader(shape, tensor.dtype, ("empty", key))
    place = (str(tensor.device), tensor.data_ptr(), shape, tensor.stride(), str(tensor.dtype))
    return TensorHeader(shape, tensor.dtype, place)


def _memory(tensor: Tensor) -> memoryview:
    flat: Any = tensor.view(torch.uint8).numpy()
    return memoryview(flat)
