"""Products of rows in groups: the weights of experts, each with the rows that are routed to it.

The rows of a group follow each other; `offsets`, int32 [groups], are the ends of the groups, ascending. Rows behind the
last end belong to no group: they may hold anything and are not read. (Gale et al. 2022, MegaBlocks, arXiv 2211.15841,
for products of as many rows as there are.)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import low_precision


def grouped_mm(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """Return the products of each group, as ``torch.nn.functional.grouped_mm`` does in bfloat16.

    Args:
        a: [rows, m], with b: [groups, m, n]: each row is multiplied with the matrix of its group; or [m, rows], with
            b: [rows, n]: the rows of a group are summed over.

    Returns:
        [rows, n], zeros behind the last group; or [groups, m, n], zeros for an empty group.
    """
    over_rows = b.dim() == 2
    shape = (len(offsets), a.shape[0], b.shape[1]) if over_rows else (a.shape[0], b.shape[2])
    result = a.new_zeros(shape)
    for group, rows in _groups(offsets):
        if over_rows:
            torch.mm(a[:, rows], b[rows], out=result[group])
        else:
            torch.mm(a[rows], b[group], out=result[rows])
    return result


def grouped_mm_fake(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """Return an empty tensor like that of :func:`grouped_mm`."""
    if b.dim() == 2:
        return a.new_empty((offsets.shape[0], a.shape[0], b.shape[1]))
    return a.new_empty((a.shape[0], b.shape[2]))


def multiply(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """Return the products ``a^T b`` of each group, [groups, m, n], of factors in bfloat16, in the dtype of `a`."""
    product: Tensor = torch._grouped_mm(a.to(torch.bfloat16).T, b.to(torch.bfloat16), offsets)
    return product.to(a.dtype)


def in_groups(norms: Tensor, offsets: Tensor) -> Tensor:
    """Return the norms of rows, [rows], with zero for those behind the last group, so that none of them is drawn."""
    places = torch.arange(norms.shape[0], device=norms.device)
    return torch.where(places < offsets[-1], norms, 0.0)


def without_others(x: Tensor, offsets: Tensor) -> Tensor:
    """Return rows, [rows, features], with zeros for those behind the last group."""
    places = torch.arange(x.shape[0], device=x.device)
    return torch.where((places < offsets[-1]).unsqueeze(-1), x, 0.0)


def sort_rows(indices: Tensor, scales: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return drawn rows in the order of their groups.

    Args:
        indices, scales: [kept], of :func:`estimators.choose_rows`.

    Returns:
        indices, scales, and the ends of the groups among the drawn rows, like `offsets`.
    """
    indices, order = indices.sort()
    return indices, scales[order], torch.searchsorted(indices, offsets.to(indices.dtype)).to(offsets.dtype)


def sort_rows_fake(indices: Tensor, scales: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return empty tensors like those of :func:`sort_rows`."""
    return torch.empty_like(indices), torch.empty_like(scales), torch.empty_like(offsets)


def round_groups(
    x: Tensor,
    of_rows: Tensor | None,
    of_columns: Tensor | None,
    offsets: Tensor,
    product: str,
    compiled: bool,
) -> tuple[Tensor, Tensor]:
    """Round each column of each group in steps of a scale of its own.

    Args:
        x, of_rows, of_columns, product, compiled: as of :func:`low_precision.round_columns`.

    Returns:
        codes: [rows, columns], zeros behind the last group; scales: float32, [groups, columns].
    """
    codes, scales = round_groups_fake(x, of_rows, of_columns, offsets, product, compiled)
    scales.zero_()
    end = 0
    for group, rows in _groups(offsets):
        draws = None if of_rows is None else of_rows[rows]
        part, scales[group] = low_precision.round_columns(x[rows], draws, of_columns, product, compiled)
        codes[rows], end = part, rows.stop
    codes[end:] = torch.zeros((), dtype=codes.dtype, device=codes.device)
    return codes, scales


def round_groups_fake(
    x: Tensor,
    of_rows: Tensor | None,
    of_columns: Tensor | None,
    offsets: Tensor,
    product: str,
    compiled: bool,
) -> tuple[Tensor, Tensor]:
    """Return empty tensors like those of :func:`round_groups`."""
    codes, _ = low_precision.round_columns_fake(x, of_rows, of_columns, product)
    return codes, x.new_empty((offsets.shape[0], x.shape[1]), dtype=torch.float32)


def multiply_groups(
    a: Tensor, s: Tensor, b: Tensor, t: Tensor, offsets: Tensor, dtype: torch.dtype, compiled: bool
) -> Tensor:
    """Return the products ``a^T b`` of each group of what :func:`round_groups` returned for two operands.

    Returns:
        [groups, m, n] of `dtype`, zeros for an empty group.
    """
    result = torch.zeros((len(offsets), s.shape[1], t.shape[1]), dtype=dtype, device=a.device)
    for group, rows in _groups(offsets):
        factors = a[rows], s[group], b[rows], t[group]
        low_precision.multiply_into(result[group], *factors, adds=False, compiled=compiled)
    return result


def multiply_groups_fake(
    a: Tensor, s: Tensor, b: Tensor, t: Tensor, offsets: Tensor, dtype: torch.dtype, compiled: bool
) -> Tensor:
    """Return an empty tensor like that of :func:`multiply_groups`."""
    return a.new_empty((offsets.shape[0], s.shape[1], t.shape[1]), dtype=dtype)


def _groups(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """Yield the groups that have rows, with their rows."""
    start = 0
    for group, end in enumerate(offsets.tolist()):
        if end > start:
            yield group, slice(start, end)
            start = end
