"""Saved activations, peak memory and step time of every model and variant.

    python -m bench.memory_time                                   # all models, float32
    python -m bench.memory_time --model bert --rounds 15
    python -m bench.memory_time --precision bfloat16 --rounds 0   # memory alone
    python -m bench.memory_time --model llama-lm --precision autocast --layers 4 --d 576 --heads 9 --batch 8 --seq 512
    python -m bench.memory_time --quick                           # tiny sizes: does it run? keeps no rows

Saved activations are counted in units of one [tokens, d] tensor for each layer: the difference between a
model and the same model with one layer less, so that embeddings and loss do not count.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any

import typer

from bench.harness import BASELINE, BUDGET, MIB, VARIANTS, Row, circumstances, compare, record, settle
from bench.models import LANGUAGE_MODELS, MODELS, PRECISIONS, TINY, Shape, build
from wtacrs_fx.tools.steps import Step, saved_bytes


@dataclass(frozen=True)
class Case:
    """One model at one size and precision."""

    model: str
    shape: Shape
    precision: str
    device: str
    seed: int

    def row(self, variant: str, metric: str, unit: str, **figures: Any) -> Row:
        """Return a figure of one variant."""
        return Row(
            "memory_time",
            self.model,
            variant,
            metric,
            unit=unit,
            shapes=str(self.shape),
            dtype=self.precision,
            seed=self.seed,
            **figures,
            **circumstances(self.device),
        )

    def steps(self, variants: list[str]) -> dict[str, Step]:
        """Return one compiled step for each variant, all with the same weights and the same batch."""
        model, inputs = build(self.model, self.shape, self.precision, self.device, self.seed)
        steps = {}
        for variant in variants:
            steps[variant] = Step(model, inputs, VARIANTS[variant]())
            print(
                f"{self.model} {self.precision} {self.shape} {variant}: {steps[variant].first_call_seconds:.0f} s"
            )
            if variant.startswith(BUDGET):
                settle(steps[variant])
        return steps

    def unit_bytes(self) -> int:
        """Return the bytes of one [tokens, d] tensor of the batch, in the type that products return."""
        _, inputs = build(self.model, replace(self.shape, layers=1), "float32", seed=self.seed)
        tokens = inputs["target"].shape[:-1] if "target" in inputs else inputs["input_ids"].shape
        return tokens.numel() * self.shape.d * (4 if self.precision == "float32" else 2)


def measure(case: Case, variants: list[str], rounds: int) -> list[Row]:
    """Return all figures of one model; without rounds, no step times."""
    steps = case.steps(variants)
    kept = {variant: saved_bytes(step) for variant, step in steps.items()}
    figures = compare(steps, rounds)
    one_less = replace(case, shape=replace(case.shape, layers=case.shape.layers - 1)).steps(variants)
    unit = case.unit_bytes()
    units = {variant: (kept[variant] - saved_bytes(step)) / unit for variant, step in one_less.items()}

    measured_peak = next(figure["value"] for metric, _, figure in figures[BASELINE] if metric == "peak") * MIB
    rows = []
    for variant, step in steps.items():
        ratio = units[variant] / units[BASELINE]
        rows.append(
            case.row(variant, "saved units a layer", "[tokens, d]", value=units[variant], ratio=ratio)
        )
        rows += [case.row(variant, metric, unit, **figure) for metric, unit, figure in figures[variant]]
        for report in step.reports:
            figures_of_report = [("saved, as reported", report.saved_bytes_after, kept[BASELINE])]
            if report.peak_after is not None:
                figures_of_report.append(("peak, as predicted", report.peak_after.size, measured_peak))
            for metric, size, whole in figures_of_report:
                value = float(size)
                rows.append(case.row(variant, metric, "MiB", value=value / MIB, ratio=value / whole))
    return rows


_NAMES = f"Any of {', '.join((*MODELS, *LANGUAGE_MODELS))}; the first {len(MODELS)} by default."


def main(
    model: Annotated[list[str] | None, typer.Option(help=_NAMES)] = None,
    variant: Annotated[
        list[str] | None, typer.Option(help="All by default; the baseline always runs.")
    ] = None,
    layers: int = Shape.layers,
    d: int = Shape.d,
    heads: int = Shape.heads,
    batch: int = Shape.batch,
    seq: int = Shape.seq,
    words: Annotated[int | None, typer.Option(help="Of a language model; its own by default.")] = None,
    precision: Annotated[str, typer.Option(help=f"One of {', '.join(PRECISIONS)}.")] = "float32",
    device: str = "cpu",
    seed: int = 0,
    rounds: Annotated[
        int, typer.Option(help="Timed steps of each variant, interleaved; 0 for memory alone.")
    ] = 11,
    quick: Annotated[bool, typer.Option(help="Tiny sizes and two rounds; keep no rows.")] = False,
) -> None:
    """Measure saved activations, peak memory and step time; append rows to bench/results."""
    shape = replace(TINY, words=words) if quick else Shape(layers, d, heads, batch, seq, words)
    if precision not in PRECISIONS:
        raise typer.BadParameter(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    chosen = [name for name in VARIANTS if not variant or name in {*variant, BASELINE}]
    for name in model or MODELS:
        rows = measure(Case(name, shape, precision, device, seed), chosen, 2 if quick else rounds)
        record(rows, keep=not quick)


if __name__ == "__main__":
    typer.run(main)
