"""Comparing optimizers: protocol and tables."""

from amalgam.evaluation.protocol import Contender, Curve, Result, evaluate, spread, train, tune

__all__ = ["Contender", "Curve", "Result", "evaluate", "spread", "train", "tune"]
