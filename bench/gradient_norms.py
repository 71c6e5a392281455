"""Noise that rows chosen in the forward pass add, by what is known about gradient norms, epoch by epoch.

    python -m bench.gradient_norms

A MiniLM is fine-tuned on glosses of WordNet's nouns with rows chosen in the forward pass and gradient norms
remembered. At a few steps of every epoch the exact products of each linear are taken, and from them
E ||dW_est - dW||^2 / ||dW||^2 for each form that the memory can have; beside it the minibatch noise of the
same linears. Then the time of a step with and without the memory.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from math import ceil
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

import wtacrs_fx
from bench.accuracy import WORDNET, Task, wordnet
from bench.gradient_variance import MIN_ROWS, Batch, gradients, sampled_linears
from bench.harness import VARIANTS, Row, circumstances, record, summarise
from bench.variance import gram, squared_errors
from wtacrs_fx import gradient_norms
from wtacrs_fx.diagnose import relative_variance, rows_of
from wtacrs_fx.gradient_norms import GradientNorms
from wtacrs_fx.tools.steps import Step, interleave, step_seconds
from wtacrs_passes.maths.estimators import gradient_weights

RATIOS = (0.3, 0.1)
Figures = dict[str, list[float]]  # variant -> relative variance of each linear and batch


def in_dtype(norms: Tensor, dtype: torch.dtype) -> Tensor:
    """Return norms as a record of another dtype would give them back."""
    return gradient_norms._decoded(gradient_norms._encoded(norms, dtype))


def in_buckets(norms: Tensor, size: int) -> Tensor:
    """Return norms as a record of buckets would give them back."""
    pooled, seen = gradient_norms._pooled(norms, size)
    values = torch.where(seen, pooled, 0.0)
    return values.repeat_interleave(size, -1)[:, : norms.shape[-1]]


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "token, float32": lambda norms: norms,
    "token, bfloat16": partial(in_dtype, dtype=torch.bfloat16),
    "token, uint8": partial(in_dtype, dtype=torch.uint8),
    "bucket 4, uint8": lambda norms: in_dtype(in_buckets(norms, 4), torch.uint8),
    "bucket 16, uint8": lambda norms: in_dtype(in_buckets(norms, 16), torch.uint8),
}


def probe(
    model: nn.Module, tracker: GradientNorms, ids: list[int], batch: Batch, draws: int, seed: int
) -> Figures:
    """Return the relative variance of every linear for all that may be known about its gradient norms."""
    generator = torch.Generator().manual_seed(seed)
    exact = rows_of(model, batch, sampled_linears(model))
    records = {path: tracker.records.get(path) for path in exact}
    mask = batch["attention_mask"].flatten()
    every = torch.ones_like(mask)
    found: Figures = {}
    for x, dy in exact.values():
        products = gram(x, dy)
        norms = x.norm(dim=-1)
        # A record belongs to all linears with the same input.
        known = next(
            (
                records[other]
                for other, (same, _) in exact.items()
                if same.data_ptr() == x.data_ptr() and records[other] is not None
            ),
            None,
        )
        nothing = torch.zeros(len(ids), mask.numel() // len(ids))
        variants = {"||x||": (nothing, every, 1.0), "||x||, token mask": (nothing, mask, 0.0)}
        if known is not None:
            samples = torch.tensor(ids)
            for name, form in FORMS.items():
                variants[f"remembered by {name}"] = (
                    gradient_norms._recalled(form(known), samples),
                    mask,
                    1 / 64,
                )
            variants["remembered by token, float32, no mask"] = (
                gradient_norms._recalled(known, samples),
                every,
                1.0,
            )
            variants["remembered by position"] = known[-1:].expand(len(ids), -1), mask, 1 / 64
        weights = {
            name: norms * gradient_weights(values.flatten(), rows, factor)
            for name, (values, rows, factor) in variants.items()
        }
        weights["||x|| ||dy||"] = norms * dy.norm(dim=-1)
        for name, weight in weights.items():
            for ratio in RATIOS:
                kept = max(MIN_ROWS, ceil(ratio * len(x)))
                error = squared_errors(products, weight, kept, "wta-systematic", draws, generator).mean()
                found.setdefault(f"{name}, ratio {ratio}", []).append(float(error / products.sum()))
    return found


def train(task: Task, epochs: int, probes: int, draws: int, seed: int) -> list[tuple[int, Figures]]:
    """Fine-tune with remembered norms; return what was measured in each epoch."""
    model = task.model.train()
    steps = task.samples // BATCH
    tracker = wtacrs_fx.track_gradient_norms(model, task.samples, task.length, torch.float32)
    call = torch.compile(model, backend=VARIANTS["wtacrs 0.3 remembered"](), fullgraph=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    weights = [linear.weight for linear in sampled_linears(model).values()]
    stream = task.batches(seed)
    results = []
    for epoch in range(1, epochs + 1):
        figures: Figures = {}
        fixed: list[Batch] = []
        for step in range(steps):
            ids, batch = next(stream)
            if step % ceil(steps / probes) == steps // probes // 2:
                for name, values in probe(model, tracker, ids, batch, draws, seed + step).items():
                    figures.setdefault(name, []).extend(values)
            fixed = [*fixed, batch][-16:]
            with tracker.batch(ids):
                call(**batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        figures["minibatch"] = relative_variance(gradients(model, one, weights) for one in fixed)
        results.append((epoch, figures))
        shown = {name: f"{statistics.mean(values):.3g}" for name, values in figures.items()}
        print(f"epoch {epoch} of {epochs}, {tracker.nbytes} bytes: {shown}")
    tracker.remove()
    return results


def overhead(task: Task, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of a step with and without the memory, interleaved."""
    ids, batch = next(task.batches(0))
    plain = Step(task.model, batch, VARIANTS["wtacrs 0.3 remembered"]())
    tracker = wtacrs_fx.track_gradient_norms(task.model, task.samples, task.length)
    with tracker.batch(ids):  # makes room for a batch of this size before the step is compiled
        pass
    tracked = Step(task.model, batch, VARIANTS["wtacrs 0.3 remembered"]())
    tracker.remove()
    memory = getattr(tracked.model, gradient_norms.NAME)
    assert isinstance(memory, GradientNorms)

    def remember() -> float:
        tracked.model.zero_grad(set_to_none=True)
        began = time.perf_counter()
        with memory.batch(ids):
            tracked()
        return time.perf_counter() - began

    times = interleave({"without": partial(step_seconds, plain), "remembered": remember}, rounds)
    tracked.check()
    return times


BATCH, LENGTH = 32, 48


def main(
    samples: int = 3200,
    epochs: int = 3,
    probes: Annotated[int, typer.Option(help="Steps of each epoch that are measured.")] = 4,
    draws: int = 50,
    rounds: Annotated[int, typer.Option(help="Timed steps with and without the memory.")] = 21,
    seed: int = 0,
    wordnet_file: Annotated[Path, typer.Option("--wordnet")] = WORDNET,
    quick: Annotated[bool, typer.Option(help="Two batches an epoch; keep no rows.")] = False,
) -> None:
    """Measure the noise of remembered gradient norms, and their time; append rows to bench/results."""
    if quick:
        samples, epochs, probes, draws, rounds = 2 * BATCH, 2, 1, 4, 2
    torch.manual_seed(seed)
    task = wordnet(wordnet_file, BATCH, LENGTH, held_out=100, samples=samples)
    shapes = f"batch={BATCH} length={LENGTH} samples={samples}"

    def describe(model: str, variant: str, metric: str, unit: str, **figures: object) -> Row:
        return Row(
            "gradient_norms", model, variant, metric, unit=unit, shapes=shapes, seed=seed,
            **figures, **circumstances(),
        )  # fmt: skip

    times = overhead(task, rounds) if rounds else {}
    rows = [
        describe("MiniLM", name, "step time", "s", **summarise(values, times["without"]))
        for name, values in times.items()
    ]
    for epoch, figures in train(task, epochs, probes, draws, seed):
        for variant, values in figures.items():
            summary = {**summarise(values), "value": statistics.mean(values)}
            rows.append(describe(f"MiniLM, epoch {epoch}", variant, "relative variance", "1", **summary))
    record(rows, keep=not quick)


if __name__ == "__main__":
    typer.run(main)
