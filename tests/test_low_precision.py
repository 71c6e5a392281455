"""Products in few bits: their bounds, that they are unbiased, what is not finite; the compiled rounding."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import is_unbiased
from torch import Tensor

from wtacrs_passes.maths import low_precision, ops
from wtacrs_passes.maths.low_precision import (
    multiply,
    multiply_codes,
    multiply_rows,
    round_columns,
    round_whole,
)

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NEAREST = (None,) * 4


def factors(dtype: torch.dtype = torch.float32, rows: int = 150) -> tuple[Tensor, Tensor]:
    """Return factors whose columns are of very different sizes."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(rows, n, generator=generator) for n in (24, 40))
    return (a * torch.logspace(-2, 2, 24)).to(dtype), (b * torch.logspace(1, -3, 40)).to(dtype)


def draws(a: Tensor, b: Tensor) -> list[Tensor]:
    return [torch.rand(size) for x in (a, b) for size in x.shape]


def sums_of_magnitudes(a: Tensor, b: Tensor) -> Tensor:
    return a.double().abs().T @ b.double().abs()


def int8_bound(a: Tensor, b: Tensor) -> Tensor:
    """Return the bound of the error to the nearest, by element."""
    s, t = (x.double().abs().amax(0) / 127 for x in (a, b))
    of_a, of_b = a.double().abs().sum(0), b.double().abs().sum(0)
    return (of_a[:, None] * t + s[:, None] * of_b) / 2 + len(a) * s[:, None] * t / 4


@pytest.mark.parametrize("dtype", FLOATS)
def test_errors_are_within_their_bounds(dtype: torch.dtype) -> None:
    a, b = factors(dtype)
    exact = a.double().T @ b.double()
    own = exact.abs() * torch.finfo(dtype).eps + 1e-5 * sums_of_magnitudes(a, b)
    bounds = {
        "bfloat16": 2**-7 * sums_of_magnitudes(a, b) + 2**-8 * exact.abs(),
        "int8": int8_bound(a, b),
        "float8": 2**-3 * sums_of_magnitudes(a, b) + 2**-8 * exact.abs(),
    }
    for product, bound in bounds.items():
        found = multiply(a, b, NEAREST, product)
        assert found.dtype == dtype
        assert bool(((found.double() - exact).abs() <= bound + own).all()), product
    for product, times in (("int8", 4), ("float8", 3)):
        at_random = multiply(a, b, draws(a, b), product)
        assert bool(((at_random.double() - exact).abs() <= times * bounds[product] + own).all()), product


def test_random_rounding_is_unbiased() -> None:
    a, b = factors(rows=20)
    runs = torch.stack([multiply(a, b, draws(a, b), "int8").flatten() for _ in range(3000)])
    assert is_unbiased(runs, (a.double().T @ b.double()).flatten())


@pytest.mark.parametrize("fault", ["none", "to the nearest", "always down", "steps too small"])
def test_random_rounding_to_float8_is_unbiased(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From 448 to below the smallest number that is not zero; codes are neighbours of what they stand for."""
    if fault == "steps too small":
        monkeypatch.setattr(low_precision, "_to_float8", lambda x, draws: (x * 64 + draws).floor() / 64)
    x = torch.logspace(math.log2(448), -11, 64, base=2.0).unsqueeze(-1).repeat(1, 3) * torch.tensor(
        [1.0, -1.0, 5.0]
    )

    def run() -> Tensor:
        of_rows, of_columns = torch.rand(64), torch.rand(3)
        if fault == "always down":
            of_rows, of_columns = of_rows * 1e-6, of_columns * 1e-6
        given = (None, None) if fault == "to the nearest" else (of_rows, of_columns)
        codes, scales = round_columns(x, *given, "float8")
        return codes.float() * scales

    torch.manual_seed(0)
    runs = torch.stack([run() for _ in range(2000)])
    noise = 1e-3 * x.abs() * torch.randn_like(runs)
    assert is_unbiased((runs + noise).flatten(1), x.flatten()) == (fault == "none")
    if fault == "none":
        codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        codes = codes[codes.isfinite()].unique()
        steps = (x / x.abs().amax(0) * 448).clamp(-448, 448)
        above = torch.searchsorted(codes, steps - 1e-5).clamp(max=len(codes) - 1)
        ends = runs / (x.abs().amax(0) / 448)
        assert bool((ends.amax(0) <= codes[above] + 1e-4).all())
        assert bool((ends.amin(0) >= codes[(above - 1).clamp(min=0)] - 1e-4).all())


@pytest.mark.parametrize("fault", ["none", "one draw for both", "always down"])
def test_faults_are_seen_by_the_test_of_unbiasedness(fault: str) -> None:
    """Where all but one row lie half-way between two steps a fault of the random numbers is largest."""
    a = torch.full((20, 16), 0.5)
    a[0] = 127.0

    def run() -> Tensor:
        given = draws(a, a)
        if fault == "one draw for both":
            given[2:] = given[:2]
        elif fault == "always down":
            given = [draw * 1e-6 for draw in given]
        return multiply(a, a, given, "int8").flatten() + 1e-3 * torch.randn(256)

    runs = torch.stack([run() for _ in range(1000)])
    assert is_unbiased(runs, (a.T @ a).flatten()) == (fault == "none")


@pytest.mark.parametrize("fault", [False, True])
def test_one_scale_for_a_matrix(fault: bool) -> None:
    """Products over rows and over columns are unbiased; the variance of an element is at most scale times magnitude."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 24, generator=generator) ** 3
    w, h = torch.randn(24, 8, generator=generator), torch.randn(12, 8, generator=generator)
    torch.manual_seed(0)
    decoded = []
    for _ in range(2000):
        codes, scale = round_whole(x, torch.rand(12) * (0.5 if fault else 1), torch.rand(24) * (not fault))
        decoded.append(codes * scale)
    runs = torch.stack(decoded)
    assert codes.dtype == torch.int8 and float(scale) == pytest.approx(float(x.abs().max()) / 127)
    assert is_unbiased((runs @ w).flatten(1), (x @ w).flatten()) == (not fault)
    assert is_unbiased((runs.mT @ h).flatten(1), (x.T @ h).flatten()) == (not fault)
    if not fault:
        up = (
            x.abs() / scale
        )  # at most this is the chance that an element is not rounded to zero, if below one
        six_deviations = 6 * (up.clamp(max=1) / len(runs)).sqrt() + 2 / len(runs)
        assert bool((runs.var(0) / scale.square() <= up + six_deviations).all())
        other, scales = round_columns(w, None, None, "int8")
        exact = codes.double() @ other.double() * (scale.double() * scales.double())
        torch.testing.assert_close(multiply_rows(codes, scale, other, scales, torch.float32).double(), exact)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_reaches_all_products_of_one_scale(value: float) -> None:
    x = torch.randn(6, 8)
    x[2, 3] = value
    codes, scale = round_whole(x, torch.rand(6), torch.rand(8))
    assert not bool((codes * scale).isfinite().any())


def test_the_noise_is_that_of_independent_roundings() -> None:
    """Variance of an element: each rounding has that of a coin, and they add up."""
    a, b = factors(rows=30)
    (p, s), (q, t) = ((x, x.abs().amax(0) / 127) for x in (a, b))
    of_a, of_b = (
        (x / s - (x / s).floor()) * (1 - (x / s - (x / s).floor())) * s**2 for x, s in ((p, s), (q, t))
    )
    predicted = of_a.T @ q**2 + p.T**2 @ of_b + of_a.T @ of_b
    runs = torch.stack([multiply(a, b, draws(a, b), "int8") for _ in range(2000)])
    ratio = (runs.var(0).sum(0) / predicted.sum(0)).mean()
    assert abs(float(ratio) - 1) < 0.05


@pytest.mark.parametrize("product", ["bfloat16", "int8", "float8"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_carried_through(product: str, value: float) -> None:
    a, b = factors()
    a[7, 5] = value
    found = multiply(a, b, NEAREST, product)
    assert not bool(found[5].isfinite().any())
    assert bool(found[:5].isfinite().all()) and bool(found[6:].isfinite().all())


@pytest.mark.parametrize("product", ["bfloat16", "int8", "float8"])
def test_zeros_make_zeros(product: str) -> None:
    a, b = factors()
    a[:, 5], b[:, 6] = 0, 1e-38
    found = multiply(a, b, NEAREST, product)
    assert not bool(found[5].any()) and bool(found.isfinite().all())


def test_blocks_of_a_product_are_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = factors()
    given = draws(a, b)
    whole = multiply(a, b, given, "int8")
    monkeypatch.setattr(low_precision, "_PRODUCT", 100)
    monkeypatch.setattr(low_precision, "_FEWEST", 7)
    assert torch.equal(multiply(a, b, given, "int8"), whole)


def test_compiled_rounding_to_float8_is_the_same() -> None:
    x, _ = factors(torch.bfloat16)
    given = torch.rand(150), torch.rand(24)
    (codes, scales), (others, same) = (
        round_columns(x, *given, "float8", compiled) for compiled in (False, True)
    )
    assert torch.equal(scales, same) and codes.dtype == others.dtype == torch.float8_e4m3fn
    assert float((codes.float() != others.float()).float().mean()) < 0.01


@pytest.mark.parametrize("dtype", FLOATS)
def test_compiled_rounding_is_the_same(dtype: torch.dtype) -> None:
    a, b = factors(dtype)
    for given in (NEAREST, draws(a, b)):
        wanted = multiply(a, b, given, "int8")
        found = multiply(a, b, given, "int8", compiled=True)
        scale = a.abs().amax(0).double()[:, None] / 127 * b.abs().amax(0).double() / 127
        # A product with a scale that is rounded otherwise in a fused loop may lie beyond a step, in few elements.
        assert bool(
            ((found.double() - wanted.double()).abs() <= 127 * 3 * scale + 1e-2 * wanted.abs().double()).all()
        )
        assert float((found != wanted).float().mean()) < 0.2


def test_more_rows_than_a_sum_of_32_bits_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = factors()
    monkeypatch.setattr(low_precision, "MOST_ROWS", 64)
    exact = a.double().T @ b.double()
    found = multiply(a, b, draws(a, b), "int8")
    assert bool(((found.double() - exact).abs() <= 4 * int8_bound(a, b)).all())
    assert low_precision.MOST_ROWS * 127**2 < 2**31


def test_a_peak_is_not_rounded_beyond_the_largest_code() -> None:
    """A peak times its inverse may be a little above 127, and the random number a little below one."""
    x = torch.rand(1, 10_000) + 0.1
    assert bool((x * (127 / x) > 127).any())
    codes, _ = round_columns(x, torch.full((1,), 1 - 2**-24), torch.zeros(10_000), "int8")
    assert bool((codes == 127).all())


def test_sums_do_not_overflow() -> None:
    a = torch.ones(2**17, 16)
    codes, scale = round_columns(a, None, None, "int8")
    found = multiply_codes(codes, scale, codes, scale, torch.float32)
    torch.testing.assert_close(found, torch.full((16, 16), 2.0**17))


def test_the_operations_are_the_functions() -> None:
    a, b = factors(torch.bfloat16)
    of_a, of_b = (
        ops.round_columns(x, *(torch.rand(size) for size in x.shape), "int8", None, False) for x in (a, b)
    )
    found = ops.multiply_codes(*of_a, *of_b, a.dtype, False)
    assert torch.equal(found, multiply_codes(*of_a, *of_b, a.dtype))
