"""What a residual can be computed from again, and stay within its bound."""

from __future__ import annotations

import operator

from torch import fx

from ..analyse.functions import Shape, is_float, shape
from ..graph.operations import (
    ADDITIONS,
    CASTS,
    COPIES,
    EXPANSIONS,
    GATHERS,
    MULTIPLICATIONS,
    VIEWS,
    aten,
    content_of,
    is_derivable,
    tensor_operands,
)
from .exactness import Exactness
from .facts import Facts

_SUMS_AND_PRODUCTS = ADDITIONS | MULTIPLICATIONS | {
    aten.add.Scalar, aten.sub.Scalar, aten.neg.default, aten.div.Scalar, aten.where.self, aten.cat.default,
    aten.maximum.default, aten.minimum.default,
}  # fmt: skip
_ALIKE = VIEWS | COPIES


class Derivations:
    """The network of residuals and what they can be computed from.

    Attributes:
        operands: what each node is derived from; None where it must be stored.
    """

    def __init__(self, facts: Facts, exactness: Exactness) -> None:
        self.facts, self._exactness = facts, exactness
        self._shapes: dict[fx.Node, Shape] = {}
        self.operands: dict[fx.Node, tuple[fx.Node, ...] | None] = {}
        stack = list(facts.residuals)
        while stack:
            node = stack.pop()
            if node not in self.operands:
                operands = self._derivation(node)
                if operands is not None:
                    operands = tuple(operand for operand in operands if not facts.is_at_hand(operand))
                    stack += operands
                self.operands[node] = operands

    def is_form(self, node: fx.Node) -> bool:
        """Tell whether a node is a view or copy of what it is derived from, which is stored in its place."""
        again = node in self.facts.again or node.target in _ALIKE or node.target is aten.expand.default
        return again and self.operands[node] is not None

    def _derivation(self, node: fx.Node) -> tuple[fx.Node, ...] | None:
        if node in self.facts.again:
            return tuple(tensor_operands(self.facts.again[node]))
        repeats = node in self.facts.repeated
        if node in self.facts.handed_on or not (repeats or is_derivable(node)):
            return None
        operands, root = tuple(tensor_operands(node)), self.facts.roots[node]
        if repeats and node.target is operator.getitem:
            operands = tuple(tensor_operands(operands[0]))
        if all(operand in self._exactness.known for operand in operands):
            return operands
        if repeats:
            return None if self._is_exact(node) else operands
        if root is not None and root is not node and root in self._exactness.known:
            return (root,)
        if self._is_exact(node):
            return None
        if self.shape(node) != "steep":
            return (root,) if root is not None else None
        if node.target in _ALIKE | GATHERS:
            return operands
        if node.target in CASTS and is_float(node) and is_float(operands[0]):
            return operands
        if root is not None and root is not node:
            return None  # a steep function
        if node.target in ADDITIONS and any(map(self._is_statistic, operands)):
            return None  # less its mean, little may be left of a value but its error
        if node.target in _SUMS_AND_PRODUCTS:
            return operands
        if self.facts.ranges.scales.normalised(node) is not None:
            return operands
        if node.target is aten.div.Tensor and len(operands) == 2 and operands[-1] in self._exactness.known:
            return None if self.facts.ranges.amplifies_by_division(operands[-1]) else operands
        return None

    def _is_exact(self, node: fx.Node) -> bool:
        """Tell whether a node is needed to the last bit."""
        return node in self._exactness.refusals or node in self.facts.ranges.wild

    def _is_statistic(self, node: fx.Node) -> bool:
        source = content_of(node, EXPANSIONS)
        return (
            node in self.facts.statistics
            and source not in self.facts.pinned
            and not self.facts.is_at_hand(node)
        )

    def shape(self, node: fx.Node) -> Shape:
        """Tell how a node depends on its root; ``steep`` where it is no function of real numbers."""
        if node not in self._shapes:
            self._shapes[node] = shape(self.facts.function(node)) if self.facts.is_function(node) else "steep"
        return self._shapes[node]
