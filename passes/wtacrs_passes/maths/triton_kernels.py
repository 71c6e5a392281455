"""A CUDA kernel: the chooser of rows.

Imported only where Triton is installed and a tensor is on a GPU. Weights come in, indices and scales go out, and
nothing is sorted; it follows :mod:`wtacrs_passes.maths.estimators`, which the tests compare it with;
without a GPU, in Triton's interpreter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .estimators import NOISE, ROUNDS, grid

_BLOCK, _WARPS = 4096, 16  # more elements, or threads with fewer registers, would spill


def choose_rows(factors: list[Tensor], noise: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Choose rows as ``estimators.choose_rows(prod(factors), noise, kept, "wta-systematic")``.

    Args:
        factors: one or two of [..., rows], float32 or float64, non-negative.
        noise: [..., NOISE], float32, uniform in [0, 1).
        kept: rows to choose.

    Returns:
        indices: [..., kept], int64; scales: [..., kept], float32.
    """
    *batch, rows = factors[0].shape
    first, second = (factor.reshape(-1, rows).contiguous() for factor in (factors[0], factors[-1]))
    noise = noise.reshape(-1, NOISE).contiguous()
    indices = torch.empty((len(first), kept), dtype=torch.int64, device=first.device)
    scales = torch.empty((len(first), kept), dtype=torch.float32, device=first.device)
    height, width = grid(rows)
    _choose_rows_kernel[(len(first),)](
        first, second, noise, indices, scales, rows, kept, height, width,
        PAIR=len(factors) == 2, NUMBERS=NOISE, TURNS=ROUNDS, AT_ONCE=height * width <= _BLOCK,
        BLOCK=min(_BLOCK, triton.next_power_of_2(height * width)), num_warps=_WARPS,
    )  # fmt: skip
    return indices.view(*batch, kept), scales.view(*batch, kept)


@triton.jit(do_not_specialize=("rows", "kept", "height", "width"))
def _choose_rows_kernel(
    first, second, noise, indices, scales, rows, kept, height, width,
    PAIR: tl.constexpr, NUMBERS: tl.constexpr, TURNS: tl.constexpr, AT_ONCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program draws for one batch: ``_scale_by_rounds``, ``random_order`` and systematic sampling."""
    one = tl.program_id(0)
    first += one * rows
    second += one * rows
    noise += one * NUMBERS
    indices += one * kept
    scales += one * kept
    steps = tl.arange(0, BLOCK)

    infinite = 0
    total = tl.full((), 0.0, tl.float64)
    whole = _load_weights(first, second, steps, steps < rows, PAIR)  # all there are, if AT_ONCE
    for start in range(0, rows, BLOCK):
        weight = whole if AT_ONCE else _load_weights(first, second, start + steps, start + steps < rows, PAIR)
        infinite += tl.sum((weight == float("inf")).to(tl.int32))
        total += tl.sum(tl.where(weight == float("inf"), 0.0, weight))

    # Take out the rows that exceed one, until none does.
    winners = infinite
    more = 1
    while more > 0:
        found = 0
        rest = total * 0.0
        for start in range(0, rows, BLOCK):
            weight = (
                whole if AT_ONCE else _load_weights(first, second, start + steps, start + steps < rows, PAIR)
            )
            wins = (weight == float("inf")) | (weight * (kept - winners) > total)
            found += tl.sum(wins.to(tl.int32))
            rest += tl.sum(tl.where(wins, 0.0, weight))
        more = found - winners
        if more > 0:
            winners = found
            total = rest
    budget = kept - winners

    # No row, or NaN where not all infinite weights can be kept.
    nothing = tl.where(infinite > kept, float("nan"), 0.0)
    for start in range(0, kept, BLOCK):
        slot = start + steps
        tl.store(indices + slot, slot.to(tl.int64) * 0, mask=slot < kept)
        tl.store(scales + slot, (slot * 0).to(tl.float32) + nothing, mask=slot < kept)
    tl.debug_barrier()

    begin = tl.load(noise).to(tl.float64)
    low = (tl.load(noise + 1).to(tl.float64) * 16777216.0).to(tl.uint32)
    high = (tl.load(noise + 2).to(tl.float64) * 16777216.0).to(tl.uint32)
    edge = total * 0.0
    if infinite <= kept:
        for start in range(0, height * width, BLOCK):
            place = start + steps
            x = place // width
            y = place % width
            for turn in tl.static_range(TURNS):
                x = _shifted(x, _word(low, high, 2 * turn, y, height), height)
                y = _shifted(y, _word(low, high, 2 * turn + 1, x, width), width)
            row = x * width + y
            there = (place < height * width) & (row < rows)
            weight = _load_weights(first, second, row, there, PAIR)
            probability = tl.where(total > 0, weight * budget / total, 1.0)
            probability = tl.where(weight > 0, tl.minimum(probability, 1.0), 0.0)
            probability = tl.where(weight == float("inf"), 1.0, probability)
            after = edge + tl.cumsum(probability, 0)
            slot = _points_below(after - probability - begin)
            hit = there & (_points_below(after - begin) > slot) & (slot < kept)
            tl.store(indices + slot, row.to(tl.int64), mask=hit)
            tl.store(scales + slot, (1.0 / probability).to(tl.float32), mask=hit)
            edge += tl.sum(probability)


@triton.jit
def _load_weights(first, second, row, there, PAIR: tl.constexpr):
    """Return the weights of rows as float64, NaN as infinity; zero where there is no row."""
    weight = tl.load(first + row, mask=there, other=0.0).to(tl.float64)
    if PAIR:
        weight *= tl.load(second + row, mask=there, other=0.0).to(tl.float64)
    return tl.where(weight == weight, weight, float("inf"))


@triton.jit
def _points_below(length):
    """Return how many of 0, 1, 2, ... lie below `length`, which is above -1."""
    whole = length.to(tl.int32)
    return whole + (whole < length).to(tl.int32)


@triton.jit
def _word(low, high, stream, index, size):
    """Return ``random_words(seed, stream, ...)[index] * size >> 32``."""
    key = _mixed(low + _mixed(high + stream))
    return tl.umulhi(_mixed(index.to(tl.uint32) + key), size.to(tl.uint32)).to(tl.int32)


@triton.jit
def _shifted(x, words, size):
    moved = x + words
    return tl.where(moved < size, moved, moved - size)


@triton.jit
def _mixed(word):
    """Return the finaliser of MurmurHash3 of uint32."""
    word = (word ^ (word >> 16)) * 0x85EBCA6B
    word = (word ^ (word >> 13)) * 0xC2B2AE35
    return word ^ (word >> 16)
