"""Which encoded residuals leave the device: as many as go while the forward pass computes.

The time of a forward pass is that of its matrix products, at measured rates. The first residuals go first: they are
read last.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from ..graph.operations import GEMMS
from ..graph.torch_api import hint
from ..joint import Joint
from ..maths.encodings import INTEGER_BITS, encoded_bits
from ..maths.offload import HOST
from ..policy import PolicyError
from ..rates import bytes_per_second, seconds
from .plan import Stored

_SMALLEST = 2**16
"""Bytes of what is worth a journey."""
_PINNED = 20e9  # bytes a second to pinned memory, which no model of a bus is needed for


def choose_offloaded(joint: Joint, stored: Sequence[Stored]) -> tuple[list[Stored], str]:
    """Return what is stored, with where it waits, and what there is to say about it.

    Raises:
        PolicyError: a device that a place is not for.
    """
    where = joint.policy.offload
    if where is None:
        return list(stored), ""
    place = where.removeprefix("disk:")
    _check_device(joint, place)
    rate = _PINNED if place == HOST else bytes_per_second(place)
    time = _forward_seconds(joint)
    room, away = rate * time, 0
    found = []
    for item in stored:
        size = _bytes(item)
        if size >= _SMALLEST and away + size <= room:
            item, away = dataclasses.replace(item, place=place), away + size
        found.append(item)
    count, large = sum(bool(item.place) for item in found), sum(_bytes(item) >= _SMALLEST for item in found)
    said = (
        f"{count} of {large} encoded residuals wait in {where}, {away / 2**20:.1f} MiB; "
        f"in the {time:.3g} s of the forward pass's products {room / 2**20:.1f} MiB go there"
    )
    return found, said


def _check_device(joint: Joint, place: str) -> None:
    values = (node.meta.get("val") for node in joint.graph.find_nodes(op="placeholder"))
    kinds = {value.device.type for value in values if isinstance(value, Tensor)}
    needed = "cuda" if place == HOST else "cpu"
    if needed not in kinds:
        raise PolicyError(
            f"offload={joint.policy.offload!r} is for residuals on {needed}, got a model on "
            f"{', '.join(sorted(kinds))}; use {'disk:<folder>' if needed == 'cuda' else HOST!r}, or None"
        )


def _bytes(item: Stored) -> int:
    """Return the bytes of the codes of an encoded residual; zero of others."""
    value = item.node.meta["val"]
    integers = item.encoding in INTEGER_BITS or item.encoding in ("table", "bits")
    if not integers or not isinstance(value, Tensor) or not all(isinstance(n, int) for n in value.shape):
        return 0
    bits = encoded_bits(
        item.encoding, value.shape[-1], value.element_size(), item.table.bits if item.table else 0
    )
    return int(hint(value.numel()) * bits / 8)


def _forward_seconds(joint: Joint) -> float:
    """Return how long the matrix products of the forward pass take."""
    tangent, total = joint.tangent(), 0.0
    for node in joint.graph.nodes:
        if node.target not in _PRODUCTS or node in tangent:
            continue
        *_, left, right = (arg.meta["val"] for arg in node.args if isinstance(arg, fx.Node))
        *batch, m, k = map(hint, left.shape)
        n = hint(right.shape[-1])
        if not min(m, k, n):
            continue
        rows = min(k, 1024)
        sizes = (min(m, 2048), min(n, 2048))
        one = seconds(("exact",), rows, *sizes, left.dtype, left.device)["exact"]
        total += one * m * k * n / (rows * sizes[0] * sizes[1]) * torch.Size(batch).numel()
    return total


_PRODUCTS = GEMMS | {torch.ops.aten.addmm.default}
