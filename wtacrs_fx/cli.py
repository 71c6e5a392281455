"""The command `wtacrs`. Commands import what they need when they run, so that `--help` is quick."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch

    from wtacrs_fx import Policy
    from wtacrs_fx.tools.check import Check
    from wtacrs_fx.tools.frontier import Frontier
    from wtacrs_fx.tools.predict import Prediction
    from wtacrs_fx.tools.progress import Progress

app = typer.Typer(
    help="Train transformers in less activation memory.", no_args_is_help=True, add_completion=False
)


@app.callback()
def main() -> None:
    """Train transformers in less activation memory."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "7")  # above USDT: a line for each start of the profiler


@app.command()
def demo(
    task: Annotated[
        str, typer.Option(help="lora or language-model: SmolLM2 on running text; encoder: MiniLM on classes.")
    ] = "lora",
    model: Annotated[
        str | None, typer.Option(help="Folder or Hub id of such a model.", show_default="packaged")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Text file; of an encoder lines label<TAB>text.", show_default="BBC news, packaged"
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=2, help="Training steps; the first is not timed.", show_default="12 or 32"),
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Samples a step.", show_default="4 or 16")] = None,
    length: Annotated[
        int | None, typer.Option(min=8, help="Tokens a sample.", show_default="512 or 128")
    ] = None,
    ratio: Annotated[
        float | None,
        typer.Option(
            help="Share of the rows that wtacrs keeps, in (0, 1].", show_default="by noise; encoder: 0.3"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the split, the batches and dropout.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for demo.png and demo.csv.")] = Path("demo-results"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; progress goes to stderr.")] = False,
) -> None:
    """Train with Inductor and wtacrs side by side: loss or accuracy, memory and time.

    Examples:  wtacrs demo;  wtacrs demo --task language-model;  wtacrs demo --task encoder --data texts.tsv --json
    """
    from rich.console import Console

    from wtacrs_fx.tools.demo import Settings, run

    with _errors():
        settings = Settings(task, model, data, steps, batch, length, ratio, seed, out)
        rows = run(settings, Console(stderr=as_json))
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(row) for row in rows]))


ModelArgument = Annotated[
    str,
    typer.Argument(
        help="Folder with a config.json, such a file, a type of models (llama), a name on the Hub, or module:factory."
    ),
]
BatchOption = Annotated[int, typer.Option(min=1, help="Samples a step.")]
LengthOption = Annotated[int, typer.Option(min=1, help="Tokens a sample.")]
DtypeOption = Annotated[str, typer.Option(help="bfloat16, float16 or float32.")]
RatioOption = Annotated[float, typer.Option(help="Share of the rows that are kept, in (0, 1].")]
ResidualsOption = Annotated[str, typer.Option(help="exact, lossless, fine, balanced or small.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")]


@app.command()
def explain(
    model: ModelArgument,
    batch: BatchOption = 8,
    length: LengthOption = 1024,
    dtype: DtypeOption = "bfloat16",
    ratio: RatioOption = 0.3,
    residuals: ResidualsOption = "balanced",
    memory: Annotated[
        str | None, typer.Option(help="Of the device, such as 24GiB: print the largest batches that fit.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="File for a picture of that, .png or .svg.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Tell what training a model would store, without allocating anything.

    A factory is called as factory(batch, length) on the meta device and returns a model and a dict of inputs.
    With --memory: by how many layers are computed again, what a sample stores and the largest batch.

    Examples:  wtacrs explain llama;  wtacrs explain ./my-model --batch 4 --length 4096;
    wtacrs explain config.json --json;  wtacrs explain my_package.models:make --batch 4;
    wtacrs explain ./my-model --memory 24GiB --plot fits.png
    """
    from wtacrs_fx.tools.frontier import frontier
    from wtacrs_fx.tools.predict import predict
    from wtacrs_fx.tools.progress import bars
    from wtacrs_passes.policy import parse_bytes

    if memory is not None:
        with _errors(), bars() as progress:
            size = parse_bytes("--memory", memory)
            fits = frontier(model, size, length, _dtype(dtype), _policy(ratio, residuals), progress)
        if plot is not None:
            fits.plot(plot)
        typer.echo(json.dumps(fits.to_dict())) if as_json else _print_frontier(fits, length, dtype)
        return
    with _errors(), bars() as progress:
        found = predict(model, batch, length, _dtype(dtype), _policy(ratio, residuals), progress)
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
    else:
        _print_prediction(found, dtype)


@app.command()
def bench(
    model: ModelArgument,
    batch: BatchOption = 8,
    length: LengthOption = 128,
    dtype: DtypeOption = "float32",
    residuals: ResidualsOption = "balanced",
    layers: Annotated[int, typer.Option(min=1, help="Layers of a configuration that are run.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Timed steps of each variant, interleaved.")] = 10,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.", show_default="cuda if there")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure training steps of a model on this machine: saved bytes, peak, time beside Inductor's.

    Weights are random. A factory is called as factory(batch, length) and returns a model, whose output is a
    loss, and a dict of inputs.

    Examples:  wtacrs bench ./my-model --layers 4;  wtacrs bench my_package.models:make --json
    """
    import torch

    from wtacrs_fx import backend
    from wtacrs_fx.tools.predict import build
    from wtacrs_fx.tools.progress import bars
    from wtacrs_fx.tools.steps import Compiler, Step, inductor, measure_steps

    with _errors(), bars() as progress:
        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        variants: dict[str, Compiler | None] = {
            "eager": None,
            "inductor": inductor(),
            "inductor, budget 0.9": inductor(0.9),
            "wtacrs 0.3": backend(_policy(0.3, residuals)),
            "wtacrs 0.1": backend(_policy(0.1, residuals)),
        }
        network, inputs = build(model, layers, batch, length, _dtype(dtype), place)
        steps = {}
        progress("compiling", 0, len(variants))
        for name, compiler in variants.items():
            steps[name] = Step(network, inputs, compiler)
            progress("compiling", len(steps), len(variants))
        found = measure_steps(steps, rounds, progress)
    rows = {
        name: {"saved_bytes": one.saved, "peak_bytes": one.peak, "seconds": statistics.median(one.seconds)}
        for name, one in found.items()
    }
    if as_json:
        typer.echo(json.dumps(rows))
    else:
        _print_comparison(rows, f"{model}, {batch} x {length} tokens, {dtype}, {place}")


@app.command()
def check(
    model: ModelArgument,
    batch: BatchOption = 4,
    length: LengthOption = 128,
    dtype: DtypeOption = "bfloat16",
    layers: Annotated[int, typer.Option(min=1, help="Layers of a configuration that are run.")] = 2,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.", show_default="cuda if there")] = None,
    as_json: JsonOption = False,
) -> None:
    """Run a step of a model beside Inductor's: are its gradients right, and is it worth it.

    Compared are gradients with nothing changed (to the last bit), with residuals rounded, and with rows sampled (a
    test of the mean), the loss, saved bytes, peak, time and compile time. Leaves with 1 where something is wrong.

    Examples:  wtacrs check my_package.models:make;  wtacrs check ./my-model --layers 4 --json
    """
    import torch

    from wtacrs_fx.tools.check import check as look
    from wtacrs_fx.tools.predict import build
    from wtacrs_fx.tools.progress import bars

    with _errors(), bars() as progress:
        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        network, inputs = build(model, layers, batch, length, _dtype(dtype), place)
        found = look(network, inputs, progress=progress)
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
    else:
        _print_check(found, f"{model}, {batch} x {length} tokens, {dtype}, {place}")
    if found.verdict == "wrong":
        raise typer.Exit(1)


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Look at this machine: versions, compiler, caches, GPUs; compile a small model; measure products.

    The first thing to give in a bug report. Leaves with 1 where something is missing.

    Examples:  wtacrs doctor;  wtacrs doctor --json
    """
    from wtacrs_fx.tools.doctor import examine

    lines = []
    for line in examine():
        lines.append(line)
        if not as_json:
            typer.echo(f"{'ok ' if line.is_fine else 'NOT'}  {line.name}: {line.found}")
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(line) for line in lines]))
    if not all(line.is_fine for line in lines):
        raise typer.Exit(1)


@app.command()
def diagnose(
    model: Annotated[str, typer.Argument(help="module:factory of a model with its weights and of batches.")],
    ratio: RatioOption = 0.3,
    plot: Annotated[Path | None, typer.Option(help="File for the picture, .png or .svg.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure the noise that sampling adds to each layer's gradient, beside that of the minibatch.

    The factory takes no arguments and returns a model, whose output is or holds the loss, and two or more
    batches, dicts of inputs.

    Examples:  wtacrs diagnose my_package.train:model_and_batches --plot noise.png
    """
    import wtacrs_fx
    from wtacrs_fx.tools.predict import call_factory
    from wtacrs_fx.tools.progress import bars

    with _errors(), bars() as progress:
        network, batches = call_factory(model)
        found = wtacrs_fx.diagnose(network, _counted(list(batches), progress), _policy(ratio, "balanced"))
    if plot is not None:
        found.plot(plot)
    typer.echo(json.dumps(found.to_dict()) if as_json else str(found))


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """Print what is wrong with the input in one line, and leave with 2."""
    from torch._dynamo.exc import TorchDynamoException

    from wtacrs_fx import DiagnosisError, NoTangentsError, PolicyError
    from wtacrs_fx.tools.predict import ModelError
    from wtacrs_fx.tools.texts import InputError

    verbose = os.environ.get("TORCHDYNAMO_VERBOSE") == "1"
    if not verbose:
        logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # it logs tracebacks
    try:
        yield
    except (InputError, ModelError, PolicyError, DiagnosisError, NoTangentsError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    except TorchDynamoException as error:
        if verbose:
            raise
        reason = " ".join(str(error).partition("Hint:")[0].partition("\n\n")[0].split())
        typer.echo(
            f"error: the model cannot be traced ({reason}); run it in eager mode with such inputs, or set "
            "TORCHDYNAMO_VERBOSE=1 to see where this happened",
            err=True,
        )
        raise typer.Exit(2) from error


def _counted(batches: list[Any], progress: Progress) -> Iterator[Any]:
    """Yield the batches; one is done when the next is asked for."""
    for done, batch in enumerate(batches):
        progress("batches", done, len(batches))
        yield batch
    progress("batches", len(batches), len(batches))


def _dtype(name: str) -> torch.dtype:
    import torch

    from wtacrs_fx.tools.predict import ModelError

    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if name not in dtypes:
        raise ModelError(f"dtype must be one of {', '.join(dtypes)}, got {name!r}")
    return dtypes[name]


def _policy(ratio: float, residuals: str) -> Policy:
    from wtacrs_fx import Policy

    return Policy(ratio=ratio, residuals=residuals)  # type: ignore[arg-type]


def _print_prediction(found: Prediction, dtype: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from wtacrs_fx.tools.predict import CARDS, INDUCTOR
    from wtacrs_passes.report import format_bytes

    part = f"Two of {found.layers} layers of {found.name}" if found.per_token else found.name
    typer.echo(f"{part}, {found.batch} x {found.length} tokens, {dtype}:\n\n{found.report}\n")
    table = Table(
        title=f"{found.parameters / 1e6:,.1f} million parameters; saved activations; "
        "state: weights, gradients and AdamW; largest batch by memory of the GPU"
    )
    table.add_column("training")
    for column in ("saved", "to Inductor", "state", *(f"{card} GB" for card in CARDS)):
        table.add_column(column, justify="right")
    for way, size in found.saved.items():
        batches = [str(found.largest_batch(way, card)) for card in CARDS]
        share = f"{size / found.saved[INDUCTOR]:.2f}"
        table.add_row(way, format_bytes(round(size)), share, format_bytes(round(found.state[way])), *batches)
    Console().print(table)
    if found.per_token is not None:
        pair = f" + {found.per_pair:.3g} B x length" if found.per_pair else ""
        typer.echo(f"wtacrs saves batch x length x ({format_bytes(round(found.per_token))}{pair})")


def _print_frontier(found: Frontier, length: int, dtype: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from wtacrs_passes.report import format_bytes

    table = Table(
        title=f"{found.name}, samples of {length} tokens, {dtype}: what fits in {format_bytes(found.memory)} beside "
        f"{format_bytes(round(found.state))} of weights, gradients and AdamW"
    )
    table.add_column("training")
    for column in ("saved a sample", "multiplications", "largest batch"):
        table.add_column(column, justify="right")
    for point in found.points:
        saved = format_bytes(round(point.saved))
        table.add_row(point.way, saved, f"{point.work:.2f}", str(point.batch))
    Console().print(table)


def _print_check(found: Check, title: str) -> None:
    rows = {
        name: {"saved_bytes": one.saved, "peak_bytes": one.peak, "seconds": one.seconds}
        for name, one in found.figures.items()
    }
    _print_comparison(rows, title)
    for name, one in found.figures.items():
        typer.echo(f"{name}: compiled in {one.compile_seconds:.1f} s")
    for finding in found.findings:
        typer.echo(f"{finding.kind:5}  {finding.text}")
    says = {
        "good": "gradients are right, and it is worth it",
        "poor": "gradients are right; it wins little here",
        "wrong": "do not train with it: please report this, with wtacrs doctor",
    }
    typer.echo(f"verdict: {says[found.verdict]}")


def _print_comparison(rows: dict[str, dict[str, float]], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from wtacrs_passes.report import format_bytes

    table = Table("variant", title=title)
    for column in ("saved", "", "peak", "", "step", ""):
        table.add_column(column, justify="right")
    base = rows["inductor"]
    for name, row in rows.items():
        cells = []
        for metric, value in row.items():
            text = f"{value * 1e3:.1f} ms" if metric == "seconds" else format_bytes(round(value))
            cells += [text, f"{value / base[metric]:.2f}"]
        table.add_row(name, *cells)
    Console().print(table)
