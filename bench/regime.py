"""A language model with its loss over a real vocabulary, as people train one, beside all that PyTorch offers.

    python -m bench.regime                        # autocast, 4 layers, 49,152 words, 8 x 512 tokens
    python -m bench.regime --precision bfloat16
    python -m bench.regime --words 131072 --rounds 0                  # memory alone
    python -m bench.regime --quick                # tiny sizes: does it run? keeps no rows

Saved bytes, peak and step time as ratios to Inductor's default, from one interleaved run. The noise budget, the default
policy, is measured first, on other batches.
"""

from __future__ import annotations

from typing import Annotated

import typer

import wtacrs_fx
from bench.frontier import CHECKPOINTING, checkpoint
from bench.harness import BUDGET, Row, compare, record, settle, to_rows
from bench.models import PRECISIONS, REGIME, TINY, WORDS, Shape, build
from wtacrs_fx import Policy
from wtacrs_fx.tools.steps import Compiler, Step, inductor

CHUNKER = "inductor, auto_chunker"
ONCE = "wtacrs, layers once"
IN_8_BITS = "wtacrs, all rows in 8 bits"
POLICIES = {
    BUDGET: Policy(),
    "wtacrs": Policy(ratio=0.3),
    "wtacrs, all rows": Policy(ratio=1.0),
    IN_8_BITS: Policy(ratio=1.0, product="int8"),
    ONCE: Policy(ratio=0.3),
    f"{BUDGET}, products again": Policy(recompute_products=1.0),
    "wtacrs, checkpointing": Policy(ratio=0.3),
    f"{BUDGET}, checkpointing": Policy(),
}
VARIANTS = ("inductor", "inductor budget 0.9", "inductor budget 0.5", CHECKPOINTING, CHUNKER, *POLICIES)


def compiler(variant: str) -> Compiler:
    """Return a new backend object."""
    if variant in POLICIES:
        return wtacrs_fx.backend(POLICIES[variant])
    if variant == CHUNKER:
        # Below its default of 8, which this head does not reach: its weight counts as input.
        return inductor(**{"auto_chunker.enable": True, "auto_chunker.amplify_ratio_threshold": 4})
    budget = variant.removeprefix("inductor budget ")
    return inductor(float(budget)) if budget != variant else inductor()


def measure(
    name: str, shape: Shape, precision: str, device: str, rounds: int, variants: list[str]
) -> list[Row]:
    """Return saved bytes, peak and, with rounds, step time of each variant."""
    steps = {}
    for variant in variants:
        model, inputs = build(name, shape, precision, device)
        if variant.endswith(", checkpointing"):
            checkpoint(model)
        if variant == ONCE:
            wtacrs_fx.mark_layers(model)
        step = steps[variant] = Step(model, inputs, compiler(variant))
        print(f"{name}, {variant}: compiled in {step.first_call_seconds:.0f} s", flush=True)
        if variant.startswith(BUDGET) and rounds:
            settle(step)
            print(*step.reports, sep="\n\n", flush=True)
    return to_rows("regime", name, shape, precision, compare(steps, rounds), device)


def main(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(WORDS)}.")] = "llama-lm",
    variant: Annotated[
        list[str] | None, typer.Option(help="All by default; the baseline always runs.")
    ] = None,
    layers: int = REGIME.layers,
    d: int = REGIME.d,
    heads: int = REGIME.heads,
    batch: int = REGIME.batch,
    seq: int = REGIME.seq,
    words: Annotated[int | None, typer.Option(help="Its own by default.")] = None,
    precision: Annotated[str, typer.Option(help=f"One of {', '.join(PRECISIONS)}.")] = "autocast",
    device: str = "cpu",
    rounds: Annotated[int, typer.Option(help="Timed steps of each variant; 0 for memory alone.")] = 5,
    quick: Annotated[bool, typer.Option(help="Tiny sizes and two rounds; keep no rows.")] = False,
) -> None:
    """Measure a language model with its loss; append rows to bench/results."""
    shape = TINY if quick else Shape(layers, d, heads, batch, seq, words)
    if precision not in PRECISIONS:
        raise typer.BadParameter(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    chosen = [name for name in VARIANTS if not variant or name in (*variant, VARIANTS[0])]
    record(measure(model, shape, precision, device, 2 if quick else rounds, chosen), keep=not quick)


if __name__ == "__main__":
    typer.run(main)
