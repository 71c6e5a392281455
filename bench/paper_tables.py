"""Memory of fine-tuning T5 as in the paper's table 2, and the largest batch, without allocating anything.

    python -m bench.paper_tables

Models of one and of two layers a stack are traced on the meta device, in float32, in training mode with
dropout 0.1; the bytes of L layers follow, because layers are alike (`--check` partitions one model in full
and compares). Eager: all tensors that autograd keeps. wtacrs: the tensors that cross the partition. Memory
is weights, gradients and AdamW's two moments of what is trained, plus those activations; what is held for a
moment only, such as the gradient of the logits, is left out.

Published: Liu et al. 2023 (arXiv 2305.15265), table 2, measured peaks on a GPU. The text has 128 tokens, as
theirs; the label 8. LoRA: rank 32 on all linears.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

import wtacrs_fx
from bench.harness import Row, circumstances, record
from wtacrs_fx import Policy
from wtacrs_fx.tools.measure import saved_bytes
from wtacrs_fx.tools.predict import CARDS, Loss, largest_batch

TOKENS, LABEL_TOKENS = 128, 8
ADAMW = 4 * 4  # bytes for each trained weight: itself, its gradient, two moments
GB = 1e9


@dataclass(frozen=True)
class Size:
    """A published T5: sizes, layers of each stack, batches of the table."""

    d: int
    d_ff: int
    d_kv: int
    heads: int
    layers: int
    batches: tuple[int, ...]


SIZES = {
    "T5-Base": Size(768, 3072, 64, 12, 12, (64, 100)),
    "T5-Large": Size(1024, 4096, 64, 16, 24, (64, 100)),
    "T5-3B": Size(1024, 16384, 128, 32, 24, (32,)),
}
PUBLISHED = {
    "T5-Base": {"rows 0.3": 2.1, "rows 0.1": 2.4, "LoRA, rows 0.3": 2.7, "LoRA, rows 0.1": 3.2},
    "T5-Large": {"rows 0.3": 2.1, "rows 0.1": 2.5, "LoRA, rows 0.3": 2.6, "LoRA, rows 0.1": 3.13},
}


@dataclass(frozen=True)
class Method:
    """One line of the table; without a policy it is eager."""

    lora: bool = False
    policy: Policy | None = None


def _rows(ratio: float, residuals: Any, lora: bool = False) -> Method:
    return Method(lora, Policy(ratio=ratio, residuals=residuals))


METHODS = {
    "full": Method(),
    "LoRA": Method(lora=True),
    "rows 0.3": _rows(0.3, "exact"),
    "rows 0.1": _rows(0.1, "exact"),
    "LoRA, rows 0.3": _rows(0.3, "exact", lora=True),
    "LoRA, rows 0.1": _rows(0.1, "exact", lora=True),
    "balanced 0.3": _rows(0.3, "balanced"),
    "balanced 0.1": _rows(0.1, "balanced"),
    "LoRA, balanced 0.3": _rows(0.3, "balanced", lora=True),
    "LoRA, balanced 0.1": _rows(0.1, "balanced", lora=True),
}


def build(size: Size, layers: int, lora: bool) -> Loss:
    """Return a model on the meta device."""
    config = T5Config(
        vocab_size=32128, d_model=size.d, d_ff=size.d_ff, d_kv=size.d_kv, num_heads=size.heads,
        num_layers=layers, decoder_start_token_id=0, use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        model: Any = T5ForConditionalGeneration(config)
        if lora:
            targets = ["q", "k", "v", "o", "wi", "wo"]
            model = get_peft_model(model, LoraConfig(r=32, target_modules=targets))
    return Loss(model.train())


def inputs(batch: int) -> tuple[Tensor, Tensor]:
    """Return the ids of the text [batch, TOKENS] and of the label [batch, LABEL_TOKENS], on meta."""
    return tuple(torch.zeros(batch, n, dtype=torch.long, device="meta") for n in (TOKENS, LABEL_TOKENS))  # type: ignore[return-value]


def activations(size: Size, method: Method, layers: int, batch: int) -> int:
    """Return the bytes of a batch that cross from the forward to the backward pass."""
    model, arguments = build(size, layers, method.lora), inputs(batch)
    if method.policy is None:
        owned = [*model.parameters(), *model.buffers(), *arguments]
        return saved_bytes(lambda: model(*arguments), owned)
    return int(wtacrs_fx.explain(model, *arguments, policy=method.policy).saved_bytes_after)


def of_all_layers(size: Size, method: Method, batch: int) -> int:
    """Return the bytes of the whole model from those of one and of two layers a stack."""
    one, two = (activations(size, method, layers, batch) for layers in (1, 2))
    return one + (size.layers - 1) * (two - one)


def weights_bytes(size: Size, lora: bool) -> int:
    """Return the bytes of weights, gradients and optimizer state."""
    parameters = list(build(size, size.layers, lora).parameters())
    return sum(p.numel() * (ADAMW if p.requires_grad else 4) for p in parameters)


def measure(name: str, methods: Sequence[str], batches: Sequence[int]) -> list[Row]:
    """Return memory and largest batches of one model, from the bytes of the first batch.

    A ratio is how many times better a line is than full fine-tuning in eager mode, as the paper has it.
    """
    size, first, rows = SIZES[name], batches[0], []
    labels = dict.fromkeys(("full", *methods))
    kept = {label: of_all_layers(size, METHODS[label], first) / first for label in labels}
    fixed = {label: weights_bytes(size, METHODS[label].lora) for label in labels}

    def add(batch: int | None, label: str, metric: str, value: float, unit: str, ratio: float | None) -> None:
        model = name if batch is None else f"{name}, batch {batch}"
        shapes = f"batch={batch or first} tokens={TOKENS}+{LABEL_TOKENS}"
        rows.append(
            Row(
                "paper_tables", model, label, metric, value, unit, ratio, shapes=shapes,
                **circumstances("meta"),
            )
        )  # fmt: skip

    for label in methods:
        for batch in batches:
            activation, whole = (kept[label] * batch, kept[label] * batch + fixed[label])
            before = kept["full"] * batch
            add(batch, label, "activations", activation / GB, "GB", before / activation)
            add(batch, label, "memory", whole / GB, "GB", (before + fixed["full"]) / whole)
        for card in CARDS:
            most, full = (largest_batch(card, fixed[m], kept[m]) for m in (label, "full"))
            ratio = most / full if full else None
            add(None, label, f"largest batch, {card} GB", most, "samples", ratio)
        published = PUBLISHED.get(name, {}).get(label)
        if published is not None:
            add(None, label, "memory, published ratio", published, "1", None)
    return rows


def main(
    model: Annotated[
        list[str] | None, typer.Option(help=f"Any of {', '.join(SIZES)}; all by default.")
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help=f"Any of {', '.join(METHODS)}; all by default.")
    ] = None,
    check: Annotated[bool, typer.Option(help="Partition all layers of T5-Base once, and compare.")] = False,
    quick: Annotated[bool, typer.Option(help="T5-Base, two lines; keep no rows.")] = False,
) -> None:
    """Compute the tables; append rows to bench/results."""
    names, methods = model or list(SIZES), method or list(METHODS)
    if quick:
        names, methods = ["T5-Base"], ["full", "balanced 0.3"]
    for name in names:
        record(measure(name, methods, SIZES[name].batches), keep=not quick)
    if check:
        size, line = SIZES["T5-Base"], METHODS["balanced 0.3"]
        whole, sum_of_layers = activations(size, line, size.layers, 64), of_all_layers(size, line, 64)
        error = sum_of_layers / whole - 1
        shapes, metric = f"batch=64 tokens={TOKENS}+{LABEL_TOKENS}", "error of the sum over layers"
        row = Row(
            "paper_tables",
            "T5-Base",
            "balanced 0.3",
            metric,
            error,
            "1",
            shapes=shapes,
            **circumstances("meta"),
        )
        record([row], keep=not quick)


if __name__ == "__main__":
    typer.run(main)
