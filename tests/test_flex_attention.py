"""``flex_attention`` with functions of scores and masks: its residuals in few bits. No code is generated: CPUs lack it.

PyTorch refuses gradients of it on CPUs, for Inductor has no kernel; what the graph says is computed all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from aot import REFERENCE, Variants, distance, small_tensors, wrong_bytes
from torch import Tensor, nn
from torch.nn.attention import flex_attention as flex

from wtacrs_fx import Policy, Report

Score = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

TOKENS, WINDOW = 256, 64
DOCUMENTS = torch.arange(TOKENS) // 100


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(flex, "_validate_device", lambda *operands: None)
    with small_tensors():
        yield


class Attention(nn.Module):
    """A pre-norm layer with four heads, two of keys: [2, 256, 64] to a scalar."""

    def __init__(self, score: Score | None, bias: bool = False) -> None:
        super().__init__()
        self.score = score
        self.norm = nn.LayerNorm(64)
        self.q, self.k, self.v, self.out = (nn.Linear(64, width) for width in (64, 32, 32, 64))
        self.sinks = nn.Parameter(torch.randn(4)) if bias else None

    def forward(self, x: Tensor, mask: flex.BlockMask) -> Tensor:
        h = self.norm(x)
        q, k, v = (f(h).unflatten(-1, (-1, 16)).transpose(1, 2) for f in (self.q, self.k, self.v))
        score = self.score
        if self.sinks is not None:
            sinks = self.sinks

            def score(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                return torch.where(j == 0, score + sinks[h], score)

        heads = flex.flex_attention(q, k, v, score_mod=score, block_mask=mask, enable_gqa=True)
        return (x + self.out(heads.transpose(1, 2).flatten(2))).square().mean()


def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j


def window(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (i >= j) & (i - j < WINDOW)


def packed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (i >= j) & (DOCUMENTS[i] == DOCUMENTS[j])


SCORES: dict[str, Score | None] = {
    "none": None,
    "soft cap": lambda score, b, h, i, j: 20 * torch.tanh(score / 20),
    "distance": lambda score, b, h, i, j: score + 0.1 * (j - i),
}
MASKS = {"causal": causal, "sliding window": window, "packed documents": packed}
CASES = [
    ("none", "causal"),
    ("soft cap", "sliding window"),
    ("distance", "packed documents"),
    ("sinks", "causal"),
]


def found(score: str, mask: str, policies: dict[str, Policy]) -> tuple[dict[str, Tensor], dict[str, Report]]:
    """Return gradients by policy, one after the other, and reports."""
    model = Attention(None, bias=True) if score == "sinks" else Attention(SCORES[score])
    x = torch.randn(2, TOKENS, 64)
    block_mask = flex.create_block_mask(MASKS[mask], None, None, TOKENS, TOKENS, device="cpu")
    variants = Variants(policies)
    call = torch.compile(model, backend=variants, fullgraph=True)
    gradients = {}
    for variants.active in (REFERENCE, *policies):
        model.zero_grad()
        call(x, block_mask).backward()
        gradients[variants.active] = torch.cat([p.grad.flatten() for p in model.parameters()])
    [graph] = variants.graphs
    assert not wrong_bytes(graph)
    return gradients, {name: graph.partitions[name].report for name in policies}


@pytest.mark.parametrize(("score", "mask"), CASES)
def test_its_operands_are_stored_in_few_bits_and_it_is_computed_again(score: str, mask: str) -> None:
    policies = {"exact": Policy(ratio=1.0, residuals="exact"), "balanced": Policy(ratio=1.0)}
    gradients, reports = found(score, mask, policies)
    assert gradients["exact"].equal(gradients[REFERENCE])
    assert distance(gradients["balanced"], gradients[REFERENCE]) < 0.01
    report = reports["balanced"]
    assert report.saved_bytes_after < 0.4 * report.saved_bytes_before
    rounded = {each.operation for each in report.residuals if each.encoding.startswith("int")}
    assert rounded and "flex_attention" not in {
        each.operation for each in report.residuals if each.bytes_after
    }


def test_where_a_function_of_scores_may_make_an_error_a_large_one_all_is_exact(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(SCORES, "steep", lambda score, b, h, i, j: torch.exp(3 * score))
    gradients, reports = found("steep", "causal", {"balanced": Policy(ratio=1.0)})
    reasons = [each.gradient for each in reports["balanced"].residuals]
    assert sum("function of scores" in reason for reason in reasons) >= 3
    assert gradients["balanced"].isfinite().all()
