"""Pinning and verification: no memory budget and no sabotage may yield wrong gradients silently."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from conftest import RowsOnly, Transformer, adds_up, is_unbiased, run_passes, slopes, step
from torch import fx

import wtacrs_fx
from wtacrs_fx import PartitionError, Policy, Rule
from wtacrs_passes import partition
from wtacrs_passes.graph.cones import value_numbers
from wtacrs_passes.graph.edit import copy_joint
from wtacrs_passes.graph.torch_api import CheckpointPolicy, inductor_prims
from wtacrs_passes.lower.lower_noise import lower_noise
from wtacrs_passes.maths.ops import choose_rows
from wtacrs_passes.rewrite.sample_rows import SampledSite

FORWARD = RowsOnly(min_rows=8, placement="forward")


class Plain(torch.nn.Module):
    """X is read by nothing but the product: only its rows are stored."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(16, 64, bias=False), torch.nn.Linear(64, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x)).square().mean()


X = torch.randn(128, 16)


def test_rows_are_stored_instead_of_the_residual() -> None:
    report = wtacrs_fx.explain(Plain(), X, policy=FORWARD)
    second = next(site for site in report.sites if site.module == "second")
    assert (second.encoding, second.bytes_before) == ("rows", 128 * 64 * 4)
    assert second.bytes_after == 39 * 64 * 4 + 39 * 8  # rows that are scaled already, indices
    assert adds_up(report)


def draw_again(site: SampledSite, stores_rows: bool) -> list[fx.Node]:
    """Pin nothing and have the rows drawn in both passes: what a careless partition would do."""
    for node in (site.draw, *site.draw.users, site.draw.args[1]):
        node.meta.update(recompute=CheckpointPolicy.MUST_RECOMPUTE, ac_graph_id=0)
    return []


def test_a_second_draw_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partition, "pinned_nodes", draw_again)
    with pytest.raises(PartitionError, match="second"):
        wtacrs_fx.explain(Plain(), X, policy=FORWARD)


def test_the_backend_refuses_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partition, "pinned_nodes", draw_again)
    with torch._inductor.config.patch(force_disable_caches=True), pytest.raises(Exception, match="second"):
        torch.compile(Plain(), backend=wtacrs_fx.backend(FORWARD))(X)


def test_rows_of_a_residual_that_is_saved_anyway_are_not_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the plan errs about what the backward pass has at hand, the partition corrects it."""
    from wtacrs_passes.decide import rows

    monkeypatch.setattr(rows, "available_in_backward", lambda *_: set())
    report = wtacrs_fx.explain(Transformer(), torch.randint(50, (4, 32)), policy=FORWARD)
    out = next(site for site in report.sites if site.module == "layers.0.out")
    assert out.encoding == "exact"  # attention saves its output


@pytest.mark.parametrize("placement", ["forward", "backward"])
@pytest.mark.parametrize("budget", [0.9, 0.5, 0.1, 0.0])
def test_the_partition_holds_at_any_memory_budget(budget: float, placement: str) -> None:
    policy = RowsOnly(min_rows=8, placement=placement)
    with torch._functorch.config.patch(activation_memory_budget=budget):
        wtacrs_fx.explain(Transformer(), torch.randint(50, (4, 32)), policy=policy)
        wtacrs_fx.explain(Plain(), X, policy=policy)


@pytest.mark.parametrize("residuals", ["lossless", "balanced"])
@pytest.mark.parametrize("budget", [0.9, 0.5, 0.1, 0.0])
def test_encodings_go_with_any_memory_budget(budget: float, residuals: str) -> None:
    policy = Policy(ratio=0.3, min_rows=8, residuals=residuals)
    with torch._functorch.config.patch(activation_memory_budget=budget):
        model = Transformer(dropout=0.1 if budget else 0.0)
        report = wtacrs_fx.explain(model, torch.randint(50, (4, 32)), policy=policy)
    if budget >= 0.5:  # below, products are computed again from inputs and hardly anything is stored
        assert report.saved_bytes_after < 0.8 * report.saved_bytes_before
    assert adds_up(report)


@pytest.mark.sweep(0.5)
@pytest.mark.parametrize("budget", [0.9, 0.2])
def test_dropout_is_the_same_at_any_memory_budget(budget: float) -> None:
    """PyTorch draws other masks in the backward pass (pytorch#190758): slopes are off by a tenth."""
    torch.manual_seed(0)
    model, tokens = Transformer(dropout=0.5), torch.randint(50, (4, 32))
    compiled = torch.compile(model, backend=wtacrs_fx.backend(Policy(ratio=1.0)))
    with torch._functorch.config.patch(activation_memory_budget=budget):
        found, wanted = slopes(model, lambda: compiled(tokens))
    assert (found - wanted).norm() < 0.02 * wanted.norm()


def test_dropout_is_refused_where_all_is_computed_again() -> None:
    """At a budget of 0 the partitioner keeps inputs alone, whatever is pinned."""
    with (
        torch._functorch.config.patch(activation_memory_budget=0.0),
        pytest.raises(PartitionError, match="activation_memory_budget above 0"),
    ):
        wtacrs_fx.explain(Transformer(dropout=0.1), torch.randint(50, (4, 32)), policy=Policy(ratio=1.0))


def test_gradients_stay_unbiased_where_matrix_products_are_recomputed() -> None:
    torch.manual_seed(0)
    model = Plain()
    other = copy.deepcopy(model)
    exact = step(other, other, X)
    call = torch.compile(model, backend=wtacrs_fx.backend(FORWARD))
    with torch._functorch.config.patch(activation_memory_budget=0.1):
        step(model, call, X)
    runs = [step(model, call, X) for _ in range(300)]
    for name, gradient in exact.items():
        assert is_unbiased(torch.stack([run[name].flatten() for run in runs]), gradient.flatten()), name


MIXED = RowsOnly(min_rows=8, placement="forward", rules=(Rule("layers.0.down", placement="backward"),))


def lowered() -> fx.GraphModule:
    from wtacrs_passes.graph.torch_api import run_joint_graph_passes
    from wtacrs_passes.pipeline import REWRITES

    joint = wtacrs_fx.capture(Transformer(dropout=0.1), torch.randint(50, (4, 32)))
    gm = run_joint_graph_passes(copy_joint(joint))
    gm.meta.update(joint.meta)
    return run_passes(gm, *REWRITES, lower_noise, policy=MIXED).gm


def test_draws_share_neither_seeds_with_dropout_nor_numbers_with_each_other() -> None:
    gm = lowered()
    [seeds] = gm.graph.find_nodes(op="call_function", target=inductor_prims.seeds)
    lookups = gm.graph.find_nodes(op="call_function", target=inductor_prims.lookup_seed)
    indices = [node.args[1] for node in lookups]
    assert len(indices) == len(set(indices)) == seeds.args[0] == 2 + 2  # dropouts, placements
    noises = [node.args[1].args for node in gm.graph.find_nodes(op="call_function", target=choose_rows)]
    assert len(set(noises)) == 5
    assert not gm.graph.find_nodes(op="call_function", target=torch.ops.aten.rand.default)


def test_numbers_of_draws_are_not_merged() -> None:
    numbers: Callable = value_numbers
    gm = lowered()
    random = gm.graph.find_nodes(op="call_function", target=inductor_prims.random)
    assert len({numbers(gm.graph)[node] for node in random}) == len(random)
