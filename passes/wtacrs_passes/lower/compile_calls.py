"""Let what calls compute be compiled when they are first made: a graph to look at runs as it is, generated code not."""

from __future__ import annotations

from ..joint import Joint
from ..maths import ops

_CALLS = ops.in_chunks, ops.round_columns, ops.multiply_codes, ops.round_groups, ops.multiply_groups
"""Calls whose last argument says so."""


def compile_calls(joint: Joint) -> None:
    """Mark each function of rows in chunks, each rounding of a factor and each product of codes as one to compile."""
    for target in _CALLS:
        for node in joint.graph.find_nodes(op="call_function", target=target):
            *args, _ = node.args
            node.args = (*args, True)
