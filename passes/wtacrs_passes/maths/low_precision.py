"""Products ``A^T B`` over rows in fewer bits than their operands have: all rows, little noise.

============  ====================================  =================================================================
product       operands                              error of an element of the result, beside that of sums in float32
============  ====================================  =================================================================
``bfloat16``  rounded to the nearest                at most 2^-7 of ``sum_i |a_i b_i|``, and its own rounding
``int8``      one scale a column, its largest       to the nearest at most ``sum_i (|a_i| t + |b_i| s) / 2 + s t / 4``
              magnitude / 127                       for scales s and t; at random unbiased, four times that
``float8``    e4m3, one scale a column, its         to the nearest at most 2^-3 of ``sum_i |a_i b_i|`` and its own
              largest magnitude / 448               rounding, for elements above 2^-14 of their column's largest; at
                                                    random unbiased apart from its own rounding, three times that
============  ====================================  =================================================================

A scale of a column leaves the sum over the rows; that of a row would not. Rounded at random,
``x -> s floor(x / s + u)`` with u uniform in [0, 1) and s the distance between neighbours, the errors of both operands
have mean zero and do not depend on each other, so the product is unbiased. The random numbers of an operand are
``frac(r_i + c_j)``: any two are independent, so variances add up.

A column with NaN or Inf makes NaN of its row or column of the result, so that neither is hidden; one of zeros, zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial, reduce
from typing import Any

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
_PRODUCT, _FEWEST = 2**20, 512
"""Elements of a product that are computed at once on a CPU, as many as a cache holds, but no fewer columns of `a`."""

Rounded = tuple[Tensor, Tensor]
"""Codes [rows, columns] and scales, float32 [columns]."""


def multiply(
    a: Tensor,
    b: Tensor,
    draws: Sequence[Tensor | None],
    product: str,
    compiled: bool = False,
) -> Tensor:
    """Return ``a^T b``, [m, n], in the dtype of `a`.

    Args:
        a, b: [rows, m] and [rows, n], float.
        draws: for `a`, then for `b`, what :func:`round_columns` takes.
        product: ``bfloat16``, ``int8`` or ``float8``.
        compiled: see :func:`round_columns`.
    """
    if product == "bfloat16":
        return torch.mm(a.to(torch.bfloat16).T, b.to(torch.bfloat16)).to(a.dtype)
    left = round_columns(a, draws[0], draws[1], product, compiled)
    right = round_columns(b, draws[2], draws[3], product, compiled)
    return multiply_codes(*left, *right, a.dtype, compiled)


def round_columns(
    x: Tensor, of_rows: Tensor | None, of_columns: Tensor | None, product: str, compiled: bool = False
) -> Rounded:
    """Round each column in steps of its scale.

    Args:
        x: [rows, columns], float.
        of_rows, of_columns: [rows] and [columns], independent and uniform in [0, 1), to round at random, by the
            fraction of their sum; to the nearest without them.
        product: ``int8`` or ``float8``.
        compiled: this function is compiled by Inductor when it is called first.

    Returns:
        codes: int8 or float8, [rows, columns]; scales: float32, [columns].
    """
    if compiled:
        rounded: Rounded = _run_compiled(round_columns, x, of_rows, of_columns, product)
        return rounded
    largest = _LARGEST[product]
    peaks = x.abs().amax(0).float()
    steps = in_steps(x.float(), peaks, largest)
    draws = None if of_rows is None or of_columns is None else (of_rows.unsqueeze(-1) + of_columns).frac()
    if product == "float8":
        return _to_float8(steps, draws).clamp(-largest, largest).to(torch.float8_e4m3fn), peaks / largest
    return to_whole(steps, draws).clamp(-largest, largest).to(torch.int8), peaks / largest


def _to_float8(x: Tensor, draws: Tensor | None) -> Tensor:
    """Return float32 numbers rounded at random to those of e4m3; as they are without random numbers.

    With an exponent e of at least -6, numbers of three bits behind the first are 2^(e - 3) apart.
    """
    if draws is None:
        return x
    exponent = x.abs().clamp(min=2**-6).view(torch.int32) >> 23  # and 127
    step = ((exponent - 3) << 23).view(torch.float32)
    return to_whole(x / step, draws) * step


def round_whole(x: Tensor, of_rows: Tensor, of_columns: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix at random in steps of one scale, so that its codes serve products over rows and over columns.

    The variance of an element is at most the scale times its magnitude. With NaN or Inf in it, all products have NaN.

    Args:
        x: [rows, columns], float.
        of_rows, of_columns: [rows] and [columns], as of :func:`round_columns`.

    Returns:
        codes: int8, [rows, columns]; scale: float32, a scalar.
    """
    peak = x.abs().amax().float()
    largest = _LARGEST["int8"]
    steps = to_whole(in_steps(x.float(), peak, largest), (of_rows.unsqueeze(-1) + of_columns).frac())
    return steps.clamp(-largest, largest).to(torch.int8), peak / largest


def multiply_rows(codes: Tensor, scale: Tensor, weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the rows of codes of :func:`round_whole` times a matrix: [rows, n].

    Args:
        codes: [rows, m]; weight, scales: of :func:`round_columns`: [m, n], [n]; m is at most :data:`MOST_ROWS`.
    """
    return (torch._int_mm(codes, weight).float() * (scale * scales)).to(dtype)


def _run_compiled(function: Callable[..., Any], *operands: Any) -> Any:
    """Call a function as Inductor compiles it, once whether operands require grad or not."""
    with torch._C._AutoDispatchBelowAutograd(), torch.no_grad(), _config.patch(recompile_limit=_VARIANTS):
        return _compiled(function)(*operands)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


def round_columns_fake(
    x: Tensor, of_rows: Tensor | None, of_columns: Tensor | None, product: str, compiled: bool = False
) -> Rounded:
    """Return empty tensors like those of :func:`round_columns`."""
    dtype = torch.int8 if product == "int8" else torch.float8_e4m3fn
    return torch.empty_like(x, dtype=dtype), x.new_empty(x.shape[1:], dtype=torch.float32)


def multiply_codes(
    a: Tensor, s: Tensor, b: Tensor, t: Tensor, dtype: torch.dtype, compiled: bool = False
) -> Tensor:
    """Return the product ``a^T b`` of what :func:`round_columns` returned for two operands: [m, n] of `dtype`.

    Args:
        compiled: on a CPU the scaling of its sums is compiled by Inductor when it is called first.
    """
    if a.dtype == torch.float8_e4m3fn:
        left, right = columns_first(a).T, columns_first(b)
        product = torch._scaled_mm(left, right, s.unsqueeze(-1), t.unsqueeze(0), out_dtype=torch.bfloat16)
        return product.to(dtype)
    if a.device.type != "cpu":
        a, b = columns_first(_whole_eights(a)), columns_first(_whole_eights(b))
        sums = [
            torch._int_mm(left.T, right).float() for left, right in zip(_split(a), _split(b), strict=True)
        ]
        return (reduce(torch.add, sums) * s.unsqueeze(-1) * t).to(dtype)
    result = torch.empty((len(s), len(t)), dtype=dtype)
    multiply_into(result, a, s, b, t, adds=False, compiled=compiled)
    return result


def multiply_into(
    result: Tensor, a: Tensor, s: Tensor, b: Tensor, t: Tensor, adds: bool, compiled: bool = False
) -> None:
    """Write what :func:`multiply_codes` returns, or add it, on a CPU in few bytes beside the result.

    Args:
        result: [m, n], float; float32 where it adds.
    """
    if a.device.type != "cpu" or a.dtype != torch.int8:
        product = multiply_codes(a, s, b, t, result.dtype)
        (Tensor.add_ if adds else Tensor.copy_)(result, product)
        return
    write = partial(_run_compiled, _write_scaled) if compiled else _write_scaled
    blocks = max(1, -(-len(s) // columns_at_once(len(t))))
    columns = -(-len(s) // blocks)
    for start in range(0, len(s), columns):
        block = slice(start, start + columns)
        sums = [
            torch._int_mm(left.T, right) for left, right in zip(_split(a[:, block]), _split(b), strict=True)
        ]
        total = sums[0] if len(sums) == 1 else reduce(torch.add, [each.float() for each in sums])
        write(result[block], total, s[block], t, adds)


def _write_scaled(result: Tensor, sums: Tensor, s: Tensor, t: Tensor, adds: bool) -> None:
    product = sums.float() * t * s.unsqueeze(-1)
    if adds:
        result.add_(product)
    else:
        result.copy_(product)


def columns_at_once(n: Any) -> Any:
    """Return how many columns of `a` are multiplied with `n` of `b` at once on a CPU."""
    return max(_FEWEST, _PRODUCT // max(n, 1))


def multiply_codes_fake(
    a: Tensor, s: Tensor, b: Tensor, t: Tensor, dtype: torch.dtype, compiled: bool = False
) -> Tensor:
    """Return an empty tensor like that of :func:`multiply_codes`."""
    return a.new_empty((a.shape[1], b.shape[1]), dtype=dtype)


def _whole_eights(codes: Tensor) -> Tensor:
    """Return codes with rows of zeros behind them, so that their number is one that libraries for GPUs multiply."""
    return torch.nn.functional.pad(codes, (0, 0, 0, -codes.shape[0] % 8))


def columns_first(x: Tensor) -> Tensor:
    """Return a matrix whose columns are contiguous, as libraries for GPUs want both operands."""
    return x.T.contiguous().T


def _split(codes: Tensor) -> tuple[Tensor, ...]:
    """Return blocks of rows whose products can be summed; one where their number is symbolic."""
    if not isinstance(codes.shape[0], int) or codes.shape[0] <= MOST_ROWS:
        return (codes,)
    return torch.split(codes, MOST_ROWS)
