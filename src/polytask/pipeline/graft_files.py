"""Grafts on checkpoints: apply one to a base, purge one from a model; files in, files out.

A checkpoint is a Hugging Face folder (or hub id) or one safetensors file; the output is of the same
kind and appears only when it is complete.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from polytask import files
from polytask.errors import CheckpointError, ConfigError, MergeError
from polytask.merge.graft_delta import SparseDelta
from polytask.models.hub import locate
from polytask.pipeline.localize_models import quiet

State = dict[str, Tensor]


@dataclass(frozen=True)
class Written:
    """What was written: where, how many parameters changed of how many, and what to know."""

    path: Path
    changed: int
    of: int
    notes: tuple[str, ...] = ()


def apply_graft(
    base: str, graft: SparseDelta, out: Path, *, check: bool = True, overwrite: bool = False
) -> Written:
    """Write the base with a graft applied; a head that the graft carries comes with it.

    Raises:
        MergeError: the graft was cut from another base (`check`), shapes differ, `out` exists.
    """
    architecture, config = graft.facts.get("architecture"), graft.facts.get("config")
    return _change(
        base,
        architecture,
        config,
        lambda state: graft.apply(state, check=check),
        graft,
        out,
        overwrite,
    )


def purge_graft(
    model: str, base: str, graft: SparseDelta, out: Path, *, overwrite: bool = False
) -> Written:
    """Write a model whose values in the graft's region are the base's again."""
    origin = _load(base, graft.facts.get("architecture"), graft.facts.get("config")).state
    graft.check_base(origin)
    return _change(
        model, None, None, lambda state: graft.purge(state, origin), graft, out, overwrite
    )


@dataclass(frozen=True)
class _Checkpoint:
    state: State
    model: Any = None  # None for a plain file
    metadata: dict[str, str] | None = None


def _change(
    source: str,
    architecture: str | None,
    config: dict[str, Any] | None,
    change: Callable[[State], State],
    graft: SparseDelta,
    out: Path,
    overwrite: bool,
) -> Written:
    if out.exists() and not overwrite:
        raise MergeError(f"{out} exists: choose another place, or say --overwrite")
    found = _load(source, architecture, config)
    made = change(found.state)
    notes: list[str] = []
    if found.model is None:
        from safetensors.torch import save_file

        whole = {name: tensor.contiguous().clone() for name, tensor in made.items()}
        with files.writing(out) as aside:
            save_file(whole, aside, found.metadata)
    else:
        found.model.load_state_dict(made)
        with files.building(out) as aside:
            with quiet():
                found.model.save_pretrained(aside)
            if not _copy_tokenizer(source, aside):
                notes.append(f"{source} has no tokenizer, so none was copied")
    return Written(out, len(graft), graft.layout.size, tuple(notes))


def _load(source: str, architecture: str | None, config: dict[str, Any] | None) -> _Checkpoint:
    """A checkpoint's tensors; of a folder within a model of the given or of its own class."""
    path = Path(source).expanduser()
    if path.suffix == ".safetensors":
        return _load_file(path)
    import transformers
    from safetensors import SafetensorError

    where = locate(source)
    try:
        known: Any
        if config is not None:
            rest = dict(config)
            known = transformers.AutoConfig.for_model(rest.pop("model_type"), **rest)
        else:
            known = transformers.AutoConfig.from_pretrained(where)
        name = architecture or (known.architectures or [""])[0]
        kind = getattr(transformers, name, None)
        if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
            raise ConfigError(f"{source}: '{name}' is no model class of transformers")
        with quiet():
            model = kind.from_pretrained(where, config=known, use_safetensors=True, dtype="auto")
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"cannot load '{source}': {reason}") from error
    return _Checkpoint(dict(model.state_dict()), model)


def _load_file(path: Path) -> _Checkpoint:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as handle:  # type: ignore[no-untyped-call]
            state = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
            return _Checkpoint(state, None, handle.metadata())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _copy_tokenizer(source: str, folder: Path) -> bool:
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(locate(source)).save_pretrained(folder)
    except (OSError, ValueError):
        return False
    return True
