"""Divergences between drafter and target: a dense reference, and the same without ever holding [tokens, vocabulary]."""

from dist_train.losses.compiled import Compile
from dist_train.losses.dense import divergence
from dist_train.losses.head import Head
from dist_train.losses.linear import linear_divergence
from dist_train.losses.output import STATISTICS, DivergenceOutput
from dist_train.losses.terms import NAMES, needs_target

__all__ = [
    "NAMES",
    "STATISTICS",
    "Compile",
    "DivergenceOutput",
    "Head",
    "divergence",
    "linear_divergence",
    "needs_target",
]
