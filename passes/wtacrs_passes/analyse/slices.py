"""Find a slice of the rows of a head's logits, with nothing that reads the others."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any, cast

from torch import fx

from ..graph.cones import tangent_cone
from ..graph.operations import CASTS, SUMS, aten, is_pointwise, is_zero, tensor_operands
from .losses import (
    SAME_ORDER,
    broadcasts,
    has_rows,
    is_head,
    is_linear,
    is_sum_of_products,
    is_transpose,
    lead_of,
    leading,
    matrix_of,
    same_size,
    shape_of,
    sums_rows,
)


@dataclasses.dataclass(frozen=True)
class Where:
    """Which rows a slice takes: from `start` to `end` along `dim`."""

    dim: int
    start: int
    end: int


@dataclasses.dataclass(frozen=True)
class SlicedHead:
    """A head, what has its rows, and what reads those.

    Attributes:
        head: the product that makes the logits.
        rows: their number.
        where: the rows that are read.
        shape: sizes of the dimensions that hold the rows where they are sliced.
        members: the head and what has its rows: up to the slices, and from the gradients of these.
        slices: of members.
        products: of members and a matrix: their results have the rows as well.
        sums: of members, or of products of them, over the rows.
    """

    head: fx.Node
    rows: Any
    where: Where
    shape: tuple[Any, ...]
    members: frozenset[fx.Node]
    slices: frozenset[fx.Node]
    products: frozenset[fx.Node]
    sums: frozenset[fx.Node]

    def lead(self, node: fx.Node) -> int | None:
        """Return how many leading dimensions of a value hold the rows."""
        return lead_of(node, self.rows)


def find_sliced_heads(graph: fx.Graph, smallest: int) -> list[SlicedHead]:
    """Return the heads of logits above `smallest` bytes in float32 of which some rows are read."""
    tangent = tangent_cone(graph)
    heads = [node for node in graph.nodes if node not in tangent and is_head(node, smallest)]
    found = (_Search(graph, head, tangent).result() for head in heads)
    return [each for each in found if each is not None]


def operands_with_rows(node: fx.Node, rows: Any) -> list[fx.Node]:
    """Return the operands that have the rows in the same dimensions as the result."""
    lead = lead_of(node, rows) or 0
    return [arg for arg in tensor_operands(node) if shape_of(arg) is not None and has_rows(arg, node, lead)]


class _Search:
    """What belongs to one head."""

    def __init__(self, graph: fx.Graph, head: fx.Node, tangent: set[fx.Node]) -> None:
        self.graph, self.head, self.tangent = graph, head, tangent
        self.rows = head.meta["val"].shape[0]
        self.members: set[fx.Node] = set()
        self.slices: set[fx.Node] = set()
        self.products: set[fx.Node] = set()
        self.sums: set[fx.Node] = set()

    def result(self) -> SlicedHead | None:
        """Return what was found; None if there is no such slice, or another reader of the rows."""
        if same_size(*shape_of(self.head) or ()) or not self._follow([self.head]) or not self.slices:
            return None  # with as many rows as words, which dimension holds the rows is not known
        first = next(iter(self.slices))
        where, logits = _where(first), shape_of(cast(fx.Node, first.args[0]))
        assert where is not None and logits is not None
        if not all(_where(node) == where and _same(node.args[0], logits) for node in self.slices):
            return None
        shape = logits[: leading(logits, self.rows)]
        scattered = {node for node in self.graph.nodes if self._is_gradient(node, where, logits)}
        if not scattered or not self._follow(sorted(scattered)) or not self._is_zero_elsewhere(scattered):
            return None
        if not all(self._has_shape(node, shape) for node in self.members if not is_transpose(node)):
            return None
        kinds = map(frozenset, (self.members, self.slices, self.products, self.sums))
        return SlicedHead(self.head, self.rows, where, shape, *kinds)

    def _follow(self, sources: Sequence[fx.Node]) -> bool:
        """Collect what is made of `sources` row by row; return False where something else reads them."""
        stack = list(sources)
        self.members.update(sources)
        while stack:
            node = stack.pop()
            for user in node.users:
                if user in self.members:
                    continue
                if self._is_slice(node, user):
                    self.slices.add(user)
                elif self._is_sum(node, user):
                    self.sums.add(user)
                elif self._is_product(node, user):
                    self.products.add(user)
                elif self._is_rowwise(node, user):
                    self.members.add(user)
                    stack.append(user)
                else:
                    return False
        return True

    def _is_zero_elsewhere(self, scattered: set[fx.Node]) -> bool:
        """Tell whether the gradients of the rows that no slice reads are zeros, and all that reads rows is linear."""
        gradients = self.members & self.tangent
        readers = self.products | self.sums
        return (
            all(node in scattered or is_linear(node, gradients) for node in gradients)
            and all(gradients.intersection(node.all_input_nodes) for node in readers)
            and not any(node.args[1] in self.members for node in self.products)
            and all(
                arg in gradients
                for node in gradients - scattered
                for arg in operands_with_rows(node, self.rows)
                if arg in self.tangent
            )
        )

    def _has_shape(self, node: fx.Node, shape: Sequence[Any]) -> bool:
        """Tell whether a value has its rows in one dimension, or in those of the slices."""
        lead = lead_of(node, self.rows)
        return lead == 1 or (lead == len(shape) and all(map(same_size, shape_of(node) or (), shape)))

    def _is_gradient(self, node: fx.Node, where: Where, logits: tuple[Any, ...]) -> bool:
        if node.target is not aten.slice_scatter.default or node not in self.tangent:
            return False
        return is_zero(node.args[0]) and _same(node, logits) and _where(node, first=2) == where

    def _is_slice(self, node: fx.Node, user: fx.Node) -> bool:
        if user.target is not aten.slice.Tensor or is_transpose(node):
            return False
        where = _where(user)
        return where is not None and where.dim < (lead_of(node, self.rows) or 0)

    def _is_sum(self, node: fx.Node, user: fx.Node) -> bool:
        if is_sum_of_products(user):
            left, right = matrix_of(cast(fx.Node, user.args[0])), user.args[1]
            return lead_of(left, self.rows) == lead_of(right, self.rows) == 1
        lead = lead_of(node, self.rows)
        return user.target in SUMS and lead is not None and sums_rows(user, lead)

    def _is_product(self, node: fx.Node, user: fx.Node) -> bool:
        if user.target is not aten.mm.default or user.args[0] is not node:
            return False
        return lead_of(node, self.rows) == 1

    def _is_rowwise(self, node: fx.Node, user: fx.Node) -> bool:
        if is_transpose(user):
            return all(is_sum_of_products(reader) and reader.args[0] is user for reader in user.users)
        lead = lead_of(user, self.rows)
        if lead is None or is_transpose(node):
            return False
        if user.target in SAME_ORDER:
            return True
        if not is_pointwise(user) and user.target not in CASTS:
            return False
        rows = operands_with_rows(user, self.rows)
        return all(arg in rows or broadcasts(arg, user, lead) for arg in tensor_operands(user))


def _same(node: Any, shape: Sequence[Any]) -> bool:
    given = shape_of(node) or ()
    return len(given) == len(shape) and all(map(same_size, given, shape))


def _where(node: fx.Node, first: int = 1) -> Where | None:
    """Return which rows a slice takes, or, from argument 2 on, a scatter fills; None for steps and sizes of data."""
    given: tuple[Any, ...] = node.args[first:]
    dim, start, end, step = given + (0, None, None, 1)[len(given) :]
    start, end = 0 if start is None else start, sys.maxsize if end is None else end
    if step != 1 or not isinstance(start, int) or not isinstance(end, int):
        return None
    return Where(dim % len(shape_of(node) or ()), start, end)
