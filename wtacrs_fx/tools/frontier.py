"""The frontier of memory against work: what of how many layers is computed again, and the batch that fits then."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wtacrs_passes.policy import Policy
from wtacrs_passes.report import Report

from .predict import (
    INDUCTOR,
    WTACRS,
    Line,
    Loss,
    ModelError,
    configuration,
    count_parameters,
    named_model,
    saved_lines,
    state_bytes,
)
from .progress import Progress, silent

_PARTS = 2


@dataclass(frozen=True)
class Point:
    """One way of training.

    Attributes:
        way: its name.
        saved: bytes of saved activations of a sample.
        work: multiplications of a step, beside those without anything computed again.
        batch: the most samples that fit.
    """

    way: str
    saved: float
    work: float
    batch: int


@dataclass(frozen=True)
class Frontier:
    """What fits in so many bytes of a device.

    Attributes:
        memory: bytes; state: those of weights, gradients and AdamW's moments.
        points: from Inductor's on, in the order of work.
    """

    name: str
    memory: int
    state: float
    points: tuple[Point, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and strings."""
        return dataclasses.asdict(self)

    def plot(self, path: Path) -> None:
        """Draw the largest batch against the work of a step."""
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        ours = [point for point in self.points if point.way != INDUCTOR]
        axes.plot([p.work for p in ours], [p.batch for p in ours], "o-", label=WTACRS)
        base = next(point for point in self.points if point.way == INDUCTOR)
        axes.plot(base.work, base.batch, "s", label=INDUCTOR)
        for point in ours[1:]:
            label = point.way.removeprefix(f"{WTACRS}, ")
            axes.annotate(label, (point.work, point.batch), (4, -12), textcoords="offset points", fontsize=7)
        axes.set(
            xlabel="multiplications of a step, of those with nothing computed again",
            ylabel="largest batch",
            title=f"{self.name}, {self.memory / 2**30:.3g} GiB",
        )
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(path, dpi=120)
        plt.close(figure)


def frontier(
    name: str, memory: int, length: int, dtype: torch.dtype, policy: Policy, progress: Progress = silent
) -> Frontier:
    """Predict what fits beside the state of training, by what is computed again, and of how many layers.

    Models of two and of three layers are traced: with nothing, the products and everything of them computed again.
    Deeper models follow.

    Args:
        name: of a model of transformers, see :func:`wtacrs_fx.tools.predict.predict`.
        memory: bytes of the device.
        length: tokens of a sample.

    Raises:
        ModelError: no such configuration, or a factory, whose layers this cannot choose.
    """
    if ":" in name:
        raise ModelError(f"--memory needs a model by name, got {name!r}; use Policy(memory=...) and explain")
    config = configuration(name)
    depth = int(config.num_hidden_layers)
    made = {layers: named_model(config, layers, 1, length, dtype) for layers in (2, 3)}
    # A training step asks for the loss alone, not for the logits that transformers' models return beside it.
    models = {
        layers: (Loss(model) if "labels" in inputs else model, inputs)
        for layers, (model, inputs) in made.items()
    }
    products_again = dataclasses.replace(policy, recompute_products=1.0)
    ways = policy, products_again, dataclasses.replace(products_again, recompute=1.0)
    found = []
    for number, way in enumerate(ways):
        found.append(saved_lines(models.__getitem__, way, (2, 3)))
        progress("traced", number + 1, len(ways))
    parameters = Line.through(count_parameters(models[2][0]), count_parameters(models[3][0]), (2, 3))
    words = int(getattr(config, "vocab_size", 0)) * int(config.hidden_size)
    share = depth * parameters.layer / (depth * parameters.layer + words)  # of the products, in the layers
    state = state_bytes(round(parameters(depth)), dtype.itemsize)
    plain, products, whole = (_Way.of(*each) for each in found)

    def point(name: str, before: _Way, after: _Way, layers: int) -> Point:
        """Return what `layers` of the layers come to in one way, and the others in another."""
        saved = before.saved.around + (depth - layers) * before.saved.layer + layers * after.saved.layer
        again = (depth - layers) * before.again + layers * after.again
        work = 1 + share * again / depth / 3  # a forward pass is a third of a step
        return Point(name, saved, work, max(0, int((memory - state) // saved)))

    inductor = _Way(found[0][0][INDUCTOR], 0.0)
    points = [point(INDUCTOR, inductor, inductor, 0), point(WTACRS, plain, plain, 0)]
    for what, before, after in (("products of ", plain, products), ("", products, whole)):
        for layers in dict.fromkeys(depth * part // _PARTS for part in range(1, _PARTS + 1)):
            if layers:
                name_of = f"{WTACRS}, {what}{layers} of {depth} layers again"
                points.append(point(name_of, before, after, layers))
    return Frontier(name, memory, state, tuple(points))


@dataclass(frozen=True)
class _Way:
    """One way of training all layers: bytes by depth, and of a layer's forward pass what is done again."""

    saved: Line
    again: float

    @classmethod
    def of(cls, lines: dict[str, Line], fewer: Report, more: Report) -> _Way:
        work, again = more.work - fewer.work, more.work_again - fewer.work_again
        return cls(lines[WTACRS], again / work if work else 0.0)
