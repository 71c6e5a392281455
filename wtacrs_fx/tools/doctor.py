"""What this machine has for training with wtacrs, and whether it works here."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from wtacrs_passes.graph.torch_api import cache_dir
from wtacrs_passes.policy import Policy
from wtacrs_passes.rates import seconds

from ..backend import backend
from .circumstances import commit, processor

_SIZES = 2048, 512, 512
"""Rows and features of the product whose rates are measured."""


@dataclasses.dataclass(frozen=True)
class Line:
    """One thing that was looked at: its name, what was found, and whether training can do with it."""

    name: str
    found: str
    is_fine: bool = True


def examine() -> Iterator[Line]:
    """Yield what is found, quick things first; the last lines compile a small model and measure a product."""
    yield Line("python", f"{platform.python_version()}, {platform.system()} {platform.machine()}")
    yield Line("wtacrs-fx", _version("wtacrs-fx") + (f", commit {commit()}" if commit() != "unknown" else ""))
    yield Line("torch", torch.__version__)
    yield Line("transformers", _version("transformers"))
    has_gpu = torch.cuda.is_available()
    yield Line("triton", _version("triton"), importlib.util.find_spec("triton") is not None or not has_gpu)
    yield Line("processor", f"{processor('cpu')}, {torch.get_num_threads()} threads, {_capability()}")
    yield _gpus() if has_gpu else Line("GPU", "none that torch sees: code is made for the CPU")
    yield _compiler()
    yield _caches()
    names = torch._dynamo.list_backends(exclude_tags=())
    yield Line(
        "backend",
        "registered" if "wtacrs" in names else 'not found by torch.compile(backend="wtacrs")',
        "wtacrs" in names,
    )
    for device in ["cpu", *["cuda"] * has_gpu]:
        yield _attempt(f"a small model, {device}", lambda device=device: _compiles(device))  # type: ignore[misc]
        yield _attempt(f"products, {device}", lambda device=device: _products(device))  # type: ignore[misc]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _capability() -> str:
    return torch.backends.cpu.get_cpu_capability()


def _gpus() -> Line:
    names = [
        f"{torch.cuda.get_device_name(i)} ({'.'.join(map(str, torch.cuda.get_device_capability(i)))})"
        for i in range(torch.cuda.device_count())
    ]
    return Line("GPU", f"{', '.join(names)}; CUDA {torch.version.cuda}")


def _compiler() -> Line:
    name = os.environ.get("CXX") or "g++"
    path = shutil.which(name)
    if path is None:
        return Line(
            "C++ compiler",
            f"{name} is not found; Inductor makes C++ for CPUs, and for GPUs a launcher: install g++",
            False,
        )
    found = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    return Line("C++ compiler", (found.splitlines() or [name])[0])


def _caches() -> Line:
    folder = cache_dir()
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return Line("caches", f"cannot be written: {error}; set TORCHINDUCTOR_CACHE_DIR", False)
    return Line("caches", f"can be written, {shutil.disk_usage(folder).free / 2**30:.1f} GiB free")


def _attempt(name: str, look: Callable[[], Line]) -> Line:
    try:
        return dataclasses.replace(look(), name=name)
    except Exception as error:  # whatever it is, that is what is wrong with this machine
        reason = (str(error).strip().splitlines() or [""])[0]
        return Line(
            name, f"{type(error).__name__}: {reason}; WTACRS_STRICT=1 TORCHDYNAMO_VERBOSE=1 show where", False
        )


def _compiles(device: str) -> Line:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)).to(device)
    x = torch.randn(512, 64, device=device)

    def gradients(call: Any) -> torch.Tensor:
        model.zero_grad()
        call(x).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    exact, began = gradients(model), time.perf_counter()
    ours = backend(Policy(ratio=1.0), strict=True)
    found = gradients(torch.compile(model, backend=ours))
    took = time.perf_counter() - began
    error = float((found - exact).square().sum() / exact.square().sum())
    [report] = ours.reports
    before, after = report.saved_bytes_before, report.saved_bytes_after
    share = after / before if isinstance(before, int) and isinstance(after, int) else float("nan")
    saves = f"compiled in {took:.0f} s; saves {share:.2f} of Inductor's bytes"
    return Line("", f"{saves}; gradients differ by {error:.1g} of their square", error < 0.01)


def _products(device: str) -> Line:
    rows, m, n = _SIZES
    texts = []
    for dtype in (torch.float32, torch.bfloat16):
        asked = ["exact", *(["bfloat16"] if dtype == torch.float32 else []), "int8"]
        rates = seconds(asked, rows, m, n, dtype, torch.device(device))
        best = min(rates, key=rates.__getitem__)
        others = ", ".join(f"{name} {rates[name] / rates['exact']:.2f}" for name in asked[1:])
        texts.append(
            f"{str(dtype).removeprefix('torch.')}: {best} is fastest ({others} of the exact one's time)"
        )
    return Line("", f"X^T dY, {rows} rows, {m} x {n}; " + "; ".join(texts))
