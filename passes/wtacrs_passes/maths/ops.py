"""The custom operations of the rewritten graph, each with a fake kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial, reduce
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor

from . import attention, chunks, estimators, experts, low_precision, observer, offload

_LIBRARY = torch.library.Library("wtacrs", "DEF")  # type: ignore[no-untyped-call]
for _schema in (
    "choose_rows(Tensor[] norms, Tensor noise, SymInt kept, str estimator) -> (Tensor, Tensor)",
    "row_norms(Tensor[] operands, Tensor? center=None) -> Tensor",
    "gather_rows(Tensor x, Tensor indices, Tensor? scales=None, Tensor? center=None) -> Tensor",
    "append_row(Tensor rows, Tensor row) -> Tensor",
    "write(Tensor x) -> Tensor",
    "receive(Tensor x) -> Tensor",
    "combine_rows(Tensor x, Tensor seed, SymInt kept, str estimator) -> Tensor",
    "gradient_weights(Tensor norms, Tensor? known, Tensor? mask, float masked, SymInt positions) -> Tensor",
    "record_norms(Tensor(a!) fresh, Tensor norms, SymInt positions) -> ()",
    "require_zero(Tensor norms, Tensor mask) -> Tensor",
    "token_mask(Tensor mask) -> ()",
    "norm_state(Tensor x, Tensor known, Tensor fresh) -> ()",
    "round_columns(Tensor x, Tensor? of_rows, Tensor? of_columns, str product, Tensor? after, bool compiled) "
    "-> (Tensor, Tensor)",
    "multiply_codes(Tensor a, Tensor s, Tensor b, Tensor t, ScalarType dtype, bool compiled) -> Tensor",
    "grouped_mm(Tensor a, Tensor b, Tensor offsets) -> Tensor",
    "in_groups(Tensor norms, Tensor offsets) -> Tensor",
    "sort_rows(Tensor indices, Tensor scales, Tensor offsets) -> (Tensor, Tensor, Tensor)",
    "round_groups(Tensor x, Tensor? of_rows, Tensor? of_columns, Tensor offsets, str product, Tensor? after, "
    "bool compiled) -> (Tensor, Tensor)",
    "multiply_groups(Tensor a, Tensor s, Tensor b, Tensor t, Tensor offsets, ScalarType dtype, bool compiled) "
    "-> Tensor",
    "attention_backward(Tensor gradient, Tensor query, Tensor key, Tensor centered, Tensor value, Tensor output, "
    "Tensor logsumexp, Tensor spread, float dropout_p, bool is_causal, Tensor? attn_mask, float? scale) "
    "-> (Tensor, Tensor, Tensor)",
    "put_away(Tensor x, str place) -> Tensor",
    "bring_back(Tensor ticket, int[] size, ScalarType dtype, Device device, str place) -> Tensor",
    "observed_step() -> Tensor",
    "observe(Tensor(a!) handle, Tensor x, Tensor[] dys, Tensor[] norms, Tensor? indices, bool center, str modules) "
    "-> ()",
    "in_chunks(str body, str[] kinds, Tensor[] rowwise, Tensor[] shared, int chunk, Tensor? noise, int[] share, "
    "str estimator, bool center, str product, Tensor[] draws, bool compiled) -> Tensor[]",
):
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]

# Squares of smaller norms lose precision in float32, of larger ones overflow; the maximum stands in.
SMALLEST_SQUARE, LARGEST_SQUARE = 1e-30, 1e38
# Where the largest norm is between these no row overflows, and one that underflows is below 1e-9 of it.
SMALL_NORM, LARGE_NORM = 1e-10, LARGEST_SQUARE**0.5
SMALLEST_NORM = 1e-15  # stands for a norm that was seen to be zero (zero: not seen); its square is a number
_IN_CACHE = 2**17  # elements of a block of rows
_CHUNK = 64  # elements whose norm in 16 bits stays in their range


def _choose_rows(norms: list[Tensor], noise: Tensor, kept: int, estimator: str) -> tuple[Tensor, Tensor]:
    if norms[0].is_cuda and estimator == "wta-systematic" and _has_triton():
        from . import triton_kernels

        return triton_kernels.choose_rows(norms, noise, kept)
    weights = norms[0].double()
    for factor in norms[1:]:
        weights = weights * factor.double()
    return estimators.choose_rows(weights, noise, kept, estimator)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _choose_rows_fake(norms: list[Tensor], noise: Tensor, kept: int, estimator: str) -> tuple[Tensor, Tensor]:
    shape = (*norms[0].shape[:-1], kept)
    return (
        norms[0].new_empty(shape, dtype=torch.int64),
        norms[0].new_empty(shape, dtype=torch.float32),
    )


def _row_norms(operands: list[Tensor], center: Tensor | None = None) -> Tensor:
    norms = [_norms_of_rows(x, center, 2) for x in operands]
    norm = norms[0] if len(norms) == 1 else torch.stack(norms).square().sum(0).sqrt()
    if norm.device.type == "cpu" and (norm.numel() == 0 or SMALL_NORM < float(norm.max()) < LARGE_NORM):
        return norm  # no second pass over the operands
    peaks = [_norms_of_rows(x, center, torch.inf) for x in operands]
    unsafe = (norm < SMALLEST_SQUARE**0.5) | (norm > LARGEST_SQUARE**0.5)
    return torch.where(unsafe, torch.stack(peaks).amax(0), norm)


def norms_as_sums(operands: Sequence[Tensor], center: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return what ``row_norms`` does, written as loops that are fused with what computes the operands.

    Args:
        operands, center: as of `row_norms`.
        dtype: of sums and norms, float32 or float64.
    """
    squares, largest = [], []
    for operand in operands:
        wide = operand.to(dtype)
        if center is not None:
            wide = wide - center.to(dtype)
        squares.append((wide * wide).sum(-1))
        largest.append(wide.abs().amax(-1))
    square, peak = reduce(torch.add, squares), reduce(torch.maximum, largest)
    unsafe = (square < SMALLEST_SQUARE) | (square > LARGEST_SQUARE)
    return torch.where(unsafe, peak, square.sqrt())


def _norms_of_rows(x: Tensor, center: Tensor | None, order: float) -> Tensor:
    """Return the norms of rows [..., rows], float32 at least; no operand is copied to it as a whole.

    In 16 bits on the CPU they are right to one rounding of those: enough for weights of a draw.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    norms_of = partial(torch.linalg.vector_norm, ord=order, dim=-1, dtype=dtype)
    if center is None and (x.dtype == dtype or x.device.type != "cpu"):
        return cast(Tensor, norms_of(x))
    chunks, rest = divmod(x.shape[-1], _CHUNK)
    if center is None and rest == 0:
        chunked = x.reshape(*x.shape[:-1], chunks, _CHUNK)
        return cast(Tensor, norms_of(torch.linalg.vector_norm(chunked, order, dim=-1)))
    center = None if center is None else center.to(dtype)
    blocks = torch.split(x, max(1, _IN_CACHE // max(x.shape[-1], 1)), -2)
    return torch.cat([norms_of(rows if center is None else rows - center) for rows in blocks], -1)


def _row_norms_fake(operands: list[Tensor], center: Tensor | None = None) -> Tensor:
    x = operands[0]
    return x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))


def _gather_rows(
    x: Tensor, indices: Tensor, scales: Tensor | None = None, center: Tensor | None = None
) -> Tensor:
    if x.dim() == 2:
        rows = x.index_select(0, indices)
    else:
        rows = x.gather(-2, indices.unsqueeze(-1).expand(*indices.shape, x.shape[-1]))
    if center is not None:
        rows = rows - center.to(torch.promote_types(x.dtype, torch.float32))
    return (rows if scales is None else rows * scales.unsqueeze(-1)).to(x.dtype)


def _gather_rows_fake(
    x: Tensor, indices: Tensor, scales: Tensor | None = None, center: Tensor | None = None
) -> Tensor:
    return x.new_empty((*indices.shape, x.shape[-1]))


def _append_row(rows: Tensor, row: Tensor) -> Tensor:
    return torch.cat([rows, row], -2)


def _combine_rows_fake(x: Tensor, seed: Tensor, kept: int, estimator: str) -> Tensor:
    return x.new_empty((*x.shape[:-2], kept, x.shape[-1]))


def _gradient_weights(
    norms: Tensor, known: Tensor | None, mask: Tensor | None, masked: float, positions: int
) -> Tensor:
    if known is None:
        known = torch.zeros_like(norms)
    else:
        known = _rows_of_batch(known, norms, positions).to(norms.device).flatten()
    mask = torch.ones_like(norms) if mask is None else mask.flatten()
    return estimators.gradient_weights(known, mask, masked)


def _gradient_weights_fake(
    norms: Tensor, known: Tensor | None, mask: Tensor | None, masked: float, positions: int
) -> Tensor:
    return torch.empty_like(norms, dtype=torch.float32)


def _record_norms(fresh: Tensor, norms: Tensor, positions: int) -> None:
    # Not an event for autograd: two forward passes may come before the first backward pass.
    values = norms.view(-1, positions).to(fresh.dtype).clamp(min=SMALLEST_NORM)
    _rows_of_batch(fresh.data, norms, positions).copy_(values)


def _rows_of_batch(state: Tensor, norms: Tensor, positions: int) -> Tensor:
    """Return the part ``[batch, positions]`` of a layer's staged norms ``[capacity, seq_len]``."""
    batch = norms.numel() // positions
    if batch > state.shape[0] or positions > state.shape[1]:
        raise RuntimeError(
            f"a batch of {batch} samples x {positions} tokens is larger than the {state.shape[0]} x "
            f"{state.shape[1]} that gradient norms are tracked for; open `with tracker.batch(sample_ids)` "
            f"around each training step, and give track_gradient_norms(seq_len=...) the longest length"
        )
    return state[:batch, :positions]


def _require_zero(norms: Tensor, mask: Tensor) -> Tensor:
    right = ((mask.flatten() != 0) | (norms == 0) | ~norms.isfinite()).all()
    message = (
        "a row that the token mask declares to have no gradient has one, so the gradient would be biased; "
        "mask fewer rows, or leave token_mask out"
    )
    if norms.device.type == "cpu":
        if not right:
            raise RuntimeError(message)
    else:
        torch._assert_async(right, message)
    return norms.new_zeros(())


def _bring_back_fake(
    ticket: Tensor, size: list[int], dtype: torch.dtype, device: torch.device, place: str
) -> Tensor:
    return torch.empty(size, dtype=dtype, device=device)


def _after(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function whose last argument but one is only waited for."""
    return lambda *args: function(*args[:-2], args[-1])


for _name, _kernel, _fake in (
    ("choose_rows", _choose_rows, _choose_rows_fake),
    ("row_norms", _row_norms, _row_norms_fake),
    ("gather_rows", _gather_rows, _gather_rows_fake),
    ("append_row", _append_row, _append_row),
    ("write", torch.clone, torch.empty_like),
    ("receive", torch.clone, torch.empty_like),
    ("combine_rows", estimators.combine_rows, _combine_rows_fake),
    ("gradient_weights", _gradient_weights, _gradient_weights_fake),
    ("record_norms", _record_norms, lambda fresh, norms, positions: None),
    ("require_zero", _require_zero, lambda norms, mask: norms.new_empty(())),
    ("round_columns", _after(low_precision.round_columns), _after(low_precision.round_columns_fake)),
    ("multiply_codes", low_precision.multiply_codes, low_precision.multiply_codes_fake),
    ("grouped_mm", experts.grouped_mm, experts.grouped_mm_fake),
    ("in_groups", experts.in_groups, lambda norms, offsets: torch.empty_like(norms)),
    ("sort_rows", experts.sort_rows, experts.sort_rows_fake),
    ("round_groups", _after(experts.round_groups), _after(experts.round_groups_fake)),
    ("multiply_groups", experts.multiply_groups, experts.multiply_groups_fake),
    ("attention_backward", attention.attention_backward, attention.attention_backward_fake),
    ("put_away", offload.put_away, lambda x, place: torch.empty(1, dtype=torch.int64)),
    ("bring_back", offload.bring_back, _bring_back_fake),
    ("observed_step", observer.observed_step, lambda: torch.empty(2, dtype=torch.int64)),
    ("observe", observer.observe, lambda *operands: None),
    ("in_chunks", chunks.in_chunks, chunks.in_chunks_fake),
    ("token_mask", lambda mask: None, lambda mask: None),
    ("norm_state", lambda x, known, fresh: None, lambda x, known, fresh: None),
):
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"wtacrs::{_name}", _fake, lib=_LIBRARY)

choose_rows = torch.ops.wtacrs.choose_rows.default
"""``(norms, noise, kept, estimator) -> (indices, scales)``, as :func:`estimators.choose_rows`.

The weights are the product of `norms`, in float64: a product of small norms is no zero.
"""
row_norms = torch.ops.wtacrs.row_norms.default
"""``(operands, center) -> norms``: the joint norms of the rows of tensors ``[..., rows, features]``.

`center` ``[..., 1, features]`` is subtracted from every row first.

``[..., rows]``, float32 (float64 for float64). Where the square leaves the range of float32 the largest
element stands in: a norm is zero only where every element is zero, or, on CPU, less than 1e-9 of the
largest norm.
"""

gather_rows = torch.ops.wtacrs.gather_rows.default
"""``(x [..., rows, features], indices [..., kept], scales, center) -> [..., kept, features]``.

The rows less `center` ``[..., 1, features]``, times `scales` ``[..., kept]``; either may be None.
"""

append_row = torch.ops.wtacrs.append_row.default
"""``(rows [..., kept, features], row [..., 1, features]) -> [..., kept + 1, features]``."""

write = torch.ops.wtacrs.write.default
"""``x -> x``; Inductor writes `x` to memory, it is not computed again by each of its readers."""

receive = torch.ops.wtacrs.receive.default
"""``x -> x``, what a region gets from its caller, which keeps it no longer than it needs it; gone once partitioned."""

combine_rows = torch.ops.wtacrs.combine_rows.default
"""As :func:`estimators.combine_rows`."""

gradient_weights = torch.ops.wtacrs.gradient_weights.default
"""``(norms [rows], known [capacity, seq_len] or None, mask of `rows` elements or None, masked, positions)``.

Return :func:`estimators.gradient_weights`, ``[rows]``; of `norms` only size and device are read.
"""
record_norms = torch.ops.wtacrs.record_norms.default
"""``(fresh [capacity, seq_len], norms [rows], positions)``: write ``rows / positions`` samples."""
require_zero = torch.ops.wtacrs.require_zero.default
"""``(norms [rows], mask of `rows` elements) -> zero []``.

Raise where a masked row has a finite norm above zero (on CUDA an assertion on the device).
"""

round_columns = torch.ops.wtacrs.round_columns.default
"""As :func:`low_precision.round_columns`, once `after` is there: else codes might be made long before they are read."""

multiply_codes = torch.ops.wtacrs.multiply_codes.default
"""As :func:`low_precision.multiply_codes`."""

grouped_mm = torch.ops.wtacrs.grouped_mm.default
"""As :func:`experts.grouped_mm`."""

in_groups = torch.ops.wtacrs.in_groups.default
"""As :func:`experts.in_groups`."""

sort_rows = torch.ops.wtacrs.sort_rows.default
"""As :func:`experts.sort_rows`."""

round_groups = torch.ops.wtacrs.round_groups.default
"""As :func:`experts.round_groups`, once `after` is there."""

multiply_groups = torch.ops.wtacrs.multiply_groups.default
"""As :func:`experts.multiply_groups`."""

attention_backward = torch.ops.wtacrs.attention_backward.default
"""As :func:`attention.attention_backward`."""

put_away = torch.ops.wtacrs.put_away.default
"""As :func:`offload.put_away`."""

bring_back = torch.ops.wtacrs.bring_back.default
"""As :func:`offload.bring_back`."""

observed_step = torch.ops.wtacrs.observed_step.default
"""As :func:`observer.observed_step`."""

observe = torch.ops.wtacrs.observe.default
"""As :func:`observer.observe`; it writes nothing, but says so, as what writes is kept without a use."""

in_chunks = torch.ops.wtacrs.in_chunks.default
"""As :func:`chunks.in_chunks`."""

# Markers: they compute nothing, tell the rewrite about tensors of the graph, and are taken out of it.
token_mask = torch.ops.wtacrs.token_mask.default
norm_state = torch.ops.wtacrs.norm_state.default
for _marker in (token_mask, norm_state):
    torch.fx.node.has_side_effect(_marker)
