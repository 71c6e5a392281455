"""The custom operations of the rewritten graph, each with a fake kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from . import estimators

_LIBRARY = torch.library.Library("wtacrs", "DEF")  # type: ignore[no-untyped-call]
for _schema in (
    "choose_rows(Tensor[] norms, Tensor noise, SymInt kept, str estimator) -> (Tensor, Tensor)",
    "row_norms(Tensor[] operands) -> Tensor",
    "gather_rows(Tensor x, Tensor indices, Tensor? scales=None) -> Tensor",
):
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]

# Squares of smaller norms lose precision in float32, of larger ones overflow; the maximum stands in.
SMALLEST_SQUARE, LARGEST_SQUARE = 1e-30, 1e38


def _choose_rows(norms: list[Tensor], noise: Tensor, kept: int, estimator: str) -> tuple[Tensor, Tensor]:
    weights = norms[0].double()
    for factor in norms[1:]:
        weights = weights * factor.double()
    return estimators.choose_rows(weights, noise, kept, estimator)


def _choose_rows_fake(norms: list[Tensor], noise: Tensor, kept: int, estimator: str) -> tuple[Tensor, Tensor]:
    shape = (*norms[0].shape[:-1], kept)
    return (
        norms[0].new_empty(shape, dtype=torch.int64),
        norms[0].new_empty(shape, dtype=torch.float32),
    )


def _row_norms(operands: list[Tensor]) -> Tensor:
    dtypes = [torch.promote_types(x.dtype, torch.float32) for x in operands]
    pairs = list(zip(operands, dtypes, strict=True))
    norms = [torch.linalg.vector_norm(x, dim=-1, dtype=dtype) for x, dtype in pairs]
    norm = norms[0] if len(norms) == 1 else torch.stack(norms).square().sum(0).sqrt()
    unsafe = (norm < SMALLEST_SQUARE**0.5) | (norm > LARGEST_SQUARE**0.5)
    if norm.device.type != "cpu" or bool(unsafe.any()):
        peaks = [torch.linalg.vector_norm(x, torch.inf, dim=-1, dtype=dtype) for x, dtype in pairs]
        norm = torch.where(unsafe, torch.stack(peaks).amax(0), norm)
    return norm


def _row_norms_fake(operands: list[Tensor]) -> Tensor:
    x = operands[0]
    return x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))


def _gather_rows(x: Tensor, indices: Tensor, scales: Tensor | None = None) -> Tensor:
    if x.dim() == 2:
        rows = x.index_select(0, indices)
    else:
        rows = x.gather(-2, indices.unsqueeze(-1).expand(*indices.shape, x.shape[-1]))
    return rows if scales is None else (rows * scales.unsqueeze(-1)).to(x.dtype)


def _gather_rows_fake(x: Tensor, indices: Tensor, scales: Tensor | None = None) -> Tensor:
    return x.new_empty((*indices.shape, x.shape[-1]))


for _name, _kernel, _fake in (
    ("choose_rows", _choose_rows, _choose_rows_fake),
    ("row_norms", _row_norms, _row_norms_fake),
    ("gather_rows", _gather_rows, _gather_rows_fake),
):
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"wtacrs::{_name}", _fake, lib=_LIBRARY)

choose_rows = torch.ops.wtacrs.choose_rows.default
"""``(norms, noise, kept, estimator) -> (indices, scales)``, as :func:`estimators.choose_rows`.

The weights are the product of `norms`, in float64: a product of small norms is no zero.
"""
row_norms = torch.ops.wtacrs.row_norms.default
"""``operands -> norms``: the joint Euclidean norms of the rows of tensors ``[..., rows, features]``.

``[..., rows]``, float32 (float64 for float64). Where the square leaves the range of float32 the largest
element stands in: a norm is zero only where every element is zero.
"""

gather_rows = torch.ops.wtacrs.gather_rows.default
"""``(x [..., rows, features], indices [..., kept], scales [..., kept] or None) -> [..., kept, features]``."""
