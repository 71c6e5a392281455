"""Checkpoint as many layers as the policy says, as the user could have.

The backward pass computes them again from what they read, see `recompute_checkpointed`. It comes to the first layers
last, when what the others have stored is free: they are the first to be computed again, as beside them lies least.
The last of them may be half a layer.

What other layers read is stored, and what does not repeat: attention with dropout, what writes to a buffer.
"""

from __future__ import annotations

import math
import operator
from typing import Any

from torch import Tensor

from ..analyse.layers import first_half, repeated_layers
from ..graph.operations import is_checkpointed
from ..graph.torch_api import CheckpointPolicy
from ..joint import Joint
from .recompute_checkpointed import REGION, repeats


def checkpoint_layers(joint: Joint) -> None:
    """Tag the operations of the first layers. The user's own checkpoints stay the only ones."""
    if not joint.policy.recompute or is_checkpointed(joint.graph):
        return
    forward, tangent = joint.forward(), joint.tangent()
    layers = repeated_layers(joint.graph, tangent)
    whole, halves = divmod(number_of_halves(joint.policy.recompute, len(layers)), 2)
    again = layers[:whole] + [first_half(layer) for layer in layers[whole : whole + halves]]
    for number, layer in enumerate(again):
        members = set(layer)
        for node in layer:
            read_outside = any(user in forward and user not in members for user in node.users)
            source: Any = node.args[0] if node.target is operator.getitem else node
            once = read_outside or not repeats(node) or not repeats(source)
            if once and not isinstance(node.meta.get("val"), Tensor):
                continue  # one of several results: those are stored
            kind = CheckpointPolicy.MUST_SAVE if once else CheckpointPolicy.PREFER_RECOMPUTE
            node.meta["recompute"], node.meta[REGION] = kind, number


def number_of_halves(share: float, layers: int) -> int:
    """Return how many halves of so many layers a share of them is, rounded up."""
    return math.ceil(2 * share * layers - 1e-6)
