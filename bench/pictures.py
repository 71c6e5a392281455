"""Pictures of the documentation: a step and a training, noise by layer, a gradient before and after.

    python -m bench.pictures
    python -m bench.pictures --quick              # tiny sizes; keeps no rows

The first one has the case of `bench.regime`: memory over one training step, and the losses that
`bench.accuracy --task scratch --precision autocast` has kept, against time.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import torch
import typer
from matplotlib.axes import Axes
from torch import nn

import wtacrs_fx
from bench.accuracy import read_runs
from bench.frontier import CHECKPOINTING, make_step
from bench.gradient_variance import load
from bench.harness import BASELINE, BUDGET, MIB, RESULTS, Row, record, to_rows
from bench.models import REGIME, TINY, Shape
from wtacrs_fx import Policy
from wtacrs_fx.tools.measure import memory_timeline
from wtacrs_fx.tools.pictures import BLACK, ORANGE, draw_gradient, draw_timeline

SHOWN = {BASELINE: "Inductor", CHECKPOINTING: "Inductor, checkpointing", BUDGET: "wtacrs"}
CURVES = "accuracy_llama_from_scratch_glosses_autocast_*.csv"


def overview(name: str, shape: Shape, precision: str, curves: Path, folder: Path) -> list[Row]:
    """Draw the memory of a step, and the losses of a training against time; return the peaks."""
    timelines = {}
    for variant, label in SHOWN.items():
        step = make_step(name, shape, precision, variant, "cpu")
        step.model.zero_grad(set_to_none=True)
        timelines[label] = memory_timeline(step, torch.device("cpu"))
    figure, (left, right) = plt.subplots(ncols=2, figsize=(11, 4), layout="constrained")
    draw_timeline(left, timelines)
    draw_losses(right, curves)
    figure.savefig(folder / "overview.png", dpi=130)
    plt.close(figure)
    peaks = {variant: max(held for _, held in timelines[label]) for variant, label in SHOWN.items()}
    figures = {
        variant: [("peak", "MiB", {"value": peak / MIB, "ratio": peak / peaks[BASELINE]})]
        for variant, peak in peaks.items()
    }
    return to_rows("pictures", name, shape, precision, figures)


def draw_losses(axes: Axes, curves: Path) -> None:
    """Draw the running mean of the training loss of the first seed, against seconds without compilation."""
    runs = {variant: run for (variant, seed), run in read_runs(curves).items() if seed == 0}
    for variant, colour in ((BASELINE, BLACK), (BUDGET, ORANGE)):
        seconds, losses = runs[variant].curve(runs[BASELINE])
        axes.plot(seconds, losses, color=colour, linewidth=2, label=SHOWN[variant])
    axes.set(xlabel="seconds of training, without compilation", ylabel="training loss, nats a token")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


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
    folder: Annotated[Path, typer.Option(help="Where the pictures go.")] = RESULTS,
    quick: Annotated[bool, typer.Option(help="Tiny sizes; keep no rows.")] = False,
) -> None:
    """Draw; append rows to bench/results."""
    [curves] = RESULTS.glob(CURVES)
    rows = overview("llama-lm", TINY if quick else REGIME, "autocast", curves, folder)
    gradients(folder)
    noise(folder, 2 if quick else 8)
    record(rows, keep=not quick)


if __name__ == "__main__":
    typer.run(main)
