"""Training with several compilers side by side: a table of what was measured, a file, a picture."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from .tasks import Merit

BASELINE, BUDGET = "Inductor", "Inductor at 0.9"
_COLOURS = {
    "eager": "#999999",
    BASELINE: "#0072B2",
    BUDGET: "#56B4E9",
}  # Okabe and Ito, for the colour-blind too
_OURS = "#D55E00"


@dataclass(frozen=True)
class Row:
    """What was measured of one variant; the percentiles are over all steps but the first."""

    variant: str
    merit: float
    saved_mib: float
    peak_mib: float
    seconds_p50: float
    seconds_p20: float
    seconds_p80: float
    first_step_seconds: float


@dataclass(frozen=True)
class _Measure:
    field: str
    title: str
    unit: str
    scale: float = 1.0

    def value(self, row: Row) -> float:
        return self.scale * float(getattr(row, self.field))

    def text(self, row: Row, baseline: Row) -> str:
        value, reference = self.value(row), self.value(baseline)
        ratio = f" ({value / reference:.2f}x)" if reference else ""
        return f"{_three_digits(value)}{ratio}"


def _three_digits(value: float) -> str:
    decimals = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{max(0, decimals)}f}"


_MEASURES = (
    _Measure("saved_mib", "saved", "MiB a step"),
    _Measure("peak_mib", "peak", "MiB"),
    _Measure("seconds_p50", "time", "s a step"),
)


def _legend(rows: Sequence[Row]) -> str:
    """Say what the variants are."""
    said = [f"In brackets: the ratio to {BASELINE}."]
    if any(row.variant == BUDGET for row in rows):
        said.append(f"{BUDGET}: with activation_memory_budget=0.9.")
    if any(row.variant.startswith("wtacrs ") for row in rows):
        said.append("wtacrs: with the share of rows that it keeps.")
    return " ".join(said)


def _measures(merit: Merit) -> tuple[_Measure, ...]:
    return (_Measure("merit", merit.title, merit.unit, merit.scale), *_MEASURES)


def _baseline(rows: Sequence[Row]) -> Row:
    return next(row for row in rows if row.variant == BASELINE)


def table(rows: Sequence[Row], merit: Merit) -> Table:
    """Lay the rows out, each figure also as a ratio to Inductor's."""
    result = Table(caption=_legend(rows), caption_justify="left", pad_edge=False)
    result.add_column("variant", no_wrap=True)
    measures = _measures(merit)
    for measure in measures:
        result.add_column(f"{measure.title}\n{measure.unit}", justify="right", no_wrap=True)
    for row in rows:
        result.add_row(row.variant, *(measure.text(row, _baseline(rows)) for measure in measures))
    return result


def write_csv(rows: Sequence[Row], context: Mapping[str, object], path: Path) -> None:
    """Write one line for each row, with what is needed to repeat it."""
    lines = [asdict(row) | dict(context) for row in rows]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


def draw(rows: Sequence[Row], merit: Merit, title: str, path: Path) -> None:
    """Draw one panel of horizontal bars for each measure."""
    from matplotlib.figure import Figure

    colours = [_COLOURS.get(row.variant, _OURS) for row in rows]
    measures = _measures(merit)
    figure = Figure(figsize=(13, 3.2), layout="constrained")
    for axes, measure in zip(figure.subplots(1, len(measures), sharey=True), measures, strict=True):
        values = [measure.value(row) for row in rows]
        bars = axes.barh([row.variant for row in rows], values, color=colours)
        axes.bar_label(bars, [measure.text(row, _baseline(rows)) for row in rows], padding=3, fontsize=9)
        axes.set_title(measure.title)
        axes.set_xlabel(measure.unit)
        axes.set_xlim(0, max(values) * 1.6)
        axes.tick_params(bottom=False, labelbottom=False)  # the bars carry their values
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.invert_yaxis()
    figure.suptitle(f"{title}\n{_legend(rows)}", fontsize=10)
    figure.savefig(path, dpi=150)
