"""Residuals in a file beside residuals in memory: what stays resident after a forward pass, and the step time.

    python -m bench.offload --folder /tmp         # 12 layers, autocast, a folder on a disk
    python -m bench.offload --quick               # tiny sizes: does it run? keeps no rows

Resident: what the process has more in memory between the forward and the backward pass than before, as the kernel
counts it. Ratios are to Inductor's default in the same run.
"""

from __future__ import annotations

import ctypes
import gc
import os
import tempfile
from pathlib import Path
from typing import Annotated

import typer

import wtacrs_fx
from bench.harness import BASELINE, Row, compare, record, to_rows
from bench.models import PRECISIONS, TINY, WORDS, Shape, build
from wtacrs_fx import Policy
from wtacrs_fx.tools.steps import Step, inductor
from wtacrs_passes.report import MIB


def resident_after_forward(step: Step) -> int:
    """Return by how many bytes the process grows in a forward pass whose residuals are kept."""
    step.model.zero_grad(set_to_none=True)
    before = _resident()
    loss = step.forward()
    grown = _resident() - before
    loss.backward()  # type: ignore[no-untyped-call]
    return grown


def _resident() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(name: str, shape: Shape, precision: str, folder: str, rounds: int) -> list[Row]:
    """Return saved and resident bytes, peak and step time of each variant."""
    model, inputs = build(name, shape, precision)
    policies = {
        "wtacrs, all rows": Policy(ratio=1.0),
        "wtacrs, all rows, in a file": Policy(ratio=1.0, offload=f"disk:{folder}"),
    }
    compilers = {
        BASELINE: inductor(),
        **{name: wtacrs_fx.backend(policy) for name, policy in policies.items()},
    }
    steps = {variant: Step(model, inputs, compiler) for variant, compiler in compilers.items()}
    print(*next(reversed(steps.values())).reports[-1].notes, flush=True)
    found = compare(steps, rounds)
    resident = {variant: resident_after_forward(step) for variant, step in steps.items()}
    for variant, size in resident.items():
        found[variant].append(("resident", "MiB", {"value": size / MIB, "ratio": size / resident[BASELINE]}))
    return to_rows("offload", name, shape, precision, found)


def main(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(WORDS)}, or an encoder.")] = "llama-lm",
    layers: int = 12,
    d: int = 384,
    heads: int = 6,
    batch: int = 8,
    seq: int = 512,
    precision: Annotated[str, typer.Option(help=f"One of {', '.join(PRECISIONS)}.")] = "autocast",
    folder: Annotated[str | None, typer.Option(help="On the disk; a temporary one by default.")] = None,
    rounds: int = 3,
    quick: Annotated[bool, typer.Option(help="Tiny sizes and one round; keep no rows.")] = False,
) -> None:
    """Measure a step whose residuals wait in a file; append rows to bench/results."""
    shape = TINY if quick else Shape(layers, d, heads, batch, seq)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        record(measure(model, shape, precision, place, 1 if quick else rounds), keep=not quick)


if __name__ == "__main__":
    typer.run(main)
