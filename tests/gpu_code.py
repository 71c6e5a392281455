"""The Triton code of training graphs, compiled for GPUs where there is none: registers that spill, shared memory.

    python tests/gpu_code.py 90 0 bert llama      # a line of JSON for each kernel, for compute capability 9.0
    python tests/gpu_code.py 80 40 llama          # 40 of its kernels, drawn at random

A joint graph is traced on the CPU, its values are put on a GPU that is not there, and from there on all is as on one:
our passes, PyTorch's partitioner, Inductor, Triton and ptxas. What is asked of the driver is answered by a stand-in.
What calls compile when they are first made, a chunk of a loss or the rounding of factors, is recorded in a step that
the CPU computes. Attention is written out, as libraries' kernels differ between devices.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # its kernels are compiled
    os.environ.pop("TRITON_INTERPRET", None)

import pytest
import torch
import torch._subclasses.fake_tensor
import torch.utils._triton
import transformers
import triton
from torch import Tensor, fx, nn
from torch._functorch.aot_autograd import aot_module_simplified
from torch._functorch.compilers import nop
from torch._inductor import async_compile
from torch._inductor import config as inductor_config
from torch._inductor.codecache import PyCodeCache
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.runtime import triton_helpers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import wtacrs_fx
from wtacrs_fx import Policy
from wtacrs_fx.backend import lifted_inputs
from wtacrs_fx.capture import STATIC_INPUTS, count_forward_outputs
from wtacrs_passes.analyse import peaks
from wtacrs_passes.graph.torch_api import run_joint_graph_passes
from wtacrs_passes.maths import chunks, low_precision, triton_kernels
from wtacrs_passes.maths.estimators import NOISE, ROUNDS
from wtacrs_passes.pipeline import WtacrsPartitioner

GPU = torch.device("cuda", 0)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SHARED = {80: 163, 89: 99, 90: 227, 100: 227}
"""KiB of shared memory that a block may have, by compute capability (CUDA C++ programming guide, table of technical
specifications)."""
LANGUAGE_MODEL = {
    "hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 4096,
    "attn_implementation": "eager",
}  # fmt: skip
TOKENS = 4, 256


@dataclass(frozen=True)
class Kernel:
    """What ptxas says of a kernel: registers and bytes of local memory of a thread, and of shared memory of a block."""

    case: str
    name: str
    registers: int
    local: int
    shared: int


class Loss(nn.Module):
    """A language model under autocast, whose forward is its loss."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, ids: Tensor) -> Tensor:
        with torch.autocast("cpu", self.dtype):
            return self.model(input_ids=ids, labels=ids).loss


@dataclass(frozen=True)
class Case:
    """A model and a policy."""

    architecture: str
    policy: Policy
    others: tuple[tuple[str, Any], ...] = ()
    dtype: torch.dtype = torch.bfloat16

    def make(self) -> tuple[nn.Module, dict[str, Tensor]]:
        name = self.architecture
        config = getattr(transformers, re.sub("For.*", "Config", name))(**LANGUAGE_MODEL, **dict(self.others))
        model = getattr(transformers, name)(config).train()
        return Loss(model, self.dtype), {"ids": torch.randint(4096, TOKENS)}


_CHUNKS = {"chunk_bytes": 2**20}
CASES = {
    "bert": Case("BertForMaskedLM", Policy(ratio=0.3, **_CHUNKS)),
    "llama": Case("LlamaForCausalLM", Policy(ratio=0.3, residuals="small", **_CHUNKS)),
    "llama, 8 bits": Case(
        "LlamaForCausalLM", Policy(ratio=1.0, product="int8", product_dx="int8", **_CHUNKS)
    ),
    "llama, rounded at random": Case(
        "LlamaForCausalLM", Policy(ratio=0.3, residuals="fine", rounding="stochastic", center=True, **_CHUNKS)
    ),
    "qwen3, float16": Case(
        "Qwen3ForCausalLM",
        Policy(ratio=0.3, estimator="wta-crs", placement="forward", **_CHUNKS),
        (("num_key_value_heads", 2), ("head_dim", 64)),
        torch.float16,
    ),
    "products again": Case(
        "LlamaForCausalLM", Policy(ratio=0.5, recompute_products=1.0, recompute=0.5, **_CHUNKS)
    ),
    "float8": Case("LlamaForCausalLM", Policy(ratio=0.5, product="float8", **_CHUNKS)),
}


# A GPU that is not there


@functools.cache
def stand_in(capability: int) -> None:
    """Let PyTorch and Triton find a GPU of a compute capability, for the rest of this process."""
    major_minor = divmod(capability, 10)
    properties = types.SimpleNamespace(
        name="stand-in", major=major_minor[0], minor=major_minor[1], multi_processor_count=108, total_memory=2**36,
        regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048 if capability != 89 else 1536,
        max_threads_per_block=1024, warp_size=32, shared_memory_per_block=48 * 1024,
        shared_memory_per_block_optin=SHARED[capability] * 1024, gcnArchName="", L2_cache_size=2**25,
    )  # fmt: skip

    class Driver:
        utils = types.SimpleNamespace(
            get_device_properties=lambda _: {"max_shared_mem": properties.shared_memory_per_block_optin}
        )

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability, properties.warp_size)

        def get_current_device(self) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return GPU

    triton.runtime.driver.set_active(Driver())
    triton_helpers.set_driver_to_gpu = lambda: None  # it stays
    trace = peaks.trace_operations

    def trace_fake(function: Callable[..., Any], values: list[Any]) -> fx.Graph:
        with values[0].fake_mode:  # a chunk of a loss makes tensors of its own, which are nowhere else
            return trace(function, values)

    peaks.trace_operations = trace_fake
    answers = {
        "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0, "_exchange_device": 0,
        "_maybe_exchange_device": 0, "get_device_properties": properties, "_get_device_properties": properties,
        "get_device_capability": major_minor, "get_device_name": properties.name, "is_bf16_supported": True,
        "is_tf32_supported": True, "synchronize": None, "_lazy_init": None, "set_rng_state": None,
        "get_rng_state": torch.get_rng_state(),
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    for name in ("_cuda_getDevice", "_cuda_setDevice", "_cuda_exchangeDevice", "_cuda_getCurrentRawStream"):
        setattr(torch._C, name, lambda *_: 0)
    torch._subclasses.fake_tensor.init_gpu_context = lambda *_: None
    _load_guard()
    for value in vars(torch.utils._triton).values():
        getattr(value, "cache_clear", lambda: None)()


GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<DeviceType::CUDA>)
}
"""


def _load_guard() -> None:
    """Let operations switch to a GPU, which does nothing: PyTorch for CPUs has no such guard, and refuses."""
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "guard.cpp"), Path(folder, "guard.so")
        source.write_text(GUARD)
        flags = [
            "-std=c++20",
            "-shared",
            "-fPIC",
            f"-I{root}/include",
            f"-L{root}/lib",
            f"-Wl,-rpath,{root}/lib",
        ]
        subprocess.run([os.environ.get("CXX", "g++"), *flags, source, "-lc10", "-o", library], check=True)
        ctypes.CDLL(library)


def put_on_gpu(gm: fx.GraphModule) -> list[Any]:
    """Put the values of a traced graph there; return those of its inputs."""
    mode = _mode(gm)

    def moved(value: Any) -> Any:
        if isinstance(value, torch.device):
            return GPU if value.type == "cpu" else value
        if not isinstance(value, Tensor) or value.device.type != "cpu":
            return value
        with mode:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=GPU)

    for node in gm.graph.nodes:
        node.meta["val"] = tree_map(moved, node.meta.get("val"))
        node.meta.pop("tensor_meta", None)
        if node.op == "call_function":
            node.args, node.kwargs = tree_map(moved, (node.args, node.kwargs))
    gm.recompile()
    return [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]


def _tensors(value: Any) -> Iterator[Tensor]:
    yield from (leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor))


# From a case to its kernels


def graphs_of_calls(case: Case) -> list[fx.GraphModule]:
    """Return what calls compile in a step of the CPU, traced, each once."""
    found: dict[str, fx.GraphModule] = {}
    compile_ = torch.compile

    def keep(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        def inner(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            found.setdefault(gm.print_readable(print_output=False, include_stride=True), gm)
            return nop(gm, inputs)

        return aot_module_simplified(
            gm, inputs, fw_compiler=inner, inference_compiler=inner, decompositions=select_decomp_table()
        )

    def run(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        partitioner = WtacrsPartitioner(case.policy, lifted_inputs(gm), lambda report: None)
        return aot_module_simplified(
            gm,
            inputs,
            fw_compiler=nop,
            partition_fn=partitioner.after_inductor,
            decompositions=select_decomp_table(),
        )

    model, inputs = case.make()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, **_: compile_(function, backend=keep, dynamic=False))
        chunks.compiled_function_of.cache_clear()
        low_precision._compiled.cache_clear()
        compile_(model, backend=run)(**inputs).backward()
    return list(found.values())


def traced(case: Case) -> fx.GraphModule:
    """Return the joint graph of a step, after Inductor's own passes over it."""
    model, inputs = case.make()
    joint = wtacrs_fx.capture(model, **inputs)
    run_joint_graph_passes(joint)
    return joint


def partitioned(joint: fx.GraphModule, policy: Policy) -> Sequence[fx.GraphModule]:
    """Return the forward and the backward graph of a joint graph on the GPU."""
    known, values = joint.meta[STATIC_INPUTS], put_on_gpu(joint)
    partitioner = WtacrsPartitioner(policy, known, lambda report: None)
    with torch._guards.tracing(torch._guards.TracingContext(_mode(joint))):
        return partitioner(
            joint,
            values,
            num_fwd_outputs=count_forward_outputs(joint.graph),
            static_lifetime_input_indices=[one.index for one in known],
        )


def sources(graphs: Sequence[fx.GraphModule]) -> dict[str, str]:
    """Return the Triton kernels that Inductor writes for graphs on the GPU: name -> source, each source once."""
    found: dict[str, str] = {}

    def record(self: Any, name: str, source: str, device_str: str = "cuda") -> None:
        found.setdefault(re.sub(re.escape(name), "triton_", source), name)
        named[name] = source

    named: dict[str, str] = {}
    # Padding is chosen by measurements on the device.
    with (
        inductor_config.patch(force_disable_caches=True, shape_padding=False),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(async_compile.AsyncCompile, "triton", record)
        for number, gm in enumerate(graphs):
            with torch._guards.tracing(torch._guards.TracingContext(_mode(gm))):
                compile_fx_inner(gm, put_on_gpu(gm), is_inference=number > 1, is_backward=number == 1)
    kept = set(found.values())
    return {name: source for name, source in named.items() if name in kept}


def compiled(source: str, name: str) -> Any:
    """Compile a kernel of Inductor in the first of its configurations."""
    tuner = getattr(PyCodeCache.load(source), name)
    with inductor_config.patch(use_static_triton_launcher=False):
        return tuner._precompile_config(tuner.configs[0]).kernel


def choosers(capability: int) -> Iterator[tuple[str, Any]]:
    """Compile our own kernel as it is called: of one factor or two, of few rows and of many."""
    pointers = {"first": "*fp32", "second": "*fp32", "noise": "*fp32", "indices": "*i64", "scales": "*fp32"}
    sizes = dict.fromkeys(("rows", "kept", "height", "width"), "i32")
    for pair, at_once in itertools.product((False, True), repeat=2):
        constants = {
            "PAIR": pair, "NUMBERS": NOISE, "TURNS": ROUNDS, "AT_ONCE": at_once, "BLOCK": triton_kernels._BLOCK,
        }  # fmt: skip
        signature = {**pointers, **sizes, **dict.fromkeys(constants, "constexpr")}
        source = ASTSource(triton_kernels._choose_rows_kernel, signature, constexprs=constants)
        target, options = GPUTarget("cuda", capability, 32), {"num_warps": triton_kernels._WARPS}
        yield (
            f"choose_rows, pair {pair}, at once {at_once}",
            triton.compile(source, target=target, options=options),
        )


def said(case: str, name: str, binary: Any) -> Kernel:
    """Return what ptxas says of a kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    [numbers] = re.findall(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    registers, stack, local = map(int, numbers)
    return Kernel(case, name, registers, stack + local, binary.metadata.shared)


def _mode(gm: fx.GraphModule) -> FakeTensorMode:
    return next(value.fake_mode for node in gm.graph.nodes for value in _tensors(node.meta.get("val")))


if __name__ == "__main__":
    capability, most, *names = sys.argv[1:]
    prepared = [(CASES[name], traced(CASES[name]), graphs_of_calls(CASES[name])) for name in names]
    stand_in(int(capability))
    for name, binary in choosers(int(capability)):
        print(json.dumps(asdict(said("ours", name, binary))), flush=True)
    for name, (case, joint, calls) in zip(names, prepared, strict=True):
        kernels = list(sources([*partitioned(joint, case.policy), *calls]).items())
        chosen = random.sample(kernels, min(int(most) or len(kernels), len(kernels)))
        for kernel, source in chosen:
            print(json.dumps(asdict(said(name, kernel, compiled(source, kernel)))), flush=True)
