"""Speed of encoding and decoding in generated code, beside a copy of the same tensor.

    python -m bench.encodings                          # bfloat16 and float32
    python -m bench.encodings --device cuda
    python -m bench.encodings --quick                  # a tiny tensor: does it run? keeps no rows

The ratio is to the speed of memory: bytes that are read and written in a second, over those of a copy. Where it is 1 an
encoding takes what its bytes take. The tensor has the size of a feed-forward activation of a layer in the regime.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from bench.harness import Row, circumstances, record, summarise
from wtacrs_fx.tools import measure
from wtacrs_fx.tools.steps import interleave
from wtacrs_passes.maths import encodings
from wtacrs_passes.maths.tables import tabulate

SHAPE, TINY = (4096, 1536), (8, 64)
PRECISIONS = {"bfloat16": torch.bfloat16, "float32": torch.float32}
COPY = "copy"

Function = Callable[..., Any]


def copy(x: Tensor) -> Tensor:
    return x.clone()


def pairs(features: int, dtype: torch.dtype) -> dict[str, tuple[Function, Function]]:
    """Return, for each encoding, what encodes a tensor and what decodes that."""
    table = tabulate(
        lambda x: torch.sigmoid(x) * (1 + x * (1 - torch.sigmoid(x))), 3
    )  # the derivative of SiLU
    assert table is not None
    found: dict[str, tuple[Function, Function]] = {
        name: (
            partial(encodings.quantise, bits=bits),
            partial(encodings.dequantise, bits=bits, features=features, dtype=dtype),
        )
        for name, bits in encodings.INTEGER_BITS.items()
    }
    found["table"] = (
        partial(encodings.encode_table, table=table),
        partial(encodings.decode_table, table=table, features=features, dtype=dtype),
    )
    return found


class Loop:
    """A compiled function of tensors, and the bytes that it reads and writes at least."""

    def __init__(self, function: Function, *operands: Tensor) -> None:
        def called(*given: Tensor) -> tuple[Tensor, ...]:
            result = function(*given)
            return result if isinstance(result, tuple) else (result,)

        self.operands = operands
        self.function = torch.compile(called, fullgraph=True, dynamic=False)
        with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=64):  # of one code object, `called`
            self.results = self.function(*operands)
        self.bytes = sum(x.nbytes for x in (*operands, *self.results))

    def __call__(self) -> None:
        with torch.no_grad():
            self.function(*self.operands)

    def bytes_a_second(self, calls: int) -> float:
        """Return what a run of calls reaches."""

        def run() -> None:
            for _ in range(calls):
                self()

        return self.bytes * calls / measure.step_seconds(run, self.operands[0].device)


def loops(shape: tuple[int, int], precision: str, device: str) -> dict[str, Loop]:
    """Return a copy, and both ways of each encoding."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, PRECISIONS[precision])
    found = {COPY: Loop(copy, x)}
    for name, (encode, decode) in pairs(shape[1], x.dtype).items():
        found[f"{name}, encode"] = Loop(encode, x)
        found[f"{name}, decode"] = Loop(decode, *found[f"{name}, encode"].results)
    return found


def rows(shape: tuple[int, int], precision: str, device: str, rounds: int, calls: int) -> list[Row]:
    """Return the speed of each, with the ratio to the copy."""
    found = loops(shape, precision, device)
    speeds = interleave({name: partial(loop.bytes_a_second, calls) for name, loop in found.items()}, rounds)
    return [
        Row(
            "encodings", "one tensor", name, "speed", unit="B/s", shapes=f"{shape[0]}x{shape[1]}", dtype=precision,
            **summarise(values, speeds[COPY]), **circumstances(device),
        )
        for name, values in speeds.items()
    ]  # fmt: skip


def main(
    device: str = "cpu",
    rounds: int = 15,
    calls: Annotated[int, typer.Option(help="Of a function in each round.")] = 10,
    quick: Annotated[bool, typer.Option(help="A tiny tensor; keep no rows.")] = False,
) -> None:
    """Measure every encoding; append rows to bench/results."""
    for precision in PRECISIONS:
        record(
            rows(TINY if quick else SHAPE, precision, device, 2 if quick else rounds, calls), keep=not quick
        )


if __name__ == "__main__":
    typer.run(main)
