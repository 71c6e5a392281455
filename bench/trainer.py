"""A transformers ``Trainer`` on MiniLM and BBC news, with Inductor and with wtacrs.

    python -m bench.trainer

Three seeds; about 15 minutes on a core.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
from typing import Annotated, Any

import torch
import typer
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)

from bench.harness import BASELINE, MIB, Row, circumstances, record
from wtacrs_fx.integrations.transformers import enable
from wtacrs_fx.tools.classification import packaged_encoder
from wtacrs_fx.tools.texts import load_texts, split

HELD_OUT = 400
VARIANTS = (BASELINE, "wtacrs 0.3 balanced")


def accuracy(found: Any) -> dict[str, float]:
    """Return the share of texts whose class was found."""
    return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}


@functools.cache
def load(length: int) -> tuple[list[dict[str, Any]], int]:
    """Return BBC news as a trainer reads it, and the number of classes."""
    texts, labels, classes = load_texts()
    tokenizer = AutoTokenizer.from_pretrained(packaged_encoder())
    encoded = tokenizer(texts, truncation=True, max_length=length, padding="max_length")
    samples = [
        {"input_ids": ids, "attention_mask": mask, "label": label}
        for ids, mask, label in zip(encoded["input_ids"], encoded["attention_mask"], labels, strict=True)
    ]
    return samples, len(classes)


def run(variant: str, seed: int, steps: int, batch: int, length: int, layers: int | None) -> dict[str, float]:
    """Train once; return accuracy on held-out texts, and saved MiB before and after."""
    samples, classes = load(length)
    folder = packaged_encoder()
    train, test = ([samples[i] for i in part] for part in split(len(samples), seed))
    # Without attention dropout, which has no fused kernel on CPU.
    config = AutoConfig.from_pretrained(
        folder, num_labels=classes, attention_probs_dropout_prob=0.0,
        **({} if layers is None else {"num_hidden_layers": layers}),
    )  # fmt: skip
    torch.manual_seed(seed)
    trainer = Trainer(
        AutoModelForSequenceClassification.from_pretrained(folder, config=config),
        TrainingArguments(
            tempfile.mkdtemp(), max_steps=steps, per_device_train_batch_size=batch, learning_rate=2e-4,
            per_device_eval_batch_size=50, seed=seed, save_strategy="no", report_to=[], disable_tqdm=True,
            dataloader_drop_last=True, use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=train,
        eval_dataset=test[:HELD_OUT],
        compute_metrics=accuracy,
    )  # fmt: skip
    figures: dict[str, Any] = {}
    if variant == BASELINE:
        trainer.model.compile(backend="inductor")
    else:
        callback = enable(trainer)
    trainer.train()
    figures["accuracy"] = trainer.evaluate()["eval_accuracy"]
    if variant != BASELINE:
        report = callback.backend.reports[0]
        figures |= {"before": report.saved_bytes_before / MIB, "after": report.saved_bytes_after / MIB}
    torch._dynamo.reset()
    return figures


def measure(seeds: int, steps: int, batch: int, length: int, layers: int | None = None) -> list[Row]:
    """Return accuracies with their standard error, the difference within a seed, and saved bytes."""
    found = {
        variant: [run(variant, seed, steps, batch, length, layers) for seed in range(seeds)]
        for variant in VARIANTS
    }
    shapes = f"batch={batch} length={length} steps={steps}"
    exact, ours = ([100 * one["accuracy"] for one in found[variant]] for variant in VARIANTS)

    def row(variant: str, metric: str, unit: str, **figures: Any) -> Row:
        return Row(
            "trainer", "MiniLM, BBC news", variant, metric, unit=unit, shapes=shapes,
            **figures, **circumstances(),
        )  # fmt: skip

    def mean_and_error(variant: str, metric: str, values: list[float]) -> list[Row]:
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
        return [
            row(variant, metric, "%", value=statistics.fmean(values), rounds=len(values)),
            row(variant, f"{metric}, standard error", "%", value=error, rounds=len(values)),
        ]

    before, after = found[VARIANTS[1]][0]["before"], found[VARIANTS[1]][0]["after"]
    return [
        *mean_and_error(VARIANTS[0], "accuracy", exact),
        *mean_and_error(VARIANTS[1], "accuracy", ours),
        *mean_and_error(VARIANTS[1], "difference", [b - a for a, b in zip(exact, ours, strict=True)]),
        row(VARIANTS[0], "saved", "MiB", value=before, ratio=1.0),
        row(VARIANTS[1], "saved", "MiB", value=after, ratio=after / before),
    ]


def main(
    seeds: int = 3,
    steps: int = 60,
    batch: int = 16,
    length: int = 128,
    quick: Annotated[bool, typer.Option(help="One layer, two steps and one seed; keep no rows.")] = False,
) -> None:
    """Train and compare; append rows to bench/results."""
    rows = measure(1, 2, 8, 32, 1) if quick else measure(seeds, steps, batch, length)
    record(rows, keep=not quick)


if __name__ == "__main__":
    typer.run(main)
