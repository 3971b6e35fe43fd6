"""Comparing optimizers: runs, protocols, statistics, tables and reports."""

from amalgam.evaluation.contenders import Contender
from amalgam.evaluation.protocol import Evaluation, Protocol, Result, evaluate, spread
from amalgam.evaluation.runner import NamedTask, Runner
from amalgam.evaluation.runs import Curve, Reading, Readings, train

__all__ = [
    "Contender",
    "Curve",
    "Evaluation",
    "NamedTask",
    "Protocol",
    "Reading",
    "Readings",
    "Result",
    "Runner",
    "evaluate",
    "spread",
    "train",
]
