"""Error of the whole gradient of a real encoder on real text, by how residuals are stored.

    python -m bench.gradient_error

Ratio 1.0 shows what the encodings alone do, ratio 0.3 what they add to sampled rows. The figure is
E ||g - g_exact||^2 / ||g_exact||^2 over all parameters at once, beside the same between minibatches; the
bytes are those that cross from forward to backward. The modes were chosen from the mixtures; `fitted` are bits by
measured sensitivity.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

import wtacrs_fx
from bench.gradient_variance import Batch, fine_tune, load
from bench.harness import BASELINE, MIB, Row, circumstances, record, summarise
from wtacrs_fx import Policy, Sensitivity
from wtacrs_fx.diagnose import relative_variance
from wtacrs_fx.tools.steps import Step, inductor, saved_bytes
from wtacrs_passes.decide.modes import MODES, Mode

MIXTURES = {
    "int8": Mode("int8", "int8", 4, attends_twice=False),
    "int8, int6 before functions": Mode("int8", "int6", 3, attends_twice=False),
    "int6": Mode("int6", "int6", 3, attends_twice=False),
    "int8, int4 before functions": Mode("int8", "int4", 3, attends_twice=False),
    "int4, int8 before functions": Mode("int4", "int8", 3, attends_twice=False),
    "int4": Mode("int4", "int4", 2),
}

FITTED = (0.01, 0.003, 0.0006)
"""Errors for which bits are chosen by measured sensitivity."""


@contextmanager
def mode(mixture: Mode) -> Iterator[None]:
    """Let `balanced` mean a mixture; caches are off, because their key does not know."""
    before = MODES["balanced"]
    MODES["balanced"] = mixture
    try:
        with torch._inductor.config.patch(force_disable_caches=True):
            yield
    finally:
        MODES["balanced"] = before


def gradient(step: Step) -> Tensor:
    """Run a step and return all gradients as one vector, float64."""
    step()
    return torch.cat([p.grad.double().flatten() for p in step.model.parameters() if p.grad is not None])


def errors(step: Step, exact: Tensor, draws: int) -> list[float]:
    """Return the relative squared error of the gradient for each draw of the rows."""
    found = []
    for draw in range(draws):
        torch.manual_seed(draw)
        found.append(float((gradient(step) - exact).square().sum() / exact.square().sum()))
    return found


def minibatch_noise(model: nn.Module, batches: Iterator[Batch], count: int) -> float:
    """Return the relative variance of the whole gradient over minibatches."""
    [noise] = relative_variance([gradient(Step(model, next(batches), None))] for _ in range(count))
    return noise


def main(
    batch: int = 32,
    length: int = 48,
    stage: Annotated[
        list[int] | None, typer.Option(help="Steps of fine-tuning; 0 and 60 by default.")
    ] = None,
    variant: Annotated[list[str] | None, typer.Option(help="All by default.")] = None,
    draws: int = 5,
    seed: int = 0,
    quick: Annotated[bool, typer.Option(help="Short texts, one draw; keep no rows.")] = False,
) -> None:
    """Measure the error of gradients through encoded residuals; append rows to bench/results."""
    stages = sorted(stage or (0, 60))
    if quick:
        batch, length, stages, draws = 8, 16, [1], 1
    model, stream = load(batch, length, seed)
    for before, now in pairwise([0, *stages]):
        fine_tune(model, stream, now - before)
        fixed = next(stream)
        baseline = Step(model, fixed, inductor())
        exact, kept = gradient(baseline), saved_bytes(baseline)
        rows = []

        def describe(stored: str, metric: str, unit: str, step: int = now, **figures: object) -> Row:
            shapes = f"batch={batch} length={length}"
            return Row(
                "gradient_error", f"MiniLM, step {step}", stored, metric, unit=unit, shapes=shapes, seed=seed,
                **figures, **circumstances(),
            )  # fmt: skip

        noise = minibatch_noise(model, stream, 4 if quick else 16)
        rows.append(describe("minibatch noise", "relative squared error", "1", value=noise))
        exactly, default = Policy(residuals="balanced", ratio=1.0), MODES["balanced"]
        fitted: Sensitivity | None = None
        policies = {f"{name}, ratio 1": (exactly, mixture) for name, mixture in MIXTURES.items()}
        policies |= {
            f"{name}, products again, ratio 1": (
                Policy(residuals=name, ratio=1.0, recompute_products=1.0),
                default,
            )
            for name in ("fine", "balanced", "small")
        }
        for name in ("exact", "balanced", "small"):
            policies[f"{name}, ratio 0.3"] = (
                Policy(ratio=0.3, residuals=name, placement="backward"),
                default,
            )
        for error in () if quick else FITTED:
            name = f"fitted, error {error}, ratio 1"
            if not variant or name in variant:
                fitted = fitted or wtacrs_fx.sensitivity(model, fixed, exactly)
                policies[name] = (fitted.policy(error=error), default)
        for name, (policy, mixture) in policies.items():
            if variant and name not in variant:
                continue
            with mode(mixture):
                step = Step(model, fixed, wtacrs_fx.backend(policy))
            size = saved_bytes(step)
            found = errors(step, exact, draws if policy.ratio < 1 else 1)
            figures = {**summarise(found), "value": sum(found) / len(found)}
            rows.append(describe(name, "relative squared error", "1", **figures))
            rows.append(describe(name, "saved", "MiB", value=size / MIB, ratio=size / kept))
        rows.append(describe(BASELINE, "saved", "MiB", value=kept / MIB, ratio=1.0))
        record(rows, keep=not quick)


if __name__ == "__main__":
    typer.run(main)
