"""Ways to a weight gradient by noise and time, with the factors of real models on real text.

    python -m bench.estimators
    python -m bench.estimators --model minilm --precision autocast
    python -m bench.estimators --quick            # short texts, one round: does it run? keeps no rows

A site is an input X and the gradients dY of all linears that read it, side by side. Noise is the variance of ``X^T dY``
in closed form, over the minibatch's own. Time is that of the product, with what its rounding and drawing take, over the
exact one in the same precision; SmolLM2 has 8 x 256 tokens, MiniLM 32 x 48, padded.

A few directions may be taken exactly, so that rows are drawn for the rest alone. With X = Z V^T + R::

    X^T dY = V (Z^T dY) + R^T dY

``mean`` has one, the mean row; ``8 directions`` the principal ones of X in the batch before; ``both`` treats dY alike.
What finding them takes is not counted: it would be once in many steps.

``16 rows apart`` multiplies the rows exactly whose norms have the largest products, and all others in 8 bits, whose
steps those no longer make wide.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import torch
import typer
from torch import Tensor, nn

from bench.accuracy import WORDNET, smollm
from bench.gradient_variance import fine_tune, load, sampled_linears
from bench.harness import RESULTS, Row, circumstances, record, summarise
from bench.products import EXACT, Product, exact, int8, rounded
from wtacrs_fx.diagnose import relative_variance, rows_of, sampling_variance
from wtacrs_fx.tools import measure
from wtacrs_fx.tools.steps import interleave
from wtacrs_passes.maths.estimators import NOISE
from wtacrs_passes.maths.observer import RATIOS, rounding_variance

MODELS = ("smollm", "minilm")
PRECISIONS = {"autocast": torch.bfloat16, "float32": torch.float32}
LAYERS = (0, 7, 15, 22, 29)
"""Of SmolLM2, those that are looked at."""
BUDGETS = (0.05, 0.2, 1.0)
APART, OUTLYING = "int8, 16 rows apart", 16
IN_8_BITS = ("int8", APART)
ADDED = "added, of the minibatch's"
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Split:
    """What of a factor is exact: the mean row, or the part along some directions of it, or of both factors."""

    name: str
    directions: int = 0
    both: bool = False
    mean: bool = False


WHOLE = Split("")
SPLITS = (
    WHOLE,
    Split("mean", mean=True),
    Split("8 directions", 8),
    Split("32 directions", 32),
    Split("32 directions of both", 32, both=True),
)


@dataclass(frozen=True)
class Way:
    """All rows or some, of the whole or of what a split leaves, multiplied in some precision."""

    ratio: float
    split: Split
    precision: str

    def __str__(self) -> str:
        rows = "all rows" if self.ratio == 1.0 else f"rows {self.ratio}"
        return ", ".join(
            filter(None, (rows, self.split.name, self.precision if self.precision != EXACT else ""))
        )


def ways(dtype: torch.dtype) -> list[Way]:
    """Return all ways to products of factors of a precision; the exact one is the first."""
    fewer = ("bfloat16", *IN_8_BITS) if dtype == torch.float32 else IN_8_BITS
    all_rows = [Way(1.0, WHOLE, precision) for precision in (EXACT, *fewer)]
    drawn = itertools.product(RATIOS, SPLITS, (EXACT, "int8"))
    return [*all_rows, *(Way(ratio, split, precision) for ratio, split, precision in drawn)]


@dataclass(frozen=True)
class Site:
    """The factors of one site, and what is known of them.

    Attributes:
        x: [rows, m]; dy: [rows, n]; of the precision in which they are multiplied.
        v, u: principal directions of X and dY in the batch before: [m, 32], [n, 32], orthonormal.
        minibatch: variance of ``x^T dy`` between batches, over its mean square.
    """

    x: Tensor
    dy: Tensor
    v: Tensor
    u: Tensor
    minibatch: float

    @property
    def sizes(self) -> tuple[int, int, int]:
        return len(self.x), self.x.shape[1], self.dy.shape[1]


def principal_directions(x: Tensor, count: int) -> Tensor:
    """Return orthonormal directions of the rows of `x` [rows, m] with the most of their squares: [m, count]."""
    torch.manual_seed(0)
    _, _, v = torch.svd_lowrank(x.float(), count + 8, niter=4)
    return v[:, :count].to(x.dtype)


# Noise


def without(x: Tensor, directions: Tensor) -> Tensor:
    """Return what is left of rows without their part along orthonormal directions: [rows, m]."""
    return x - (x @ directions) @ directions.T


def added(site: Site, chosen: Sequence[Way]) -> dict[Way, float]:
    """Return the variance of each way to a site's gradient, over that of the minibatch."""
    x, dy = site.x.double(), site.dy.double()
    square = float((x.T @ dy).square().sum())
    rest = torch.ones(len(x), dtype=torch.bool).index_fill(0, outlying(site.x, site.dy), False)
    of_rounding = {
        "int8": float(rounding_variance(site.x, [site.dy])),
        APART: float(rounding_variance(site.x[rest], [site.dy[rest]])),
    }
    of_draw = {key: drawing_variance(x, dy, site, *key) for key in {(way.ratio, way.split) for way in chosen}}

    def share(way: Way) -> float:
        rounding = of_rounding.get(way.precision, 0.0) / way.ratio
        return (of_draw[way.ratio, way.split] + rounding) / square / site.minibatch

    return {way: share(way) for way in chosen}


def drawing_variance(x: Tensor, dy: Tensor, site: Site, ratio: float, split: Split) -> float:
    """Return the variance of drawn rows of what a split leaves of a site's factors, given in float64."""
    x = x - x.mean(0) if split.mean else x
    x = without(x, site.v[:, : split.directions].double()) if split.directions else x
    dy = without(dy, site.u[:, : split.directions].double()) if split.both else dy
    norms = x.norm(dim=-1) * dy.norm(dim=-1)
    return sampling_variance(x, dy, norms, norms, max(1, math.ceil(ratio * len(x))))


# Time


def drawn(
    x: Tensor, dy: Tensor, v: Tensor, u: Tensor, ratio: float, split: Split, multiply: Product
) -> Tensor:
    """Return an estimate of ``x^T dy``: [m, n].

    Args:
        v, u: [m, r], [n, r]; of `split` where it has directions.
    """
    gather = torch.ops.wtacrs.gather_rows
    norms = [torch.ops.wtacrs.row_norms([factor]) for factor in (x, dy)]
    if split.mean:
        v = x.mean(0).unsqueeze(-1)
        z = torch.ones(len(x), 1, dtype=x.dtype)
        squares = norms[0].square() - 2 * (x @ v).squeeze(-1) + v.square().sum()
    elif split.directions:
        z = x @ v
        squares = norms[0].square() - z.float().square().sum(-1)
    if split is not WHOLE:
        norms[0] = squares.clamp(min=0.0).sqrt()
    if split.both:
        w = dy @ u
        norms[1] = (norms[1].square() - w.float().square().sum(-1)).clamp(min=0.0).sqrt()
    indices, scales = torch.ops.wtacrs.choose_rows(
        norms, torch.rand(NOISE), round(ratio * len(x)), "wta-systematic"
    )
    rows, tangents = gather(x, indices), gather(dy, indices, scales)
    if split.both:
        tangents = torch.addmm(tangents, gather(w, indices, scales), u.T, alpha=-1)
    product = multiply(rows, tangents)
    if split is WHOLE:
        return product
    along = z.T @ dy - gather(z, indices).T @ tangents
    if split.both:
        product = product.addmm_(x.T @ w - v @ (z.T @ w), u.T)
    return product.addmm_(v, along)


def outlying(x: Tensor, dy: Tensor) -> Tensor:
    """Return the numbers of the rows whose norms have the largest products."""
    norms = [torch.ops.wtacrs.row_norms([factor]) for factor in (x, dy)]
    return (norms[0] * norms[1]).topk(min(OUTLYING, len(x))).indices


def apart(x: Tensor, dy: Tensor) -> Tensor:
    """Return ``x^T dy`` with outlying rows exactly and the others in 8 bits."""
    few = outlying(x, dy)
    product = int8(x.index_fill(0, few, 0.0), dy.index_fill(0, few, 0.0))
    return product.addmm_(x[few].T, dy[few])


def call(site: Site, way: Way) -> Callable[[], Tensor]:
    """Return what computes a site's gradient in some way."""
    multiply = {EXACT: exact, "int8": int8, APART: apart}.get(way.precision) or partial(
        rounded, precision=way.precision, at_random=False
    )
    if way.ratio == 1.0:
        return partial(multiply, site.x, site.dy)
    count = way.split.directions
    v, u = site.v[:, :count].contiguous(), site.u[:, :count].contiguous()
    return partial(drawn, site.x, site.dy, v, u, way.ratio, way.split, multiply)


def seconds(
    sites: Sequence[Site], chosen: Sequence[Way], rounds: int
) -> dict[tuple[int, int, int], dict[Way, float]]:
    """Return the time of every way to sites of each size: medians of interleaved calls."""
    found: dict[tuple[int, int, int], dict[Way, float]] = {}
    for site in sites:
        if site.sizes not in found:
            calls = {
                str(way): partial(measure.step_seconds, call(site, way), site.x.device) for way in chosen
            }
            times = interleave(calls, rounds)
            found[site.sizes] = {way: float(summarise(times[str(way)])["value"]) for way in chosen}
    return found


# Models


def load_model(name: str, quick: bool, wordnet: Path) -> tuple[nn.Module, Iterator[Batch], list[str]]:
    """Return a model without dropout whose forward is its loss, endless batches, and paths of linears."""
    if name == "minilm":
        model, batches = load(8 if quick else 32, 16 if quick else 48, 0)
        fine_tune(model, batches, 1 if quick else 60)
        return model, batches, list(sampled_linears(model))
    task = smollm(wordnet, 8, 32 if quick else 256, held_out=32)
    linears = [path for path, module in task.model.named_modules() if isinstance(module, nn.Linear)]
    paths = [path for path in linears if any(f".layers.{layer}." in path for layer in LAYERS)]
    return task.model.eval(), (inputs for _, inputs in task.batches(0)), paths


def load_sites(name: str, precision: str, quick: bool, wordnet: Path) -> list[Site]:
    """Return the sites of a model; minibatch noise is that of eight batches."""
    model, batches, paths = load_model(name, quick, wordnet)
    taken: list[list[tuple[Tensor, Tensor]]] = []

    def gradients() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            found = rows_of(model, next(batches), paths)
        groups: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for x, dy in found.values():
            groups.setdefault(x.data_ptr(), []).append((x, dy))
        factors = [(group[0][0], torch.cat([dy for _, dy in group], 1)) for group in groups.values()]
        if len(taken) < 2:
            taken.append(factors)
        return [x.T.float() @ dy.float() for x, dy in factors]

    noise = relative_variance(gradients() for _ in range(2 if quick else 8))
    dtype = PRECISIONS[precision]
    return [
        Site(
            x.to(dtype),
            dy.to(dtype),
            *(principal_directions(factor.to(dtype), 32) for factor in before),
            share,
        )
        for before, (x, dy), share in zip(*taken, noise, strict=True)
    ]


KINDS = {
    "rows, rounding": SPLITS[:1],
    "the mean row as well": SPLITS[:2],
    "directions as well": SPLITS,
}
"""What ways may be chosen from."""


def fastest(
    shares: list[dict[Way, float]], times: list[dict[Way, float]], splits: Sequence[Split], budget: float
) -> float:
    """Return what all sites take, each in the fastest way with one of some splits that a budget allows."""
    return sum(
        min(of_site[way] for way, share in of_ways.items() if way.split in splits and share <= budget)
        for of_ways, of_site in zip(shares, times, strict=True)
    )


def rows(name: str, precision: str, rounds: int, quick: bool, wordnet: Path) -> list[Row]:
    """Return noise and time of each way, and of the best choice of ways within a budget."""
    sites = load_sites(name, precision, quick, wordnet)
    chosen = ways(PRECISIONS[precision])
    by_size = seconds(sites, chosen, rounds)
    times = [by_size[site.sizes] for site in sites]
    shares = [added(site, chosen) for site in sites]
    exact_total = sum(of_site[chosen[0]] for of_site in times)

    def row(variant: str, metric: str, unit: str, **figure: float | None) -> Row:
        shapes = f"{len(sites)} sites of {len(sites[0].x)} rows"
        return Row(
            "estimators", name, variant, metric, unit=unit, shapes=shapes, dtype=precision,
            **figure, **circumstances(),
        )  # fmt: skip

    found = []
    for way in chosen:
        total = sum(of_site[way] for of_site in times)
        found.append(row(str(way), "time", "s", value=total, ratio=total / exact_total, rounds=rounds))
        noise = summarise([of_ways[way] for of_ways in shares])
        found.append(row(str(way), ADDED, "1", **noise))
    for (kind, splits), budget in itertools.product(KINDS.items(), BUDGETS):
        total = fastest(shares, times, splits, budget)
        figure = {"value": total, "ratio": total / exact_total, "rounds": rounds}
        found.append(row(f"fastest within {budget} of {kind}", "time", "s", **figure))
    return found


def picture(found: Sequence[Row], path: Path) -> None:
    """Draw noise against time: a panel for each model and precision, a line for each split."""
    panels = list(dict.fromkeys((row.model, row.dtype) for row in found))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.5 * len(panels), 4.2), layout="constrained", squeeze=False, sharey=True
    )
    for axis, (name, precision) in zip(axes[0], panels, strict=True):
        here = {
            (row.variant, row.metric): row for row in found if (row.model, row.dtype) == (name, precision)
        }

        def points(chosen: Sequence[Way], here: dict[tuple[str, str], Row] = here) -> list[tuple[float, ...]]:
            shown = [(here[str(way), "time"].ratio, here[str(way), ADDED].value) for way in chosen]
            return list(zip(*shown, strict=True))  # type: ignore[arg-type]

        every = ways(PRECISIONS[precision])[1:]
        for color, split in enumerate(SPLITS):
            for style, kind in (("-", EXACT), (":", "int8")):
                line = [way for way in every if way.ratio < 1 and (way.split, way.precision) == (split, kind)]
                label = (split.name or "rows") if kind == EXACT else None
                axis.plot(*points(line), f"C{color}{style}", marker=".", label=label)
        for way in (way for way in every if way.ratio == 1):
            axis.plot(*points([way]), "k*", markersize=9)
            place = [part[0] for part in points([way])]
            axis.annotate(str(way), place, (6, 4), textcoords="offset points", fontsize=8)
        axis.axhline(0.05, color="0.6", linewidth=0.8)
        axis.set(title=f"{name}, {precision}", xlabel="time / exact product", yscale="log", ylim=(1e-4, 10))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("variance added / minibatch's, median of sites")
    axes[0][0].legend(title="exact apart from the rows: none,\ndotted: drawn rows in 8 bits", fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(
    model: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(MODELS)}; all by default.")] = None,
    precision: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(PRECISIONS)}; all by default.")
    ] = None,
    rounds_: Annotated[int, typer.Option("--rounds", help="Of timed calls of each way.")] = 7,
    wordnet: Path = WORDNET,
    folder: Annotated[Path, typer.Option(help="Where the picture goes.")] = RESULTS,
    quick: Annotated[bool, typer.Option(help="Short texts, one round; keep no rows.")] = False,
) -> None:
    """Measure every way; append rows to bench/results, and draw them."""
    found = []
    for name, kind in itertools.product(model or MODELS, precision or PRECISIONS):
        found.append(rows(name, kind, 1 if quick else rounds_, quick, wordnet))
        record(found[-1], keep=not quick)
    picture(list(itertools.chain(*found)), folder / "estimators.png")


if __name__ == "__main__":
    typer.run(main)
