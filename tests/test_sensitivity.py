"""Sensitivity of a gradient to rounded residuals: the measurement, and the bits that follow from it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from aot import REFERENCE, Variants, distance, small_tensors
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import wtacrs_fx
from wtacrs_fx import (
    DiagnosisError,
    ModuleSensitivity,
    NoTangentsError,
    Policy,
    Rule,
    Sensitivity,
    sensitivity,
)
from wtacrs_fx.sensitivity import MODES

D = 128


class Block(nn.Module):
    """[batch, tokens, D] to a scalar; what `up` computes is read by a nonlinear function, its output by `down`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)
        self.gelu, self.norm, self.last = nn.GELU(), nn.LayerNorm(D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.down(self.gelu(self.up(x)))
        return (self.last(self.norm(h)) - x).square().mean()


def batch(seed: int = 1) -> tuple[Tensor]:
    return (torch.randn(4, 32, D, generator=torch.Generator().manual_seed(seed)),)


@pytest.fixture(scope="module")
def model() -> Block:
    return Block()


@pytest.fixture(scope="module")
def found(model: Block) -> Sensitivity:
    return sensitivity(model, batch())


def errors_of_steps(
    model: nn.Module, inputs: tuple[Any, ...], policies: dict[str, Policy]
) -> dict[str, float]:
    """Return the relative squared errors of whole gradients, of the graphs that are compiled."""
    variants = Variants(policies)
    gradients = {}
    with small_tensors():
        compiled = torch.compile(model, backend=variants)
        for name in (REFERENCE, *policies):
            variants.active = name
            model.zero_grad()
            compiled(*inputs).backward()
            gradients[name] = torch.cat([p.grad.flatten() for p in model.parameters()])
    return {name: distance(gradients[name], gradients[REFERENCE]) for name in policies}


def test_every_module_whose_residuals_are_rounded_is_there(found: Sensitivity) -> None:
    assert [x.module for x in found.modules] == ["up", "norm", ""]  # the square of the loss
    for module in found.modules:
        small, balanced, fine = module.errors
        assert 0 < fine < balanced / 4 < small / 16
        assert module.sizes[0] < module.sizes[1] < module.sizes[2]


def test_a_sum_over_modules_is_what_a_step_with_all_of_them_has(model: Block, found: Sensitivity) -> None:
    """Residuals of two modules: their errors are independent but for what both have in common."""
    policies = {mode: Policy(ratio=1.0, residuals=mode) for mode in MODES}
    measured = errors_of_steps(model, batch(), policies)
    for index, mode in enumerate(MODES):
        assert sum(x.errors[index] for x in found.modules) == pytest.approx(measured[mode], rel=0.15)


def test_of_one_module_it_is_the_error_of_a_step(model: Block) -> None:
    rules = tuple(Rule(name, residuals="exact") for name in ("norm", "last"))
    policies = {mode: Policy(ratio=1.0, residuals=mode, rules=rules, include=("?*",)) for mode in MODES}
    [alone] = sensitivity(model, batch(), Policy(rules=rules, include=("?*",))).modules
    measured = errors_of_steps(model, batch(), policies)
    assert alone.errors == pytest.approx([measured[mode] for mode in MODES], rel=1e-3)


def test_of_what_a_checkpoint_keeps() -> None:
    class Checkpointed(Block):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            loss: Tensor = checkpoint(super().forward, self.first(x), use_reentrant=False)
            return loss

    model = Checkpointed()
    [kept] = sensitivity(model, batch()).modules
    assert kept.module == "first"
    measured = errors_of_steps(model, batch(), {mode: Policy(ratio=1.0, residuals=mode) for mode in MODES})
    assert kept.errors == pytest.approx([measured[mode] for mode in MODES], rel=1e-3)


def test_under_autocast_and_in_16_bits(model: Block, found: Sensitivity) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        autocast = sensitivity(model, batch())
    assert {x.module for x in autocast.modules} >= {"up", "norm"}
    assert autocast.modules[0].errors[0] == pytest.approx(found.modules[0].errors[0], rel=0.3)
    half = Block().to(torch.bfloat16)
    of_half = sensitivity(half, (batch()[0].to(torch.bfloat16),))
    assert of_half.modules[0].errors[0] == pytest.approx(found.modules[0].errors[0], rel=0.5)


def test_a_model_keeps_its_gradients_and_its_buffers() -> None:
    class Counting(Block):
        def __init__(self) -> None:
            super().__init__()
            self.batch_norm = nn.BatchNorm1d(D)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.batch_norm(x.flatten(0, 1)))

    model = Counting()
    model.up.weight.grad = torch.full_like(model.up.weight, 3.0)
    sensitivity(model, batch())
    assert torch.equal(model.up.weight.grad, torch.full_like(model.up.weight, 3.0))
    assert model.last.weight.grad is None
    assert torch.equal(model.batch_norm.running_mean, torch.zeros(D))


def test_a_model_with_logits_and_dropout_beside_the_loss() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.drop, self.head = nn.Linear(D, D), nn.Dropout(0.5), nn.Linear(D, 10)

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.head(self.drop(self.up(x).tanh()))
            return {
                "loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()),
                "logits": logits,
            }

    given = {"x": batch()[0], "labels": torch.randint(10, (4, 32))}
    [up] = sensitivity(Tagger(), given).modules
    assert up.module == "up" and 0 < up.errors[2] < up.errors[0] < 0.2


CASES = [
    ModuleSensitivity("a", (0.04, 0.004, 0.0004), (10, 14, 18)),
    ModuleSensitivity("b", (0.01, 0.001, 0.0001), (40, 56, 72)),
    ModuleSensitivity("c", (0.2, 0.02, 0.002), (5, 7, 9)),
    ModuleSensitivity("d", (0.0, 0.0, 0.0), (8, 12, 16)),
]


@pytest.mark.parametrize("error", [0.0026, 0.01, 0.03, 0.07, 0.3])
def test_fewest_bytes_within_an_error(error: float) -> None:
    found = Sensitivity(tuple(CASES), Policy(ratio=1.0))
    reached, size = found.expected(found.policy(error=error))
    assert reached <= error
    assert size <= 1.1 * min(total[1] for total in all_totals() if total[0] <= error)


@pytest.mark.parametrize("size", [63, 75, 90, 115])
def test_least_error_within_bytes(size: int) -> None:
    found = Sensitivity(tuple(CASES), Policy(ratio=1.0))
    reached, taken = found.expected(found.policy(max_bytes=size))
    assert taken <= size
    assert reached <= 2 * min(total[0] for total in all_totals() if total[1] <= size)


def all_totals() -> list[tuple[float, int]]:
    """Return error and bytes of every choice."""
    choices = itertools.product(range(len(MODES)), repeat=len(CASES))
    pairs = ([(x.errors[i], x.sizes[i]) for x, i in zip(CASES, choice, strict=True)] for choice in choices)
    return [(sum(e for e, _ in pair), sum(s for _, s in pair)) for pair in pairs]


def test_rules_say_what_the_policy_said_but_for_the_bits(model: Block) -> None:
    asked = Policy(
        rules=(Rule("u*", ratio=0.5, center=True), Rule("down", noise=0.3)),
        exclude=("last",),
        include=("?*",),
    )
    found = sensitivity(model, batch(), asked)
    [up] = found.modules  # `last` reads what `norm` computes
    policy = found.policy(max_bytes=up.sizes[0])
    assert policy.sampling("up").residuals == "small"
    assert (policy.sampling("up").ratio, policy.sampling("up").center) == (0.5, True)
    assert policy.asked("down") == asked.asked("down") and policy.sampling("last") is None
    assert found.policy(max_bytes=up.sizes[1]) == asked  # balanced, as it was


def test_a_step_stores_what_was_chosen(model: Block, found: Sensitivity) -> None:
    up, norm, own = (x.errors for x in found.modules)
    policy = found.policy(error=1.01 * (up[0] + norm[1] + own[1]))
    assert [policy.sampling(name).residuals for name in ("up", "norm")] == ["small", "balanced"]
    assert policy.sampling("").residuals == "balanced"  # a rule has no name for it
    report = wtacrs_fx.explain(model, *batch(), policy=policy)
    encodings = {site.module: site.encoding for site in report.residuals if site.encoding.startswith("int")}
    assert encodings["up"] == "int4" and encodings["norm"] == "int6"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either error or max_bytes, got none"),
        ({"error": 0.1, "max_bytes": 10}, "got both"),
        ({"error": 1e-9}, "error must be at least 0.0025, as the finest codes take, got 1e-09"),
        ({"max_bytes": 10}, "max_bytes must be at least 63 bytes, as the smallest codes take, got 10"),
    ],
)
def test_what_no_bits_reach(options: dict[str, float], message: str) -> None:
    with pytest.raises(DiagnosisError, match=message):
        Sensitivity(tuple(CASES), Policy()).policy(**options)


def test_what_cannot_be_measured(model: Block) -> None:
    with pytest.raises(DiagnosisError, match="must return its loss, a scalar"):
        sensitivity(nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Linear(D, D)), batch())
    with pytest.raises(DiagnosisError, match="no residual of the model may be rounded"):
        sensitivity(model, batch(), Policy(residuals="exact"))
    with pytest.raises(DiagnosisError, match="must be finite and not zero, its square is nan"):
        sensitivity(model, (torch.full((4, 32, D), torch.nan),))
    with pytest.raises(NoTangentsError, match="the loss of Block does not require grad"):
        sensitivity(Block().requires_grad_(False), batch())


def test_printed_and_as_numbers(found: Sensitivity) -> None:
    lines = str(found).splitlines()
    assert lines[0].split("  ")[0] == "module" and "balanced: error" in lines[0]
    assert [line.split()[0] for line in lines[1:]] == ["up", "norm", "(model)", "sum"]
    assert found.to_dict()["modules"][0]["module"] == "up" and found.to_dict()["modes"] == [*MODES]
