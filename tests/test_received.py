"""Inputs that are activations: of layers that are compiled one by one, encoded and counted like other residuals."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import Block, distance, gradients
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

import wtacrs_fx
from wtacrs_fx import Policy
from wtacrs_passes.maths import ops

D, TOKENS = 64, 128
ENCODED = Policy(ratio=1.0, product="exact")
EXACTLY = Policy(ratio=1.0, product="exact", residuals="exact")
TABULATED = 3e-3  # squared error of derivatives in 3 bits
PRECISIONS = {"float32": None, "autocast": torch.bfloat16, "float16": torch.float16}


class GeluLinear(nn.Module):
    """All that its backward pass reads is a function of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(x))


LAYERS = {"block": lambda: Block(D), "gelu and linear": GeluLinear}


class Model(nn.Module):
    """[batch, TOKENS, D] to a scalar, three layers after each other; eager but for what is compiled in place.

    Attributes:
        alive: after the last forward pass, what each layer read.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(D, D)
        self.layers = nn.ModuleList(LAYERS[kind]() for _ in range(3))
        self.alive: list[StorageWeakRef] = []

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        self.alive = []
        for layer in self.layers:
            self.alive.append(StorageWeakRef(x.untyped_storage()))
            x = layer(x)
        return x.float().square().mean()


def train(
    model: Model, policy: Policy | str | None, dtype: torch.dtype | None = None
) -> tuple[dict[str, Tensor], list[bool], Any]:
    """Return the gradients, which inputs of layers are kept for the backward pass, and the backend."""
    torch._dynamo.reset()
    model = copy.deepcopy(model)
    backend = wtacrs_fx.backend(policy) if isinstance(policy, Policy) else policy
    if backend is not None:
        for layer in model.layers:
            layer.compile(backend=backend)
    x = torch.randn(4, TOKENS, D, generator=torch.Generator().manual_seed(1))
    if dtype is torch.float16:
        model, x = model.half(), x.half()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        loss = model(x)
    alive = [not reference.expired() for reference in model.alive]
    loss.backward()
    return gradients(model), alive, backend


@pytest.mark.sweep(0.34)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_layers_read_is_freed_and_counted(kind: str, precision: str) -> None:
    model, dtype = Model(kind), PRECISIONS[precision]
    exact, kept, _ = train(model, "inductor", dtype)
    found, alive, backend = train(model, ENCODED, dtype)
    assert all(kept) and not any(alive)
    bound = (
        1e-3 if precision == "float32" else 3e-3
    )  # of codes of 6 to 8 bits; 16-bit products differ by 1e-4
    assert 0 < distance(found, exact) < bound
    [report] = backend.reports
    size = 4 * TOKENS * D * (4 if precision == "float32" else 2)
    assert report.saved_bytes_before >= size * (1 if kind == "block" else 2)  # what it reads, and GELU of it
    assert 0 < report.saved_bytes_after < (0.3 if precision == "float32" else 0.4) * report.saved_bytes_before


@pytest.mark.sweep(0.5)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_products_of_a_layer_alone_are_computed_again(precision: str) -> None:
    model, dtype = Model("block"), PRECISIONS[precision]
    exact, *_ = train(model, "inductor", dtype)
    policies = ENCODED, dataclasses.replace(ENCODED, recompute_products=1.0)
    reports = []
    for policy in policies:
        found, _, backend = train(model, policy, dtype)
        assert 0 < distance(found, exact) < 3e-3
        reports += backend.reports
    plain, again = reports
    assert again.saved_bytes_after < 0.6 * plain.saved_bytes_after and not plain.work_again
    assert 0.3 < again.work_again / again.work < 0.8


def test_exact_is_exact_bit_for_bit() -> None:
    model = Model("block")
    exact, kept, _ = train(model, "inductor")
    found, alive, backend = train(model, EXACTLY)
    assert alive == kept and all(torch.equal(found[name], exact[name]) for name in exact)
    [report] = backend.reports
    assert report.saved_bytes_after == report.saved_bytes_before >= 4 * 4 * TOKENS * D


@pytest.fixture
def of_one_layer() -> Iterator[Any]:
    """Compile a function of a tensor that is the result of another operation; return the report and both gradients."""

    def compiled(function: Any, x: Tensor) -> tuple[wtacrs_fx.Report, Tensor, Tensor]:
        torch._dynamo.reset()
        backend, given = wtacrs_fx.backend(ENCODED), []
        for call in (function, torch.compile(function, backend=backend)):
            leaf = x.clone().requires_grad_()
            call(leaf * 1).square().sum().backward()
            given.append(leaf.grad)
        return backend.reports[-1], *given

    yield compiled
    torch._dynamo.reset()


def test_what_its_maker_holds_is_an_input() -> None:
    x, layer = torch.randn(TOKENS, D, requires_grad=True), GeluLinear()
    backend = wtacrs_fx.backend(ENCODED)
    torch.compile(layer, backend=backend)(x).sum().backward()
    report = backend.reports[-1]
    assert not report.residuals and report.saved_bytes_before == report.saved_bytes_after


def test_masks_of_scores_are_no_activations(of_one_layer: Any) -> None:
    x = torch.randn(TOKENS, D)
    x[:, ::2] = -1e9  # 8 bits would make nothing of the others
    report, exact, found = of_one_layer(lambda x: F.gelu(x), x)
    torch.testing.assert_close(found, exact)
    assert report.saved_bytes_before == 0


def test_what_a_module_holds_is_an_input() -> None:
    """Such as the views of FSDP's flat parameters: computed, with a gradient, and weights."""

    class Held(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight)

    flat, layer, x = nn.Parameter(torch.randn(D * D)), Held(), torch.randn(TOKENS, D, requires_grad=True)
    layer.weight = flat.view(D, D)
    assert not layer.weight.is_leaf
    backend = wtacrs_fx.backend(ENCODED)
    torch.compile(layer, backend=backend)(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(TOKENS, D) @ layer.weight)
    assert backend.reports[-1].saved_bytes_before == 0


def test_what_a_graph_writes_to(of_one_layer: Any) -> None:
    def function(x: Tensor) -> Tensor:
        x.mul_(2)
        return F.gelu(x)

    _, exact, found = of_one_layer(function, torch.randn(TOKENS, D))
    torch.testing.assert_close(found, exact)


def test_what_a_graph_returns_as_it_came(of_one_layer: Any) -> None:
    _, exact, found = of_one_layer(lambda x: torch.cat([x, F.silu(x)], -1), torch.randn(TOKENS, D))
    assert distance({"x": found}, {"x": exact}) < TABULATED

    def both(x: Tensor) -> Tensor:
        a, b = passed(x)
        return a + b

    passed = torch.compile(lambda x: (x, F.gelu(x)), backend=wtacrs_fx.backend(ENCODED))
    leaves = [torch.randn(TOKENS, D).requires_grad_()]
    leaves.append(leaves[0].detach().clone().requires_grad_())
    both(leaves[0] * 1).sum().backward()
    (leaves[1] + F.gelu(leaves[1])).sum().backward()
    assert distance({"x": leaves[0].grad}, {"x": leaves[1].grad}) < TABULATED


def test_sizes_that_vary() -> None:
    torch._dynamo.reset()
    layer = GeluLinear()
    call = torch.compile(layer, backend=wtacrs_fx.backend(ENCODED), dynamic=True)
    for tokens in (96, 160):
        leaves = [torch.randn(tokens, D).requires_grad_() for _ in range(2)]
        leaves[1].data.copy_(leaves[0])
        call(leaves[0] * 1).square().sum().backward()
        found = leaves[0].grad
        layer.forward(leaves[1]).square().sum().backward()
        assert distance({"x": found}, {"x": leaves[1].grad}) < 1e-3


def test_the_rewritten_graph_reads_its_inputs() -> None:
    layer, x = Block(D), torch.randn(4, TOKENS, D, requires_grad=True) * 1
    rewritten = wtacrs_fx.transform(wtacrs_fx.capture(layer, x), ENCODED)
    assert not rewritten.graph.find_nodes(op="call_function", target=ops.receive)
    report = wtacrs_fx.explain(layer, x, policy=ENCODED)
    assert report.saved_bytes_after == rewritten.report.saved_bytes_after < 0.3 * report.saved_bytes_before
    assert report.saved_bytes_before == rewritten.report.saved_bytes_before
    on_meta = wtacrs_fx.explain(Block(D).to("meta"), x.to("meta"), policy=ENCODED)
    assert on_meta.saved_bytes_after == report.saved_bytes_after
    leaf = wtacrs_fx.explain(layer, x.detach().requires_grad_(), policy=ENCODED)
    assert leaf.saved_bytes_before < report.saved_bytes_before
