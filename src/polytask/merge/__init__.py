"""Join models that were trained apart from one base."""

from __future__ import annotations

from polytask.merge import methods as methods
from polytask.merge.config import read_recipe as read_recipe
from polytask.merge.identity import check_identity as check_identity
from polytask.merge.method import METHODS as METHODS
from polytask.merge.method import Method as Method
from polytask.merge.method import TensorInfo as TensorInfo
from polytask.merge.method import make_method as make_method
from polytask.merge.method import merge_state_dicts as merge_state_dicts
from polytask.merge.methods.ties import ties_vectors as ties_vectors
from polytask.merge.output import load_with_head as load_with_head
from polytask.merge.output import write as write
from polytask.merge.plan import make_plan as make_plan
from polytask.merge.vectors import StateDict as StateDict
from polytask.merge.vectors import TaskVectors as TaskVectors
from polytask.merge.vectors import check_alike as check_alike
from polytask.merge.vectors import merge_keys as merge_keys
