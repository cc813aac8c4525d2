"""The folder of a merged model: everything but the tensors, taken from the base and put right.

Configuration, generation settings, tokenizer and processor files are copied as they are; only what
the merge changed is changed: type, size of the vocabulary, number of layers. So the result loads
with `from_pretrained` whatever the architecture. Heads that stay each model's own lie in `heads/`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from polytask import __version__, files
from polytask.errors import MergeError
from polytask.merge.card import card
from polytask.merge.engine import Progress, execute
from polytask.merge.identity import check_identity
from polytask.merge.layout import Shard
from polytask.merge.plan import Plan
from polytask.merge.sources import INDEX, FileSource, config_of, open_source, read
from polytask.merge.tying import check_tied
from polytask.merge.vocabulary import extend_tokenizer

RECORD = "merge.json"
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".ckpt")
_LEFT = ("README.md", "manifest.json", RECORD, "trainer_state.json", "vocabulary.json")
_FOLDERS = ("heads", "runs", "onnx", "openvino", "coreml", "logs")
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
)


def write(
    plan: Plan,
    out: Path,
    *,
    workers: int | None = None,
    memory: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    sync_bytes: int = 1 << 28,
) -> Path:
    """Merge into the folder `out`, which appears only when it is complete. See `engine.execute`.

    First every method, as configured for some tensor, is asked for what no merge may fail at
    (`check_identity`), and names of one tensor are looked at for differences (`check_tied`). A
    folder that holds this very merge already is left as it is.
    """
    if not overwrite and is_there(plan, out):
        return out
    identities(plan)
    check_tied(plan)
    return execute(
        plan,
        out,
        lambda folder: complete(plan, folder, out.name),
        workers=workers,
        memory=memory,
        overwrite=overwrite,
        progress=progress,
        sync_bytes=sync_bytes,
    )


def complete(plan: Plan, folder: Path, title: str) -> None:
    """Put everything but the tensors into the folder of a merged model."""
    source = plan.sources[plan.frame].folder
    if source is not None:
        _copy(source, folder)
        _configure(plan, folder)
    if plan.alignment is not None:
        _tokenizer(plan, folder)
        files.write_json(folder / "vocabulary.json", {"report": list(plan.alignment.report)})
    if len(plan.shards) > 1:
        files.write_json(folder / INDEX, _index(plan.shards, plan))
    _heads(plan, folder / "heads")
    files.write_json(folder / RECORD, record(plan))
    files.write_text(folder / "README.md", card(plan, title))


def identities(plan: Plan) -> list[str]:
    """What `check_identity` found for each way in which tensors are merged; `MergeError` if a
    method does not give back the model it is given copies of."""
    ways = {(repr(i.method), len(i.models)): (i.method, i.base is not None) for i in plan.merged}
    return list(
        dict.fromkeys(
            check_identity(method, count, has_base, plan.recipe.seed).text
            for (_, count), (method, has_base) in ways.items()
            if method is not None
        )
    )


def is_there(plan: Plan, out: Path) -> bool:
    """Whether `out` is the complete result of this plan."""
    try:
        found = json.loads((out / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("fingerprint") == plan.fingerprint


def record(plan: Plan) -> dict[str, Any]:
    """What merge.json holds: the recipe as resolved, for people and for the report."""
    return {
        "polytask": __version__,
        "method": plan.recipe.method,
        "parameters": plan.method.model_dump(mode="json"),
        "base": None if plan.recipe.base is None else plan.recipe.models[plan.recipe.base].where,
        "models": {
            plan.recipe.models[n].name: plan.recipe.models[n].where for n in plan.recipe.experts
        },
        "recipe": dict(plan.recipe.said),
        "seed": plan.recipe.seed,
        "tensors": len(plan.merged),
        "copied": [item.name for item in plan.items if item.action == "copy"],
        "aliases": dict(plan.aliases),
        "identity": identities(plan),
        "notes": list(plan.notes),
        "fingerprint": plan.fingerprint,
    }


def _copy(source: Path, folder: Path) -> None:
    for path in sorted(source.rglob("*")):
        place = path.relative_to(source)
        top = place.parts[0]
        hidden = any(part.startswith(".") for part in place.parts)
        run = top in _FOLDERS or top.startswith("checkpoint-")
        kind = path.suffix in _WEIGHTS or path.name.endswith(".index.json")
        if hidden or (run and len(place.parts) > 1) or kind or path.name in _LEFT:
            continue
        if path.is_file() and len(place.parts) <= 3:
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / place)


def _configure(plan: Plan, folder: Path) -> None:
    path = folder / "config.json"
    config = config_of(folder)
    if not config:
        return
    before = json.dumps(config)
    dtypes = {item.dtype for item in plan.merged}
    if len(dtypes) == 1:
        name = str(dtypes.pop()).removeprefix("torch.")
        known = [key for key in ("dtype", "torch_dtype") if key in config]
        config |= dict.fromkeys(known, name)
    if plan.alignment is not None:
        nested = config.get("text_config")
        place = config if "vocab_size" in config or not isinstance(nested, dict) else nested
        place["vocab_size"] = plan.alignment.size
    if plan.layers is not None:
        key = next((k for k in LAYERS if k in config), None)
        if key is None:
            raise MergeError(f"{path} does not say how many layers there are, so none are stacked")
        config[key] = plan.layers
        if isinstance(config.get("layer_types"), list):
            raise MergeError(f"{path} has 'layer_types', one for each layer: do not stack slices")
    if json.dumps(config) != before:
        files.write_json(path, config)


def _tokenizer(plan: Plan, folder: Path) -> None:
    alignment = plan.alignment
    assert alignment is not None
    owner = plan.sources[alignment.tokenizer].folder
    if alignment.tokenizer != plan.frame and owner is not None:
        for name in _TOKENIZER:
            (folder / name).unlink(missing_ok=True)
            if (owner / name).is_file():
                shutil.copyfile(owner / name, folder / name)
    extend_tokenizer(folder, alignment, plan.sources)


def _index(shards: tuple[Shard, ...], plan: Plan) -> dict[str, Any]:
    return {
        "metadata": {"total_size": sum(item.nbytes for item in plan.items)},
        "weight_map": {name: s.file for s in shards for name in sorted(s.places)},
    }


def _heads(plan: Plan, folder: Path) -> None:
    """Each expert's own tensors and its configuration, to be put on the merged trunk."""
    from safetensors.torch import save_file

    for number in plan.recipe.experts:
        names = plan.heads[number]
        if not names:
            continue
        source = plan.sources[number]
        place = folder / source.name.replace("/", "--")
        place.mkdir(parents=True)
        save_file({key: read(source, key).clone() for key in names}, place / "head.safetensors")
        config = config_of(source.folder)
        if config:
            files.write_json(place / "config.json", config)
        keys = {key: name for name, key in plan.matches[number].keys.items() if key != name}
        files.write_json(place / "names.json", keys)


def load_with_head(folder: Path | str, name: str) -> Any:
    """The merged trunk with one model's own head, as a `transformers` model in evaluation mode.

    Args:
        folder: a merged model whose recipe had `heads`.
        name: of the model whose head is wanted.

    Raises:
        MergeError: no such head, or one of no Hugging Face model.
    """
    import transformers

    folder = Path(folder)
    place = folder / "heads" / name.replace("/", "--")
    config = config_of(place)
    kinds = config.get("architectures") or []
    if not kinds:
        there = sorted(p.name for p in (folder / "heads").glob("*")) or ["none"]
        raise MergeError(f"{folder} has no head '{name}' (it has: {', '.join(there)})")
    kind = getattr(transformers, str(kinds[0]), None)
    if kind is None:
        raise MergeError(f"{place}: transformers has no class {kinds[0]}")
    model = kind(kind.config_class(**config))
    state = _state(folder, place)
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    lacking = [k for k in missing if k not in tied]
    if lacking or unexpected:
        raise MergeError(f"{place} does not fit its configuration: {[*lacking, *unexpected][:3]}")
    model.tie_weights()
    return model.to(next(iter(state.values())).dtype).eval()


def _state(folder: Path, place: Path) -> dict[str, torch.Tensor]:
    trunk = open_source(str(folder), "merged")
    head = FileSource("head", [place / "head.safetensors"])
    renamed: Mapping[str, str] = json.loads((place / "names.json").read_text(encoding="utf-8"))
    back = {name: key for key, name in renamed.items()}
    recipe = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    own = {k for k in recipe["copied"] if k in trunk.headers and _is_own(k, recipe)}
    state = {back.get(k, k): read(trunk, k) for k in trunk.headers if k not in own}
    return state | {key: read(head, key) for key in head.headers}


def _is_own(name: str, record: Mapping[str, Any]) -> bool:
    from polytask.merge.matching import is_head

    return is_head(name, record["recipe"].get("heads", ()))
