"""Raw inputs of one modality to tokens of the trunk's width, and all of them to one batch.

A stem returns `Entries`: tokens for every entry of its modality, and which of them are real.
`splice` puts the entries of each sequence behind one another.
"""

from polytask.models.stems.entries import Entries
from polytask.models.stems.features import FeatureStem
from polytask.models.stems.image import ImageStem, fold, patch_size
from polytask.models.stems.series import SeriesStem
from polytask.models.stems.splice import Layout, plan_layout, splice
from polytask.models.stems.table import TableStem
from polytask.models.stems.text import TextStem

__all__ = [
    "Entries",
    "FeatureStem",
    "ImageStem",
    "Layout",
    "SeriesStem",
    "TableStem",
    "TextStem",
    "fold",
    "patch_size",
    "plan_layout",
    "splice",
]
