"""Weight gradients in fewer bits on joint graphs: what is rounded, what is not and why. No compilation."""

from __future__ import annotations

import pytest
import torch
from conftest import Transformer, is_unbiased
from test_sample_rows import CASES, estimate, run_joint
from torch import Tensor, nn

import wtacrs_fx
from wtacrs_fx import Policy, Report, Rule
from wtacrs_passes.graph.cones import tangent_cone
from wtacrs_passes.maths.ops import multiply_codes, round_columns

ALL_ROWS = Policy(ratio=1.0, residuals="exact", min_features=1, product="int8")


def products(report: Report) -> dict[str, str]:
    return {site.parameter: site.product for site in report.sites}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ratio", [1.0, 0.25])
def test_products_are_rounded_without_bias(case: str, ratio: float) -> None:
    policy = Policy(ratio=ratio, min_rows=4, min_features=1, residuals="exact", product="int8")
    rewritten, exact, estimates = estimate(case, policy)
    rounded = rewritten.graph.find_nodes(op="call_function", target=multiply_codes)
    shown = [site.product for site in rewritten.report.sites]
    assert len(rounded) == shown.count("int8")
    for name, samples in estimates.items():
        noise = 1e-7 * exact[name].abs().max() * torch.randn_like(samples)  # some gradients have none
        assert is_unbiased(samples + noise, exact[name]), name


class Experts(nn.Module):
    """A batch of products, a narrow one, one that a rule leaves alone, and one in 8 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 32, 32))
        self.wide, self.narrow, self.left = nn.Linear(32, 32), nn.Linear(32, 8), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        mixed = torch.bmm(x.view(3, -1, 32), self.experts).view(-1, 32).tanh()
        return self.narrow(self.left(self.wide(mixed).tanh()).tanh()).square().mean()


def test_what_is_not_rounded_has_a_reason() -> None:
    joint = wtacrs_fx.capture(Experts(), torch.randn(96, 32))
    policy = Policy(ratio=1.0, product="int8", rules=(Rule("left", product="exact"),))
    assert products(wtacrs_fx.transform(joint, policy).report) == {
        "experts": "exact: a batch of products",
        "wide.weight": "int8",
        "narrow.weight": "exact: 8 features, fewer than min_features",
        "left.weight": "exact",
    }


def test_two_bytes_are_not_rounded_to_two_bytes() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh()).bfloat16()
    joint = wtacrs_fx.capture(model, torch.randn(64, 32, dtype=torch.bfloat16))
    report = wtacrs_fx.transform(joint, Policy(ratio=0.3, product="bfloat16")).report
    assert products(report) == {"0.weight": "exact: torch.bfloat16 has 16 bits already"}


def test_doubles_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh()).double()
    report = wtacrs_fx.transform(wtacrs_fx.capture(model, torch.randn(64, 32).double()), ALL_ROWS).report
    assert products(report) == {"0.weight": "exact: torch.float64 has no such product"}


class Deep(nn.Module):
    """Three layers whose gradients reach each other; tokens without a gradient; a weight that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(32, 48), nn.Linear(48, 40), nn.Linear(40, 32)
        self.scale = nn.Parameter(torch.rand(40, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        hidden = torch.tanh(nn.functional.linear(hidden, self.scale * self.second.weight, self.second.bias))
        return self.third(hidden)[8:].square().mean()


def test_gradients_of_inputs_are_rounded_without_bias() -> None:
    torch.manual_seed(0)
    model, x = Deep(), torch.randn(48, 32)
    joint = wtacrs_fx.capture(model, x)
    policy = Policy(ratio=1.0, residuals="exact", product_dx="int8")
    rewritten = wtacrs_fx.transform(joint, policy)
    report = rewritten.report
    assert [(entry.module, entry.product) for entry in report.input_gradients] == [
        ("third", "int8"),
        ("", "int8"),
    ]
    assert "gradients of inputs, int8: 2" in str(report)
    assert Report.from_dict(report.to_dict()) == report
    exact, samples = (run_joint(graph, model, x, n) for graph, n in ((joint, 1), (rewritten, 500)))
    for name, gradient in exact.items():
        rounded = not name.startswith("third")
        assert bool(samples[name].std(0).max() > 0) == rounded, name
        if rounded:
            assert is_unbiased(samples[name], gradient[0]), name
            error = (samples[name] - gradient).square().sum(-1).mean() / gradient.square().sum()
            assert float(error) < 1e-3, name


def test_layers_that_share_a_weight_round_it_apart() -> None:
    """The error of a layer's rounding is zero in the mean of the other's draws only if it is not the same."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.shared = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.shared(torch.tanh(self.shared(torch.tanh(self.first(x))))).square().mean()

    joint = wtacrs_fx.capture(Twice(), torch.randn(64, 32))
    rewritten = wtacrs_fx.transform(joint, Policy(ratio=1.0, residuals="exact", product_dx="int8"))
    rounded = rewritten.graph.find_nodes(op="call_function", target=round_columns)
    assert len(rounded) == 2 * len(rewritten.report.input_gradients) == 4
    assert len({node.args[1] for node in rounded} | {node.args[2] for node in rounded}) == 8


def test_products_that_share_a_factor_round_it_once() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleList(nn.Linear(32, 48) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return sum(head(x).square().mean() for head in self.heads)  # type: ignore[return-value]

    rewritten = wtacrs_fx.transform(wtacrs_fx.capture(Heads(), torch.randn(64, 32)), ALL_ROWS)
    assert len(rewritten.graph.find_nodes(op="call_function", target=round_columns)) == 4


def test_what_is_stored_is_rounded_when_its_gradient_is_there() -> None:
    """Else codes of all layers would be made as soon as the backward pass begins, and the peak be higher."""
    model = Transformer(d=64, layers=3), torch.randint(50, (16, 128))
    policy = Policy(ratio=1.0, product="int8", product_dx="int8", residuals="exact")
    rewritten = wtacrs_fx.transform(wtacrs_fx.capture(*model), policy)
    tangent = tangent_cone(rewritten.graph)
    rounded = rewritten.graph.find_nodes(op="call_function", target=round_columns)
    assert all(node in tangent for node in rounded)
    report = rewritten.report
    assert report.refused == ()
    assert {site.product for site in report.sites if site.module.startswith("layers")} == {"int8"}


def test_gradients_of_inputs_that_are_not_rounded_have_a_reason() -> None:
    joint = wtacrs_fx.capture(Experts(), torch.randn(96, 32))
    policy = Policy(ratio=1.0, product_dx="int8", rules=(Rule("left", product_dx="exact"),))
    report = wtacrs_fx.transform(joint, policy).report
    assert [(entry.module, entry.product) for entry in report.input_gradients] == [
        ("narrow", "exact: 8 features, fewer than min_features"),
        ("wide", "int8"),
    ]


@pytest.mark.parametrize("product", ["bfloat16", "int8", "float8"])
def test_all_else_is_as_it_was(product: str) -> None:
    """The loss, the gradient of the input and those of biases do not change by a bit."""
    model = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))
    x = torch.randn(64, 32)
    joint = wtacrs_fx.capture(model, x)
    rewritten = wtacrs_fx.transform(joint, Policy(ratio=1.0, residuals="exact", product=product))
    exact, found = (run_joint(graph, model, x, 1) for graph in (joint, rewritten))
    for name, gradient in exact.items():
        same = torch.equal(gradient, found[name])
        assert same == name.endswith("bias"), name
        torch.testing.assert_close(found[name], gradient, rtol=0.1, atol=0.1 * float(gradient.abs().max()))


def test_a_bad_precision_is_refused() -> None:
    with pytest.raises(wtacrs_fx.PolicyError, match="product must be one of .*did you mean 'int8'"):
        Policy(ratio=0.3, product="int9")  # type: ignore[arg-type]


def test_a_compiled_step(compiled: object) -> None:
    model, call, tokens, report = compiled(Policy(ratio=0.3, product="int8", product_dx="int8"))  # type: ignore[operator]
    assert {site.product for site in report.sites if not site.reason} == {"int8"}
    assert {entry.product for entry in report.input_gradients} == {"int8"}
    model.zero_grad()
    call(tokens).backward()
    first = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    call(tokens).backward()
    assert any(not torch.equal(first[name], p.grad) for name, p in model.named_parameters())
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())
