"""Variance of wta-systematic over that of wta-crs with the same weights, on four kinds of synthetic rows.

    python -m bench.synthetic_variance

The variances of crs, wta-crs and rmm (random combinations of rows) are exact, that of wta-systematic is a
mean over draws with its standard error.
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import Annotated

import torch
import typer
from torch import Tensor

from bench.harness import Row, circumstances, record
from bench.variance import exact_variance, gram, projection_variance, squared_errors
from wtacrs_passes.maths.estimators import PROJECTIONS

FEATURES = 64
PADDED = 0.5  # share of the rows

Generator = torch.Generator


def flat(rows: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Draw x and dy as independent Gaussians: weights differ little."""
    x, dy = torch.randn(2, rows, FEATURES, dtype=torch.float64, generator=generator)
    return x, dy


def log_normal(rows: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Scale the rows of dy by exp(N(0, 1)): a few rows carry much of the gradient."""
    x, dy = flat(rows, generator)
    return x, dy * torch.randn(rows, 1, dtype=torch.float64, generator=generator).exp()


def padded(rows: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Give half of the rows no gradient, as padding tokens have none."""
    x, dy = flat(rows, generator)
    dy[: int(PADDED * rows)] = 0.0
    return x, dy


def coherent(rows: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Add one direction, as long as the rest of a row, to all x and one to all dy: gradients agree."""
    x, dy = flat(rows, generator)
    return x + flat(1, generator)[0], dy + flat(1, generator)[1]


CASES: dict[str, Callable[[int, Generator], tuple[Tensor, Tensor]]] = {
    "flat": flat,
    "log-normal": log_normal,
    "padded": padded,
    "coherent": coherent,
}


def measure(case: str, rows: int, ratio: float, draws: int, seed: int) -> list[Row]:
    """Return the variances of `crs` and `wta-systematic` over that of `wta-crs`, with a standard error."""
    generator = torch.Generator().manual_seed(seed)
    x, dy = CASES[case](rows, generator)
    weights, products, kept = x.norm(dim=-1) * dy.norm(dim=-1), gram(x, dy), int(ratio * rows)
    reference = exact_variance(products, weights, kept, "wta-crs")
    errors = squared_errors(products, weights, kept, "wta-systematic", draws, generator)
    figures = {
        ("crs", "variance / wta-crs"): exact_variance(products, weights, kept, "crs") / reference,
        ("wta-systematic", "variance / wta-crs"): float(errors.mean()) / reference,
        ("wta-systematic", "standard error"): float(errors.std()) / sqrt(draws) / reference,
    }
    both = torch.stack([x.norm(dim=-1), dy.norm(dim=-1)])
    for estimator in PROJECTIONS:
        variance = projection_variance(products, both, kept, estimator)
        figures[estimator, "variance / wta-crs"] = variance / reference
    shapes = f"rows={rows} features={FEATURES} ratio={ratio}"
    return [
        Row(
            "synthetic_variance",
            case,
            variant,
            metric,
            value,
            "1",
            rounds=draws,
            shapes=shapes,
            dtype="float64",
            seed=seed,
            **circumstances(),
        )
        for (variant, metric), value in figures.items()
    ]


def main(
    rows: int = 1024,
    ratio: float = 0.3,
    draws: int = 4000,
    seed: int = 0,
    quick: Annotated[bool, typer.Option(help="64 rows and 100 draws; keep no rows of evidence.")] = False,
) -> None:
    """Measure all cases; append rows to bench/results."""
    for case in CASES:
        found = measure(case, 64, ratio, 100, seed) if quick else measure(case, rows, ratio, draws, seed)
        record(found, keep=not quick)


if __name__ == "__main__":
    typer.run(main)
