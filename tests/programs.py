"""Small programs as data: steps over a growing list of values, all of one shape, and how to run them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Parts(NamedTuple):
    """What an operation may use: a layer of its own, masks of [rows, features] and [rows, rows]."""

    layer: Callable[[Tensor], Tensor]
    mask: Tensor
    causal: Tensor


Operation = Callable[[Parts, Tensor, Tensor], Tensor]
"""``(parts, x, y) -> [rows, features]``; x and y have that shape, and may be the same."""


@dataclasses.dataclass(frozen=True)
class Step:
    """An operation on two of the values so far, counted from the newest, 0; x is not the input, y may be."""

    operation: str
    x: int = 0
    y: int = 0


@dataclasses.dataclass(frozen=True)
class Program:
    """What is computed, and how gradients are asked for.

    Attributes:
        steps: the values start with the input and a linear layer of it.
        outputs: the newest values, this many.
        backward: ``once``, ``retained``: twice through one forward pass, or ``accumulated`` over two of them.
        input_gradient: whether the input requires one.
    """

    rows: int
    features: int
    steps: tuple[Step, ...]
    outputs: int = 1
    backward: str = "once"
    input_gradient: bool = False


class Machine(nn.Module):
    """Run a program: [rows, features] to a tuple of such tensors."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        rows, features = program.rows, program.features
        self.program = program
        self.first = nn.Linear(features, features)
        self.layers = nn.ModuleList(_layer(step.operation, features) for step in program.steps)
        mask = torch.rand(rows, features) < 0.7
        mask[:, 0] = True  # a row of which nothing is left has no softmax
        self.register_buffer("mask", mask)
        self.register_buffer("causal", torch.ones(rows, rows, dtype=torch.bool).tril())

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values = [x, self.first(x)]
        for step, layer in zip(self.program.steps, self.layers, strict=True):
            x, y = _newest(values[1:], step.x), _newest(values, step.y)
            values.append(OPERATIONS[step.operation](Parts(layer, self.mask, self.causal), x, y))
        return tuple(values[1:][-self.program.outputs :])


def _newest(values: Sequence[Tensor], index: int) -> Tensor:
    return values[-1 - index % len(values)]


def _layer(operation: str, features: int) -> nn.Module:
    if operation not in ("linear", "bilinear", "concatenated"):
        return nn.Identity()
    return nn.Linear(2 * features if operation == "concatenated" else features, features)


def _in_place(m: Parts, x: Tensor, y: Tensor) -> Tensor:
    x = x.clone()
    x.add_(y)
    x.mul_(0.5)
    return x.tanh_()


def _part_in_place(m: Parts, x: Tensor, y: Tensor) -> Tensor:
    x = x.clone()
    x[:, ::2].mul_(y[:, ::2])
    return x


def _gated(m: Parts, x: Tensor, y: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([F.silu(a) * b, y.chunk(2, -1)[0]], -1)


def _attention(m: Parts, x: Tensor, y: Tensor) -> Tensor:
    scores = x @ y.T / x.shape[-1] ** 0.5
    return scores.masked_fill(~m.causal, -torch.inf).softmax(-1) @ x


def _heads(m: Parts, x: Tensor, y: Tensor) -> Tensor:
    q, k = (v.unflatten(-1, (2, -1)).transpose(0, 1)[None] for v in (x, y))
    return F.scaled_dot_product_attention(q, k, q, is_causal=True)[0].transpose(0, 1).flatten(1)


OPERATIONS: dict[str, Operation] = {
    # products
    "linear": lambda m, x, y: m.layer(x),
    "bilinear": lambda m, x, y: m.layer(x) * y,
    "concatenated": lambda m, x, y: m.layer(torch.cat([x, y], -1)),
    "attention": _attention,
    "heads": _heads,
    # one value each
    "gelu": lambda m, x, y: F.gelu(x),
    "gelu_tanh": lambda m, x, y: F.gelu(x, approximate="tanh"),
    "silu": lambda m, x, y: F.silu(x),
    "relu": lambda m, x, y: F.relu(x),
    "relu_squared": lambda m, x, y: F.relu(x).square(),
    "elu": lambda m, x, y: F.elu(x),
    "tanh": lambda m, x, y: x.tanh(),
    "sigmoid": lambda m, x, y: x.sigmoid(),
    "softplus": lambda m, x, y: F.softplus(x),
    "log_sigmoid": lambda m, x, y: F.logsigmoid(x),
    "sin": lambda m, x, y: x.sin(),
    "exp": lambda m, x, y: x.tanh().exp(),
    "square": lambda m, x, y: x.square(),
    "root": lambda m, x, y: (1 + x.square()).sqrt(),
    "logarithm": lambda m, x, y: x.abs().log1p(),
    "quotient": lambda m, x, y: x / (1 + y.square()),
    "clamped": lambda m, x, y: x.clamp(-1, 1),
    "large": lambda m, x, y: 20 * x,
    "shifted": lambda m, x, y: x + 5,
    # two values
    "sum": lambda m, x, y: x + y,
    "product": lambda m, x, y: x * y,
    "maximum": lambda m, x, y: torch.maximum(x, y),
    # masks
    "masked": lambda m, x, y: x.where(m.mask, 0),
    "chosen": lambda m, x, y: x.where(m.mask, y),
    "minus_infinity": lambda m, x, y: x.masked_fill(~m.mask, -torch.inf).softmax(-1),
    "very_negative": lambda m, x, y: x.masked_fill(~m.mask, -1e4).softmax(-1),
    "negative_gate": lambda m, x, y: x.masked_fill(~m.mask, -1e4).sigmoid() * y,
    # reductions
    "softmax": lambda m, x, y: x.softmax(-1),
    "log_softmax": lambda m, x, y: x.log_softmax(-1),
    "layer_norm": lambda m, x, y: F.layer_norm(x, x.shape[-1:]),
    "rms_norm": lambda m, x, y: x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt(),
    "logsumexp": lambda m, x, y: y - x.logsumexp(-1, keepdim=True),
    "centred": lambda m, x, y: x - x.mean(0),
    "scaled_by_sum": lambda m, x, y: y * x.sum(-1, keepdim=True) / x.shape[-1],
    "less_maximum": lambda m, x, y: x - x.amax(-1, keepdim=True),
    # places
    "transposed": lambda m, x, y: x.T.tanh().T,
    "reshaped": lambda m, x, y: x.reshape(-1, x.shape[0]).square().reshape(x.shape),
    "halves": lambda m, x, y: torch.cat([*reversed(x.chunk(2, -1))], -1).sin(),
    "gated": _gated,
    "expanded": lambda m, x, y: x * y[:1].expand_as(x),
    "detached": lambda m, x, y: x * y.detach(),
    "in_place": _in_place,
    "part_in_place": _part_in_place,
}


def gradients(program: Program, machine: Machine, call: Callable[[Tensor], tuple[Tensor, ...]]) -> Tensor:
    """Run a program and ask for its gradients, of the parameters and of the input, one after the other."""
    machine.zero_grad()
    dtype = machine.first.weight.dtype
    random = torch.Generator().manual_seed(0)
    shape = (program.rows, program.features)

    def draw() -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float32).to(dtype)

    wanted = list(machine.parameters())
    for _ in range(2 if program.backward == "accumulated" else 1):
        x = draw().requires_grad_(program.input_gradient)
        outputs = call(x * 1 if program.input_gradient else x)
        loss = sum(((output * draw()).sum() for output in outputs), torch.zeros((), dtype=dtype))
        loss.backward(retain_graph=program.backward == "retained")
        if program.backward == "retained":
            loss.backward()
        wanted += [x] * program.input_gradient
    return torch.cat([(torch.zeros_like(v) if v.grad is None else v.grad).flatten() for v in wanted])
