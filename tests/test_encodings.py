"""Encodings: error within the stated bound for every shape, layout and precision; nothing hidden."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from conftest import ALPHA, is_unbiased
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from wtacrs_passes.maths.encodings import (
    INTEGER_BITS,
    Table,
    decode_table,
    dequantise,
    encode_table,
    encoded_bits,
    group_size,
    pack,
    pack_mask,
    packs_well,
    quantise,
    unpack,
    unpack_mask,
)
from wtacrs_passes.maths.tables import tabulate

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
SHAPES = st.lists(st.integers(0, 5), max_size=2).flatmap(
    lambda head: st.sampled_from([1, 2, 3, 17, 31, 64, 96, 100, 128, 192, 576]).map(
        lambda last: (*head, last)
    )
)


def decoded(x: Tensor, bits: int, *noises: Tensor) -> Tensor:
    *codes, peaks = quantise(x, *noises, bits=bits)
    assert all(plane.element_size() == 1 for plane in codes)
    widths = (4, 2) if bits == 6 else (bits,)
    assert [plane.shape[-1] for plane in codes] == [math.ceil(x.shape[-1] * width / 8) for width in widths]
    return dequantise(*codes, peaks, bits=bits, features=x.shape[-1], dtype=x.dtype)


def bound(x: Tensor, bits: int) -> Tensor:
    """Half a step of the group, and what rounding the scale and the result to the precision of x adds."""
    groups = x.double().unflatten(-1, (-1, group_size(x.shape[-1], bits)))
    peak = groups.abs().amax(-1, keepdim=True).expand_as(groups).flatten(-2)
    eps, tiny = torch.finfo(x.dtype).eps, torch.finfo(x.dtype).tiny
    scale_slack = 2**-7 if x.element_size() == 2 else 1e-6
    return peak / (2 ** (bits - 1) - 1) / 2 * (1 + scale_slack) + peak * eps + 127 * tiny


@given(
    SHAPES,
    st.sampled_from(FLOATS),
    st.sampled_from([4, 6, 8]),
    st.sampled_from([1e-38, 1e-4, 1.0, 1e4]),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_integers_round_within_half_a_step(
    shape: tuple[int, ...], dtype: torch.dtype, bits: int, size: float, transposed: bool
) -> None:
    x = (torch.randn(shape) * size).to(dtype)
    if transposed and len(shape) == 3:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert decoded(x, bits).dtype == dtype and decoded(x, bits).shape == x.shape
    assert bool(((decoded(x, bits).double() - x.double()).abs() <= bound(x, bits)).all())


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("dtype", FLOATS)
def test_constant_and_zero_rows(bits: int, dtype: torch.dtype) -> None:
    assert bool((decoded(torch.zeros(3, 64, dtype=dtype), bits) == 0).all())
    x = torch.full((3, 64), -2.5, dtype=dtype)
    torch.testing.assert_close(decoded(x, bits), x, rtol=2**-6, atol=0)


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_carried_through(bits: int, value: float) -> None:
    x = torch.randn(2, 128)
    x[0, 3] = value
    y = decoded(x, bits)
    group = group_size(128, bits)
    assert not bool(y[0, :group].isfinite().any())
    assert bool(y[0, group:].isfinite().all()) and bool(y[1].isfinite().all())


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_stochastic_rounding_is_unbiased(bits: int) -> None:
    x = torch.randn(4, 64)
    runs = torch.stack([decoded(x, bits, torch.rand(4, 1), torch.rand(64)).flatten() for _ in range(2000)])
    assert is_unbiased(runs, x.flatten())
    step = bound(x, bits).flatten() * 2
    assert bool(((runs - x.flatten()).abs() <= step * (1 + 1e-5)).all())


def test_stochastic_errors_of_two_elements_are_uncorrelated() -> None:
    """Else a sum over rows or features, as of a product of matrices, would add up errors instead of variances."""
    x = torch.randn(6, 32)
    count = 4000
    runs = torch.stack([decoded(x, 4, torch.rand(6, 1), torch.rand(32)).flatten() for _ in range(count)])
    correlations = torch.corrcoef((runs - x.flatten()).double().T)
    others = correlations[~torch.eye(len(correlations), dtype=torch.bool)]
    others = others[others.isfinite()]  # the peak itself has no error
    limit = statistics.NormalDist().inv_cdf(1 - ALPHA / len(others)) / count**0.5  # each pair is there twice
    assert float(others.abs().max()) < limit


def test_nearest_rounding_would_fail_the_test_of_unbiasedness() -> None:
    x = torch.randn(4, 64)
    runs = torch.stack(
        [decoded(x, 4, torch.full((4, 1), 0.5), torch.zeros(64)).flatten() for _ in range(100)]
    )
    assert not is_unbiased(runs + 1e-6 * torch.randn_like(runs), x.flatten())


@given(st.integers(0, 3), st.integers(1, 70), st.sampled_from([1, 2, 4]))
@settings(max_examples=60, deadline=None)
def test_packing_is_exact(rows: int, n: int, bits: int) -> None:
    codes = torch.randint(2**bits, (rows, n), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (rows, math.ceil(n * bits / 8))
    assert torch.equal(unpack(packed, bits, n), codes)


def test_masks_are_exact() -> None:
    mask = torch.rand(5, 3, 43) > 0.3
    assert pack_mask(mask).shape == (5, 3, 6)
    assert torch.equal(unpack_mask(pack_mask(mask), n=43), mask)


def derivative(x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(F.gelu(x).sum(), x)[0]


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_tables_give_the_value_of_the_piece(bits: int) -> None:
    table = tabulate(derivative, bits)
    assert table is not None and table.bits == bits
    x = torch.randn(7, 43) * 3
    stored = encode_table(x, table=table)
    assert sum(codes.nbytes for codes in stored[:-1]) == 7 * sum(
        math.ceil(43 * width / 8) for width in ((2, 1) if bits == 3 else (bits,))
    )
    piece = torch.searchsorted(torch.tensor(table.boundaries), x)
    assert torch.equal(
        decode_table(*stored, table=table, features=43, dtype=torch.float32),
        torch.tensor(table.values)[piece],
    )
    x[0, 0], x[1, 0] = torch.nan, torch.inf
    y = decode_table(*encode_table(x, table=table), table=table, features=43, dtype=torch.float32)
    assert not bool(y[:2].isfinite().any()) and bool(y[2:].isfinite().all())


def test_even_tables_read_the_magnitude() -> None:
    table = Table((1.0,), (2.0, 3.0), True, 0.0)
    x = torch.tensor([[-4.0, -0.5, 0.5, 4.0]])
    y = decode_table(*encode_table(x, table=table), table=table, features=4, dtype=torch.float32)
    assert y.tolist() == [[3.0, 2.0, 2.0, 3.0]]


def test_bits_of_an_element() -> None:
    assert encoded_bits("int8", 768, 2) == 8.25 and encoded_bits("int4", 768, 4) == 5
    assert encoded_bits("bits", 768, 1) == 1 and encoded_bits("table", 768, 2, bits=3) == 3
    assert encoded_bits("exact", 768, 2) == 16
    assert encoded_bits("int6", 768, 2) == 6.25
    assert set(INTEGER_BITS) == {"int8", "int6", "int4"}
    assert [group_size(n, 6) for n in (64, 576, 768, 384, 100, 431, 17)] == [64, 64, 64, 32, 50, 431, 17]
    assert [packs_well(n, 6) for n in (64, 576, 768, 384)] == [False, False, True, True]
    assert packs_well(64, 4) and packs_well(17, 8)
    assert [group_size(n, 8) for n in (64, 768, 100, 431, 17)] == [64, 64, 50, 431, 17]
    assert [group_size(n, 4) for n in (64, 768, 100, 431, 17)] == [32, 32, 25, 431, 17]
