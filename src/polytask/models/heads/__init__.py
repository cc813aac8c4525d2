"""Heads: one module per kind of label, holding all tasks of that kind.

A head gathers its tasks' weights by task id (`TaskLinear`), so that a step costs the same with two
tasks or two thousand. Each has `forward(features, pairs) -> Output`, `losses(output, pairs, ...)
-> {term: (P,)}` and `predict(output, pairs) -> numpy`.
"""

from polytask.models.heads.base import Head, Output, Pairs, known_pairs
from polytask.models.heads.dense import DenseHead
from polytask.models.heads.forecast import ForecastHead
from polytask.models.heads.match import MatchHead
from polytask.models.heads.tokens import GenerateHead, TagHead
from polytask.models.heads.vectors import ChoiceHead, ClassifyHead, MultiLabelHead, RegressHead

__all__ = [
    "ChoiceHead",
    "ClassifyHead",
    "DenseHead",
    "ForecastHead",
    "GenerateHead",
    "Head",
    "MatchHead",
    "MultiLabelHead",
    "Output",
    "Pairs",
    "RegressHead",
    "TagHead",
    "known_pairs",
]
