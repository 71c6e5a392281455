"""Every private import from torch, and what differs between its releases (2.11 to 2.15)."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._dynamo import eval_frame, symbolic_convert
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.guards import DeletedGuardManagerWrapper
from torch._functorch._aot_autograd.descriptors import GradAOTOutput
from torch._functorch.aot_autograd import aot_module_simplified
from torch._functorch.compile_utils import fx_graph_cse
from torch._functorch.compilers import nop
from torch._functorch.partitioners import default_partition, min_cut_rematerialization_partition
from torch._guards import CompileContext, detect_fake_mode
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph
from torch._inductor import inductor_prims
from torch._inductor.custom_graph_pass import CustomPartitionerFn
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch._logging._internal import trace_structured
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module
from torch.fx.experimental.proxy_tensor import py_sym_types
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import CheckpointPolicy

__all__ = [
    "CheckpointPolicy",
    "CustomPartitionerFn",
    "FakeTensor",
    "FakeTensorMode",
    "GradAOTOutput",
    "TorchDynamoException",
    "cache_dir",
    "code_in_compilation",
    "collector_at_rest",
    "compile_again",
    "compile_fx",
    "default_partition",
    "describes_regions",
    "detect_fake_mode",
    "each_region_called",
    "fake_like",
    "fx_graph_cse",
    "hint",
    "inductor_prims",
    "inputs_of_their_own_size",
    "invoke_subgraph",
    "is_unbacked",
    "lower_in_place",
    "make_graph_module",
    "min_cut_rematerialization_partition",
    "py_sym_types",
    "real_tensors",
    "run_joint_graph_passes",
    "same_shape",
    "statically_known_true",
    "trace_joint",
    "trace_operations",
    "trace_structured",
    "widen_caches",
    "without_code",
]


make_graph_module = _make_graph_module

_UNBACKED = 4096
"""Stands for a size that only the data know, where a plan needs a number."""


def code_in_compilation() -> Any:
    """Return what names the code that Dynamo compiles now, for :func:`compile_again`; None outside of it."""
    translator = getattr(symbolic_convert.tls, "current_tx", None)
    compile_id = CompileContext.current_compile_id()
    return None if translator is None or compile_id is None else (translator.f_code, compile_id)


def compile_again(code: Any, reason: str) -> bool:
    """Let Dynamo compile code anew when it is called next; tell whether it will.

    Args:
        code: of :func:`code_in_compilation`, when it was compiled.
        reason: shown by ``TORCH_LOGS=recompiles``.
    """
    if code is None or torch._dynamo.config.error_on_recompile or _may_not_compile():
        return False
    for entry in _debug_get_cache_entry_list(code[0]):
        manager, state = entry.guard_manager, entry.guard_manager.extra_state
        if entry.compile_id == code[1] and state and not isinstance(manager, DeletedGuardManagerWrapper):
            state.invalidate(entry, DeletedGuardManagerWrapper(reason))
            return True
    return False


def _may_not_compile() -> bool:
    """Tell whether the user has said that nothing more is compiled."""
    stance = getattr(eval_frame, "_stance", None)
    return getattr(stance, "stance", "default") in ("fail_on_recompile", "eager_on_recompile", "force_eager")


def is_unbacked(size: Any) -> bool:
    """Tell whether only the data know a size."""
    return isinstance(size, torch.SymInt) and bool(free_unbacked_symbols(size))


def same_shape(left: Sequence[Any], right: Sequence[Any]) -> bool:
    """Tell whether two shapes are known to be equal; sizes that only the data know are where they are one symbol."""
    if len(left) != len(right):
        return False
    if any(is_unbacked(size) for size in (*left, *right)):
        return all(statically_known_true(a == b) for a, b in zip(left, right, strict=True))
    return bool(tuple(left) == tuple(right))


def hint(size: Any) -> int:
    """Return a size as a number: that of the example inputs where it is symbolic."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    unbacked = free_unbacked_symbols(size)
    if not unbacked:
        return int(size.node.hint)
    expression = sympy.sympify(size.node.expr).xreplace(dict.fromkeys(unbacked, sympy.Integer(_UNBACKED)))
    known = expression if expression.is_number else size.node.shape_env.size_hint(expression)
    return int(known)


def fake_like(value: FakeTensor) -> FakeTensor:
    """Return a fake tensor of the same kind in memory of its own; ten times as fast as an operation."""
    with no_dispatch():
        meta = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        return FakeTensor(value.fake_mode, meta, value.device)


def without_code() -> contextlib.AbstractContextManager[None]:
    """Let modules made by `make_graph_module` write their Python code when it is asked for, not before."""
    return _use_lazy_graph_module(True)


@contextlib.contextmanager
def real_tensors() -> Iterator[None]:
    """Compute with real tensors on CPU while a graph of fake ones is compiled."""
    with _disable_current_modes(), torch.device("cpu"):
        yield


def compile_fx(
    gm: fx.GraphModule,
    inputs: Any,
    config_patches: dict[str, Any],
    name: str | None,
    choose: Callable[[Any], Any],
    codes: dict[str, str] | None = None,
) -> Callable[..., Any]:
    """Compile with Inductor.

    Args:
        name: of a region, torch >= 2.13; dropped where unknown.
        choose: changes Inductor's choices, an :class:`torch._inductor.choices.InductorChoices`.
        codes: where it is given the backward pass is compiled at once, and the code that was generated is put there,
            by the name of its part; nothing where all came from a cache of AOTAutograd.
    """
    from torch._functorch import config
    from torch._inductor import compile_fx as inductor
    from torch._inductor.virtualized import V

    widen_caches()
    options: dict[str, Any] = {"config_patches": config_patches}
    if name is not None and _takes_region_name():
        options["compile_region_name"] = name

    @functools.wraps(inductor.compile_fx_inner)
    def inner(*args: Any, **kwargs: Any) -> Any:  # of the backward graph: when it is first needed
        with collector_at_rest(), inputs_of_their_own_size(), V.set_choices_handler(choose(V.choices)):
            compiled = inductor.compile_fx_inner(*args, **kwargs)
        if codes is not None and isinstance(source := getattr(compiled, "source_code", None), str):
            codes["backward" if kwargs.get("is_backward") else "forward"] = source
        return compiled

    at_once = codes is not None and hasattr(config, "force_non_lazy_backward_lowering")
    ahead = config.patch(force_non_lazy_backward_lowering=True) if at_once else contextlib.nullcontext()
    with collector_at_rest(), ahead:
        compiled: Any = inductor.compile_fx(gm, inputs, inner_compile=inner, **options)
    return compiled  # type: ignore[no-any-return]


@contextlib.contextmanager
def inputs_of_their_own_size() -> Iterator[None]:
    """Let Inductor plan with the memory that an input takes, not with the number of times that a loop reads it.

    A scale that is read for each element of its group seems as large as what it scales. So the order of least memory
    decodes all layers at once, to be rid of their scales.
    """
    from torch._inductor import ir, memory
    from torch._inductor.virtualized import V

    plan = memory.get_freeable_input_buf

    @functools.wraps(plan)
    def get_freeable_input_buf(*args: Any, **kwargs: Any) -> Any:
        found = plan(*args, **kwargs)
        sizes: Any = V.graph.sizevars
        known = getattr(sizes, "optimization_hint", None) or sizes.size_hint  # torch < 2.12
        for name, buffer in found.items():
            value = V.graph.graph_inputs[name]
            if isinstance(value, ir.TensorBox):
                buffer.mpi_buffer.size_free = (
                    known(value.get_numel(), fallback=0) * value.get_dtype().itemsize
                )
        return found

    memory.get_freeable_input_buf = get_freeable_input_buf
    try:
        yield
    finally:
        memory.get_freeable_input_buf = plan


@contextlib.contextmanager
def collector_at_rest() -> Iterator[None]:
    """Keep Python's garbage collector from visiting the whole process again and again as graphs grow."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


_INDICES = 2**14


@functools.cache
def widen_caches() -> None:
    """Let Inductor's code for CPUs remember the strides of more indices than the 128 that it does.

    A layer whose residuals are encoded may have more, and each is then forgotten before the next layer asks for it.
    What is remembered is the same for all programs.
    """
    from torch._inductor import sizevars
    from torch._inductor.codegen import cpp

    for name in ("stride_at", "simplify_index_in_vec_range", "stride_at_vec_range"):
        small: Any = getattr(sizevars, name, None)
        if hasattr(small, "cache_parameters"):
            wide = functools.lru_cache(_INDICES)(small.__wrapped__)
            for module in (sizevars, cpp):
                if getattr(module, name, None) is small:
                    setattr(module, name, wide)


@functools.cache
def _takes_region_name() -> bool:
    from torch._inductor import compile_fx as inductor

    return "compile_region_name" in inspect.signature(inductor.compile_fx).parameters


def describes_regions() -> bool:
    """Tell whether torch lets a partitioner know where a region is called."""
    from torch._functorch._aot_autograd import graph_compile

    return hasattr(graph_compile, "_get_partition_fn")


@contextlib.contextmanager
def each_region_called(describe: Callable[[fx.GraphModule, fx.Node, int], None]) -> Iterator[None]:
    """Call ``describe(joint graph of a region, node that calls its forward pass, outputs)`` before each partition.

    Nothing is called before torch 2.13.
    """
    from torch._functorch._aot_autograd import graph_compile

    if not describes_regions():
        yield
        return
    get: Any = graph_compile._get_partition_fn

    @functools.wraps(get)
    def get_partition_fn(call: fx.Node, *args: Any, **kwargs: Any) -> Any:
        is_own, partition = get(call, *args, **kwargs)

        def partition_described(gm: fx.GraphModule, inputs: Any, **options: Any) -> Any:
            describe(gm, call, options["num_fwd_outputs"])
            return partition(gm, inputs, **options)

        return is_own, partition_described

    patched: Any = graph_compile
    patched._get_partition_fn = get_partition_fn
    try:
        yield
    finally:
        patched._get_partition_fn = get


def trace_joint(
    gm: fx.GraphModule, inputs: Any, partition: Callable[..., Any], compiler: Callable[..., Any] = nop
) -> Any:
    """Trace the joint graph of a Dynamo graph with Inductor's decompositions; hand it to `partition`.

    Args:
        compiler: of the forward graph.

    Returns:
        what can be called in the place of `gm`.
    """
    from torch._inductor.decomposition import select_decomp_table

    importlib.import_module("torch._inductor.lowering")  # some decompositions read it without importing it
    return aot_module_simplified(
        gm,
        inputs,
        fw_compiler=compiler,
        bw_compiler=nop,
        partition_fn=partition,
        decompositions=select_decomp_table(),
        keep_inference_input_mutations=True,
    )


def trace_operations(function: Callable[..., Any], values: list[Any]) -> fx.Graph:
    """Trace a function of (fake) tensors into the operations that Inductor lowers."""
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    traced = make_fx(function, decomposition_table=select_decomp_table())(*values)
    traced.graph.eliminate_dead_code()
    graph: fx.Graph = traced.graph
    return graph


def run_joint_graph_passes(gm: fx.GraphModule) -> fx.GraphModule:
    """Run Inductor's passes over a joint graph (attention fusion, random numbers, ...)."""
    from torch._inductor import config
    from torch._inductor.compile_fx import _recursive_joint_graph_passes
    from torch._inductor.virtualized import V

    values = [node.meta.get("val") for node in gm.graph.find_nodes(op="placeholder")]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    folds = not any(tensor.is_meta for tensor in tensors)  # on meta every value looks like a constant
    with V.set_fake_mode(detect_fake_mode(tensors)), config.patch(joint_graph_constant_folding=folds):
        return _recursive_joint_graph_passes(gm, skip_invoke_subgraph=True)


@functools.cache
def lower_in_place(operation: torch._ops.OpOverload) -> None:
    """Have Inductor lower an operation ``x -> x`` to nothing but writing `x` to memory, in the graph's strides.

    Readers that need a dense last dimension, as attention of cuDNN, take what is written for final.
    """
    from torch._inductor import ir
    from torch._inductor.lowering import register_lowering
    from torch._inductor.virtualized import V

    def write(x: Any) -> Any:
        x.realize()
        if ir.is_storage_and_layout(x):
            _, layout = ir.as_storage_and_layout(x, freeze=False)
            if isinstance(layout, ir.FlexibleLayout):
                order = ir.get_stride_order(V.graph.current_node.meta["val"].stride())
                ir.as_storage_and_layout(x, freeze=True, stride_order=order)
        return x

    register_lowering(operation, type_promotion_kind=None)(write)
