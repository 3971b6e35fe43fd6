"""Trains a small convolutional network by AdamW and by AmalgamatedOptimizer, all else equal.

python examples/image_classifier.py [--data digits] [--steps 300] [--seeds 3] [--out FOLDER]

The images are a published set that $AMALGAM_DATA holds, else its stand-in, which is drawn on the
first run; or scikit-learn's digits.
"""

from __future__ import annotations

from functools import partial

import torch
from comparison import SCHEDULES, MakeOptimizer, Run, compare, parser
from torch import Tensor, nn
from torch.nn import functional

from amalgam import tasks
from amalgam.tasks import datasets
from amalgam.tasks.published import PUBLISHED

BATCH = 64
VALIDATIONS = 10
LARGEST_VALIDATION = 2000  # images; of more, validating would take longer than training


class Images:
    """Images of shape (samples, channels, height, width) in [0, 1], and their labels.

    Args:
        name: ``"digits"``, or one of :data:`amalgam.tasks.published.PUBLISHED`.
    """

    def __init__(self, name: str) -> None:
        if name == "digits":
            task = tasks.load("digits-cnn")
            (x, self.y), (held_out, self.held_out_y) = task.train, task.validation
            self.x, self.held_out = (each.view(-1, 1, 8, 8) for each in (x, held_out))
        else:
            found = datasets.load(name)
            (self.x, self.y), (held_out, labels) = found.train, found.validation
            self.held_out = held_out[:LARGEST_VALIDATION].float() / 255
            self.held_out_y = labels[:LARGEST_VALIDATION]
            name = f"{name} ({found.source})"
        self.name = name

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw a batch, images as float32."""
        drawn = torch.randint(len(self.y), (BATCH,), generator=generator)
        x = self.x[drawn]
        return (x if x.is_floating_point() else x.float() / 255), self.y[drawn]


def build(channels: int, classes: int) -> nn.Module:
    """Three convolutions with batch normalisation: 24,170 parameters for grey images."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *block(channels, 16),
        nn.MaxPool2d(2),
        *block(16, 32),
        nn.MaxPool2d(2),
        *block(32, 64),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, classes),
    )


@torch.no_grad()
def validate(model: nn.Module, images: Images) -> tuple[float, float]:
    """Loss and accuracy on the validation images."""
    model.eval()
    scores = torch.cat([model(x) for x in images.held_out.split(500)])
    model.train()
    loss = functional.cross_entropy(scores, images.held_out_y)
    return loss.item(), (scores.argmax(1) == images.held_out_y).float().mean().item()


def train(
    images: Images,
    name: str,
    make_optimizer: MakeOptimizer,
    schedule: str,
    seed: int,
    steps: int,
) -> Run:
    """Train one model.

    Args:
        images: What to train and validate on.
        name: The optimizer's.
        make_optimizer: Its constructor, which takes the parameters.
        schedule: One of :data:`comparison.SCHEDULES`.
        seed: Of the model's first parameters and of the batches.
        steps: How many to take.
    """
    torch.manual_seed(seed)
    model = build(images.held_out.shape[1], int(images.held_out_y.max()) + 1)
    optimizer = make_optimizer(model.parameters())
    scheduler = SCHEDULES[schedule](optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    losses, validation, accuracy = [], {}, 0.0
    for step in range(steps):
        x, y = images.batch(generator)
        loss = functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        taken = step + 1
        if taken % max(1, steps // VALIDATIONS) == 0 or taken == steps:
            validation[taken], accuracy = validate(model, images)
    return Run(name, schedule, seed, losses, validation, accuracy)


def main(arguments: list[str] | None = None) -> None:
    """Train, print and write what the options ask for.

    Args:
        arguments: The command line's, by default.
    """
    options_parser = parser(__doc__, steps=300, seeds=3)
    options_parser.add_argument("--data", choices=["digits", *PUBLISHED], default="fmnist")
    options = options_parser.parse_args(arguments)
    images = Images(options.data)
    title = f"image classifier: {images.name}, {options.steps} steps of {BATCH}"
    compare(partial(train, images), title, options)


if __name__ == "__main__":
    main()
