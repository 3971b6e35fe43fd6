"""The unroll computes what the authors' code computes (tests/golden/README.md)."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from amalgam.meta import Amalgamation, Unroll
from amalgam.policies import Pool, Student, StudentConfig, Teacher
from amalgam.tasks import Task

GOLDEN = Path(__file__).parents[1] / "golden"


class TanhMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for index, shape in enumerate([(6, 8), (8,), (8, 4), (4,)]):
            self.register_parameter(f"p{index}", nn.Parameter(torch.zeros(shape)))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.p0 + self.p1).tanh() @ self.p2 + self.p3


def relative(ours: Tensor, theirs: np.ndarray) -> float:
    theirs = torch.from_numpy(theirs).double().reshape(ours.shape)
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("name", ["mean", "min_max", "max_linear_objective"])
def test_unroll_matches_the_authors(name: str) -> None:
    data = np.load(GOLDEN / f"unroll_{name}.npz")
    config = ast.literal_eval(str(data["config"]))
    torch_of = {key: torch.from_numpy(data[key]) for key in data.files if key != "config"}

    student = Student(StudentConfig(warmup_lr=config["warmup_rate"])).double()
    keys = [key for key in data.files if key.startswith("weight.")]
    with torch.no_grad():
        for weight, key in zip(student.weights(), keys, strict=True):
            weight.copy_(torch_of[key].T if weight.dim() == 2 else torch_of[key])
    x, y = torch_of["x"].double(), torch_of["y"]
    task = Task("golden", lambda: TanhMLP().double(), (x[0], y[0]), (x[0], y[0]), batch_size=16)
    pool = Pool([Teacher("adam", 0.005), Teacher("rmsprop", 0.005), Teacher("sgd", 0.2)])
    how = Amalgamation(
        mechanism="mean" if config["reduce"] == "reduce_mean" else "min-max",
        scale_teachers=config["do_teacher_parameter_scale"],
        log_objective=config["use_log_objective"],
        normaliser="every-batch",
        backend="reference",
    )
    unroll = Unroll(task, student, pool, how)

    def flat(prefix: str) -> Tensor:
        return torch.cat([torch_of[f"{prefix}.{i}"].double().flatten() for i in range(4)])

    batches = [(one[None], of[None]) for one, of in zip(x, y, strict=True)]
    warmup = config["warmup"]
    begin = unroll.start_from(flat("init_param")[None], flat("scale")[None])
    warm = unroll.warm_up(begin, batches[:warmup])
    state = type(warm.state)(*(tensor[0] for tensor in warm.state))
    assert relative(warm.params[0], flat("after_warmup.params").numpy()) < 1e-5
    for leaf, ours in (("m", state.m), ("v", state.v)):
        parts = [torch_of[f"after_warmup.student.{i}.{leaf}"].flatten() for i in range(4)]
        assert relative(ours, torch.cat(parts).numpy()) < 1e-5
    for layer in range(2):
        for leaf, ours in (("0", state.h[layer]), ("1", state.c[layer])):
            parts = [torch_of[f"after_warmup.student.{i}.rnn_{layer}.{leaf}"] for i in range(4)]
            assert torch.equal(ours.T, torch.cat(parts).double())

    window = unroll.window(warm, batches[warmup:])
    assert relative(window.meta_loss.detach()[0], data["meta_loss"]) < 1e-5
    assert relative(window.imitation_loss.detach()[0], data["imitation_loss"]) < 1e-5
    assert window.skipped.sum() == 0
    loss = window.meta_loss + float(data["imitation_weight"]) * window.imitation_loss
    for i, grad in enumerate(torch.autograd.grad(loss.sum(), student.weights())):
        ours = grad.T if grad.dim() == 2 else grad
        assert relative(ours, data[f"grad_of_loss.weight.{i}"]) < 1e-5
    finals = [window.end.params[0], *window.end.teacher_params[:, 0]]
    for who, ours in zip(["student", "adam", "rmsprop", "sgd"], finals, strict=True):
        assert relative(ours, flat(f"final_params.{who}").numpy()) < 1e-5
