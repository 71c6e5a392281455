"""What the default policy adds to each weight gradient: as its report says, and as draws show.

    python -m bench.noise_budget
    python -m bench.noise_budget --model minilm --precision float32
    python -m bench.noise_budget --quick          # few batches and draws: does it run? keeps no rows

A model takes steps over text until its budget was measured and the code compiled with what follows. Then, of each site,
at the same parameters: the variance of its weight gradients over draws, and over batches, both against the same step
with all rows as the program has them. Residuals are stored as they are, so that nothing else adds an error. Layers of
SmolLM2 are its own, MiniLM was fine-tuned for 60 steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from torch import Tensor, nn

import wtacrs_fx
from bench.accuracy import WORDNET, smollm
from bench.gradient_variance import fine_tune, load
from bench.harness import BUDGET, Row, circumstances, record, summarise
from bench.models import Autocast
from wtacrs_fx import Policy
from wtacrs_fx.tools.steps import Step
from wtacrs_passes.maths.observer import SETTLED
from wtacrs_passes.report import NoiseReport

MODELS = ("smollm", "minilm")
Batch = dict[str, Tensor]
Gradients = dict[str, Tensor]


def load_model(name: str, quick: bool, wordnet: Path) -> tuple[nn.Module, Iterator[Batch]]:
    """Return a model without dropout whose forward is its loss, and endless batches."""
    if name == "minilm":
        model, batches = load(8 if quick else 32, 16 if quick else 48, 0)
        fine_tune(model, batches, 1 if quick else 60)
        return model, batches
    task = smollm(wordnet, 2, 32 if quick else 256, held_out=32)
    return task.model.eval(), (inputs for _, inputs in task.batches(0))


def gradients(step: Step, inputs: Batch) -> Gradients:
    """Return the weight gradient of each module on a batch."""
    step.inputs = inputs
    step()
    named = step.model.named_parameters()
    return {name.removesuffix(".weight"): p.grad for name, p in named if p.grad is not None and p.dim() == 2}


def square(one: Gradients, other: Gradients | None, modules: tuple[str, ...]) -> float:
    """Return the squared distance of the gradients of a site, or their square."""
    return sum(
        float((one[module] - (0 if other is None else other[module])).double().square().sum())
        for module in modules
    )


def noise_of_batches(step: Step, batches: list[Batch], sites: tuple[NoiseReport, ...]) -> list[float]:
    """Return the variance of each site's gradient over batches."""
    total: Gradients = {}
    squares = dict.fromkeys(sites, 0.0)
    for batch in batches:
        found = gradients(step, batch)
        for site in sites:
            squares[site] += square(found, None, site.modules)
        total = {name: total[name] + value if total else value.clone() for name, value in found.items()}
    count = len(batches)
    return [(squares[s] - square(total, None, s.modules) / count) / (count - 1) for s in sites]


def rows(name: str, precision: str, quick: bool, wordnet: Path) -> list[Row]:
    """Return, over sites, what is added by draws and by the report, as shares of the minibatch's noise."""
    model, batches = load_model(name, quick, wordnet)
    run = Autocast(model, "cpu") if precision == "autocast" else model
    first = next(batches)
    budget = Step(run, first, wtacrs_fx.backend(Policy(residuals="exact")))
    budget.settle(itertools.islice(batches, SETTLED))
    sites = next(report.noise for report in reversed(budget.reports) if report.noise)
    exact = Step(run, first, wtacrs_fx.backend(Policy(ratio=1.0, residuals="exact")))
    of_their_own = gradients(exact, first).keys()  # a head that is tied to the embedding has none
    sites = tuple(site for site in sites if of_their_own >= set(site.modules))
    of_minibatch = noise_of_batches(exact, list(itertools.islice(batches, 4 if quick else 24)), sites)
    added, draws = [0.0] * len(sites), 2 if quick else 6
    fixed = list(itertools.islice(batches, 1 if quick else 4))
    for batch in fixed:
        wanted = gradients(exact, batch)
        for _ in range(draws):
            found = gradients(budget, batch)
            for i, site in enumerate(sites):
                added[i] += square(found, wanted, site.modules) / draws / len(fixed)
    measured = [a / m for a, m in zip(added, of_minibatch, strict=True)]
    predicted = [site.added for site in sites]
    relative = [p / m for p, m in zip(predicted, measured, strict=True) if m]
    sampled = [float(site.ratio < 1) for site in sites]
    for site, share in zip(sites, measured, strict=True):
        print(
            f"{', '.join(site.modules)}: rows {site.ratio}, predicted {site.added:.2g}, measured {share:.2g}"
        )
    shapes = " x ".join(map(str, first["input_ids"].shape))
    figures = {
        "added, of the minibatch's": {**summarise(measured), "value": max(measured)},
        "added, as the report says": {**summarise(predicted), "value": max(predicted)},
        **({"predicted over measured": summarise(relative)} if relative else {}),
        "sites whose rows are drawn": {"value": sum(sampled) / len(sampled), "rounds": len(sampled)},
    }
    return [
        Row(
            "noise_budget",
            name,
            BUDGET,
            metric,
            unit="1",
            shapes=shapes,
            dtype=precision,
            **figure,
            **circumstances(),
        )
        for metric, figure in figures.items()
    ]


def main(
    model: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(MODELS)}; all by default.")] = None,
    precision: Annotated[list[str] | None, typer.Option(help="autocast, float32; both by default.")] = None,
    wordnet: Path = WORDNET,
    quick: Annotated[bool, typer.Option(help="Short texts, few batches and draws; keep no rows.")] = False,
) -> None:
    """Measure what the default policy adds; append rows to bench/results."""
    for name, kind in itertools.product(model or MODELS, precision or ("autocast", "float32")):
        record(rows(name, kind, quick, wordnet), keep=not quick)


if __name__ == "__main__":
    typer.run(main)
