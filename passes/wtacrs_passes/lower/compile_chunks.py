"""Let what is computed in chunks be compiled: a graph to look at runs as it is, code that is generated does not."""

from __future__ import annotations

from ..joint import Joint
from ..maths import ops


def compile_chunks(joint: Joint) -> None:
    """Mark each function of rows in chunks as one to compile when it is called first."""
    for node in joint.graph.find_nodes(op="call_function", target=ops.in_chunks):
        *args, _ = node.args
        node.args = (*args, True)
