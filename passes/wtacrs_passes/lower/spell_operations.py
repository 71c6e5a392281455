"""Write the abstract operations of the rewrites as a device does them best.

On CPU Inductor would give each norm and each gather of rows a loop and a C++ file of its own (1.2 s of compile
time each), and its ``cat`` is a kernel of scalar instructions. So they stay calls where what they read is in
memory anyway::

    norms = row_norms([x]);  rows = gather_rows(dy, indices)

Elsewhere they become operations that Inductor fuses with what computes their operand: on GPUs, and for rows of
an X that the backward pass computes again, so that only these rows are::

    norms = sqrt(sum(x * x));  rows = index(x, indices) * scales
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..graph.edit import Editor
from ..graph.operations import VIEWS, aten, content_of, is_derivable
from ..joint import Joint
from ..maths import ops


def spell_operations(joint: Joint) -> None:
    """Replace abstract operations by those of their device."""
    editor, tangent = Editor(joint.graph), joint.tangent()
    new: dict[fx.Node, fx.Node] = {}
    spellings: dict[Any, tuple[Callable[[fx.Node, set[fx.Node]], bool], Callable[..., fx.Node]]] = {
        ops.row_norms: (_on_cpu, _spell_row_norms),
        ops.gather_rows: (_reads_memory, _spell_gather_rows),
        ops.append_row: (_on_cpu, _spell_append_row),
    }
    for target, (stays, spell) in spellings.items():
        for node in joint.graph.find_nodes(op="call_function", target=target):
            if not stays(node, tangent):
                with editor.before(node):
                    new[node] = editor.put(node, spell(editor, *node.args))
    joint.replace(new)
    joint.graph.eliminate_dead_code()


def _on_cpu(node: fx.Node, tangent: set[fx.Node]) -> bool:
    return bool(node.meta["val"].device.type == "cpu")


def _reads_memory(node: fx.Node, tangent: set[fx.Node]) -> bool:
    """Tell whether rows are gathered on CPU from a tensor that is in memory anyway.

    A gradient is, for the other product that reads it; so is an X that no fused kernel computes.
    """
    x = node.args[0]
    assert isinstance(x, fx.Node)
    in_memory = x in tangent or (node in tangent and not is_derivable(content_of(x, VIEWS)))
    return _on_cpu(node, tangent) and in_memory


def _spell_row_norms(editor: Editor, operands: Sequence[fx.Node], center: fx.Node | None = None) -> fx.Node:
    nodes = operands if center is None else (*operands, center)
    dtype = torch.promote_types(operands[0].meta["val"].dtype, torch.float32)
    (norms,) = editor.trace(_norms, *nodes, has_center=center is not None, dtype=dtype)
    return norms


def _norms(*tensors: Tensor, has_center: bool, dtype: torch.dtype) -> Tensor:
    operands, center = (tensors[:-1], tensors[-1]) if has_center else (tensors, None)
    return ops.norms_as_sums(operands, center, dtype)


def _spell_gather_rows(
    editor: Editor,
    x: fx.Node,
    indices: fx.Node,
    scales: fx.Node | None = None,
    center: fx.Node | None = None,
) -> fx.Node:
    rows = _gather(editor, x, indices)
    if center is not None:
        rows = editor.call(aten.sub.Tensor, editor.widen(rows), editor.widen(center))
    if scales is not None:
        column = editor.call(aten.unsqueeze.default, scales, -1)
        rows = editor.call(aten.mul.Tensor, editor.widen(rows), column)
    return editor.cast_like(rows, x)


def _gather(editor: Editor, node: fx.Node, indices: fx.Node) -> fx.Node:
    """Gather rows: ``[..., rows, features]`` by ``[..., kept]``."""
    if node.meta["val"].dim() == 2:
        return editor.call(aten.index.Tensor, node, [indices])
    kept, features = editor.size(indices, -1), editor.size(node, -1)
    column = editor.call(aten.unsqueeze.default, indices, -1)
    wide = editor.call(aten.expand.default, column, [editor.size(node, 0), kept, features])
    return editor.call(aten.gather.default, node, 1, wide)


def _spell_append_row(editor: Editor, rows: fx.Node, row: fx.Node) -> fx.Node:
    return editor.call(aten.cat.default, [rows, row], rows.meta["val"].dim() - 2)
