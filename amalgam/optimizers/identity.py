"""Whose weights an optimizer's state belongs to: a policy's kind, constants and weights, as text.

Each of an optimizer's groups carries it, and so each of its state_dict's, through whatever saves
and shards them.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from amalgam.digest import digest_of
from amalgam.policies import Policy

# What groups have settings of their own for.
_SETTINGS = ("warmup_steps", "warmup_lr")


def identity_of(policy: Policy) -> str:
    """A policy's kind, the constants of its configuration, and a digest of its weights, as JSON."""
    config = {name: value for name, value in asdict(policy.config).items() if name not in _SETTINGS}
    digest = digest_of(weight.detach().double() for weight in policy.weights())
    return json.dumps({"kind": policy.kind, **config, "weights": digest}, sort_keys=True)


def is_identity(text: Any) -> bool:
    """Whether it is of :func:`identity_of`, and not the bare digest of earlier versions."""
    return isinstance(text, str) and text.startswith("{")


def check_identity(subject: str, theirs: Any, ours: str) -> None:
    """Raise ValueError where state belongs to another policy than this.

    Args:
        subject: What the optimizer calls its policy.
        theirs: What the state says of its own; of earlier versions, weights alone.
        ours: This one's.
    """
    if theirs == ours:
        return
    if theirs is None:
        raise ValueError(
            f"state_dict must name its {subject} in every group, but one has none: it is another "
            "optimizer's"
        )
    own = json.loads(ours)
    if is_identity(theirs):
        other = json.loads(theirs)
    else:
        *kind, digest = str(theirs).split(" ")
        other = own | {"weights": digest} | ({"kind": kind[0]} if kind else {})
    differences = [
        f"{name} is {other.get(name)!r} there and {own.get(name)!r} here"
        for name in sorted(own.keys() | other.keys())
        if own.get(name) != other.get(name)
    ]
    if differences:
        raise ValueError(
            f"state_dict belongs to another {subject} than this optimizer's: "
            f"{'; '.join(differences)}. Load it into an optimizer made with that {subject}"
        )
