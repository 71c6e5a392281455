"""Print the tables of bench/results and write them into README.md and docs.

    python -m bench.tables              # print all
    python -m bench.tables --write      # rewrite the marked blocks

A block stands between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->`; NAME is a key of `TABLES` or
`targets`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from bench import models
from bench.gpu import CASES
from bench.harness import BUDGET, RESULTS, Row, read
from bench.models import Shape
from bench.targets import TARGETS

ROOT = RESULTS.parents[1]
PAGES = (ROOT / "README.md", ROOT / "bench" / "README.md", *sorted((ROOT / "docs").glob("*.md")))


@dataclass(frozen=True)
class Table:
    """Which rows of a benchmark are shown, and where."""

    benchmark: str
    corner: str
    shown: Callable[[Row], bool]
    line: Callable[[Row], str]
    column: Callable[[Row], str]
    cell: Callable[[Row], str]
    columns: tuple[str, ...] = ()  # the order; as measured where empty
    lines: tuple[str, ...] = ()  # likewise

    def render(self, folder: Path = RESULTS) -> str:
        """Return a markdown table of the latest row of each cell, and where it was measured."""
        latest: dict[tuple[str, str], Row] = {}
        for row in filter(self.shown, read(self.benchmark, folder)):
            latest[self.line(row), self.column(row)] = row
        if not latest:
            return f"No results yet: `python -m bench.{self.benchmark}`."
        lines = [name for name in self.lines if any(line == name for line, _ in latest)]
        lines = lines or list(dict.fromkeys(line for line, _ in latest))
        columns = [name for name in self.columns if any(column == name for _, column in latest)]
        columns = columns or list(dict.fromkeys(column for _, column in latest))
        cells = [
            [
                line,
                *(self.cell(latest[line, column]) if (line, column) in latest else "" for column in columns),
            ]
            for line in lines
        ]
        return f"{markdown([self.corner, *columns], cells)}\n\n{_origin(list(latest.values()))}"


def markdown(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Return a table, its first column to the left and the others to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, rule, *cells])


def _origin(rows: Sequence[Row]) -> str:
    def all_of(values: Sequence[str]) -> str:
        return "; ".join(dict.fromkeys(values))

    machine = all_of([f"{row.processor}, {row.cores} core{'s' * (row.cores != 1)}" for row in rows])
    software = all_of([f"torch {row.torch}, transformers {row.transformers}" for row in rows])
    commit = all_of([row.commit for row in rows])
    shapes = all_of([f"{row.shapes}, {row.dtype}" for row in rows])
    return f"{shapes}. {machine}; {software}; commit {commit}; {max(row.date for row in rows)[:10]}."


_TARGETS = ("target 0.25", "target 0.50", "target 0.75")
REGIME, SMOLLM2 = str(models.REGIME), str(Shape(30, 576, 9, 2, 512))
_COMPILED = {str(Shape()): "3 layers", SMOLLM2: "30 layers"}

SHOWN = (
    "eager",
    "inductor",
    "inductor budget 0.9",
    "inductor budget 0.7",
    "inductor budget 0.5",
    "wtacrs 0.3 backward",
    "wtacrs 0.1 backward",
    "wtacrs 0.3 lossless",
    "wtacrs 0.3 balanced",
    "wtacrs 0.1 balanced",
    "wtacrs 0.3 small",
)
"""The variants of the tables of models; the rows of the others are in bench/results."""


def _of_models(metric: str, dtype: str, cell: Callable[[Row], str]) -> Table:
    def shown(row: Row) -> bool:
        is_shown = row.variant in SHOWN and row.device == "cpu"
        return is_shown and (row.metric, row.dtype, row.shapes) == (metric, dtype, str(Shape()))

    return Table("memory_time", "model", shown, _model, _variant, cell, SHOWN)


def _model(row: Row) -> str:
    return row.model


def _variant(row: Row) -> str:
    return row.variant


def _any(row: Row) -> bool:
    return True


def _training(row: Row) -> str:
    return f"{row.model}, {row.shapes}: {row.variant}"


def _is_of_a_case(row: Row) -> bool:
    """Tell whether a row is of a variant that `bench.gpu` measures still: others are of older code."""
    return row.model in CASES and row.variant in CASES[row.model].variants


def _value(row: Row) -> str:
    return f"{row.value:.3g}"


def _four(row: Row) -> str:
    return f"{row.value:.4g}" + (f" {row.unit}" if row.unit != "1" else "")


def _one_digit(row: Row) -> str:
    return f"{row.value:.1f}"


def _ratio(row: Row) -> str:
    return f"{row.ratio:.2f}"


def _beside(row: Row) -> str:
    return f"{row.value:.3g} ({row.ratio:.2f})"


def _both(row: Row) -> str:
    return f"{row.value:.3g} {row.unit} ({row.ratio:.2f})"


_MEMORY = ("weights", "gradients", "optimizer state")
_BY_BACKEND = ("saved", "all", "last loss")


def _spread(row: Row) -> str:
    return f"{row.value:.2f} ({row.p20:.2f} to {row.p80:.2f})"


def _of_backend(row: Row) -> str:
    return row.metric if row.metric in _MEMORY else f"{row.metric}, {row.variant.split()[0]}"


_ACCURACY = {
    "": "held out",
    "standard error": "standard error",
    "gain over exact": "difference to exact",
    "gain over exact, standard error": "its standard error",
}
_EQUAL_TIME = {
    "step time": "step time",
    "training loss at equal time, gain over exact": "above exact, mean",
    "training loss at equal time, gain over exact, standard error": "its standard error",
    "training loss at equal time, gain over exact, largest": "above exact, at most",
}
_INDUCTOR = {
    "inductor": "Inductor",
    "inductor budget 0.9": "Inductor, `activation_memory_budget=0.9`",
    "inductor budget 0.5": "Inductor, `activation_memory_budget=0.5`",
    "inductor, checkpointing": "Inductor, checkpointing",
    "inductor, auto_chunker": "Inductor, `auto_chunker`",
}
_HEADLINE = _INDUCTOR | {
    BUDGET: "**wtacrs**, default policy",
    f"{BUDGET}, products again": "**wtacrs**, `recompute_products=1.0`: products of layers again",
    f"{BUDGET}, checkpointing": "**wtacrs**, default policy, checkpointing",
    "wtacrs": "**wtacrs**, `ratio=0.3`: a third of the rows",
    "wtacrs, all rows": "**wtacrs**, `ratio=1.0`: all rows",
    "wtacrs, all rows in 8 bits": '**wtacrs**, `ratio=1.0, product="int8"`: all rows in 8 bits',
}
_WITHOUT_HEAD = _INDUCTOR | {"wtacrs 0.3 balanced": "**wtacrs**, `ratio=0.3`"}
_MODERN = {BUDGET: "**wtacrs**, default policy", "wtacrs 0.3 balanced": "**wtacrs**, `ratio=0.3`"}
_WELL_KNOWN = {"inductor": "Inductor", BUDGET: "wtacrs", f"{BUDGET}, products again": "products again"}
_FASTEST = "fastest within "
_WAYS_SHOWN = ("all rows", "rows 0.3", "rows 0.7")
_ON_GPU = ("saved", "peak", "step time", "kernel time")
_IN_16_BITS = {
    **{name: _INDUCTOR[name] for name in ("inductor", "inductor budget 0.9", "inductor budget 0.5")},
    "inductor budget 0.7": "Inductor, `activation_memory_budget=0.7`",
    "wtacrs 0.3 backward": '**wtacrs**, `ratio=0.3, residuals="exact"`',
    "wtacrs 0.3 balanced": "**wtacrs**, `ratio=0.3`",
    BUDGET: "**wtacrs**, default policy",
    f"{BUDGET}, dX": '**wtacrs**, `product_dx="auto"`',
    f"{BUDGET}, exact residuals": '**wtacrs**, `residuals="exact"`',
    f"{BUDGET}, exact residuals, dX": '**wtacrs**, `residuals="exact", product_dx="auto"`',
}


def _frontier(dtype: str) -> Table:
    return Table(
        "frontier",
        "",
        lambda row: (row.device, row.dtype) == ("cpu", dtype),
        _variant,
        lambda row: f"{row.model}: {row.metric}",
        _ratio,
    )


def _without_head(dtype: str) -> Table:
    def shown(row: Row) -> bool:
        is_here = (row.device, row.dtype, row.shapes) == ("cpu", dtype, str(Shape()))
        return is_here and row.variant in _IN_16_BITS and f"{row.model}: {row.metric}" in columns

    columns = tuple(
        f"{model}: {metric}" for model in ("bert", "llama") for metric in ("saved", "peak", "step time")
    )
    lines = tuple(_IN_16_BITS.values())
    return Table(
        "memory_time", "", shown, lambda row: _IN_16_BITS[row.variant],
        lambda row: f"{row.model}: {row.metric}", _ratio, columns, lines,
    )  # fmt: skip


TABLES: dict[str, Table] = {
    "memory": _of_models("saved units a layer", "bfloat16", _one_digit),
    "memory-float32": _of_models("saved units a layer", "float32", _one_digit),
    "peak": _of_models("peak", "bfloat16", _both),
    "time": _of_models("step time", "bfloat16", _ratio),
    "gradient-variance": Table(
        "gradient_variance",
        "stage, estimator",
        _any,
        lambda row: f"{row.model}, {row.variant}",
        lambda row: row.metric.removeprefix("relative variance, "),
        _value,
    ),
    "gradient-error": Table(
        "gradient_error",
        "stored",
        _any,
        _variant,
        lambda row: f"{row.model.removeprefix('MiniLM, ')}: {row.metric}",
        lambda row: _both(row) if row.unit == "MiB" else _value(row),
    ),
    "trainer": Table(
        "trainer",
        "Trainer",
        lambda row: row.unit in ("%", "MiB"),
        _variant,
        lambda row: row.metric,
        lambda row: _both(row) if row.unit == "MiB" else _four(row),
    ),
    "accuracy": Table(
        "accuracy",
        "task, variant",
        lambda row: not row.metric.startswith(("training loss", "step time")),
        _training,
        lambda row: _ACCURACY[", ".join(row.metric.split(", ")[1:])],
        _four,
    ),
    "equal-time": Table(
        "accuracy",
        "task, variant",
        lambda row: row.metric in _EQUAL_TIME and row.ratio != 1.0,
        _training,
        lambda row: _EQUAL_TIME[row.metric],
        lambda row: _four(row) if row.ratio is None else _ratio(row),
        tuple(_EQUAL_TIME.values()),
    ),
    "gradient-norms": Table(
        "gradient_norms",
        "known of the gradient's rows",
        lambda row: row.unit == "1",
        lambda row: row.variant.replace("||", "‖"),  # a bar would end the cell
        lambda row: row.model.removeprefix("MiniLM, "),
        _value,
    ),
    "paper-memory": Table(
        "paper_tables",
        "fine-tuning",
        lambda row: row.metric.startswith("memory"),
        _variant,
        lambda row: row.model + ("" if row.metric == "memory" else ", published ratio"),
        lambda row: f"{row.value:.1f} GB ({row.ratio:.2f})" if row.unit == "GB" else f"{row.value:.2f}",
    ),
    "largest-batch": Table(
        "paper_tables",
        "fine-tuning",
        lambda row: row.metric.startswith("largest"),
        _variant,
        lambda row: f"{row.model}, {row.metric.split(', ')[1]}",
        lambda row: f"{row.value:.0f}" + (f" ({row.ratio:.1f})" if row.ratio else ""),
    ),
    "synthetic-variance": Table(
        "synthetic_variance", "rows", lambda row: row.metric == "variance / wta-crs", _model, _variant, _value
    ),
    "headline": Table(
        "regime",
        "",
        lambda row: (
            (row.device, row.model, row.dtype, row.shapes) == ("cpu", "llama-lm", "autocast", REGIME)
            and row.variant in _HEADLINE
        ),
        lambda row: _HEADLINE[row.variant],
        lambda row: row.metric,
        _ratio,
        ("saved", "peak", "step time"),
        tuple(_HEADLINE.values()),
    ),
    "regime-precisions": Table(
        "regime",
        "",
        lambda row: (
            (row.device, row.model, row.shapes) == ("cpu", "llama-lm", REGIME)
            and row.dtype != "autocast"
            and row.variant in _HEADLINE
        ),
        lambda row: _HEADLINE[row.variant],
        lambda row: f"{row.dtype}: {row.metric}",
        _ratio,
    ),
    "memory-target": Table(
        "memory_target",
        "",
        lambda row: row.variant in _TARGETS and row.metric == "measured over asked",
        lambda row: f"{row.model}, {row.dtype}",
        lambda row: f"{row.variant}: {row.metric}",
        _ratio,
    ),
    "memory-target-steps": Table(
        "memory_target",
        "",
        lambda row: row.metric in ("peak", "step time") and row.variant.startswith(("inductor", *_TARGETS)),
        _variant,
        lambda row: f"{row.model}, {row.dtype}: {row.metric}",
        _ratio,
    ),
    "offload": Table(
        "offload", "autocast", _any, lambda row: f"{row.model}: {row.variant}", lambda row: row.metric, _ratio
    ),
    "blocks": Table("blocks", "", _any, _variant, lambda row: row.metric, _ratio),
    "smollm2": Table(
        "regime",
        "",
        lambda row: (row.device, row.model, row.shapes) == ("cpu", "llama-lm", SMOLLM2),
        lambda row: _HEADLINE.get(row.variant, row.variant),
        lambda row: f"{row.dtype}: {row.metric}",
        _ratio,
    ),
    "roofline": Table(
        "roofline",
        "",
        lambda row: row.dtype == "autocast" and row.shapes == REGIME,
        lambda row: row.metric,
        _variant,
        lambda row: _beside(row) if row.ratio else _value(row),
    ),
    "products": Table(
        "products",
        "",
        lambda row: row.device == "cpu",
        _variant,
        lambda row: f"{row.dtype}, {row.shapes}" if row.metric == "time" else f"error, {row.dtype}",
        lambda row: _ratio(row) if row.metric == "time" else f"{row.value:.1e}",
    ),
    "fastest-ways": Table(
        "estimators",
        "within this share of the minibatch's noise, of",
        lambda row: row.variant.startswith(_FASTEST),
        lambda row: row.variant.removeprefix(_FASTEST).replace(" of ", ": ", 1),
        lambda row: f"{row.model}, {row.dtype}",
        _ratio,
    ),
    "ways": Table(
        "estimators",
        "",
        lambda row: row.variant.startswith(_WAYS_SHOWN),
        _variant,
        lambda row: f"{row.model}, {row.dtype}: {row.metric.split(',')[0]}",
        lambda row: _ratio(row) if row.metric == "time" else f"{row.value:.1e}",
    ),
    "trl": Table("trl", "", _any, _variant, lambda row: f"{row.model}: {row.metric}", _both),
    "codes": Table(
        "codes",
        "error, or its share of that of steps of the peak",
        _any,
        _variant,
        lambda row: f"{row.model}: {row.metric}",
        lambda row: _ratio(row) if "," in row.variant else f"{row.value:.1e}",
    ),
    "depth": Table(
        "depth",
        "",
        lambda row: row.device == "cpu",
        _variant,
        lambda row: f"{row.dtype}, {row.shapes.split()[0]}",
        lambda row: f"{row.value:.1e}",
    ),
    "noise-budget": Table(
        "noise_budget",
        "",
        _any,
        lambda row: f"{row.model}, {row.dtype}",
        lambda row: row.metric,
        lambda row: _spread(row) if row.metric == "predicted over measured" else f"{row.value:.2g}",
    ),
    "encodings": Table(
        "encodings",
        "share of the speed of a copy",
        lambda row: row.device == "cpu",
        _variant,
        lambda row: row.dtype,
        _ratio,
    ),
    "without-head": Table(
        "frontier",
        "",
        lambda row: (row.device, row.dtype) == ("cpu", "float32") and row.variant in _WITHOUT_HEAD,
        lambda row: _WITHOUT_HEAD[row.variant],
        lambda row: f"{row.model}: {row.metric}",
        _ratio,
        tuple(
            f"{model}: {metric}" for model in ("bert", "llama") for metric in ("saved", "peak", "step time")
        ),
    ),
    "without-head-autocast": _without_head("autocast"),
    "without-head-float32": _without_head("float32"),
    "without-head-bfloat16": _without_head("bfloat16"),
    "modern": Table(
        "modern",
        "",
        _any,
        lambda row: f"{row.model}: {_INDUCTOR.get(row.variant, _MODERN.get(row.variant, row.variant))}",
        lambda row: row.metric,
        lambda row: _ratio(row) if row.unit != "nats" else _four(row),
    ),
    "frontier": _frontier("float32"),
    "frontier-autocast": _frontier("autocast"),
    "gpu-headline": Table(
        "gpu",
        "",
        lambda row: row.model == next(iter(CASES)) and row.variant in _HEADLINE,
        lambda row: _HEADLINE[row.variant],
        lambda row: row.metric,
        _ratio,
        _ON_GPU,
    ),
    "gpu": Table(
        "gpu",
        "case",
        lambda row: math.isnan(row.value) or (row.metric in _ON_GPU and _is_of_a_case(row)),
        lambda row: f"{row.model}: {row.variant}",
        lambda row: row.metric,
        lambda row: "" if math.isnan(row.value) else _both(row),
        _ON_GPU,
    ),
    "scaling": Table(
        "scaling",
        "predicted, then run",
        lambda row: row.ratio is not None,
        _model,
        lambda row: f"{row.variant}: {row.metric} / predicted",
        _ratio,
    ),
    "plan-70b": Table(
        "scaling", "of a GPU", lambda row: row.ratio is None, lambda row: row.metric, _variant, _four
    ),
    "well-known": Table(
        "well_known",
        "",
        _any,
        _model,
        lambda row: f"{row.metric}, {_WELL_KNOWN[row.variant]}",
        lambda row: (
            f"{row.value:.0f}" if row.unit == "1" else f"{row.value / 1024:.2f} GiB ({row.ratio:.2f})"
        ),
        tuple(
            f"{metric}, {way}"
            for metric in ("saved", "largest batch, 24 GB", "largest batch, 80 GB")
            for way in _WELL_KNOWN.values()
        ),
    ),
    "optimizers": Table(
        "optimizers",
        "trained with, MiB",
        lambda row: row.metric in _BY_BACKEND or (row.metric in _MEMORY and row.variant == "inductor"),
        _model,
        _of_backend,
        lambda row: _beside(row) if row.variant != "inductor" and row.ratio else _value(row),
        (*_MEMORY, *(f"{metric}, {name}" for metric in _BY_BACKEND for name in ("inductor", "wtacrs"))),
    ),
    "compile-time": Table(
        "compile_time",
        "model",
        lambda row: row.dtype == "autocast" and row.shapes in _COMPILED,
        lambda row: f"{row.model}, {_COMPILED[row.shapes]}{row.metric.removeprefix('compile time')}",
        _variant,
        _both,
    ),
}


def targets(folder: Path = RESULTS) -> str:
    """Return a markdown table of what was to be reached and what was measured."""
    cells = []
    for target in TARGETS:
        measured = target.measured(folder)
        shown = "not measured" if measured is None else f"{measured:.3g}"
        met = "" if measured is None else "yes" if measured <= target.bound else "**no**"
        cells.append([target.what, f"{target.bound:g}", shown, met])
    return markdown(["what", "at most", "measured", "reached"], cells)


def render(name: str, folder: Path = RESULTS) -> str:
    """Return the table `name`."""
    if name != "targets" and name not in TABLES:
        raise KeyError(f"a bench block must be one of {', '.join([*TABLES, 'targets'])}, got {name}")
    return targets(folder) if name == "targets" else TABLES[name].render(folder)


def rewrite(text: str, folder: Path = RESULTS) -> str:
    """Return `text` with the table of every marked block renewed."""

    def block(match: re.Match[str]) -> str:
        return f"{match[1]}\n{render(match[2], folder)}\n{match[3]}"

    return re.sub(r"(<!-- bench:([\w-]+) -->).*?(<!-- /bench:\2 -->)", block, text, flags=re.DOTALL)


def main(write: Annotated[bool, typer.Option(help="Rewrite the blocks of the pages.")] = False) -> None:
    """Print every table, or write the marked ones into README.md and docs."""
    if write:
        for page in PAGES:
            page.write_text(rewrite(page.read_text()))
        return
    for name in (*TABLES, "targets"):
        print(f"\n## {name}\n\n{render(name)}")


if __name__ == "__main__":
    typer.run(main)
