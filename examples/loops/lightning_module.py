"""AmalgamatedOptimizer in a LightningModule, whose Trainer clips gradients and keeps checkpoints.

python examples/loops/lightning_module.py [FOLDER]    (pip install lightning)
"""

from __future__ import annotations

import sys
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

from amalgam import AmalgamatedOptimizer, tasks


class Classifier(lightning.LightningModule):
    """An MLP for scikit-learn's digits.

    Args:
        steps: Length of the schedule.
    """

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.layers = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The loss of a batch."""
        x, y = batch
        return nn.functional.cross_entropy(self.layers(x), y)

    def configure_optimizers(self) -> Any:
        """The optimizer, and a schedule that steps with it."""
        optimizer = AmalgamatedOptimizer(self.parameters())
        scheduler = CosineAnnealingLR(optimizer, self.steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def train(
    folder: str, steps: int = 100, length: int | None = None, checkpoint: str | None = None
) -> lightning.Trainer:
    """Train the classifier, and leave a checkpoint of the end.

    Args:
        folder: For ``last.ckpt``.
        steps: At which step to stop.
        length: Of the schedule, in steps; ``None`` for ``steps``.
        checkpoint: A file to go on from.
    """
    torch.manual_seed(0)
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        gradient_clip_val=1.0,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = TensorDataset(*tasks.load("digits-mlp").train)
    trainer.fit(Classifier(length or steps), DataLoader(data, batch_size=32), ckpt_path=checkpoint)
    trainer.save_checkpoint(f"{folder}/last.ckpt")
    return trainer


if __name__ == "__main__":
    train(sys.argv[1] if len(sys.argv) > 1 else "lightning-output")
