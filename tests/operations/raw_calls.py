"""Calls every operator of ``torch.ops.amalgam`` with arguments that mostly do not fit.

``python raw_calls.py SEED COUNT`` makes so many calls of each operator, prints how many computed,
and stops at the first that broke a rule: whatever the arguments are, an operator computes or raises
an exception; the ``cpu`` backend refuses what the reference refuses; and nothing outside of the
tensors that it may write to changes. A test looks at the exit status, which is negative after a
signal.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import amalgam  # noqa: F401  registers the operators

GUARD, MARK = 64, 0.625
WRITTEN = {"params", "m", "v", "h", "c"}  # of student_step_
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool)
NUMBERS = (0.0, 1.0, -1.0, 0.9, float("nan"), float("inf"), 1e30)
INTEGERS = (-1, 0, 1, 3, 7, 2**31, 2**32, 2**62, -(2**63))
BACKENDS = ("cpu", "auto", "reference", "cpu:bf16", "cpu:bf16,approximate", "cpu:tf33", "")

Arguments = dict[str, Any]


class Calls:
    """Draws arguments, all from one seed."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.guards: list[Tensor] = []

    def tensor(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Numbers in [0, 1), with marks before and behind them."""
        count = 1
        for size in shape:
            count *= size
        block = torch.full((count + 2 * GUARD,), MARK, dtype=torch.float64)
        block[GUARD : GUARD + count] = torch.rand(
            count, generator=self.generator, dtype=torch.float64
        )
        block = block.to(dtype)
        self.guards.append(block)
        return block[GUARD : GUARD + count].view(shape)

    def guards_hold(self) -> bool:
        """Whether all marks are as they were."""
        return all(
            bool((end == torch.tensor(MARK).to(block.dtype)).all())
            for block in self.guards
            for end in (block[:GUARD], block[-GUARD:])
        )

    def weights(
        self, layers: int, hidden: int, inputs: int, outputs: int, *of: int
    ) -> list[Tensor]:
        found = []
        for layer in range(layers):
            found += [
                self.tensor(4 * hidden, hidden if layer else inputs),
                self.tensor(4 * hidden, hidden),
                self.tensor(*(() if layer else of), 4 * hidden),
            ]
        return [*found, self.tensor(outputs, hidden), self.tensor(outputs)]

    def student(self) -> tuple[int, int, int, Arguments]:
        """Coordinates, layers, units, and the arguments that all forms of a step share."""
        n = self.chance.choice((0, 1, 7, 33, 100))
        layers, hidden = self.chance.choice(((1, 1), (1, 8), (2, 4), (2, 20), (3, 5)))
        state = {"m": self.tensor(n), "v": self.tensor(n)}
        cells = {name: self.tensor(layers, hidden, n) for name in "hc"}
        return n, layers, hidden, state | cells

    def form(self, n: int, layers: int, hidden: int, *steps: int) -> Arguments:
        constants = {"alpha": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-10}
        if self.chance.random() < 0.5:
            weights = self.weights(layers, hidden, 2, 1)
            return {"weights": weights, **constants, "corrections": None, "sizes": []}
        sizes = [n // 3, 0, n - n // 3]
        weights = self.weights(layers, hidden, 3, 2, *steps, 3)
        corrections = 1 + self.tensor(*steps, 3, 3)
        return {"weights": weights, **constants, "corrections": corrections, "sizes": sizes}

    def pool(self, k: int) -> Arguments:
        columns = {"lr": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-10}
        kinds = [self.chance.randrange(6) for _ in range(k)]
        return {"kinds": kinds, **{name: [value] * k for name, value in columns.items()}}

    def student_step(self) -> Arguments:
        n, layers, hidden, state = self.student()
        return {"grad": self.tensor(n), **state, **self.form(n, layers, hidden)}

    def student_step_backward(self) -> Arguments:
        step = self.student_step()
        grads = [self.tensor(*step[name].shape) for name in ("grad", "m", "v", "h", "c")]
        return {"grads_out": grads, **step}

    def student_unroll_backward(self) -> Arguments:
        n, layers, hidden, state = self.student()
        steps = self.chance.choice((0, 1, 3))
        inputs = {name: self.tensor(steps, n) for name in ("grads", "adjoints")}
        return {**inputs, **state, **self.form(n, layers, hidden, steps)}

    def student_step_(self) -> Arguments:
        n, layers, hidden, _ = self.student()
        sizes = [n // 3, 0, n - n // 3]
        form = {**self.form(n, layers, hidden), "sizes": []}
        states = {name: [self.tensor(size) for size in sizes] for name in "mv"}
        states |= {name: [self.tensor(layers, hidden, size) for size in sizes] for name in "hc"}
        control, steps, seeds = None, [], []
        if self.chance.random() < 0.5:
            control = self.tensor(4, dtype=torch.float64)
            steps = [self.tensor() for _ in sizes]
            seeds = [self.chance.randrange(2**32) for _ in sizes]
        return {
            "params": [self.tensor(size) for size in sizes],
            "grads": [self.tensor(size) for size in sizes],
            **states,
            **form,
            **{"lr": 1.0, "weight_decay": 0.0, "control": control, "steps": steps},
            **{"warmup_steps": self.chance.choice((0, 2)) if steps else 0, "seeds": seeds},
        }

    def choice_step(self) -> Arguments:
        n, layers, hidden, state = self.student()
        k = self.chance.choice((1, 2, 6))
        return {
            "grad": self.tensor(n),
            **state,
            **{name: self.tensor(k, n) for name in "mv"},
            "weights": self.weights(layers, hidden, k + 4, k),
            "ranks": torch.arange(n) % 5,
            **self.pool(k),
            **{"steps": 7, "time_scale": 20.0, "learning_rate": 1.0},
        }

    def choice_step_backward(self) -> Arguments:
        step = self.choice_step()
        grads = [self.tensor(*step[name].shape) for name in ("grad", "m", "v", "h", "c", "m")]
        return {"grads_out": grads, **step}

    def teacher_step(self) -> Arguments:
        k, n = self.chance.choice((0, 1, 6)), self.chance.choice((0, 1, 33))
        return {**{name: self.tensor(k, n) for name in ("grads", "m", "v")}, **self.pool(k)}

    def teacher_step_backward(self) -> Arguments:
        step = self.teacher_step()
        return {"grads_out": [self.tensor(*step["m"].shape) for _ in range(3)], **step}

    def teacher_distance(self) -> Arguments:
        k, n = self.chance.choice((0, 1, 6)), self.chance.choice((0, 1, 33))
        delta = self.chance.choice((None, 0.5))
        return {
            "student": self.tensor(n),
            "teachers": self.tensor(k, n),
            **{"eps": 1e-10, "huber_delta": delta},
        }

    def teacher_distance_backward(self) -> Arguments:
        step = self.teacher_distance()
        k = len(step["teachers"])
        return {
            "grad": self.tensor(k),
            **{name: step[name] for name in ("student", "teachers")},
            "total": self.tensor(k),
            **{name: step[name] for name in ("eps", "huber_delta")},
            "need_teachers": self.chance.random() < 0.5,
        }

    def changed_tensor(self, tensor: Tensor) -> Tensor:
        """Another size, dtype, layout, or number of dimensions."""
        dim = self.chance.randrange(max(tensor.dim(), 1))
        shape = [*tensor.shape] or [1]

        def resized(by: int) -> Tensor:
            shape[dim] = max(0, shape[dim] + by)
            return self.tensor(*shape, dtype=tensor.dtype)

        ways: list[Callable[[], Tensor]] = [
            lambda: resized(-1),
            lambda: resized(1),
            lambda: resized(-shape[dim]),
            lambda: resized(self.chance.choice((2, 5, 40))),
            lambda: tensor.to(self.chance.choice(DTYPES)),
            lambda: tensor.flatten(),
            lambda: tensor[None],
            lambda: tensor.movedim(0, -1) if tensor.dim() else tensor,
            lambda: self.tensor(*[2 * size for size in shape])[
                tuple(slice(0, None, 2) for _ in shape)
            ],
            lambda: torch.zeros(()).to(tensor.dtype).expand(tensor.shape),
            lambda: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"),
            lambda: tensor.to_sparse() if tensor.is_floating_point() else tensor,
            lambda: self.tensor(),
            lambda: tensor.detach().clone().requires_grad_(tensor.is_floating_point()),
            lambda: tensor.conj() if tensor.is_complex() else tensor.to(torch.complex64),
        ]
        return self.chance.choice(ways)()

    def changed(self, value: Any) -> Any:
        """Another value of what an argument takes."""
        if isinstance(value, Tensor):
            return self.changed_tensor(value)
        if isinstance(value, bool):
            return not value
        if isinstance(value, float):
            return self.chance.choice(NUMBERS)
        if isinstance(value, int):
            return self.chance.choice(INTEGERS)
        if isinstance(value, list):
            if not value or self.chance.random() < 0.3:
                some = value[:1] or [self.chance.choice((1, self.tensor(3)))]
                return self.chance.choice(([], value[:-1], value[1:], value + some, value * 40))
            index = self.chance.randrange(len(value))
            return [*value[:index], self.changed(value[index]), *value[index + 1 :]]
        return self.chance.choice((None, 0.5, self.tensor(3, 2)))


def outcome(name: str, arguments: Arguments, backend: str) -> str | None:
    """The error of a call, or ``None`` where it computed."""
    try:
        getattr(torch.ops.amalgam, name)(*arguments.values(), backend)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def main(seed: int, count: int) -> None:
    names = sorted(
        schema.name.removeprefix("amalgam::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("amalgam::")
    )
    for name in names:
        computed = 0
        for number in range(count):
            calls = Calls(seed * 1_000_003 + number)
            arguments = getattr(calls, name)()
            for _ in range(calls.chance.choice((0, 1, 1, 1, 2))):
                key = calls.chance.choice([*arguments])
                arguments[key] = calls.changed(arguments[key])
            backend = calls.chance.choice(BACKENDS)
            # So that the call that ends in a signal is known.
            print(f"{name}, call {number}, backend {backend!r}", file=sys.stderr)
            refused = outcome(name, arguments, backend)
            computed += refused is None
            if not calls.guards_hold():
                sys.exit(f"{name}, call {number}: {backend!r} wrote outside of its tensors")
            if refused is None and backend.startswith("cpu"):
                other = outcome(name, arguments, "reference")
                if other is not None:
                    sys.exit(f"{name}, call {number}: computed what the reference refuses: {other}")
        print(f"{name}: computed {computed} of {count} calls", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
