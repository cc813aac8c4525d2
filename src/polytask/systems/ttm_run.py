"""`polytask run ttm`."""

from __future__ import annotations

from polytask.systems.base import Outcome, Say, SystemConfig


class TTMRunConfig(SystemConfig):
    """placeholder"""


def ttm_run(config: TTMRunConfig, say: Say) -> Outcome:
    raise RuntimeError
