"""Targets for the peak (`Policy.memory`) beside the peaks that are measured.

    python -m bench.memory_target                 # four models, three targets each
    python -m bench.memory_target --model llama-lm --layers 12 --d 384 --heads 6
    python -m bench.memory_target --rounds 0      # peaks only, which do not depend on what else runs
    python -m bench.memory_target --quick         # tiny sizes: does it run? keeps no rows

Each target lies between what the code holds with nothing and with all products and layers computed again. Ratios:
measured over asked; of bytes, peaks and step times, to Inductor's default in the same run, beside its budgets and
checkpointing.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

import wtacrs_fx
from bench.frontier import CHECKPOINTING, make_step
from bench.harness import BASELINE, Row, compare, record, to_rows
from bench.models import PRECISIONS, Shape, build
from wtacrs_fx import Policy
from wtacrs_fx.backend import Backend
from wtacrs_fx.tools.steps import Step
from wtacrs_passes.report import MIB

MODELS = {"llama-lm": "autocast", "llama": "bfloat16", "bert": "autocast", "gpt2": "float32"}
INDUCTOR = (BASELINE, "inductor budget 0.7", "inductor budget 0.5", CHECKPOINTING)
SHARES = (0.25, 0.5, 0.75)
"""Places of the targets between the lowest and the highest peak."""
_NO_TARGET = 2**60
"""Bytes that nothing exceeds: what the code holds is counted, and nothing planned."""


def measure(name: str, shape: Shape, precision: str, rounds: int) -> list[Row]:
    """Return measured peaks over the targets; bytes, peaks and step times beside all that Inductor offers."""
    model, inputs = build(name, shape, precision)
    again: tuple[dict[str, float], ...] = (
        {},
        {"recompute_products": 1.0},
        {"recompute_products": 1.0, "recompute": 1.0},
    )
    peaks = [_peak(Step(model, inputs, _ours(memory=_NO_TARGET, **fields))) for fields in again]
    high, low = max(peaks), min(peaks)
    targets = {f"target {share:.2f}": round(low + share * (high - low)) for share in SHARES}
    others = INDUCTOR if rounds else (BASELINE,)
    steps = {variant: make_step(name, shape, precision, variant, "cpu") for variant in others}
    for variant, target in targets.items():
        steps[variant] = Step(model, inputs, _ours(memory=target))
        print(name, variant, *steps[variant].reports[-1].notes, sep="; ", flush=True)
    found = compare(steps, rounds)
    for variant, target in targets.items():
        [peak] = (figures["value"] for metric, _, figures in found[variant] if metric == "peak")
        over = {"value": peak, "ratio": peak * MIB / target}
        found[variant].append(("measured over asked", "MiB", over))
    return to_rows("memory_target", name, shape, precision, found)


def _ours(**fields: Any) -> Backend:
    return wtacrs_fx.backend(Policy(ratio=1.0, **fields))


def _peak(step: Step) -> int:
    peak = step.reports[-1].peak_of_code
    assert peak is not None
    return peak


def main(
    model: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(MODELS)}; all by default.")] = None,
    layers: int = 8,
    d: int = 256,
    heads: int = 4,
    batch: int = 8,
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
