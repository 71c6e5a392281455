"""Time and error of one weight-gradient product by each way to compute it.

    python -m bench.products
    python -m bench.products --device cuda
    python -m bench.products --quick              # tiny sizes: does it run? keeps no rows

Factors are normal random numbers, whose rows all matter alike. The ratio of a time is to the exact product in the same
precision; an error is ``||dW_est - dW||^2 / ||dW||^2``. Rows are drawn, gathered, rounded and multiplied as a compiled
step does on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated

import torch
import typer
from torch import Tensor

from bench.encodings import PRECISIONS
from bench.harness import Row, circumstances, record, summarise
from wtacrs_fx.tools import measure
from wtacrs_fx.tools.steps import interleave
from wtacrs_passes.maths import estimators
from wtacrs_passes.maths.low_precision import multiply

SHAPES = ((2048, 768, 3072), (4096, 576, 1536), (4096, 2048, 8192))
TINY = ((64, 32, 48),)
EXACT = "exact"

Product = Callable[[Tensor, Tensor], Tensor]


def exact(a: Tensor, b: Tensor) -> Tensor:
    return a.T @ b


def rounded(a: Tensor, b: Tensor, precision: str, at_random: bool) -> Tensor:
    """Multiply all rows in fewer bits."""
    draws = [torch.rand(size, device=a.device) if at_random else None for x in (a, b) for size in x.shape]
    return multiply(a, b, draws, precision, compiled=True)


def sampled(a: Tensor, b: Tensor, ratio: float, then: Product) -> Tensor:
    """Draw rows by exact norms, rescale them and multiply."""
    norms = [torch.ops.wtacrs.row_norms([x]) for x in (a, b)]
    noise = torch.rand(estimators.NOISE, device=a.device)
    indices, scales = torch.ops.wtacrs.choose_rows(norms, noise, round(ratio * len(a)), "wta-systematic")
    gather = torch.ops.wtacrs.gather_rows
    return then(gather(a, indices), gather(b, indices, scales))


int8 = partial(rounded, precision="int8", at_random=True)
WAYS: dict[str, Product] = {
    EXACT: exact,
    "bfloat16": partial(rounded, precision="bfloat16", at_random=False),
    "int8, nearest": partial(rounded, precision="int8", at_random=False),
    "int8": int8,
    "rows 0.3": partial(sampled, ratio=0.3, then=exact),
    "rows 0.5, int8": partial(sampled, ratio=0.5, then=int8),
}


def rows(shape: tuple[int, int, int], precision: str, device: str, rounds: int) -> list[Row]:
    """Return time and error of every way."""
    count, m, n = shape
    generator = torch.Generator().manual_seed(0)
    a, b = (
        torch.randn(count, size, generator=generator).to(device, PRECISIONS[precision]) for size in (m, n)
    )
    wanted = a.double().T @ b.double()
    seconds = interleave(
        {name: partial(measure.step_seconds, partial(way, a, b), a.device) for name, way in WAYS.items()},
        rounds,
    )
    found = []
    for name, way in WAYS.items():
        error = float((way(a, b).double() - wanted).square().sum() / wanted.square().sum())
        common = {"shapes": "x".join(map(str, shape)), "dtype": precision, **circumstances(device)}
        times = summarise(seconds[name], seconds[EXACT])
        found.append(Row("products", "one product", name, "time", unit="s", **times, **common))
        found.append(Row("products", "one product", name, "error", error, "", **common))
    return found


def main(
    device: str = "cpu",
    rounds: int = 15,
    quick: Annotated[bool, typer.Option(help="Tiny sizes; keep no rows.")] = False,
) -> None:
    """Measure every way; append rows to bench/results."""
    for precision in PRECISIONS:
        for shape in TINY if quick else SHAPES:
            record(rows(shape, precision, device, 2 if quick else rounds), keep=not quick)


if __name__ == "__main__":
    typer.run(main)
