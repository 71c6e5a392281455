"""Functions of one tensor, element by element: what they are functions of, and what they do to an error."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from ..graph.operations import CASTS, FILLS, is_pointwise
from ..graph.torch_api import real_tensors, same_shape

Shape = Literal["linear", "smooth", "steep"]

_STEEPEST = 4.0  # slope through which an error may pass, of values of one or less
_EXTENT = 8.0  # slopes are taken over [-8, 8]
_CURVING = (
    8.0  # how far a function may move, beside its extent, when a far argument changes by as much as it is
)


def unary_roots(graph: fx.Graph) -> dict[fx.Node, fx.Node | None]:
    """Return for each node the tensor that it is a function of, element by element.

    That is the node itself where it is no pointwise function of a single tensor, None where it is constant.
    """
    roots: dict[fx.Node, fx.Node | None] = {}
    for node in graph.nodes:
        roots[node] = None if is_constant(node) else node
        value = node.meta.get("val")
        pointwise = node.op == "call_function" and (is_pointwise(node) or node.target in CASTS)
        if not pointwise or not isinstance(value, Tensor):
            continue
        operands = [(roots[arg], arg) for arg in node.all_input_nodes]
        found = {root for root, _ in operands if root is not None}
        alike = all(
            isinstance(arg.meta.get("val"), Tensor) and same_shape(arg.meta["val"].shape, value.shape)
            for root, arg in operands
            if root is not None
        )
        if operands and not found:
            roots[node] = None
        elif len(found) == 1 and alike:
            roots[node] = next(iter(found))
    return roots


def is_constant(node: fx.Node) -> bool:
    """Tell whether a node fills a tensor with a number that is known now: not with a size that varies."""
    return node.target in FILLS and not isinstance(node.args[FILLS[node.target]], fx.Node)


@dataclasses.dataclass(frozen=True)
class _Result:
    """Stands for the argument of a function, number 0, or the result of one of its steps."""

    number: int


@dataclasses.dataclass(frozen=True)
class Unary:
    """A function of one tensor, element by element, in float64; equal to others of the same steps.

    Attributes:
        steps: operations with their arguments, in order.
        text: the same, to compare.
    """

    steps: tuple[tuple[Callable[..., Any], Any, Any], ...] = dataclasses.field(compare=False, repr=False)
    text: str

    def __call__(self, points: Tensor) -> Tensor:
        """Return the values at points ``[n]``."""
        results = [points]
        for target, args, kwargs in self.steps:
            args, kwargs = tree_map_only(_Result, lambda each: results[each.number], (args, kwargs))
            results.append(target(*args, **kwargs))
        return results[-1].double().expand_as(points)


def unary_function(node: fx.Node, root: fx.Node) -> Unary:
    """Return the function from `root` to `node` as traced."""
    steps: list[tuple[Any, Any, Any]] = []
    known: dict[fx.Node, Any] = {root: _Result(0)}

    def result(node: fx.Node) -> Any:
        if node not in known:
            steps.append(step(node))
            known[node] = _Result(len(steps))
        return known[node]

    def step(node: fx.Node) -> tuple[Any, Any, Any]:
        if is_constant(node):
            dtype = torch.float64 if is_float(node) else node.meta["val"].dtype
            return torch.full_like, (_Result(0), node.args[FILLS[node.target]]), {"dtype": dtype}
        if node.target in CASTS and is_float(node):
            return Tensor.double, (result(node.args[0]),), {}  # type: ignore
        args, kwargs = fx.map_arg((node.args, node.kwargs), result)
        kwargs = {name: arg for name, arg in kwargs.items() if name != "memory_format"}  # of another rank
        return node.target, args, kwargs

    result(node)
    return Unary(tuple(steps), repr(steps))


def is_float(node: fx.Node) -> bool:
    """Tell whether a node is a tensor of real numbers."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


@functools.lru_cache
@real_tensors()
def shape(function: Callable[[Tensor], Tensor]) -> Shape:
    """Tell what a function does to a small error of its argument.

    The error is a share of the largest argument. It stays a small share of the largest value where a function
    is ``linear`` or ``smooth``: its slope is bounded, and falls with distance unless the values grow as well. A
    sine is not smooth, however large its argument, an error of a thousandth of it may be a period.
    """
    points = torch.linspace(-_EXTENT, _EXTENT, 2001, dtype=torch.float64) + 1e-5
    values = function(points)
    slopes = values.diff() / points.diff()
    if not bool(values.isfinite().all()):
        return "steep"
    if bool((slopes - slopes[0]).abs().max() <= 1e-6 * slopes[0].abs().clamp(min=1e-6)):
        return "linear"
    steepest, extent = float(slopes.abs().max()), float(values.abs().max())
    if steepest > _STEEPEST * min(extent, 1.0) and steepest * _EXTENT > _STEEPEST * extent:
        return "steep"
    return "smooth" if _settles(function, extent) else "steep"


def _settles(function: Callable[[Tensor], Tensor], extent: float) -> bool:
    """Tell whether far out a function moves no more than it is large."""
    far = torch.logspace(0.9, 4, 400, dtype=torch.float64)
    for sign in (1, -1):
        values, moved = function(sign * far), function(sign * far * (1 + 1e-3))
        if not bool(values.isfinite().all() and moved.isfinite().all()):
            return False
        size = values.abs().cummax(0).values.clamp(min=extent)
        if bool(((moved - values).abs() * 1e3 > _CURVING * size).any()):
            return False
    return True


@functools.lru_cache
@real_tensors()
def rounding_error(function: Callable[[Tensor], Tensor], bits: int) -> float:
    """Return the squared error, beside the squared values, where normal arguments are rounded.

    Args:
        bits: of an integer whose largest stands for two and a half times the spread of the arguments.
    """
    places = torch.linspace(-0.5, 0.5, 17, dtype=torch.float64)[1::2]  # in the middles of eighths
    quantiles = torch.linspace(0, 1, 401, dtype=torch.float64)[1::2]
    points, step = torch.special.ndtri(quantiles), 2.5 / (2 ** (bits - 1) - 1)
    values = function(points)
    errors = function((points + step * places.unsqueeze(-1)).flatten()).view(len(places), -1) - values
    return float(errors.square().mean() / values.square().mean().clamp(min=1e-30))


@functools.lru_cache
@real_tensors()
def grows(function: Callable[[Tensor], Tensor]) -> bool:
    """Tell whether a function leaves a parabola, ``|f(x)| > 4 (1 + x^2)``, or is not finite somewhere."""
    far = torch.logspace(-6, 2, 200, dtype=torch.float64)
    points = torch.cat([-far, torch.zeros(1, dtype=torch.float64), far])
    values = function(points)
    return not bool(values.isfinite().all()) or bool((values.abs() > 4 * (1 + points * points)).any())
