"""The noise that sampling would add to a weight gradient, and the minibatch's own, measured in a running step.

Of one site, products ``G_j = X^T dY_j`` that share a draw, with row i of the joint weight
``a_i = ||x_i|| sqrt(sum_j ||dy_ij||^2)``, a step gives

- the variance that a draw of a ratio adds (Hajek 1964, for fixed size and maximal entropy):
  ``sum_i c_i a_i^2 / q_i^2 - ||sum_i c_i g_i / q_i||^2 / sum_i c_i``, ``g_i = x_i dy_i^T`` and ``c_i = q_i (1 - q_i)``;
- that of factors rounded at random to 8 bits: an element in steps of s has the variance ``s^2 f (1 - f)``, where f is
  what it is above a whole step; of drawn rows, rescaled, by a draw of each ratio, as those make steps wide;
- with the step before, the variance of the minibatch: ``||G - G'||^2 / 2``, for batches drawn independently and
  parameters that one step hardly moves.

Norms of matrices come from a sketch: for z of random signs ``E ||M z||^2 = ||M||^2`` (Hutchinson 1989), and
``X^T (dY z)`` is far less work than ``X^T dY``. Where rows are drawn already, drawn rows stand for all, rescaled.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import reduce

import torch
from torch import Tensor

from .estimators import inclusion_probabilities

RATIOS = (0.1, 0.2, 0.3, 0.5, 0.7)
"""The ratios whose added variance is measured."""

_SIGNS = 8  # columns of the sketch
_FAR = 1e3  # times the usual square: that of a pair of steps under another loss scale
_BLOCK = 512  # rows that are in float32 at a time
_WINDOWS = ((8, 24), (104, 120))  # steps of the first two measurements, ends excluded
SETTLED = _WINDOWS[0][1] + 2
"""Steps after which a graph has been compiled with what the first window led to."""
_EVERY, _LENGTH = 1000, 16  # steps of the others: the last 16 of each thousand


@dataclasses.dataclass(frozen=True)
class Noise:
    """What was measured of one site, in units of the gradient's mean square.

    Attributes:
        modules: paths of the linears whose rows are drawn together.
        rows: N of the last step; features: of X; outputs: of each dY.
        added: variance that a draw of each of :data:`RATIOS` adds.
        drawn: share of the rows that were at hand.
        rounded: variance that factors in 8 bits add, rounded at random, of these rows.
        rounded_drawn: the same of drawn rows, at each of :data:`RATIOS`.
        minibatch: variance of the gradient between batches.
        steps: that were measured.
    """

    modules: tuple[str, ...]
    rows: int
    features: int
    outputs: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    drawn: float
    added: tuple[float, ...]
    rounded: float
    rounded_drawn: tuple[float, ...]
    minibatch: float
    steps: int


_IDS = itertools.count()
_OBSERVERS: weakref.WeakValueDictionary[int, Observer] = weakref.WeakValueDictionary()
_RUNNING = threading.local()  # its handle, in the thread that runs the forward pass


class Observer:
    """Measures the steps of one compiled graph; nothing on the way waits for the device.

    A backward pass is a step. Steps are measured in pairs that follow each other, in windows.
    """

    def __init__(self, steps: int = 0) -> None:
        self.steps = steps
        self._id = next(_IDS)
        _OBSERVERS[self._id] = self
        self._forward_passes = itertools.count()
        self._current, self._told = -1, steps
        self._sites: dict[tuple[str, int], _Sums] = {}
        self._calls: dict[str, tuple[int, int]] = {}

    @contextmanager
    def forward_pass(self) -> Iterator[None]:
        """Let the backward pass of what runs inside know whose it is."""
        outer = getattr(_RUNNING, "handle", None)
        _RUNNING.handle = torch.tensor([self._id, next(self._forward_passes)])
        try:
            yield
        finally:
            _RUNNING.handle = outer

    @property
    def is_due(self) -> bool:
        """Tell whether a window has ended of which :meth:`noise` has not told yet."""
        ends = [end for _, end in _WINDOWS if end <= self.steps]
        return max([*ends, self.steps // _EVERY * _EVERY]) > self._told

    def measures(self, forward_pass: int) -> bool:
        """Tell whether the step is measured whose backward pass this is; count it where it is a new one."""
        if forward_pass != self._current:
            self._current = forward_pass
            self.steps += 1
        step = self.steps - 1
        return any(start <= step < end for start, end in _WINDOWS) or step % _EVERY >= _EVERY - _LENGTH

    def noise(self) -> list[Noise]:
        """Return what was measured since the last call, of sites with a finite gradient; the host waits for it."""
        sites, self._sites, self._calls = self._sites, {}, {}
        self._told = self.steps
        found = []
        for (key, _), sums in sites.items():
            pairs, means = sums.means() if sums.pairs else (0, [])
            if pairs:
                minibatch, rounded, drawn, *of_ratios = means
                added, rounded_drawn = of_ratios[: len(RATIOS)], of_ratios[len(RATIOS) :]
                minibatch = max(minibatch - drawn, 0.0)  # the difference of two drawn gradients
                found.append(
                    Noise(
                        tuple(key.split("|")), *sums.sizes, sums.drawn, tuple(added), rounded,
                        tuple(rounded_drawn), minibatch, 2 * pairs,
                    )
                )  # fmt: skip
        return found

    def add(self, key: str, x: Tensor, dys: Sequence[Tensor], drawn: Drawn | None, center: bool) -> None:
        """Measure one site in this step."""
        step = self.steps - 1
        last, number = self._calls.get(key, (-1, 0))
        number = number + 1 if last == step else 0  # a module may be called several times
        self._calls[key] = step, number
        sums = self._sites.setdefault((key, number), _Sums())
        rows = len(x) if drawn is None else drawn.norms[0].shape[-1]
        sums.drawn = 1.0 if drawn is None else drawn.indices.shape[-1] / rows
        sums.sizes = (rows, x.shape[1], tuple(dy.shape[1] for dy in dys), x.dtype, x.device)
        sums.add(step, x, dys, drawn, center)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Of a site whose rows are drawn: norms as of :func:`ops.choose_rows`, and the indices that it returned: [kept]."""

    norms: Sequence[Tensor]
    indices: Tensor


class _Sums:
    """The figures of the measured pairs of steps of one site, on its device: mean square, minibatch, and variances."""

    def __init__(self) -> None:
        self.pairs: list[Tensor] = []
        self.drawn = 1.0
        self.sizes: tuple[int, int, tuple[int, ...], torch.dtype, torch.device] = (
            0, 0, (), torch.float32, torch.device("cpu"),
        )  # fmt: skip
        self._first: tuple[int, list[Tensor], list[Tensor]] | None = None

    def add(self, step: int, x: Tensor, dys: Sequence[Tensor], drawn: Drawn | None, center: bool) -> None:
        pair, first, self._first = step // 2, self._first, None
        if first is None or first[0] != pair:
            signs = _signs([dy.shape[1] for dy in dys], pair, x.device)
            self._first = pair, measure(x, dys, signs, drawn, center, step), signs
            return
        (gradient, *variances), (other, *others) = measure(x, dys, first[2], drawn, center, step), first[1]
        gradient, other = gradient.double(), other.double()
        square = (gradient.square().sum() + other.square().sum()) / 2
        of_both = [(a + b) / 2 for a, b in zip(variances, others, strict=True)]
        difference = (gradient - other).square().sum() / 2
        self.pairs.append(torch.stack([square, difference, *(_SIGNS * each for each in of_both)]))

    def means(self) -> tuple[int, list[float]]:
        """Return how many pairs count, and the means of their figures, in units of the mean square.

        An overflow does not count, nor does a pair whose square is of another order than others': a loss scale that
        jumped.
        """
        found = [pair for pair in torch.stack(self.pairs).tolist() if all(map(math.isfinite, pair))]
        usual = statistics.median(square for square, *_ in found) if found else 0.0
        kept = [pair for pair in found if usual / _FAR <= pair[0] <= usual * _FAR and pair[0] > 0]
        square, *others = (sum(column) for column in zip(*kept, strict=True)) if kept else (1.0,)
        return len(kept), [other / square for other in others]


def measure(
    x: Tensor,
    dys: Sequence[Tensor],
    signs: Sequence[Tensor],
    drawn: Drawn | None = None,
    center: bool = False,
    seed: int = 0,
) -> list[Tensor]:
    """Measure one site in one step.

    Args:
        x: [rows, features]; dys: each [rows, outputs]; of drawn rows, rescaled, where `drawn` is given.
        signs: for each dY [outputs, s].
        drawn: of all rows, where `x` and `dys` hold drawn ones, and after them the mean row where `center`.
        center: rows are drawn around their mean.
        seed: of the draws whose rounding is measured.

    Returns:
        the sketch of the gradient [features, s]; and variances, float64 scalars: of rounding these rows to 8 bits, of
        the draw that led to them (zero where there was none), of one of each of :data:`RATIOS`, and of rounding the
        rows of each of those.
    """
    mean = x.float().mean(0) if center and drawn is None else None
    blocks = range(0, len(x), _BLOCK)
    if drawn is None:
        norms_x = torch.cat([_less(x[i : i + _BLOCK], mean).norm(dim=-1) for i in blocks])
        squares = (torch.cat([dy[i : i + _BLOCK].float().square().sum(-1) for i in blocks]) for dy in dys)
        weights = norms_x.double() * reduce(torch.add, squares).sqrt().double()
        kept = [len(x)]
    else:
        weights = reduce(torch.mul, [norm.double() for norm in drawn.norms])
        kept = [drawn.indices.shape[-1]]
    kept += [max(1, math.ceil(ratio * len(weights))) for ratio in RATIOS]
    probabilities = [inclusion_probabilities(weights, k) for k in kept]
    factors = torch.stack([torch.where(q > 0, 1 - q, 0.0) for q in probabilities], -1).float()  # c / q
    if drawn is not None:
        factors = factors[drawn.indices]
    columns = signs[0].shape[1]
    gradient = torch.zeros(x.shape[1], columns, device=x.device)
    means = torch.zeros(x.shape[1], columns * len(kept), device=x.device)
    for i in blocks:
        rows = x[i : i + _BLOCK].float()
        products = [dy[i : i + _BLOCK].float() @ z for dy, z in zip(dys, signs, strict=True)]
        sketch = reduce(torch.add, products)
        gradient.addmm_(rows.T, sketch)
        part = factors[i : i + _BLOCK]  # ends before an appended mean row
        scaled = (part.unsqueeze(-1) * sketch[: len(part)].unsqueeze(1)).flatten(1)
        means.addmm_(_less(rows[: len(part)], mean).T, scaled)
    spread = means.double().square().sum(0).view(len(kept), columns).mean(-1)
    draws = [draw_variance(q, weights, square) for q, square in zip(probabilities, spread, strict=True)]
    rounded = rounding_variance(x, dys)
    if drawn is None:
        generator = torch.Generator(x.device).manual_seed(seed)
        of_draws = [rounding_of_draw(x, dys, q, mean, generator) for q in probabilities[1:]]
    else:  # the sum of their squares is about as large as a draw is small
        of_draws = [rounded * (kept[0] / len(weights) / ratio) for ratio in RATIOS]
    return [gradient, rounded, *draws, *of_draws]


def rounding_of_draw(
    x: Tensor, dys: Sequence[Tensor], q: Tensor, mean: Tensor | None, generator: torch.Generator
) -> Tensor:
    """Return the variance of rounding drawn rows, rescaled, to 8 bits: a float64 scalar.

    Args:
        x, dys: as of :func:`measure`; q: [rows], the inclusion probabilities, each row by itself; mean: [features],
            what rows are drawn around.
    """
    drawn = torch.rand(len(q), generator=generator, device=q.device) < q
    scales = (1 / q[drawn]).float().unsqueeze(-1)
    rows = _less(x[drawn], mean) * scales
    return rounding_variance(rows, [dy[drawn] for dy in dys]) if len(rows) else q.new_zeros(())


def draw_variance(q: Tensor, norms: Tensor, mean_square: Tensor) -> Tensor:
    """Return Hajek's variance of ``sum_i g_i`` from rows of inclusion probabilities q: a float64 scalar.

    Args:
        q, norms: [rows], float64; of g.
        mean_square: ``||sum_i c_i g_i / q_i||^2``.
    """
    total = (q * (1 - q)).sum()
    variance = torch.where(q > 0, (1 - q) / q, 0.0) @ norms.square() - mean_square / total
    return torch.where(total > _SMALLEST, variance.clamp(min=0.0), 0.0)


_SMALLEST = 1e-9  # of what q (1 - q) sums to, above the rounding of q


def _less(rows: Tensor, mean: Tensor | None) -> Tensor:
    return rows.float() if mean is None else rows.float() - mean


def _signs(outputs: Sequence[int], seed: int, device: torch.device) -> list[Tensor]:
    """Return columns of random signs, of a generator of their own: [outputs, s] each."""
    generator = torch.Generator().manual_seed(seed)
    made = (torch.randint(0, 2, (size, _SIGNS), generator=generator) * 2.0 - 1.0 for size in outputs)
    return [signs.to(device) for signs in made]


def rounding_variance(x: Tensor, dys: Sequence[Tensor]) -> Tensor:
    """Return the variance of the products of factors in 8 bits, one scale a column: a float64 scalar."""
    scales = [operand.abs().amax(0).float() / 127 for operand in (x, *dys)]
    total = x.new_zeros((), dtype=torch.float64)
    for i in range(0, len(x), _BLOCK):
        (square_x, error_x), *others = (
            _squares_and_errors(operand[i : i + _BLOCK].float(), scale)
            for operand, scale in zip((x, *dys), scales, strict=True)
        )
        for square_dy, error_dy in others:
            total += error_x @ square_dy + square_x @ error_dy + error_x @ error_dy
    return total


def _squares_and_errors(rows: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    above = (rows / torch.where(scales > 0, scales, 1.0)).abs().frac()
    return rows.square().sum(-1).double(), ((above - above.square()) @ scales.square()).double()


def observed_step() -> Tensor:
    """Return whose forward pass this is and its number: int64 [2], on the CPU; negative where nobody asks."""
    handle = getattr(_RUNNING, "handle", None)
    return torch.tensor([-1, -1]) if handle is None else handle.clone()


def observe(
    handle: Tensor,
    x: Tensor,
    dys: list[Tensor],
    norms: list[Tensor],
    indices: Tensor | None,
    center: bool,
    key: str,
) -> None:
    """Measure one site, if its step is one that is measured.

    Args:
        handle: of :func:`observed_step`.
        x, dys, center: as of :func:`measure`; norms, indices: of :class:`Drawn`, where rows are drawn.
        key: paths of the modules, ``|`` between them.
    """
    number, forward_pass = handle.tolist()
    observer = _OBSERVERS.get(number)
    if observer is None or not observer.measures(forward_pass):
        return
    with torch.no_grad():
        drawn = None if indices is None else Drawn(norms, indices)
        observer.add(key, x.detach(), [dy.detach() for dy in dys], drawn, center)
