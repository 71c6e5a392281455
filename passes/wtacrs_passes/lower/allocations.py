"""What the code that Inductor generated holds at once: run with tensors that have no memory.

Inductor decides on the order, on what is computed where it is read and on which memory is used again after the passes
are done, so that a prediction from the graph is some tenths off. Its code says it all: each statement is executed on
the meta device, without the kernels, and what the variables hold is counted.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator, Mapping, Set
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..analyse.peaks import workspace


def peak_of_code(source: str, held: Set[str]) -> int | None:
    """Return the most bytes that a call of generated code holds at once; None where the code cannot be told.

    Args:
        source: a module that Inductor wrote, with functions `call` and `get_args`.
        held: the names of those inputs that live no longer than they are read; others are not counted.

    Sizes that vary are those of the example inputs.
    """
    functions = {node.name: node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)}
    if not {"call", "get_args"} <= functions.keys():
        return None  # of a C++ wrapper
    names = _names(functions["call"])
    try:
        with _Workspaces() as workspaces:  # type: ignore[no-untyped-call]
            names["args"] = _inputs(functions["get_args"])
            return _largest(functions["call"].body, names, held, workspaces)
    except (NotImplementedError, RuntimeError, TypeError, NameError, AttributeError):
        return None  # an operation without a kernel for the meta device


class _Workspaces(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What operations need beside their results: `bytes` of the last one."""

    bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.bytes = max(self.bytes, workspace(func, args))
        return func(*args, **kwargs or {})


class _NoKernel:
    """Stands for a kernel of a loop or of a library, which writes to what it is given."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        return None

    def __getattr__(self, name: str) -> Any:
        return self

    def __getitem__(self, key: Any) -> Any:
        return self

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


class _Library:
    """Calls of libraries: only those that return what they make allocate."""

    def __getattr__(self, name: str) -> Any:
        from torch._inductor.select_algorithm import extern_kernels

        def call(*args: Any, **kwargs: Any) -> Any:
            return None if "out" in kwargs else getattr(extern_kernels, name)(*args, **kwargs)

        return call


def _empty(size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device="meta")


def _view(x: Tensor, size: Any, stride: Any, offset: int = 0) -> Tensor:
    return torch.as_strided(x, size, stride, x.storage_offset() + offset)


def _rand_strided(size: Any, stride: Any, dtype: torch.dtype = torch.float32, **_: Any) -> Tensor:
    return _empty(size, stride, dtype)


_KNOWN: Mapping[str, Any] = {
    "torch": torch,
    "aten": torch.ops.aten,
    "inductor_ops": torch.ops.inductor,
    "_quantized": torch.ops._quantized,
    "extern_kernels": _Library(),
    "reinterpret_tensor": _view,
    "rand_strided": _rand_strided,
    "device": torch.device,
    "inf": float("inf"),
    "nan": float("nan"),
}


def _names(call: ast.FunctionDef) -> dict[str, Any]:
    """Return what the names of a function stand for."""
    assigned = {
        node.id for node in ast.walk(call) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    read = {
        node.id for node in ast.walk(call) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }
    others = {name: _NoKernel() for name in read - assigned - {"args"} if not hasattr(builtins, name)}
    empty = {name: _empty for name in read if name.startswith("empty_strided")}
    return {**others, **_KNOWN, **empty}


def _inputs(get_args: ast.FunctionDef) -> list[Any]:
    """Return example inputs."""
    body = [node for node in get_args.body if not isinstance(node, ast.Import | ast.ImportFrom)]
    returned = body[-1]
    assert isinstance(returned, ast.Return) and returned.value is not None
    names = dict(_KNOWN)
    exec(_code(body[:-1]), names)
    inputs: list[Any] = eval(compile(ast.Expression(returned.value), "inputs", "eval"), names)
    return inputs


def _largest(body: list[ast.stmt], names: dict[str, Any], held: Set[str], workspaces: _Workspaces) -> int:
    """Execute statements one by one; return the most bytes of storages that names hold after one of them."""
    known = {*names, "__builtins__"}
    largest = 0
    others: dict[str, Any] | None = None
    for statement in _flat(body):
        if isinstance(statement, ast.Return):
            break
        workspaces.bytes = 0
        exec(_code([statement]), names)
        if others is None and not names["args"]:
            # The inputs have their names now. While these are held no other storage has their address.
            others = {name: names[name] for name in set(names) - known - held}
            excluded = _storages(others, others.keys())
        if others is not None and isinstance(statement, ast.Assign | ast.Expr):
            live = _storages(names, names.keys() - known)
            size = sum(bytes for storage, bytes in live.items() if storage not in excluded)
            largest = max(largest, size + workspaces.bytes)
    return largest


def _flat(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield statements, those of a block such as ``with torch.cuda._DeviceGuard(0)`` one by one."""
    for statement in body:
        if isinstance(statement, ast.With):
            yield from _flat(statement.body)
        else:
            yield statement


def _code(body: list[ast.stmt]) -> Any:
    return compile(ast.Module(body, type_ignores=[]), "generated", "exec")


def _storages(names: Mapping[str, Any], chosen: Set[str]) -> dict[int, int]:
    """Return the bytes of each storage that chosen names hold."""
    found: dict[int, int] = {}
    for name in chosen:
        value = names[name]
        for x in value if isinstance(value, list | tuple) else (value,):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                found[storage._cdata] = storage.nbytes()
    return found
