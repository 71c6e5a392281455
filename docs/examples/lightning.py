"""Fine-tune a pretrained encoder on news with Lightning: the module compiles its model in place.

    python docs/examples/lightning.py --steps 20

Needs `pip install pytorch-lightning` beside what plain_loop.py needs.
"""

from typing import Any

import pytorch_lightning as pl
import torch
import typer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import wtacrs_fx
from wtacrs_fx.tools.classification import Classifier, load_encoder
from wtacrs_fx.tools.texts import load_texts

MIB = 2**20


class News(pl.LightningModule):
    """A classifier of news."""

    def __init__(self, encoder: torch.nn.Module, classes: int) -> None:
        super().__init__()
        self.model = Classifier(encoder, classes).train()  # Lightning leaves the mode as it is
        self.model.compile(backend="wtacrs")  # in place: the names of the checkpoint stay as they are

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], index: int) -> Tensor:
        """Return the loss of a batch: a scalar."""
        loss, _ = self.model(*batch)
        self.print(f"step {self.global_step + 1}: loss {loss.item():.3f}")
        return loss

    def configure_optimizers(self) -> Any:
        """Return the optimizer of all weights."""
        return torch.optim.AdamW(self.parameters(), lr=5e-4)


def main(steps: int = 20, batch: int = 16, length: int = 64, layers: int = 2) -> None:
    """Train so many steps; print the loss of each, and what it stored for the backward pass."""
    pl.seed_everything(0, verbose=False)
    tokenizer, encoder = load_encoder()
    encoder.encoder.layer = encoder.encoder.layer[:layers]  # fewer layers, to be quick
    texts, labels, names = load_texts()
    tokenizer.model_max_length = length
    tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    samples = TensorDataset(tokens["input_ids"], tokens["attention_mask"], torch.tensor(labels))
    batches = DataLoader(samples, batch, shuffle=True, drop_last=True)
    trainer = pl.Trainer(max_steps=steps, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.fit(News(encoder, len(names)), batches)

    report = wtacrs_fx.reports()[-1]  # print(report) shows every layer
    after, before = report.saved_bytes_after / MIB, report.saved_bytes_before / MIB
    print(f"saved for the backward pass: {after:.2f} MiB; Inductor would save {before:.2f} MiB")


if __name__ == "__main__":
    typer.run(main)
