"""Multiplications of the forward pass, and those that the backward pass does again, beside counts by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import wtacrs_fx
from wtacrs_fx import Policy, Report

EXACTLY = Policy(ratio=1.0, product="exact", residuals="exact")
ROWS, FEATURES, WIDE, LAYERS = 64, 16, 48, 3


def explained(model: nn.Module, x: Tensor, policy: Policy = EXACTLY) -> Report:
    return wtacrs_fx.explain(model, x, policy=policy)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(FEATURES, WIDE), nn.Linear(WIDE, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(nn.functional.gelu(self.up(x)))
        return y


def test_linears() -> None:
    report = explained(
        nn.Sequential(nn.Linear(FEATURES, WIDE), nn.Linear(WIDE, 8)), torch.randn(ROWS, FEATURES)
    )
    assert (report.work, report.work_again) == (ROWS * WIDE * (FEATURES + 8), 0)
    assert "again in the backward pass" not in str(report)


def test_convolutions() -> None:
    report = explained(nn.Conv2d(4, 8, 3, padding=1), torch.randn(2, 4, 10, 10))
    assert report.work == 2 * 8 * 100 * 4 * 9


@pytest.mark.parametrize("fields", [{"recompute_products": 1.0}, {"recompute": 1.0}])
@pytest.mark.parametrize("residuals", ["exact", "balanced"])
def test_what_is_done_again(fields: dict[str, float], residuals: str) -> None:
    """Of each layer the first linear: nothing reads what the second one makes."""
    model = nn.Sequential(*(Gated() for _ in range(LAYERS)))
    policy = Policy(ratio=1.0, product="exact", residuals=residuals, **fields)  # type: ignore[arg-type]
    report = explained(model, torch.randn(ROWS, FEATURES), policy)
    one = ROWS * FEATURES * WIDE
    assert (report.work, report.work_again) == (2 * LAYERS * one, LAYERS * one)
    assert (
        str(report).count("done again in the backward pass: 0.50 of the forward pass's multiplications") == 1
    )
    assert Report.from_dict(report.to_dict()) == report


def test_what_must_be_exact_is_made_of_what_is() -> None:
    """An exponential enlarges an error: its argument is computed again from the input, which is exact, alone."""

    class Growing(Gated):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = x + self.down(self.up(x).exp())
            return y

    model = nn.Sequential(*(Growing() for _ in range(LAYERS)))
    for residuals, layers in (("exact", LAYERS), ("balanced", 1)):
        policy = Policy(ratio=1.0, product="exact", residuals=residuals, recompute_products=1.0)  # type: ignore[arg-type]
        report = explained(model, torch.randn(ROWS, FEATURES), policy)
        assert report.work_again == layers * ROWS * FEATURES * WIDE


def test_checkpoints_of_the_program() -> None:
    class Checkpointed(Gated):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)  # type: ignore[no-any-return]

    model = nn.Sequential(*(Checkpointed() for _ in range(LAYERS)))
    for policy in (EXACTLY, Policy(ratio=1.0, product="exact")):
        report = explained(model, torch.randn(ROWS, FEATURES), policy)
        assert report.work_again == LAYERS * ROWS * FEATURES * WIDE


def test_attention() -> None:
    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return scaled_dot_product_attention(x, x, x)

    x = torch.randn(2, 4, ROWS, FEATURES, requires_grad=True)
    assert explained(Attention(), x).work == 2 * 4 * 2 * ROWS * ROWS * FEATURES
