"""What people train now: mixtures of experts, adapters, weights and products in few bits.

    python -m bench.modern                        # all cases; about 15 minutes
    python -m bench.modern --case QLoRA
    python -m bench.modern --quick                # tiny sizes: does it run? keeps no rows

Language models in bfloat16 with their loss over a real vocabulary. Saved bytes, peak and step time as ratios to
Inductor's default, from one interleaved run, and the loss after some steps of AdamW from the same weights on the same
tokens.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Annotated, Any

import bitsandbytes
import torch
import typer
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torchao.float8 import Float8LinearConfig, convert_to_float8_training

import wtacrs_fx
from bench.harness import BASELINE, BUDGET, Figure, Row, compare, record, settle, to_rows
from bench.models import TINY, Shape, build
from wtacrs_fx import Policy
from wtacrs_fx.tools.steps import Compiler, Step, inductor, many_variants

STEPS, RATE, WORDS = 20, 1e-3, 32
VARIANTS: dict[str, Callable[[], Compiler]] = {
    BASELINE: inductor,
    "inductor budget 0.5": lambda: inductor(0.5),
    BUDGET: wtacrs_fx.backend,
    "wtacrs 0.3 balanced": lambda: wtacrs_fx.backend(Policy(ratio=0.3)),
}


def lora(model: nn.Module) -> nn.Module:
    """Return a model whose linears, but for the head, are frozen beside adapters of rank 8."""
    linears = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    model.requires_grad_(False)
    config = LoraConfig(r=8, target_modules=[name for name in linears if not name.endswith("lm_head")])
    found = inject_adapter_in_model(config, model)
    for name, parameter in found.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return found


def qlora(model: nn.Module) -> nn.Module:
    """Return the same with frozen weights in 4 bits."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name != "lm_head":
                sizes = child.in_features, child.out_features
                four = bitsandbytes.nn.Linear4bit(
                    *sizes, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
                )
                four.weight = bitsandbytes.nn.Params4bit(
                    child.weight.data, requires_grad=False, quant_type="nf4"
                )
                setattr(module, name, four.to("cpu"))
    return lora(model)


def float8(recipe: str) -> Callable[[nn.Module], nn.Module]:
    """Return what lets all linears but the head multiply in float8, which CPUs emulate."""

    def convert(model: nn.Module) -> nn.Module:
        def chosen(module: nn.Module, name: str) -> bool:
            return not name.endswith("lm_head")

        config = Float8LinearConfig.from_recipe_name(recipe)
        config = dataclasses.replace(config, emulate=not torch.cuda.is_available())
        return convert_to_float8_training(model, config=config, module_filter_fn=chosen)

    return convert


DENSE = Shape(layers=4, d=512, heads=8, batch=4, seq=512)
CASES: dict[str, tuple[str, Shape, Callable[[nn.Module], nn.Module]]] = {
    "8 experts of 64": ("olmoe-lm", Shape(layers=2, d=512, heads=8, batch=4, seq=512), lambda model: model),
    "LoRA": ("llama-lm", DENSE, lora),
    "QLoRA": ("llama-lm", DENSE, qlora),
    "float8, tensorwise": ("llama-lm", DENSE, float8("tensorwise")),
    "float8, rowwise": ("llama-lm", DENSE, float8("rowwise")),
}


def train(step: Step, words: int) -> float:
    """Return the loss after some steps, on tokens of few words."""
    step = copy.copy(step)
    parameters = [p for p in step.model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=RATE)
    generator = torch.Generator().manual_seed(0)
    loss = torch.zeros(())
    with many_variants():
        for _ in range(STEPS):
            tokens = torch.randint(words, step.inputs["input_ids"].shape, generator=generator)
            step.inputs = {"input_ids": tokens, "labels": tokens}
            loss = step()
            optimizer.step()
    with torch.no_grad():
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)
    return float(loss)


def measure(case: str, quick: bool, rounds: int) -> list[Row]:
    """Return the figures of one case."""
    name, shape, change = CASES[case]
    shape = TINY if quick else shape
    torch.manual_seed(0)
    model, inputs = build(name, shape, "bfloat16")
    model = change(model)
    steps: dict[str, Step] = {}
    for variant, compiler in VARIANTS.items():
        steps[variant] = Step(model, inputs, compiler())
        print(f"{case}, {variant}: compiled in {steps[variant].first_call_seconds:.0f} s", flush=True)
        if variant == BUDGET:
            settle(steps[variant])
            print(*steps[variant].reports, sep="\n\n", flush=True)
    found: dict[str, list[Figure]] = compare(steps, rounds)
    losses = {variant: train(step, WORDS) for variant, step in steps.items()}
    for variant, loss in losses.items():
        figure: dict[str, Any] = {"value": loss, "ratio": loss / losses[BASELINE]}
        found[variant].append((f"loss after {STEPS} steps", "nats", figure))
    return to_rows("modern", case, shape, "bfloat16", found)


def main(
    case: Annotated[
        list[str] | None, typer.Option(help=f"Any of {', '.join(CASES)}; all by default.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Timed steps of each variant.")] = 5,
    quick: Annotated[bool, typer.Option(help="Tiny sizes and two rounds; keep no rows.")] = False,
) -> None:
    """Measure each case; append rows to bench/results."""
    for name in case or CASES:
        record(measure(name, quick, 2 if quick else rounds), keep=not quick)


if __name__ == "__main__":
    typer.run(main)
