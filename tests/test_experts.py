"""Products of rows in groups: the mathematics, and the rewrite of experts on joint graphs and compiled."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import RowsOnly, distance, gradients, is_unbiased, run_passes, step
from test_sample_rows import run_joint
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

import wtacrs_fx
from wtacrs_fx import Policy
from wtacrs_passes.graph.operations import GROUPED
from wtacrs_passes.maths import ops
from wtacrs_passes.rewrite.route_gradients import route_gradients
from wtacrs_passes.rewrite.spell_experts import spell_experts

OFFSETS = torch.tensor([5, 5, 12, 20], dtype=torch.int32)
"""Ends of groups of 5, 0, 7 and 8 rows."""


def by_group(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """Return ``a^T b`` of each group."""
    starts = [0, *offsets.tolist()[:-1]]
    return torch.stack([a[i:j].T @ b[i:j] for i, j in zip(starts, offsets.tolist(), strict=True)])


# The mathematics


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_products_of_groups_are_those_of_pytorch(dtype: torch.dtype) -> None:
    x, dy = torch.randn(24, 16).to(dtype), torch.randn(24, 8).to(dtype)
    weight = torch.randn(4, 16, 8).to(dtype)
    y, dw = ops.grouped_mm(x, weight, OFFSETS), ops.grouped_mm(x.T, dy, OFFSETS)
    torch.testing.assert_close(dw, by_group(x, dy, OFFSETS))
    assert not dw[1].any() and not y[20:].any()
    if dtype == torch.bfloat16:
        torch.testing.assert_close(y[:20], torch._grouped_mm(x, weight, OFFSETS)[:20])
        torch.testing.assert_close(dw, torch._grouped_mm(x.T, dy, OFFSETS))


def test_drawn_rows_are_sorted_with_their_scales_and_counted() -> None:
    indices, scales = torch.tensor([13, 2, 19, 6, 4, 22]), torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    found = ops.sort_rows(indices, scales, OFFSETS)
    assert found[0].tolist() == [2, 4, 6, 13, 19, 22]
    assert found[1].tolist() == [2.0, 5.0, 4.0, 1.0, 3.0, 6.0]
    assert found[2].tolist() == [2, 2, 3, 5] and found[2].dtype == OFFSETS.dtype


@pytest.mark.parametrize("product", ["int8", "float8"])
def test_factors_in_groups_are_rounded_without_bias(product: str) -> None:
    """A group's scale is its own: of one for all, the small rows of the first would be nothing but noise."""
    x, dy = torch.randn(24, 16), torch.randn(24, 8)
    x[:5] *= 1e-3
    x[20:], dy[20:] = torch.nan, torch.inf  # of no group
    exact = by_group(x, dy, OFFSETS)
    samples = []
    for _ in range(400):
        both = []
        for factor in (x, dy):
            draws = [torch.rand(size) for size in factor.shape]
            both += ops.round_groups(factor, *draws, OFFSETS, product, None, False)
        samples.append(ops.multiply_groups(*both, OFFSETS, torch.float32, False).flatten())
    found = torch.stack(samples).unflatten(1, exact.shape)
    for group in (0, 2, 3):
        error = (found[:, group] - exact[group]).square().sum((1, 2)).mean() / exact[group].square().sum()
        assert error < (1e-3 if product == "int8" else 1e-2), group
        # A product in float8 is returned in bfloat16, which is a rounding of its own to the nearest.
        if product == "int8":
            assert is_unbiased(found[:, group].flatten(1), exact[group].flatten()), group
    assert not found[:, 1].any()


def test_all_operations_have_fakes_that_agree() -> None:
    x, dy, offsets = torch.randn(24, 16), torch.randn(24, 8), OFFSETS
    codes = [ops.round_groups(each, None, None, offsets, "int8", None, False) for each in (x, dy)]
    for target, args in (
        (ops.grouped_mm, (x.T, dy, offsets)),
        (ops.grouped_mm, (x, torch.randn(4, 16, 8), offsets)),
        (ops.in_groups, (x.norm(dim=1), offsets)),
        (ops.sort_rows, (torch.randperm(24)[:9], torch.rand(9), offsets)),
        (ops.round_groups, (x, torch.rand(24), torch.rand(16), offsets, "int8", x, False)),
        (ops.multiply_groups, (*codes[0], *codes[1], offsets, torch.float32, False)),
    ):
        torch.library.opcheck(target, args, test_utils=("test_schema", "test_faketensor"))


# On joint graphs


class Groups(nn.Module):
    """Rows in groups of 4, 12, 20 and 28, and `others` behind them that hold NaN: [64 + others, 16] to a scalar."""

    def __init__(self, others: int = 0) -> None:
        super().__init__()
        self.others = others
        self.weight = nn.Parameter(torch.randn(4, 8, 16))

    def forward(self, x: Tensor) -> Tensor:
        offsets = (torch.arange(1, 5) ** 2 * 4).int()
        y = torch.ops.transformers.grouped_mm_fallback(x, self.weight.transpose(1, 2), offsets)
        return y[:64].tanh().square().mean() if self.others else y.tanh().square().mean()


POLICIES = {
    "forward": RowsOnly(ratio=0.25, min_rows=4, placement="forward"),
    "backward": RowsOnly(ratio=0.25, min_rows=4, placement="backward"),
    "centred": RowsOnly(ratio=0.25, min_rows=4, center=True),  # which is left out
    "int8": RowsOnly(ratio=1.0, product="int8"),
    "backward, int8": RowsOnly(ratio=0.25, min_rows=4, placement="backward", product="int8"),
}


@pytest.mark.parametrize("others", [0, 9])
@pytest.mark.parametrize("name", POLICIES)
def test_gradients_of_experts_are_estimated_without_bias(name: str, others: int) -> None:
    model, x = Groups(others), torch.randn(64 + others, 16) * torch.rand(64 + others, 1).exp()
    x[64:] = torch.nan
    joint = wtacrs_fx.capture(model, x)
    exact = run_joint(joint, model, x, 1)["weight"][0]
    assert exact.isfinite().all()
    policy = POLICIES[name]
    rewritten = wtacrs_fx.transform(joint, policy)
    [site] = [site for site in rewritten.report.sites if site.parameter == "weight"]
    assert bool(site.reason) == (policy.ratio == 1.0)
    assert site.product == ("int8" if policy.product else "exact")
    samples = run_joint(rewritten, model, x, 400)["weight"]
    assert samples.std(0).max() > 0
    assert is_unbiased(samples, exact)


def test_a_draw_takes_as_many_rows_as_asked_from_all_experts_together() -> None:
    model, x = Groups(), torch.randn(64, 16)
    rewritten = wtacrs_fx.transform(wtacrs_fx.capture(model, x), POLICIES["backward"])
    [site] = rewritten.report.sampled
    assert (site.rows, site.kept) == (64, 16)
    [product] = [
        node for node in rewritten.graph.nodes if node.target in GROUPED and node.meta["val"].dim() == 3
    ]
    assert [arg.meta["val"].shape[which] for arg, which in zip(product.args[:2], (1, 0), strict=True)] == [
        16,
        16,
    ]


def test_what_would_mix_experts_is_not_done() -> None:
    joint = wtacrs_fx.capture(Groups(), torch.randn(64, 16))
    for estimator in ("rmm-rademacher", "rmm-gaussian"):
        policy = RowsOnly(ratio=0.25, min_rows=4, estimator=estimator)
        [site] = [s for s in wtacrs_fx.transform(joint, policy).report.sites if s.parameter == "weight"]
        assert "several experts" in site.reason


def test_an_exact_policy_leaves_operations_of_others_alone() -> None:
    joint = wtacrs_fx.capture(Groups(), torch.randn(64, 16))
    for policy in (
        Policy(ratio=1.0, residuals="exact"),
        Policy(exclude=("*",)),
        Policy(ratio=1.0, residuals="lossless"),
    ):
        names = {str(node.target) for node in wtacrs_fx.transform(joint, policy).graph.nodes}
        assert "transformers.grouped_mm_fallback_backward.default" in names, policy


def config(**changes: Any) -> MixtralConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 128, "num_local_experts": 4, "num_experts_per_tok": 2}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 64}
    made = MixtralConfig(**{**sizes, **changes}, use_cache=False, attn_implementation="sdpa")
    made._experts_implementation = "grouped_mm"
    return made


class Routed(nn.Module):
    """The experts of Mixtral with their router: [2, 24, 32] to a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.block = MixtralSparseMoeBlock(config())
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        found = self.block(x)
        return (found[0] if isinstance(found, tuple) else found).tanh().square().mean()


def test_gradients_of_a_router_do_not_need_what_experts_return() -> None:
    model, x = Routed(), torch.randn(2, 24, 32)
    joint = wtacrs_fx.capture(model, x)
    exact = run_joint(joint, model, x, 1)
    saved = _residuals_of_experts(run_passes(joint, spell_experts).graph)
    routed = run_passes(joint, route_gradients)
    assert len(saved) == 2 and len(_residuals_of_experts(routed.graph)) == 1
    for name, found in run_joint(joint, model, x, 1).items():
        torch.testing.assert_close(found, exact[name], rtol=1e-4, atol=1e-6)


def _residuals_of_experts(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    """Return the results of experts in the forward pass that gradients are computed from."""
    from wtacrs_passes.graph.cones import tangent_cone

    tangent = tangent_cone(graph)
    forward = [node for node in graph.nodes if node.target in GROUPED and node not in tangent]

    def is_read(node: torch.fx.Node) -> bool:
        return any(user in tangent or (user.target.__name__ == "getitem" and is_read(user))
                   or (str(user.target).startswith("aten.split") and is_read(user)) for user in node.users)  # fmt: skip

    return [node for node in forward if is_read(node)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_they_do_as_a_small_weight_may_be_what_keeps_gradients_in_range(
    dtype: torch.dtype,
) -> None:
    model = Routed().to(dtype)
    report = wtacrs_fx.explain(model, torch.randn(2, 24, 32, dtype=dtype), policy=Policy(ratio=1.0))
    stored = [r for r in report.residuals if "grouped_mm" in r.operation and r.bytes_after]
    assert bool(stored) == (dtype == torch.float16)


# Compiled


BOUNDS = {
    torch.bfloat16: {
        Policy(ratio=1.0, product="int8"): 2e-3,
        Policy(ratio=0.5): 0.8,
    },
    torch.float32: {Policy(ratio=0.5, product="int8"): 0.8},
}
"""Largest squared error of all gradients, relative to their square."""


@pytest.mark.sweep(0.5)
@pytest.mark.parametrize("dtype", BOUNDS)
def test_a_model_of_experts_trains_with_few_bytes_and_the_right_gradients(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = MixtralForCausalLM(config(hidden_size=64)).to(dtype)
    tokens = torch.randint(64, (4, 32))

    def loss_of(model: nn.Module) -> Any:
        return lambda tokens: model(input_ids=tokens, labels=tokens).loss

    exact = step(model, loss_of(model), tokens)
    for policy, bound in BOUNDS[dtype].items():
        mine = copy.deepcopy(model)
        compiled = torch.compile(loss_of(mine), backend=wtacrs_fx.backend(policy), fullgraph=True)
        mine.zero_grad()
        compiled(tokens).backward()
        found = gradients(mine)
        assert found.keys() == exact.keys()
        assert distance(found, exact) < bound, (policy, distance(found, exact))
        report = wtacrs_fx.reports()[-1]
        sites = {site.parameter.rpartition(".")[2]: site for site in report.sites if "experts" in site.module}
        assert sites.keys() == {"gate_up_proj", "down_proj"}
        assert all(bool(site.reason) == (policy.ratio == 1.0) for site in sites.values())
        assert all(site.product == (policy.product or "exact") for site in sites.values())
        assert report.saved_bytes_after < 0.45 * report.saved_bytes_before
