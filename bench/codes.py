"""Error of what the backward pass reads, on real text, by how few bits are laid out: scales, codes, rotations.

    python -m bench.codes
    python -m bench.codes --quick                 # short texts: does it run? keeps no rows

For each kind of residual of SmolLM2 (8 x 256 tokens) and MiniLM (32 x 48), ``||x' - x||^2 / ||x||^2`` of 512 of its
rows, the median over some layers. All variants of so many bits store the same bytes. Beside integers in steps of a
group's peak, which the product stores:

- ``least squares``: the step of each group is the best of 24 by its squared error, so that peaks may be cut off;
- ``codes for a normal``: 16 numbers with the least error where elements are normal, over the peak of their group
  (Lloyd 1982), as NF4 has others (Dettmers et al. 2023, arXiv 2305.14314);
- ``rotated``: signs and a Hadamard matrix are applied to each group before, so that a large element is spread over all
  (Chee et al. 2023, arXiv 2307.13304).
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

from bench.accuracy import WORDNET
from bench.estimators import MODELS, load_model
from bench.harness import Row, circumstances, record
from wtacrs_passes.maths.encodings import dequantise, group_size, quantise

KINDS = {
    "input_layernorm": "input of a norm",
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "gate_proj": "gate",
    "up_proj": "up",
    "query": "q",
    "key": "k",
    "value": "v",
    "intermediate.dense": "before GELU",
}
"""Of modules by the end of their path: what their outputs are, or for a norm its input."""

ROWS = 512
LAYERS_SHOWN = (0, 2, 5, 15, 29)

Code = Callable[[Tensor], Tensor]
"""What encodes groups [..., group], float32, and decodes them."""


def in_steps_of_peaks(bits: int) -> Code:
    """Return what the product stores."""

    def code(groups: Tensor) -> Tensor:
        x = groups.flatten(-2)
        return dequantise(*quantise(x, bits=bits), bits=bits, features=x.shape[-1], dtype=x.dtype).view_as(
            groups
        )

    return code


def by_least_squares(bits: int) -> Code:
    """Return integers whose step is the best of 24 for each group."""
    largest = 2 ** (bits - 1) - 1

    def code(groups: Tensor) -> Tensor:
        peaks = groups.abs().amax(-1, keepdim=True).clamp(min=1e-30)
        best, least = groups, torch.full_like(peaks, torch.inf)
        for share in torch.linspace(0.54, 1.0, 24):
            step = share * peaks / largest
            decoded = (groups / step).round().clamp(-largest, largest) * step
            error = (decoded - groups).square().sum(-1, keepdim=True)
            best = torch.where(error < least, decoded, best)
            least = torch.minimum(error, least)
        return best

    return code


@cache
def codes_for_a_normal(bits: int, group: int) -> Tensor:
    """Return the numbers in [-1, 1] with the least squared error of normal elements over the peak of their group."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.randn(20_000, group, generator=generator)
    x = (groups / groups.abs().amax(-1, keepdim=True)).flatten().sort().values
    codes = x[torch.linspace(0, len(x) - 1, 2**bits).long()].clone()
    for _ in range(200):
        ends = torch.searchsorted(x, (codes[1:] + codes[:-1]) / 2)
        codes = torch.stack([part.mean() for part in torch.tensor_split(x, ends)])
    return codes


def by_codes(bits: int) -> Code:
    """Return the nearest of :func:`codes_for_a_normal`, over the peak of the group."""

    def code(groups: Tensor) -> Tensor:
        codes = codes_for_a_normal(bits, groups.shape[-1])
        peaks = groups.abs().amax(-1, keepdim=True).clamp(min=1e-30)
        nearest: Tensor = codes[torch.bucketize(groups / peaks, (codes[1:] + codes[:-1]) / 2)]
        return nearest * peaks

    return code


def rotated(code: Code) -> Code:
    """Return a code of groups that are rotated before and turned back behind it."""

    def turned(groups: Tensor) -> Tensor:
        size = groups.shape[-1]
        matrix = torch.ones(1, 1)
        while len(matrix) < size:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        signs = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(0)) * 2 - 1
        matrix = signs.unsqueeze(-1) * matrix / size**0.5
        return code(groups @ matrix) @ matrix.T

    return turned


CODES: dict[str, tuple[int, Code]] = {
    f"{bits} bits{name}": (bits, code)
    for bits in (6, 4)
    for name, code in {
        "": in_steps_of_peaks(bits),
        ", least squares": by_least_squares(bits),
        ", codes for a normal": by_codes(bits),
        ", rotated": rotated(in_steps_of_peaks(bits)),
        ", rotated, least squares": rotated(by_least_squares(bits)),
        ", rotated, codes for a normal": rotated(by_codes(bits)),
    }.items()
}


def residuals(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    """Return tensors of each kind [rows, features], as a forward pass makes them."""
    found: dict[str, list[Tensor]] = {}

    def keep(kind: str, is_input: bool) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            value = inputs[0] if is_input else output
            rows = value.detach().flatten(0, -2).float()
            found.setdefault(kind, []).append(rows[:: max(1, len(rows) // ROWS)])

        return hook

    handles = [
        module.register_forward_hook(keep(kind, end == "input_layernorm"))
        for path, module in model.named_modules()
        for end, kind in KINDS.items()
        if path.endswith(end) and (layer := re.search(r"\.(\d+)\.", path)) and int(layer[1]) in LAYERS_SHOWN
    ]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return found


def rows(name: str, quick: bool, wordnet: Path) -> list[Row]:
    """Return the error of each code, with the ratio to that of steps of peaks."""
    model, batches, _ = load_model(name, quick, wordnet)
    kinds = residuals(model, next(batches))
    errors = {
        (variant, kind): statistics.median(error(x, bits, code) for x in tensors)
        for variant, (bits, code) in CODES.items()
        for kind, tensors in kinds.items()
    }
    return [
        Row(
            "codes", name, variant, kind, value, "1", value / errors[variant.split(",")[0], kind],
            shapes=f"{len(kinds[kind])} tensors of {len(kinds[kind][0])} rows", **circumstances(),
        )
        for (variant, kind), value in errors.items()
    ]  # fmt: skip


def error(x: Tensor, bits: int, code: Code) -> float:
    """Return the squared error of what is decoded, over the square of all."""
    groups = x.unflatten(-1, (-1, group_size(x.shape[-1], bits)))  # type: ignore[no-untyped-call]
    return float((code(groups) - groups).square().sum() / groups.square().sum())


def main(
    model: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(MODELS)}; all by default.")] = None,
    wordnet: Path = WORDNET,
    quick: Annotated[bool, typer.Option(help="Short texts; keep no rows.")] = False,
) -> None:
    """Measure every code; append rows to bench/results."""
    for name in model or MODELS:
        record(rows(name, quick, wordnet), keep=not quick)


if __name__ == "__main__":
    typer.run(main)
