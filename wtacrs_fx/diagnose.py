"""How much noise a policy adds to each layer's gradient, beside the noise that the minibatch has anyway."""

from __future__ import annotations

import dataclasses
import glob
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wtacrs_passes.decide.rows import BY_BUDGET
from wtacrs_passes.decide.ways import decide, rules
from wtacrs_passes.maths.estimators import inclusion_probabilities
from wtacrs_passes.maths.observer import RATIOS as MEASURED
from wtacrs_passes.maths.observer import Noise, draw_variance, rounding_of_draw, rounding_variance
from wtacrs_passes.policy import Policy, Rule
from wtacrs_passes.report import SiteReport, align

from .capture import explain

RATIOS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
"""The ratios at which the added variance is computed."""

_ACROSS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)  # where the mass of the largest rows is shown


class DiagnosisError(ValueError):
    """A model or batches that cannot be diagnosed; the message states rule, value and remedy."""


@dataclasses.dataclass(frozen=True)
class LayerDiagnosis:
    """One linear layer.

    Attributes:
        module: path of the layer; group: of the first layer that shares its draw, itself where none does.
        placement: where its rows are chosen; rows: N of the first batch; kept: k.
        added: variance of the estimate over ||dW||^2, a mean over batches, at the policy's ratio, or where a noise
            budget says it at the smallest that this allows.
        curve: the same at each of :data:`RATIOS`.
        rounded: variance that factors in 8 bits add, rounded at random.
        budget: `Policy.noise` of the layer.
        minibatch: variance of dW between batches over its mean square.
        mass: share of the total weight that the k largest rows have (Liu et al. 2023, figure 3).
        masses: the same for the largest 1, 2, 5, ... 100 % of the rows.
        row_bytes: bytes that a kept row costs; zero where rows are chosen in the backward pass.
    """

    module: str
    group: str
    placement: str
    rows: int
    kept: int
    added: float
    curve: tuple[float, ...]
    rounded: float
    minibatch: float
    budget: float
    mass: float
    masses: tuple[float, ...]
    row_bytes: float

    @property
    def ratio(self) -> float | None:
        """The smallest of :data:`RATIOS` at which the added noise is within the budget."""
        return _smallest(self.curve, self.budget * self.minibatch)


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """The layers of a model under a policy; ``print`` shows a table, :meth:`plot` draws it.

    `sites` hold the same for layers that share a draw, as a running step measures it.
    """

    layers: tuple[LayerDiagnosis, ...]
    batches: int
    base: Policy
    sites: tuple[Noise, ...] = ()

    def __str__(self) -> str:
        header = (
            "module",
            "placement",
            "rows",
            "kept",
            "added",
            "minibatch",
            "of it",
            "8 bits",
            "ratio in budget",
            "mass",
        )
        lines = [
            (
                layer.module,
                layer.placement,
                str(layer.rows),
                str(layer.kept),
                f"{layer.added:.2g}",
                f"{layer.minibatch:.2g}",
                f"{layer.added / layer.minibatch:.2f}" if layer.minibatch else "",
                f"{layer.rounded / layer.minibatch:.2g}" if layer.minibatch else "",
                "1.0" if layer.ratio is None else f"{layer.ratio:g}",
                f"{layer.mass:.2f}",
            )
            for layer in self.layers
        ]
        means = [
            sum(values) / len(self.layers)
            for values in zip(*((x.added, x.minibatch) for x in self.layers), strict=True)
        ]
        total = (
            f"mean over {len(self.layers)} layers and {self.batches} batches: "
            f"added {means[0]:.2g}, minibatch {means[1]:.2g}"
        )
        return "\n".join([*align([header, *lines]), "", total])

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and strings."""
        return {"batches": self.batches, "layers": [dataclasses.asdict(layer) for layer in self.layers]}

    def plot(self, path: str | Path) -> None:
        """Draw added and minibatch noise of each layer, and the mass of the largest rows."""
        import matplotlib.pyplot as plt

        names = [layer.module for layer in self.layers]
        height = max(3.0, 0.22 * len(names) + 1.2)
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(12, height), layout="constrained", width_ratios=(3, 2)
        )
        positions = range(len(names))
        left.scatter(
            [x.minibatch for x in self.layers], positions, marker="o", color="#0072b2", label="minibatch"
        )
        left.scatter(
            [max(x.added, 1e-6) for x in self.layers],
            positions,
            marker="x",
            color="#d55e00",
            label="added by the policy",
        )
        left.set(xscale="log", xlabel="variance of dW / ||dW||²", yticks=list(positions))
        left.set_yticklabels(names, fontsize=7)
        left.invert_yaxis()
        left.grid(alpha=0.3)
        left.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
        for layer in self.layers:
            right.plot([100 * share for share in _ACROSS], layer.masses, color="#009e73", alpha=0.4, lw=1)
        right.plot([0, 100], [0, 1], color="grey", ls=":", lw=1)
        right.set(
            xlabel="largest rows, %", ylabel="share of the total weight, one line a layer", ylim=(0, 1.02)
        )
        right.grid(alpha=0.3)
        figure.savefig(path, dpi=120)
        plt.close(figure)

    def policy(self, max_bytes: float | None = None) -> Policy:
        """Return the policy with a ratio for each layer: the least noise for the bytes of the rows.

        Where the policy has a noise budget, it comes with the fastest ways that this allows, and goes on measuring.

        Where rows cost no bytes (they are chosen in the backward pass), and where `max_bytes` allows, a layer
        gets the smallest ratio at which its added noise is within `Policy.noise`. Otherwise ratios
        minimise the sum over layers of added over minibatch noise while all rows together take no more.

        Args:
            max_bytes: of the stored rows of all layers together; None sets no bound.

        Raises:
            DiagnosisError: the smallest ratios take more than `max_bytes`.
        """
        if self.base.ratio is None and max_bytes is None:
            return dataclasses.replace(self.base, decided=rules(decide(self.sites, self.base), self.base))
        groups: dict[str, list[LayerDiagnosis]] = {}
        for layer in self.layers:
            groups.setdefault(layer.group, []).append(layer)
        ratios = {name: _unbounded(layers) for name, layers in groups.items()}
        if max_bytes is not None and _bytes(groups, ratios) > max_bytes:
            least = _bytes(groups, dict.fromkeys(groups, RATIOS[0]))
            if least > max_bytes:
                raise DiagnosisError(
                    f"max_bytes must be at least {least:.0f}, as ratio {RATIOS[0]} takes, got {max_bytes:g}"
                )
            low, high = -30.0, 30.0  # log2 of the price of a byte
            for _ in range(60):
                price = (low + high) / 2
                ratios = {name: _cheapest(layers, 2.0**price) for name, layers in groups.items()}
                low, high = (price, high) if _bytes(groups, ratios) > max_bytes else (low, price)
            ratios = {name: _cheapest(layers, 2.0**high) for name, layers in groups.items()}
        new = tuple(Rule(glob.escape(layer.module), ratio=ratios[layer.group]) for layer in self.layers)
        return dataclasses.replace(self.base, rules=(*new, *self.base.rules))


def diagnose(
    model: nn.Module, batches: Iterable[Mapping[str, Any] | Sequence[Any]], policy: Policy | None = None
) -> Diagnosis:
    """Measure, on some batches, the noise that a policy would add to the gradient of each linear layer.

    The model runs in eager mode as it is (``model.eval()`` leaves dropout out of the minibatch noise). The
    added variance is that of fixed-size sampling with the policy's inclusion probabilities, for maximal
    entropy (Hajek 1964): sum c_i ||g_i / q_i||^2 - ||sum c_i g_i / q_i||^2 / sum c_i with g_i = x_i dy_i^T
    and c_i = q_i (1 - q_i). It holds for `wta-systematic`; other estimators add more. Nothing is trained.

    Args:
        model: its forward returns the loss, or an object or a tuple that holds it.
        batches: two or more, each the keyword or positional arguments of a call; taken one by one.

    Raises:
        DiagnosisError: fewer than two batches, or nothing that the policy would sample.
    """
    policy = Policy() if policy is None else policy
    given = iter(batches)
    first = list(itertools.islice(given, 2))
    if len(first) < 2:
        raise DiagnosisError(
            f"diagnose needs two or more batches, for the noise between them, got {len(first)}"
        )
    sites = _sites(model, first[0], policy)
    found: dict[str, list[_Layer]] = {}
    noise = _Noise()
    for batch in itertools.chain(first, given):
        rows = rows_of(model, batch, sites)
        weights = _weights(rows, sites)
        noise.add({path: x.T.double() @ dy.double() for path, (x, dy) in rows.items()})
        for path, (x, dy) in rows.items():
            found.setdefault(path, []).append(_measure(x, dy, *weights[path], policy, path))
    minibatch = noise.relative()
    layers = [_summary(sites[path], found[path], minibatch[path], policy) for path in sites if path in found]
    groups: dict[str, list[str]] = {}
    for layer in layers:
        groups.setdefault(layer.group, []).append(layer.module)
    together = (_site([found[path] for path in paths], paths, minibatch) for paths in groups.values())
    return Diagnosis(tuple(layers), noise.count, policy, tuple(together))


def relative_variance(samples: Iterable[Sequence[Tensor]]) -> list[float]:
    """Return E ||g - E g||^2 / E ||g||^2 of each of several tensors g, from two or more samples of all."""
    noise = _Noise()
    for sample in samples:
        noise.add({str(i): gradient for i, gradient in enumerate(sample)})
    return list(noise.relative().values())


def _sites(
    model: nn.Module, batch: Mapping[str, Any] | Sequence[Any], policy: Policy
) -> dict[str, SiteReport]:
    """Return the layers that a policy samples, by path."""
    args, kwargs = call_arguments(batch)
    report = explain(model, *args, policy=policy, **kwargs)
    sites = {
        site.module: dataclasses.replace(site, placement=site.placement or "backward")
        for site in report.sites
        if site.parameter and site.reason in ("", BY_BUDGET)
    }
    if not sites:
        reasons = sorted({site.reason for site in report.sites})
        raise DiagnosisError(f"the policy samples no layer of the model ({'; '.join(reasons)})")
    return sites


class _Noise:
    """Sums from which the variance of tensors over samples follows.

    With n samples, (sum ||g||^2 - ||sum g||^2 / n) / (n - 1) is the unbiased variance and sum ||g||^2 / n the
    second moment.
    """

    def __init__(self) -> None:
        self.count = 0
        self.totals: dict[str, Tensor] = {}
        self.squares: dict[str, float] = {}

    def add(self, sample: Mapping[str, Tensor]) -> None:
        self.count += 1
        for name, value in sample.items():
            self.totals[name] = self.totals[name] + value if name in self.totals else value.clone()
            self.squares[name] = self.squares.get(name, 0.0) + float(value.square().sum())

    def relative(self) -> dict[str, float]:
        found = {}
        for name, total in self.totals.items():
            spread = self.squares[name] - float(total.square().sum()) / self.count
            scale = self.count / (self.count - 1)
            found[name] = scale * spread / self.squares[name] if self.squares[name] else 0.0
        return found


@dataclasses.dataclass(frozen=True)
class _Layer:
    """What one batch says about one layer; variances and squares are absolute."""

    group: str
    square: float
    kept: int
    added: float
    curve: tuple[float, ...]
    rounded: float
    rounded_drawn: tuple[float, ...]
    weights: Tensor
    x: Tensor  # on the meta device, as dy
    dy: Tensor


def rows_of(
    model: nn.Module, batch: Mapping[str, Any] | Sequence[Any], paths: Iterable[str]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Run a step and return the input x: [rows, in] and output gradient dy: [rows, out] of each layer.

    Gradients of the model stay as they were. A layer that is called more than once is left out.
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    calls: dict[str, int] = {}

    def watch(path: str, module: nn.Module) -> Any:
        def on_forward(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            calls[path] = calls.get(path, 0) + 1
            x = args[0].detach().flatten(0, -2)
            output.register_hook(  # type: ignore[no-untyped-call]
                lambda dy: seen.update({path: (x, dy.detach().flatten(0, -2))})
            )

        return module.register_forward_hook(on_forward)

    modules = dict(model.named_modules())
    handles = [watch(path, modules[path]) for path in paths if path in modules]
    kept = {parameter: parameter.grad for parameter in model.parameters()}
    model.zero_grad(set_to_none=True)  # what is added to a gradient is added in place
    try:
        args, kwargs = call_arguments(batch)
        _loss(model(*args, **kwargs)).backward()  # type: ignore[no-untyped-call]
    finally:
        for handle in handles:
            handle.remove()
        for parameter, gradient in kept.items():
            parameter.grad = gradient
    return {path: rows for path, rows in seen.items() if calls[path] == 1}


def _weights(
    rows: Mapping[str, tuple[Tensor, Tensor]], sites: Mapping[str, SiteReport]
) -> dict[str, tuple[str, Tensor]]:
    """Return for each layer the first that shares its input, and the weights of its rows: [rows]."""
    groups: dict[Any, list[str]] = {}
    for path, (x, _) in rows.items():
        groups.setdefault((x.data_ptr(), x.shape, sites[path].placement), []).append(path)
    found = {}
    for paths in groups.values():
        weights = rows[paths[0]][0].double().norm(dim=-1)
        if sites[paths[0]].placement == "backward":
            squares = [rows[path][1].double().square().sum(-1) for path in paths]
            weights = weights * torch.stack(squares).sum(0).sqrt()
        found.update(dict.fromkeys(paths, (paths[0], weights)))
    return found


def _measure(x: Tensor, dy: Tensor, group: str, weights: Tensor, policy: Policy, path: str) -> _Layer:
    sampling = policy.sampling(path)
    assert sampling is not None
    rounded, kinds = float(rounding_variance(x, [dy])), (x.to("meta"), dy.to("meta"))
    square = float((x.T.double() @ dy.double()).square().sum())
    x, dy = x.double(), dy.double()
    x = x - x.mean(0) if sampling.center else x
    rows, norms = len(x), x.norm(dim=-1) * dy.norm(dim=-1)
    curve = tuple(
        sampling_variance(x, dy, norms, weights, max(1, math.ceil(ratio * rows))) for ratio in RATIOS
    )
    kept, generator = int(sampling.kept(rows)), torch.Generator(x.device).manual_seed(0)
    chances = (inclusion_probabilities(weights, max(1, math.ceil(ratio * rows))) for ratio in MEASURED)
    rounded_drawn = tuple(float(rounding_of_draw(x, [dy], q, None, generator)) for q in chances)
    added = sampling_variance(x, dy, norms, weights, kept)
    return _Layer(group, square, kept, added, curve, rounded, rounded_drawn, weights, *kinds)


def sampling_variance(x: Tensor, dy: Tensor, norms: Tensor, weights: Tensor, kept: int) -> float:
    """Return Hajek's variance of the estimate of ``x^T dy`` from `kept` rows.

    Args:
        x, dy: [rows, in], [rows, out]; norms: [rows], ``||x_i|| ||dy_i||``; weights: [rows], what rows are chosen by;
            all float64.
    """
    if kept >= len(x):
        return 0.0
    q = inclusion_probabilities(weights.double(), kept)
    if bool(((q == 0) & (norms > 0)).any()):
        return math.inf
    mean = (x * torch.where(q > 0, 1 - q, 0.0).unsqueeze(-1)).T @ dy
    return float(draw_variance(q, norms, mean.square().sum()))


def _summary(site: SiteReport, found: Sequence[_Layer], minibatch: float, policy: Policy) -> LayerDiagnosis:
    square = sum(layer.square for layer in found) or 1.0
    asked, rows, stores = policy.asked(site.module), int(site.rows), site.encoding == "rows"
    assert asked is not None
    curve = tuple(sum(values) / square for values in zip(*(layer.curve for layer in found), strict=True))
    kept, added = found[0].kept, sum(layer.added for layer in found) / square
    if asked.ratio is None:
        ratio = _smallest(curve, asked.noise * minibatch) or 1.0
        kept, added = math.ceil(ratio * rows), curve[RATIOS.index(ratio)]
    masses = [_masses(layer.weights, [kept / rows, *_ACROSS]) for layer in found]
    mass, *across = (sum(values) / len(found) for values in zip(*masses, strict=True))
    return LayerDiagnosis(
        module=site.module,
        group=found[0].group,
        placement=site.placement,
        rows=rows,
        kept=kept,
        added=added,
        curve=curve,
        rounded=sum(layer.rounded for layer in found) / square,
        minibatch=minibatch,
        budget=asked.noise,
        mass=mass,
        masses=tuple(across),
        row_bytes=float(site.bytes_after) / int(site.kept) if stores else 0.0,
    )


def _site(found: Sequence[Sequence[_Layer]], paths: Sequence[str], minibatch: Mapping[str, float]) -> Noise:
    """Return what was measured of layers that share a draw, together; relative to their gradients' mean square."""
    squares = [sum(layer.square for layer in layers) for layers in found]
    total = sum(squares) or 1.0
    first, every = found[0][0], [layer for layers in found for layer in layers]
    return Noise(
        modules=tuple(paths),
        rows=first.x.shape[0],
        features=first.x.shape[1],
        outputs=tuple(layers[0].dy.shape[1] for layers in found),
        dtype=first.dy.dtype,
        device=first.weights.device,
        drawn=1.0,
        added=tuple(sum(layer.curve[RATIOS.index(ratio)] for layer in every) / total for ratio in MEASURED),
        rounded=sum(layer.rounded for layer in every) / total,
        rounded_drawn=tuple(
            sum(column) / total for column in zip(*(x.rounded_drawn for x in every), strict=True)
        ),
        minibatch=sum(minibatch[path] * square for path, square in zip(paths, squares, strict=True)) / total,
        steps=len(found[0]),
    )


def _smallest(curve: Sequence[float], most: float) -> float | None:
    """Return the smallest of :data:`RATIOS` whose noise is at most `most`."""
    return next((ratio for ratio, noise in zip(RATIOS, curve, strict=True) if noise <= most), None)


def _masses(weights: Tensor, shares: Sequence[float]) -> list[float]:
    """Return the share of the total weight that the largest rows have, for several shares of the rows."""
    ordered = weights.sort(descending=True).values.cumsum(0) / weights.sum().clamp(min=1e-300)
    return [float(ordered[max(1, math.ceil(share * len(weights) - 1e-9)) - 1]) for share in shares]


def _unbounded(layers: Sequence[LayerDiagnosis]) -> float:
    return max(1.0 if layer.ratio is None else layer.ratio for layer in layers)


def _cheapest(layers: Sequence[LayerDiagnosis], price: float) -> float:
    """Return the ratio with the least noise and cost, for a price of a byte."""
    size = sum(layer.row_bytes * layer.rows for layer in layers)
    if not size:
        return _unbounded(layers)

    def cost(index: int) -> float:
        noise = sum(layer.curve[index] / max(layer.minibatch, 1e-12) for layer in layers)
        return noise + price * size * RATIOS[index]

    return RATIOS[min(range(len(RATIOS)), key=cost)]


def _bytes(groups: Mapping[str, Sequence[LayerDiagnosis]], ratios: Mapping[str, float]) -> float:
    return sum(
        layer.row_bytes * layer.rows * ratios[name] for name, layers in groups.items() for layer in layers
    )


def call_arguments(batch: Mapping[str, Any] | Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a batch as the positional and the keyword arguments of a call."""
    return ((), dict(batch)) if isinstance(batch, Mapping) else (tuple(batch), {})


def _loss(output: Any) -> Tensor:
    loss = getattr(output, "loss", output)
    loss = loss[0] if isinstance(loss, tuple | list) else loss
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise DiagnosisError(
            f"the model must return its loss, a scalar, or an object or tuple that holds it first, got "
            f"{type(output).__name__}"
        )
    return loss
