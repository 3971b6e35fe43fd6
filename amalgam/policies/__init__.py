"""What turns gradients into updates: learned policies, and the teachers that they learn from.

A policy enters :data:`POLICIES` when its module is imported, which the lines below do.
"""

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
from amalgam.policies.fused_student import FusedStudent
from amalgam.policies.hierarchical import ScaleHierarchical, ScaleHierarchicalConfig, ScaleState
from amalgam.policies.lstm_policy import LSTMConfig, LSTMPolicy, MomentConfig, MomentPolicy
from amalgam.policies.nominal_student import NominalConfig, NominalState, NominalStudent
from amalgam.policies.policy import (
    POLICIES,
    Policy,
    PolicyConfig,
    ReferencePolicy,
    policy_type,
)
from amalgam.policies.policy_teacher import PolicyTeacher
from amalgam.policies.pool import Pool, PoolState, state_from_tensors, state_tensors
from amalgam.policies.student import Student, StudentConfig
from amalgam.policies.teachers import LEARNING_RATES, AnyTeacher, Teacher
from amalgam.policies.torch_teacher import TorchTeacher


def load_policy(name_or_path: str | os.PathLike[str]) -> Policy:
    """Read a learned policy of whatever kind its file holds.

    The file of a user's own policy may name its class by a dotted path, whose module is then
    imported: open such files only if they come from someone you trust.

    Args:
        name_or_path: A shipped policy's name, a path, or the address of a file on the Hugging Face
            hub, such as ``"hf://owner/name"``; see :func:`amalgam.hub.fetch`.

    Raises:
        FileNotFoundError: There is no such file.
        MissingExtra: It is on the hub, and huggingface_hub is not installed.
        ValueError: The file is cut short, foreign, holds no learned policy, its weights do not
            fit its configuration, or its policy's class can't be imported.
    """
    path = weight_files.locate(name_or_path)
    _, kind, _ = weight_files.read_any(path, "an amalgam policy")
    if kind not in POLICIES and "." not in kind:
        raise ValueError(
            f"{str(path)!r} must hold one of {list(POLICIES)}, but is an amalgam {kind}"
            f"{did_you_mean(kind, POLICIES)}; if that is a policy of your own, import its module "
            f"first"
        )
    try:
        found = policy_type(kind)
    except ValueError as error:
        raise ValueError(f"{str(path)!r} holds a {kind}: {error}") from error
    return found.load(path)


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
    "FusedStudent",
    "LSTMConfig",
    "LSTMPolicy",
    "MomentConfig",
    "MomentPolicy",
    "NominalConfig",
    "NominalState",
    "NominalStudent",
    "Policy",
    "PolicyConfig",
    "PolicyTeacher",
    "Pool",
    "PoolState",
    "RMSPropLR",
    "RNNPropExt",
    "RNNPropExtConfig",
    "ReferencePolicy",
    "ScaleHierarchical",
    "ScaleHierarchicalConfig",
    "ScaleState",
    "Student",
    "StudentConfig",
    "Teacher",
    "TorchTeacher",
    "load_policy",
    "policy_type",
    "state_from_tensors",
    "state_tensors",
]
