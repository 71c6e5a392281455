"""Let the backward pass compute again what the user's checkpoints say, from what they keep.

Before, with ``y = block(x)`` under `torch.utils.checkpoint`::

    h = function(x)                               # tagged: not to be stored
    y = mm(h, w)
    dw = mm(permute(dy), h)

After::

    h = function(x)
    y = mm(h, w)
    again = function(x)                           # just before the first operation that reads it
    dw = mm(permute(dy), again)

PyTorch's partitioner does the same at the end. Done here, what a checkpoint keeps (what it reads from outside, and what
a selective policy saves) is an ordinary residual that may be encoded; all that is made of it again is made of the
decoded value, so that a region is consistent in itself: its gradient is that of its function near the point where it
was.
Random numbers are made again from the same seeds, which are kept whatever a checkpoint says (torch 2.14 tags them).
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Container
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from ..analyse.functions import is_float
from ..decide.modes import modes
from ..graph.cones import build, needed_for
from ..graph.edit import Editor
from ..graph.operations import (
    ATTENTION,
    IS_AGAIN,
    RANDOM,
    SEEDS,
    drops,
    is_derivable,
    is_random,
    is_tagged,
    makes_sparse,
    mutates,
    packet,
)
from ..graph.torch_api import CheckpointPolicy, is_unbacked
from ..joint import Joint

REGION = "ac_graph_id"
"""Key of ``node.meta`` by which AOTAutograd numbers the checkpointed regions."""


def recompute_checkpointed(joint: Joint) -> None:
    """Put what checkpoints compute again into the backward pass, where anything may be encoded."""
    if not any(mode.lossy for mode in modes(joint.policy)) or makes_sparse(joint.graph):
        return
    again, tangent = _computed_again(joint), joint.tangent()
    reads = [(node, arg) for node in joint.graph.nodes if node in tangent for arg in node.all_input_nodes]
    reads = [(node, arg) for node, arg in reads if arg in again and node.op == "call_function"]
    needed = needed_for([arg for _, arg in reads], lambda arg, user: arg not in again)
    unknown = next((node for node in joint.graph.nodes if node in needed and not repeats(node)), None)
    if unknown is not None:
        warnings.warn(
            f"the model's checkpoints compute {packet(unknown.target)} again, which need not give the same once what "
            "they keep is rounded, so they are left to PyTorch and nothing is encoded",
            stacklevel=2,
        )
        return
    editor = Editor(joint.graph)
    editor.tag = "must_be_in_backward"
    copies: dict[fx.Node, fx.Node] = {}

    def read_again(node: fx.Node) -> list[fx.Node]:
        return [arg for arg in node.all_input_nodes if arg in again]

    def repeat(node: fx.Node) -> fx.Node:
        copy = editor.repeat(node, copies)
        copy.meta[IS_AGAIN] = True
        return copy

    for node, operand in reads:
        with editor.before(node):
            node.replace_input_with(operand, build(operand, read_again, copies, repeat))
    for node in joint.graph.nodes:
        node.meta.pop("recompute", None)
    joint.graph.eliminate_dead_code()


def _computed_again(joint: Joint) -> set[fx.Node]:
    """Return what is computed in checkpointed regions and not kept.

    And what is made of that by pointwise operations, or for the backward pass alone.
    """
    graph, tangent = joint.graph, joint.tangent()
    pinned = {node for site in joint.sites for node in site.stored}
    pinned.update(node for loss in joint.losses for node in loss.stored)
    forward = joint.forward()
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "call_function" or node in tangent or node in pinned or not _holds_tensors(node):
            continue
        if node.meta.get("recompute") == CheckpointPolicy.MUST_SAVE or node.target in SEEDS:
            continue
        if is_tagged(node):
            if not _is_kept(node, forward):
                found.add(node)
        elif (node not in forward or is_derivable(node)) and any(
            arg in found for arg in node.all_input_nodes
        ):
            found.add(node)
    return found


def _is_kept(node: fx.Node, forward: Container[fx.Node]) -> bool:
    """Tell whether a value in a region is kept: for another region, or for a hook of FSDP2.

    For what is in no region it is computed again, as by PyTorch: it may be the logits of a checkpointed head.
    """
    if node.meta.get("has_backward_hook"):
        return True
    own = node.meta.get(REGION)
    return any(user in forward and _region(user, of_parts=own) not in (own, None) for user in node.users)


def _region(node: fx.Node, of_parts: Any) -> Any:
    """Return the number of a node's region; one of several results has none of its own."""
    return node.meta.get(REGION, of_parts if node.target is operator.getitem else None)


def _holds_tensors(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor | tuple | list)


def repeats(node: fx.Node) -> bool:
    """Tell whether an operation returns nearly the same where it reads nearly the same.

    Not what chooses elements by their size: experts that a router takes, of which two may be nearly alike.
    """
    if node.target is operator.getitem or node.target in RANDOM - SEEDS:
        return True
    if packet(node.target) in ATTENTION:
        return not drops(node)
    values = [value for value in tree_leaves(node.meta["val"]) if isinstance(value, torch.Tensor)]
    if any(is_unbacked(size) for value in values for size in value.shape):
        return False
    reads_numbers = any(map(is_float, node.all_input_nodes))
    chooses = reads_numbers and any(not v.is_floating_point() and v.dtype is not torch.bool for v in values)
    return not mutates(node) and not is_random(node) and not chooses
