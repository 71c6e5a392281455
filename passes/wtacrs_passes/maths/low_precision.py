"""Products ``A^T B`` over rows in fewer bits than their operands have: all rows, little noise.

============  ====================================  =================================================================
product       operands                              error of an element of the result, beside that of sums in float32
============  ====================================  =================================================================
``bfloat16``  rounded to the nearest                at most 2^-7 of ``sum_i |a_i b_i|``, and its own rounding
``int8``      one scale a column, its largest       to the nearest at most ``sum_i (|a_i| t + |b_i| s) / 2 + s t / 4``
              magnitude / 127                       for scales s and t; at random unbiased, four times that
``float8``    e4m3, one scale a column, its         at most 2^-3 of ``sum_i |a_i b_i|`` and its own rounding, for
              largest magnitude / 448               elements above 2^-14 of their column's largest
============  ====================================  =================================================================

A scale of a column leaves the sum over the rows; that of a row would not. Rounded at random,
``x -> s floor(x / s + u)`` with u uniform in [0, 1), the errors of both operands have mean zero and do not depend on
each other, so the product is unbiased. The random numbers of an operand are ``frac(r_i + c_j)``: any two are
independent, so variances add up.

A column with NaN or Inf makes NaN of its row or column of the result, so that neither is hidden; one of zeros, zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial, reduce

import torch
import torch._dynamo.config as _config
from torch import Tensor

from .encodings import in_steps, to_whole

_VARIANTS = 64
"""Of the compiled rounding, by dtype, precision and layout: above what PyTorch keeps of a function by default."""
MOST_ROWS = 2**17
"""Rows whose products of 8 bits fit into a sum of 32 bits: 2^17 * 127^2 < 2^31."""
_LARGEST = {"int8": 127.0, "float8": 448.0}
"""The largest magnitude of a code."""
COLUMNS = 256
"""Columns of a factor that are rounded and multiplied at once on a CPU, so that no code of the others is held."""

Draw = tuple[Tensor, Tensor]
"""Uniform random numbers of rows and of columns, see above."""


def multiply(
    a: Tensor,
    b: Tensor,
    of_rows: Tensor | None,
    of_columns: Tensor | None,
    product: str,
    compiled: bool = False,
) -> Tensor:
    """Return ``a^T b``, [m, n], in the dtype of `a`.

    Args:
        a, b: [rows, m] and [rows, n], float.
        of_rows, of_columns: [2, rows] and [m + n], independent and uniform in [0, 1), to round ``int8`` at random; to
            the nearest without them.
        product: ``bfloat16``, ``int8`` or ``float8``.
        compiled: the rounding is compiled by Inductor when it is called first.
    """
    m = a.shape[1]
    multiplied = by_columns(a, b, of_rows, of_columns, product, compiled)
    if a.device.type != "cpu" or m <= COLUMNS:
        return multiplied(0, m).to(a.dtype)
    result = a.new_empty((m, b.shape[1]))
    for start in range(0, m, COLUMNS):
        stop = min(start + COLUMNS, m)
        result[start:stop] = multiplied(start, stop)
    return result


def by_columns(
    a: Tensor, b: Tensor, of_rows: Tensor | None, of_columns: Tensor | None, product: str, compiled: bool
) -> Callable[[int, int], Tensor]:
    """Return a function that multiplies columns of `a` with `b`: ``(start, stop) -> a[:, start:stop]^T b``, float32.

    Args:
        a, b, of_rows, of_columns, product, compiled: as of :func:`multiply`. `b` is rounded at once, `a` when
            it is multiplied.
    """
    if product == "bfloat16":
        right = b.to(torch.bfloat16)
        return lambda start, stop: torch.mm(a[:, start:stop].to(torch.bfloat16).T, right).float()
    rows = [_split(x, MOST_ROWS) for x in (a, b)]
    draws: tuple[list[Draw | None], list[Draw | None]] = [None] * len(rows[0]), [None] * len(rows[0])
    if of_rows is not None and of_columns is not None:
        m = a.shape[1]
        draws = (
            [(part, of_columns[:m]) for part in _split(of_rows[0], MOST_ROWS)],
            [(part, of_columns[m:]) for part in _split(of_rows[1], MOST_ROWS)],
        )
    rounding = _rounding(product, compiled)
    rounded = [rounding(x, draw) for x, draw in zip(rows[1], draws[1], strict=True)]

    def multiplied(start: int, stop: int) -> Tensor:
        parts = []
        for x, draw, right in zip(rows[0], draws[0], rounded, strict=True):
            draw = None if draw is None else (draw[0], draw[1][start:stop])
            parts.append(multiply_codes(*rounding(x[:, start:stop], draw), *right))
        return reduce(torch.add, parts)

    return multiplied


def round_columns(x: Tensor, draw: Draw | None, product: str) -> tuple[Tensor, Tensor]:
    """Round each column in steps of its scale.

    Args:
        x: [rows, columns], float; draw: [rows] and [columns], or None to round to the nearest.
        product: ``int8`` or ``float8``, which rounds to the nearest whatever the draw.

    Returns:
        codes: int8 or float8, [rows, columns]; scales: float32, [columns].
    """
    largest = _LARGEST[product]
    peaks = x.abs().amax(0).float()
    steps = in_steps(x.float(), peaks, largest)
    if product == "float8":
        return steps.clamp(-largest, largest).to(torch.float8_e4m3fn), peaks / largest
    draws = None if draw is None else (draw[0].unsqueeze(-1) + draw[1]).frac()
    return to_whole(steps, draws).clamp(-largest, largest).to(torch.int8), peaks / largest


Rounding = Callable[[Tensor, Draw | None], tuple[Tensor, Tensor]]


def _rounding(product: str, compiled: bool) -> Rounding:
    """Return :func:`round_columns` for a precision."""
    if not compiled:
        return partial(round_columns, product=product)

    def rounding(x: Tensor, draw: Draw | None) -> tuple[Tensor, Tensor]:
        # One function whether the operands require grad or not.
        with torch._C._AutoDispatchBelowAutograd(), torch.no_grad(), _config.patch(recompile_limit=_VARIANTS):
            return _compiled()(x, draw, product)

    return rounding


@cache
def _compiled() -> Callable[[Tensor, Draw | None, str], tuple[Tensor, Tensor]]:
    function: Callable[[Tensor, Draw | None, str], tuple[Tensor, Tensor]] = torch.compile(
        round_columns, dynamic=True
    )
    return function


def multiply_codes(a: Tensor, s: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Return the product ``a^T b`` of what :func:`round_columns` returned for two operands: float32 [m, n]."""
    if a.dtype == torch.float8_e4m3fn:
        left, right = _columns_first(a).T, _columns_first(b)
        product = torch._scaled_mm(left, right, s.unsqueeze(-1), t.unsqueeze(0), out_dtype=torch.bfloat16)
        return product.float()
    if a.device.type != "cpu":
        a, b = _columns_first(_whole_eights(a)), _columns_first(_whole_eights(b))
    return torch._int_mm(a.T, b).float() * s.unsqueeze(-1) * t


def _whole_eights(codes: Tensor) -> Tensor:
    """Return codes with rows of zeros behind them, so that their number is one that libraries for GPUs multiply."""
    return torch.nn.functional.pad(codes, (0, 0, 0, -codes.shape[0] % 8))


def _columns_first(x: Tensor) -> Tensor:
    """Return a matrix whose columns are contiguous, as libraries for GPUs want both operands."""
    return x.T.contiguous().T


def _split(x: Tensor, rows: int) -> tuple[Tensor, ...]:
    """Return blocks of rows; one where their number is symbolic."""
    if not isinstance(x.shape[0], int) or x.shape[0] <= rows:
        return (x,)
    return torch.split(x, rows)
