"""Diagnosis of a policy: the variance formula, the table and plot, and the ratios that follow."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import RowsOnly
from torch import Tensor, nn

import wtacrs_fx
from bench.variance import gram, squared_errors
from wtacrs_fx import Diagnosis, DiagnosisError, diagnose
from wtacrs_fx.diagnose import RATIOS, relative_variance, sampling_variance

D = 16


class Model(nn.Module):
    """[batch, tokens, D] and weights of the tokens to a scalar; `left` and `right` share an input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, 4)
        self.left, self.right = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor, weight: Tensor) -> tuple[Tensor, str]:
        h = self.first(x).tanh()
        y = self.last((self.left(h) * self.right(h)).sin())
        return (y * weight).square().sum(), "more"


def batches(count: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "x": torch.randn(8, 32, D, generator=generator),
            "weight": torch.randn(8, 32, 1, generator=generator).mul(1.5).exp(),
        }
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def model() -> Model:
    return Model()


@pytest.fixture(scope="module")
def backward(model: Model) -> Diagnosis:
    return diagnose(model, batches(), RowsOnly(placement="backward"))


@pytest.fixture(scope="module")
def forward(model: Model) -> Diagnosis:
    return diagnose(model, batches(), RowsOnly(placement="forward"))


@pytest.mark.parametrize("kept", [20, 60, 120])
@pytest.mark.parametrize("informed", [True, False])
def test_the_formula_agrees_with_draws(kept: int, informed: bool) -> None:
    torch.manual_seed(2)
    x, dy = torch.randn(200, 6) + 0.5, torch.randn(200, 5) * torch.randn(200, 1).exp() + 0.3
    norms = (x.norm(dim=-1) * dy.norm(dim=-1)).double()
    weights = norms if informed else x.norm(dim=-1).double()
    predicted = sampling_variance(x.double(), dy.double(), norms, weights, kept)
    generator = torch.Generator().manual_seed(3)
    errors = squared_errors(gram(x, dy), weights, kept, "wta-systematic", 4000, generator)
    # the standard error of the mean is 1 to 2 %; the formula neglects terms of order 1 / sum c_i
    assert float(errors.mean()) == pytest.approx(predicted, rel=0.1)


def test_rows_that_can_never_be_drawn_add_infinite_noise() -> None:
    x, dy = torch.ones(4, 2).double(), torch.ones(4, 2).double()
    norms = torch.full((4,), 2.0).double()
    assert sampling_variance(x, dy, norms, torch.tensor([1.0, 1.0, 1.0, 0.0]), 2) == float("inf")
    assert sampling_variance(x, dy, norms, torch.ones(4), 4) == 0


def test_relative_variance() -> None:
    torch.manual_seed(0)
    samples = [[3 + torch.randn(1000), torch.ones(5)] for _ in range(50)]
    noisy, constant = relative_variance(samples)
    assert noisy == pytest.approx(0.1, rel=0.05)  # 1 / (3^2 + 1); 50,000 numbers
    assert constant == pytest.approx(0, abs=1e-6)


def test_every_sampled_layer_is_there(backward: Diagnosis) -> None:
    layers = {layer.module: layer for layer in backward.layers}
    assert set(layers) == {"first", "left", "right", "last"}
    assert layers["left"].group == layers["right"].group
    assert len({layer.group for layer in backward.layers}) == 3
    for layer in layers.values():
        assert (layer.rows, layer.kept, layer.row_bytes) == (256, 77, 0)
        assert 0 < layer.added < 1 and 0 < layer.minibatch < 2
        assert list(layer.curve) == sorted(layer.curve, reverse=True) and layer.curve[-1] == 0
        assert layer.curve[RATIOS.index(0.3)] == pytest.approx(layer.added)
        assert list(layer.masses) == sorted(layer.masses) and layer.masses[-1] == pytest.approx(1)
        assert layer.masses[-4] == pytest.approx(layer.mass, abs=0.02)  # the largest 30 %


def test_exact_norms_add_less_noise_than_norms_of_inputs(backward: Diagnosis, forward: Diagnosis) -> None:
    for informed, blind in zip(backward.layers, forward.layers, strict=True):
        assert informed.module == blind.module
        assert informed.added < 0.5 * blind.added
        assert informed.mass > blind.mass
    assert {layer.placement for layer in forward.layers} == {"forward"}


def test_what_is_predicted_is_what_the_rewrite_does(model: Model) -> None:
    """The variance of the rewritten graph's gradients agrees with that of the diagnosis."""
    batch = batches(2)[0]
    found = diagnose(model, batches(2), RowsOnly(placement="backward"))
    layer = next(layer for layer in found.layers if layer.module == "last")
    call = torch.compile(model, backend=wtacrs_fx.backend(RowsOnly(placement="backward", include=("last",))))
    model(**batch)[0].backward()
    exact = model.last.weight.grad.clone()
    errors = []
    for _ in range(400):
        model.zero_grad()
        call(**batch)[0].backward()
        errors.append((model.last.weight.grad - exact).square().sum() / exact.square().sum())
    model.zero_grad()
    alone = diagnose(model, [batch, batch], RowsOnly(placement="backward", include=("last",))).layers[0]
    assert alone.minibatch == pytest.approx(0, abs=1e-9)
    assert float(torch.stack(errors).mean()) == pytest.approx(alone.added, rel=0.2)
    assert layer.added == pytest.approx(alone.added, rel=1.0)


def test_gradients_of_the_model_stay_as_they_were(model: Model) -> None:
    model.zero_grad()
    model.first.weight.grad = torch.full((D, D), 7.0)
    diagnose(model, batches(2), RowsOnly())
    assert (model.first.weight.grad == 7).all() and model.last.weight.grad is None
    model.zero_grad()


def test_table_and_plot(backward: Diagnosis, tmp_path: Path) -> None:
    lines = str(backward).splitlines()
    assert lines[0].split() == [
        *(
            "module",
            "placement",
            "rows",
            "kept",
            "added",
            "minibatch",
            "of",
            "it",
            "8",
            "bits",
            "ratio",
            "in",
            "budget",
            "mass",
        )
    ]
    assert len(lines) == 1 + 4 + 2 and "mean over 4 layers and 4 batches" in lines[-1]
    backward.plot(tmp_path / "noise.png")
    assert (tmp_path / "noise.png").stat().st_size > 10_000
    assert backward.to_dict()["layers"][0]["rows"] == 256


def test_ratios_for_a_share_of_the_noise(backward: Diagnosis) -> None:
    policy = backward.policy()
    for layer in backward.layers:
        sampling = policy.sampling(layer.module)
        assert sampling is not None and layer.ratio is not None
        assert sampling.ratio >= layer.ratio
        assert sampling.placement == "backward"
    assert policy.sampling("left") == policy.sampling("right")  # they share a draw
    assert policy.sampling("elsewhere").ratio == 0.3


class Stack(nn.Module):
    """Linears one after another: nothing but the next one's weight gradient reads the output of each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(4))

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return (x * weight).square().sum()


def test_ratios_for_a_budget() -> None:
    model = Stack()
    forward = diagnose(model, batches(), RowsOnly(placement="forward"))
    stored = [layer for layer in forward.layers if layer.row_bytes]
    assert stored  # somewhere rows are stored instead of an input
    full = sum(layer.row_bytes * layer.rows for layer in stored)
    noises = []
    for share in (0.6, 0.3, 0.1):
        policy = forward.policy(share * full)
        taken = sum(layer.row_bytes * layer.rows * policy.sampling(layer.module).ratio for layer in stored)
        assert taken <= share * full
        noises.append(sum(layer.curve[RATIOS.index(policy.sampling(layer.module).ratio)] for layer in stored))
    assert noises == sorted(noises)
    with pytest.raises(DiagnosisError, match=r"max_bytes must be at least .*, as ratio 0.02 takes, got 1"):
        forward.policy(1)
    assert diagnose(model, batches(2), forward.policy(0.3 * full)).layers  # a policy like any other


def test_what_cannot_be_diagnosed(model: Model) -> None:
    with pytest.raises(DiagnosisError, match="two or more batches, for the noise between them, got 1"):
        diagnose(model, batches(1))
    with pytest.raises(DiagnosisError, match=r"samples no layer of the model \(ratio 1.0\)"):
        diagnose(model, batches(2), RowsOnly(ratio=1.0))
    with pytest.raises(DiagnosisError, match="must return its loss"):
        diagnose(nn.Linear(D, D), [(torch.randn(64, D),)] * 2, RowsOnly())
