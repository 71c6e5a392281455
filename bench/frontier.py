"""Memory against time of a training step: Inductor's budgets and checkpointing beside the policies of wtacrs.

    python -m bench.frontier                     # BERT and Llama shapes on CPU; about 25 minutes
    python -m bench.frontier --precision autocast
    python -m bench.frontier --draw              # the picture and the verdict again, from the rows

For each of Inductor's ways to save memory the verdict names a policy with no more bytes and no more time.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

import matplotlib.pyplot as plt
import torch
import typer
from torch import nn

from bench.harness import BASELINE, RESULTS, VARIANTS, Row, compare, read, record, to_rows
from bench.models import PRECISIONS, TINY, Shape, build
from wtacrs_fx.tools.steps import Step

CHECKPOINTING = "inductor, checkpointing"
INDUCTOR = (BASELINE, *(f"inductor budget {budget}" for budget in (0.9, 0.7, 0.5, 0.3)), CHECKPOINTING)
POLICIES = (
    "wtacrs 0.3 balanced, checkpointing",
    "wtacrs 0.3 small, checkpointing",
    "wtacrs 0.3 products again",
    "wtacrs 0.3 small, products again",
    "wtacrs 0.3 backward",
    "wtacrs 0.1 backward",
    "wtacrs 0.3 balanced",
    "wtacrs 0.1 balanced",
    "wtacrs 0.3 small",
    "wtacrs 0.1 small",
)
Point = tuple[float, float]  # saved bytes and step time, as ratios to Inductor


def make_step(name: str, shape: Shape, precision: str, variant: str, device: str) -> Step:
    """Return a compiled step; checkpointing recomputes each layer from its input."""
    model, inputs = build(name, shape, precision, device)
    plain = variant.removesuffix(", checkpointing")
    if plain != variant:
        checkpoint(model)
    return Step(model, inputs, VARIANTS[plain]())


def checkpoint(model: nn.Module) -> None:
    """Let each layer be computed again from its input."""
    network: Any = next(part for part in model.modules() if hasattr(part, "gradient_checkpointing_enable"))
    network.config.use_cache = False
    network.gradient_checkpointing_enable({"use_reentrant": False})


def measure(name: str, shape: Shape, precision: str, device: str, rounds: int) -> list[Row]:
    """Return saved bytes and step time of every variant."""
    steps = {}
    for variant in (*INDUCTOR, *POLICIES):
        steps[variant] = make_step(name, shape, precision, variant, device)
        print(f"{name}, {variant}: compiled in {steps[variant].first_call_seconds:.0f} s", flush=True)
    return to_rows("frontier", name, shape, precision, compare(steps, rounds), device)


def points(rows: list[Row]) -> dict[str, Point]:
    """Return the latest figures of every variant of one model."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        assert row.ratio is not None
        found.setdefault(row.variant, {})[row.metric] = row.ratio
    return {variant: (figures["saved"], figures["step time"]) for variant, figures in found.items()}


def verdict(found: dict[str, Point]) -> dict[str, str | None]:
    """Return for each of Inductor's ways the fastest policy with no more bytes and no more time."""
    chosen: dict[str, str | None] = {}
    for variant in INDUCTOR:
        saved, time = found[variant]
        better = [name for name in POLICIES if found[name][0] <= saved and found[name][1] <= time]
        chosen[variant] = min(better, key=lambda name: found[name][1], default=None)
    return chosen


def draw(by_model: dict[str, dict[str, Point]], precision: str) -> None:
    """Draw bytes against time for each model."""
    series = {
        "Inductor: memory budgets, checkpointing": (INDUCTOR, "s-", "#0072B2", 6),
        "wtacrs, 0.3 of the rows": (tuple(p for p in POLICIES if " 0.3 " in p), "o-", "#D55E00", 6),
        "wtacrs, 0.1 of the rows": (tuple(p for p in POLICIES if " 0.1 " in p), "^-", "#009E73", -11),
    }
    width = 5.5 * len(by_model)
    figure, panels = plt.subplots(
        1, len(by_model), figsize=(width, 4.5), layout="constrained", squeeze=False, sharey=True
    )
    for axes, (name, found) in zip(panels[0], by_model.items(), strict=True):
        for label, (variants, style, color, above) in series.items():
            axes.plot(*zip(*sorted(found[v] for v in variants), strict=True), style, color=color, label=label)
            names: dict[Point, list[str]] = {}  # points that lie on each other share a label
            for variant in sorted(variants, key=lambda name: -found[name][1]):
                short = re.sub(r"^(inductor,? (budget )?|wtacrs [\d.]+ )", "", variant)
                saved, time = found[variant]
                near = next((p for p in names if math.dist(p, (saved, time)) < 0.02), (saved, time))
                names.setdefault(near, []).append(short)
            for (saved, time), shorts in names.items():
                axes.annotate(
                    ", ".join(shorts),
                    (saved, time),
                    xytext=(0, above),
                    textcoords="offset points",
                    fontsize=8,
                    color=color,
                    ha={"small": "right", "balanced": "left", "checkpointing": "left"}.get(
                        shorts[0], "center"
                    ),
                )
        axes.set(xlabel="saved activations / Inductor", title=name, xlim=(0, 1.1))
        axes.margins(y=0.12)
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("step time / Inductor")
    panels[0][0].legend(fontsize=8, loc="upper right")
    stem = "frontier" if precision == "float32" else f"frontier_{precision}"
    figure.savefig(RESULTS / f"{stem}.png", dpi=130)
    plt.close(figure)


def main(
    model: Annotated[list[str] | None, typer.Option(help="bert and llama by default.")] = None,
    precision: Annotated[str, typer.Option(help=f"One of {', '.join(PRECISIONS)}.")] = "float32",
    rounds: int = 7,
    redraw: Annotated[bool, typer.Option("--draw", help="Measure nothing.")] = False,
    quick: Annotated[bool, typer.Option(help="Tiny sizes and two rounds; keep no rows.")] = False,
) -> None:
    """Measure, append rows to bench/results, draw them, and say which policy beats what."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    by_model = {}
    for name in model or ("bert", "llama"):
        if redraw:
            rows = [row for row in read("frontier") if (row.model, row.dtype) == (name, precision)]
        else:
            rows = measure(name, TINY if quick else Shape(), precision, device, 2 if quick else rounds)
            record(rows, keep=not quick)
        by_model[name] = points(rows)
        for variant, policy in verdict(by_model[name]).items():
            saved, time = by_model[name][variant]
            answer = "none"
            if policy is not None:
                answer = "{} (saved {:.2f}, time {:.2f})".format(policy, *by_model[name][policy])
            print(f"{name}, {variant} (saved {saved:.2f}, time {time:.2f}) is beaten by {answer}")
    if not quick:
        draw(by_model, precision)


if __name__ == "__main__":
    typer.run(main)
