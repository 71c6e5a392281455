"""Chains on the tangent path become one coefficient; what must not change does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import run_passes
from torch import Tensor, fx, nn
from torch.nn import functional as F

import wtacrs_fx
from wtacrs_fx import Policy
from wtacrs_passes.graph.cones import tangent_cone
from wtacrs_passes.graph.edit import copy_joint
from wtacrs_passes.graph.operations import aten
from wtacrs_passes.rewrite.merge_equal import merge_equal
from wtacrs_passes.rewrite.reassociate import gather_coefficients

X = torch.randn(40, 32)


class Chain(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.function = nn.Linear(32, 48, bias=False), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.up(x)).cumsum(0).sum()


def squared_relu(u: Tensor) -> Tensor:
    return F.relu(u) ** 2


def own_mish(u: Tensor) -> Tensor:
    return u * torch.tanh(F.softplus(u))


def masked(u: Tensor) -> Tensor:
    return torch.where(u.detach() > 0.5, u * torch.sigmoid(u), torch.tanh(u))


FUNCTIONS = (squared_relu, own_mish, F.silu, lambda u: torch.sin(u) * torch.cos(u) * u)


def joint(function: Callable[[Tensor], Tensor]) -> tuple[nn.Module, fx.GraphModule]:
    model = Chain(function)
    gm = copy_joint(wtacrs_fx.capture(model, X))
    run_passes(gm, merge_equal)
    return model, gm


def products(gm: fx.GraphModule) -> int:
    """Count the multiplications of gradients."""
    tangent = tangent_cone(gm.graph)
    found = [n for n in gm.graph.find_nodes(op="call_function", target=aten.mul.Tensor) if n in tangent]
    return len(found)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradients_stay_the_same_up_to_rounding(function: Callable[[Tensor], Tensor]) -> None:
    model, gm = joint(function)
    [weight] = model.parameters()
    primals = [
        weight if n.meta["val"].shape == weight.shape else X for n in gm.graph.find_nodes(op="placeholder")
    ]
    primals = primals[:-1]
    exact = gm(primals, [torch.tensor(1.0)])
    gather_coefficients(gm.graph, tangent_cone(gm.graph))
    gm.graph.lint()
    gm.recompile()
    for left, right in zip(gm(primals, [torch.tensor(1.0)]), exact, strict=True):
        if left is not None:
            torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)  # sums of 40 terms of size 1


@pytest.mark.parametrize("function", FUNCTIONS)
def test_one_multiplication_is_left_and_a_second_pass_changes_nothing(
    function: Callable[[Tensor], Tensor],
) -> None:
    _, gm = joint(function)
    gather_coefficients(gm.graph, tangent_cone(gm.graph))
    assert products(gm) == 1
    before = str(gm.graph)
    gather_coefficients(gm.graph, tangent_cone(gm.graph))
    assert str(gm.graph) == before


def test_a_gradient_that_others_read_stays() -> None:
    class Twice(Chain):
        def forward(self, x: Tensor) -> Tensor:
            u = self.up(x)
            v = torch.sin(u)  # its gradient is summed for the scale and multiplied for u
            return (torch.exp(v * self.scale) * 2).cumsum(0).sum()

    model = Twice(torch.sin)
    model.scale = nn.Parameter(torch.ones(48))
    gm = copy_joint(wtacrs_fx.capture(model, X))
    run_passes(gm, merge_equal)
    before = products(gm)
    gather_coefficients(gm.graph, tangent_cone(gm.graph))
    assert products(gm) == before


@pytest.mark.parametrize("function", [own_mish, lambda u: torch.sin(u) * torch.sigmoid(u)])
def test_a_chain_of_the_users_own_is_tabulated(function: Callable[[Tensor], Tensor]) -> None:
    report = wtacrs_fx.explain(Chain(function), X, policy=Policy(ratio=0.3, residuals="balanced"))
    if function is own_mish:
        assert [r.encoding for r in report.residuals if r.bytes_after] == ["table"]
    else:  # not constant for large arguments
        assert "table" not in {residual.encoding for residual in report.residuals}


def test_exact_and_lossless_graphs_are_left_alone() -> None:
    gm = wtacrs_fx.capture(Chain(own_mish), X)
    count = products(copy_joint(gm))
    for residuals in ("exact", "lossless"):
        rewritten = wtacrs_fx.transform(gm, Policy(residuals=residuals, ratio=1.0))
        assert products(rewritten) == count
    assert products(wtacrs_fx.transform(gm, Policy(residuals="balanced", ratio=1.0))) < count
