"""The bytes that a step may hold beside its inputs, by what the policy says of the peak or of a whole device."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import psutil
import torch
from torch import fx

from ..graph.cones import is_tangent
from ..graph.edit import bytes_of_example
from ..graph.names import outputs_with_descriptors
from ..policy import Policy

_MOMENTS = 2
"""Tensors like each gradient that AdamW keeps (Kingma and Ba 2015), of which nothing is there before the first step."""
_USED = 0.95
"""Of what is free: the rest is for libraries and for what lies between blocks."""
_STEPS = 32
"""Sizes between one power of two and the next, so that a little more or less free is the same plan."""


def target_of(policy: Policy, graph: fx.Graph) -> int | None:
    """Return the most bytes that the peak of a joint graph may have; at least one.

    What a device holds is that and the inputs of the graph, parameters included, and the state of AdamW.
    """
    asked = policy.memory_bytes
    if asked is None or not policy.is_of_device:
        return asked
    inputs = [node for node in graph.find_nodes(op="placeholder") if not is_tangent(node)]
    gradients = [
        value
        for value, descriptor in outputs_with_descriptors(graph)
        if isinstance(value, fx.Node) and descriptor is not None and descriptor.is_grad()
    ]
    others = sum(map(bytes_of_example, inputs)) + _MOMENTS * sum(map(bytes_of_example, gradients))
    return max(1, asked - others)


def with_what_is_free(policy: Policy, values: Iterable[object]) -> Policy:
    """Return a policy that says how much ``memory="auto"`` is: what this process has and what it can have.

    Args:
        values: inputs of the program; the device is that of the first tensor.
    """
    if policy.memory != "auto":
        return policy
    device = next((x.device for x in values if isinstance(x, torch.Tensor)), torch.device("cpu"))
    size = int(_USED * bytes_at_hand(device))
    step = 1 << max(size.bit_length() - _STEPS.bit_length(), 0)
    return dataclasses.replace(policy, memory=f"device:{size // step * step}B")


def bytes_at_hand(device: torch.device) -> int:
    """Return the bytes of a device that this process has or that are free."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    return int(psutil.virtual_memory().available + psutil.Process().memory_info().rss)
