"""Where numbers were made: versions, machine, commit. Recorded with every evidence and run."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "polytask",
    "torch",
    "numpy",
    "scipy",
    "scikit-learn",
    "transformers",
    "datasets",
    "tokenizers",
    "accelerate",
    "peft",
    "torchjd",
    "safetensors",
)


def environment() -> dict[str, Any]:
    """Python, packages, machine and commit, as plain JSON values."""
    return {
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "commit": commit(),
    }


def commit() -> str | None:
    """The commit of the package's checkout, '+' appended if files differ; None outside git."""
    folder = Path(__file__).resolve().parent
    if _git(folder, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None  # installed inside somebody else's checkout
    head = _git(folder, "rev-parse", "--short=12", "HEAD")
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", "..")
    return f"{head}+" if changed else head


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
