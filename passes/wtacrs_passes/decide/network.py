"""A minimum cut of the residuals and what they can be computed from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import networkx
from torch import fx


def minimum_cut(
    operands: Mapping[fx.Node, tuple[fx.Node, ...] | None],
    readers: Iterable[fx.Node],
    capacity: Callable[[fx.Node], int | None],
    order: Mapping[fx.Node, int],
) -> tuple[list[fx.Node], list[fx.Node]]:
    """Return the nodes to store and those between them and their readers, both in graph order.

    Of several cuts of equal size it is the one nearest to the readers.

    Args:
        operands: what each node is computed from; None where it must be stored.
        readers: what the backward pass reads.
        capacity: what storing a node costs; None where that is not an option.
        order: positions in the graph.
    """
    network = networkx.DiGraph()
    for node, sources in operands.items():
        cost = capacity(node)
        network.add_edge((node, "in"), (node, "out"), **({} if cost is None else {"capacity": cost}))
        if sources is None:
            network.add_edge("source", (node, "in"))
        for source in sources or ():
            network.add_edge((source, "out"), (node, "in"))
    for node in readers:
        network.add_edge((node, "out"), "sink")
    if "source" not in network:
        return [], []
    _, (_, near) = networkx.minimum_cut(network, "source", "sink")
    found = sorted((node for node in operands if (node, "out") in near), key=order.__getitem__)
    return [node for node in found if (node, "in") not in near], found
