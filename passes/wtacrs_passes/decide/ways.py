"""Decide, from the measured noise of a site, the fastest way to its weight gradients that a noise budget allows."""

from __future__ import annotations

import dataclasses
import glob
import math
from collections.abc import Iterable, Sequence

from ..maths.observer import RATIOS, Noise
from ..policy import Policy, Precision, Rule
from ..rates import DRAWING, ROUNDING, seconds
from ..report import NoiseReport
from .precision import FASTER, fastest

_MARGIN = 0.8
"""Of the budget, what a way takes that is chosen anew: the measurement has noise of its own."""
_PATIENCE = 1.25
"""Times the budget, what a way takes at most that was chosen before."""
_WORTH = 0.9
"""Of the time of all rows, what drawn rows take at most."""


@dataclasses.dataclass(frozen=True)
class Way:
    """How the weight gradients of one site are computed, and why.

    Attributes:
        noise: what was measured.
        ratio: share of the rows that are drawn, 1.0 for all.
        rounds: factors may be in 8 bits, where that is faster.
        share: variance that is added at most, over the minibatch's.
        budget: what it may be.
    """

    noise: Noise
    ratio: float
    rounds: bool
    share: float
    budget: float

    def report(self) -> NoiseReport:
        """Return the figures that the way rests on."""
        noise = self.noise
        return NoiseReport(
            noise.modules,
            noise.minibatch,
            self.ratio,
            "auto" if self.rounds else "exact",
            self.share,
            self.budget,
            _share(noise, 1.0, rounds=True),
            tuple(_share(noise, ratio, rounds=False) for ratio in RATIOS),
            noise.steps,
        )


def decide(measured: Iterable[Noise], policy: Policy) -> list[Way]:
    """Return the way of each site that has a budget under `policy`, whose `decided` it has followed so far."""
    return [_way(noise, policy) for noise in measured if all(map(policy.has_budget, noise.modules))]


def rules(ways: Sequence[Way], policy: Policy) -> tuple[Rule, ...]:
    """Return a policy's `decided`: a module that is called more than once takes the most careful of its ways.

    What is not among `ways` stays as it is.
    """
    found: dict[str, tuple[float, bool]] = {}
    for way in ways:
        for module in way.noise.modules:
            ratio, rounds = found.get(module, (0.0, True))
            found[module] = max(ratio, way.ratio), rounds and way.rounds
    new = [
        Rule(glob.escape(module), ratio=ratio, product="auto" if rounds else "exact")
        for module, (ratio, rounds) in found.items()
        if ratio < 1.0 or (not rounds and _may_round(policy, module))
    ]
    patterns = {glob.escape(module) for module in found}
    return (*(rule for rule in policy.decided if rule.pattern not in patterns), *new)


def _may_round(policy: Policy, module: str) -> bool:
    """Tell whether the precision of a module is for its budget to say."""
    asked = policy.asked(module)
    return asked is not None and asked.product is None


def _way(noise: Noise, policy: Policy) -> Way:
    asked = [sampling for module in noise.modules if (sampling := policy.asked(module)) is not None]
    budget, product = min(sampling.noise for sampling in asked), asked[0].product
    roundings = (True, False) if product is None else (product != "exact",)

    def way(ratio: float, rounds: bool) -> Way:
        in_8_bits = any(precision == "int8" for precision, _ in _products(noise, ratio, rounds))
        in_8_bits |= rounds and product not in (None, "auto")
        return Way(noise, ratio, rounds, _share(noise, ratio, in_8_bits), budget)

    ways = [way(ratio, rounds) for ratio in (1.0, *RATIOS) for rounds in roundings]
    allowed = [way for way in ways if way.share <= _MARGIN * budget]
    best = min(allowed, key=_seconds) if allowed else min(ways, key=lambda way: way.share)
    sampling = policy.sampling(noise.modules[0])
    assert sampling is not None and sampling.ratio is not None
    now = way(sampling.ratio, sampling.product != "exact")
    stays = now.share <= _PATIENCE * budget and _seconds(best) > _WORTH * _seconds(now)
    return now if stays else best


def _share(noise: Noise, ratio: float, rounds: bool) -> float:
    """Return the variance that is added, over the minibatch's; `rounds`: of factors in 8 bits."""
    if ratio == 1.0:
        added = noise.rounded * noise.drawn if rounds else 0.0
    else:
        which = RATIOS.index(ratio)
        added = noise.added[which] + (noise.rounded_drawn[which] if rounds else 0.0)
    return added / noise.minibatch if noise.minibatch else math.inf if added else 0.0


def _seconds(way: Way) -> float:
    """Return what the weight gradients of a site take."""
    noise, total = way.noise, sum(time for _, time in _products(way.noise, way.ratio, way.rounds))
    if way.ratio < 1.0:
        sizes = noise.rows, sum(noise.outputs), noise.features
        total += seconds([DRAWING], *sizes, noise.dtype, noise.device)[DRAWING]
    return total


def _products(noise: Noise, ratio: float, rounds: bool) -> list[tuple[Precision, float]]:
    """Return for each product of a site the precision that the plan chooses by its rates, and the seconds it takes."""
    choices = ["exact", *FASTER.get(noise.dtype, ())] if rounds else ["exact"]
    choices += [ROUNDING] * (rounds and len(noise.outputs) > 1)
    rows = noise.rows if ratio == 1.0 else math.ceil(ratio * noise.rows)
    rates = [
        seconds(choices, rows, outputs, noise.features, noise.dtype, noise.device)
        for outputs in noise.outputs
    ]
    chosen = [precision for precision, _ in fastest(rates)]
    times = [each[precision] for each, precision in zip(rates, chosen, strict=True)]
    for i in [i for i, precision in enumerate(chosen) if precision == "int8"][1:]:
        times[i] -= rates[i][ROUNDING]
    return list(zip(chosen, times, strict=True))
