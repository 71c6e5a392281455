"""Compute what treats each row by itself for a few rows at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import estimators, low_precision

Body = Callable[..., Sequence[Tensor]]

_PRODUCT = 2**18
"""Elements of a product that are computed at once before they are added to a sum on a CPU: what a cache holds."""
_ROUNDED_PRODUCT = 2**21
"""The same where factors are rounded first, which takes a call for each."""


def in_chunks(
    body: str,
    kinds: list[str],
    rowwise: list[Tensor],
    shared: list[Tensor],
    chunk: int,
    noise: Tensor | None,
    share: list[int],
    estimator: str,
    center: bool,
    product: str,
    draws: list[Tensor],
    compiled: bool,
) -> list[Tensor]:
    """Return the results of a function for all rows, computed for `chunk` rows at a time.

    Args:
        body: source of a function ``body(rows, *rowwise, *shared)`` of so many rows, which returns for each
            of `kinds` what follows.
        kinds: ``rows``: a tensor ``[rows, ...]``, put together; ``sum``: a tensor, summed over the chunks;
            ``product``: two matrices ``a [rows, m], b [rows, n]``, for the sum of ``a^T b``; ``sampled``: the
            same and ``||a_i|| [rows]``, for an estimate of it from rows drawn in each chunk by ``||a_i|| ||b_i||``;
            ``codes``: `a` as `low_precision.round_whole` returns it, and `b`, for the same sum in 8 bits.
        rowwise: tensors ``[N, ...]``, given to `body` by chunks.
        shared: tensors that are given to `body` whole.
        noise: random numbers ``[chunks, NOISE]`` where rows are sampled.
        share: n, d, k: of N rows ``max(k, ceil(N n / d))`` are sampled.
        estimator: a key of `estimators.CHOOSERS` or `estimators.PROJECTIONS`.
        center: the mean row of b in a chunk is subtracted and its product added.
        product: the precision of the products, see `low_precision.multiply`; ``exact`` for that of their factors.
        draws: its random numbers: [2, rows] for no fewer rows than are multiplied, [m + n]; empty to round to the
            nearest.
        compiled: `body` is compiled by Inductor when it is called first.

    Sums of floating-point numbers are in float32 at least, and left so: who reads them rounds them.
    """
    function = compiled_function_of(body) if compiled else function_of(body)
    total = rowwise[0].shape[0]
    sampling = _Sampling(noise, share, estimator, center)
    rounding = _Rounding(product, compiled, *draws)
    parts = [_PARTS[kind](total, chunk, sampling, rounding) for kind in kinds]
    for start in range(0, max(total, 1), chunk):
        stop = min(start + chunk, total)
        with (
            torch._C._AutoDispatchBelowAutograd()
        ):  # one compiled function whether inputs require grad or not
            values = iter(function(stop - start, *(x[start:stop] for x in rowwise), *shared))
        for part in parts:
            part.add(start, values)
        del values
        for part in parts:
            part.multiply()
    return [part.result() for part in parts]


@cache
def function_of(source: str) -> Body:
    """Return the function that the source of a graph defines."""
    names: dict[str, Any] = {"torch": torch, "device": torch.device, "inf": torch.inf, "nan": torch.nan}
    exec(source, names)  # written by `rewrite.chunk_losses`, from operations of a graph
    body: Body = names["body"]
    return body


@cache
def compiled_function_of(source: str) -> Body:
    """Return the same, compiled."""
    compiled: Body = torch.compile(function_of(source), fullgraph=True)
    return compiled


@dataclasses.dataclass(frozen=True)
class _Sampling:
    """How rows of a chunk are sampled, see :func:`in_chunks`."""

    noise: Tensor | None
    share: Sequence[int]
    estimator: str
    center: bool

    def __call__(self, number: int, a: Tensor, b: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
        """Return few rows of the two factors of chunk `number`, whose product is that of all in the mean.

        Args:
            norms: of the rows of `a`.
        """
        assert self.noise is not None
        numerator, denominator, fewest = self.share
        rows = a.shape[0]
        kept = max(fewest, -(-rows * numerator // denominator))
        if kept >= rows:
            return a, b
        noise = self.noise[number]
        center = (
            b.mean(0, keepdim=True, dtype=torch.promote_types(b.dtype, torch.float32))
            if self.center
            else None
        )
        if self.estimator in estimators.PROJECTIONS:
            seed = (noise[:2] * 2**24).to(torch.int64)
            rest = b if center is None else (b - center).to(b.dtype)
            few = [estimators.combine_rows(x, seed, kept, self.estimator) for x in (a, rest)]
        else:
            weights = [torch.ops.wtacrs.row_norms([b], center), norms]
            indices, scales = torch.ops.wtacrs.choose_rows(weights, noise, kept, self.estimator)
            few = [a.index_select(0, indices), torch.ops.wtacrs.gather_rows(b, indices, scales, center)]
        if center is not None:
            few = [torch.cat([few[0], a.sum(0, keepdim=True)]), torch.cat([few[1], center.to(b.dtype)])]
        return few[0], few[1]


@dataclasses.dataclass(frozen=True)
class _Rounding:
    """In which precision factors are multiplied, and with which random numbers, see :func:`in_chunks`."""

    product: str
    compiled: bool
    of_rows: Tensor | None = None
    of_columns: Tensor | None = None

    def __call__(self, a: Tensor, b: Tensor, first: int) -> Callable[[Tensor, int, bool], None]:
        """Return a function that multiplies columns of `a` with `b`: ``(result, start, adds)``.

        It writes ``a[:, start:stop]^T b`` into `result`, as many columns as that has rows, or adds it there.

        Args:
            first: rows that were multiplied before.
        """
        product, compiled = self.product, self.compiled
        if product in ("exact", "bfloat16"):

            def multiplied(result: Tensor, start: int, adds: bool) -> None:
                columns = a[:, start : start + len(result)]
                value = (
                    columns.T @ b if product == "exact" else low_precision.multiply(columns, b, (), product)
                )
                (Tensor.add_ if adds else Tensor.copy_)(result, value)

            return multiplied
        m = a.shape[1]
        of_rows = None if self.of_rows is None else self.of_rows[0, first : first + a.shape[0]]
        right = self.of_right(b, first, m)

        def multiplied_codes(result: Tensor, start: int, adds: bool) -> None:
            columns = slice(start, start + len(result))
            of_columns = None if self.of_columns is None else self.of_columns[:m][columns]
            left = low_precision.round_columns(a[:, columns], of_rows, of_columns, product, compiled)
            low_precision.multiply_into(result, *left, *right, adds, compiled)

        return multiplied_codes

    def of_right(self, b: Tensor, first: int, m: int) -> low_precision.Rounded:
        """Return the codes of a right factor, whose left one has `m` columns; `first` as above."""
        draws: tuple[Tensor | None, Tensor | None] = None, None
        if self.of_rows is not None and self.of_columns is not None:
            draws = self.of_rows[1, first : first + b.shape[0]], self.of_columns[m:]
        return low_precision.round_columns(b, *draws, product=self.product, compiled=self.compiled)


class _Part:
    """A result in the making."""

    def __init__(self, total: int, chunk: int, sampling: _Sampling, rounding: _Rounding) -> None:
        self.total, self.chunk, self.sampling, self.rounding = total, chunk, sampling, rounding
        self.value: Tensor | None = None

    def add(self, start: int, values: Any) -> None:
        """Take the values of the chunk that begins with row `start`."""
        raise NotImplementedError

    def multiply(self, at_last: bool = False) -> None:
        """Multiply what waits for it, if it is much: the chunk that it came from is no longer held."""

    def result(self) -> Tensor:
        """Return what all chunks come to."""
        self.multiply(at_last=True)
        assert self.value is not None
        return self.value

    def _sum_like(self, x: Tensor, shape: Sequence[int]) -> tuple[Tensor, bool]:
        """Return the sum and whether something is in it."""
        if self.value is not None:
            return self.value, True
        self.value = x.new_empty(shape, dtype=_wide(x.dtype))
        return self.value, False


class _Rows(_Part):
    def add(self, start: int, values: Any) -> None:
        x = next(values)
        if self.value is None:
            self.value = x.new_empty((self.total, *x.shape[1:]))
        self.value[start : start + x.shape[0]] = x


class _Sum(_Part):
    def add(self, start: int, values: Any) -> None:
        x = next(values)
        total, adds = self._sum_like(x, x.shape)
        (Tensor.add_ if adds else Tensor.copy_)(total, x)


class _Product(_Part):
    """A sum of products: of as many rows at once as pay for reading and writing the sum, be they of several chunks."""

    def __init__(self, total: int, chunk: int, sampling: _Sampling, rounding: _Rounding) -> None:
        super().__init__(total, chunk, sampling, rounding)
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._multiplied = 0

    def add(self, start: int, values: Any) -> None:
        self._waiting.append(self._factors(start // self.chunk, values))

    def _factors(self, number: int, values: Any) -> tuple[Tensor, Tensor]:
        return next(values), next(values)

    def multiply(self, at_last: bool = False) -> None:
        if not self._waiting:
            return
        b = self._waiting[0][1]
        enough = (b.shape[1] if b.is_cuda else self.chunk) / 2
        if sum(b.shape[0] for _, b in self._waiting) < enough and not at_last:
            return
        a, b = (torch.cat(xs) if len(xs) > 1 else xs[0] for xs in zip(*self._waiting, strict=True))
        self._waiting = []
        total, adds = self._sum_like(a, (a.shape[1], b.shape[1]))
        first, self._multiplied = self._multiplied, self._multiplied + a.shape[0]
        if a.is_cuda and self.rounding.product == "exact":
            _accumulate(total, a.T, b, adds)
            return
        elements = _PRODUCT if self.rounding.product == "exact" else _ROUNDED_PRODUCT
        block = total.shape[0] if a.is_cuda else max(1, elements // max(b.shape[1], 1))
        multiply = self.rounding(a, b, first)
        for start in range(0, total.shape[0], block):
            multiply(total[start : start + block], start, adds)


class _SampledProduct(_Product):
    def _factors(self, number: int, values: Any) -> tuple[Tensor, Tensor]:
        return self.sampling(number, next(values), next(values), next(values))


class _ProductOfCodes(_Part):
    """A sum of products whose left factors are codes already."""

    def add(self, start: int, values: Any) -> None:
        codes, scale, b = next(values), next(values), next(values)
        total, adds = self._sum_like(b, (codes.shape[1], b.shape[1]))
        right = self.rounding.of_right(b, start, codes.shape[1])
        low_precision.multiply_into(
            total, codes, scale.expand(codes.shape[1]), *right, adds, self.rounding.compiled
        )


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums of a dtype."""
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype


def _accumulate(total: Tensor, a: Tensor, b: Tensor, adds: bool) -> None:
    """Add ``a @ b`` to a sum where it lies, or write it there, in one call of CUDA's library."""
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=1 if adds else 0, out=total)
    elif adds:
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
    else:
        torch.ops.aten.mm.dtype_out(a, b, total.dtype, out=total)


_PARTS: dict[str, Callable[[int, int, _Sampling, _Rounding], _Part]] = {
    "rows": _Rows,
    "sum": _Sum,
    "product": _Product,
    "sampled": _SampledProduct,
    "codes": _ProductOfCodes,
}


VALUES = {"product": 2, "sampled": 3, "codes": 3}
"""How many values a function returns for a result, where it is not one."""


def in_chunks_fake(
    body: str, kinds: list[str], rowwise: list[Tensor], shared: list[Tensor], *_: object
) -> list[Tensor]:
    """Return empty tensors like those of :func:`in_chunks`."""
    values = iter(function_of(body)(rowwise[0].shape[0], *rowwise, *shared))
    results = []
    for kind in kinds:
        given = [next(values) for _ in range(VALUES.get(kind, 1))]
        x = given[0]
        shape: Sequence[int] = x.shape
        if kind in ("product", "sampled"):
            shape = (x.shape[1], given[1].shape[1])
        elif kind == "codes":
            x, shape = given[2], (x.shape[1], given[2].shape[1])
        results.append(x.new_empty(shape, dtype=x.dtype if kind == "rows" else _wide(x.dtype)))
    return results
