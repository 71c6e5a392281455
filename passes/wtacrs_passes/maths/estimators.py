"""Estimators of ``G = X^T dY`` from k rows: the mathematics in plain torch.

Row i of the product has the weight ``a_i >= 0``, ``A = sum a_i``. An estimator returns k indices and
k scales; the estimate is ``sum_j scales_j x_(i_j) dy_(i_j)^T``. All shapes are static in k and nothing
reads a value back from a device; on the CPU, where it costs nothing, some functions do. Every function works
along the last dimension, for any leading batch.

A row whose weight is NaN or infinite is a winner with scale 1, so what is not finite in it reaches the
gradient; where an estimator cannot keep all such rows, every scale is NaN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NOISE = 3
"""Random numbers that a draw takes: the start of a systematic sample, and a seed of two words."""


def choose_rows(weights: Tensor, noise: Tensor, kept: int, estimator: str) -> tuple[Tensor, Tensor]:
    """Choose and rescale rows.

    Args:
        weights: [..., rows], float, non-negative.
        noise: [..., NOISE], uniform in [0, 1); all further random numbers are a function of these.
        kept: rows to choose, 1 <= kept <= rows.
        estimator: a key of :data:`CHOOSERS`.

    Returns:
        indices: [..., kept], int64; scales: [..., kept], float32.
    """
    weights = weights.double()
    weights = torch.where(weights.isnan(), torch.inf, weights)
    indices, scales = CHOOSERS[estimator](weights, noise.double(), kept)
    return indices, scales.float()


_HALF_NORM = 2.0**14
"""The largest norm that a rescaled row of X has in float16, whose numbers end at 65,504."""


def split_scales(scales: Tensor, norms: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Split the scales of drawn rows into factors of X and of dY so that no row of X leaves float16.

    A scale ``1 / q_i`` is large where dY is small, so that the rest of it does no harm there.

    Args:
        scales: [..., kept]; norms: [..., rows], of X; indices: [..., kept].

    Returns:
        two tensors [..., kept], float32, with the product `scales`.
    """
    room = _HALF_NORM / torch.gather(norms, -1, indices).float()
    scales_x = torch.minimum(scales, room)
    return scales_x, torch.where(scales == 0, 0.0, scales / scales_x)


DEFENCE = 0.05
"""Share of the mean gradient norm that every row's remembered norm is raised by.

A row whose gradient was zero when it was last seen may have one now: with weight zero it would never be
drawn, and the estimate would be biased. Owen and Zhou (2000) call it a defensive mixture.
"""


def gradient_weights(known: Tensor, mask: Tensor, masked: float) -> Tensor:
    """Return what stands for ``||dy_i||`` where rows are chosen before the backward pass.

    Args:
        known: [rows], the norms of an earlier step; zero where there is none.
        mask: [rows], zero for rows that are known, or supposed, to have no gradient.
        masked: what those rows' weights are multiplied by.

    Returns:
        [rows], float32: the norm raised by ``DEFENCE`` times the mean norm of the batch; that mean itself
        for a row without a norm, one where no row has any.
    """
    real = mask != 0
    known = known.double()
    seen = (known > 0) & known.isfinite()
    counted = seen & real
    mean = torch.where(counted, known, 0.0).sum() / counted.sum().clamp(min=1)
    mean = torch.where(mean > 0, mean, 1.0)
    weights = torch.where(seen, known + DEFENCE * mean, mean)
    return torch.where(real, weights, masked * weights).float()


def inclusion_probabilities(weights: Tensor, kept: int) -> Tensor:
    """Return ``q_i = min(1, lambda a_i)`` with ``sum q = kept``.

    The take-all set C = {q_i = 1} is the smallest set of largest weights for which the others stay
    below one. Where fewer than `kept` weights are positive, those have q = 1 and the rest 0.

    Args:
        weights: [..., rows], float64, non-negative, infinite for rows that must be kept.

    Returns:
        [..., rows], float64; NaN where more than `kept` weights are infinite.
    """
    scale = (_scale_by_rounds if weights.device.type == "cpu" else _scale_by_sorting)(weights, kept)
    probability = torch.where(weights > 0, weights * scale, 0.0).clamp(max=1.0)
    probability = torch.where(weights.isinf(), 1.0, probability)
    overfull = weights.isinf().sum(-1, keepdim=True) > kept
    return torch.where(overfull, torch.nan, probability)


def _scale_by_rounds(weights: Tensor, kept: int) -> Tensor:
    """Return lambda, [..., 1]: take out the rows that exceed one, and scale the rest again until none does.

    A few rounds; each looks at its result, so it is for the CPU. (Tille 2006, section 2.10.)
    """
    winners = weights.isinf()
    while True:
        total = torch.where(winners, 0.0, weights).sum(-1, keepdim=True)
        budget = kept - winners.sum(-1, keepdim=True)
        more = (weights * budget > total) & ~winners
        if not more.any():
            return torch.where(total > 0, budget / total, torch.inf)
        winners = winners | more


def _scale_by_sorting(weights: Tensor, kept: int) -> Tensor:
    """Return the same without reading a value: try every size of the take-all set at once."""
    finite = torch.where(weights.isinf(), 0.0, weights)
    ascending, order = weights.sort(-1)
    tail = torch.gather(finite, -1, order).cumsum(-1)  # tail[m - 1]: sum of the m smallest
    rest = torch.arange(weights.shape[-1], 0, -1, device=weights.device)  # m, the size of the tail
    budget = kept - (weights.shape[-1] - rest)  # draws left for a tail of m rows
    largest, total = ascending.flip(-1), tail.flip(-1)
    fits = (largest * budget <= total) & (budget > 0) & largest.isfinite()
    # The first tail that fits; where none does, the `kept` largest weights are all winners.
    size = torch.where(fits.any(-1), fits.int().argmax(-1), kept).unsqueeze(-1)
    total = torch.gather(total, -1, size.clamp(max=weights.shape[-1] - 1))
    return torch.where(total > 0, (kept - size) / total, torch.inf)


def _wta_systematic(weights: Tensor, noise: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Fixed-size sampling without replacement: systematic sampling in random order.

    The intervals [S_(i-1), S_i) of lengths q_i, in random order, are hit by the points u, u+1, ...;
    row i is hit with probability q_i, a winner exactly once (Madow 1949; Hajek 1964 for the order).
    """
    rows = weights.shape[-1]
    seed = _seed(noise)
    order = _shuffled(rows, seed) if seed.device.type == "cpu" else random_order(rows, seed)
    probability = torch.nn.functional.pad(inclusion_probabilities(weights, kept), (0, 1))
    lengths = torch.gather(probability, -1, order.clamp(max=rows))
    edges = lengths.cumsum(-1)
    points = noise[..., :1] + torch.arange(kept, dtype=edges.dtype, device=edges.device)
    position = torch.searchsorted(edges, points, right=True)
    inside = position.clamp(max=order.shape[-1] - 1)
    chosen = torch.gather(lengths, -1, inside)
    hit = (position == inside) & (chosen > 0)
    indices = torch.where(hit, torch.gather(order, -1, inside), 0)
    scales = torch.where(hit, 1.0 / chosen, 0.0)
    return indices, torch.where(edges[..., -1:].isnan(), torch.nan, scales)


def _shuffled(rows: int, seed: Tensor) -> Tensor:
    """Return a random order of the rows, [..., rows]; it reads the seed, so it is for the CPU."""
    generator = torch.Generator()
    words = (seed[..., 0] << 24) + seed[..., 1]
    orders = [torch.randperm(rows, generator=generator.manual_seed(w)) for w in words.flatten().tolist()]
    return torch.stack(orders).view(*words.shape, rows)


ROUNDS = 4


def grid(rows: int) -> tuple[int, int]:
    """Return the sides of a grid, nearly square, with at least `rows` places: as many, where rows divide well."""
    side = math.isqrt(max(rows - 1, 0)) + 1
    shorter = range(side, max(side // 2, 7), -1)  # on fewer lines than 8 neighbours stay neighbours
    side = next((short for short in shorter if rows % short == 0), side)
    return side, -(-rows // side)


def random_order(rows: int, seed: Tensor) -> Tensor:
    """Return a random order of the places of ``grid(rows)``, computed place by place: nothing is sorted.

    A Feistel network (Luby and Rackoff 1988): rows are shifted by a random function of the column, columns
    by one of the row, four times; with fewer, neighbours are seen to stay neighbours.

    Args:
        seed: [..., 2], int64.

    Returns:
        [..., places], int64, each of 0 to places - 1 once; `rows` and above are no rows.
    """
    height, width = grid(rows)
    x = torch.arange(height, device=seed.device).repeat_interleave(width)
    y = torch.arange(width, device=seed.device).repeat(height)
    x, y = x.expand(*seed.shape[:-1], -1), y.expand(*seed.shape[:-1], -1)
    for turn in range(ROUNDS):
        x = _shifted(x, random_words(seed, 2 * turn, width), y, height)
        y = _shifted(y, random_words(seed, 2 * turn + 1, height), x, width)
    return x * width + y


def _shifted(x: Tensor, words: Tensor, y: Tensor, size: int) -> Tensor:
    moved = x + torch.gather((words * size) >> 32, -1, y)
    return torch.where(moved < size, moved, moved - size)


def _seed(noise: Tensor) -> Tensor:
    return (noise[..., 1:3] * 2**24).long()


def _wta_crs(weights: Tensor, noise: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Winner-take-all column-row sampling (Liu et al. 2023, arXiv 2305.15265, section 3.2).

    The c largest rows are kept as they are, with the c that minimises ``(1 - P_C) / (k - c)``; the
    other k - c rows are drawn with replacement outside C.
    """
    descending, order = weights.sort(-1, descending=True)
    finite = torch.where(descending.isinf(), 0.0, descending)
    tail = finite.flip(-1).cumsum(-1).flip(-1)  # tail[c]: weight outside the c largest
    size = torch.arange(kept, device=weights.device)
    spread = tail[..., :kept] / (kept - size)
    spread = torch.where(descending[..., :kept].isinf(), torch.inf, spread)
    winners = spread.argmin(-1, keepdim=True)
    outside = torch.gather(tail, -1, winners)
    rank = torch.arange(weights.shape[-1], device=weights.device)
    edges = torch.where(rank < winners, 0.0, finite).cumsum(-1)
    drawn = torch.searchsorted(edges, _uniform(noise, kept) * edges[..., -1:], right=True)
    drawn = drawn.clamp(max=weights.shape[-1] - 1)
    position = torch.where(size < winners, size, drawn)
    weight = torch.gather(finite, -1, position)
    scales = outside / ((kept - winners) * weight)
    scales = torch.where((outside > 0) & (weight > 0), scales, 0.0)
    scales = torch.where(size < winners, 1.0, scales)
    overfull = weights.isinf().sum(-1, keepdim=True) >= kept
    return torch.gather(order, -1, position), torch.where(overfull, torch.nan, scales)


def _crs(weights: Tensor, noise: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Column-row sampling with replacement, ``p_i = a_i / A`` (Drineas, Kannan, Mahoney 2006)."""
    edges = weights.cumsum(-1)
    total = edges[..., -1:]
    indices = torch.searchsorted(edges, _uniform(noise, kept) * total, right=True)
    indices = indices.clamp(max=weights.shape[-1] - 1)
    weight = torch.gather(weights, -1, indices)
    scales = torch.where(weight > 0, total / (kept * weight), 0.0)
    return indices, torch.where(total.isfinite(), scales, torch.nan)


def _topk(weights: Tensor, noise: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """The k largest rows with scale one: biased, kept because the literature compares with it."""
    indices = weights.topk(kept, -1).indices
    overfull = weights.isinf().sum(-1, keepdim=True) > kept
    return indices, torch.where(overfull, torch.nan, 1.0).expand(indices.shape)


CHOOSERS = {"wta-systematic": _wta_systematic, "wta-crs": _wta_crs, "crs": _crs, "topk": _topk}
"""Estimators that choose rows."""

PROJECTIONS = ("rmm-rademacher", "rmm-gaussian")
"""Estimators that store k random combinations of all rows instead of k rows (Bershatsky et al. 2022)."""

_WORD = 2**32 - 1
_ELEMENTS_AT_ONCE = 2**22


def combine_rows(x: Tensor, seed: Tensor, kept: int, estimator: str) -> Tensor:
    """Return S x for a random S with E S^T S = 1, so that (S x)^T (S dy) estimates x^T dy.

    S [kept, rows] has entries of variance 1 / kept, signs or normal numbers. They are a function of `seed`,
    row and column, computed block by block: S is never stored, and two calls with one seed use the same S.
    Source: Bershatsky et al. 2022, arXiv 2201.13195.

    Args:
        x: [..., rows, features], float.
        seed: [2], int64.
        estimator: one of :data:`PROJECTIONS`.

    Returns:
        [..., kept, features], as `x`.
    """
    rows = x.shape[-2]
    step = max(1, _ELEMENTS_AT_ONCE // max(rows, 1))
    columns = _mixed(torch.arange(rows, device=x.device) + seed[0])
    blocks = []
    for first in range(0, kept, step):
        lines = torch.arange(first, min(first + step, kept), device=x.device).unsqueeze(-1)
        words = _mixed(columns + _mixed(lines + seed[1]))
        if estimator == "rmm-rademacher":
            entries = (words & 1).to(x.dtype) * 2 - 1
        else:  # Box and Muller
            radius = (-2 * ((words + 1).double() / 2**32).log()).sqrt()
            angle = 2 * torch.pi * (_mixed(words + 1).double() / 2**32)
            entries = (radius * angle.cos()).to(x.dtype)
        blocks.append(entries @ x)
    combined: Tensor = torch.cat(blocks, -2) * kept**-0.5
    return combined


def random_words(seed: Tensor, stream: int, count: int) -> Tensor:
    """Return 32-bit words, int64 [..., count], a function of the seed [..., 2] and the stream."""
    key = _mixed(seed[..., :1] + _mixed(seed[..., 1:] + stream))
    return _mixed(torch.arange(count, device=seed.device) + key)


def _uniform(noise: Tensor, count: int) -> Tensor:
    return random_words(_seed(noise), 0, count).double() / 2**32


def _mixed(words: Tensor) -> Tensor:
    """Return 32-bit words that look independent of `words`, int64 (the finaliser of MurmurHash3)."""
    words = words & _WORD
    words = ((words ^ (words >> 16)) * 0x85EBCA6B) & _WORD
    words = ((words ^ (words >> 13)) * 0xC2B2AE35) & _WORD
    mixed: Tensor = words ^ (words >> 16)
    return mixed


def estimate_product(
    x: Tensor, dy: Tensor, kept: int, estimator: str, weights: Tensor, noise: Tensor
) -> Tensor:
    """Estimate ``x^T dy``: the reference that the compiled graph is tested against.

    Args:
        x: [rows, features_in]; dy: [rows, features_out]; weights: [rows];
            noise: [NOISE].

    Returns:
        [features_in, features_out]
    """
    if estimator in PROJECTIONS:
        seed = (noise[:2] * 2**24).long()
        left, right = (combine_rows(operand, seed, kept, estimator) for operand in (x, dy))
        return left.T @ right
    indices, scales = choose_rows(weights, noise, kept, estimator)
    return x[indices].T @ (dy[indices] * scales.to(dy.dtype).unsqueeze(-1))
