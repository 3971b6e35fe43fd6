"""Trains a transformer on characters by AdamW and by AmalgamatedOptimizer, all else equal.

python examples/character_transformer.py [--steps 200] [--seeds 1] [--out FOLDER]

The text is Python's own: its help on the language's topics, 460,000 characters of 103 kinds. The
last tenth of it is for validation.
"""

from __future__ import annotations

import pydoc_data.topics
from functools import partial

import torch
from comparison import SCHEDULES, MakeOptimizer, Run, compare, parser
from torch import Tensor, nn
from torch.nn import functional

BATCH, CONTEXT = 16, 64
WIDTH, HEADS, LAYERS = 128, 4, 3
LARGEST_NORM = 1.0  # of the gradient; larger ones are scaled to it
VALIDATIONS = 8
VALIDATION_BATCHES = 8


class Text:
    """The text as numbers of characters, int64, split in two."""

    def __init__(self) -> None:
        text = "".join(pydoc_data.topics.topics.values())
        characters = sorted(set(text))
        number = {character: index for index, character in enumerate(characters)}
        numbers = torch.tensor([number[character] for character in text])
        held_out = len(numbers) // 10
        self.kinds = len(characters)
        self.train, self.held_out = numbers[:-held_out], numbers[-held_out:]

    @staticmethod
    def batch(numbers: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw pieces of a text; of each what a model reads, and what it is to say.

        Both have the shape (batch, context).
        """
        begins = torch.randint(len(numbers) - CONTEXT, (BATCH, 1), generator=generator)
        pieces = numbers[begins + torch.arange(CONTEXT + 1)]
        return pieces[:, :-1], pieces[:, 1:]


class Transformer(nn.Module):
    """A decoder of some 0.6 million parameters.

    Args:
        kinds: How many characters there are.
    """

    def __init__(self, kinds: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(kinds, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(
            layer, LAYERS, nn.LayerNorm(WIDTH), enable_nested_tensor=False
        )
        self.head = nn.Linear(WIDTH, kinds)
        for embedding in (self.characters, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT))

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the next character.

        Args:
            x: Numbers of characters, shape (batch, context).

        Returns:
            Scores, shape (batch, context, kinds).
        """
        embedded = self.characters(x) + self.positions.weight
        return self.head(self.blocks(embedded, mask=self.mask, is_causal=True))


def loss_of(scores: Tensor, y: Tensor) -> Tensor:
    """The mean cross-entropy, in nats a character."""
    return functional.cross_entropy(scores.flatten(0, 1), y.flatten())


@torch.no_grad()
def validate(model: nn.Module, text: Text) -> tuple[float, float]:
    """Loss and accuracy on pieces of the validation text, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    x, y = zip(
        *(text.batch(text.held_out, generator) for _ in range(VALIDATION_BATCHES)), strict=True
    )
    model.eval()
    scores = torch.cat([model(each) for each in x])
    model.train()
    targets = torch.cat(y)
    return loss_of(scores, targets).item(), (scores.argmax(-1) == targets).float().mean().item()


def train(
    text: Text,
    name: str,
    make_optimizer: MakeOptimizer,
    schedule: str,
    seed: int,
    steps: int,
) -> Run:
    """Train one model.

    Args:
        text: What to train and validate on.
        name: The optimizer's.
        make_optimizer: Its constructor, which takes the parameters.
        schedule: One of :data:`comparison.SCHEDULES`.
        seed: Of the model's first parameters and of the batches.
        steps: How many to take.
    """
    torch.manual_seed(seed)
    model = Transformer(text.kinds)
    optimizer = make_optimizer(model.parameters())
    scheduler = SCHEDULES[schedule](optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    losses, validation, accuracy = [], {}, 0.0
    for step in range(steps):
        x, y = text.batch(text.train, generator)
        loss = loss_of(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), LARGEST_NORM)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        taken = step + 1
        if taken % max(1, steps // VALIDATIONS) == 0 or taken == steps:
            validation[taken], accuracy = validate(model, text)
    return Run(name, schedule, seed, losses, validation, accuracy)


def main(arguments: list[str] | None = None) -> None:
    """Train, print and write what the options ask for.

    Args:
        arguments: The command line's, by default.
    """
    options = parser(__doc__, steps=200, seeds=1).parse_args(arguments)
    text = Text()
    title = f"character transformer: {options.steps} steps of {BATCH} x {CONTEXT}"
    compare(partial(train, text), title, options)


if __name__ == "__main__":
    main()
