"""How bytes and time grow with depth, width, batch and length: predicted from the plan, checked by runs.

    python -m bench.scaling                  # about 10 minutes on 2 cores
    python -m bench.scaling --plan           # the plan for 70 billion parameters alone; nothing is allocated

Bytes: models of one and of two layers are traced on the meta device; more follow, because layers are alike.
Time: floating-point operations over the rate of the reference case; a weight gradient from k of N rows counts
k / N. Each prediction stands beside a run at twice the depth, width, batch and length.

The plan: Llama with 70 billion parameters under FSDP, weights and gradients in bfloat16, AdamW's moments in
float32, all sharded; two layers are gathered at a time; activations are not sharded.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from bench.harness import BASELINE, VARIANTS, Row, circumstances, record, summarise
from bench.models import Shape, make
from wtacrs_fx import Policy
from wtacrs_fx.tools.predict import INDUCTOR, WTACRS, Line, MakeModel, largest_batch, saved_lines, state_bytes
from wtacrs_fx.tools.steps import Step, interleave, saved_bytes, step_seconds

SAMPLED = "wtacrs 0.3 balanced"
RATIOS = {BASELINE: 1.0, SAMPLED: 0.3}
REFERENCE = Shape(layers=2, d=256, heads=4, batch=8, seq=128)
GROWN = {
    "reference": REFERENCE,
    "depth x 2": replace(REFERENCE, layers=4),
    "width x 2": replace(REFERENCE, d=512, heads=8),
    "batch x 2": replace(REFERENCE, batch=16),
    "length x 2": replace(REFERENCE, seq=256),
}
GPUS, CARD = (8, 16, 64), 80  # GB
LENGTH = 4096
LLAMA_70B: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": LENGTH,
    "use_cache": False,
    "attn_implementation": "sdpa",
}
DEPTH = 80


def predicted_lines(make_model: MakeModel) -> dict[str, Line]:
    """Return the saved bytes of both variants by depth."""
    lines, *_ = saved_lines(make_model, Policy(ratio=RATIOS[SAMPLED]))
    return {BASELINE: lines[INDUCTOR], SAMPLED: lines[WTACRS]}


def operations(name: str, shape: Shape, ratio: float) -> float:
    """Return the floating-point operations of a step, with `ratio` of those of the weight gradients."""
    tokens = shape.batch * shape.seq
    mlp = {"llama": 3 * 2.75, "bert": 8.0}[name]
    products = 2 * tokens * shape.layers * (4 + mlp) * shape.d**2
    attention = 4 * tokens * shape.seq * shape.d * shape.layers
    return products * (2 + ratio) + attention * 3.5


def check(name: str, rounds: int, cases: dict[str, Shape]) -> list[Row]:
    """Run every case; return what was measured, with its ratio to what was predicted."""
    rows = []
    rates: dict[str, float] = {}
    for case, shape in cases.items():
        predicted = predicted_lines(
            lambda layers, shape=shape: make(name, replace(shape, layers=layers), device="meta")
        )
        model, inputs = make(name, shape)
        steps = {variant: Step(model, inputs, VARIANTS[variant]()) for variant in RATIOS}
        times = interleave({variant: partial(step_seconds, step) for variant, step in steps.items()}, rounds)
        for variant, step in steps.items():
            measured = saved_bytes(step)
            duration = summarise(times[variant])
            work = operations(name, shape, RATIOS[variant])
            rates.setdefault(variant, work / duration["value"])
            for metric, unit, figures, ratio in (
                ("saved", "B", {"value": float(measured)}, measured / predicted[variant](shape.layers)),
                ("step time", "s", duration, duration["value"] / (work / rates[variant])),
            ):
                rows.append(
                    Row(
                        "scaling", f"{name}, {case}", variant, metric, unit=unit, shapes=str(shape),
                        **{**figures, "ratio": ratio}, **circumstances(),
                    )
                )  # fmt: skip
        torch._dynamo.reset()  # the next case is compiled for its own sizes
    return rows


def plan() -> list[Row]:
    """Return memory and largest batch of one GPU of several that train a Llama of 70 billion parameters."""

    def tiny(layers: int) -> tuple[nn.Module, dict[str, Tensor]]:
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **LLAMA_70B)).bfloat16().train()
            ids = torch.zeros(1, LENGTH, dtype=torch.long)
        return model, {"input_ids": ids, "labels": ids}

    (small, _), (large, _) = tiny(1), tiny(2)
    one, two = (sum(parameter.numel() for parameter in model.parameters()) for model in (small, large))
    layer = two - one
    parameters = one + (DEPTH - 1) * layer
    shapes = f"parameters={parameters / 1e9:.1f}e9 length={LENGTH}"
    rows = []
    for variant, line in predicted_lines(tiny).items():
        sample = line(DEPTH)
        rows.append(
            Row(
                "scaling", "llama-70b", variant, "activations of a sample", sample / 1e9, "GB", shapes=shapes,
                dtype="bfloat16", **circumstances(),
            )
        )  # fmt: skip
        for gpus in GPUS:
            gathered = 2 * layer * 2 * torch.bfloat16.itemsize  # weights and gradients of two layers
            state = state_bytes(parameters, torch.bfloat16.itemsize) / gpus + gathered
            batch = largest_batch(CARD, state, sample)
            for metric, value, unit in (
                (f"state, {gpus} GPUs", state / 1e9, "GB"),
                (f"largest batch of a GPU, {gpus} GPUs", float(batch), "1"),
            ):
                rows.append(
                    Row(
                        "scaling", "llama-70b", variant, metric, value, unit, shapes=shapes,
                        dtype="bfloat16", **circumstances(),
                    )
                )  # fmt: skip
    return rows


def main(
    model: Annotated[list[str] | None, typer.Option(help="bert, llama; both by default.")] = None,
    rounds: int = 9,
    only_plan: Annotated[bool, typer.Option("--plan", help="Run nothing.")] = False,
    quick: Annotated[bool, typer.Option(help="One model, two cases, two rounds; keep no rows.")] = False,
) -> None:
    """Predict, run, and record both; then the plan for 70 billion parameters."""
    cases = dict(list(GROWN.items())[:2]) if quick else GROWN
    if not only_plan:
        for name in model or (("llama",) if quick else ("bert", "llama")):
            record(check(name, 2 if quick else rounds, cases), keep=not quick)
    record(plan(), keep=not quick)


if __name__ == "__main__":
    typer.run(main)
