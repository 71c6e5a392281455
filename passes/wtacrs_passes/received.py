"""What a graph is handed by another one: inputs that are activations.

Before, in a layer that is compiled alone::

    def forward(x, w): ...                        # saving x takes no memory: an input is there anyway

After::

    def forward(x, w):
        received = receive(x)                     # a residual like others: x is freed with whoever made it
        ...

Taken out again once the graph is partitioned, so that the operation never runs.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Mapping

from torch import Tensor, fx

from .graph.edit import Editor
from .graph.names import NamedInput, named_inputs, written_inputs
from .maths import ops


def receive_activations(graph: fx.Graph, table: Mapping[int, NamedInput]) -> None:
    """Let the operations read what another graph of the step computed as something that takes memory if it is saved.

    But not what this graph writes to.
    """
    written = written_inputs(graph)
    receive(graph, (node for node in named_inputs(graph, table, ("activation",)) if node not in written))


def receive(graph: fx.Graph, inputs: Iterable[fx.Node]) -> None:
    """Put an operation between inputs and all that reads them; outputs, too."""
    editor = Editor(graph)
    first = next(node for node in graph.nodes if node.op != "placeholder")
    for node in inputs:
        if isinstance(node.meta.get("val"), Tensor):
            with editor.before(first):
                received = editor.call(ops.receive, node)
            node.replace_all_uses_with(received, functools.partial(operator.is_not, received))


def hand_on(gm: fx.GraphModule) -> None:
    """Let everything read the inputs again that :func:`receive` stands for."""
    for node in gm.graph.find_nodes(op="call_function", target=ops.receive):
        node.replace_all_uses_with(node.args[0])
        gm.graph.erase_node(node)
    gm.recompile()
