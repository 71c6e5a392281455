"""Compute what treats each row by itself for a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

Body = Callable[..., Sequence[Tensor]]

_PRODUCT = 2**22
"""Elements of a product that are computed at once before they are added to a sum."""


def in_chunks(
    body: str, kinds: list[str], rowwise: list[Tensor], shared: list[Tensor], chunk: int, compiled: bool
) -> list[Tensor]:
    """Return the results of a function for all rows, computed for `chunk` rows at a time.

    Args:
        body: source of a function ``body(rows, *rowwise, *shared)`` of so many rows, which returns for each
            of `kinds` what follows.
        kinds: ``rows``: a tensor ``[rows, ...]``, put together; ``sum``: a tensor, summed over the chunks;
            ``product``: two matrices ``a [rows, m], b [rows, n]``, for the sum of ``a^T b``.
        rowwise: tensors ``[N, ...]``, given to `body` by chunks.
        shared: tensors that are given to `body` whole.
        compiled: `body` is compiled by Inductor when it is called first.

    Sums are in float32 at least, and rounded once to the dtype of what is summed.
    """
    function = compiled_function_of(body) if compiled else function_of(body)
    total = rowwise[0].shape[0]
    parts: list[_Part] = []
    for start in range(0, max(total, 1), chunk):
        stop = min(start + chunk, total)
        with torch.no_grad():
            values = iter(function(stop - start, *(x[start:stop] for x in rowwise), *shared))
        if not parts:
            parts = [_PARTS[kind](total, chunk >= total) for kind in kinds]
        for part in parts:
            part.add(start, values)
        del values
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


class _Part:
    """A result in the making; `whole` where there is one chunk."""

    def __init__(self, total: int, whole: bool) -> None:
        self.total, self.whole = total, whole
        self.value: Tensor | None = None
        self.dtype: torch.dtype | None = None

    def add(self, start: int, values: Any) -> None:
        raise NotImplementedError

    def result(self) -> Tensor:
        assert self.value is not None and self.dtype is not None
        return self.value.to(self.dtype)

    def _sum_like(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        if self.value is None:
            self.dtype = x.dtype
            self.value = x.new_zeros(shape, dtype=torch.promote_types(x.dtype, torch.float32))
        return self.value


class _Rows(_Part):
    def add(self, start: int, values: Any) -> None:
        x = next(values)
        if self.whole:
            self.value, self.dtype = x, x.dtype
            return
        if self.value is None:
            self.value, self.dtype = x.new_empty((self.total, *x.shape[1:])), x.dtype
        self.value[start : start + x.shape[0]] = x


class _Sum(_Part):
    def add(self, start: int, values: Any) -> None:
        x = next(values)
        self._sum_like(x, x.shape).add_(x)


class _Product(_Part):
    def add(self, start: int, values: Any) -> None:
        a, b = next(values), next(values)
        if self.whole:
            self.value, self.dtype = a.T @ b, a.dtype
            return
        total = self._sum_like(a, (a.shape[1], b.shape[1]))
        block = max(1, _PRODUCT // max(b.shape[1], 1))
        for columns, part in zip(a.split(block, 1), total.split(block), strict=True):
            part.add_(columns.T @ b)


_PARTS: dict[str, Callable[[int, bool], _Part]] = {"rows": _Rows, "sum": _Sum, "product": _Product}


def in_chunks_fake(
    body: str, kinds: list[str], rowwise: list[Tensor], shared: list[Tensor], chunk: int, compiled: bool
) -> list[Tensor]:
    """Return empty tensors like those of :func:`in_chunks`."""
    total = rowwise[0].shape[0]
    values = iter(function_of(body)(total, *rowwise, *shared))
    results = []
    for kind in kinds:
        x = next(values)
        shape = (x.shape[1], next(values).shape[1]) if kind == "product" else x.shape
        results.append(x.new_empty(shape))
    return results
