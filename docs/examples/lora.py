"""Fine-tune LoRA adapters of a pretrained encoder on news: frozen weights store no rows at all.

    python docs/examples/lora.py --steps 20

Needs `pip install peft` beside what plain_loop.py needs. The A of each adapter is sampled; its B has too few
features to gain from it. What frozen layers keep for the gradients of their inputs, such as pre-activations
and attention operands, is encoded as without adapters.
"""

import torch
import typer
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader, TensorDataset

import wtacrs_fx
from wtacrs_fx.tools.classification import Classifier, load_encoder
from wtacrs_fx.tools.texts import load_texts

MIB = 2**20
ATTENTION_AND_MLP = r"encoder\.layer\..*\.(query|key|value|dense)"


def main(steps: int = 20, batch: int = 16, length: int = 64, layers: int = 2, rank: int = 8) -> None:
    """Train so many steps; print the loss of each, and what it stored for the backward pass."""
    torch.manual_seed(0)
    tokenizer, encoder = load_encoder()
    encoder.encoder.layer = encoder.encoder.layer[:layers]  # fewer layers, to be quick
    texts, labels, names = load_texts()
    adapted = get_peft_model(encoder, LoraConfig(r=rank, target_modules=ATTENTION_AND_MLP))
    model = Classifier(adapted, len(names)).train()  # the head is trained in full

    compiled = torch.compile(model, backend="wtacrs")  # after the adapters are in

    tokenizer.model_max_length = length
    tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    samples = TensorDataset(tokens["input_ids"], tokens["attention_mask"], torch.tensor(labels))
    batches = DataLoader(samples, batch, shuffle=True, drop_last=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3)
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
