"""Error of the whole gradient by products in fewer bits, by the depth of the model: SmolLM2 on text.

    python -m bench.depth
    python -m bench.depth --layers 1 --layers 6 --no-autocast
    python -m bench.depth --quick                 # one layer, one draw: does it run? keeps no rows

The figure is E ||g - g_exact||^2 / ||g_exact||^2 over all parameters of the first layers of the model and its head,
with all rows, beside that of the same step in the model's own precision: residuals are encoded in both. The noise of
the minibatch and what autocast itself does to the gradient (against float32, nothing encoded) are for comparison.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from torch import Tensor, nn

import wtacrs_fx
from bench.accuracy import WORDNET, smollm
from bench.gradient_error import errors, gradient, minibatch_noise
from bench.harness import Row, circumstances, record, summarise
from bench.models import Autocast
from wtacrs_fx import Policy
from wtacrs_fx.tools.steps import Step

ALL_ROWS = Policy(ratio=1.0)
VARIANTS = {
    "dW in 8 bits": {"product": "int8", "product_dx": "exact"},
    "dW and the head's dX in 8 bits": {"product": "int8"},
    "dX in 8 bits": {"product_dx": "int8"},
    "both in 8 bits": {"product": "int8", "product_dx": "int8"},
    "both in bfloat16": {"product": "bfloat16", "product_dx": "bfloat16"},
}


def rows(model: nn.Module, batches: Iterator[dict[str, Tensor]], precision: str, draws: int) -> list[Row]:
    """Return the errors of every variant, with layers that are alike compiled once."""
    depth = len(model.model.model.layers)  # type: ignore[union-attr,arg-type]
    inputs = next(batches)
    shapes = f"layers={depth} " + " x ".join(str(size) for size in inputs["input_ids"].shape)
    run = Autocast(model, "cpu") if precision == "autocast" else model
    found = {"minibatch noise": [minibatch_noise(model, batches, 2 if draws == 1 else 8)]}
    if precision == "autocast":
        rounded, wanted = (gradient(Step(each, inputs, None)) for each in (run, model))
        found["the precision itself"] = [float((rounded - wanted).square().sum() / wanted.square().sum())]
    exact = gradient(Step(run, inputs, wtacrs_fx.backend(ALL_ROWS)))
    for variant, fields in VARIANTS.items():
        if "bfloat16" in fields.values() and precision != "float32":
            continue
        step = Step(run, inputs, wtacrs_fx.backend(ALL_ROWS.everywhere(**fields)))
        refused = [each for report in step.reports for each in report.refused]
        assert not refused, refused
        found[variant] = errors(step, exact, draws)
    return [
        Row(
            "depth",
            "SmolLM2-135M",
            variant,
            "relative squared error",
            unit="1",
            shapes=shapes,
            dtype=precision,
            seed=0,
            **{**summarise(values), "value": sum(values) / len(values)},
            **circumstances(),
        )
        for variant, values in found.items()
    ]


def main(
    wordnet: Path = WORDNET,
    layers: Annotated[list[int] | None, typer.Option(help="1, 6 and 30 by default.")] = None,
    batch: int = 2,
    length: int = 256,
    draws: int = 3,
    autocast: Annotated[bool, typer.Option(help="Under autocast as well as in float32.")] = True,
    quick: Annotated[bool, typer.Option(help="One layer, one draw; keep no rows.")] = False,
) -> None:
    """Measure the error of gradients by depth; append rows to bench/results."""
    if quick:
        layers, length, draws = [1], 32, 1
    task = smollm(wordnet, batch, length, held_out=32)
    wtacrs_fx.mark_layers(task.model)
    whole = task.model.model.model.layers  # type: ignore[union-attr]
    batches = (inputs for _, inputs in task.batches(0))
    for depth, precision in itertools.product(
        layers or (1, 6, 30), ("autocast", "float32") if autocast else ("float32",)
    ):
        task.model.model.model.layers = whole[:depth]  # type: ignore[union-attr,index]
        record(rows(task.model, batches, precision, draws), keep=not quick)


if __name__ == "__main__":
    typer.run(main)
