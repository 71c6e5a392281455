"""Train a pretrained model with Inductor and wtacrs side by side, and measure each.

Every variant starts from the same weights and sees the same batches; their steps are interleaved, so that the
times compare. What is measured: quality on held-out text, saved bytes, peak memory, seconds a step.
"""

from __future__ import annotations

import contextlib
import copy
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

import wtacrs_fx
from wtacrs_passes.report import MIB

from . import measure
from .circumstances import commit, processor
from .comparison import BASELINE, BUDGET, Row, draw, table, write_csv
from .steps import Compiler, Step, inductor, interleave, saved_bytes
from .tasks import DEFAULTS, Sizes, Task, make_task
from .texts import InputError

_REPORT_TOLERANCE = 0.03
_LOG_EVERY = 4  # steps


@dataclass(frozen=True)
class Settings:
    """What one run of the demo does.

    Args:
        task: ``lora`` or ``language-model``: SmolLM2 continues text, adapters or all weights are trained, under
            autocast; ``encoder``: MiniLM tells texts apart, in float32.
        model: folder or Hub id of a model; None is the packaged one.
        data: a text file, or for an encoder lines label<TAB>text; None is the packaged BBC news.
        steps: training steps, 2 or more, the first is not timed; batch: samples a step; length: tokens a sample. None:
            as the task has it.
        ratio: share of the rows that wtacrs keeps; None: 0.3 for an encoder, else the default policy.
        seed: of the split, the batches, new weights and dropout.
        out: folder for demo.png and demo.csv.
    """

    task: str = "lora"
    model: str | None = None
    data: Path | None = None
    steps: int | None = None
    batch: int | None = None
    length: int | None = None
    ratio: float | None = None
    seed: int = 0
    out: Path = Path("demo-results")

    def sizes(self) -> Sizes:
        """Return steps, batch and length, those of the task where nothing is said."""
        of_task = DEFAULTS.get(self.task, Sizes(2, 1, 1))
        return Sizes(self.steps or of_task.steps, self.batch or of_task.batch, self.length or of_task.length)


def run(settings: Settings, console: Console) -> list[Row]:
    """Train and measure every variant, print the table, write demo.csv and demo.png into `settings.out`.

    Raises:
        InputError: a setting that cannot be used.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = settings.sizes()
    compilers = make_compilers(settings.task, settings.ratio)
    task = make_task(settings.task, settings.model, settings.data, sizes, settings.seed, device)
    size = f"{sizes.steps} steps of {task.size}"
    console.print(f"{task.about}; {size} on {device.type}")
    with _progress(console) as progress:
        lines = {name: _Line(progress, name, len(task.batches)) for name in compilers}
        trainings = {}
        for name, compiler in compilers.items():
            lines[name].show("compiling")
            model = task.model if name == BASELINE or settings.task == "encoder" else _layers_once(task.model)
            step = Step(model, task.batches[0], compiler)
            trainings[name] = Training(step, task, settings.seed, lines[name].advance)
        seconds = interleave(
            {name: training.advance for name, training in trainings.items()}, len(task.batches)
        )
        rows = []
        for name, training in trainings.items():
            lines[name].show("measuring")
            rows.append(training.row(name, seconds[name]))
            lines[name].show("measured")
    _compare_with_report(rows[-1], trainings[rows[-1].variant].step, console)
    console.print(table(rows, task.merit))
    settings.out.mkdir(parents=True, exist_ok=True)
    write_csv(rows, _context(settings, sizes, device), settings.out / "demo.csv")
    draw(rows, task.merit, f"{task.about}\n{size}", settings.out / "demo.png")
    console.print(f"wrote {settings.out / 'demo.png'} and {settings.out / 'demo.csv'}")
    return rows


def make_compilers(task: str, ratio: float | None) -> dict[str, Compiler | None]:
    """Return the ways to run the step; None is eager. A language model takes a minute to compile: two ways.

    Raises:
        InputError: `ratio` is not in (0, 1].
    """
    is_encoder = task == "encoder"
    ratio = 0.3 if ratio is None and is_encoder else ratio
    try:
        ours = wtacrs_fx.backend(wtacrs_fx.Policy(ratio=ratio))
    except ValueError as error:
        raise InputError(f"--ratio: {error}") from error
    others: dict[str, Compiler | None] = (
        {"eager": None, BASELINE: inductor(), BUDGET: inductor(0.9)} if is_encoder else {BASELINE: inductor()}
    )
    return {**others, "wtacrs" if ratio is None else f"wtacrs {ratio:g}": ours}


def _layers_once(model: nn.Module) -> nn.Module:
    """Return a copy of a model whose layers are compiled once, where this PyTorch can."""
    twin = copy.deepcopy(model)
    with contextlib.suppress(RuntimeError, ValueError):
        wtacrs_fx.mark_layers(twin)
    return twin


class Training:
    """The training of one variant, with its own copy of the model and its own optimizer.

    Args:
        step: of the task's model.
        task: whose batches it takes, one a step.
        seed: of the first step's dropout; that of each next one is one more.
        show: takes what became of each step.
    """

    def __init__(self, step: Step, task: Task, seed: int, show: Callable[[str], None]) -> None:
        self.step, self._task, self._show = step, task, show
        self._left = enumerate(task.batches, start=seed)
        self._device = next(step.model.parameters()).device
        trained = [parameter for parameter in step.model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=task.learning_rate, fused=True)
        self._loss = 0.0

    def advance(self) -> float:
        """Train on the next batch; return the seconds of forward, backward and update."""
        seed, self.step.inputs = next(self._left)
        torch.manual_seed(seed)
        seconds = measure.step_seconds(self._update, self._device)
        self._show(f"loss {self._loss:.3f}, {seconds:.2f} s")
        return seconds

    def _update(self) -> None:
        loss = self.step()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._loss = float(loss)

    def row(self, name: str, seconds: Sequence[float]) -> Row:
        """Return what the trained variant does and needs; `seconds`: of each step."""
        merit = self._task.measure(self.step.model)
        saved = saved_bytes(self.step)
        self._optimizer.zero_grad()
        peak = measure.peak_bytes(self._update, self._device)
        self.step.check()
        p20, p50, p80 = measure.percentiles(seconds[1:])
        return Row(name, merit, saved / MIB, peak / MIB, p50, p20, p80, self.step.first_call_seconds)


def _compare_with_report(row: Row, step: Step, console: Console) -> None:
    predicted = float(step.reports[-1].saved_bytes_after) / MIB
    if abs(predicted - row.saved_mib) > _REPORT_TOLERANCE * row.saved_mib:
        console.print(
            f"[yellow]warning: {row.variant} reports {predicted:.1f} MiB saved, measured {row.saved_mib:.1f}"
        )


def _context(settings: Settings, sizes: Sizes, device: torch.device) -> dict[str, object]:
    """Return what is needed to repeat a run."""
    return {
        **{key: value for key, value in asdict(settings).items() if key != "out"},
        **asdict(sizes),
        "device": processor(device.type),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "wtacrs_fx": version("wtacrs-fx"),
        "commit": commit(),
    }


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<16}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[status]}"),
        console=console,
    )


class _Line:
    """The progress of one variant: a bar, or in a log some lines."""

    def __init__(self, progress: Progress, name: str, steps: int) -> None:
        self._progress, self._name, self._steps, self._done = progress, name, steps, 0
        self._task = progress.add_task(name, total=steps, status="waiting")

    def show(self, status: str) -> None:
        self._progress.update(self._task, status=status)

    def advance(self, status: str) -> None:
        if (
            not self._progress.console.is_terminal and self._done % _LOG_EVERY == 0
        ):  # a log shows no moving bars
            self._progress.console.print(f"step {self._done + 1}/{self._steps}, {self._name}: {status}")
        self._done += 1
        self._progress.update(self._task, advance=1, status=status)
