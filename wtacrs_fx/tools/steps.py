"""Steps of several variants of one model side by side: saved bytes, peak memory, time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch._inductor.compile_fx import compile_fx

from wtacrs_passes.report import Report

from ..backend import reports
from . import measure
from .progress import Progress, silent

Compiler = Callable[[torch.fx.GraphModule, list[Any]], Any]


def inductor(budget: float = 1.0, **config: Any) -> Compiler:
    """Return Inductor at `activation_memory_budget=budget`; 1.0 is its default. `config` is its own."""

    def compile_at_budget(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        with functorch_config.patch(activation_memory_budget=budget):
            return compile_fx(graph, inputs, config_patches=config)

    return compile_at_budget


class Step:
    """One variant's forward and backward pass over one batch, on its own copy of the model, compiled at once.

    Dynamo keeps what it compiled under the code object of `forward`, which all copies share, and tells
    variants apart by their backend object alone. Hence a new object for each step (`_compile` is a bound
    method), a count of the graphs that it compiled, and no `torch._dynamo.reset()` while steps are in use.

    Args:
        layers: what of a model is compiled one by one, and what lies around them apart; None for one graph.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        backend: Compiler | None,
        layers: Callable[[nn.Module], Iterable[nn.Module]] | None = None,
    ) -> None:
        self.model = deepcopy(model)
        self.inputs = inputs
        self._backend = backend
        self._graphs = 0
        compiled = backend is not None
        self._call = (
            torch.compile(self.model, backend=self._compile, fullgraph=layers is None)
            if compiled
            else self.model
        )
        for layer in layers(self.model) if layers else ():
            own = torch.compile(layer.forward, backend=self._compile)
            layer.forward = torch.compiler.disable(own, recursive=False)  # type: ignore[no-untyped-call]
        earlier = len(reports())
        began = time.perf_counter()
        with many_variants():
            self()
        self.first_call_seconds = time.perf_counter() - began
        self._expected = self._graphs if layers else int(compiled)
        self._places = list(range(earlier, len(reports())))

    @property
    def reports(self) -> list[Report]:
        """The reports of its graphs as they are now: a noise budget adds to them."""
        return [reports()[place] for place in self._places]

    def _compile(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        assert self._backend is not None
        self._graphs += 1
        return self._backend(graph, inputs)

    def settle(self, batches: Iterable[dict[str, Tensor]]) -> None:
        """Take steps over other batches, in which a noise budget is measured and the code compiled again."""
        inputs, earlier, graphs = self.inputs, len(reports()), self._graphs
        with many_variants():
            for self.inputs in batches:
                self()
        self.inputs = inputs
        self._expected += self._graphs - graphs
        self._places += range(earlier, len(reports()))

    def __call__(self) -> Tensor:
        """Leave fresh gradients in the model; return the loss without its graph."""
        self.model.zero_grad(set_to_none=True)
        loss = self.forward()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def forward(self) -> Tensor:
        """Return the loss, a scalar: what the model returns, or the first of it."""
        found = self._call(**self.inputs)
        return cast(Tensor, found[0] if isinstance(found, tuple) else found)

    def check(self) -> None:
        """Raise if this step ran another variant's code or was compiled again while it was measured."""
        if self._graphs != self._expected:
            raise RuntimeError(
                f"a variant must compile {self._expected} graph(s), this one compiled {self._graphs}"
            )


def many_variants() -> Any:
    """Let Dynamo keep more variants of one code object than the 8 of its default."""
    return torch._dynamo.config.patch(recompile_limit=256)


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
    return measure.step_seconds(step, next(step.model.parameters()).device)


def interleave(
    measures: dict[str, Callable[[], float]], rounds: int, progress: Progress = silent
) -> dict[str, list[float]]:
    """Take every measure once a round (A B C, B C A, C A B, ...), so that a slow minute slows all of them."""
    values: dict[str, list[float]] = {name: [] for name in measures}
    names = list(measures)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            values[name].append(measures[name]())
        progress("rounds", turn + 1, rounds)
    return values


@dataclass(frozen=True)
class Measured:
    """What one variant needs: bytes saved for the backward pass, bytes at the peak, seconds of each round."""

    saved: int
    peak: int
    seconds: list[float]


def measure_steps(steps: dict[str, Step], rounds: int, progress: Progress = silent) -> dict[str, Measured]:
    """Measure every variant; the timed steps are interleaved.

    Raises:
        RuntimeError: a step ran another variant's code or was compiled again while it was measured.
    """
    saved = {variant: saved_bytes(step) for variant, step in steps.items()}
    peaks = {variant: peak_bytes(step) for variant, step in steps.items()}
    seconds: dict[str, Callable[[], float]] = {
        variant: partial(step_seconds, step) for variant, step in steps.items()
    }
    times = interleave(seconds, rounds, progress)
    for step in steps.values():
        step.check()
    return {variant: Measured(saved[variant], peaks[variant], times[variant]) for variant in steps}
