"""The predicted peak: by hand for small graphs, near the measured one for a compiled model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import wtacrs_fx
from wtacrs_fx import Policy
from wtacrs_fx.tools.measure import peak_bytes
from wtacrs_passes.policy import Rule
from wtacrs_passes.report import Peak, Report

POLICY = Policy(ratio=0.3)
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
        nn.Sequential(linear(), nn.Tanh(), nn.Sigmoid(), nn.ELU()),
        torch.randn(ROWS, FEATURES),
        Policy(ratio=0.3),
    )
    many = predicted(nn.Sequential(linear(), nn.Tanh()), torch.randn(ROWS, FEATURES), Policy(ratio=0.3))
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


@pytest.mark.sweep(0.34)
@pytest.mark.parametrize(
    ("policy", "most"),
    [
        (Policy(ratio=1.0, residuals="exact"), 0.25),
        (Policy(ratio=0.3, min_rows=8, residuals="small"), 0.25),
        (
            Policy(ratio=0.3, min_rows=8),
            0.35,
        ),  # a loop that packs codes is fused with what writes their source
    ],
    ids=["exact", "small", "default"],
)
def test_what_is_predicted_is_near_what_is_measured(policy: Policy, most: float) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(*[Block(64) for _ in range(3)]), torch.randn(2048, 64)
    _, after = predicted(model, x, policy)
    compiled = torch.compile(model, backend=wtacrs_fx.backend(policy))

    def step() -> None:
        model.zero_grad()
        compiled(x).square().sum().backward()

    step()
    measured = peak_bytes(step, torch.device("cpu"))
    assert -0.25 < after.size / measured - 1 < most


MANY = 32_768
"""Rows of a graph large enough for its peak to count."""


def test_what_would_raise_the_peak_is_not_done() -> None:
    x = torch.randn(MANY, 4 * FEATURES)
    model = nn.Linear(4 * FEATURES, 4 * FEATURES)
    report = wtacrs_fx.explain(model, x, policy=POLICY)  # x lives anyway; gathered rows of it are beside it
    assert not report.sampled
    assert report.peak_after == report.peak_before
    assert [each.partition(":")[0] for each in report.refused] == ["residuals 'balanced'", "sampled rows"]
    assert "1.31 of Inductor's), in the backward pass" in report.refused[0]
    assert f"not done, as it raises the predicted peak: {report.refused[0]}" in str(report)
    assert Report.from_dict(report.to_dict()) == report

    transformed = wtacrs_fx.transform(wtacrs_fx.capture(model, x), POLICY)
    assert transformed.report == report
    assert not [node for node in transformed.graph.nodes if "wtacrs" in str(node.target)]


def test_a_peak_that_allocators_do_not_see_is_not_raised() -> None:
    assert wtacrs_fx.explain(
        nn.Linear(4 * FEATURES, 4 * FEATURES), torch.randn(MANY // 8, 4 * FEATURES), policy=POLICY
    ).sampled


@pytest.mark.parametrize("is_part", [False, True])
def test_a_part_of_a_step_may_exchange_its_peak_for_what_it_saves(is_part: bool) -> None:
    model = nn.Sequential(nn.LayerNorm(4 * FEATURES), nn.Linear(4 * FEATURES, 4 * FEATURES))
    x = torch.randn(MANY, 4 * FEATURES, requires_grad=is_part)  # another graph reads its gradient
    report = wtacrs_fx.explain(model, x, policy=Policy(ratio=0.9))
    assert bool(report.refused) is not is_part
    if is_part:
        saved = report.saved_bytes_before - report.saved_bytes_after
        assert 0 < report.peak_after.size - report.peak_before.size < saved


def test_rules_do_not_bring_back_what_raises_the_peak() -> None:
    rules = (Rule("*", ratio=0.5, residuals="small"),)
    report = wtacrs_fx.explain(
        nn.Linear(4 * FEATURES, 4 * FEATURES),
        torch.randn(MANY, 4 * FEATURES),
        policy=Policy(ratio=0.3, rules=rules),
    )
    assert report.refused
    assert not report.sampled


class Head(nn.Module):
    """A loss whose gradient of the weight, summed in float32, is larger than its logits in 16 bits."""

    def __init__(self, features: int, words: int) -> None:
        super().__init__()
        self.head = nn.Linear(features, words, bias=False)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return nn.functional.cross_entropy(self.head(x).float(), labels)


def test_a_loss_in_chunks_is_not_given_up() -> None:
    with torch.device("meta"):
        model, x, labels = Head(512, 32_768), torch.randn(512, 512), torch.zeros(512, dtype=torch.int64)
    report = wtacrs_fx.explain(model, x, labels, policy=Policy(ratio=0.3, chunk_bytes=2**22))
    assert report.losses[0].chunk < 512
    assert report.peak_after.size > report.peak_before.size + 2**21
    assert report.refused == ()
