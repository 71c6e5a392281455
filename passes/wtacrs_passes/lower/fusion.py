"""Choose which loops Inductor fuses: none that would free memory waits for a product of matrices.

Inductor fuses loops that read the same memory, also where one waits for a product and the other does not. So the
keys of one layer are encoded with those of the next, as both read the frequencies of rotary embeddings, and what the
first layer is to store stays in memory as it is until then. Nor do two layers look alike then, so that each has C++
files of its own.
"""

from __future__ import annotations

import copy
import functools
from typing import Any


def without_waiting(choices: Any) -> Any:
    """Return choices as these ones, but for loops side by side of which one could free memory before the other starts.

    Args:
        choices: a :class:`torch._inductor.choices.InductorChoices`.
    """
    start = functools.cache(_start)

    def can_fuse_horizontal(scheduler: Any, one: Any, other: Any, shared: int) -> bool:
        if not choices.can_fuse_horizontal(scheduler, one, other, shared):
            return False
        starts = [max(start(node) for node in loop.get_nodes()) for loop in (one, other)]
        first, second = (one, other) if starts[0] < starts[1] else (other, one)
        return starts[0] == starts[1] or not _frees_memory(first, second)

    changed = copy.copy(choices)
    changed.can_fuse_horizontal = can_fuse_horizontal
    return changed


def _start(loop: Any) -> int:
    """Return the place of the last operation, which is no loop, that a node of the scheduler waits for, or -1."""
    nodes = loop.scheduler.name_to_node
    waited = (nodes[name] for name in loop.ancestors)
    return max((node.min_order for node in waited if _is_operation(node)), default=-1)


def _is_operation(node: Any) -> bool:
    """Tell whether a node of the scheduler calls an operation: it is neither a loop nor one of several results."""
    from torch._inductor.ir import MultiOutput

    return node.is_extern() and not isinstance(node.node, MultiOutput)


def _frees_memory(loop: Any, later: Any) -> bool:
    """Tell whether a loop writes less than it reads of what the graph computes and a later loop does not read."""
    computed, size = loop.scheduler.name_to_buf, loop.scheduler.dep_size_hint
    needed = {dep.name for dep in later.read_writes.reads}
    read = {dep.name: size(dep) for dep in loop.read_writes.reads if dep.name in computed}
    freed = sum(number for name, number in read.items() if name not in needed)
    return bool(freed > sum(size(dep) for dep in loop.read_writes.writes))
