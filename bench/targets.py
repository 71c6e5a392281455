"""The figures that the project set out to reach, each beside the latest measurement."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from bench.gpu import CASES
from bench.harness import RESULTS, Row, read
from bench.models import Shape


@dataclass(frozen=True)
class Target:
    """An upper bound on the value of a row, or on its ratio to Inductor."""

    what: str
    benchmark: str
    model: str
    variant: str
    metric: str
    bound: float
    is_ratio: bool = False
    dtype: str = "float32"
    shapes: str | None = None  # None accepts any
    device: str = "cpu"

    def measured(self, folder: Path = RESULTS) -> float | None:
        """Return the latest figure; None if there is none."""
        found = [row for row in read(self.benchmark, folder) if self._describes(row)]
        if not found:
            return None
        figure = found[-1].ratio if self.is_ratio else found[-1].value
        return None if figure is None or math.isnan(figure) else figure

    def _describes(self, row: Row) -> bool:
        asked = (self.model, self.variant, self.metric, self.dtype, self.shapes or row.shapes, self.device)
        return asked == (row.model, row.variant, row.metric, row.dtype, row.shapes, row.device)


def _time(model: str, ratio: float, bound: float) -> Target:
    what = f"step time / Inductor, {model}, ratio {ratio}, backward"
    variant = f"wtacrs {ratio} backward"
    return Target(what, "memory_time", model, variant, "step time", bound, is_ratio=True, shapes=str(Shape()))


def _memory(model: str, placement: str, bound: float) -> Target:
    what = f"saved units a layer, bf16, {model}, ratio 0.3, {placement}"
    variant, metric = f"wtacrs 0.3 {placement}", "saved units a layer"
    return Target(what, "memory_time", model, variant, metric, bound, dtype="bfloat16", shapes=str(Shape()))


def _synthetic(case: str, bound: float) -> Target:
    what, variant, metric = f"variance / wta-crs, {case} rows", "wta-systematic", "variance / wta-crs"
    return Target(what, "synthetic_variance", case, variant, metric, bound, dtype="float64")


def _gradient(placement: str) -> Target:
    what = f"relative variance of dW, real model, ratio 0.3, {placement}"
    variant, metric = "wta-systematic 0.3", f"relative variance, {placement}"
    return Target(what, "gradient_variance", "MiniLM, step 120", variant, metric, 0.01)


def _compile(model: str, kind: str, bound: float, caches: str = "") -> Target:
    metric, variant = f"compile time{caches}", f"wtacrs 0.3 {kind}"
    what, shapes = f"{metric} / Inductor, {model}, {kind}", str(Shape())
    return Target(what, "compile_time", model, variant, metric, bound, is_ratio=True, shapes=shapes)


def _encoded(model: str, residuals: str, bound: float) -> Target:
    what, variant = f"saved units a layer, bf16, {model}, {residuals}", f"wtacrs 0.3 {residuals}"
    metric, shapes = "saved units a layer", str(Shape())
    return Target(what, "memory_time", model, variant, metric, bound, dtype="bfloat16", shapes=shapes)


def _encoded_ratio(model: str, ratio: float, metric: str, bound: float) -> Target:
    what, variant = f"{metric} / Inductor, {model}, ratio {ratio}, balanced", f"wtacrs {ratio} balanced"
    return Target(what, "memory_time", model, variant, metric, bound, is_ratio=True, shapes=str(Shape()))


def _gpu(case: str, metric: str, bound: float) -> Target:
    what, dtype = f"{metric} / Inductor, GPU, {case}", CASES[case].precision
    return Target(what, "gpu", case, "wtacrs", metric, bound, is_ratio=True, dtype=dtype, device="cuda")


def _chooser(device: str, bound: float) -> Target:
    what = f"seconds to choose among 16384 rows, {device}"
    return Target(what, "gpu", "chooser", "16384 rows", "time", bound, device=device)


DEEP = Shape(layers=12, d=512, heads=8, batch=16, seq=256)
PLACEMENTS = ("forward", "backward")
TARGETS = (
    _time("bert", 0.3, 0.88),
    _time("llama", 0.3, 0.83),
    _time("bert", 0.1, 0.80),
    _time("llama", 0.1, 0.76),
    *(_memory("bert", placement, 11.1) for placement in PLACEMENTS),
    *(_memory("llama", placement, 11.6) for placement in PLACEMENTS),
    *(_memory("gpt2", placement, 11.1) for placement in PLACEMENTS),
    _gradient("backward"),
    _gradient("backward, compiled"),
    _synthetic("flat", 0.75),
    _synthetic("log-normal", 0.75),
    _synthetic("coherent", 0.75),
    _synthetic("padded", 0.4),
    *(
        _encoded(model, "balanced", bound)
        for model, bound in (("bert", 5.0), ("llama", 5.5), ("gpt2", 5.0), ("t5", 8.0), ("vit", 5.0))
    ),
    _encoded("bert", "small", 3.5),
    _encoded("llama", "small", 4.0),
    _encoded("bert", "lossless", 10.0),
    _encoded("llama", "lossless", 11.0),
    *(
        _encoded_ratio(model, ratio, metric, bound)
        for model in ("bert", "llama")
        for ratio, metric, bound in ((0.3, "step time", 0.92), (0.1, "step time", 0.85), (0.3, "saved", 0.35))
    ),
    Target(
        "peak of a step / Inductor, 12 layers, d=512, 16x256",
        "memory_time",
        "bert",
        "wtacrs 0.3 balanced",
        "peak",
        0.5,
        is_ratio=True,
        shapes=str(DEEP),
    ),
    *(
        Target(
            f"squared error of the gradient, MiniLM, balanced, step {step}",
            "gradient_error",
            f"MiniLM, step {step}",
            "int8, int4 before functions, ratio 1",
            "relative squared error",
            0.05,
        )
        for step in (0, 60)
    ),
    *(
        Target(
            f"relative variance of dW, MiniLM on WordNet, {what}, epoch {epoch}",
            "gradient_norms",
            f"MiniLM, epoch {epoch}",
            f"{variant}, ratio 0.3",
            "relative variance",
            bound,
        )
        for epoch, what, variant, bound in (
            (1, "token mask", "||x||, token mask", 0.5),
            (2, "remembered", "remembered by token, bfloat16", 0.08),
            (3, "remembered", "remembered by token, bfloat16", 0.08),
        )
    ),
    Target(
        "step time with remembered norms / without",
        "gradient_norms",
        "MiniLM",
        "remembered",
        "step time",
        1.03,
        is_ratio=True,
    ),
    *(_compile(model, variant, 1.25) for model in ("bert", "llama") for variant in PLACEMENTS),
    *(_compile(model, "balanced", 1.2) for model in ("bert", "llama")),
    *(_compile(model, "balanced", 1.05, ", warm caches") for model in ("bert", "llama")),
    Target(
        "trainer, MiniLM: saved / Inductor",
        "trainer",
        "MiniLM, BBC news",
        "wtacrs 0.3 balanced",
        "saved",
        0.4,
        is_ratio=True,
    ),
    _chooser("cpu", 1e-3),
    _chooser("cuda", 15e-6),
    *(_gpu(case, metric, bound) for case in CASES for metric, bound in (("saved", 0.4), ("step time", 0.9))),
)
