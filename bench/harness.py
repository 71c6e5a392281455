"""Measure training steps of several variants of one model side by side; keep the figures as rows."""

from __future__ import annotations

import csv
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch._inductor.compile_fx import compile_fx

import wtacrs_fx
from wtacrs_fx import Policy, measure
from wtacrs_passes.policy import Placement, Residuals

Backend = Callable[[torch.fx.GraphModule, list[Any]], Any]

RESULTS = Path(__file__).parent / "results"
BASELINE = "inductor"
MIB = 2.0**20


# Variants


def inductor(budget: float = 1.0) -> Backend:
    """Return Inductor at `activation_memory_budget=budget`; 1.0 is its default."""

    def compile_at_budget(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        with functorch_config.patch(activation_memory_budget=budget):
            return compile_fx(graph, inputs)

    return compile_at_budget


def wtacrs(
    ratio: float, placement: Placement = "auto", residuals: Residuals = "exact", center: bool = False
) -> Backend:
    """Return the backend that samples weight gradients, and encodes what else is stored."""
    return wtacrs_fx.backend(Policy(ratio=ratio, placement=placement, residuals=residuals, center=center))


VARIANTS: dict[str, Callable[[], Backend | None]] = {
    "eager": lambda: None,
    "inductor": inductor,
    "inductor budget 0.9": lambda: inductor(0.9),
    "inductor budget 0.7": lambda: inductor(0.7),
    "inductor budget 0.5": lambda: inductor(0.5),
    "inductor budget 0.3": lambda: inductor(0.3),
    "wtacrs 0.3 auto": lambda: wtacrs(0.3, "auto"),
    "wtacrs 0.3 forward": lambda: wtacrs(0.3, "forward"),
    "wtacrs 0.3 backward": lambda: wtacrs(0.3, "backward"),
    "wtacrs 0.1 backward": lambda: wtacrs(0.1, "backward"),
    "wtacrs 0.3 lossless": lambda: wtacrs(0.3, residuals="lossless"),
    "wtacrs 0.3 balanced": lambda: wtacrs(0.3, residuals="balanced"),
    "wtacrs 0.3 small": lambda: wtacrs(0.3, residuals="small"),
    "wtacrs 0.1 small": lambda: wtacrs(0.1, residuals="small"),
    "wtacrs 0.3 remembered": lambda: wtacrs(0.3, "forward", "balanced"),  # with track_gradient_norms
    "wtacrs 0.1 remembered": lambda: wtacrs(0.1, "forward", "balanced"),
    "wtacrs 0.1 balanced": lambda: wtacrs(0.1, residuals="balanced"),
    "wtacrs 0.3 centred": lambda: wtacrs(0.3, residuals="balanced", center=True),
    "wtacrs 0.5 centred": lambda: wtacrs(0.5, residuals="balanced", center=True),
    "wtacrs 0.7 centred": lambda: wtacrs(0.7, residuals="balanced", center=True),
}


class Step:
    """One variant's forward and backward pass over one batch, on its own copy of the model, compiled at once.

    Dynamo keeps what it compiled under the code object of `forward`, which all copies share, and tells
    variants apart by their backend object alone. Hence a new object for each step (`_compile` is a bound
    method), a count of the graphs that it compiled, and no `torch._dynamo.reset()` while steps are in use.
    """

    def __init__(self, model: nn.Module, inputs: dict[str, Tensor], backend: Backend | None) -> None:
        torch._dynamo.config.recompile_limit = 256  # by default only 8 variants of one code object are kept
        self.model = deepcopy(model)
        self.inputs = inputs
        self._backend = backend
        self._graphs = 0
        compiled = backend is not None
        self._call = (
            torch.compile(self.model, backend=self._compile, fullgraph=True) if compiled else self.model
        )
        earlier = len(wtacrs_fx.reports())
        began = time.perf_counter()
        self()
        self.first_call_seconds = time.perf_counter() - began
        self.reports = wtacrs_fx.reports()[earlier:]

    def _compile(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        assert self._backend is not None
        self._graphs += 1
        return self._backend(graph, inputs)

    def __call__(self) -> None:
        """Leave fresh gradients in the model."""
        self.model.zero_grad(set_to_none=True)
        self.forward().backward()

    def forward(self) -> Tensor:
        """Return the loss: a scalar."""
        return cast(Tensor, self._call(**self.inputs))

    def check(self) -> None:
        """Raise if this step ran another variant's code or was compiled again while it was measured."""
        expected = int(self._backend is not None)
        if self._graphs != expected:
            raise RuntimeError(
                f"a variant must compile {expected} graph(s), this one compiled {self._graphs}"
            )


# Measures of one step


def saved_bytes(step: Step) -> int:
    """Return the bytes that the forward keeps for the backward, less parameters, buffers and inputs."""
    owned = [*step.model.parameters(), *step.model.buffers(), *step.inputs.values()]
    step.model.zero_grad(set_to_none=True)
    return measure.saved_bytes(step.forward, owned)


def peak_bytes(step: Step) -> int:
    """Return the most bytes that a step holds at once, gradients included, beyond what was held before it."""
    step.model.zero_grad(set_to_none=True)
    return measure.peak_bytes(step, next(step.model.parameters()).device)


def step_seconds(step: Step) -> float:
    """Return the duration of one forward and backward pass."""
    step.model.zero_grad(set_to_none=True)
    if next(step.model.parameters()).is_cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def interleave(measures: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Take every measure once a round (A B C, B C A, C A B, ...), so that a slow minute slows all of them."""
    values: dict[str, list[float]] = {name: [] for name in measures}
    names = list(measures)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            values[name].append(measures[name]())
    return values


Figure = tuple[str, str, dict[str, Any]]  # metric, unit, and the fields of a `Row` that hold numbers


def compare(steps: dict[str, Step], rounds: int) -> dict[str, list[Figure]]:
    """Return saved bytes, peak and step time of every variant, with ratios to Inductor's.

    Without rounds, no step time. Raise if a step ran another variant's code or was compiled again.
    """
    saved = {variant: saved_bytes(step) for variant, step in steps.items()}
    peaks = {variant: peak_bytes(step) for variant, step in steps.items()}
    times = interleave({variant: partial(step_seconds, step) for variant, step in steps.items()}, rounds)
    found: dict[str, list[Figure]] = {}
    for variant, step in steps.items():
        step.check()
        found[variant] = [
            (metric, "MiB", {"value": sizes[variant] / MIB, "ratio": sizes[variant] / sizes[BASELINE]})
            for metric, sizes in (("saved", saved), ("peak", peaks))
        ]
        if rounds:
            found[variant].append(("step time", "s", summarise(times[variant], times[BASELINE])))
    return found


# Rows of evidence


@dataclass(frozen=True)
class Row:
    """One measured figure, with all that is needed to measure it again."""

    benchmark: str
    model: str
    variant: str
    metric: str
    value: float  # the median, where there are rounds
    unit: str
    ratio: float | None = (
        None  # to Inductor in the same run, unless the benchmark says: median over the rounds
    )
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    rounds: int = 1
    shapes: str = ""
    dtype: str = "float32"
    seed: int = 0
    device: str = "cpu"
    processor: str = ""
    cores: int = 0
    python: str = ""
    torch: str = ""
    transformers: str = ""
    commit: str = ""
    command: str = ""
    date: str = ""

    def __str__(self) -> str:
        ratio = "" if self.ratio is None else f" (ratio {self.ratio:.3f})"
        return f"{self.model} {self.dtype} {self.variant}: {self.metric} {self.value:.4g} {self.unit}{ratio}"


def summarise(values: Sequence[float], baseline: Sequence[float] | None = None) -> dict[str, Any]:
    """Return the fields of a `Row` that describe repeated measures.

    Args:
        values: one a round; baseline: Inductor's of the same rounds.
    """
    levels = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    p20, p50, p80 = torch.tensor(values, dtype=torch.float64).quantile(levels).tolist()
    ratio = statistics.median(v / b for v, b in zip(values, baseline, strict=True)) if baseline else None
    return {"value": p50, "ratio": ratio, "p20": p20, "p50": p50, "p80": p80, "rounds": len(values)}


def circumstances(device: str = "cpu") -> dict[str, Any]:
    """Return the fields of a `Row` that describe machine, software and call; no path, no host name."""
    name = Path(sys.argv[0]).stem
    return {
        "device": device,
        "processor": _processor(device),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": _commit(),
        "command": shlex.join(["python", "-m", f"bench.{name}", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _processor(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return _cpu_name()


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


@cache
def _commit() -> str:
    """Return the abbreviated commit, with `+dirty` if anything but results differs from it."""

    def git(*arguments: str) -> str:
        found = subprocess.run(["git", *arguments], cwd=RESULTS.parents[1], capture_output=True, text=True)
        return found.stdout.strip()

    dirty = git("status", "--porcelain", "--", ".", ":!bench/results", ":!README.md")
    return (git("rev-parse", "--short=12", "--verify", "HEAD") or "uncommitted") + ("+dirty" if dirty else "")


def record(rows: Sequence[Row], keep: bool) -> None:
    """Print the rows, and add them to the results if they are to be kept."""
    for row in rows:
        print(row)
    if keep:
        append(rows)


def append(rows: Iterable[Row], folder: Path = RESULTS) -> None:
    """Add each row to the file of its benchmark, `<benchmark>.csv`."""
    folder.mkdir(exist_ok=True)  # git keeps no empty folder
    for row in rows:
        path = folder / f"{row.benchmark}.csv"
        is_new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerow(asdict(row))


def read(benchmark: str, folder: Path = RESULTS) -> list[Row]:
    """Return all rows of a benchmark, in the order in which they were measured."""
    path = folder / f"{benchmark}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [_parse(record) for record in csv.DictReader(file)]


def _parse(record: dict[str, str]) -> Row:
    numbers: dict[str, Any] = {
        name: float(record[name]) if record[name] else None
        for name in ("value", "ratio", "p20", "p50", "p80")
    }
    counts = {name: int(record[name]) for name in ("rounds", "seed", "cores")}
    return Row(**{**record, **numbers, **counts})
