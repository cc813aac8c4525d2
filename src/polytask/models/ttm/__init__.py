"""Tiny Time Mixers (arXiv 2401.03955): see `polytask.models.ttm.model`."""

from polytask.models.ttm.config import TTMConfig
from polytask.models.ttm.model import TinyTimeMixer

__all__ = ["TTMConfig", "TinyTimeMixer"]
