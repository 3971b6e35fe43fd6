"""Operators called by hand: whatever the arguments are, no signal, one rule for all backends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import amalgam  # noqa: F401  registers the operators

SCRIPT = Path(__file__).with_name("raw_calls.py")


def test_no_arguments_of_an_operator_end_in_a_signal() -> None:
    seed = os.environ.get("AMALGAM_FUZZ_SEED", "0")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), seed, "80"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        timeout=240,
    )
    last = done.stderr.splitlines()[-1:]
    assert done.returncode == 0, f"exit status {done.returncode}; last: {last}"
    computed = {line.split(":")[0]: int(line.split()[2]) for line in done.stdout.splitlines()}
    names = {
        schema.name.removeprefix("amalgam::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("amalgam::")
    }
    assert computed.keys() == names
    # Calls that fit must be among them, or every refusal would be for the same reason.
    assert min(computed.values()) > 10


def student_arguments() -> dict:
    """What fits ``student_step_``: two parameters of four elements, one layer of two units."""
    return {
        "params": [torch.ones(4), torch.ones(4)],
        "grads": [torch.ones(4), torch.ones(4)],
        **{name: [torch.zeros(4), torch.zeros(4)] for name in "mv"},
        **{name: [torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)] for name in "hc"},
        "weights": [
            *(torch.zeros(8, 2), torch.zeros(8, 2), torch.zeros(8)),
            *(torch.zeros(1, 2), torch.zeros(1)),
        ],
        **{"alpha": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-10},
        **{"corrections": None, "sizes": [], "lr": 1.0, "weight_decay": 0.0, "control": None},
        **{"steps": [], "warmup_steps": 0, "seeds": []},
    }


CONTROL = torch.tensor([1.0, 1.0, 0.1, 0.0], dtype=torch.float64)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"m": [torch.zeros(4)]}, "must be equally many, not 2 params, 2 grads, 1 m"),
        ({"grads": [torch.ones(4)]}, "must be equally many, not 2 params, 1 grads"),
        ({name: [] for name in ("params", "grads", *"mvhc")}, "equally many, not 0 params"),
        ({"v": [torch.zeros(3), torch.zeros(4)]}, r"state.v must have shape \(4,\), not \(3,\)"),
        ({"weights": [torch.zeros(1, 2), torch.zeros(1)]}, "three tensors a layer and two"),
        ({"weights": []}, "three tensors a layer and two"),
        ({"warmup_steps": 1}, "warmup_steps=1 needs steps"),
        ({"warmup_steps": -1}, "warmup_steps must be 0 or more, not -1"),
        ({"steps": [torch.ones(())], "control": CONTROL}, "steps must be one a parameter, 2, not"),
        ({"steps": [torch.ones(())] * 2}, "control must be given where there are steps or seeds"),
        ({"steps": [torch.ones(2)] * 2, "control": CONTROL}, r"steps must be .* not .* of \(2,\)"),
        ({"seeds": [1], "control": CONTROL}, "seeds must be one a parameter, 2, not 1"),
        ({"seeds": [1, 2**32], "control": CONTROL}, r"seeds must lie in \[0, 2\^32\), not 4294"),
        ({"control": CONTROL[:3]}, r"control must have shape \(4,\), not \(3,\)"),
        ({"control": CONTROL.float()}, "control must be torch.float64"),
    ],
)
def test_a_step_in_place_names_what_does_not_fit(changes, named, backend) -> None:
    arguments = student_arguments()
    torch.ops.amalgam.student_step_(*arguments.values(), backend)
    arguments |= changes
    before = [tensor.clone() for tensor in arguments["params"]]
    with pytest.raises(ValueError, match=named):
        torch.ops.amalgam.student_step_(*arguments.values(), backend)
    assert all(map(torch.equal, before, arguments["params"]))
