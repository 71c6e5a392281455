"""Tables: the optimum that was published, exact where the function is piecewise constant."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from wtacrs_passes.maths.tables import tabulate


def derivative(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def slope(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return torch.autograd.grad(function(x).sum(), x)[0]

    return slope


# Novikov et al. 2022 (arXiv 2202.00441), table of errors at 1 to 4 bits
PUBLISHED = {
    F.gelu: (0.1410, 0.0406, 0.0119, 0.0031),
    torch.sigmoid: (0.0181, 0.0038, 0.0009, 0.0002),
    F.silu: (0.2150, 0.0479, 0.0170, 0.0045),
    F.softplus: (0.2902, 0.0541, 0.0121, 0.0029),
    torch.tanh: (0.1584, 0.0319, 0.0073, 0.0017),
}


@pytest.mark.parametrize("function", PUBLISHED, ids=lambda f: f.__name__)
def test_the_error_is_the_published_one(function: Callable[[Tensor], Tensor]) -> None:
    for bits, error in enumerate(PUBLISHED[function], start=1):
        table = tabulate(derivative(function), bits)
        assert table is not None
        assert table.error == pytest.approx(error, abs=1.5e-4)


def test_relu_is_exact_in_one_bit() -> None:
    table = tabulate(derivative(F.relu), 4)
    assert table is not None
    assert (table.boundaries, table.values, table.bits, table.error) == ((0.0,), (0.0, 1.0), 1, 0.0)


@pytest.mark.parametrize("function", [torch.exp, torch.square, torch.reciprocal, torch.log])
def test_what_is_not_bounded_is_not_tabulated(function: Callable[[Tensor], Tensor]) -> None:
    assert tabulate(function, 4) is None
