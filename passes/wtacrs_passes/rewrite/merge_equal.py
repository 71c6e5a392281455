"""Compute equal values once, so that what reads them reads one node."""

from __future__ import annotations

from ..graph.torch_api import fx_graph_cse
from ..joint import Joint


def merge_equal(joint: Joint) -> None:
    """Merge equal values by PyTorch's own pass.

    It knows what a caller can tell apart: values that share memory with an output, values around a mutation,
    random and uninitialised ones, sizes that only the data know.
    """
    graph = joint.graph
    merged = fx_graph_cse(graph)
    merged._codegen = graph._codegen
    merged._tracer_cls = graph._tracer_cls
    joint.gm.graph = merged
