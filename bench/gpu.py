"""Memory and time of training steps on a CUDA device, at the sizes of well-known models.

    python -m bench.gpu                       # about 6 minutes on 16 cores; tests first
    python -m bench.gpu --case llama --layers 16

First the regime that people train in: a language model with its loss over its real vocabulary, under autocast.
Each case is a stack of `--layers` layers of the model's real width (compiling all 24 would take the minutes),
so ratios are those of the layers and the head; without a head, the largest batch is computed for the real depth
from the bytes that one layer was seen to hold. All cases compile at once, each in a process of its own; then one
after the other measures, alone on the device. Without a CUDA device every figure is recorded as not measured.
"""

from __future__ import annotations

import math
import multiprocessing
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.utils.benchmark import Timer

import wtacrs_fx
from bench import regime
from bench.frontier import CHECKPOINTING, checkpoint
from bench.harness import (
    BASELINE,
    BUDGET,
    MIB,
    RESULTS,
    Row,
    circumstances,
    compare,
    record,
    settle,
    summarise,
)
from bench.models import TINY, WORDS, Shape, build
from wtacrs_fx import Policy
from wtacrs_fx.tools.predict import CARDS, largest_batch, state_bytes
from wtacrs_fx.tools.steps import Step
from wtacrs_passes.maths import ops
from wtacrs_passes.maths.estimators import NOISE

PARTS = {f"wtacrs, {size} MiB of logits": Policy(ratio=0.3, chunk_bytes=size * 2**20) for size in (64, 256)}
"""What a head alone is measured with beside the default."""
ALL = (BASELINE, "inductor budget 0.9", "inductor budget 0.5", CHECKPOINTING, *regime.POLICIES)
FEW = (BASELINE, "inductor budget 0.9", *regime.POLICIES)
CHOOSER_ROWS = (2048, 16384, 1_000_000)
NOT_MEASURED = "not measured"
PROFILED = 3  # steps
COMPILED_WITHIN = 300  # seconds; the cases that are not wait for their turn no longer


@dataclass(frozen=True)
class Case:
    """A model of `bench.models`, its width and its batch; `depth` is that of the real model, 0 of a head alone."""

    model: str
    precision: str
    d: int
    heads: int
    depth: int
    batch: int
    seq: int
    variants: tuple[str, ...] = FEW

    def make(self, layers: int, device: str) -> tuple[nn.Module, dict[str, Tensor]]:
        """Return the model in training mode and a batch."""
        return build(
            self.model, Shape(layers, self.d, self.heads, self.batch, self.seq), self.precision, device
        )


CASES = {
    "llama-3.2-1b with head, 8x1024, autocast": Case("llama-3.2-lm", "autocast", 2048, 32, 16, 8, 1024, ALL),
    "llama-3.2-1b with head, 8x1024, bfloat16": Case("llama-3.2-lm", "bfloat16", 2048, 32, 16, 8, 1024),
    "llama-3.2-1b with head, 2x4096, autocast": Case("llama-3.2-lm", "autocast", 2048, 32, 16, 2, 4096),
    "head of llama-3.2-1b, 8x1024, autocast": Case(
        "head", "autocast", 2048, 32, 0, 8, 1024, (BASELINE, *regime.POLICIES, *PARTS)
    ),
    "bert-large with head, 64x128, autocast": Case("bert-lm", "autocast", 1024, 16, 24, 64, 128),
    "bert-large, 64x128, bfloat16": Case("bert", "bfloat16", 1024, 16, 24, 64, 128),
    "gpt2-medium, 16x512, bfloat16": Case("gpt2", "bfloat16", 1024, 16, 24, 16, 512),
    "t5-large encoder, 64x128, bfloat16": Case("t5", "bfloat16", 1024, 16, 24, 64, 128),
}


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


def compile_all(
    name: str, case: Case, layers: int, device: str, variants: tuple[str, ...]
) -> dict[str, Step]:
    """Return a compiled step for each variant."""
    steps = {}
    for variant in variants:
        model, inputs = case.make(layers, device)
        if variant == CHECKPOINTING:
            checkpoint(model)
        compiler = wtacrs_fx.backend(PARTS[variant]) if variant in PARTS else regime.compiler(variant)
        steps[variant] = Step(model, inputs, compiler)
        print(f"{name}, {variant}: compiled in {steps[variant].first_call_seconds:.0f} s", flush=True)
        if variant == BUDGET:
            settle(steps[variant])
    return steps


def measure(
    name: str, case: Case, layers: int, device: str, steps: dict[str, Step], rounds: int
) -> list[Row]:
    """Return all figures of one case; raise if gradients are not those of Inductor but for noise."""
    shapes = f"layers={layers if case.depth else 0} d={case.d} heads={case.heads} batch={case.batch} seq={case.seq}"

    def row(variant: str, metric: str, unit: str, **figures: Any) -> Row:
        return Row(
            "gpu", name, variant, metric, unit=unit, shapes=shapes, dtype=case.precision, **figures,
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
    model = steps[BASELINE].model
    gradients = sum(parameter.nbytes for parameter in model.parameters())
    parameters = sum(p.numel() for p in model.parameters()) / layers * case.depth  # embeddings are small here
    state = state_bytes(parameters, torch.bfloat16.itemsize)
    batches: dict[tuple[str, int], int] = {}
    for variant, figures in compare(steps, rounds).items():
        rows += [row(variant, metric, unit, **figure) for metric, unit, figure in figures]
        if case.model in WORDS:  # whose peak is the head's, which is not repeated with depth
            continue
        saved, peak = (figure["value"] * MIB for _, _, figure in figures[:2])
        sample = max(peak - gradients, saved) / layers * case.depth / case.batch
        for card in CARDS:
            batches[variant, card] = most = largest_batch(card, state, sample)
            ratio = most / max(1, batches[BASELINE, card])
            rows.append(row(variant, f"largest batch, {card} GB", "1", value=most, ratio=ratio))
    return rows


def kernels_of(step: Step) -> list[tuple[float, float, str]]:
    """Return the kernels of a step, by time: seconds of all their calls, calls, name."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as found:
        for _ in range(PROFILED):
            step()
        torch.cuda.synchronize()
    kernels = [
        (kernel.self_device_time_total / 1e6 / PROFILED, kernel.count / PROFILED, kernel.key)
        for kernel in found.key_averages()
    ]
    return sorted(kernels, reverse=True)


def kernel_times(
    name: str, case: Case, steps: dict[str, Step], shapes: str, folder: Path | None
) -> list[Row]:
    """Return the time of all kernels of a step of each variant: what is left where the host is fast enough.

    Args:
        folder: where the kernels are listed, in a file of the case.
    """
    kernels = {variant: kernels_of(step) for variant, step in steps.items()}
    totals = {variant: sum(seconds for seconds, _, _ in found) for variant, found in kernels.items()}
    if folder:
        folder.mkdir(exist_ok=True, parents=True)
        lines = []
        for variant, found in kernels.items():
            lines.append(f"\n{variant}: {1e3 * totals[variant]:.2f} ms of kernels a step")
            lines += [f"{1e3 * time:8.3f} ms {count:6.1f} x {key[:140]}" for time, count, key in found[:40]]
        (folder / f"{re.sub(r'[^a-z0-9.]+', '-', name)}.txt").write_text("\n".join(lines))
    return [
        Row(
            "gpu", name, variant, "kernel time", total, "s", total / totals[BASELINE], rounds=PROFILED,
            shapes=shapes, dtype=case.precision, **circumstances("cuda"),
        )
        for variant, total in totals.items()
    ]  # fmt: skip


def run_case(
    name: str,
    layers: int,
    rounds: int,
    variants: list[str],
    folder: Path | None,
    compiled: Event,
    turn: Event,
) -> None:
    """Compile a case, say so, wait for its turn, measure it and keep the rows: a process of its own."""
    case = CASES[name]
    try:
        chosen = tuple(v for v in case.variants if not variants or v in (*variants, BASELINE))
        steps = compile_all(name, case, layers, "cuda", chosen)
        torch.cuda.empty_cache()
        compiled.set()
        turn.wait()
        rows = measure(name, case, layers, "cuda", steps, rounds)
        record([*rows, *kernel_times(name, case, steps, rows[0].shapes, folder)], keep=True)
    except Exception:  # the other cases go on
        traceback.print_exc()
        sys.exit(1)
    finally:
        compiled.set()


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
    names = {name: case.precision for name, case in CASES.items()}
    names["chooser"] = "float32"
    return [
        Row("gpu", name, NOT_MEASURED, "step time", math.nan, "s", dtype=dtype, **circumstances("cuda"))
        for name, dtype in names.items()
    ]


def main(
    case: Annotated[list[str] | None, typer.Option(help="Part of a case's name; all by default.")] = None,
    variant: Annotated[list[str] | None, typer.Option(help="Some of a case's variants.")] = None,
    layers: Annotated[int, typer.Option(help="Layers that are compiled and run.")] = 3,
    rounds: int = 15,
    tests: Annotated[bool, typer.Option(help="Run the tests that need CUDA first.")] = True,
    kernels: Annotated[bool, typer.Option(help="Time the chooser.")] = True,
    profiles: Annotated[Path | None, typer.Option(help="Write each step's kernels, by time, here.")] = None,
    quick: Annotated[bool, typer.Option(help="A tiny case on any device; keep no rows.")] = False,
) -> None:
    """Measure on the CUDA device; append rows to bench/results."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if quick:
        tiny = Case("llama-3.2-lm", "autocast", TINY.d, TINY.heads, 2, TINY.batch, TINY.seq)
        steps = compile_all("tiny", tiny, 2, device, (BASELINE, *regime.POLICIES))
        record([*measure("tiny", tiny, 2, device, steps, 2), *chooser(device, 2)], keep=False)
        return
    if device == "cpu":
        record([*not_measured(), *chooser(device, rounds)], keep=True)
        return
    spawn = multiprocessing.get_context("spawn")
    names = [name for name in CASES if not case or any(part in name for part in case)]
    events = {name: (spawn.Event(), spawn.Event()) for name in names}
    processes = {
        name: spawn.Process(
            target=run_case, args=(name, layers, rounds, variant or [], profiles, *events[name])
        )
        for name in names
    }
    for process in processes.values():
        process.start()
    deadline = time.monotonic() + COMPILED_WITHIN
    failed = []
    if tests:
        files = ["tests/test_cuda.py", "tests/test_triton_kernels.py"]
        command = [sys.executable, "-m", "pytest", "-q", "-n", "4", *files]
        if subprocess.run(command, cwd=RESULTS.parents[1], check=False).returncode:
            failed.append("tests")
    for compiled, _ in events.values():
        compiled.wait(max(0.0, deadline - time.monotonic()))
    if kernels:
        record(chooser(device, rounds), keep=True)
    for name, process in processes.items():
        events[name][1].set()
        process.join()
        if process.exitcode:
            failed.append(name)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    typer.run(main)
