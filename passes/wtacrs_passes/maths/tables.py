"""Tabulate a unary function by its best piecewise constant approximation.

Novikov et al. 2022 (Few-bit backward, arXiv 2202.00441, section 3): over the points of a grid, choose the
boundaries of the pieces by dynamic programming so that the integral of the squared error is least; the
value of a piece is the mean of the function over it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .encodings import Table

RANGE = 10.0
"""Functions are tabulated over [-10, 10] and taken as constant beyond."""

_POINTS = 1000
_FAR = 1e4
_NEAR_ZERO = (-1e-3, -1e-6, 0.0, 1e-6, 1e-3)
_SPREADS = (0.3, 1.0, 3.0)
_WORST = {
    1: 0.2,
    2: 0.1,
    3: 0.02,
    4: 0.01,
}  # share of the squared values that the squared error may be, by bits
_TOLERANCE = 1e-2  # of the function's extent: what it may still change beyond the range


def tabulate(function: Callable[[Tensor], Tensor], bits: int) -> Table | None:
    """Return the best piecewise constant approximation of `function` with ``2 ** bits`` pieces.

    Args:
        function: float64 [n] to float64 [n], elementwise.

    Returns:
        None where the function is not finite and bounded, or not constant beyond the tabulated range.
    """
    even = _is_even(function)
    low = 0.0 if even else -RANGE
    step = (RANGE - low) / _POINTS
    grid = torch.arange(_POINTS, dtype=torch.float64) * step + low + step / 2
    values = function(grid)
    far = function(torch.tensor([-_FAR, -2 * RANGE, 2 * RANGE, _FAR], dtype=torch.float64))
    near = function(torch.tensor(_NEAR_ZERO, dtype=torch.float64))
    if not bool(values.isfinite().all() and far.isfinite().all() and near.isfinite().all()):
        return None
    if bool(near.abs().max() > 2 * values.abs().max()):
        return None  # a pole
    tolerance = _TOLERANCE * (values.max() - values.min())
    left, right = values[-1] if even else values[0], values[-1]
    if bool((far[:2] - left).abs().max() > tolerance or (far[2:] - right).abs().max() > tolerance):
        return None
    ends, error = _best_pieces(tuple(values.tolist()), 2**bits)
    starts = [0, *ends[:-1]]
    means = tuple(float(values[a:b].mean()) for a, b in zip(starts, ends, strict=True))
    edges = torch.tensor(ends[:-1], dtype=torch.int64)
    boundaries = _boundaries(function, grid[edges - 1], grid[edges])
    return Table(tuple(boundaries.tolist()), means, even, error * step * (1 + even))


def serves(function: Callable[[Tensor], Tensor], table: Table) -> bool:
    """Tell whether a table is right for arguments that spread less, or more, than the tabulated range."""
    levels = torch.linspace(0, 1, 402, dtype=torch.float64)[1:-1]
    for spread in _SPREADS:
        points = spread * torch.special.ndtri(levels)
        values = function(points)
        place = points.abs() if table.even else points
        codes = torch.bucketize(place, torch.tensor(table.boundaries, dtype=torch.float64))
        error = (torch.tensor(table.values, dtype=torch.float64)[codes] - values).square().mean()
        if bool(error > _WORST[min(table.bits, max(_WORST))] * values.square().mean()):
            return False
    return True


def _is_even(function: Callable[[Tensor], Tensor]) -> bool:
    points = torch.linspace(1e-3, RANGE, 101, dtype=torch.float64)
    return torch.allclose(function(points), function(-points), rtol=1e-6, atol=1e-9)


def _boundaries(function: Callable[[Tensor], Tensor], left: Tensor, right: Tensor) -> Tensor:
    """Return where the function crosses the mean of its values at pairs of points: the last points before that.

    Args:
        left, right: float64 [n].

    Returns:
        float64 [n], in 12 digits after the point where that is not beyond.
    """
    low, high = function(left), function(right)
    middle, rises = (low + high) / 2, high > low

    def after(points: Tensor) -> Tensor:
        return (function(points) > middle) == rises

    for _ in range(60):
        points = (left + right) / 2
        beyond = after(points)
        left, right = torch.where(beyond, left, points), torch.where(beyond, points, right)
    rounded = torch.tensor([round(point, 12) + 0.0 for point in left.tolist()], dtype=torch.float64)
    return torch.where(after(rounded), left, rounded)


@functools.cache
def _best_pieces(values: tuple[float, ...], pieces: int) -> tuple[tuple[int, ...], float]:
    """Return the ends of the pieces and the sum of squared errors: O(pieces n^2), vectorised over n."""
    x = torch.tensor(values, dtype=torch.float64)
    n = len(x)
    zero = torch.zeros(1, dtype=torch.float64)
    sums, squares = torch.cat([zero, x.cumsum(0)]), torch.cat([zero, (x * x).cumsum(0)])
    start, end = torch.arange(n + 1).unsqueeze(1), torch.arange(n + 1).unsqueeze(0)
    size = (end - start).clamp(min=1)
    cost = squares - squares.unsqueeze(1) - (sums - sums.unsqueeze(1)) ** 2 / size
    cost = torch.where(end > start, cost.clamp(min=0), torch.inf)  # cost[a, b]: one piece over [a, b)
    best = cost[0].clone()
    choices = []
    for _ in range(pieces - 1):
        total = best.unsqueeze(1) + cost
        candidate, choice = total.min(0)
        better = candidate < best - 1e-15
        best = torch.where(better, candidate, best)
        choices.append(torch.where(better, choice, -1))
    ends, b = [n], n
    for choice in reversed(choices):
        a = int(choice[b])
        if a > 0:
            ends.append(a)
            b = a
    return tuple(reversed(ends)), float(best[n])
