"""AmalgamatedOptimizer in Hugging Face's Trainer, which makes the schedule and keeps checkpoints.

python examples/loops/hugging_face_trainer.py [FOLDER]    (pip install transformers accelerate)
"""

from __future__ import annotations

import pydoc_data.topics
import sys

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from amalgam import AmalgamatedOptimizer

CONTEXT = 32


class Pieces(Dataset):
    """Pieces of text as bytes, which a causal language model is also to predict."""

    def __init__(self, count: int) -> None:
        text = "".join(pydoc_data.topics.topics.values()).encode()[: count * CONTEXT]
        self.pieces = torch.tensor(list(text)).view(count, CONTEXT)

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.pieces[index], "labels": self.pieces[index]}


def train(folder: str, steps: int = 100, resume: bool = False) -> Trainer:
    """Train a small GPT-2.

    Args:
        folder: For the checkpoints, one at half of the steps.
        steps: How many to take.
        resume: Whether to go on from the last checkpoint.
    """
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=256, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=2, use_cache=False
    )
    model = GPT2LMHeadModel(config)
    arguments = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=8,
        lr_scheduler_type="cosine",
        save_steps=max(1, steps // 2),
        report_to=[],
        disable_tqdm=True,
    )
    optimizer = AmalgamatedOptimizer(model.parameters())
    # Where the second is None, the Trainer makes the schedule that its arguments name.
    trainer = Trainer(model, arguments, train_dataset=Pieces(512), optimizers=(optimizer, None))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


if __name__ == "__main__":
    train(sys.argv[1] if len(sys.argv) > 1 else "trainer-output")
