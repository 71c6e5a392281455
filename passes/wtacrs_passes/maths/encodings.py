"""Compact encodings of residuals: the mathematics in plain torch.

The rewrite traces these very functions into the joint graph, so what the tests check is what runs.

==========  ======================================  =========================================
name        stored                                  error of an element
==========  ======================================  =========================================
``int8``    8 bits, one peak for each group         at most half a step, step = peak / 127
``int6``    6 bits, one peak for each group         at most half a step, step = peak / 31
``int4``    4 bits, one peak for each group         at most half a step, step = peak / 7
``table``   1 to 4 bits: which piece of a           that of the best piecewise constant
            piecewise constant function             (Novikov et al. 2022, equation 4)
``bits``    1 bit                                   none
==========  ======================================  =========================================

A group is a run of elements along the last dimension, `peak` the largest magnitude in it. With stochastic
rounding the integer encodings are unbiased and their error is below a step; the errors of any two elements are
independent, so that in a sum their variances add up. A group that holds NaN or Inf decodes to NaN, so that
neither is hidden; a group with a peak below 1e-36 decodes to zeros.
"""

from __future__ import annotations

import dataclasses
from functools import reduce
from typing import Any

import torch
from torch import Tensor

GROUP = {8: 64, 6: 64, 4: 32}
"""Elements that share a peak, by bits."""
_SMALLEST_GROUP = 16
_NEIGHBOURS = {6: 4, 4: 2}
"""Groups whose codes lie in the same bytes."""


def group_size(features: Any, bits: int) -> Any:
    """Return how many elements share a peak: the largest divisor of `features` up to ``GROUP[bits]``.

    Half of ``GROUP[bits]`` where neighbours can share bytes then. All elements where that divisor is below 16, or where
    `features` is symbolic.
    """
    if not isinstance(features, int):
        return features
    if bits == 6 and packs_well(features, bits):
        return GROUP[bits] if _shares_bytes(features, GROUP[bits], bits) else GROUP[bits] // 2
    sizes = range(min(GROUP[bits], features), _SMALLEST_GROUP - 1, -1)
    return next((size for size in sizes if features % size == 0), features)


def packs_well(features: Any, bits: int) -> bool:
    """Tell whether codes of so many bits are read and written in runs of a whole group, or need not be packed."""
    return bits == 8 or (isinstance(features, int) and features % (_NEIGHBOURS[bits] * GROUP[bits] // 2) == 0)


def levels(bits: int) -> int:
    """Return the largest code of a signed integer of so many bits; the smallest is its negative."""
    return int(2 ** (bits - 1)) - 1


def encoded_bits(encoding: str, features: Any, itemsize: int, bits: int = 0) -> float:
    """Return the bits stored for each element of a tensor.

    Args:
        features: size of the last dimension; itemsize: bytes of an element as it is.
        bits: of a ``table``.
    """
    if encoding == "bits":
        return 1.0
    if encoding == "table":
        return float(bits)
    if encoding in INTEGER_BITS:
        group = group_size(features, INTEGER_BITS[encoding])
        peak = 8 * min(itemsize, 4)
        return INTEGER_BITS[encoding] + (peak / group if isinstance(group, int) else 0.0)
    return 8.0 * itemsize


INTEGER_BITS = {"int8": 8, "int6": 6, "int4": 4}


def quantise(
    x: Tensor, of_rows: Tensor | None = None, of_features: Tensor | None = None, *, bits: int
) -> tuple[Tensor, ...]:
    """Encode `x` as integers with one peak for each group.

    Args:
        x: [..., features], float.
        of_rows, of_features: [..., 1] and [features], independent and uniform in [0, 1): round stochastically, by
            the fraction of their sum; to the nearest without them.
        bits: 8, 6 or 4.

    Returns:
        codes: int8 [..., features] for 8 bits, uint8 [..., ceil(features / 2)] for 4: two neighbouring groups share
            bytes, or the two halves of a row; for 6 those of the lower four bits, and [..., ceil(features / 4)] of the
            others, four to a byte;
        peaks: [..., groups], of the dtype of `x` (float32 for float64).
    """
    features = x.shape[-1]
    group = group_size(features, bits)
    groups = _blocks(x.float(), -1, group)
    draws = None
    if of_rows is not None and of_features is not None:
        draws = _blocks((of_rows + of_features).frac(), -1, group)
    shares = bits < 8 and _shares_bytes(features, group, bits)
    if shares:  # neighbours each by themselves, so that one loop over all finds their peaks and packs them
        count = _NEIGHBOURS[bits]
        parts = [
            (_of_neighbours(groups, i, count), None if draws is None else _of_neighbours(draws, i, count))
            for i in range(count)
        ]
    else:
        parts = [(groups, draws)]
    rounded, peaks = zip(*(_round(*part, bits) for part in parts), strict=True)
    dtype = x.dtype if x.element_size() == 2 else torch.float32
    stored = torch.cat([peak.to(dtype) for peak in peaks], -1).flatten(-2)
    if bits == 8:
        return rounded[0].to(torch.int8).view(x.shape), stored
    codes = [(steps + 2 ** (bits - 1)).to(torch.uint8) for steps in rounded]
    if not shares:
        whole = codes[0].view(x.shape)
        return (*(pack(_bits_of(whole, *plane), plane[1]) for plane in _planes(bits)), stored)
    return (*(_lay([_bits_of(each, *plane) for each in codes], plane[1]) for plane in _planes(bits)), stored)


def _bits_of(codes: Tensor, low: int, width: int) -> Tensor:
    part: Tensor = (codes >> low) & (2**width - 1)
    return part


def _lay(neighbours: list[Tensor], width: int) -> Tensor:
    """Lay the codes of neighbouring groups, each [..., runs, group], over each other: [..., bytes]."""
    each = 8 // width
    shifted = [codes << (width * (i % each)) for i, codes in enumerate(neighbours)]
    runs = [reduce(torch.bitwise_or, shifted[i : i + each]) for i in range(0, len(shifted), each)]
    return torch.stack(runs, -2).flatten(-3) if len(runs) > 1 else runs[0].flatten(-2)


def _round(groups: Tensor, draws: Tensor | None, bits: int) -> tuple[Tensor, Tensor]:
    """Return groups in steps of their peaks, as whole numbers, and the peaks.

    Args:
        groups: [..., groups, group], float32; draws: alike, in [0, 1): round down after they are added.

    Returns:
        steps: [..., groups, group], or [..., features]; peaks: [..., groups, 1].
    """
    largest = levels(bits)
    peaks = groups.abs().amax(-1, keepdim=True)
    steps = to_whole(in_steps(groups, peaks, largest), draws)
    if (
        groups.device.type == "cpu" and bits == 8
    ):  # two flat loops are faster there; Triton has one kernel for both
        steps = steps.flatten(-2)
    return steps.clamp(-largest, largest), peaks


def in_steps(x: Tensor, peaks: Tensor, largest: float) -> Tensor:
    """Return `x` by ``peaks / largest``; zero where a peak is so small, or so large, that no number is left of that."""
    per_unit = largest / peaks
    usable = (per_unit > 0) & (per_unit < torch.inf)
    return torch.where(usable, x * per_unit, 0.0)


def to_whole(steps: Tensor, draws: Tensor | None) -> Tensor:
    """Round to whole numbers: to the nearest, or down after random numbers in [0, 1) are added."""
    return steps.round() if draws is None else (steps + draws).floor()


def _shares_bytes(features: Any, group: Any, bits: int) -> bool:
    """Tell whether codes of neighbouring groups lie in the same bytes, not those of parts of a row.

    Runs of a whole group are what vectors of a CPU and blocks of Triton read at once.
    """
    return isinstance(features, int) and features % (_NEIGHBOURS[bits] * group) == 0


def _of_neighbours(groups: Tensor, which: int, count: int) -> Tensor:
    """Return the first, second, ... of so many neighbouring groups."""
    neighbours: Tensor = groups.unflatten(-2, (-1, count))  # type: ignore[no-untyped-call]
    return neighbours.select(-2, which)


def dequantise(*stored: Tensor, bits: int, features: Any, dtype: torch.dtype) -> Tensor:
    """Decode what :func:`quantise` returned: ``[..., features]`` of `dtype`."""
    *codes, peaks = stored
    group = group_size(features, bits)
    if bits == 8:
        steps = _blocks(codes[0].float(), -1, group)
    else:
        shares = _shares_bytes(features, group, bits)
        planes = [
            (
                _spread(_blocks(plane, -1, group), width).flatten(-3, -2)
                if shares
                else _blocks(unpack(plane, width, features), -1, group)
            ).float()
            * 2**low
            for plane, (low, width) in zip(codes, _planes(bits), strict=True)
        ]
        steps = reduce(torch.add, planes) - 2 ** (bits - 1)
    return (steps * (peaks.float() * (1 / levels(bits))).unsqueeze(-1)).flatten(-2).to(dtype)


def dequantise_shares(*stored: Tensor, bits: int, features: Any, dtype: torch.dtype) -> Tensor:
    """Decode rows that sum to one, as those of a softmax, so that they do so again.

    The gradient of a softmax does not change where one number is added to all gradients of a row; that number may
    be large beside them.

    Returns:
        ``[..., features]`` of `dtype`.
    """
    rounded = dequantise(*stored, bits=bits, features=features, dtype=torch.float32)
    return (rounded / rounded.sum(-1, keepdim=True).clamp(min=0.5)).to(dtype)


def _blocks(x: Tensor, count: Any, size: Any) -> Tensor:
    """Split the last dimension into ``[count, size]``."""
    split: Tensor = x.unflatten(-1, (count, size))  # type: ignore[no-untyped-call]
    return split


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack small integers into bytes along the last dimension.

    The last dimension is cut into as many blocks as codes fit into a byte, and the blocks are laid over
    each other, so that packing and unpacking read and write contiguous runs.

    Args:
        codes: [..., n], uint8, below ``2 ** bits``; bits: 1, 2 or 4.

    Returns:
        [..., ceil(n bits / 8)], uint8.
    """
    blocks = 8 // bits
    padding = (-codes.shape[-1]) % blocks
    if not isinstance(padding, int) or padding:
        codes = torch.nn.functional.pad(codes, (0, padding))
    parts = _blocks(codes, blocks, -1)
    packed: Tensor = parts.select(-2, 0)
    for block in range(1, blocks):
        packed = packed | (parts.select(-2, block) << (bits * block))
    return packed


def unpack(packed: Tensor, bits: int, n: Any) -> Tensor:
    """Invert :func:`pack`: ``[..., n]``, uint8."""
    codes = _spread(packed, bits).flatten(-2)
    whole = isinstance(n, int) and n % (8 // bits) == 0
    return codes if whole else codes.narrow(-1, 0, n)


def _spread(packed: Tensor, bits: int) -> Tensor:
    """Return the codes that lie over each other: ``[..., bytes]`` to ``[..., 8 / bits, bytes]``."""
    shifts = torch.arange(0, 8, bits, device=packed.device, dtype=torch.uint8).unsqueeze(-1)
    codes: Tensor = (packed.unsqueeze(-2) >> shifts) & (2**bits - 1)
    return codes


def pack_mask(mask: Tensor) -> Tensor:
    """Pack booleans eight to a byte: bool [..., n] to uint8 [..., ceil(n / 8)]."""
    return pack(mask.to(torch.uint8), 1)


def unpack_mask(packed: Tensor, *, n: Any) -> Tensor:
    """Invert :func:`pack_mask`."""
    return unpack(packed, 1, n).to(torch.bool)


@dataclasses.dataclass(frozen=True)
class Table:
    """A piecewise constant function: ``values[j]`` for x with j boundaries below it.

    Attributes:
        boundaries: ascending, one fewer than `values`.
        values: ``2 ** bits`` or fewer.
        even: a function of ``|x|``.
        error: integral of the squared error over the range that was tabulated.
    """

    boundaries: tuple[float, ...]
    values: tuple[float, ...]
    even: bool
    error: float

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return max(1, (len(self.values) - 1).bit_length())


def encode_table(x: Tensor, *, table: Table) -> tuple[Tensor, ...]:
    """Return which piece each element of `x` lies in, packed, and what marks rows that are not finite.

    Args:
        x: [..., features], float.

    Returns:
        packed codes, one uint8 tensor for each power of two in ``table.bits``;
        marks: [..., 1], float32, zero, or NaN where the row holds NaN or Inf.
    """
    magnitude = x.float().abs()
    point = magnitude if table.even else x.float()
    count = torch.zeros_like(point)  # in float32: vectors of CPUs turn masks of floats into floats alone
    for boundary in table.boundaries:
        count = count + (point > boundary).to(torch.float32)
    codes = count.to(torch.uint8)
    marks = magnitude.amax(-1, keepdim=True) * 0.0
    return (*(pack((codes >> low) & (2**width - 1), width) for low, width in _planes(table.bits)), marks)


def decode_table(*stored: Tensor, table: Table, features: Any, dtype: torch.dtype) -> Tensor:
    """Return the value of the piece of each element: ``[..., features]`` of `dtype`."""
    *planes, marks = stored
    codes: Tensor | None = None
    for packed, (low, width) in zip(planes, _planes(table.bits), strict=True):
        part = unpack(packed, width, features) << low
        codes = part if codes is None else codes | part
    assert codes is not None
    number = codes.to(torch.float32)
    values = torch.full_like(number, table.values[0])
    for piece, value in enumerate(table.values[1:], start=1):
        values = torch.where(number >= piece, value, values)
    return (values + marks).to(dtype)


def _planes(bits: int) -> tuple[tuple[int, int], ...]:
    """Split a code of less than 8 bits into parts that fill bytes: (lowest bit, width)."""
    widths = [width for width in (4, 2, 1) if bits & width]
    return tuple((sum(widths[:i]), width) for i, width in enumerate(widths))
