"""What Inductor is told beside the graph: which loops to fuse, what inputs take, what to remember, when to collect."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._inductor import config, memory, metrics, sizevars
from torch._inductor.codegen import cpp
from torch.fx.experimental.proxy_tensor import make_fx

from wtacrs_passes.graph import torch_api
from wtacrs_passes.lower.fusion import without_waiting

ROWS, FEATURES = 256, 64


def peaks(x: Tensor, w: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Two layers, of each the peaks of its keys; one loop could compute both, as both read the frequencies."""
    first = x @ w
    second = first @ w
    return (first * frequencies).amax(-1), (second * frequencies).amax(-1)


def copies(x: Tensor, w: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """The same, but what the loops write is as large as what they read."""
    first = x @ w
    second = first @ w
    return first * frequencies, second * frequencies


def loops(function: Callable[..., Any], choose: Callable[[Any], Any]) -> int:
    """Return how many loops Inductor writes for a function; check what they compute."""
    torch.manual_seed(0)
    inputs = [torch.randn(ROWS, FEATURES), torch.randn(FEATURES, FEATURES), torch.randn(FEATURES)]
    metrics.reset()
    with config.patch(force_disable_caches=True):
        compiled = torch_api.compile_fx(make_fx(function)(*inputs), inputs, {}, None, choose)
        found = compiled(*inputs)
    for value, right in zip(found, function(*inputs), strict=True):
        torch.testing.assert_close(value, right)
    return int(metrics.generated_kernel_count)


def as_they_are(choices: Any) -> Any:
    return choices


@pytest.mark.parametrize(("function", "ours"), [(peaks, 2), (copies, 1)])
def test_loops_that_free_memory_do_not_wait(function: Callable[..., Any], ours: int) -> None:
    assert loops(function, as_they_are) == 1
    assert loops(function, without_waiting) == ours


def test_choices_of_the_user_are_kept() -> None:
    def never(choices: Any) -> Any:
        changed = without_waiting(choices)
        changed.can_fuse_horizontal = lambda *_: False
        return without_waiting(changed)

    assert loops(copies, never) == 2


def test_the_collector_rests_while_code_is_generated() -> None:
    seen = []

    def choose(choices: Any) -> Any:
        seen.append(gc.isenabled())
        return choices

    loops(copies, choose)
    assert seen and not any(seen)
    assert gc.isenabled()


def test_indices_of_a_whole_layer_are_remembered() -> None:
    torch_api.widen_caches()
    names = ("stride_at", "simplify_index_in_vec_range", "stride_at_vec_range")
    functions = [getattr(sizevars, name) for name in names if hasattr(sizevars, name)]
    if not functions:
        pytest.skip("this PyTorch remembers no strides")
    for function in functions:
        assert isinstance(function, functools._lru_cache_wrapper)
        assert function.cache_parameters()["maxsize"] > 4096
    assert cpp.stride_at_vec_range is sizevars.stride_at_vec_range


def test_an_input_counts_by_its_own_size() -> None:
    groups = 4
    sizes = {}

    def choose(choices: Any) -> Any:
        plan = memory.get_freeable_input_buf

        def record(*args: Any) -> Any:
            found = plan(*args)
            sizes.update({name: buffer.mpi_buffer.size_free for name, buffer in found.items()})
            return found

        memory.get_freeable_input_buf = record
        return choices

    def scale(x: Tensor, w: Tensor, v: Tensor, u: Tensor) -> tuple[Tensor]:
        return (((x @ w).unflatten(-1, (groups, -1)) * (x @ v).unsqueeze(-1)).flatten(-2) * u,)

    plan = memory.get_freeable_input_buf
    x, w, v, u = (
        torch.randn(ROWS, FEATURES),
        torch.eye(FEATURES),
        torch.ones(FEATURES, groups),
        torch.ones(FEATURES),
    )
    inputs = [x, w, v, u.requires_grad_()]
    with config.patch(force_disable_caches=True):
        [y] = torch_api.compile_fx(fx.symbolic_trace(scale), inputs, {}, None, choose)(*inputs)
        y.sum().backward()
    assert sizes == {"mm": (x @ w).nbytes, "mm_1": (x @ v).nbytes}
    assert memory.get_freeable_input_buf is plan
