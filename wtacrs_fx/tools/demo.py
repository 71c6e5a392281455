"""Fine-tune one pretrained encoder with eager, Inductor and wtacrs side by side, and measure each.

Every variant starts from the same weights and sees the same batches; their steps are interleaved, so that the
times compare. What is measured: accuracy on held-out texts, saved bytes, peak memory, seconds a step.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import wtacrs_fx
from wtacrs_passes.report import MIB

from . import measure
from .circumstances import commit, processor
from .classification import Batch, Classifier, Collate, accuracy, load_encoder
from .comparison import BASELINE, Row, draw, table, write_csv
from .steps import Compiler, Step, inductor, interleave, saved_bytes
from .texts import InputError, draw_batches, load_texts, split

_LEARNING_RATE = 2e-4
_EVALUATION_BATCH = 50
_REPORT_TOLERANCE = 0.03
_LOG_EVERY = 8  # steps


@dataclass(frozen=True)
class Settings:
    """What one run of the demo does.

    Args:
        model: folder or Hub id of an encoder; None is the packaged MiniLM.
        data: file of lines label<TAB>text; None is the packaged BBC news.
        steps: training steps, 2 or more; the first is not timed.
        batch: texts a step.
        length: tokens a text, cut or padded.
        ratio: share of the rows that wtacrs keeps.
        seed: of the split, the batches, the head's weights and the dropout.
        out: folder for demo.png and demo.csv.
    """

    model: str | None = None
    data: Path | None = None
    steps: int = 32
    batch: int = 16
    length: int = 128
    ratio: float = 0.3
    seed: int = 0
    out: Path = Path("demo-results")


def run(settings: Settings, console: Console) -> list[Row]:
    """Train and measure every variant, print the table, write demo.csv and demo.png into `settings.out`.

    Raises:
        InputError: a setting that cannot be used.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    compilers = make_compilers(settings.ratio)
    texts, labels, names = load_texts(settings.data)
    tokenizer, encoder = load_encoder(settings.model)
    torch.manual_seed(settings.seed)
    model = Classifier(encoder, len(names)).to(device).train()
    train, held_out = split(len(texts), settings.seed)
    collate = Collate(tokenizer, texts, labels, settings.length, device)
    batches = [collate(b) for b in draw_batches(train, settings.steps, settings.batch, settings.seed)]
    tests = [collate(held_out[i : i + _EVALUATION_BATCH]) for i in range(0, len(held_out), _EVALUATION_BATCH)]
    size = f"{settings.steps} steps of {settings.batch} texts x {settings.length} tokens"
    console.print(
        f"{len(texts)} texts of {len(names)} classes, {len(held_out)} held out; {size} on {device.type}"
    )
    with _progress(console) as progress:
        lines = {name: _Line(progress, name, len(batches)) for name in compilers}
        trainings = {}
        for name, compiler in compilers.items():
            lines[name].show("compiling")
            step = Step(model, batches[0], compiler)
            trainings[name] = Training(step, batches, settings.seed, lines[name].advance)
        seconds = interleave({name: training.advance for name, training in trainings.items()}, len(batches))
        rows = []
        for name, training in trainings.items():
            lines[name].show("measuring")
            rows.append(training.row(name, seconds[name], tests))
            lines[name].show("measured")
    _compare_with_report(rows[-1], trainings[rows[-1].variant].step, console)
    console.print(table(rows))
    settings.out.mkdir(parents=True, exist_ok=True)
    write_csv(rows, _context(settings, device), settings.out / "demo.csv")
    draw(rows, size, settings.out / "demo.png")
    console.print(f"wrote {settings.out / 'demo.png'} and {settings.out / 'demo.csv'}")
    return rows


def make_compilers(ratio: float) -> dict[str, Compiler | None]:
    """Return the ways to run the step; None is eager.

    Raises:
        InputError: `ratio` is not in (0, 1].
    """
    try:
        policy = wtacrs_fx.Policy(ratio=ratio)
    except ValueError as error:
        raise InputError(f"--ratio: {error}") from error
    return {
        "eager": None,
        BASELINE: inductor(),
        "Inductor at 0.9": inductor(0.9),
        f"wtacrs {ratio:g}": wtacrs_fx.backend(policy),
    }


class Training:
    """The training of one variant, with its own copy of the model and its own optimizer.

    Args:
        step: of a :class:`Classifier`.
        batches: one a step.
        seed: of the first step's dropout; that of each next one is one more.
        show: takes what became of each step.
    """

    def __init__(self, step: Step, batches: Sequence[Batch], seed: int, show: Callable[[str], None]) -> None:
        self.step, self._show = step, show
        self._left = enumerate(batches, start=seed)
        self._device = batches[0]["labels"].device
        self._optimizer = torch.optim.AdamW(step.model.parameters(), lr=_LEARNING_RATE, fused=True)
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

    def row(self, name: str, seconds: Sequence[float], tests: Sequence[Batch]) -> Row:
        """Return what the trained variant does and needs.

        Args:
            seconds: of each step; tests: held-out batches.
        """
        right = accuracy(self.step.model, tests)
        saved = saved_bytes(self.step)
        self._optimizer.zero_grad()
        peak = measure.peak_bytes(self._update, self._device)
        self.step.check()
        p20, p50, p80 = measure.percentiles(seconds[1:])
        return Row(name, right, saved / MIB, peak / MIB, p50, p20, p80, self.step.first_call_seconds)


def _compare_with_report(row: Row, step: Step, console: Console) -> None:
    predicted = float(step.reports[-1].saved_bytes_after) / MIB
    if abs(predicted - row.saved_mib) > _REPORT_TOLERANCE * row.saved_mib:
        console.print(
            f"[yellow]warning: {row.variant} reports {predicted:.1f} MiB saved, measured {row.saved_mib:.1f}"
        )


def _context(settings: Settings, device: torch.device) -> dict[str, object]:
    """Return what is needed to repeat a run."""
    return {
        **{key: value for key, value in asdict(settings).items() if key != "out"},
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
