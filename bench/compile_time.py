"""Compile time of wtacrs over that of Inductor: first forward and backward, caches empty or warm.

    python -m bench.compile_time
    python -m bench.compile_time --model llama-lm --layers 30 --d 576 --heads 9 --batch 2 --seq 512 --no-warm

Every measurement has a process of its own; the variants alternate. With layers compiled once (`mark_layers`) it does
not grow with their number.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer

import wtacrs_fx
from bench.harness import BASELINE, VARIANTS, Row, circumstances, record, summarise
from bench.models import MODELS, PRECISIONS, TINY, WORDS, Shape, build
from wtacrs_fx.tools.steps import Step, interleave

ONCE = ", layers once"
COMPARED = (
    "inductor budget 0.9", "wtacrs 0.3 backward", "wtacrs 0.3 balanced", f"wtacrs 0.3 balanced{ONCE}",
)  # fmt: skip


def worker(name: str, variant: str, shape: Shape, precision: str) -> float:
    """Return the seconds of the first step, in a process that has already compiled something else."""
    warm_up = torch.nn.Linear(8, 8)
    torch.compile(warm_up)(torch.ones(2, 8)).sum().backward()
    model, inputs = build(name, shape, precision, "cpu")
    if variant.endswith(ONCE):
        wtacrs_fx.mark_layers(model)
    return Step(model, inputs, VARIANTS[variant.removesuffix(ONCE)]()).first_call_seconds


def in_new_process(
    name: str, variant: str, shape: Shape, precision: str, folder: Path | None = None
) -> float:
    """Run :func:`worker` and return what it measured; with the caches of `folder`, or with empty ones."""
    code = f"from bench.compile_time import *; print(worker({name!r}, {variant!r}, {shape!r}, {precision!r}))"
    with TemporaryDirectory() as cache:
        caches = {"TORCHINDUCTOR_CACHE_DIR": str(folder or cache)}
        if folder is None:
            caches["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
        found = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **caches},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return float(found.stdout.splitlines()[-1])


def measure(
    name: str, shape: Shape, precision: str, rounds: int, warm: bool, variants: Sequence[str]
) -> list[Row]:
    """Return the compile time of every variant, with empty caches and, `warm`, with those of an earlier process."""

    def start(variant: str, folder: Path | None = None) -> float:
        return in_new_process(name, variant, shape, precision, folder)

    found = [("compile time", interleave({v: partial(start, v) for v in variants}, rounds))]
    if warm:
        with TemporaryDirectory() as caches:
            starts = {v: partial(start, v, Path(caches, v.replace(" ", "_"))) for v in variants}
            for first in starts.values():
                first()
            found.append(("compile time, warm caches", interleave(starts, rounds)))
    return [
        Row(
            "compile_time", name, variant, metric, unit="s", shapes=str(shape), dtype=precision,
            **summarise(times[variant], times[BASELINE]), **circumstances(),
        )
        for metric, times in found
        for variant in variants
    ]  # fmt: skip


def main(
    model: Annotated[
        list[str] | None,
        typer.Option(help=f"Any of {', '.join((*MODELS, *WORDS))}; bert and llama by default."),
    ] = None,
    variant: Annotated[
        list[str] | None, typer.Option(help="All by default; the baseline always runs.")
    ] = None,
    layers: int = Shape.layers,
    d: int = Shape.d,
    heads: int = Shape.heads,
    batch: int = Shape.batch,
    seq: int = Shape.seq,
    precision: Annotated[str, typer.Option(help=f"One of {', '.join(PRECISIONS)}.")] = "autocast",
    warm: Annotated[bool, typer.Option(help="Measure with the caches of an earlier process as well.")] = True,
    rounds: int = 5,
    quick: Annotated[bool, typer.Option(help="Tiny sizes and one round; keep no rows.")] = False,
) -> None:
    """Measure compile time; append rows to bench/results."""
    shape = TINY if quick else Shape(layers, d, heads, batch, seq)
    variants = [BASELINE, *(v for v in COMPARED if not variant or v in variant)]
    for name in model or ("bert", "llama"):
        rows = measure(name, shape, precision, 1 if quick else rounds, warm, variants)
        record(rows, keep=not quick)


if __name__ == "__main__":
    typer.run(main)
