"""Makes the fakes importable, keeps torch on one thread, and gives a small model."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from train_fakes import TinyModel


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def model() -> TinyModel:
    return TinyModel()
