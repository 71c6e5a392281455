"""Pictures of the documentation: memory over a step, noise by layer, a gradient before and after.

python -m bench.pictures
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn

import wtacrs_fx
from bench.gradient_variance import load
from bench.harness import BASELINE, MIB, RESULTS, VARIANTS, Row, circumstances, record
from bench.models import TINY, Shape, make
from wtacrs_fx import Policy
from wtacrs_fx.tools.measure import memory_timeline
from wtacrs_fx.tools.pictures import draw_gradient, plot_timeline
from wtacrs_fx.tools.steps import Step

SHOWN = (BASELINE, "inductor budget 0.9", "wtacrs 0.3 balanced")


def timeline(name: str, shape: Shape, folder: Path) -> list[Row]:
    """Draw the memory of a step of each variant; return the peaks."""
    found = {}
    for variant in SHOWN:
        step = Step(*make(name, shape), VARIANTS[variant]())
        step.model.zero_grad(set_to_none=True)
        found[variant] = memory_timeline(step, torch.device("cpu"))
    plot_timeline(found, folder / "timeline.png")
    peaks = {variant: max(held for _, held in one) for variant, one in found.items()}
    return [
        Row(
            "pictures", name, variant, "peak", peak / MIB, "MiB", ratio=peak / peaks[BASELINE],
            shapes=str(shape), **circumstances(),
        )
        for variant, peak in peaks.items()
    ]  # fmt: skip


def gradients(folder: Path) -> None:
    """Draw the gradient of a linear layer's weight before and after the rewrite."""
    joint = wtacrs_fx.capture(nn.Linear(64, 32), torch.randn(1024, 64))
    draw_gradient(joint, "weight", folder / "gradient-before.svg")
    sampled = wtacrs_fx.transform(joint, Policy(ratio=0.3, residuals="exact"))
    draw_gradient(sampled, "weight", folder / "gradient-after.svg")


def noise(folder: Path, batches: int) -> None:
    """Draw the noise that sampling adds to each layer of the packaged encoder, beside the minibatch's."""
    model, drawn = load(16, 48, 0)
    wtacrs_fx.diagnose(model.eval(), list(islice(drawn, batches)), Policy(ratio=0.3)).plot(
        folder / "noise.png"
    )


def main(
    model: str = "bert",
    folder: Annotated[Path, typer.Option(help="Where the pictures go.")] = RESULTS,
    quick: Annotated[bool, typer.Option(help="Tiny sizes; keep no rows.")] = False,
) -> None:
    """Draw; append rows to bench/results."""
    rows = timeline(model, TINY if quick else Shape(), folder)
    gradients(folder)
    noise(folder, 2 if quick else 8)
    record(rows, keep=not quick)


if __name__ == "__main__":
    typer.run(main)
