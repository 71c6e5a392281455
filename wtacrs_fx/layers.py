"""Compile the layers of a model once, whatever their number."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from wtacrs_passes.graph import torch_api

_MARK = "_wtacrs_is_region"


def mark_layers(model: nn.Module, layers: Iterable[nn.Module] | None = None) -> tuple[str, ...]:
    """Mark layers that are alike as a region each, so that ``torch.compile`` compiles one of them for all.

    Compile time then does not grow with their number; bytes and gradients are those of the model compiled as a whole.
    Rests on ``torch.compiler.nested_compile_region``. `model` is changed in place: a layer's class becomes
    one derived from it, of the same name. Layers that differ in more than their weights are compiled apart.

    Args:
        layers: what is marked; by default all modules of one class in an ``nn.ModuleList`` or ``nn.Sequential`` of at
            least two such, where none of them is inside another.

    Returns:
        paths of the marked modules.

    Raises:
        RuntimeError: torch older than 2.13, which does not tell a compiler what the weights of a region are.
        ValueError: nothing to mark, a module that is not part of `model`, or one whose forward was replaced.
    """
    if not torch_api.describes_regions():
        raise RuntimeError(
            f"marked layers need torch >= 2.13, got {torch.__version__}; compile the model without marking them"
        )
    paths = {module: path for path, module in model.named_modules()}
    chosen = list(_repeated(model) if layers is None else layers)
    if not chosen:
        raise ValueError(
            "the model has no nn.ModuleList or nn.Sequential with two modules of one class; name the layers"
        )
    unknown = [module for module in chosen if module not in paths]
    if unknown:
        raise ValueError(f"layers must be modules of the model, got {type(unknown[0]).__name__}")
    for layer in chosen:
        if "forward" in vars(layer):
            raise ValueError(
                f"the forward of {paths[layer]} has been replaced; mark layers before other tools wrap them"
            )
        kind: Any = type(layer)
        if not hasattr(kind, _MARK):
            layer.__class__ = _marked(kind)
    return tuple(paths[layer] for layer in chosen)


@functools.cache
def _marked(kind: Any) -> Any:
    """Return a class of the same name whose forward is a region.

    The forward of an instance would not do: Dynamo hands the weights of the first layer to all of them (torch 2.13).
    """
    region = torch.compiler.nested_compile_region(_copy(kind.forward))
    return type(kind.__name__, (kind,), {"forward": region, "__module__": kind.__module__, _MARK: True})


def _copy(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of its own: PyTorch writes on it that it is a region."""

    @functools.wraps(function)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return forward


def _repeated(module: nn.Module) -> list[nn.Module]:
    """Return the outermost modules that stand in a list with others of their class and have parameters."""
    found = []
    children = list(module.children())
    for child in children:
        alike = [other for other in children if type(other) is type(child)]
        is_list = isinstance(module, nn.ModuleList | nn.Sequential)
        if is_list and len(alike) > 1 and any(True for _ in child.parameters()):
            found.append(child)
        else:
            found += _repeated(child)
    return found
