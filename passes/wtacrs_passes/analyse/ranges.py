"""Abstract interpretation of a forward pass: bounds of values, and which of them differ wildly in size.

An error that is a small share of the largest value of a row stays small until something large is multiplied with
it that happens to be large where the row is small. So of each value it is asked:

- *bounds*: an interval that holds it (Moore 1966), with the two facts about softmax that intervals do not know,
  ``x - amax(x) <= 0`` and ``e / sum(e) <= 1``;
- *uniform*: is it one number in each row (all of a tensor but its last dimension)? It then scales row and error
  alike;
- *wild*: may its elements be of any size beside each other: exponentials, quotients, high powers. What products
  with matrices, normalisations and bounded functions return is not;
- *outlying*: may it hold a sentinel, the -10000 or -inf of a masked score, beside which all else vanishes.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Container, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from ..graph.cones import is_tangent
from ..graph.operations import (
    ADDITIONS,
    CASTS,
    COPIES,
    EXCHANGES,
    EXPANSIONS,
    FILLS,
    FORMS,
    GATHERS,
    IS_PRODUCT,
    IS_TAME,
    MULTIPLICATIONS,
    SELECTIONS,
    SUMS,
    aten,
    content_of,
    is_largest_of_ranks,
    is_mixing,
    is_pointwise,
    is_random,
    packet,
    sums_over_ranks,
)
from ..graph.torch_api import hint, inductor_prims, same_shape
from ..maths import ops
from .functions import grows, is_constant, is_float, unary_function
from .scales import Scales

Interval: TypeAlias = tuple[float, float]

_ALL: Interval = (-math.inf, math.inf)
_SENTINEL = 64.0  # a constant beyond this is none of a model's own values
_AWAY = 0.05  # a divisor beyond this amplifies an error no more than twentyfold

_INTO_UNIT = {aten.sigmoid.default: (0.0, 1.0), aten.tanh.default: (-1.0, 1.0), aten.erf.default: (-1.0, 1.0),
              aten.sin.default: (-1.0, 1.0), aten.cos.default: (-1.0, 1.0), aten.sign.default: (-1.0, 1.0)}  # fmt: skip
_SAME = FORMS | GATHERS | EXCHANGES | {aten.cat.default, aten.where.self, aten.amax.default,
        aten.amin.default, aten.maximum.default, aten.minimum.default, aten.mean.dim, aten.copy.default}  # fmt: skip
"""Operations whose results lie among, or between, the elements of their operands."""
_MERGES = ADDITIONS | {aten.where.self, aten.maximum.default, aten.minimum.default, aten.cat.default}
"""Operations through which a sentinel of either operand reaches the result."""
_SCALES = {aten.mul.Tensor, aten.div.Tensor}
"""Operations that may scale a sentinel to the size of all else."""
_MONOTONE: dict[Any, Callable[[float], float]] = {
    aten.exp.default: lambda x: math.exp(x) if x < 700 else math.inf,
    aten.log.default: lambda x: math.log(x) if 0 < x < math.inf else (math.inf if x > 0 else -math.inf),
    aten.log1p.default: lambda x: math.log1p(x) if -1 < x < math.inf else (math.inf if x > 0 else -math.inf),
    aten.sqrt.default: lambda x: math.sqrt(max(x, 0.0)),
    aten.relu.default: lambda x: max(x, 0.0),
}
_TAME = _SAME | SUMS | ADDITIONS | MULTIPLICATIONS | {
    aten.add.Scalar, aten.sub.Scalar, aten.neg.default, aten.abs.default,
    aten.relu.default, aten.clamp.default, aten.clamp_min.default,
    aten.clamp_max.default, aten.constant_pad_nd.default, aten.slice_scatter.default, aten.select_scatter.default,
    aten.cumsum.default, aten.flip.default, aten.var.correction, aten.sqrt.default, ops.row_norms, ops.append_row,
    ops.combine_rows, ops.choose_rows, ops.gradient_weights, ops.in_chunks, ops.round_columns, ops.receive,
    ops.in_groups, ops.sort_rows, ops.round_groups, aten.copy_.default,
}  # fmt: skip
"""Operations that return nothing of another order of size than their operands."""


class Ranges:
    """What is known about the values of a forward pass.

    Attributes:
        scales: of tensors that are rounded to 8 bits.

    Args:
        tangent: everything else; roots: of `unary_roots`; statics: parameters and buffers.
    """

    def __init__(
        self,
        graph: fx.Graph,
        tangent: Container[fx.Node],
        roots: Mapping[fx.Node, fx.Node | None],
        statics: Container[fx.Node],
    ) -> None:
        self.roots = roots
        self.scales = Scales(graph, tangent)
        self.bounds: dict[fx.Node, Interval] = {}
        self.uniform: set[fx.Node] = set()
        self.wild: set[fx.Node] = set()
        self.outlying: set[fx.Node] = set()
        self._masks, self._inputs = _given(graph, statics)
        for node in graph.nodes:
            if isinstance(node.meta.get("val"), Tensor) and node not in tangent:
                self.bounds[node] = _clean(self._bounds(node))
                if self._is_uniform(node):
                    self.uniform.add(node)
                if is_float(node) and self._is_wild(node):
                    self.wild.add(node)
                if is_float(node) and self._is_outlying(node):
                    self.outlying.add(node)

    def is_bounded(self, node: fx.Node) -> bool:
        """Tell whether values lie in an interval that is known."""
        low, high = self._of(node)
        return math.isfinite(low) and math.isfinite(high)

    def sums_to_one(self, node: fx.Node) -> bool:
        """Tell whether each row holds shares of its sum, none negative: a softmax over the last dimension."""
        share = content_of(node)
        same = same_shape(share.meta["val"].shape[-1:], node.meta["val"].shape[-1:])
        if share.target is not aten.div.Tensor or not isinstance(share.args[1], fx.Node) or not same:
            return False
        total = content_of(share.args[1], EXPANSIONS)
        if self._softmax(share) is None or len(total.args) < 2:
            return False
        rank = total.args[0].meta["val"].dim()  # type: ignore[union-attr]
        return [dim % rank for dim in total.args[1]] == [rank - 1]  # type: ignore[union-attr]

    def amplifies(self, factor: Any) -> bool:
        """Tell whether a product with `factor` may make a small share of a row a large one."""
        return factor in self.wild and factor not in self.uniform

    def amplifies_by_division(self, divisor: Any) -> bool:
        """Tell the same of a quotient."""
        if not isinstance(divisor, fx.Node) or divisor in self.uniform:
            return False
        low, high = self._of(divisor)
        return not (low >= _AWAY or high <= -_AWAY)

    def _of(self, value: Any) -> Interval:
        if isinstance(value, fx.Node):
            return self.bounds.get(value, _ALL)
        return (float(value), float(value)) if isinstance(value, int | float) else _ALL

    def _bounds(self, node: fx.Node) -> Interval:
        args, target = node.args, node.target
        value = node.meta["val"]
        if value.dtype == torch.bool:
            return 0.0, 1.0
        if value.is_complex():
            return _ALL
        if is_constant(node):
            return self._of(args[FILLS[target]])
        if target in _INTO_UNIT:
            return _INTO_UNIT[target]
        if target is inductor_prims.random or target is aten.rand.default:
            return (0.0, 1.0) if args[-1] == "rand" or target is aten.rand.default else _ALL
        if target in _SAME:
            return _hull([self._of(arg) for arg in _operands(node)])
        if target in _MONOTONE:
            low, high = self._of(args[0])
            return _MONOTONE[target](low), _MONOTONE[target](high)
        if target in SUMS:
            return (0.0, math.inf) if self._of(args[0])[0] >= 0 else _ALL
        if target is aten.abs.default or (target is aten.mul.Tensor and args[0] is args[1]):
            return _magnitude(self._of(args[0]), power=2 if target is aten.mul.Tensor else 1)
        if target in _ARITHMETIC and not node.kwargs:
            known = self._softmax(node)
            return known or _ARITHMETIC[target](*(self._of(arg) for arg in args[:2]))
        return _ALL

    def _softmax(self, node: fx.Node) -> Interval | None:
        """Return what intervals do not know: of differences from a maximum, and of shares of a sum."""
        if len(node.args) < 2 or not all(isinstance(arg, fx.Node) for arg in node.args):
            return None
        left, right = (content_of(arg, EXPANSIONS) for arg in node.args)  # type: ignore
        source = right.args[0] if right.args else None
        same = isinstance(source, fx.Node) and content_of(source, CASTS) is left
        if node.target is aten.sub.Tensor:
            if right.target is aten.amax.default and same:
                return -math.inf, 0.0
            if right.target is aten.log.default and _is_exp_sum_of(source, left):
                return -math.inf, 0.0
        elif node.target is aten.div.Tensor and right.target is aten.sum.dim_IntList and same:
            return (0.0, 1.0) if self._of(left)[0] >= 0 else None
        return None

    def _is_uniform(self, node: fx.Node) -> bool:
        shape = node.meta["val"].shape
        if not shape or (isinstance(shape[-1], int) and shape[-1] == 1):
            return True
        operands = list(_operands(node))
        if node.target is aten.expand.default:
            return operands[0] in self.uniform
        repeats = is_pointwise(node) or node.target in CASTS | COPIES
        return is_constant(node) or (repeats and bool(operands) and all(o in self.uniform for o in operands))

    def _is_wild(self, node: fx.Node) -> bool:
        if self.is_bounded(node):
            return False
        if (x := self.scales.normalised(node)) is not None:
            return x in self.wild
        read = node.args[:1] if node.target in GATHERS else _operands(node)  # one scale a row changes nothing
        operands = [
            arg for arg in read if isinstance(arg, fx.Node) and is_float(arg) and arg not in self.uniform
        ]
        if not is_pointwise(node) and not _is_tame(node):
            if node.target is operator.getitem:
                whole = node.all_input_nodes[0]
                if whole.target is ops.in_chunks:
                    return not node.meta.get(IS_PRODUCT, False)
                if packet(whole.target) in SELECTIONS or whole.meta.get(IS_TAME, False):
                    return any(arg in self.wild for arg in _operands(whole))
                return not is_mixing(whole)
            return node.op == "call_function" and not is_random(node) and not is_mixing(node)
        if _is_tame(node) and not any(arg in self.wild for arg in operands):
            return False
        if (
            node.target is aten.div.Tensor
            and not node.kwargs
            and not any(arg in self.wild for arg in operands)
        ):
            return self.amplifies_by_division(node.args[1])
        root = self.roots[node]
        if root is not None and root is not node and is_float(root) and root not in self.wild:
            return grows(unary_function(node, root))
        return True

    def _is_outlying(self, node: fx.Node) -> bool:
        low, high = self.bounds[node]
        if low >= -_SENTINEL and high <= _SENTINEL:
            return False
        if is_constant(node) or node in self._masks:
            return True
        if node in self._inputs:
            return False  # where it is added to something larger, see below
        if node.target in _MERGES:
            return any(self._brings_sentinel(arg, node) for arg in _operands(node))
        if node.target in _SCALES:
            factors = [arg for arg in _operands(node) if arg not in self._masks and arg not in self._inputs]
            normalised = any(arg in self.uniform and not is_constant(arg) for arg in factors)
            return not normalised and any(arg in self.outlying for arg in factors)
        if is_pointwise(node) or node.target in _SAME:
            return any(arg in self.outlying for arg in _operands(node))
        return False

    def _brings_sentinel(self, operand: fx.Node, node: fx.Node) -> bool:
        """Tell whether an operand may be a mask: an input is one where it is smaller than what it is added to."""
        if operand in self._inputs:
            content = content_of(operand, EXPANSIONS)
            smaller = hint(content.meta["val"].numel()) < hint(node.meta["val"].numel())
            low, high = self.bounds[operand]
            return smaller and content.meta["val"].dim() > 1 and max(-low, high) > _SENTINEL
        return operand in self.outlying


def _given(graph: fx.Graph, statics: Container[fx.Node]) -> tuple[set[fx.Node], set[fx.Node]]:
    """Return what is made of the model's inputs alone: without any that is a float, and with one."""
    masks: set[fx.Node] = set()
    inputs: set[fx.Node] = set()
    for node in graph.nodes:
        if not isinstance(node.meta.get("val"), Tensor):
            continue
        if node.op == "placeholder":
            if node not in statics and not is_tangent(node):
                (inputs if is_float(node) else masks).add(node)
        elif (is_pointwise(node) or node.target in _SAME) and node.all_input_nodes:
            operands = [arg for arg in _operands(node) if not is_constant(arg)]
            if all(arg in masks or arg in inputs for arg in operands):
                (inputs if any(arg in inputs for arg in operands) else masks).add(node)
    return masks, inputs


def is_opaque(node: fx.Node) -> bool:
    """Tell whether nobody here knows what an operation does to sizes: inverses, factorisations, scans, bodies."""
    if node.op != "call_function" or is_pointwise(node) or is_random(node) or node.target is operator.getitem:
        return False
    if node.meta.get(IS_TAME, False):
        return False
    if not any(is_float(arg) for arg in node.all_input_nodes):
        return False
    return not _is_tame(node) and not is_mixing(node) and packet(node.target) not in SELECTIONS


def _is_tame(node: fx.Node) -> bool:
    """Tell whether a node holds nothing of another order of size than its operands do."""
    return node.target in _TAME or sums_over_ranks(node) or is_largest_of_ranks(node)


def _operands(node: fx.Node) -> list[fx.Node]:
    return [arg for arg in node.all_input_nodes if isinstance(arg.meta.get("val"), Tensor)]


def _is_exp_sum_of(total: Any, difference: fx.Node) -> bool:
    """Tell whether `total` is ``sum(exp(difference))``."""
    if not isinstance(total, fx.Node) or total.target is not aten.sum.dim_IntList:
        return False
    exponential = total.args[0]
    return (
        isinstance(exponential, fx.Node)
        and exponential.target is aten.exp.default
        and (exponential.args[0] is difference)
    )


def _hull(intervals: list[Interval]) -> Interval:
    if not intervals:
        return _ALL
    return min(low for low, _ in intervals), max(high for _, high in intervals)


def _clean(interval: Interval) -> Interval:
    low, high = interval
    return (-math.inf if math.isnan(low) else low), (math.inf if math.isnan(high) else high)


def _magnitude(interval: Interval, power: int) -> Interval:
    low, high = (abs(end) for end in interval)
    inside = interval[0] <= 0 <= interval[1]
    return (0.0 if inside else min(low, high) ** power), max(low, high) ** power


def _times(left: Interval, right: Interval) -> Interval:
    ends = [0.0 if 0.0 in (a, b) else a * b for a in left for b in right]
    return min(ends), max(ends)


def _over(left: Interval, right: Interval) -> Interval:
    if right[0] <= 0 <= right[1]:
        return _ALL
    return _times(left, (1 / right[1], 1 / right[0]))


def _plus(left: Interval, right: Interval) -> Interval:
    return left[0] + right[0], left[1] + right[1]


def _minus(left: Interval, right: Interval) -> Interval:
    return left[0] - right[1], left[1] - right[0]


_ARITHMETIC: dict[Any, Callable[..., Interval]] = {
    aten.add.Tensor: _plus, aten.add.Scalar: _plus, aten.sub.Tensor: _minus, aten.sub.Scalar: _minus,
    aten.mul.Tensor: _times, aten.mul.Scalar: _times, aten.div.Tensor: _over, aten.div.Scalar: _over,
    aten.neg.default: lambda x: (-x[1], -x[0]),
}  # fmt: skip
