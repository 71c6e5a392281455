"""Memory against time of a training step: Inductor's budgets and checkpointing beside the policies of wtacrs.

    python -m bench.frontier                     # BERT and Llama shapes on CPU; about 25 minutes
    python -m bench.frontier --precision autocast
    python -m bench.frontier --draw              # the picture and the verdict again, from the rows

For each of Inductor's ways to save memory the verdict names a policy with no more bytes, no higher peak and no more
time.
"""

from __future__ import annotations

import math
import re
from functools import partial
from typing import Annotated, Any, NamedTuple

import matplotlib.pyplot as plt
import torch
import typer
from torch import nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from bench.harness import BASELINE, BUDGET, RESULTS, VARIANTS, Row, compare, read, record, settle, to_rows
from bench.models import PRECISIONS, TINY, Shape, build
from wtacrs_fx.tools.steps import Step

CHECKPOINTING = "inductor, checkpointing"
SELECTIVE = "inductor, selective checkpointing"
INDUCTOR = (
    BASELINE,
    *(f"inductor budget {budget}" for budget in (0.9, 0.7, 0.5, 0.3, 0.1)),
    CHECKPOINTING,
    SELECTIVE,
)
POLICIES = (
    BUDGET,
    f"{BUDGET}, products again",
    f"{BUDGET}, checkpointing",
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
aten = torch.ops.aten
_LEFT = 0.15  # saved bytes, beside Inductor's, whose label stands at the right of the point
PRODUCTS = [aten.mm.default, aten.addmm.default, aten.bmm.default]  # what selective checkpointing keeps


class Point(NamedTuple):
    """What a variant needs, as ratios to Inductor."""

    saved: float
    peak: float
    time: float

    def beats(self, other: Point) -> bool:
        """Tell whether this is no worse in anything."""
        return all(mine <= its for mine, its in zip(self, other, strict=True))


def make_step(name: str, shape: Shape, precision: str, variant: str, device: str) -> Step:
    """Return a compiled step; checkpointing recomputes each layer from its input, selectively all but its products."""
    model, inputs = build(name, shape, precision, device)
    plain = variant.removesuffix(", checkpointing").removesuffix(", selective checkpointing")
    if plain != variant:
        checkpoint(model, selective=variant == SELECTIVE)
    step = Step(model, inputs, VARIANTS[plain]())
    if variant.startswith(BUDGET):
        settle(step)
    return step


def checkpoint(model: nn.Module, selective: bool = False) -> None:
    """Let each layer be computed again from its input, or from that and its products."""
    network: Any = next(part for part in model.modules() if hasattr(part, "gradient_checkpointing_enable"))
    network.config.use_cache = False
    keep = {"context_fn": partial(create_selective_checkpoint_contexts, PRODUCTS)} if selective else {}
    network.gradient_checkpointing_enable({"use_reentrant": False, **keep})


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
    return {
        variant: Point(figures["saved"], figures["peak"], figures["step time"])
        for variant, figures in found.items()
    }


def verdict(found: dict[str, Point]) -> dict[str, str | None]:
    """Return for each of Inductor's ways the fastest policy with no more bytes, no higher peak and no more time."""
    return {
        variant: min(
            (name for name in POLICIES if name in found and found[name].beats(found[variant])),
            key=lambda name: found[name].time,
            default=None,
        )
        for variant in INDUCTOR
        if variant in found
    }


def _figures(point: Point) -> str:
    return "(saved {:.2f}, peak {:.2f}, time {:.2f})".format(*point)


def draw(by_model: dict[str, dict[str, Point]], precision: str) -> None:
    """Draw bytes against time for each model."""
    series = {
        "Inductor: memory budgets, checkpointing": (INDUCTOR, "s-", "#0072B2", 6),
        BUDGET: (tuple(p for p in POLICIES if p.startswith(BUDGET)), "D-", "#CC79A7", -11),
        "wtacrs, 0.3 of the rows": (tuple(p for p in POLICIES if " 0.3 " in p), "o-", "#D55E00", 6),
        "wtacrs, 0.1 of the rows": (tuple(p for p in POLICIES if " 0.1 " in p), "^-", "#009E73", -11),
    }
    width = 5.5 * len(by_model)
    figure, panels = plt.subplots(
        1, len(by_model), figsize=(width, 4.5), layout="constrained", squeeze=False, sharey=True
    )
    for axes, (name, found) in zip(panels[0], by_model.items(), strict=True):
        for label, (wanted, style, color, above) in series.items():
            variants = [variant for variant in wanted if variant in found]
            if not variants:
                continue
            line = sorted((found[v].saved, found[v].time) for v in variants)
            axes.plot(*zip(*line, strict=True), style, color=color, label=label)
            names: dict[tuple[float, float], list[str]] = {}  # points that lie on each other share a label
            for variant in sorted(variants, key=lambda name: -found[name].time):
                short = (
                    re.sub(r"^(inductor,? (budget )?|wtacrs( [\d.]+|, noise budget),? ?)", "", variant)
                    or "default"
                )
                saved, _, time = found[variant]
                near = next((p for p in names if math.dist(p, (saved, time)) < 0.02), (saved, time))
                names.setdefault(near, []).append(short)
            for (saved, time), shorts in names.items():
                is_left = saved < _LEFT  # a label above would be cut
                axes.annotate(
                    " / ".join(shorts),
                    (saved, time),
                    xytext=(8, -3) if is_left else (0, above),
                    textcoords="offset points",
                    fontsize=8,
                    color=color,
                    ha="left" if is_left else "center",
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
            answer = "none" if policy is None else f"{policy} {_figures(by_model[name][policy])}"
            print(f"{name}, {variant} {_figures(by_model[name][variant])} is beaten by {answer}")
    if not quick:
        draw(by_model, precision)


if __name__ == "__main__":
    typer.run(main)
