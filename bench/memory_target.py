"""Targets for the peak (`Policy.memory`) beside the peaks that are measured.

    python -m bench.memory_target                 # four models, two targets each
    python -m bench.memory_target --model llama-lm --layers 12
    python -m bench.memory_target --quick         # tiny sizes: does it run? keeps no rows

Each target lies between the predicted peaks with no layer and with all layers computed again. Ratios: measured over
asked; of step times, to Inductor's default in the same run.
"""

from __future__ import annotations

from typing import Annotated

import typer

import wtacrs_fx
from bench.harness import BASELINE, Row, record, summarise, to_rows
from bench.models import PRECISIONS, Shape, build
from wtacrs_fx import Policy
from wtacrs_fx.tools.steps import Step, inductor, measure_steps
from wtacrs_passes.report import MIB

MODELS = {"llama-lm": "autocast", "llama": "bfloat16", "bert": "autocast", "gpt2": "float32"}
SHARES = (1 / 3, 2 / 3)
"""Places of the targets between the lowest and the highest peak."""


def measure(name: str, shape: Shape, precision: str, rounds: int) -> list[Row]:
    """Return measured peaks over the targets, and step times."""
    model, inputs = build(name, shape, precision)
    high, low = (
        wtacrs_fx.explain(model, policy=Policy(ratio=1.0, recompute=share), **inputs).peak_after
        for share in (0.0, 1.0)
    )
    assert high is not None and low is not None
    targets = {f"target {share:.2f}": round(low.size + share * (high.size - low.size)) for share in SHARES}
    steps = {BASELINE: Step(model, inputs, inductor())}
    for variant, target in targets.items():
        steps[variant] = Step(model, inputs, wtacrs_fx.backend(Policy(ratio=1.0, memory=target)))
        print(name, variant, *steps[variant].reports[-1].notes, sep="; ", flush=True)
    measured = measure_steps(steps, rounds)
    found = {}
    for variant, target in targets.items():
        one = measured[variant]
        found[variant] = [
            ("measured over asked", "MiB", {"value": one.peak / MIB, "ratio": one.peak / target}),
            ("step time", "s", summarise(one.seconds, measured[BASELINE].seconds)),
        ]
    return to_rows("memory_target", name, shape, precision, found)


def main(
    model: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(MODELS)}; all by default.")] = None,
    layers: int = 6,
    d: int = 384,
    heads: int = 6,
    batch: int = 16,
    seq: int = 512,
    precision: Annotated[str | None, typer.Option(help=f"Of {', '.join(PRECISIONS)}; one for each.")] = None,
    rounds: int = 2,
    quick: Annotated[bool, typer.Option(help="Tiny sizes and one round; keep no rows.")] = False,
) -> None:
    """Measure what targets for the peak come to; append rows to bench/results."""
    shape = Shape(3, 64, 2, 4, 64, 4096) if quick else Shape(layers, d, heads, batch, seq)
    for name in model or MODELS:
        record(measure(name, shape, precision or MODELS[name], 1 if quick else rounds), keep=not quick)


if __name__ == "__main__":
    typer.run(main)
