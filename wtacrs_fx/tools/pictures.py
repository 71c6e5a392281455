"""Pictures: memory over a training step, and the operations around one weight gradient. Need matplotlib."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import fx

from wtacrs_passes.graph.cones import tangent_cone
from wtacrs_passes.graph.names import parameter_gradients
from wtacrs_passes.report import MIB

from ..capture import STATIC_INPUTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito: told apart by all.
BLUE, ORANGE, GREY, BLACK = "#0072B2", "#E69F00", "#DDDDDD", "#000000"
_COLOURS = (GREY, BLACK, BLUE, ORANGE)
_DEEPEST = 9  # operations above a gradient that are drawn


def draw_timeline(axes: Axes, timelines: Mapping[str, Sequence[tuple[float, int]]]) -> None:
    """Draw the memory of training steps: up in the forward pass, down in the backward pass.

    Args:
        timelines: what ran -> its :func:`wtacrs_fx.tools.measure.memory_timeline`.
    """
    colours = itertools.cycle(_COLOURS[-len(timelines) :])
    for (name, timeline), colour in zip(timelines.items(), colours, strict=False):  # endless colours
        seconds, held = zip(*timeline, strict=True)
        last = seconds[-1] or 1.0
        peak = max(held) / MIB
        axes.step(
            [moment / last for moment in seconds],
            [size / MIB for size in held],
            where="post",
            color=colour,
            linewidth=2,
            label=f"{name}: peak {peak:.0f} MiB",
        )
    axes.set(xlabel="part of the step (forward, then backward)", ylabel="MiB beyond weights and inputs")
    highest = max(held for timeline in timelines.values() for _, held in timeline)
    axes.set_ylim(0, 1.3 * highest / MIB)  # room for the names
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="upper right")


def draw_gradient(graph_module: fx.GraphModule, parameter: str, path: str | Path) -> None:
    """Draw the operations that compute the gradient of a parameter in a joint graph.

    Args:
        graph_module: of :func:`wtacrs_fx.capture` or :func:`wtacrs_fx.transform`.
        parameter: such as ``layers.0.weight``.
        path: of the picture; its ending chooses the format.

    Raises:
        KeyError: the graph computes no gradient of the parameter.
    """
    import matplotlib.pyplot as plt

    graph = graph_module.graph
    table = {known.index: known for known in graph_module.meta.get(STATIC_INPUTS, ())}
    found = {name: node for node, name in parameter_gradients(graph, table).items()}
    if parameter not in found:
        raise KeyError(f"no gradient of {parameter!r}; the graph has those of {', '.join(sorted(found))}")
    depths = _depths(found[parameter])
    tangent = tangent_cone(graph)
    levels: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        if node in depths:
            levels.setdefault(depths[node], []).append(node)
    places = {
        node: (2.6 * (number - (len(level) - 1) / 2) + 0.4 * (depth % 2), float(depth))
        for depth, level in levels.items()
        for number, node in enumerate(level)
    }
    widest = max(len(level) for level in levels.values())
    figure, axes = plt.subplots(figsize=(2.6 * widest, 0.9 * len(levels) + 0.8))
    axes.set(xlim=(-1.3 * widest, 1.3 * widest + 0.4), ylim=(-0.6, len(levels) - 0.4))
    for node, (x, y) in places.items():
        for arg in places.keys() & set(node.all_input_nodes):
            axes.annotate(
                "", (x, y), places[arg],
                arrowprops={"arrowstyle": "->", "color": "#777777", "shrinkA": 16, "shrinkB": 18},
            )  # fmt: skip
        stored = node not in tangent and any(user in tangent for user in node.users)
        axes.text(
            x, y, _label(node), ha="center", va="center", fontsize=9,
            bbox={
                "boxstyle": "round", "facecolor": "white", "linewidth": 3 if stored else 1.2,
                "edgecolor": ORANGE if node in tangent else BLUE,
            },
        )  # fmt: skip
    axes.set_title(
        f"gradient of {parameter}\nblue: forward, orange: backward, thick: read by the backward pass",
        fontsize=10,
    )
    axes.axis("off")
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def _depths(gradient: fx.Node) -> dict[fx.Node, int]:
    """Return the nodes above a gradient with their longest distance to it."""
    depths = {gradient: 0}
    for node in reversed(gradient.graph.nodes):
        if node in depths and depths[node] < _DEEPEST:
            for arg in node.all_input_nodes:
                depths[arg] = max(depths.get(arg, 0), depths[node] + 1)
    return depths


def _label(node: fx.Node) -> str:
    value = node.meta.get("val")
    shape = list(value.shape) if isinstance(value, torch.Tensor) else ""
    name = node.name if node.op != "call_function" else str(node.target).removesuffix(".default")
    if node.target is operator.getitem:
        name = f"result {node.args[1]}"
    return f"{name}\n{shape}" if shape != "" else name
