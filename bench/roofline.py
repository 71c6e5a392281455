"""What a compiled step would take on other devices, predicted from the work of its kernels.

    python -m bench.roofline                           # autocast, 4 layers, 49,152 words, 8 x 512 tokens
    python -m bench.roofline --model bert --precision bfloat16 --layers 2 --d 768 --heads 12 --batch 16 --seq 128
    python -m bench.roofline --quick

Each kernel that Inductor writes or calls takes the longer of its floating-point operations at the device's rate for
their precision and its bytes at the rate of the memory (Williams et al. 2009, the roofline), and no less than a launch.
Operations and bytes are Inductor's own counts of the code for CPUs: Triton fuses more, a library may read twice. The
same prediction for this CPU, from rates measured here, stands beside the measured step.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch._inductor.config
import typer
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V

from bench.harness import BASELINE, Figure, Row, circumstances, compare, record
from bench.models import MODELS, PRECISIONS, TINY, WORDS, Shape, build
from bench.regime import compiler
from wtacrs_fx.tools.measure import step_seconds
from wtacrs_fx.tools.steps import Step
from wtacrs_passes.maths import chunks

COMPARED = ("inductor", "inductor budget 0.9", "wtacrs", "wtacrs, all rows")


@dataclass(frozen=True)
class Kernel:
    """Work of one kernel: floating-point operations in products of matrices of `dtype`, and bytes read and written."""

    operations: float
    dtype: torch.dtype
    size: float


@dataclass(frozen=True)
class Device:
    """Rates of a device: operations a second by precision, bytes a second, seconds of the shortest kernel."""

    rates: dict[torch.dtype, float]
    bandwidth: float
    launch: float = 0.0

    def seconds(self, kernels: list[Kernel]) -> float:
        """Return the predicted time of kernels that run one after another."""
        return sum(
            max(k.operations / self.rates[k.dtype], k.size / self.bandwidth, self.launch) for k in kernels
        )


REACHED = 0.7
"""Share of the rates in data sheets that good kernels reach."""
_LAUNCH = 3e-6


def _gpu(float32: float, bfloat16: float, bandwidth: float) -> Device:
    rates = {torch.float32: float32, torch.bfloat16: bfloat16, torch.float16: bfloat16}
    return Device(
        {dtype: REACHED * rate * 1e12 for dtype, rate in rates.items()}, REACHED * bandwidth * 1e9, _LAUNCH
    )


GPUS = {
    "A100": _gpu(19.5, 312, 2039),  # NVIDIA A100 80GB SXM data sheet, dense, float32 without TF32
    "H100": _gpu(67, 989, 3350),  # NVIDIA H100 SXM data sheet
    "RTX 4090": _gpu(82.6, 165, 1008),  # NVIDIA Ada whitepaper, bfloat16 with float32 accumulation
}
"""TFLOP/s in float32 and in 16 bits, GB/s."""


def this_cpu() -> Device:
    """Measure the rates of this CPU: square products, and a copy that no cache holds."""
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2048, 2048).to(dtype)
        rates[dtype] = 2 * 2048**3 / _least_seconds(lambda x=x: x @ x)
    x = torch.randn(2**26)
    y = torch.empty_like(x)
    bandwidth = 2 * x.numel() * x.element_size() / _least_seconds(lambda: y.copy_(x))
    return Device({**rates, torch.float16: rates[torch.bfloat16]}, bandwidth)


def _least_seconds(call: Callable[[], object], rounds: int = 7) -> float:
    return min(step_seconds(call, torch.device("cpu")) for _ in range(rounds))


class Recorder:
    """The kernels of one step, collected while it is compiled and run once."""

    def __init__(self) -> None:
        self._kernels: list[Kernel] = []
        self._of_chunks: dict[str, list[Kernel]] = {}  # of a function of one chunk, by its source
        self._calls: Counter[str] = Counter()
        self._chunk: str | None = None

    def kernels(self) -> list[Kernel]:
        """Return the kernels of the step; those of a chunk once for each."""
        repeated = [kernels * self._calls[source] for source, kernels in self._of_chunks.items()]
        return [*self._kernels, *(kernel for kernels in repeated for kernel in kernels)]

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Collect what is compiled and run in this context."""
        with (
            torch._inductor.config.patch(force_disable_caches=True),
            _replaced(GraphLowering, "codegen", self._codegen),
            _replaced(chunks, "compiled_function_of", self._compiled_function_of),
            _replaced(chunks._Product, "multiply", self._multiply),
        ):
            yield

    def _codegen(self, codegen: Callable[..., Any], graph: Any) -> Any:
        result = codegen(graph)
        found = self._kernels if self._chunk is None else self._of_chunks.setdefault(self._chunk, [])
        with V.set_graph_handler(graph):
            found += [_kernel(node) for node in graph.scheduler.nodes]
        return result

    def _compiled_function_of(self, compiled: Callable[..., Any], source: str) -> Callable[..., Any]:
        function = compiled(source)

        def call(*args: Any) -> Any:
            self._calls[source] += 1
            self._chunk = source
            try:
                return function(*args)
            finally:
                self._chunk = None

        return call

    def _multiply(self, multiply: Callable[..., None], part: Any, at_last: bool = False) -> None:
        """Count a product of several chunks, which no compiler sees, and the sum that it is added to."""
        waiting = part._waiting
        multiply(part, at_last)
        if waiting and not part._waiting:
            rows, (m, n) = sum(b.shape[0] for _, b in waiting), part.value.shape
            read = sum(x.numel() * x.element_size() for pair in waiting for x in pair)
            written = 2 * part.value.numel() * part.value.element_size()
            self._kernels.append(Kernel(2.0 * rows * m * n, waiting[0][1].dtype, read + written))


@contextlib.contextmanager
def _replaced(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Let ``owner.name(*args)`` be ``function(what it was, *args)``."""
    was = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: function(was, *args, **kwargs))
    try:
        yield
    finally:
        setattr(owner, name, was)


def _kernel(node: Any) -> Kernel:
    dtypes = [x.maybe_get_dtype() for x in node.node.inputs] if node.is_extern() else []
    dtype = next((d for d in dtypes if d in (torch.bfloat16, torch.float16)), torch.float32)
    operations = node.estimate_flops() if node.is_extern() else 0
    return Kernel(float(operations or 0), dtype, float(node.get_read_write_buffers_sizes()))


def measure(name: str, shape: Shape, precision: str, rounds: int, variants: Sequence[str]) -> list[Row]:
    """Return work, predicted steps of each device, and this CPU's predicted and measured step, of each variant."""
    steps, kernels = {}, {}
    for variant in variants:
        model, inputs = build(name, shape, precision, "cpu")
        recorder = Recorder()
        with recorder.recording():
            steps[variant] = Step(model, inputs, compiler(variant))
        kernels[variant] = recorder.kernels()
    devices = {**GPUS, "this CPU": this_cpu()}
    measured = compare(steps, rounds)
    rows = []
    for variant in variants:
        figures: list[Figure] = []
        for metric, unit, count in WORK:
            values = {v: count(kernels[v]) for v in (variant, BASELINE)}
            figures.append((metric, unit, _beside(values[variant], values[BASELINE])))
        for device, rates in devices.items():
            seconds = [rates.seconds(kernels[v]) for v in (variant, BASELINE)]
            figures.append((f"step, predicted: {device}", "s", _beside(*seconds)))
        figures += [figure for figure in measured[variant] if figure[0] == "step time"]
        rows += [
            Row(
                "roofline", name, variant, metric, unit=unit, shapes=str(shape), dtype=precision,
                **figure, **circumstances(),
            )
            for metric, unit, figure in figures
        ]  # fmt: skip
    return rows


def _beside(value: float, baseline: float) -> dict[str, Any]:
    return {"value": value, "ratio": value / baseline if baseline else None}


def _operations(*dtypes: torch.dtype) -> Callable[[list[Kernel]], float]:
    return lambda kernels: sum(k.operations for k in kernels if k.dtype in dtypes) / 1e9


WORK: tuple[tuple[str, str, Callable[[list[Kernel]], float]], ...] = (
    ("kernels", "", len),
    ("operations in 16 bits", "GFLOP", _operations(torch.bfloat16, torch.float16)),
    ("operations in float32", "GFLOP", _operations(torch.float32)),
    ("bytes read and written", "GB", lambda kernels: sum(k.size for k in kernels) / 1e9),
)


def main(
    model: Annotated[str, typer.Option(help=f"One of {', '.join((*MODELS, *WORDS))}.")] = "llama-lm",
    layers: int = 4,
    d: int = 576,
    heads: int = 9,
    batch: int = 8,
    seq: int = 512,
    precision: Annotated[str, typer.Option(help=f"One of {', '.join(PRECISIONS)}.")] = "autocast",
    rounds: Annotated[int, typer.Option(help="Timed steps of each variant on this CPU.")] = 5,
    quick: Annotated[bool, typer.Option(help="Tiny sizes and two rounds; keep no rows.")] = False,
) -> None:
    """Predict steps on other devices; append rows to bench/results."""
    shape = TINY if quick else Shape(layers, d, heads, batch, seq)
    record(measure(model, shape, precision, 2 if quick else rounds, COMPARED), keep=not quick)


if __name__ == "__main__":
    typer.run(main)
