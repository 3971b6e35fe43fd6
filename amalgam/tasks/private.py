"""Differentially private gradients, as the paper's task MNIST-DP has them (section 5.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from amalgam.tasks.task import Batch, Loss


@dataclass(frozen=True)
class PrivateGradient:
    """Each example's gradient clipped, then summed, noised, and divided by the batch's size.

    :class:`amalgam.tasks.Task` takes it as its ``gradient``. An example's gradient is shortened to
    the norm ``clip``, taken over all parameters; the noise is normal, with a standard deviation of
    ``clip * noise_multiplier``. Layers that mix examples, such as batch norm, can't be private and
    are refused by PyTorch.

    Attributes:
        clip: The largest norm of one example's gradient.
        noise_multiplier: The noise's standard deviation, as a multiple of ``clip``.
    """

    clip: float = 1.0
    noise_multiplier: float = 1.1

    def __call__(
        self, module: nn.Module, loss: Loss, batch: Batch, generator: torch.Generator
    ) -> Tensor:
        """Set the ``grad`` of all parameters that require one.

        Args:
            module: The optimizee.
            loss: The loss of output and target.
            batch: A batch; the last tensor is the target.
            generator: Draws the noise, on the CPU.

        Returns:
            The mean of the examples' losses, without noise.
        """
        params = {name: p for name, p in module.named_parameters() if p.requires_grad}
        buffers = dict(module.named_buffers())

        def of_one(params: dict[str, Tensor], example: Batch) -> Tensor:
            *inputs, target = (tensor[None] for tensor in example)
            return loss(
                torch.func.functional_call(module, (params, buffers), tuple(inputs)), target
            )

        detached = {name: parameter.detach() for name, parameter in params.items()}
        each = torch.func.vmap(
            torch.func.grad_and_value(of_one), in_dims=(None, 0), randomness="different"
        )
        gradients, losses = each(detached, batch)
        squares = [gradient.flatten(1).square().sum(1) for gradient in gradients.values()]
        norms = torch.stack(squares).sum(0).sqrt()
        factors = (self.clip / norms).clamp(max=1)
        for name, parameter in params.items():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            clipped = torch.tensordot(factors, gradients[name], 1)
            noised = clipped + self.clip * self.noise_multiplier * noise
            parameter.grad = noised / len(losses)
        mean: Tensor = losses.mean()
        return mean
