"""Compile time of wtacrs over that of Inductor: first forward and backward, caches empty or warm.

    python -m bench.compile_time

Every measurement has a process of its own; the variants alternate.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer

from bench.harness import BASELINE, VARIANTS, Row, circumstances, record, summarise
from bench.models import MODELS, TINY, Shape, make
from wtacrs_fx.tools.steps import Step, interleave

SAMPLED = ("wtacrs 0.3 forward", "wtacrs 0.3 backward", "wtacrs 0.3 balanced")


def worker(name: str, variant: str, shape: Shape) -> float:
    """Return the seconds of the first step, in a process that has already compiled something else."""
    warm_up = torch.nn.Linear(8, 8)
    torch.compile(warm_up)(torch.ones(2, 8)).sum().backward()
    return Step(*make(name, shape), VARIANTS[variant]()).first_call_seconds


def in_new_process(name: str, variant: str, shape: Shape, folder: Path | None = None) -> float:
    """Run :func:`worker` and return what it measured; with the caches of `folder`, or with empty ones."""
    code = f"from bench.compile_time import *; print(worker({name!r}, {variant!r}, {shape!r}))"
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


def measure(name: str, shape: Shape, rounds: int) -> list[Row]:
    """Return the compile time of every variant, with empty caches and with those of an earlier process."""
    variants = (BASELINE, *SAMPLED)
    cold = interleave({v: partial(in_new_process, name, v, shape) for v in variants}, rounds)
    with TemporaryDirectory() as caches:
        starts = {
            v: partial(in_new_process, name, v, shape, Path(caches, v.replace(" ", "_"))) for v in variants
        }
        for start in starts.values():
            start()
        warm = interleave(starts, rounds)
    return [
        Row(
            "compile_time",
            name,
            variant,
            metric,
            unit="s",
            shapes=str(shape),
            **summarise(times[variant], times[BASELINE]),
            **circumstances(),
        )
        for metric, times in (("compile time", cold), ("compile time, warm caches", warm))
        for variant in variants
    ]


def main(
    model: Annotated[
        list[str] | None, typer.Option(help=f"Any of {', '.join(MODELS)}; bert and llama by default.")
    ] = None,
    layers: int = Shape.layers,
    d: int = Shape.d,
    heads: int = Shape.heads,
    batch: int = Shape.batch,
    seq: int = Shape.seq,
    rounds: int = 5,
    quick: Annotated[bool, typer.Option(help="Tiny sizes and one round; keep no rows.")] = False,
) -> None:
    """Measure compile time; append rows to bench/results."""
    shape = TINY if quick else Shape(layers, d, heads, batch, seq)
    for name in model or ("bert", "llama"):
        rows = measure(name, shape, 1 if quick else rounds)
        record(rows, keep=not quick)


if __name__ == "__main__":
    typer.run(main)
