from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from wtacrs_passes.maths import estimators, triton_kernels
from wtacrs_passes.maths.estimators import NOISE

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and torch.__version__ < (2, 12),
    reason="the interpreter of Triton 3.6 fails with NumPy 2.4",
)


def expected(
    weights: torch.Tensor, noise: torch.Tensor, kept: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the mathematics in plain torch draws, with the order of the GPU."""
    monkeypatch.setattr(estimators, "_shuffled", estimators.random_order)
    return estimators.choose_rows(weights, noise, kept, "wta-systematic")


@pytest.mark.parametrize(
    ("rows", "kept"), [(1, 1), (7, 3), (60, 18), (60, 60), (1000, 100), (8192, 800), (9001, 2700)]
)
@pytest.mark.parametrize("pair", [False, True])
def test_the_kernel_draws_as_the_oracle(
    rows: int, kept: int, pair: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(rows)
    factors = [torch.randn(2, rows).exp() for _ in range(1 + pair)]
    factors[0][0, ::3] = 0  # among them more zeros than rows to keep
    weights = factors[0].double() * (factors[1].double() if pair else 1)
    noise = torch.rand(2, NOISE)
    indices, scales = triton_kernels.choose_rows([f.to(DEVICE) for f in factors], noise.to(DEVICE), kept)
    indices_, scales_ = expected(weights, noise, kept, monkeypatch)
    assert indices.dtype == torch.int64 and scales.dtype == torch.float32
    torch.testing.assert_close(scales.cpu(), scales_)
    assert torch.equal(indices.cpu(), indices_)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("count", [1, 17, 18, 19, 60])
def test_weights_that_are_not_finite(bad: float, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, noise = torch.rand(60), torch.rand(NOISE)
    weights[:count] = bad
    indices, scales = triton_kernels.choose_rows([weights.to(DEVICE)], noise.to(DEVICE), 18)
    indices_, scales_ = expected(weights, noise, 18, monkeypatch)
    torch.testing.assert_close(scales.cpu(), scales_, equal_nan=True)
    if count <= 18:
        assert torch.equal(indices.cpu(), indices_)


def test_weights_of_any_size_and_none_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = torch.rand(NOISE)
    for weights in (torch.zeros(50), 1e-40 * torch.rand(50).double(), 1e300 * torch.rand(50).double()):
        indices, scales = triton_kernels.choose_rows([weights.to(DEVICE)], noise.to(DEVICE), 20)
        indices_, scales_ = expected(weights, noise, 20, monkeypatch)
        assert torch.equal(indices.cpu(), indices_)
        torch.testing.assert_close(scales.cpu(), scales_)


def test_the_kernel_is_unbiased() -> None:
    """Each row is kept with its probability: counts of 4000 draws within 5 standard deviations."""
    weights = torch.randn(60).exp()
    runs = 400 if DEVICE == "cpu" else 4000
    indices, scales = triton_kernels.choose_rows(
        [weights.expand(runs, -1).to(DEVICE)], torch.rand(runs, NOISE).to(DEVICE), 18
    )
    q = estimators.inclusion_probabilities(weights.double(), 18)
    counts = torch.bincount(indices.cpu()[scales.cpu() > 0].flatten(), minlength=60) / runs
    assert ((counts - q).abs() <= 5 * (q * (1 - q) / runs).sqrt() + 1e-12).all()
