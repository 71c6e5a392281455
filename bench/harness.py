"""Measure training steps of several variants of one model side by side; keep the figures as rows."""

from __future__ import annotations

import csv
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import wtacrs_fx
from wtacrs_fx import Policy
from wtacrs_fx.tools.circumstances import commit, processor
from wtacrs_fx.tools.measure import percentiles
from wtacrs_fx.tools.steps import Compiler, Step, inductor, measure_steps
from wtacrs_passes.maths.observer import SETTLED
from wtacrs_passes.policy import Placement, Residuals
from wtacrs_passes.report import MIB

RESULTS = Path(__file__).parent / "results"
BASELINE = "inductor"
BUDGET = "wtacrs, noise budget"
"""The default policy."""


# Variants


def settle(step: Step) -> None:
    """Let a noise budget be measured, on batches of the same tokens in other orders, and the code compiled with it."""

    def shuffled(value: Tensor) -> Tensor:
        return value.flatten()[torch.randperm(value.numel()).to(value.device)].view_as(value)

    step.settle({name: shuffled(value) for name, value in step.inputs.items()} for _ in range(SETTLED))


def wtacrs(
    ratio: float, placement: Placement = "auto", residuals: Residuals = "exact", **fields: Any
) -> Compiler:
    """Return the backend that samples weight gradients, and encodes what else is stored."""
    return wtacrs_fx.backend(Policy(ratio=ratio, placement=placement, residuals=residuals, **fields))


VARIANTS: dict[str, Callable[[], Compiler | None]] = {
    "eager": lambda: None,
    "inductor": inductor,
    "inductor budget 0.9": lambda: inductor(0.9),
    "inductor budget 0.7": lambda: inductor(0.7),
    "inductor budget 0.5": lambda: inductor(0.5),
    "inductor budget 0.3": lambda: inductor(0.3),
    "inductor budget 0.1": lambda: inductor(0.1),
    BUDGET: wtacrs_fx.backend,
    f"{BUDGET}, exact residuals": lambda: wtacrs_fx.backend(Policy(residuals="exact")),
    f"{BUDGET}, exact residuals, dX": lambda: wtacrs_fx.backend(Policy(residuals="exact", product_dx="auto")),
    f"{BUDGET}, dX": lambda: wtacrs_fx.backend(Policy(product_dx="auto")),
    f"{BUDGET}, products again": lambda: wtacrs_fx.backend(Policy(recompute_products=1.0)),
    "wtacrs 0.3 auto": lambda: wtacrs(0.3, "auto"),
    "wtacrs 0.3 forward": lambda: wtacrs(0.3, "forward"),
    "wtacrs 0.3 backward": lambda: wtacrs(0.3, "backward"),
    "wtacrs 0.1 backward": lambda: wtacrs(0.1, "backward"),
    "wtacrs 0.3 lossless": lambda: wtacrs(0.3, residuals="lossless"),
    "wtacrs 0.3 balanced": lambda: wtacrs(0.3, residuals="balanced"),
    "wtacrs 0.3 small": lambda: wtacrs(0.3, residuals="small"),
    "wtacrs 0.3 products again": lambda: wtacrs(0.3, residuals="balanced", recompute_products=1.0),
    "wtacrs 0.3 small, products again": lambda: wtacrs(0.3, residuals="small", recompute_products=1.0),
    "wtacrs 0.1 small": lambda: wtacrs(0.1, residuals="small"),
    "wtacrs 0.3 remembered": lambda: wtacrs(0.3, "forward", "balanced"),  # with track_gradient_norms
    "wtacrs 0.1 remembered": lambda: wtacrs(0.1, "forward", "balanced"),
    "wtacrs 0.1 balanced": lambda: wtacrs(0.1, residuals="balanced"),
    "wtacrs 0.3 centred": lambda: wtacrs(0.3, residuals="balanced", center=True),
    "wtacrs 0.5 centred": lambda: wtacrs(0.5, residuals="balanced", center=True),
    "wtacrs 0.7 centred": lambda: wtacrs(0.7, residuals="balanced", center=True),
}


Figure = tuple[str, str, dict[str, Any]]  # metric, unit, and the fields of a `Row` that hold numbers


def compare(steps: dict[str, Step], rounds: int) -> dict[str, list[Figure]]:
    """Return saved bytes, peak and step time of every variant, with ratios to Inductor's.

    Without rounds, no step time. Raise if a step ran another variant's code or was compiled again.
    """
    measured = measure_steps(steps, rounds)
    baseline = measured[BASELINE]
    found: dict[str, list[Figure]] = {}
    for variant, one in measured.items():
        found[variant] = [
            (metric, "MiB", {"value": size / MIB, "ratio": size / to})
            for metric, size, to in (("saved", one.saved, baseline.saved), ("peak", one.peak, baseline.peak))
        ]
        if rounds:
            found[variant].append(("step time", "s", summarise(one.seconds, baseline.seconds)))
    return found


# Rows of evidence


@dataclass(frozen=True)
class Row:
    """One measured figure, with all that is needed to measure it again."""

    benchmark: str
    model: str
    variant: str
    metric: str
    value: float  # the median, where there are rounds
    unit: str
    ratio: float | None = (
        None  # to Inductor in the same run, unless the benchmark says: median over the rounds
    )
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    rounds: int = 1
    shapes: str = ""
    dtype: str = "float32"
    seed: int = 0
    device: str = "cpu"
    processor: str = ""
    cores: int = 0
    python: str = ""
    torch: str = ""
    transformers: str = ""
    commit: str = ""
    command: str = ""
    date: str = ""

    def __str__(self) -> str:
        ratio = "" if self.ratio is None else f" (ratio {self.ratio:.3f})"
        return f"{self.model} {self.dtype} {self.variant}: {self.metric} {self.value:.4g} {self.unit}{ratio}"


def to_rows(
    benchmark: str,
    model: str,
    shape: object,
    precision: str,
    found: Mapping[str, Iterable[Figure]],
    device: str = "cpu",
) -> list[Row]:
    """Return the rows of the figures of each variant."""
    return [
        Row(
            benchmark, model, variant, metric, unit=unit, shapes=str(shape), dtype=precision,
            **figure, **circumstances(device),
        )
        for variant, figures in found.items()
        for metric, unit, figure in figures
    ]  # fmt: skip


def summarise(values: Sequence[float], baseline: Sequence[float] | None = None) -> dict[str, Any]:
    """Return the fields of a `Row` that describe repeated measures.

    Args:
        values: one a round; baseline: Inductor's of the same rounds.
    """
    p20, p50, p80 = percentiles(values)
    ratio = statistics.median(v / b for v, b in zip(values, baseline, strict=True)) if baseline else None
    return {"value": p50, "ratio": ratio, "p20": p20, "p50": p50, "p80": p80, "rounds": len(values)}


def circumstances(device: str = "cpu") -> dict[str, Any]:
    """Return the fields of a `Row` that describe machine, software and call; no path, no host name."""
    name = Path(sys.argv[0]).stem
    return {
        "device": device,
        "processor": processor(device),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
        "command": shlex.join(["python", "-m", f"bench.{name}", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def record(rows: Sequence[Row], keep: bool) -> None:
    """Print the rows, and add them to the results if they are to be kept."""
    for row in rows:
        print(row)
    if keep:
        append(rows)


def append(rows: Iterable[Row], folder: Path = RESULTS) -> None:
    """Add each row to the file of its benchmark, `<benchmark>.csv`."""
    folder.mkdir(exist_ok=True)  # git keeps no empty folder
    for row in rows:
        path = folder / f"{row.benchmark}.csv"
        is_new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerow(asdict(row))


def read(benchmark: str, folder: Path = RESULTS) -> list[Row]:
    """Return all rows of a benchmark, in the order in which they were measured."""
    path = folder / f"{benchmark}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [_parse(record) for record in csv.DictReader(file)]


def _parse(record: dict[str, str]) -> Row:
    numbers: dict[str, Any] = {
        name: float(record[name]) if record[name] else None
        for name in ("value", "ratio", "p20", "p50", "p80")
    }
    counts = {name: int(record[name]) for name in ("rounds", "seed", "cores")}
    return Row(**{**record, **numbers, **counts})
