"""Find a loss over rows far wider than the model: a language model's head and its cross entropy.

The head makes logits ``[rows, words]`` of a hidden state ``[rows, features]``. As long as what follows treats each row
by itself and ends in a number a row, or in sums over the rows, all of it can be computed for a few rows at a
time. The gradients of such a loss are linear in the one number that comes in for it, so they are computed there
and then, for 1, and multiplied in the backward pass. (Chunks of rows with gradients made in the forward pass: Hsu et
al. 2024, "Liger Kernel", arXiv 2410.10989; blocks of logits that are never stored: Wijmans et al. 2024, "Cut Your
Losses", arXiv 2411.09009.)
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, fx

from ..graph.cones import depends_on, is_tangent, tangent_cone
from ..graph.names import written_inputs
from ..graph.operations import (
    ADDITIONS,
    CASTS,
    COPIES,
    DIVISIONS,
    FORMS,
    MULTIPLICATIONS,
    SUMS,
    TRANSPOSES,
    VIEWS,
    aten,
    content_of,
    is_pointwise,
    is_zero,
    tensor_operands,
)
from ..graph.torch_api import hint, statically_known_true

Kind: TypeAlias = Literal["rows", "sum", "product"]
"""What becomes of the chunks of a result: they are put together, summed, or summed as products of two factors."""

_AMPLIFICATION = 5
"""A head's rows are at least so many times as long as those that it reads."""

SAME_ORDER = (VIEWS | COPIES) - TRANSPOSES
"""Operations whose result has the elements of their operand in the same order."""
REDUCTIONS = {
    aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default,
    aten.any.dim, aten.any.dims, aten.logsumexp.default, aten.prod.dim_int, aten.argmax.default,
}  # fmt: skip
"""Reductions over the dimensions that their second argument names."""
MEANS = {aten.mean.default, aten.mean.dim}
"""Sums that are divided by the number of what is summed."""
INDEXED = {aten.gather.default, aten.scatter.value, aten.scatter.src, aten.scatter_add.default}
"""Operations along the one dimension that their second argument names."""
HEADS = {aten.mm.default: 0, aten.addmm.default: 1}
"""Products, with the position of the left operand."""


class CannotChunk(Exception):
    """Why the rows of a loss cannot be computed a few at a time."""


@dataclasses.dataclass(frozen=True)
class Result:
    """A value that leaves the chunks.

    Attributes:
        node: the value.
        kind: how it is put together.
        scaled: it is a gradient: linear in the tangent of the loss.
        factors: of a product: dY and X, or what takes their places, each with N rows.
        transposed: it is ``X^T dY``, not ``dY^T X``.
    """

    node: fx.Node
    kind: Kind
    scaled: bool
    factors: tuple[fx.Node, ...] = ()
    transposed: bool = False


@dataclasses.dataclass(frozen=True)
class WideLoss:
    """A head, its loss and the gradients of both.

    Attributes:
        head: the product that makes the logits.
        rows: their number N.
        words: the length of a row.
        features: the length of a row that the head reads.
        body: what is computed chunk by chunk, in the order of the graph.
        rowwise: inputs with N rows.
        shared: inputs that all rows read.
        results: what is read outside.
        tangent: the gradient of the loss, one number.
        prefix: what is made of the tangent before it meets a row, in the order of the graph.
    """

    head: fx.Node
    rows: Any
    words: int
    features: int
    body: tuple[fx.Node, ...]
    rowwise: tuple[fx.Node, ...]
    shared: tuple[fx.Node, ...]
    results: tuple[Result, ...]
    tangent: fx.Node
    prefix: tuple[fx.Node, ...]


def find_wide_losses(graph: fx.Graph, smallest: int) -> tuple[list[WideLoss], dict[fx.Node, str]]:
    """Return the losses that can be computed in chunks, and the heads of those that cannot, with the reason.

    Args:
        smallest: logits that take no more bytes than this, in float32, are left as they are.
    """
    found: list[WideLoss] = []
    refused: dict[fx.Node, str] = {}
    tangent = tangent_cone(graph)
    for node in graph.nodes:
        if node in tangent or not is_head(node, smallest) or any(node in loss.body for loss in found):
            continue
        try:
            found.append(_Search(graph, node, tangent).result())
        except CannotChunk as reason:
            refused[node] = str(reason)
    return found, refused


def is_head(node: fx.Node, smallest: int) -> bool:
    """Tell whether a product makes rows far wider than those it reads, of more bytes than `smallest` in float32."""
    if node.target not in HEADS:
        return False
    rows, words = node.meta["val"].shape
    left = node.args[HEADS[node.target]]
    features = left.meta["val"].shape[1]  # type: ignore[union-attr]
    if not all(isinstance(size, int) for size in (words, features)):
        return False
    return bool(words >= _AMPLIFICATION * features and 4 * hint(rows) * words > smallest)


def shape_of(node: fx.Node) -> tuple[Any, ...] | None:
    """Return the shape of a tensor."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else None


def leading(shape: Sequence[Any], rows: Any) -> int | None:
    """Return how many leading dimensions hold the rows, one after the other; None where others do, or none."""
    for count in range(1, len(shape) + 1):
        if same_size(math.prod(shape[:count]), rows):
            return count
    return None


def lead_of(node: Any, rows: Any) -> int | None:
    """Return how many leading dimensions of a value hold `rows` rows; None where others do, or none."""
    shape = shape_of(node)
    return None if shape is None else leading(shape, rows)


def has_rows(arg: fx.Node, node: fx.Node, lead: int) -> bool:
    """Tell whether an operand has the rows of the result, its first `lead` dimensions; others may be broadcast."""
    given, result = shape_of(arg) or (), shape_of(node) or ()
    return len(given) == len(result) and all(map(same_size, given[:lead], result[:lead]))


def broadcasts(arg: fx.Node, node: fx.Node, lead: int) -> bool:
    """Tell whether an operand that is broadcast is the same for all rows of the result, its first `lead` dimensions."""
    given, result = shape_of(arg) or (), shape_of(node) or ()
    front = given[: max(lead - (len(result) - len(given)), 0)]
    return all(isinstance(size, int) and size == 1 for size in front)


def sums_rows(node: fx.Node, lead: int) -> bool:
    """Tell whether a sum or mean is one over the first `lead` dimensions of its operand, at least."""
    rank = len(shape_of(node.args[0]) or ())  # type: ignore[arg-type]
    dims = {dim % rank for dim in (node.args[1:2] or [None])[0] or range(rank)}  # type: ignore
    return dims >= set(range(lead))


def is_transpose(node: fx.Node) -> bool:
    """Tell whether a node exchanges the two dimensions of a matrix."""
    if node.target not in TRANSPOSES or len(shape_of(node) or ()) != 2:
        return False
    return node.target is not aten.permute.default or [d % 2 for d in node.args[1]] == [1, 0]  # type: ignore


def is_sum_of_products(node: fx.Node) -> bool:
    """Tell whether a product multiplies the transpose of a matrix with another: a sum over their rows."""
    return node.target is aten.mm.default and is_transpose(node.args[0])  # type: ignore[arg-type]


def matrix_of(node: fx.Node) -> fx.Node:
    """Return what a node is the transpose of, or itself."""
    return node.args[0] if is_transpose(node) else node  # type: ignore[return-value]


def _tensors(node: fx.Node) -> list[fx.Node]:
    return [arg for arg in node.all_input_nodes if shape_of(arg) is not None]


class _Search:
    """What belongs to one head."""

    def __init__(self, graph: fx.Graph, head: fx.Node, tangent: set[fx.Node]) -> None:
        self.graph, self.head, self.tangent = graph, head, tangent
        self.rows, self.words = head.meta["val"].shape
        if same_size(self.rows, self.words):
            raise CannotChunk("it has as many rows as words: which dimension holds the rows is not known")
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.wide = {node for node in graph.nodes if self._is_wide(node)}
        self.before_wide = self._before_wide()
        self.kinds: dict[fx.Node, Kind] = {}
        self.members = self._members()

    def result(self) -> WideLoss:
        """Return what was found.

        Raises:
            CannotChunk: rows depend on each other, or the gradients are not linear in the tangent.
        """
        for node in self.members:
            if not self._is_rowwise(node) or any(arg in self.members for arg in self._shared(node)):
                raise CannotChunk(f"{node.target} does not treat each row by itself ({node})")
        written = written_inputs(self.graph)
        rowwise = self._inputs(self._operands)
        shared = self._inputs(self._shared)
        after = depends_on(self.graph, set(self.members))
        for arg in (*rowwise, *shared):
            if arg in after:
                raise CannotChunk(f"{arg} is made of all rows at once, and read by each")
            if content_of(arg, VIEWS) in written:
                raise CannotChunk(f"{arg} is written to in the same graph")
        if both := set(rowwise) & set(shared):
            raise CannotChunk(f"{both.pop()} is read row by row and as a whole")
        results = tuple(
            self._result(node)
            for node in self.members
            if any(user not in self.members for user in node.users) and not is_transpose(node)
        )
        tangent, prefix = self._linear((*rowwise, *shared), results)
        body = tuple(self.members)
        left: Any = self.head.args[HEADS[self.head.target]]  # type: ignore[index]
        features = left.meta["val"].shape[1]
        return WideLoss(
            self.head, self.rows, self.words, features, body, rowwise, shared, results, tangent, prefix
        )

    def _result(self, node: fx.Node) -> Result:
        kind = self.kinds.get(node, "rows")
        if kind != "product":
            return Result(node, kind, node in self.tangent)
        factors = self._operands(node)
        transposed = factors[1] in self.tangent
        return Result(
            node, kind, node in self.tangent, tuple(factors[:: -1 if transposed else 1]), transposed
        )

    def _inputs(self, operands: Callable[[fx.Node], list[fx.Node]]) -> tuple[fx.Node, ...]:
        found = dict.fromkeys(arg for node in self.members for arg in operands(node))
        return tuple(arg for arg in found if arg not in self.members)

    def lead(self, node: fx.Node) -> int | None:
        return lead_of(node, self.rows)

    def _is_wide(self, node: fx.Node) -> bool:
        shape = shape_of(node)
        if node.op != "call_function" or shape is None or is_transpose(node):
            return False
        lead = leading(shape, self.rows)
        trailing = shape[lead:] if lead else ()
        return all(isinstance(size, int) for size in trailing) and math.prod(trailing) * 2 >= self.words

    def _before_wide(self) -> set[fx.Node]:
        before: set[fx.Node] = set()
        for node in reversed(self.graph.nodes):
            if any(user in self.wide or user in before for user in node.users):
                before.add(node)
        return before

    def _members(self) -> list[fx.Node]:
        """Return the head, all wide values that are made of it or read beside such, and what reads those first."""
        stack, members = [self.head], {self.head}

        def add(node: fx.Node) -> None:
            if node not in members:
                members.add(node)
                stack.append(node)

        while stack:
            node = stack.pop()
            if self.kinds.get(node) in ("sum", "product"):
                continue
            for arg in self._operands(node):
                if arg in self.wide:
                    add(arg)
            if node in self.wide or node in self.before_wide or is_transpose(node):
                for user in node.users:
                    if user.op == "output":
                        if node in self.wide:
                            raise CannotChunk(
                                f"the program returns the logits, or something of their size ({node})"
                            )
                        continue
                    kind = self._kind(node, user)
                    if kind is not None:
                        self.kinds[user] = kind
                        add(user)
                    elif node in self.wide or user in self.wide or user in self.before_wide:
                        add(user)
        return sorted(members, key=self.order.__getitem__)

    def _operands(self, node: fx.Node) -> list[fx.Node]:
        """Return the tensors that a member reads row by row."""
        tensors = _tensors(node)
        if self.kinds.get(node) == "product":
            return [matrix_of(tensors[0]), tensors[1]]
        if node.target in HEADS:
            return [tensors[HEADS[node.target]]]
        if is_pointwise(node) or node.target is aten.expand.default:
            return [arg for arg in tensors if self._has_rows(arg, node)]
        return tensors

    def _shared(self, node: fx.Node) -> list[fx.Node]:
        """Return the tensors that a member reads as a whole."""
        operands = self._operands(node)
        return [] if node in self.kinds else [arg for arg in _tensors(node) if arg not in operands]

    def _has_rows(self, arg: fx.Node, node: fx.Node) -> bool:
        """Tell whether an operand that is broadcast has the rows of the result."""
        return has_rows(arg, node, self.lead(node) or 0)

    def _kind(self, node: fx.Node, user: fx.Node) -> Kind | None:
        """Return how a reader of a row-wise value sums over the rows; None where it does not."""
        if is_sum_of_products(user):
            left, right = user.args[0].args[0], user.args[1]  # type: ignore[union-attr]
            if node in (user.args[0], right) and self._is_matrix_of_rows(left, right):
                return "product"
        lead = self.lead(node)
        if lead is None or user.target not in SUMS | MEANS:
            return None
        return "sum" if sums_rows(user, lead) else None

    def _is_matrix_of_rows(self, *nodes: Any) -> bool:
        return all(isinstance(node, fx.Node) and self.lead(node) == 1 for node in nodes)

    def _is_rowwise(self, node: fx.Node) -> bool:
        """Tell whether a member treats each row by itself, or sums over them."""
        if node in self.kinds:
            return True
        if is_transpose(node):
            return all(self.kinds.get(user) == "product" for user in node.users)
        lead = self.lead(node)
        if lead is None:
            return False
        first = node.args[0] if node.args else None
        if node.target in HEADS:
            bias = self._shared(node)[:-1]
            return all(broadcasts(arg, node, lead) for arg in bias)
        if node.target is aten.full.default:
            return True
        if len(_tensors(node)) < len(node.all_input_nodes) and node.target not in SAME_ORDER | {
            aten.expand.default
        }:
            return False  # reads a symbolic number, or several results
        if is_pointwise(node) or node.target in CASTS | {aten.expand.default}:
            return all(broadcasts(arg, node, lead) for arg in self._shared(node))
        if not isinstance(first, fx.Node) or self.lead(first) is None:
            return False
        outer = self.lead(first)
        assert outer is not None
        rank = len(shape_of(first) or ())
        if node.target in SAME_ORDER:
            return True
        if node.target in REDUCTIONS:
            dims = node.args[1] if len(node.args) > 1 else []
            dims = dims if isinstance(dims, list | tuple) else [dims]
            return bool(dims) and all(isinstance(dim, int) and dim % rank >= outer for dim in dims)
        if node.target in INDEXED:
            return node.args[1] % rank >= outer and all(self.lead(arg) == outer for arg in _tensors(node))  # type: ignore
        return False

    def _linear(
        self, inputs: Sequence[fx.Node], results: Sequence[Result]
    ) -> tuple[fx.Node, tuple[fx.Node, ...]]:
        """Return the tangent of the loss, and what is made of it before the rows; refuse what is not linear in it."""
        members = set(self.members)
        prefix: set[fx.Node] = set()
        stack = [arg for arg in inputs if arg in self.tangent]
        while stack:
            node = stack.pop()
            if node not in prefix:
                prefix.add(node)
                stack += [arg for arg in tensor_operands(node) if arg in self.tangent]
        tangents = [node for node in prefix if is_tangent(node)]
        if not any(result.scaled for result in results):
            raise CannotChunk("no gradient comes from it")
        if len(tangents) != 1 or shape_of(tangents[0]) != ():
            raise CannotChunk(
                "more than one number comes in for its gradient: a loss that is one number is needed"
            )
        dependent = (prefix | members) & self.tangent
        for node in dependent - set(tangents):
            if not is_linear(node, dependent):
                raise CannotChunk(f"{node.target} is not linear in the gradient of the loss ({node})")
            if node in members and node.meta["val"].dtype == torch.float16:
                raise CannotChunk(
                    "its gradients in float16 need the loss scale, which is known only in the backward pass"
                )
        ordered = sorted(prefix - set(tangents), key=self.order.__getitem__)
        return tangents[0], tuple(ordered)


def same_size(left: Any, right: Any) -> bool:
    """Tell whether two sizes are known to be equal, whatever the batch."""
    return left is right or bool(statically_known_true(left == right))


def is_linear(node: fx.Node, dependent: set[fx.Node]) -> bool:
    """Tell whether a node is linear (not affine) in its operands in `dependent`, together."""
    tensors = [arg for arg in itertools.chain(node.args, node.kwargs.values()) if isinstance(arg, fx.Node)]
    inside = [arg in dependent for arg in tensors]
    if node.target in FORMS | TRANSPOSES | {aten.neg.default, aten.expand.default, aten.sum.dim_IntList,
                                            aten.sum.default, aten.mean.dim, aten.mean.default}:  # fmt: skip
        return True
    if node.target in MULTIPLICATIONS | {aten.mm.default}:
        return sum(inside) == 1
    if node.target in DIVISIONS | {aten.gather.default}:
        return inside[0] and sum(inside) == 1
    if node.target in ADDITIONS:
        return all(arg in dependent or is_zero(arg) for arg in node.args[:2])
    if node.target is aten.where.self:
        return not inside[0] and all(arg in dependent or is_zero(arg) for arg in node.args[1:])
    if node.target is aten.scatter.value:
        return inside[0] and is_zero(node.args[3])
    if node.target in {aten.scatter.src, aten.scatter_add.default}:
        operands = (node.args[0], node.args[3])
        return node.args[2] not in dependent and all(arg in dependent or is_zero(arg) for arg in operands)
    return False
