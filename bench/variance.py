"""The error of sampled weight gradients, from one [rows, rows] matrix instead of a gradient for each draw."""

from __future__ import annotations

import torch
from torch import Tensor

from wtacrs_passes.maths.estimators import NOISE, choose_rows


def gram(x: Tensor, dy: Tensor) -> Tensor:
    """Return the inner products of all rows' gradients x_i dy_i^T: [rows, rows], float64.

    With e_i = (how often row i was drawn) * scale - 1, the squared error of an estimate is e^T K e; ||dW||^2
    is the sum of K.
    """
    x, dy = x.double(), dy.double()
    return (x @ x.T) * (dy @ dy.T)


def squared_errors(
    products: Tensor, weights: Tensor, kept: int, estimator: str, draws: int, generator: torch.Generator
) -> Tensor:
    """Return ||dW_est - dW||^2 for independent draws: [draws].

    Args:
        products: [rows, rows], of :func:`gram`; weights: [rows].
    """
    rows = len(weights)
    noise = torch.rand(draws, NOISE, dtype=torch.float64, generator=generator)
    indices, scales = choose_rows(weights.expand(draws, rows), noise, kept, estimator)
    error = torch.full((draws, rows), -1.0, dtype=torch.float64).scatter_add(-1, indices, scales.double())
    return ((error @ products) * error).sum(-1)


def exact_variance(products: Tensor, weights: Tensor, kept: int, estimator: str) -> float:
    """Return E ||dW_est - dW||^2 of `crs` or `wta-crs` in closed form, for weights a_i = ||x_i|| ||dy_i||.

    Of k draws with replacement from rows with total weight A and total gradient G it is (A^2 - ||G||^2) / k
    (Drineas, Kannan, Mahoney 2006, lemma 4); `wta-crs` draws k - c rows outside its c largest, with the c
    that minimises (A outside) / (k - c) (Liu et al. 2023, arXiv 2305.15265, section 3.2).
    """
    order = weights.argsort(descending=True)
    tail = weights.double()[order].flip(0).cumsum(0).flip(0)
    winners = int((tail[:kept] / (kept - torch.arange(kept))).argmin()) if estimator == "wta-crs" else 0
    outside = order[winners:]
    gradient = products[outside][:, outside].sum()
    return float((tail[winners] ** 2 - gradient) / (kept - winners))


def projection_variance(products: Tensor, weights: Tensor, kept: int, estimator: str) -> float:
    """Return E ||dW_est - dW||^2 of `rmm-rademacher` or `rmm-gaussian` in closed form.

    (||X||^2 ||dY||^2 + ||dW||^2) / k for normal entries; for signs less 2 sum ||x_i||^2 ||dy_i||^2 / k, as
    their fourth moment is 1 instead of 3 (Bershatsky et al. 2022, arXiv 2201.13195).

    Args:
        products: [rows, rows], of :func:`gram`; weights: [2, rows]: ||x_i|| and ||dy_i||.
    """
    squares = weights.double().square()
    total = squares[0].sum() * squares[1].sum() + products.sum()
    if estimator == "rmm-rademacher":
        total = total - 2 * (squares[0] * squares[1]).sum()
    return float(total / kept)
