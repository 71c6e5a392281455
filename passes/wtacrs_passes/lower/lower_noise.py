"""Lower the random numbers of the rewrites to those of Inductor."""

from __future__ import annotations

from typing import Any

import torch
import torch._inductor.config
from torch import fx

from ..graph.edit import Editor
from ..graph.operations import NOISE_OF, aten
from ..graph.torch_api import inductor_prims
from ..joint import Joint

_SITES_PER_TENSOR = 32  # bounds how long the random numbers of a deep model are held


def lower_noise(joint: Joint) -> None:
    """Turn the sites' ``aten.rand`` into slices of few random tensors, each with a seed of Inductor's.

    Before, for each site::

        noise = rand([3])

    After, for all sites of one placement and shape::

        noises = random([sites, 3], lookup_seed(seeds, index), "rand")
        noise = select(noises, 0, site)

    One tensor is one kernel to compile and to launch. The seeds extend the tensor that Inductor has made
    for dropout: a second one of equal count would be merged with it by common-subexpression elimination.
    """
    if torch._inductor.config.fallback_random:
        return  # Inductor leaves the random numbers of the model to eager as well
    graph = joint.graph
    groups: dict[Any, list[list[fx.Node]]] = {}
    for node in graph.find_nodes(op="call_function", target=aten.rand.default):
        if NOISE_OF in node.meta:
            value = node.meta["val"]
            chunks = groups.setdefault((node.meta[NOISE_OF], value.device, str(value.shape)), [[]])
            if len(chunks[-1]) == _SITES_PER_TENSOR:
                chunks.append([])
            chunks[-1].append(node)
    by_device: dict[torch.device, list[list[fx.Node]]] = {}
    for (_, device, _), chunks in groups.items():
        by_device.setdefault(device, []).extend(chunks)
    editor = Editor(graph)
    for device, chunks in by_device.items():
        seeds, first = _extend_seeds(editor, device, len(chunks))
        for index, nodes in enumerate(chunks, start=first):
            with editor.before(nodes[0]):
                seed = editor.call(inductor_prims.lookup_seed, seeds, index)
                size = [len(nodes), *nodes[0].args[0]]  # type: ignore[misc]
                noises = editor.call(inductor_prims.random, size, seed, "rand")
            for site, node in enumerate(nodes):
                with editor.before(node):
                    node.replace_all_uses_with(editor.call(aten.select.int, noises, 0, site))
                graph.erase_node(node)


def _extend_seeds(editor: Editor, device: torch.device, count: int) -> tuple[fx.Node, int]:
    """Return a tensor of Inductor's seeds with `count` new ones, and the index of the first of these."""
    graph = editor.graph
    seeds = graph.find_nodes(op="call_function", target=inductor_prims.seeds)
    old = next((node for node in seeds if node.args[1] == device), None)
    first: int = old.args[0] if old else 0
    with editor.before(next(n for n in graph.nodes if n.op != "placeholder")):
        extended = editor.call(inductor_prims.seeds, first + count, device)
    if old:
        old.replace_all_uses_with(extended)
        graph.erase_node(old)
    return extended, first
