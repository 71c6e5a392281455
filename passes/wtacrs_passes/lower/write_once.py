"""Write an encoded value to memory once where many read it."""

from __future__ import annotations

from ..graph.edit import Editor
from ..graph.operations import is_loop, is_recomputable
from ..graph.torch_api import lower_in_place
from ..joint import Joint
from ..maths import ops


def write_once(joint: Joint) -> None:
    """Let Inductor write an encoded value that is read again after the next product of matrices.

    It was written when it was a residual. Now each reader would compute it again, a residual stream from all
    the terms that were added to it, and those would have to stay in memory.
    """
    if joint.parts is None or not joint.residuals:
        return
    forward, _ = joint.parts
    editor = Editor(forward.graph)
    by_name = {node.name: node for node in forward.graph.nodes}
    for residual in joint.residuals:
        value = by_name.get(residual.stored.source.name)
        if value is None or not is_recomputable(value):
            continue
        fused = {value}
        following = value.next
        while is_loop(following):
            fused.add(following)
            following = following.next
        if set(value.users) - fused:
            with editor.after(value):
                written = editor.call(ops.write, value)
            value.replace_all_uses_with(written, lambda user, written=written: user is not written)
    lower_in_place(ops.write)
    forward.recompile()
