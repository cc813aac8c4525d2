"""Asterisk's telephone prompts: one professional speaker per language, the same words in five."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import numpy as np

from polytask.data.embedded.info import Builder, EmbeddedInfo, Entry, Splits
from polytask.data.embedded.sources import Debian, Located
from polytask.data.embedded.splits import by_split, split_of

RATE = 8000
LANGUAGES = {
    "en": ("US English", "en_US_f_Allison", "CC-BY-SA-3.0 (Allison Smith, Digium)"),
    "fr": ("Canadian French", "fr_CA_f_June", "CC-BY-SA-3.0 (June Wallack, Digium)"),
    "es": ("Spanish", "es_MX_f_Allison", "CC-BY-SA-3.0 (Allison Smith, Digium)"),
    "it": ("Italian", "it_IT_m_Carlo", "CC-BY-3.0"),
    "ru": ("Russian", "ru_RU_f_IvrvoiceRU", "CC-BY-3.0"),
}


def read_wave(path: Path) -> np.ndarray:
    """(samples,) int16 of a mono wave file of 8 kHz."""
    with wave.open(str(path), "rb") as handle:
        shape = (handle.getframerate(), handle.getnchannels(), handle.getsampwidth())
        if shape != (RATE, 1, 2):
            raise ValueError(f"{path.name} has (rate, channels, bytes) {shape}, not (8000, 1, 2)")
        return np.frombuffer(handle.readframes(handle.getnframes()), dtype="<i2").astype(np.int16)


def _builder(language: str) -> Builder:
    def build(located: Located) -> Splits:
        rows: dict[str, list[Any]] = {
            name: [] for name in ("prompt", "topic", "language", "audio", "seconds")
        }
        for path in located.files():
            relative = path.relative_to(located.root / "usr/share/asterisk/sounds")
            prompt = relative.relative_to(relative.parts[0]).with_suffix("").as_posix()
            audio = read_wave(path)
            topic = prompt.rpartition("/")[0] or "general"
            cells = (prompt, topic, language, audio, len(audio) / RATE)
            for column, cell in zip(rows, cells, strict=True):
                rows[column].append(cell)
        return by_split(rows, [split_of("asterisk", prompt) for prompt in rows["prompt"]])

    return build


def _entry(language: str) -> Entry:
    title, folder, licence = LANGUAGES[language]
    package = f"asterisk-core-sounds-{language}-wav"
    info = EmbeddedInfo(
        name=f"asterisk-{language}",
        title=f"Asterisk telephone prompts in {title}: human speech, 8 kHz",
        licence=licence,
        modality="audio",
        sources=(
            Debian(
                package,
                (
                    f"usr/share/asterisk/sounds/{folder}/*.wav",
                    f"usr/share/asterisk/sounds/{folder}/*/*.wav",
                ),
            ),
        ),
        note="The prompt's name is the label ('digits/5'), there is no transcript. One speaker. "
        "Split by prompt, the same in all languages.",
    )
    return Entry(info, _builder(language))


SETS = tuple(_entry(language) for language in LANGUAGES)
