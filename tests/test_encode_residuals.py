"""The backward pass reads decoded residuals: bytes at run time, gradients within their bounds."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from conftest import Transformer, is_unbiased, step
from torch import Tensor, fx, nn
from torch._functorch.aot_autograd import aot_module_simplified
from torch._functorch.compilers import nop
from torch._inductor.decomposition import select_decomp_table
from torch.nn import functional as F

import wtacrs_fx
from wtacrs_fx import PartitionError, Policy
from wtacrs_fx.backend import lifted_inputs
from wtacrs_fx.tools.measure import saved_bytes
from wtacrs_passes import pipeline
from wtacrs_passes.maths.encodings import group_size
from wtacrs_passes.pipeline import WtacrsPartitioner
from wtacrs_passes.rewrite import encode_residuals

ALL = {residuals: Policy(residuals=residuals, ratio=1.0) for residuals in ("lossless", "balanced", "small")}


class Mlp(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor] = F.gelu) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 32)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.function(self.up(x))).square().sum()


@dataclasses.dataclass
class Run:
    """One compiled model with dropout, and the gradients of its first step."""

    model: nn.Module
    call: Callable[[Tensor], Tensor]
    tokens: Tensor
    gradients: dict[str, Tensor]
    report: wtacrs_fx.Report | None


@pytest.fixture(scope="module")
def runs() -> dict[str, Run]:
    torch.manual_seed(0)
    model, tokens = Transformer(dropout=0.1), torch.randint(50, (4, 32))
    found = {}
    for name, backend in {
        "inductor": "inductor",
        **{k: wtacrs_fx.backend(p) for k, p in ALL.items()},
    }.items():
        mine = copy.deepcopy(model)
        call = torch.compile(mine, backend=backend)
        torch.manual_seed(1)
        gradients = step(mine, call, tokens)
        report = None if name == "inductor" else wtacrs_fx.reports()[-1]
        found[name] = Run(mine, call, tokens, gradients, report)
    return found


def relative_error(gradients: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    error = sum(float((gradients[name] - exact[name]).square().sum()) for name in exact)
    return (error / sum(float(g.square().sum()) for g in exact.values())) ** 0.5


def test_lossless_is_bit_identical(runs: dict[str, Run]) -> None:
    exact = runs["inductor"].gradients
    for name, gradient in runs["lossless"].gradients.items():
        if name != "embed.weight":  # Inductor adds its rows in any order
            assert torch.equal(gradient, exact[name]), name


@pytest.mark.parametrize(("residuals", "bound"), [("balanced", 0.1), ("small", 0.3)])
def test_lossy_modes_are_close_and_not_exact(runs: dict[str, Run], residuals: str, bound: float) -> None:
    """Steps of 1/254 and 1/14 of the peak, about 3 standard deviations: 0.006 and 0.12 of an element."""
    assert 1e-4 < relative_error(runs[residuals].gradients, runs["inductor"].gradients) < bound


def test_the_forward_pass_is_the_same(runs: dict[str, Run]) -> None:
    losses = []
    for run in runs.values():
        torch.manual_seed(2)
        losses.append(run.call(run.tokens).item())
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-6)


def test_the_bytes_kept_at_run_time_are_those_of_the_report(runs: dict[str, Run]) -> None:
    sizes = {}
    for name, run in runs.items():
        owned = [*run.model.parameters(), *run.model.buffers(), run.tokens]
        sizes[name] = saved_bytes(lambda run=run: run.call(run.tokens), owned)
        if run.report:
            assert sizes[name] == pytest.approx(run.report.saved_bytes_after, rel=0.02)
    assert sizes["small"] < sizes["balanced"] < 0.4 * sizes["inductor"]


@pytest.mark.parametrize("residuals", ["balanced", "small"])
def test_gradients_of_an_mlp_keep_their_bound(residuals: str) -> None:
    """|d gelu'| <= 0.8 |du| and |d gelu| <= 1.13 |du|, where du is half a step of the group."""
    model, x = Mlp(), torch.randn(48, 64)
    exact = step(model, model, x)
    found = step(model, torch.compile(model, backend=wtacrs_fx.backend(ALL[residuals])), x)
    u = model.up(x)
    groups = u.unflatten(-1, (-1, group_size(128, 4)))
    du = (groups.abs().amax(-1, keepdim=True) / 14).expand_as(groups).flatten(1).detach()
    dy = 2 * model.down(F.gelu(u)).detach()
    t = (dy @ model.down.weight).detach().abs()
    bounds = {"up.weight": (0.8 * du * t).T @ x.abs(), "down.weight": dy.abs().T @ (1.13 * du)}
    for name, bound in bounds.items():
        error = (found[name] - exact[name]).abs()
        assert bool((error <= bound + 1e-4).all()), name
        assert float((error / bound).max()) > 0.01  # the bound says something


def test_stochastic_rounding_leaves_gradients_unbiased() -> None:
    class Bilinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return (self.a(x) * self.b(x)).sum()  # gradients are linear in what is stored

    model, x = Bilinear(), torch.randn(40, 32)
    exact = step(model, model, x)
    policy = Policy(residuals="small", rounding="stochastic", ratio=1.0)
    call = torch.compile(model, backend=wtacrs_fx.backend(policy))
    samples = [step(model, call, x) for _ in range(300)]
    for name, gradient in exact.items():
        assert is_unbiased(torch.stack([run[name].flatten() for run in samples]), gradient.flatten()), name
    assert not torch.equal(samples[0]["a.weight"], samples[1]["a.weight"])


def test_integer_rows_of_the_forward_pass_leave_gradients_unbiased() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(32, 64), nn.Linear(64, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x)).sum()

    model, x = Plain(), torch.randn(128, 32)
    exact = step(model, model, x)
    policy = Policy(ratio=0.3, residuals="balanced", placement="forward", rounding="stochastic")
    call = torch.compile(model, backend=wtacrs_fx.backend(policy))
    samples = [step(model, call, x) for _ in range(300)]
    for name in ("first.weight", "second.weight"):
        runs = torch.stack([run[name].flatten() for run in samples])
        assert is_unbiased(runs, exact[name].flatten()), name
    assert "int8" in {residual.encoding for residual in wtacrs_fx.reports()[-1].residuals}


def backward_graph(model: nn.Module, policy: Policy, *inputs: Tensor) -> fx.Graph:
    graphs = []
    rewrite_and_partition = pipeline.rewrite_and_partition

    def spy(*args: Any) -> pipeline.Rewritten:
        rewritten = rewrite_and_partition(*args)
        graphs.append(rewritten.parts[1].graph)
        return rewritten

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "rewrite_and_partition", spy)
        wtacrs_fx.explain(model, *inputs, policy=policy)
    return graphs[0]


@pytest.mark.parametrize(("residuals", "again"), [("balanced", 0), ("small", 2)])
def test_no_product_is_computed_again_and_attention_where_bytes_come_first(
    residuals: Any, again: int
) -> None:
    """Two products for each linear layer (embeddings need a gradient too), two attentions."""
    graph = backward_graph(
        Transformer(layers=2), Policy(ratio=0.3, residuals=residuals, min_rows=8), torch.randint(50, (4, 32))
    )
    names = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert sum("mm.default" in name for name in names) == 2 * (2 * 6 + 1)
    assert sum("attention" in name and "backward" in name for name in names) == 2
    assert sum("attention" in name and "backward" not in name for name in names) == again


def test_a_residual_that_is_still_saved_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    rebuild = encode_residuals._Rebuild.__call__
    left: list[fx.Node] = []

    def leave_one(self: encode_residuals._Rebuild, node: fx.Node) -> fx.Node:
        if not left and node.meta["val"].shape == (48, 128):
            left.append(node)
            return node
        return rebuild(self, node)

    monkeypatch.setattr(encode_residuals._Rebuild, "__call__", leave_one)
    with pytest.raises(PartitionError, match="was to be kept as recompute and is still saved in full"):
        wtacrs_fx.explain(Mlp(), torch.randn(48, 64), policy=Policy(ratio=0.3, residuals="balanced"))


def test_chains_may_be_longer_than_the_stack_of_python() -> None:
    def long(u: Tensor) -> Tensor:
        for i in range(260):
            u = u * 0.99 + 0.001 * torch.tanh(u.roll(i, 0))
        return u

    report = wtacrs_fx.explain(Mlp(long), torch.randn(48, 64), policy=Policy(ratio=0.3, residuals="balanced"))
    assert report.saved_bytes_after < report.saved_bytes_before


def test_dynamic_shapes_compile_once() -> None:
    model = Mlp()
    backend = wtacrs_fx.backend(Policy(residuals="balanced", ratio=1.0))
    compiled = []

    def count(gm: fx.GraphModule, inputs: list) -> Callable:
        compiled.append(gm)
        return backend(gm, inputs)

    call = torch.compile(model, backend=count, dynamic=True)
    for rows in (48, 80, 33):
        x = torch.randn(rows, 64)
        assert relative_error(step(model, call, x), step(model, model, x)) < 0.15
    assert len(compiled) == 1


def transposed(model: Mlp, x: Tensor) -> Tensor:
    """Features before rows: the last dimension is the batch. Functions, masks and numbers of rows are stored."""
    numbers = torch.arange(x.shape[0]) + 0
    x = x + F.embedding(numbers.unsqueeze(0), model.up.weight)[0]  # as positions of tokens
    sums = F.gelu(model.up(x)).T.contiguous().cumsum(0)
    kept = torch.where(sums > 0.1, sums, 0)
    few = sums.tanh().T[numbers[:, None], torch.arange(32)]
    return (few * model.down(sums.cos().T)).square().mean() + kept.cumsum(0).mean()


@pytest.mark.sweep(0.5)
@pytest.mark.parametrize("residuals", ["balanced", "small"])
def test_a_last_dimension_of_any_size(residuals: str) -> None:
    def compiler(gm: fx.GraphModule, inputs: list) -> Callable:
        partitioner = WtacrsPartitioner(ALL[residuals], lifted_inputs(gm), reports.append)
        return aot_module_simplified(
            gm, inputs, nop, partition_fn=partitioner, decompositions=select_decomp_table()
        )

    reports: list[wtacrs_fx.Report] = []
    model = Mlp()
    model.forward = MethodType(transposed, model)  # type: ignore[method-assign]
    call = torch.compile(model, backend=compiler, dynamic=True)
    for rows in (73, 96, 121):
        x = torch.randn(rows, 64)
        assert relative_error(step(model, call, x), step(model, model, x)) < 0.15
    assert len(reports) <= 2  # one more where the size fills the bytes
    for report in reports:
        assert "bits" in {each.encoding for each in report.residuals}, report


def test_under_autocast() -> None:
    model, x = Mlp(), torch.randn(48, 64)

    def call(run: Callable) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            loss = run(x)
        model.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    found = call(torch.compile(model, backend=wtacrs_fx.backend(Policy(residuals="balanced", ratio=1.0))))
    assert relative_error(found, call(model)) < 0.15


@pytest.mark.parametrize("function", [F.gelu, F.relu])
def test_nan_reaches_the_gradient(function: Callable[[Tensor], Tensor]) -> None:
    model, x = Mlp(function), torch.randn(48, 64)
    call = torch.compile(model, backend=wtacrs_fx.backend(Policy(residuals="balanced", ratio=1.0)))
    x[3, 5] = torch.nan
    found = step(model, call, x)
    assert all(bool(gradient.isnan().any()) for gradient in found.values())


def test_gradients_through_a_table_keep_its_bound() -> None:
    """3 bits of gelu': no value is further from its piece than 0.12."""

    class Cumulative(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            h = F.gelu(self.up(x)).cumsum(0)
            return self.down(h).square().mean()

    tabulated = Cumulative()
    x = torch.randn(48, 64)
    exact = step(tabulated, tabulated, x)
    call = torch.compile(tabulated, backend=wtacrs_fx.backend(Policy(residuals="balanced", ratio=1.0)))
    found = step(tabulated, call, x)
    report = wtacrs_fx.reports()[-1]
    assert "table" in {residual.encoding for residual in report.residuals}
    error = (found["up.weight"] - exact["up.weight"]).norm() / exact["up.weight"].norm()
    assert 1e-4 < error < 0.15


def test_the_transformed_graph_runs_and_shows_its_encodings() -> None:
    model, x = Mlp(), torch.randn(48, 64)
    exact = step(model, model, x)
    rewritten = wtacrs_fx.transform(wtacrs_fx.capture(model, x), ALL["balanced"])
    assert "torch.int8" in rewritten.print_readable(print_output=False) or "uint8" in rewritten.code
    inputs = {tuple(p.shape): p for p in model.parameters()} | {tuple(x.shape): x}
    placeholders = [node.meta["val"] for node in rewritten.graph.find_nodes(op="placeholder")]
    results = rewritten([inputs[tuple(value.shape)] for value in placeholders[:-1]], [torch.tensor(1.0)])
    leaves = torch.utils._pytree.tree_leaves(results)
    found = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.shape == (128, 64)]
    assert relative_error({"up.weight": found[0]}, {"up.weight": exact["up.weight"]}) < 0.1


def assert_lossless(model: nn.Module, *inputs: Tensor) -> None:
    """Compare all gradients without rounding with Inductor's, bit for bit, each from the same values."""
    found = []
    for backend in ("inductor", wtacrs_fx.backend(ALL["lossless"])):
        torch._dynamo.reset()
        mine = copy.deepcopy(model)
        found.append(step(mine, torch.compile(mine, backend=backend), *(x.clone() for x in inputs)))
    inductor, lossless = found
    assert inductor.keys() == lossless.keys()
    assert all(torch.equal(inductor[name], lossless[name]) for name in inductor)


def test_casts_of_weights_and_masks_are_made_again() -> None:
    """What cheap operations make of parameters and of masks that are given is not stored, and has the same bits."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

        def forward(self, x: Tensor, keep: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.down(self.up(x) * torch.where(keep, 2.0, 0.5)).float().square().sum()

    model, x, keep = Masked(), torch.randn(64, 32), torch.rand(64, 64) > 0.5
    report = wtacrs_fx.explain(model, x, keep, policy=ALL["lossless"])
    assert report.saved_bytes_before - report.saved_bytes_after == model.down.weight.numel() * 2
    assert_lossless(model, x, keep)


class Counting(nn.Linear):
    """Write to an input after a mask was made of it."""

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        factor = torch.where(seen > 3, 2.0, 0.5)
        seen.add_(5)
        return (super().forward(x) * factor).square().sum()


class Shrinking(nn.Module):
    """Write to a weight before it is cast."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        with torch.no_grad():
            self.down.weight.mul_(0.5)
        with torch.autocast("cpu", torch.bfloat16):
            return self.down(self.up(x)).float().square().sum()


@pytest.mark.parametrize("model", [Counting(32, 32), Shrinking()], ids=lambda model: type(model).__name__)
def test_inputs_that_are_written_to_are_not_read_again(model: nn.Module) -> None:
    assert_lossless(model, torch.randn(64, 32), torch.randint(7, (64, 32)))


def test_a_weight_that_is_changed_before_the_backward_pass_is_an_error() -> None:
    model, x = Shrinking().down, torch.randn(64, 32, requires_grad=True)
    call = torch.compile(model, backend=wtacrs_fx.backend(ALL["lossless"]))
    with torch.autocast("cpu", torch.bfloat16):
        loss = call(x).float().square().sum()
    with torch.no_grad():
        model.weight.mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
