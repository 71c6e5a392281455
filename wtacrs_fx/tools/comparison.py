"""Training with several compilers side by side: a table of what was measured, a file, a picture."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

BASELINE = "Inductor"


@dataclass(frozen=True)
class Row:
    """What was measured of one variant; the percentiles are over all steps but the first."""

    variant: str
    accuracy: float
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
    _Measure("accuracy", "accuracy", "% held out", scale=100),
    _Measure("saved_mib", "saved", "MiB a step"),
    _Measure("peak_mib", "peak", "MiB"),
    _Measure("seconds_p50", "time", "s a step"),
)
_LEGEND = (
    f"In brackets: the ratio to {BASELINE}. Inductor at 0.9: with activation_memory_budget=0.9. "
    "wtacrs: with the share of rows that it keeps."
)


def _baseline(rows: Sequence[Row]) -> Row:
    return next(row for row in rows if row.variant == BASELINE)


def table(rows: Sequence[Row]) -> Table:
    """Lay the rows out, each figure also as a ratio to Inductor's."""
    result = Table(caption=_LEGEND, caption_justify="left", pad_edge=False)
    result.add_column("variant", no_wrap=True)
    for measure in _MEASURES:
        result.add_column(f"{measure.title}\n{measure.unit}", justify="right", no_wrap=True)
    for row in rows:
        result.add_row(row.variant, *(measure.text(row, _baseline(rows)) for measure in _MEASURES))
    return result


def write_csv(rows: Sequence[Row], context: Mapping[str, object], path: Path) -> None:
    """Write one line for each row, with what is needed to repeat it."""
    lines = [asdict(row) | dict(context) for row in rows]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """Draw one panel of horizontal bars for each measure."""
    from matplotlib.figure import Figure

    colours = ["#999999", "#0072B2", "#56B4E9", "#D55E00"]  # Okabe and Ito, told apart by the colour-blind
    figure = Figure(figsize=(13, 3.2), layout="constrained")
    for axes, measure in zip(figure.subplots(1, len(_MEASURES), sharey=True), _MEASURES, strict=True):
        values = [measure.value(row) for row in rows]
        bars = axes.barh([row.variant for row in rows], values, color=colours)
        axes.bar_label(bars, [measure.text(row, _baseline(rows)) for row in rows], padding=3, fontsize=9)
        axes.set_title(measure.title)
        axes.set_xlabel(measure.unit)
        axes.set_xlim(0, max(values) * 1.6)
        axes.tick_params(bottom=False, labelbottom=False)  # the bars carry their values
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.invert_yaxis()
    figure.suptitle(f"{title}\n{_LEGEND}", fontsize=10)
    figure.savefig(path, dpi=150)
