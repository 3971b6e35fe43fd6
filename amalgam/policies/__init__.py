"""What turns gradients into updates: learned policies, and the teachers that they learn from."""

from __future__ import annotations

import os

from amalgam import weight_files
from amalgam.hints import did_you_mean
from amalgam.policies.baselines import (
    DM,
    AdamLR,
    DMConfig,
    DMState,
    DynamicRateConfig,
    RMSPropLR,
    RNNPropExt,
    RNNPropExtConfig,
)
from amalgam.policies.choice import POOLS, Choice, ChoiceConfig
from amalgam.policies.hierarchical import ScaleHierarchical, ScaleHierarchicalConfig, ScaleState
from amalgam.policies.policy import LearnedPolicy, Policy, PolicyConfig
from amalgam.policies.policy_teacher import PolicyTeacher
from amalgam.policies.student import Student, StudentConfig
from amalgam.policies.teachers import (
    LEARNING_RATES,
    AnyTeacher,
    MixedPoolState,
    Pool,
    PoolState,
    Teacher,
    state_from_tensors,
    state_tensors,
)
from amalgam.policies.torch_teacher import TorchTeacher

POLICIES: dict[str, type[Policy]] = {
    policy.kind: policy
    for policy in (Student, Choice, DM, RNNPropExt, AdamLR, RMSPropLR, ScaleHierarchical)
}


def load_policy(name_or_path: str | os.PathLike[str]) -> Policy:
    """Read a learned policy of whatever kind its file holds.

    Args:
        name_or_path: A shipped policy's name, or a path.

    Raises:
        FileNotFoundError: It is neither.
        ValueError: The file is cut short, foreign, holds no learned policy, or its weights do not
            fit its configuration.
    """
    path = weight_files.locate(name_or_path)
    _, kind, _ = weight_files.read_any(path, "an amalgam policy")
    if kind not in POLICIES:
        raise ValueError(
            f"{str(path)!r} must hold one of {list(POLICIES)}, but is an amalgam {kind}"
            f"{did_you_mean(kind, POLICIES)}"
        )
    return POLICIES[kind].load(path)


__all__ = [
    "DM",
    "LEARNING_RATES",
    "POLICIES",
    "POOLS",
    "AdamLR",
    "AnyTeacher",
    "Choice",
    "ChoiceConfig",
    "DMConfig",
    "DMState",
    "DynamicRateConfig",
    "LearnedPolicy",
    "MixedPoolState",
    "Policy",
    "PolicyConfig",
    "PolicyTeacher",
    "Pool",
    "PoolState",
    "RMSPropLR",
    "RNNPropExt",
    "RNNPropExtConfig",
    "ScaleHierarchical",
    "ScaleHierarchicalConfig",
    "ScaleState",
    "Student",
    "StudentConfig",
    "Teacher",
    "TorchTeacher",
    "load_policy",
    "state_from_tensors",
    "state_tensors",
]
