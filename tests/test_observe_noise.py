"""A noise budget in compiled steps: what is measured, what follows, what cannot be measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Transformer
from torch import Tensor, fx, nn

import wtacrs_fx
from wtacrs_fx import Policy, Rule
from wtacrs_fx.backend import Backend
from wtacrs_passes import rates
from wtacrs_passes.decide.rows import BY_BUDGET
from wtacrs_passes.maths import ops
from wtacrs_passes.maths.observer import SETTLED

TOKENS = torch.randint(50, (4, 32))
D, WIDE = 64, 128


class Tagger(nn.Module):
    """Labels for some tokens of each sample; the others have no gradient."""

    def __init__(self, wide: int = WIDE) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(D, wide), nn.Linear(wide, D)
        self.head = nn.Linear(D, 40)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        x = x + self.down(nn.functional.gelu(self.up(x)))
        logits = self.head(x).flatten(0, 1)
        return nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=-100)


def batch(labelled: int) -> tuple[Tensor, Tensor]:
    labels = torch.randint(40, (8, 64))
    labels[:, labelled:] = -100
    return torch.randn(8, 64, D), labels


@pytest.fixture(autouse=True)
def known_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is timed: fewer rows are faster."""

    def measure(precisions: Sequence[str], sizes: tuple[int, int, int], *_: Any) -> tuple[rates.Rates, bool]:
        drawing = {rates.DRAWING: 1.0} if rates.DRAWING in precisions else {}
        return dict.fromkeys(precisions, float(sizes[0])) | drawing, True

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(rates, "_measure", measure)
    rates._of_process.cache_clear()
    yield
    rates._of_process.cache_clear()


def compiled(model: nn.Module, policy: Policy, **config: Any) -> tuple[Any, Backend]:
    backend = wtacrs_fx.backend(policy, **config)
    return torch.compile(model, backend=backend), backend


def observed(gm: fx.GraphModule) -> list[tuple[str, int]]:
    """Return the modules of each measurement, with the number of its dY."""
    calls = [node for node in gm.graph.nodes if node.target is ops.observe]
    return [(str(node.args[-1]), len(node.args[2])) for node in calls]  # type: ignore[arg-type]


def test_products_that_would_share_a_draw_are_measured_together() -> None:
    model = Transformer()
    rewritten = wtacrs_fx.transform(wtacrs_fx.capture(model, TOKENS))
    found = dict(observed(rewritten))
    together = [modules.split("|") for modules in found]
    assert any(len(modules) == 3 for modules in together)  # q, k, v
    assert all(number == len(modules.split("|")) for modules, number in found.items())
    reasons = {site.module: site.reason for site in rewritten.report.sites}
    assert {module for modules in together for module in modules} == {
        module for module, reason in reasons.items() if reason == BY_BUDGET
    }


@pytest.mark.parametrize(
    "policy", [Policy(ratio=0.3), Policy(ratio=1.0), Policy(exclude=("*",)), Policy(min_rows=4096)]
)
def test_without_a_budget_nothing_is_measured(policy: Policy) -> None:
    rewritten = wtacrs_fx.transform(wtacrs_fx.capture(Transformer(), TOKENS), policy)
    assert not observed(rewritten)
    assert not [node for node in rewritten.graph.nodes if node.target is ops.observed_step]


def test_some_modules_may_have_a_budget() -> None:
    policy = Policy(ratio=0.3, rules=(Rule("up", ratio=None, noise=0.1),))
    rewritten = wtacrs_fx.transform(wtacrs_fx.capture(Tagger(), *batch(64)), policy)
    assert observed(rewritten) == [("up", 1)]
    assert {site.module for site in rewritten.report.sampled} == {"down", "head"}


def test_what_tells_the_step_is_no_saved_byte() -> None:
    joint = wtacrs_fx.capture(Tagger(), *batch(64))
    budget, none = (
        wtacrs_fx.transform(joint, policy).report for policy in (Policy(product="exact"), Policy(ratio=1.0))
    )
    assert budget.saved_bytes_after == none.saved_bytes_after
    assert len(budget.residuals) == len(none.residuals)


def train(call: Any, model: nn.Module, labelled: int, number: int) -> None:
    for _ in range(number):
        model.zero_grad()
        call(*batch(labelled)).backward()


@pytest.mark.sweep(0.5)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_compiled_again_with_what_its_budget_allows(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Tagger()
    call, backend = compiled(model, Policy(product="exact"))
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        train(call, model, labelled=12, number=24)
        assert len(backend.reports) == 1 and not backend.decided and not backend.reports[0].sampled
        train(call, model, labelled=12, number=SETTLED - 24)
        first, second = backend.reports
        # A fifth of the rows has a gradient, so 0.2 of them, the winners, are all that there is to draw.
        assert {rule.pattern: dict(rule.overrides)["ratio"] for rule in backend.decided} == {
            "up": 0.2, "down": 0.2, "head": 0.2,
        }  # fmt: skip
        assert {site.module for site in second.sampled} == {"up", "down", "head"}
        for site in first.noise:
            assert site.minibatch > 0.3 and site.drawn[0] > 0.1 and site.drawn[1] < 1e-3
            assert (site.ratio, site.steps, site.budget) == (0.2, 16, 0.05)
        x, labels = batch(12)
        model.zero_grad()
        call(x, labels).backward()
        sampled = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        model(x, labels).backward()
    for found, parameter in zip(sampled, model.parameters(), strict=True):
        assert parameter.grad is not None
        assert float((found - parameter.grad).norm() / parameter.grad.norm()) < 0.1  # encodings alone
    assert "noise of" in str(backend.reports[0]) and "rows 0.2, exact" in str(backend.reports[0])


def test_a_layer_that_leaves_its_budget_gets_its_rows_back() -> None:
    torch.manual_seed(0)
    model = Tagger()
    call, backend = compiled(model, Policy(product="exact"))
    train(call, model, labelled=12, number=SETTLED)
    assert len(backend.reports) == 2 and backend.reports[1].sampled
    train(call, model, labelled=64, number=121 - SETTLED)  # every row has a gradient now
    assert all(site.ratio > 0.2 for site in backend.reports[1].noise)
    train(call, model, labelled=64, number=1)
    assert len(backend.reports) == 3
    assert all(dict(rule.overrides)["ratio"] > 0.2 for rule in backend.decided)
    assert all(site.kept > 0.5 * site.rows for site in backend.reports[2].sites)


def test_what_stays_is_not_compiled_again() -> None:
    torch.manual_seed(0)
    model = Tagger()
    call, backend = compiled(model, Policy(noise=1e-4, product="exact"))
    train(call, model, labelled=64, number=SETTLED)
    [report] = backend.reports
    assert report.noise and all(site.ratio == 1.0 for site in report.noise)
    assert wtacrs_fx.Report.from_dict(report.to_dict()) == report


def test_a_resumed_run_decides_alike() -> None:
    torch.manual_seed(0)
    model = Tagger()
    call, backend = compiled(model, Policy(product="exact"))
    train(call, model, labelled=12, number=SETTLED)
    resumed, again = compiled(Tagger(), Policy(product="exact", decided=eval(repr(backend.decided))))
    train(resumed, model, labelled=12, number=1)
    assert [site.kept for site in again.reports[0].sites] == [site.kept for site in backend.reports[1].sites]


def test_recorded_steps_are_not_measured() -> None:
    model = Tagger()
    backend = wtacrs_fx.backend(Policy(), mode="reduce-overhead")
    train(torch.compile(model, backend=backend), model, labelled=12, number=1)
    reasons = {site.reason for site in backend.reports[0].sites}
    assert reasons == {"ratio 1.0"}


def test_models_of_other_sizes_decide_by_themselves() -> None:
    """As two models of one process do, both with ``backend="wtacrs"``."""
    torch.manual_seed(0)
    first, second = Tagger(), Tagger(2 * WIDE)
    backend = wtacrs_fx.backend(Policy(product="exact"))
    calls = [torch.compile(model, backend=backend) for model in (first, second)]
    train(calls[0], first, labelled=12, number=25)  # decided, not yet compiled again
    train(calls[1], second, labelled=64, number=1)
    assert not backend.reports[1].sampled
    train(calls[0], first, labelled=12, number=1)
    assert len(backend.reports) == 3 and backend.reports[2].sampled
