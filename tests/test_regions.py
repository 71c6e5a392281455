"""Layers that are compiled once: bytes and gradients of the whole, names of each, draws of their own."""

from __future__ import annotations

import copy
import dataclasses
import itertools

import pytest
import torch
from conftest import is_unbiased
from torch import Tensor, nn
from torch.nn import functional as F

import wtacrs_fx
from wtacrs_fx import Policy, PolicyError, Rule
from wtacrs_fx.tools.measure import saved_bytes

FEATURES, TOKENS, LAYERS = 64, 128, 3


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = (
            nn.LayerNorm(FEATURES),
            nn.Linear(FEATURES, 2 * FEATURES),
            nn.Linear(2 * FEATURES, FEATURES),
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x)))) * mask


class Model(nn.Module):
    """Layers with a mask that all of them read, between two linear layers of their own."""

    def __init__(self, layers: int = LAYERS) -> None:
        super().__init__()
        self.embed = nn.Linear(FEATURES, FEATURES)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(FEATURES), nn.Linear(FEATURES, FEATURES)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        mask, h = keep[..., None] > 0, self.embed(x)
        for layer in self.layers:
            h = layer(h, mask)
        return self.head(self.norm(h)).square().mean()


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, TOKENS // 2, FEATURES), torch.ones(2, TOKENS // 2)


def gradients(model: nn.Module, compiled: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    model.zero_grad()
    compiled(*inputs).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def marked(model: Model) -> Model:
    twin = copy.deepcopy(model)
    wtacrs_fx.mark_layers(twin)
    return twin


EXACT, BALANCED = Policy(ratio=1.0, residuals="exact"), Policy(ratio=1.0)
AGAIN = Policy(ratio=1.0, recompute_products=1.0)
SAMPLED = Policy(ratio=0.3, min_rows=8)


@pytest.mark.sweep(0.4)
@pytest.mark.parametrize(
    ("policy", "dtype"),
    [(EXACT, torch.float32), (BALANCED, torch.float32), (BALANCED, torch.bfloat16), (AGAIN, torch.bfloat16)],
    ids=["exact", "balanced", "balanced, bfloat16", "products again, bfloat16"],
)
def test_bytes_and_gradients_are_those_of_the_whole(
    model: Model, inputs: tuple[Tensor, Tensor], policy: Policy, dtype: torch.dtype
) -> None:
    model, inputs = model.to(dtype), tuple(x.to(dtype) for x in inputs)
    twin, eager = marked(model), gradients(model, model, inputs)
    found = []
    for each in (model, twin):
        backend = wtacrs_fx.backend(policy)
        compiled = torch.compile(each, backend=backend, fullgraph=True)
        run = gradients(each, compiled, inputs)
        errors = {name: float((run[name] - eager[name]).norm() / eager[name].norm()) for name in eager}
        [report] = backend.reports
        saved = saved_bytes(lambda c=compiled: c(*inputs), [*each.parameters(), *inputs])
        assert saved == report.saved_bytes_after
        found.append((max(errors.values()), saved, report))
    (error, saved, whole), (error_of_regions, saved_of_regions, regions) = found
    assert error_of_regions < (1e-5 if policy is EXACT else 1.5 * error)
    assert saved_of_regions == pytest.approx(saved, rel=0.01)
    assert regions.saved_bytes_before == pytest.approx(whole.saved_bytes_before, rel=0.01)
    assert (regions.work, regions.work_again) == (whole.work, whole.work_again)
    assert bool(whole.work_again) == (policy is AGAIN)
    assert {(s.module, s.parameter, s.rows) for s in regions.sites} == {
        (s.module, s.parameter, s.rows) for s in whole.sites
    }


def test_explain_says_what_runs(model: Model, inputs: tuple[Tensor, Tensor]) -> None:
    twin, backend = marked(model), wtacrs_fx.backend(SAMPLED)
    torch.compile(twin, backend=backend)(*inputs).backward()
    report = dataclasses.replace(backend.reports[-1], from_cache=False)
    assert wtacrs_fx.explain(twin, *inputs, policy=SAMPLED) == report
    with pytest.raises(ValueError, match="has regions that are compiled once"):
        wtacrs_fx.capture(twin, *inputs)


@pytest.mark.sweep(0.34, "regions")
def test_sampled_gradients_are_unbiased(model: Model, inputs: tuple[Tensor, Tensor]) -> None:
    twin = marked(model)
    exact = gradients(twin, torch.compile(twin, backend=wtacrs_fx.backend(BALANCED)), inputs)
    compiled = torch.compile(twin, backend=wtacrs_fx.backend(SAMPLED))
    runs = [gradients(twin, compiled, inputs) for _ in range(100)]
    for name in ("layers.0.up.weight", "layers.2.down.weight", "head.weight"):
        draws = torch.stack([run[name].flatten() for run in runs])
        assert is_unbiased(draws, exact[name].flatten()), name
        assert draws.var(0).sum() > 0, name


class Beside(nn.Module):
    """Layers whose gradient other linear layers read as well, before or after."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.others = nn.ModuleList(nn.Linear(FEATURES, FEATURES) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer, other in zip(self.layers, self.others, strict=True):
            x = layer(x, mask) + other(x)
        return x.square().mean()


def test_a_gradient_that_others_read_is_left_as_it_is(inputs: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(0)
    model, batch = Beside(), (inputs[0], inputs[1][..., None])
    eager = gradients(model, model, batch)
    wtacrs_fx.mark_layers(model, model.layers)
    found = gradients(model, torch.compile(model, backend=wtacrs_fx.backend(EXACT)), batch)
    assert max(float((found[n] - eager[n]).norm() / eager[n].norm()) for n in eager) < 1e-5


class Twice(nn.Module):
    """Two layers of equal weights that read one input."""

    def __init__(self) -> None:
        super().__init__()
        layer = Layer()
        self.layers = nn.ModuleList([layer, copy.deepcopy(layer)])

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return sum(layer(x, mask).square().mean() for layer in self.layers)


@pytest.mark.parametrize("placement", ["forward", "backward"])
def test_each_layer_draws_rows_of_its_own(inputs: tuple[Tensor, Tensor], placement: str) -> None:
    torch.manual_seed(0)
    model = Twice()
    wtacrs_fx.mark_layers(model)
    policy = Policy(ratio=0.3, min_rows=8, placement=placement, residuals="exact")
    backend = wtacrs_fx.backend(policy)
    compiled = torch.compile(model, backend=backend)
    first, second = (gradients(model, compiled, (inputs[0], inputs[1][..., None])) for _ in range(2))
    assert len(backend.reports[0].sampled) == 4
    for a, b in itertools.combinations(
        [run[f"layers.{i}.up.weight"] for run in (first, second) for i in (0, 1)], 2
    ):
        assert not torch.allclose(a, b)


@pytest.mark.sweep(0.34, "regions")
@torch._functorch.config.patch(activation_memory_budget=0.1)
def test_a_small_budget_of_memory_does_not_draw_again(model: Model, inputs: tuple[Tensor, Tensor]) -> None:
    twin = marked(model)
    exact = gradients(twin, torch.compile(twin, backend=wtacrs_fx.backend(EXACT)), inputs)
    policy = Policy(ratio=0.5, min_rows=8, placement="forward", residuals="exact")
    backend = wtacrs_fx.backend(policy)
    compiled = torch.compile(twin, backend=backend)
    runs = [gradients(twin, compiled, inputs)["layers.1.up.weight"].flatten() for _ in range(100)]
    assert is_unbiased(torch.stack(runs), exact["layers.1.up.weight"].flatten())
    measured = saved_bytes(lambda: compiled(*inputs), [*twin.parameters(), *inputs])
    assert measured == backend.reports[0].saved_bytes_after


def test_one_policy_for_layers_that_are_compiled_as_one(model: Model, inputs: tuple[Tensor, Tensor]) -> None:
    twin = marked(model)
    policy = Policy(ratio=0.5, min_rows=8, rules=(Rule("layers.1.*", ratio=1.0),))
    with pytest.raises(Exception, match="must be the same for all layers") as caught:
        wtacrs_fx.explain(twin, *inputs, policy=policy)
    assert isinstance(getattr(caught.value, "inner_exception", caught.value), PolicyError)
    everywhere = Policy(ratio=0.5, min_rows=8, rules=(Rule("layers.*.up", ratio=1.0),))
    report = wtacrs_fx.explain(twin, *inputs, policy=everywhere)
    assert {s.module for s in report.sampled} == {"head", "embed", *(f"layers.{i}.down" for i in range(3))}


@pytest.mark.sweep(0.34, "regions")
def test_another_batch_size_compiles_once_more(model: Model) -> None:
    twin, backend = marked(model), wtacrs_fx.backend(BALANCED)
    compiled = torch.compile(twin, backend=backend, fullgraph=True)
    for tokens in (64, 96, 48):
        batch = torch.randn(2, tokens, FEATURES), torch.ones(2, tokens)
        found, eager = gradients(twin, compiled, batch), gradients(model, model, batch)
        assert max(float((found[n] - eager[n]).norm() / eager[n].norm()) for n in eager) < 0.02
    assert len(backend.reports) == 2


class Wild(Layer):
    """Its result has elements of any size beside each other, so the next layer may not round what it gets."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return torch.exp(super().forward(x, mask) * 3)


def test_what_is_of_any_size_is_not_rounded_in_the_next_layer(inputs: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(0)
    model = Model()
    model.layers = nn.ModuleList(Wild() for _ in range(LAYERS))
    wtacrs_fx.mark_layers(model)
    report = wtacrs_fx.explain(model, *inputs, policy=BALANCED)
    received = [each for each in report.residuals if each.operation == "wtacrs.receive.default"]
    assert not [each for each in received if each.encoding != "exact"]


def test_layers_are_found_and_bad_ones_refused() -> None:
    model = Model()
    assert wtacrs_fx.mark_layers(model) == ("layers.0", "layers.1", "layers.2")
    assert wtacrs_fx.mark_layers(model) == ("layers.0", "layers.1", "layers.2")  # marked once
    with pytest.raises(ValueError, match="no nn.ModuleList"):
        wtacrs_fx.mark_layers(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="must be modules of the model"):
        wtacrs_fx.mark_layers(model, [nn.Linear(2, 2)])
