"""Measures of one training step, in eager and in compiled code alike."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor


def saved_bytes(forward: Callable[[], Tensor], exclude: Iterable[Tensor]) -> int:
    """Return the bytes that the forward saves for the backward, in storages that hold none of `exclude`.

    Counted as storages, each once: all that autograd is given to keep.

    Args:
        forward: returns the loss, a scalar; its backward is run as well, so that nothing stays saved.
        exclude: parameters, buffers and inputs, which live on whether saved or not.
    """
    known = {tensor.untyped_storage()._cdata for tensor in exclude}
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:  # the storage itself: on the meta device all addresses are zero
            sizes[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = forward()
    for node in _nodes(loss):
        # What AOTAutograd keeps beside `save_for_backward`, out of sight of the hooks.
        for tensor in getattr(node, "_tensors_no_vc_check", None) or ():
            keep(tensor)
    loss.backward()  # type: ignore[no-untyped-call]
    return sum(sizes.values())


def _nodes(loss: Tensor) -> Iterator[torch.autograd.graph.Node]:
    """Yield every node of the autograd graph."""
    stack, seen = [loss.grad_fn], {loss.grad_fn, None}
    while stack:
        node = stack.pop()
        assert node is not None
        yield node
        new = {following for following, _ in node.next_functions} - seen
        seen |= new
        stack += new


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes allocated during the step, less those allocated before it.

    CUDA: ``max_memory_allocated``. CPU: the running sum of the profiler's memory events.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # Without Kineto, which reports its start and stop on stderr.
    with torch.autograd.profiler.profile(use_kineto=False, profile_memory=True) as profile:
        step()
    assert profile.kineto_results is not None
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    changes: Iterator[int] = (event.nbytes() for event in events)
    return max(itertools.accumulate(changes, initial=0))
