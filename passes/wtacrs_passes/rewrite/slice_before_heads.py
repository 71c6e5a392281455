"""Take slices of rows before a head instead of after it.

Before, of a language model that predicts the next token, with the labels shifted::

    logits = view(mm(view(h, [B * T, features]), W^T), [B, T, words])
    losses = f(slice(logits, 1, 0, -1))                                             # forward pass
    dlogits = slice_scatter(zeros([B, T, words]), g, 1, 0, -1)                      # backward pass
    dh = mm(view(dlogits, [B * T, words]), W); dW = mm(view(dlogits)^T, view(h))

After, with the same values but for the order of sums, and no logits of rows that nothing reads::

    x = view(slice(h, 1, 0, -1), [B * (T - 1), features])
    losses = f(view(mm(x, W^T), [B, T - 1, words]))
    dh = view(slice_scatter(zeros([B, T, features]), mm(g, W), 1, 0, -1)); dW = mm(g^T, x)

Then logits, labels and losses have the same rows, as `chunk_losses` needs them.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

from torch import fx

from ..analyse.losses import HEADS, is_sum_of_products, is_transpose, matrix_of, same_size, shape_of
from ..analyse.slices import SlicedHead, find_sliced_heads, operands_with_rows
from ..graph.edit import Editor
from ..graph.operations import RESHAPES, aten, content_of
from ..joint import Joint
from .chunk_losses import logits_to_chunk


def slice_before_heads(joint: Joint) -> None:
    """Move the slices of logits that are large enough for `chunk_losses`."""
    smallest = logits_to_chunk(joint)
    heads = [] if smallest is None else find_sliced_heads(joint.graph, smallest)
    if not heads:
        return
    editor = Editor(joint.graph)
    for head in heads:
        _Rewrite(editor, head).run()
    joint.graph.eliminate_dead_code()


class _Rewrite:
    """Make the members of one head again, with the rows that are read."""

    def __init__(self, editor: Editor, head: SlicedHead) -> None:
        self.editor, self.head = editor, head
        self.places = {node: place for place, node in enumerate(editor.graph.nodes)}
        self.new: dict[fx.Node, fx.Node] = {}
        self.sizes, self.first = self._sizes()

    def _sizes(self) -> tuple[list[Any], fx.Node]:
        """Return the sizes of the dimensions that hold the rows, numbers or nodes, and what may read them first."""
        head, left = self.head.head, self._operand()
        if all(isinstance(size, int) for size in self.head.shape):
            return list(self.head.shape), head
        with self.editor.before(head):
            if len(self.head.shape) == 1:
                return [self.editor.size(left, 0)], head
        views = (n for n in self.head.members if n.target in RESHAPES and self.head.lead(n) != 1)
        first = min(views, key=self.places.__getitem__)
        known = zip(self.head.shape, cast(list[Any], first.args[1]), strict=False)
        return [size if isinstance(size, int) else given for size, given in known], first

    def _operand(self) -> fx.Node:
        return cast(fx.Node, self.head.head.args[HEADS[cast(Any, self.head.head.target)]])

    def run(self) -> None:
        """Make everything again, in the order of the graph."""
        head = self.head
        everything = head.members | head.slices | head.products | head.sums
        for node in sorted(everything, key=self.places.__getitem__):
            with self.editor.before(max(node, self.first, key=self.places.__getitem__)):
                self._replace(node)
        self._read_sizes()

    def _read_sizes(self) -> None:
        """Read sizes that the slices made from what is sliced now: logits that come in chunks have none."""
        rows = self.new[self._operand()]
        known = [
            (source, dim) for source in (rows, content_of(rows, RESHAPES)) for dim in range(len(self.sizes))
        ]
        for node in self.editor.graph.find_nodes(op="call_function", target=aten.sym_size.int):
            if self.places.get(node, -1) <= self.places[self.first]:
                continue
            for source, dim in known:
                if same_size(node.meta["val"], source.meta["val"].shape[dim]):
                    with self.editor.after(source):
                        node.replace_all_uses_with(self.editor.size(source, dim))
                    break

    def _replace(self, node: fx.Node) -> None:
        if node in self.head.slices:
            node.replace_all_uses_with(self.new[cast(fx.Node, node.args[0])])
        elif node.target is aten.slice_scatter.default:
            self.new[node] = cast(fx.Node, node.args[1])
        elif node in self.head.members:
            self.new[node] = self._again(node)
        elif node in self.head.sums:
            node.replace_all_uses_with(self._again(node))
        else:
            node.replace_all_uses_with(self._scattered(self._again(node), node))

    def _again(self, node: fx.Node) -> fx.Node:
        """Return what a node computes, of the rows that are read."""
        if node.target in RESHAPES:
            source = self.new[cast(fx.Node, node.args[0])]
            again = self.editor.call(aten.reshape.default, source, self._sizes_of(node))
        else:
            rows = {arg: self._of_rows(arg) for arg in self._operands(node)}
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda arg: rows.get(arg, arg))
            again = self.editor.call(cast(Any, node.target), *args, **kwargs)
        again.meta = {**node.meta, "val": again.meta["val"]}
        return again

    def _operands(self, node: fx.Node) -> list[fx.Node]:
        """Return the operands of which rows are read."""
        if node is self.head.head:
            return [self._operand()]
        if is_sum_of_products(node):
            return list(node.all_input_nodes)
        if node in self.head.products or node in self.head.sums or is_transpose(node):
            return [cast(fx.Node, node.args[0])]
        return operands_with_rows(node, self.head.rows)

    def _of_rows(self, node: fx.Node) -> fx.Node:
        """Return the rows of a value that are read; those of what is no member are taken from it."""
        if node not in self.new:
            if is_transpose(node):
                rows = self._of_rows(matrix_of(node))
                self.new[node] = self.editor.call(cast(Any, node.target), rows, *node.args[1:])
            else:
                self.new[node] = self._sliced(node)
        return self.new[node]

    def _sliced(self, node: fx.Node) -> fx.Node:
        call, where = self.editor.call, dataclasses.astuple(self.head.where)
        flat = self.head.lead(node) != len(self.sizes)
        rest = (shape_of(node) or ())[self.head.lead(node) :]
        whole = call(aten.reshape.default, node, [*self.sizes, *rest]) if flat else node
        rows = call(aten.clone.default, call(aten.slice.Tensor, whole, *where))
        return call(aten.reshape.default, rows, [-1, *rest]) if flat else rows

    def _sizes_of(self, node: fx.Node) -> list[Any]:
        """Return the sizes of a view of the rows that are read."""
        lead, shape = self.head.lead(node), shape_of(node) or ()
        assert lead is not None
        return [*(self._fewer() if lead == len(self.sizes) else [-1]), *shape[lead:]]

    def _fewer(self) -> list[Any]:
        return [-1 if dim == self.head.where.dim else size for dim, size in enumerate(self.sizes)]

    def _scattered(self, rows: fx.Node, node: fx.Node) -> fx.Node:
        """Return `rows` among rows of zeros, like `node`."""
        call, value, where = self.editor.call, node.meta["val"], dataclasses.astuple(self.head.where)
        like = {"dtype": value.dtype, "device": value.device, "pin_memory": False}
        zeros = call(aten.full.default, [*self.sizes, value.shape[1]], 0, **like)
        parts = call(aten.reshape.default, rows, [*self._fewer(), value.shape[1]])
        whole = call(aten.slice_scatter.default, zeros, parts, *where)
        return call(aten.reshape.default, whole, [-1, value.shape[1]]) if len(self.sizes) > 1 else whole
