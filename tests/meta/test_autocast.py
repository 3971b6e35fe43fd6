"""Optimizees' losses and gradients in bfloat16, by PyTorch's autocast."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from amalgam.meta import Amalgamation, Unroll, Window
from amalgam.meta.sampling import stacked_batches
from amalgam.meta.window import WindowInputs
from amalgam.policies import Pool, Student, StudentConfig
from amalgam.seeding import generator_for
from amalgam.tasks import Task

STEPS = 5


class Noting(nn.Module):
    """A network that notes what its hidden layer computes in."""

    seen: set[torch.dtype]

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv1d(1, 6, 3), nn.Linear(6 * 10, 3)
        self.back = nn.ConvTranspose1d(6, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x[:, None])
        Noting.seen.add(hidden.dtype)
        return self.last(self.back(hidden.tanh()).tanh().flatten(1))


def run(replicates: int, **how: object) -> tuple[Window, list[Tensor]]:
    """A window's outcome, and the meta-gradients of all its students."""
    Noting.seen = set()
    generator = generator_for(0)
    x, y = torch.randn(64, 10, generator=generator), torch.randint(3, (64,), generator=generator)
    task = Task("noting", Noting, (x, y), (x, y), functional.cross_entropy, 16)
    config = StudentConfig(layers=1, hidden=4)
    students = [Student(config, generator=generator_for(seed)) for seed in range(replicates)]
    unroll = Unroll(task, students, Pool(["adam"]), Amalgamation(scale_spread=1.0, **how))
    begin = unroll.begin(*(generator_for(row) for row in range(replicates)))
    drawn = [generator_for(row, "batches") for row in range(replicates)]
    batches = stacked_batches(task, drawn, STEPS)
    _found_out_once = task.second_order, task.unstackable
    Noting.seen.clear()
    given = WindowInputs(begin, batches, [student.weights() for student in students])
    window, _, grads = unroll.meta_gradient(given, (1.0, 0.1))
    return window, [grad for of in grads for grad in of]


@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize(("replicates", "stack"), [(1, None), (3, True)])
def test_optimizees_compute_in_it_and_all_else_does_not(
    replicates: int, stack: bool | None, second_order: bool
) -> None:
    how = {"second_order": second_order, "stack": stack, "normaliser": "every-batch"}
    plain, exact = run(replicates, **how)
    assert Noting.seen == {torch.float32}
    window, grads = run(replicates, autocast="bfloat16", **how)
    assert Noting.seen == {torch.bfloat16}
    assert window.losses.dtype == window.end.params.dtype == torch.float32
    assert not torch.equal(window.losses, plain.losses)
    torch.testing.assert_close(window.losses, plain.losses, rtol=2e-2, atol=0)
    ours, theirs = (torch.cat([g.flatten() for g in each]) for each in (grads, exact))
    assert functional.cosine_similarity(ours, theirs, 0) > 0.98


def test_what_it_can_be_is_said() -> None:
    with pytest.raises(ValueError, match=r"autocast must be one of \(None, 'bfloat16'\)"):
        Amalgamation(autocast="float16")  # type: ignore[arg-type]
