"""Which operations on tangents tolerate a bounded error of the residual that they read.

The backward pass is linear in its tangents. An operation is *tolerant* of a residual r if an error of r, a small
share of the largest value of its row, is a small share of its result's: products elementwise and of matrices,
convolutions, sums, branches of ``where``. Division, comparison, inversion, powers, indexing and the bodies of
higher-order operations are not. Nor is a product whose tangent has been, or will be, multiplied elementwise with
something *wild*: ``t * r * exp(b)`` is large where r is small. Sums over a row and matrix products end that.

Programs that train in 8 bits round gradients in steps of a scale, a function of their largest magnitude, and divide by
it again: what error a gradient has, it has afterwards, and that of the rounding.
"""

from __future__ import annotations

import operator
from collections.abc import Container, Set
from typing import Any

from torch import Tensor, fx

from ..graph.edit import output_of
from ..graph.names import outputs_with_descriptors
from ..graph.operations import (
    ADDITIONS,
    ATTENTION_BACKWARD,
    CASTS,
    EXCHANGES,
    FILLS,
    FLEX_BACKWARD,
    FORMS,
    GATHERS,
    GEMMS,
    GROUPED,
    IS_AMPLIFIED,
    IS_FROM_DATA,
    IS_MASKED,
    IS_TAME,
    MULTIPLICATIONS,
    SUMS,
    VIEWS,
    aten,
    content_of,
    is_again,
    is_random,
    packet,
    prims,
    sums_over_ranks,
    tensor_operands,
)
from ..maths import ops
from .functions import is_float
from .ranges import Ranges, is_opaque

_ELEMENTWISE_PRODUCTS = MULTIPLICATIONS | {prims.fma.default}
_MATRIX_PRODUCTS = GEMMS | GROUPED | ATTENTION_BACKWARD | {
    aten.addmm.default,
    aten.baddbmm.default,
    aten.convolution_backward.default,
    aten._scaled_mm.default,
    ops.combine_rows,
}  # fmt: skip
_OF_FLEX = 5
"""Operands that are query, key, value, output and log-sum-exp."""
_SUMS_AND_MEANS = SUMS | {aten.mean.dim}
_STRUCTURE = FORMS | GATHERS | EXCHANGES | ADDITIONS | {
    aten.neg.default,
    aten.where.self,
    aten.copy.default,
    aten.new_empty_strided.default,
    aten.cat.default,
    aten.constant_pad_nd.default,
    aten.slice_scatter.default,
    aten.select_scatter.default,
    aten.div.Scalar,
    aten.flip.default,
    prims.rev.default,
    ops.gather_rows,
    ops.append_row,
}  # fmt: skip
"""Operations through which an error passes as it is."""
_BOUNDED = {aten.abs.default, aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default}
"""Operations whose result changes no more than their operand."""
_INTO_VECTORS = {
    ops.row_norms,
    ops.in_groups,
    ops.choose_rows,
    ops.sort_rows,
    ops.record_norms,
    ops.require_zero,
}
"""Operations whose results only choose rows."""

_KNOWN: set[Any] = (
    _ELEMENTWISE_PRODUCTS | _STRUCTURE | _SUMS_AND_MEANS | _MATRIX_PRODUCTS | _INTO_VECTORS | {*FILLS}
)
_KNOWN |= _BOUNDED | {operator.getitem, aten.div.Tensor}


class Readers:
    """The residuals of a joint graph, what reads each, and whether it tolerates an error.

    Attributes:
        of: residuals with the operations on tangents that read them, and those that checkpoints compute again.
    """

    def __init__(
        self, graph: fx.Graph, tangent: Set[fx.Node], ranges: Ranges, statics: Container[fx.Node]
    ) -> None:
        self._tangent, self._ranges, self._statics = tangent, ranges, statics
        self._delicate = self._around_inverses(graph)
        self._scales = ranges.scales
        self.of: dict[fx.Node, list[fx.Node]] = {}
        incoming = [node for node in graph.find_nodes(op="placeholder") if node in tangent]
        self._amplified = {node for node in incoming if node.meta.get(IS_AMPLIFIED)}
        self._masked = {node for node in incoming if node.meta.get(IS_MASKED)}
        self._solved: set[fx.Node] = set()
        self._data = _from_data(graph)
        nodes = [node for node in graph.nodes if node in tangent and node.op == "call_function"]
        for node in (*nodes, *filter(is_again, graph.nodes)):
            for operand in tensor_operands(node):
                if operand not in tangent and not is_again(operand):
                    self.of.setdefault(operand, []).append(node)
        for node in nodes:
            if self._carries(node, self._amplified) or self._amplifies(node):
                self._amplified.add(node)
            if self._carries(node, self._masked) or self._masks(node):
                self._masked.add(node)
            if any(arg in self._delicate or self._is_solved(arg) for arg in node.all_input_nodes):
                self._solved.add(node)
        self._to_be_amplified: set[fx.Node] = set()
        self._to_be_masked: set[fx.Node] = set()
        self._to_be_solved: set[fx.Node] = set()
        amplified, masked = (_outputs_marked(graph, key) for key in (IS_AMPLIFIED, IS_MASKED))
        for node in reversed(nodes):
            users = [user for user in node.users if user in tangent and user.target not in _MATRIX_PRODUCTS]
            if node in amplified or any(
                user in self._to_be_amplified or self._amplifies(user) for user in users
            ):
                self._to_be_amplified.add(node)
            if node in masked or any(user in self._to_be_masked or self._masks(user) for user in users):
                self._to_be_masked.add(node)
            if any(self._solves(user) for user in node.users if user in tangent):
                self._to_be_solved.add(node)

    @property
    def is_quiet(self) -> bool:
        """Tell whether nothing in the graph makes a small share of a gradient a large one, or takes it out again."""
        return not (self._amplified or self._solved or self._delicate)

    def is_amplified(self, gradient: fx.Node) -> bool:
        """Tell whether a gradient has been multiplied with values of any size, or is one of an inverse."""
        return gradient in self._amplified or gradient in self._solved

    def is_amplified_later(self, gradient: fx.Node) -> bool:
        """Tell whether it will be."""
        return gradient in self._to_be_amplified or gradient in self._to_be_solved

    def is_masked(self, gradient: fx.Node) -> bool:
        """Tell whether a gradient is zero but for few elements that the data choose."""
        return gradient in self._masked

    def is_masked_later(self, gradient: fx.Node) -> bool:
        """Tell whether it will be."""
        return gradient in self._to_be_masked

    def is_from_data(self, node: fx.Node) -> bool:
        """Tell whether a value depends on floating-point values."""
        return node in self._data

    def refusal(self, residual: fx.Node) -> str:
        """Return why a residual must be stored exactly; an empty string where every reader is tolerant."""
        return next(filter(None, (self.reason(residual, reader) for reader in self.of.get(residual, ()))), "")

    def are_dense(self, residual: fx.Node) -> bool:
        """Tell whether no reader's gradient is zero but for few elements that the data choose."""
        readers = self.of.get(residual, ())
        gradients = {arg for reader in readers for arg in reader.all_input_nodes if arg in self._tangent}
        return not any(arg in self._masked for arg in gradients) and not any(
            reader in self._to_be_masked for reader in readers
        )

    def reason(self, residual: fx.Node, reader: fx.Node) -> str:
        """Return why one reader of a residual does not tolerate an error; an empty string where it does."""
        name = packet(reader.target)
        if is_again(reader):
            return ""  # all that a checkpointed region reads is made of the same values
        if residual in self._delicate:
            return "made of an inverse or a factorisation, whose gradient cancels to the last bit or does not"
        if reader in self._to_be_solved and is_float(residual):
            return f"its product {name} goes into the gradient of an inverse or a factorisation"
        if any(map(self._is_solved, reader.all_input_nodes)) and is_float(residual):
            return f"its product {name} is one with the gradient of an inverse or a factorisation"
        if reader.target is FLEX_BACKWARD and residual not in reader.args[:_OF_FLEX]:
            return f"read by a function of scores in {name}"
        if reader.target in _INTO_VECTORS or reader.target in _MATRIX_PRODUCTS:
            return ""
        if reader.target in _ELEMENTWISE_PRODUCTS or (
            reader.target in _STRUCTURE and not _is_index(residual, reader)
        ):
            before = any(arg in self._amplified for arg in reader.all_input_nodes if arg in self._tangent)
            if before or reader in self._to_be_amplified:
                return f"its product {name} is multiplied with values of any size"
            return ""
        return f"read by {name}, which does not tolerate an error"

    def _around_inverses(self, graph: fx.Graph) -> set[fx.Node]:
        """Return what is computed from results of operations that nobody here knows, up to the next parameter."""
        found: set[fx.Node] = set()
        for node in graph.nodes:
            if node in self._tangent or node.op != "call_function" or self._meets_parameter(node):
                continue
            if is_opaque(node) or any(arg in found for arg in node.all_input_nodes):
                found.add(node)
        return {node for node in found if is_float(node)}

    def _meets_parameter(self, node: fx.Node) -> bool:
        """Tell whether a product of matrices has a parameter for an operand."""
        operands = (content_of(arg) for arg in node.all_input_nodes)
        return node.target in _MATRIX_PRODUCTS and any(operand in self._statics for operand in operands)

    def _solves(self, node: fx.Node) -> bool:
        """Tell whether gradients go through an inverse here, or later but before they meet a parameter."""
        if self._is_unknown(node) or any(arg in self._delicate for arg in node.all_input_nodes):
            return True
        return node in self._to_be_solved and not self._meets_parameter(node)

    def _is_solved(self, tangent: fx.Node) -> bool:
        """Tell whether a gradient comes out of an inverse and has met no parameter since."""
        return tangent in self._solved and not self._meets_parameter(tangent)

    def _carries(self, node: fx.Node, marked: Set[fx.Node]) -> bool:
        """Tell whether a result is as marked as what it is computed from."""
        if node.target in _MATRIX_PRODUCTS:
            return False
        if node.target in _SUMS_AND_MEANS and _sums_over_rows(node):
            return False
        if node.target is operator.getitem and node.all_input_nodes[0].target in _MATRIX_PRODUCTS:
            return False
        return any(arg in marked for arg in node.all_input_nodes)

    def _amplifies(self, node: fx.Node) -> bool:
        """Tell whether an operation multiplies gradients with something wild, or does what nobody knows."""
        primals = [arg for arg in node.args if isinstance(arg, fx.Node) and arg not in self._tangent]
        if node in self._scales:
            return False  # what it multiplies is asked for instead
        if node.target in _ELEMENTWISE_PRODUCTS | {aten.div.Tensor} and self._scales.multiply(node):
            return not self._scales.leave(node)
        if node.target in _ELEMENTWISE_PRODUCTS:
            return any(self._ranges.amplifies(arg) for arg in primals)
        if node.target is aten.div.Tensor:
            return any(self._ranges.amplifies_by_division(arg) for arg in primals)
        return self._is_unknown(node)

    def _is_unknown(self, node: fx.Node) -> bool:
        known = node.target in _KNOWN or packet(node.target) in _SPREADING | _SHIFTING or node in self._scales
        return not known and not sums_over_ranks(node) and not node.meta.get(IS_TAME, False)

    def _masks(self, node: fx.Node) -> bool:
        """Tell whether an operation sets gradients to zero where the data say so."""
        if packet(node.target) in _SPREADING:
            return True
        if node.target is aten.where.self:
            branches = all(arg in self._tangent for arg in node.args[1:])
            return node.args[0] in self._data and not branches
        booleans = [arg for arg in node.args if isinstance(arg, fx.Node) and _is_from_boolean(arg)]
        return node.target in _ELEMENTWISE_PRODUCTS and any(arg in self._data for arg in booleans)


_SHIFTING = {aten.cumsum, aten.flip, aten.roll}
"""Operations that keep dense gradients dense."""
_SPREADING = {
    aten.index_put,
    aten._unsafe_index_put,
    aten._unsafe_masked_index_put_accumulate,
    aten.scatter,
    aten.scatter_add,
    aten.index_add,
    aten.embedding_dense_backward,
    aten.select_backward,
    aten.slice_backward,
    aten.avg_pool2d_backward,
    aten.max_pool2d_with_indices_backward,
    aten._adaptive_avg_pool2d_backward,
    aten.upsample_nearest2d_backward,
    aten.upsample_bilinear2d_backward,
}
"""Operations that put gradients elsewhere, at their own size."""


def _outputs_marked(graph: fx.Graph, key: str) -> set[Any]:
    """Return the outputs at the positions that the `meta` of the output node holds."""
    values = [value for value, _ in outputs_with_descriptors(graph)]
    return {values[position] for position in output_of(graph).meta.get(key, ())}


def _from_data(graph: fx.Graph) -> set[fx.Node]:
    """Return what depends on floating-point values: not what random numbers, integers and masks determine."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder":
            if isinstance(value, Tensor) and (value.is_floating_point() or node.meta.get(IS_FROM_DATA)):
                found.add(node)
        elif not is_random(node) and any(arg in found for arg in node.all_input_nodes):
            found.add(node)
    return found


def _is_from_boolean(node: fx.Node) -> bool:
    while node.target in CASTS | VIEWS and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype.is_floating_point is False


def _is_index(residual: fx.Node, reader: fx.Node) -> bool:
    """Tell whether a residual says where to read, not what."""
    return reader.target in GATHERS and reader.args[0] is not residual


def _sums_over_rows(node: fx.Node) -> bool:
    """Tell whether a sum takes in the last dimension, so that it is one number in each row."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    dims: Any = node.args[1] if len(node.args) > 1 else ()
    rank = source.meta["val"].dim()
    return not dims or any(dim % rank == rank - 1 for dim in dims)
