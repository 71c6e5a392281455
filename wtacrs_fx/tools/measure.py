"""Measures of one training step, in eager and in compiled code alike."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

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

    CUDA: ``max_memory_allocated``. CPU: the maximum of :func:`memory_timeline`.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    return max(held for _, held in memory_timeline(step, device))


def memory_timeline(step: Callable[[], object], device: torch.device) -> list[tuple[float, int]]:
    """Return the memory at each allocation and release: (seconds since the first, bytes beyond those before).

    CUDA: the allocator's history. CPU: the memory events of the profiler.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.memory._record_memory_history(max_entries=10**6)
        try:
            step()
            torch.cuda.synchronize(device)
            trace = torch.cuda.memory._snapshot()["device_traces"][device.index or 0]
        finally:
            torch.cuda.memory._record_memory_history(enabled=None)
        signs = {"alloc": 1, "free_requested": -1}
        changes = [
            (event["time_us"] / 1e6, signs[event["action"]] * event["size"])
            for event in trace
            if event["action"] in signs
        ]
    else:
        # Without Kineto, which reports its start and stop on stderr.
        with torch.autograd.profiler.profile(use_kineto=False, profile_memory=True) as profile:
            step()
        assert profile.kineto_results is not None
        events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
        changes = [(event.start_ns() / 1e9, event.nbytes()) for event in events]
    changes.sort(key=lambda change: change[0])
    began = changes[0][0] if changes else 0.0
    held = itertools.accumulate((size for _, size in changes), initial=0)
    return list(zip((0.0, *(moment - began for moment, _ in changes)), held, strict=True))


def step_seconds(step: Callable[[], object], device: torch.device) -> float:
    """Return the duration of the step. CUDA: between two events."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        step()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the 20th, 50th and 80th percentile."""
    levels = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    p20, p50, p80 = torch.tensor(values, dtype=torch.float64).quantile(levels).tolist()
    return p20, p50, p80
