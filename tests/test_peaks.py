"""The predicted peak: by hand for small graphs, near the measured one for a compiled model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import wtacrs_fx
from wtacrs_fx import Policy
from wtacrs_fx.tools.measure import peak_bytes
from wtacrs_passes.report import Peak

ROWS, FEATURES = 256, 16
UNIT = ROWS * FEATURES * 4
WEIGHT = FEATURES * FEATURES * 4


def predicted(model: nn.Module, x: Tensor, policy: Policy) -> tuple[Peak, Peak]:
    report = wtacrs_fx.explain(model, x, policy=policy)
    assert report.peak_before is not None and report.peak_after is not None
    return report.peak_before, report.peak_after


def linear() -> nn.Linear:
    return nn.Linear(FEATURES, FEATURES, bias=False)


def test_the_gradient_of_two_linears() -> None:
    before, after = predicted(
        nn.Sequential(linear(), linear()), torch.randn(ROWS, FEATURES), Policy(ratio=1.0, residuals="exact")
    )
    # The second weight's gradient comes first and frees the hidden tensor, whose gradient is next.
    assert before.part == "backward"
    assert before.size == 2 * UNIT + WEIGHT
    assert after == before


def test_loops_take_memory_where_something_else_reads_them() -> None:
    few = predicted(
        nn.Sequential(linear(), nn.Tanh(), nn.Sigmoid(), nn.ELU()), torch.randn(ROWS, FEATURES), Policy()
    )
    many = predicted(nn.Sequential(linear(), nn.Tanh()), torch.randn(ROWS, FEATURES), Policy())
    assert few[0].size == many[0].size


class Block(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = (
            nn.LayerNorm(features),
            nn.Linear(features, 4 * features),
            nn.Linear(4 * features, features),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


@pytest.mark.parametrize(
    "policy", [Policy(ratio=1.0, residuals="exact"), Policy(min_rows=8)], ids=["exact", "default"]
)
def test_what_is_predicted_is_near_what_is_measured(policy: Policy) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(*[Block(64) for _ in range(3)]), torch.randn(2048, 64)
    _, after = predicted(model, x, policy)
    compiled = torch.compile(model, backend=wtacrs_fx.backend(policy))

    def step() -> None:
        model.zero_grad()
        compiled(x).square().sum().backward()

    step()
    measured = peak_bytes(step, torch.device("cpu"))
    assert abs(after.size / measured - 1) < 0.25
