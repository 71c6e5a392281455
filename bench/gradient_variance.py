"""Error of the sampled weight gradients of a real encoder on real text, beside the noise of the minibatch.

    python -m bench.gradient_variance
    python -m bench.gradient_variance --no-compiled     # without the check through torch.compile

The encoder is fine-tuned and, at several stages, measured without dropout: a gradient that many rows share,
as with a new head, is harder to sample than one that few rows carry. For each linear and batch, over draws:
E ||dW_est - dW||^2 / ||dW||^2. The minibatch noise of the same linear, over minibatches B of one size, is
E ||dW_B - E dW_B||^2 / E ||dW_B||^2. Reported are means over linears and batches, and percentiles.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from itertools import pairwise
from math import ceil
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

import wtacrs_fx
from bench.harness import Row, circumstances, record, summarise
from bench.variance import gram, projection_variance, squared_errors
from wtacrs_fx.diagnose import relative_variance, rows_of
from wtacrs_fx.tools.classification import Classifier, load_encoder
from wtacrs_fx.tools.steps import Compiler, Step, inductor
from wtacrs_fx.tools.texts import load_texts
from wtacrs_passes.maths.estimators import CHOOSERS, PROJECTIONS

RATIOS = (0.3, 0.1)
MIN_ROWS = wtacrs_fx.Policy().min_rows
Batch = dict[str, Tensor]
Figures = dict[tuple[str, str], list[float]]  # (variant, placement) -> relative variance of each linear


class Loss(nn.Module):
    """Wrap the demo's classifier so that its forward is the training objective alone."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross entropy: a scalar."""
        loss, _ = self.classifier(input_ids, attention_mask, labels)
        return loss


def load(batch: int, length: int, seed: int) -> tuple[Loss, Iterator[Batch]]:
    """Return the packaged encoder with a new head, and endless batches of labelled sentences of the news."""
    torch.manual_seed(seed)
    tokenizer, encoder = load_encoder()
    texts, labels, names = load_texts()
    generator = random.Random(seed)

    def batches() -> Iterator[Batch]:
        while True:
            chosen = generator.sample(range(len(texts)), batch)
            sentences = [generator.choice(_sentences(texts[i])) for i in chosen]
            encoded = tokenizer(
                sentences, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
            )
            yield {
                "input_ids": encoded["input_ids"],
                "attention_mask": encoded["attention_mask"],
                "labels": torch.tensor([labels[i] for i in chosen]),
            }

    return Loss(Classifier(encoder, len(names))), batches()


def _sentences(text: str) -> list[str]:
    found = [sentence.strip() for sentence in re.split(r"(?<=[.!?])\s+|\n+", text)]
    return [sentence for sentence in found if len(sentence.split()) >= 5] or [text]


def fine_tune(model: nn.Module, batches: Iterator[Batch], steps: int) -> None:
    """Train for some steps and leave the model in evaluation mode."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    model.train()
    for _ in range(steps):
        model(**next(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def sampled_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linears of the encoder that a policy would sample: all that see each token."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: module for name, module in linears.items() if "pooler" not in name and "head" not in name}


def estimator_errors(model: nn.Module, batch: Batch, draws: int, seed: int) -> Figures:
    """Return the errors of every estimator, ratio and placement on one batch."""
    generator = torch.Generator().manual_seed(seed)
    errors: Figures = {}
    for x, dy in rows_of(model, batch, sampled_linears(model)).values():
        products = gram(x, dy)
        weights = {"forward": x.norm(dim=-1), "backward": x.norm(dim=-1) * dy.norm(dim=-1)}
        for estimator in PROJECTIONS:
            for ratio in RATIOS:
                kept = max(MIN_ROWS, ceil(ratio * len(x)))
                both = torch.stack([x.norm(dim=-1), dy.norm(dim=-1)])
                error = projection_variance(products, both, kept, estimator) / float(products.sum())
                errors.setdefault((f"{estimator} {ratio}", "forward"), []).append(error)
        for estimator in CHOOSERS:
            for ratio in RATIOS:
                kept = max(MIN_ROWS, ceil(ratio * len(x)))
                for placement, weight in weights.items():
                    error = squared_errors(products, weight, kept, estimator, draws, generator).mean()
                    key = (f"{estimator} {ratio}", placement)
                    errors.setdefault(key, []).append(float(error / products.sum()))
    return errors


def minibatch_noise(model: nn.Module, batches: Iterator[Batch], count: int) -> list[float]:
    """Return the relative variance of each linear's gradient over `count` minibatches."""
    weights = [linear.weight for linear in sampled_linears(model).values()]
    return relative_variance(gradients(model, next(batches), weights) for _ in range(count))


def gradients(model: nn.Module, batch: Batch, weights: list[Tensor]) -> tuple[Tensor, ...]:
    """Return the gradients of the loss with respect to `weights`."""
    return torch.autograd.grad(model(**batch), weights)


def compiled_errors(model: nn.Module, batch: Batch, backend: Compiler, draws: int) -> list[float]:
    """Return the relative variance of each linear's gradient under a compiled backend, against Inductor's."""

    def run(step: Step) -> dict[str, Tensor]:
        step()
        return {name: linear.weight.grad for name, linear in sampled_linears(step.model).items()}  # type: ignore[misc]

    exact, sampled = run(Step(model, batch, inductor())), Step(model, batch, backend)
    errors = dict.fromkeys(exact, 0.0)
    for draw in range(draws):
        torch.manual_seed(draw)
        for name, gradient in run(sampled).items():
            errors[name] += (
                float((gradient - exact[name]).square().sum() / exact[name].square().sum()) / draws
            )
    return list(errors.values())


def main(
    batch: int = 32,
    length: int = 48,
    stage: Annotated[
        list[int] | None, typer.Option(help="Steps of fine-tuning; 0, 20, 60, 120 by default.")
    ] = None,
    batches: Annotated[
        int, typer.Option(help="Minibatches for the noise; an eighth of them for estimators.")
    ] = 16,
    draws: int = 50,
    seed: int = 0,
    compiled: Annotated[bool, typer.Option(help="Check the last stage through torch.compile too.")] = True,
    quick: Annotated[bool, typer.Option(help="Few texts, batches and draws; keep no rows.")] = False,
) -> None:
    """Measure the error of sampled gradients and the minibatch noise; append rows to bench/results."""
    stages = sorted(stage or (0, 20, 60, 120))
    if quick:
        batch, length, stages, batches, draws = 16, 16, [0, 2], 8, 4
    model, stream = load(batch, length, seed)

    def describe(step: int, figures: Figures) -> list[Row]:
        shapes = f"batch={batch} length={length} batches={batches}"
        return [
            Row(
                "gradient_variance",
                f"MiniLM, step {step}",
                variant,
                f"relative variance, {placement}",
                unit="1",
                shapes=shapes,
                seed=seed,
                **{**summarise(values), "value": sum(values) / len(values), "rounds": draws},
                **circumstances(),
            )
            for (variant, placement), values in figures.items()
        ]

    for before, now in pairwise([0, *stages]):
        fine_tune(model, stream, now - before)
        fixed = [next(stream) for _ in range(batches // 8)]
        figures: Figures = {("minibatch", "noise"): minibatch_noise(model, stream, batches)}
        for one in fixed:
            for key, values in estimator_errors(model, one, draws, seed).items():
                figures.setdefault(key, []).extend(values)
        if compiled and now == stages[-1]:
            for ratio in RATIOS:
                policy = wtacrs_fx.Policy(ratio=ratio, placement="backward", residuals="exact")
                key = (f"{policy.estimator} {ratio}", "backward, compiled")
                figures[key] = compiled_errors(model, fixed[0], wtacrs_fx.backend(policy), min(draws, 20))
        rows = describe(now, figures)
        record(rows, keep=not quick)


if __name__ == "__main__":
    typer.run(main)
