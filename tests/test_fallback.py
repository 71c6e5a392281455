"""An error of the backend stops no training: Inductor alone compiles the graph, a warning and the report say so."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import wtacrs_fx
from wtacrs_fx import FallbackWarning, Policy, PolicyError
from wtacrs_passes import pipeline
from wtacrs_passes.joint import Joint

NAMES = [step.__name__ for step in pipeline.PASSES]


class Broken(RuntimeError):
    """What no pass raises."""


def fail(joint: Joint) -> None:
    raise Broken("on purpose\nwith a second line")


@pytest.fixture(scope="module")
def case() -> tuple[nn.Module, Tensor, list[Tensor]]:
    """A model, its input and its gradients as Inductor computes them."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)), torch.randn(96, 32)
    return model, x, gradients(model, x, "inductor")


def gradients(model: nn.Module, x: Tensor, backend: str | Callable[..., object]) -> list[Tensor]:
    torch._dynamo.reset()
    model.zero_grad()
    torch.compile(model, backend=backend)(x).square().mean().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("name", NAMES)
def test_a_failure_in_any_pass_leaves_inductors_gradients(
    name: str, case: tuple[nn.Module, Tensor, list[Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, exact = case
    passes = tuple(fail if step.__name__ == name else step for step in pipeline.PASSES)
    monkeypatch.setattr(pipeline, "PASSES", passes)
    ours = wtacrs_fx.backend(Policy(ratio=0.3), strict=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = gradients(model, x, ours)
    [warning] = [each for each in caught if each.category is FallbackWarning]
    assert "Broken: on purpose." in str(warning.message)
    assert all(torch.equal(one, other) for one, other in zip(found, exact, strict=True))
    [report] = ours.reports
    assert not report.sites and "Broken: on purpose" in report.notes[0] and report.notes[0] in str(report)


def test_it_is_said_once_for_all_graphs(
    case: tuple[nn.Module, Tensor, list[Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, _ = case
    monkeypatch.setattr(pipeline, "PASSES", (fail,))
    ours = wtacrs_fx.backend(Policy(ratio=0.3), strict=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gradients(model, x, ours)
        gradients(model, x[:64], ours)
    assert len([each for each in caught if each.category is FallbackWarning]) == 1
    assert len(ours.reports) == 2


@pytest.mark.parametrize("how", ["argument", "environment", "option"])
def test_what_is_strict_raises(
    how: str, case: tuple[nn.Module, Tensor, list[Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, _ = case
    monkeypatch.setattr(pipeline, "PASSES", (fail,))
    monkeypatch.setenv("WTACRS_STRICT", "1" if how == "environment" else "0")
    if how == "option":
        torch._dynamo.reset()
        options = {"wtacrs.strict": True, "wtacrs.ratio": 0.25}
        call = torch.compile(model, backend="wtacrs", options=options)
    else:
        ours = wtacrs_fx.backend(Policy(ratio=0.3), strict=True if how == "argument" else None)
        call = torch.compile(model, backend=ours)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="on purpose"):
        call(x)


def test_wrong_input_is_no_failure_of_ours(case: tuple[nn.Module, Tensor, list[Tensor]]) -> None:
    model, x, _ = case
    ours = wtacrs_fx.backend(Policy(ratio=0.3), strict=False)
    with pytest.raises(PolicyError, match="options already"):
        ours(torch.fx.symbolic_trace(model), [x], options={"max_autotune": True})
    with pytest.raises((RuntimeError, torch._dynamo.exc.TorchRuntimeError), match="shapes|size|mat1"):
        gradients(model, torch.randn(4, 31), ours)
    assert not ours.reports
