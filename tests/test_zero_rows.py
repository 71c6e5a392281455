"""Rows of gradients that are proven to be zero are zero, and what is not proven is not claimed."""

from __future__ import annotations

import pytest
import torch
from conftest import RowsOnly, is_unbiased, run_passes
from torch import Tensor, fx, nn
from torch.nn import functional as F

import wtacrs_fx
from wtacrs_passes.analyse.zero_rows import zero_rows
from wtacrs_passes.graph.cones import tangent_cone
from wtacrs_passes.rewrite.merge_equal import merge_equal

BATCH, LENGTH, D = 3, 16, 8
X = torch.randn(BATCH, LENGTH, D, generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(LENGTH) < torch.tensor([[16], [5], [9]])).long()
LABELS = torch.randint(6, (BATCH, LENGTH)).masked_fill(MASK == 0, -100)


class Head(nn.Module):
    """Rows by themselves up to a loss; `kind` says how some are left out, or why none is."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.first, self.second, self.last = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 6)
        self.norm = nn.LayerNorm(D)

    def forward(self, x: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        h = x + self.second(F.gelu(self.first(x)))
        if self.kind == "attention":
            h = F.scaled_dot_product_attention(h, h, h)
        y = self.last(self.norm(h))
        column = attention_mask.unsqueeze(-1)
        if self.kind == "labels" or self.kind == "attention":
            return F.cross_entropy(y.flatten(0, 1), labels.flatten())
        if self.kind == "pooled":
            return ((y * column).sum(1) / column.sum(1)).square().mean()
        if self.kind == "weighted":
            return (y.square() * (column * torch.rand(LENGTH, 1))).sum()
        if self.kind == "where":
            return torch.where(column != 0, y.square(), 0.0).mean()
        if self.kind == "two losses":
            return (y * column).square().sum() + y[..., 0].sum()
        if self.kind == "transposed":
            return (y.transpose(0, 1) * torch.ones(LENGTH, BATCH, 1, dtype=torch.long)).square().mean()
        if self.kind == "elements":
            return (y * (labels.unsqueeze(-1) > torch.arange(6))).square().mean()
        return y.square().mean()


PROVEN = {
    "labels": "labels != -100",
    "pooled": "attention_mask",
    "weighted": "attention_mask",
    "where": "attention_mask != 0",
}


def values(model: nn.Module) -> tuple[fx.GraphModule, dict[str, Tensor]]:
    """Return the joint graph and the values of all its nodes, from real inputs."""
    gm = wtacrs_fx.capture(model, X, MASK, LABELS)
    run_passes(gm, merge_equal)
    names = {known.index: known for known in gm.meta["wtacrs_static_inputs"]}
    parameters = dict(model.named_parameters())
    primals = []
    for i, node in enumerate(n for n in gm.graph.find_nodes(op="placeholder") if "tangents" not in n.name):
        if i in names:
            primals.append(MASK if names[i].kind == "mask" else parameters[names[i].name])
        else:
            primals.append(LABELS if node.meta["val"].dtype == torch.long else X)
    found: dict[str, Tensor] = {}

    class Keep(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            found[n.name] = result = super().run_node(n)
            return result

    Keep(gm).run(*primals, torch.ones(()))
    return gm, found


@pytest.mark.parametrize("kind", [*PROVEN, "two losses", "transposed", "elements", "attention", "mean"])
def test_what_is_proven_is_true(kind: str) -> None:
    gm, found = values(Head(kind))
    proven = zero_rows(gm.graph, tangent_cone(gm.graph))
    for node, conditions in proven.items():
        rows = found[node.name].detach().flatten(0, -2)
        for condition in conditions:
            left_out = found[condition.name].flatten() == 0
            assert left_out.any() or kind == "transposed"
            assert not rows[left_out].any(), (node, condition)
    # gradients of the inputs of `last` and `second`; that of `first` needs none
    products = [node for node in proven if node.target is torch.ops.aten.mm.default]
    assert len(products) == {"attention": 1}.get(kind, 2 if kind in PROVEN else 0)


@pytest.mark.parametrize("kind", PROVEN)
def test_the_report_names_the_condition(kind: str) -> None:
    report = wtacrs_fx.explain(Head(kind), X, MASK, LABELS, policy=RowsOnly(placement="forward", min_rows=4))
    weights = {site.weights for site in report.sampled}
    assert len(report.sampled) == 3 and len(weights) == 1
    assert weights == {f"||x||, zero unless {PROVEN[kind]}"}


class SequenceFirst(nn.Module):
    """Rows in the order [LENGTH, BATCH], with a mask [BATCH, LENGTH]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(D, 6)

    def forward(self, x: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        y = self.linear(x.view(LENGTH, BATCH, D))
        return (y * attention_mask.t().unsqueeze(-1)).square().mean()


def test_a_transposed_mask_does_not_leave_out_other_rows() -> None:
    policy = RowsOnly(placement="forward", min_rows=4)
    report = wtacrs_fx.explain(SequenceFirst(), X, MASK, LABELS, policy=policy)
    [site] = report.sampled
    # the mask in the order of the rows, not as it came in
    assert site.weights.startswith("||x||, zero unless permute")


class TwoHeads(nn.Module):
    """Two linears that share an input: one loss ignores labels, the other counts every row."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.masked, self.whole = nn.Linear(D, 6), nn.Linear(D, 6)

    def forward(self, x: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        loss = self.whole(x).square().mean()
        return loss + F.cross_entropy(self.masked(x).flatten(0, 1), labels.flatten())


def test_a_proof_for_one_product_is_none_for_another_that_shares_its_input() -> None:
    model = TwoHeads()
    policy = RowsOnly(placement="forward", min_rows=4)
    report = wtacrs_fx.explain(model, X, MASK, LABELS, policy=policy)
    assert {site.module: site.weights for site in report.sampled} == {
        "masked": "||x||, zero unless labels != -100",
        "whole": "||x||",
    }
    model(X, MASK, LABELS).backward()
    exact = model.whole.weight.grad.flatten().clone()
    call = torch.compile(model, backend=wtacrs_fx.backend(policy))
    samples = []
    for _ in range(400):
        model.zero_grad()
        call(X, MASK, LABELS).backward()
        samples.append(model.whole.weight.grad.flatten().clone())
    assert is_unbiased(torch.stack(samples), exact)


def test_attention_ends_the_proof() -> None:
    policy = RowsOnly(placement="forward", min_rows=4)
    report = wtacrs_fx.explain(Head("attention"), X, MASK, LABELS, policy=policy)
    assert {site.module: site.weights for site in report.sampled} == {
        "last": "||x||, zero unless labels != -100",
        "first": "||x||, 1/64 unless attention_mask",
        "second": "||x||, 1/64 unless attention_mask",
    }


def test_rows_left_out_are_never_drawn() -> None:
    """The estimate is the same whatever the masked rows of X hold."""
    model = Head("labels")
    call = torch.compile(model, backend=wtacrs_fx.backend(RowsOnly(placement="forward", min_rows=4)))
    gradients = []
    for fill in (1.0, 1000.0):
        x = torch.where(MASK.unsqueeze(-1) != 0, X, fill)
        torch.manual_seed(3)
        model.zero_grad()
        call(x, MASK, LABELS).backward()
        gradients.append(model.first.weight.grad.clone())
    torch.testing.assert_close(*gradients)
