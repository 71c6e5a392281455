"""A model's own training step with wtacrs beside Inductor's: are gradients right, is it worth it."""

from __future__ import annotations

import collections
import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from wtacrs_passes.maths.observer import SETTLED
from wtacrs_passes.policy import Policy
from wtacrs_passes.report import Report, format_bytes

from ..backend import backend
from .progress import Progress, silent
from .steps import Compiler, Step, inductor, measure_steps

INDUCTOR, EXACT, ROUNDED, SAMPLED, DEFAULT = "inductor", "exact", "rounded", "sampled", "wtacrs"
POLICIES = {
    EXACT: Policy(ratio=1.0, residuals="exact"),
    ROUNDED: Policy(ratio=1.0),
    SAMPLED: Policy(ratio=0.3, residuals="exact"),
    DEFAULT: Policy(),
}
"""What is looked at apart: nothing changed, residuals rounded, rows sampled; and all together."""

LARGEST_ERROR = 0.02
"""Squared error of the gradient, beside its square, that rounding residuals may cause."""
DRAWS, DIRECTIONS, LARGEST_T = 12, 4, 6.5
"""A test of the mean of so many draws, in random directions: Student's t, 11 degrees of freedom, significance 2e-4."""
LOSS = 1e-3
"""How much the loss may change, of itself or of one."""
WORTH, SLOW = 0.9, 1.1
"""Of Inductor's bytes, and of its time."""

Kind = Literal["good", "poor", "wrong"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        kind: ``wrong`` is a bug; ``poor`` is right, and no gain.
    """

    kind: Kind
    text: str


@dataclasses.dataclass(frozen=True)
class Figures:
    """What a variant takes: bytes, bytes, seconds of a step and of its compilation."""

    saved: int
    peak: int
    seconds: float
    compile_seconds: float


@dataclasses.dataclass(frozen=True)
class Check:
    """What was found of a model.

    Attributes:
        figures: by variant.
        report: of the default policy.
    """

    figures: dict[str, Figures]
    findings: tuple[Finding, ...]
    report: Report

    @property
    def verdict(self) -> Kind:
        """The worst of the findings."""
        kinds = {finding.kind for finding in self.findings}
        return "wrong" if "wrong" in kinds else "poor" if "poor" in kinds else "good"

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and strings."""
        return {
            "verdict": self.verdict,
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
            "figures": {name: dataclasses.asdict(one) for name, one in self.figures.items()},
            "report": self.report.to_dict(),
        }


def check(model: nn.Module, inputs: dict[str, Tensor], rounds: int = 5, progress: Progress = silent) -> Check:
    """Run a step of a model in each way, and compare.

    Args:
        model: its output is a loss, or a tuple with it first.
        rounds: timed steps of each way.

    Raises:
        BackendCompilerFailed: of torch: this backend failed.
    """
    steps = compile_all(model, inputs, progress)
    findings = compare_gradients(steps)
    known = 0
    while known < (known := len(steps[DEFAULT].reports)):  # until its noise budget leads to nothing else
        steps[DEFAULT].settle([inputs] * SETTLED)
    measured = measure_steps({name: steps[name] for name in (INDUCTOR, DEFAULT)}, rounds, progress)
    figures = {
        name: Figures(one.saved, one.peak, statistics.median(one.seconds), steps[name].first_call_seconds)
        for name, one in measured.items()
    }
    report = steps[DEFAULT].reports[-1]
    findings += _of_costs(figures[INDUCTOR], figures[DEFAULT], report)
    return Check(figures, tuple(findings), report)


def compile_all(
    model: nn.Module,
    inputs: dict[str, Tensor],
    progress: Progress = silent,
    names: Sequence[str] = tuple(POLICIES),
) -> dict[str, Step]:
    """Return a compiled step with Inductor, and with each of :data:`POLICIES` that is named."""
    compilers: dict[str, Compiler] = {INDUCTOR: inductor()}
    compilers |= {name: backend(POLICIES[name], strict=True) for name in names}
    steps: dict[str, Step] = {}
    progress("compiling", 0, len(compilers))
    for name, compiler in compilers.items():
        steps[name] = Step(model, inputs, compiler)
        progress("compiling", len(steps), len(compilers))
    return steps


def compare_gradients(steps: dict[str, Step]) -> list[Finding]:
    """Return what is to be said of losses and gradients of the policies among the steps."""
    loss, exact = _run(steps[INDUCTOR], seed=0)
    if not all(bool(each.isfinite().all()) for each in exact):
        text = "Inductor's own gradients are not finite with these inputs: nothing can be compared"
        return [Finding("poor", text)]
    looks = {EXACT: _of_nothing, ROUNDED: _of_rounding, SAMPLED: _of_sampling}
    findings = [look(steps, exact) for name, look in looks.items() if name in steps]
    changed = {name: abs(_run(step, seed=0)[0] - loss) for name, step in steps.items()}
    worst = max(changed, key=changed.__getitem__)
    kind: Kind = "good" if changed[worst] <= LOSS * max(1.0, abs(loss)) else "wrong"
    return [*findings, Finding(kind, f"the loss is {loss:.6g}, and changes by {changed[worst]:.2g} at most")]


def _run(step: Step, seed: int) -> tuple[float, list[Tensor]]:
    """Return the loss of a step, and its gradients."""
    torch.manual_seed(seed)
    loss = float(step())
    found = [parameter.grad for parameter in step.model.parameters() if parameter.grad is not None]
    return loss, [gradient.detach().clone() for gradient in found]


def _distance(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Return the squared error of all gradients, beside their squares; infinite where one is not finite."""
    error = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(found, exact, strict=True))
    size = sum(float(b.double().square().sum()) for b in exact)
    return error / size if size and error == error else (float("inf") if error else 0.0)


def _of_nothing(steps: dict[str, Step], exact: list[Tensor]) -> Finding:
    distance = _distance(_run(steps[EXACT], seed=0)[1], exact)
    nothing = "with nothing sampled and nothing rounded, gradients"
    if distance:  # sums of an embedding's rows by several threads have no order
        again = max(_distance(_run(steps[INDUCTOR], seed=0)[1], exact) for _ in range(3))
        if distance <= 10 * again:
            return Finding(
                "good", f"{nothing} differ as those of Inductor from run to run: {again:.2g} of their square"
            )
        return Finding("wrong", f"{nothing} differ: {distance:.2g} of their square")
    return Finding("good", f"{nothing} are Inductor's to the last bit")


def _of_rounding(steps: dict[str, Step], exact: list[Tensor]) -> Finding:
    distance = _distance(_run(steps[ROUNDED], seed=0)[1], exact)
    kind: Kind = "good" if distance <= LARGEST_ERROR else "wrong"
    text = f"rounding residuals changes gradients by {distance:.2g} of their square"
    return Finding(kind, f"{text} (at most {LARGEST_ERROR})")


def _of_sampling(steps: dict[str, Step], exact: list[Tensor]) -> Finding:
    step = steps[SAMPLED]
    if not step.reports[-1].sampled:
        return Finding("good", "no rows are sampled: no weight gradient is a product over enough of them")
    if _distance(_run(steps[INDUCTOR], seed=1)[1], exact) > 0:
        text = "whether sampled gradients are unbiased was not tested: the program draws random numbers"
        return Finding("good", text)
    errors = torch.stack([_projected(_run(step, seed)[1], exact) for seed in range(DRAWS)])
    spread = errors.std(0) / DRAWS**0.5
    largest = float((errors.mean(0).abs() / spread.clamp(min=1e-300)).where(spread > 0, 0.0).max())
    kind: Kind = "good" if largest <= LARGEST_T else "wrong"
    text = f"sampled gradients are unbiased: t = {largest:.1f} over {DRAWS} draws"
    return Finding(kind, f"{text} (at most {LARGEST_T})")


def _projected(found: list[Tensor], exact: list[Tensor]) -> Tensor:
    """Return the error of gradients along random directions: [DIRECTIONS], float64."""
    total = torch.zeros(DIRECTIONS, dtype=torch.float64)
    for number, (one, other) in enumerate(zip(found, exact, strict=True)):
        generator = torch.Generator(one.device).manual_seed(number)
        error = (one.double() - other.double()).flatten()
        for direction in range(DIRECTIONS):
            signs = torch.randint(2, error.shape, generator=generator, device=one.device)
            total[direction] += float((error * (2 * signs - 1)).sum())
    return total


def _of_costs(baseline: Figures, ours: Figures, report: Report) -> Iterator[Finding]:
    share = ours.saved / max(1, baseline.saved)
    text = f"saved for the backward pass: {share:.2f} of Inductor's"
    if share > WORTH:
        text += f"; most of it as it is: {_largest_reason(report)}"
    yield Finding("good" if share <= WORTH else "poor", text)
    peak = ours.peak / max(1, baseline.peak)
    yield Finding("good" if peak <= 1.0 else "poor", f"peak of a step: {peak:.2f} of Inductor's")
    time = ours.seconds / baseline.seconds
    yield Finding("good" if time <= SLOW else "poor", f"time of a step: {time:.2f} of Inductor's")


def _largest_reason(report: Report) -> str:
    """Return why most bytes are stored as they are."""
    sizes: collections.Counter[str] = collections.Counter()
    for residual in report.residuals:
        if residual.encoding == "exact" and isinstance(residual.bytes_after, int):
            reason = residual.gradient.removeprefix("exact").removeprefix(": ")
            sizes[reason or "small, or of integers, or in rows too short to encode"] += residual.bytes_after
    if not sizes:
        return "nothing"
    [(reason, size)] = sizes.most_common(1)
    return f"{format_bytes(size)}: {reason}"
