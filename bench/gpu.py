"""Memory and time of training steps on a CUDA device, in bfloat16, at the sizes of well-known models.

    python -m bench.gpu                       # under 8 minutes; correctness first
    python -m bench.gpu --case gpt2-medium --layers 24

Each case is a stack of `--layers` layers of the model's real width (compiling all 24 would take the minutes),
so ratios are those of the layers; the largest batch is computed for the real depth from the bytes that one
layer was seen to hold. Without a CUDA device every figure is recorded as not measured.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from transformers import LlamaConfig, LlamaModel

from bench.harness import BASELINE, MIB, RESULTS, VARIANTS, Row, circumstances, compare, record, summarise
from bench.models import VOCABULARY, DistanceToTarget, Shape, make
from wtacrs_fx.tools.predict import CARDS, largest_batch, state_bytes
from wtacrs_fx.tools.steps import Step, interleave
from wtacrs_passes.maths import ops
from wtacrs_passes.maths.estimators import NOISE

SHOWN = (BASELINE, "inductor budget 0.9", "wtacrs 0.3 balanced", "wtacrs 0.1 balanced")
CHOOSER_ROWS = (2048, 16384, 1_000_000)
PRODUCTS = ((8192, 2048, 2048), (8192, 8192, 2048), (8192, 2048, 8192), (16384, 8192, 2048))  # N, out, in
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Case:
    """A model's width and batch; `depth` is that of the real model."""

    model: str
    d: int
    heads: int
    depth: int
    batch: int
    seq: int

    def make(self, layers: int, device: str, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Tensor]]:
        """Return the model in training mode and a batch."""
        shape = Shape(layers, self.d, self.heads, self.batch, self.seq)
        if self.model != "llama-3.2":
            return make(self.model, shape, dtype, device)
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=self.d,
            num_hidden_layers=layers,
            num_attention_heads=self.heads,
            num_key_value_heads=max(1, self.heads // 4),
            intermediate_size=4 * self.d,
            max_position_embeddings=self.seq,
            use_cache=False,
            attn_implementation="sdpa",
        )
        model = DistanceToTarget(LlamaModel(config)).to(device, dtype).train()
        tokens = torch.randint(VOCABULARY, (self.batch, self.seq), device=device)
        target = torch.randn(self.batch, self.seq, self.d, device=device, dtype=dtype)
        return model, {"input_ids": tokens, "target": target}


CASES = {
    "llama-3.2-1b, 8x1024": Case("llama-3.2", 2048, 32, 16, 8, 1024),
    "llama-3.2-1b, 4x4096": Case("llama-3.2", 2048, 32, 16, 4, 4096),
    "bert-large, 64x128": Case("bert", 1024, 16, 24, 64, 128),
    "gpt2-medium, 16x512": Case("gpt2", 1024, 16, 24, 16, 512),
    "t5-large encoder, 64x128": Case("t5", 1024, 16, 24, 64, 128),
}
TINY = Case("llama-3.2", 64, 2, 2, 4, 64)


def relative_error(step: Step, exact: Step, runs: int) -> float:
    """Return the squared error of the mean gradient of some steps over the squared norm of the exact one."""
    mean = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in step.model.named_parameters()}
    for _ in range(runs):
        step()
        for name, parameter in step.model.named_parameters():
            assert parameter.grad is not None
            mean[name] += parameter.grad.float() / runs
    error = total = 0.0
    for name, parameter in exact.model.named_parameters():
        assert parameter.grad is not None
        error += float((mean[name] - parameter.grad.float()).square().sum())
        total += float(parameter.grad.float().square().sum())
    return error / total


def measure(
    name: str,
    case: Case,
    layers: int,
    device: str,
    dtype: torch.dtype,
    variants: tuple[str, ...],
    rounds: int,
) -> list[Row]:
    """Return all figures of one case; raise if gradients are not those of Inductor but for noise."""
    model, inputs = case.make(layers, device, dtype)
    steps = {}
    for variant in variants:
        steps[variant] = Step(model, inputs, VARIANTS[variant]())
        print(f"{name}, {variant}: compiled in {steps[variant].first_call_seconds:.0f} s", flush=True)
    shapes = f"layers={layers} d={case.d} heads={case.heads} batch={case.batch} seq={case.seq}"

    def row(variant: str, metric: str, unit: str, **figures: Any) -> Row:
        precision = str(dtype).removeprefix("torch.")
        return Row(
            "gpu", name, variant, metric, unit=unit, shapes=shapes, dtype=precision, **figures,
            **circumstances(device),
        )  # fmt: skip

    rows, own = [], 0.0  # Inductor's own error: dropout
    steps[BASELINE]()
    for variant, step in steps.items():
        error = relative_error(step, steps[BASELINE], 4)
        own = error if variant == BASELINE else own
        rows.append(row(variant, "squared error of the mean of 4 gradients", "1", value=error))
        if not error < 1 + 2 * own:
            raise RuntimeError(f"{name}, {variant}: the gradient is off by {error:.3g} of its squared norm")
    gradients = sum(parameter.nbytes for parameter in model.parameters())
    parameters = sum(p.numel() for p in model.parameters()) / layers * case.depth  # embeddings are small here
    state = state_bytes(parameters, torch.bfloat16.itemsize)
    batches: dict[tuple[str, int], int] = {}
    for variant, figures in compare(steps, rounds).items():
        rows += [row(variant, metric, unit, **figure) for metric, unit, figure in figures]
        saved, peak = (figure["value"] * MIB for _, _, figure in figures[:2])
        sample = max(peak - gradients, saved) / layers * case.depth / case.batch
        for card in CARDS:
            batches[variant, card] = most = largest_batch(card, state, sample)
            ratio = most / max(1, batches[BASELINE, card])
            rows.append(row(variant, f"largest batch, {card} GB", "1", value=most, ratio=ratio))
    return rows


def chooser(device: str, rounds: int) -> list[Row]:
    """Return the time of choosing 0.3 of N rows."""
    found = []
    for rows in CHOOSER_ROWS:
        factors = [torch.rand(rows, device=device).exp() for _ in range(2)]
        noise = torch.rand(NOISE, device=device)
        call = partial(ops.choose_rows, factors, noise, int(0.3 * rows), "wta-systematic")
        times = [seconds(call, device) for _ in range(rounds + 3)][3:]
        found.append(
            Row(
                "gpu",
                "chooser",
                f"{rows} rows",
                "time",
                unit="s",
                **summarise(times),
                **circumstances(device),
            )
        )
    return found


def products(device: str, rounds: int) -> list[Row]:
    """Return the time of dY[indices].T X for 0.3 of the rows: gathered for cuBLAS, or within one kernel."""
    found = []
    for count, outs, ins in PRODUCTS:
        dy = torch.randn(count, outs, device=device, dtype=torch.bfloat16)
        x = torch.randn(int(0.3 * count), ins, device=device, dtype=torch.bfloat16)
        indices = torch.randperm(count, device=device)[: len(x)].sort().values
        operands = dy, indices, x
        ways = {"gather, cuBLAS": partial(ops.gather_and_multiply, *operands)}
        if device == "cuda":
            from wtacrs_passes.maths import triton_kernels

            for tile in triton_kernels.TILES:
                ways[f"one kernel {tile}"] = partial(triton_kernels.gathered_product, *operands, tile=tile)
        times = interleave({way: partial(seconds, call, device) for way, call in ways.items()}, rounds)
        found += [
            Row(
                "gpu", f"product {count} x {outs} x {ins}", way, "time", unit="s", dtype="bfloat16",
                **summarise(times[way], times["gather, cuBLAS"]), **circumstances(device),
            )
            for way in ways
        ]  # fmt: skip
    return found


def seconds(call: Callable[[], object], device: str, repetitions: int = 20) -> float:
    """Return the time of one call among some that follow each other, without the host's share on CUDA."""
    if device == "cpu":
        return Timer("call()", globals={"call": call}).timeit(repetitions).mean
    call()  # compiled before it is captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repetitions):
            call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repetitions


def not_measured() -> list[Row]:
    """Return a row without a value for each case."""
    return [
        Row("gpu", name, NOT_MEASURED, "step time", math.nan, "s", dtype="bfloat16", **circumstances("cuda"))
        for name in (*CASES, "chooser", *(f"product {n} x {out} x {in_}" for n, out, in_ in PRODUCTS))
    ]


def main(
    case: Annotated[list[str] | None, typer.Option(help="Part of a case's name; all by default.")] = None,
    variant: Annotated[list[str] | None, typer.Option(help=f"Any of {', '.join(VARIANTS)}.")] = None,
    layers: Annotated[int, typer.Option(help="Layers that are compiled and run.")] = 3,
    rounds: int = 15,
    tests: Annotated[bool, typer.Option(help="Run the tests that need CUDA first.")] = True,
    quick: Annotated[bool, typer.Option(help="A tiny case on any device; keep no rows.")] = False,
) -> None:
    """Measure on the CUDA device; append rows to bench/results."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    variants = tuple(name for name in VARIANTS if name in {BASELINE, *(variant or SHOWN)})
    if quick:
        rows = measure("tiny", TINY, 2, device, torch.float32, variants, 2)
        record([*rows, *chooser(device, 2)], keep=False)
        return
    if device == "cpu":
        record([*not_measured(), *chooser(device, rounds)], keep=True)
        return
    if tests:
        files = ["tests/test_cuda.py", "tests/test_triton_kernels.py"]
        subprocess.run([sys.executable, "-m", "pytest", "-q", *files], cwd=RESULTS.parents[1], check=True)
    record([*chooser(device, rounds), *products(device, rounds)], keep=True)
    for name, one in CASES.items():
        if not case or any(part in name for part in case):
            record(measure(name, one, layers, device, torch.bfloat16, variants, rounds), keep=True)
            torch._dynamo.reset()  # the steps of a case are compiled and measured before those of the next
            torch.cuda.empty_cache()


if __name__ == "__main__":
    typer.run(main)
