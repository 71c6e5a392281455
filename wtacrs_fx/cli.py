"""The command `wtacrs`. Commands import what they need when they run, so that `--help` is quick."""

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Train transformers in less activation memory.", no_args_is_help=True, add_completion=False
)


@app.callback()
def main() -> None:
    """Train transformers in less activation memory."""


@app.command()
def demo(
    model: Annotated[
        str | None, typer.Option(help="Folder or Hub id of an encoder.", show_default="MiniLM, packaged")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="File of lines label<TAB>text.", show_default="BBC news, packaged")
    ] = None,
    steps: Annotated[
        int, typer.Option(min=2, help="Training steps; the first compiles and is not timed.")
    ] = 32,
    batch: Annotated[int, typer.Option(min=1, help="Texts a step.")] = 16,
    length: Annotated[int, typer.Option(min=8, help="Tokens a text.")] = 128,
    ratio: Annotated[float, typer.Option(help="Share of the rows that wtacrs keeps, in (0, 1].")] = 0.3,
    seed: Annotated[int, typer.Option(help="Seed of the split, the batches and the dropout.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for demo.png and demo.csv.")] = Path("demo-results"),
) -> None:
    """Fine-tune an encoder with eager, Inductor and wtacrs side by side: accuracy, memory and time."""
    from rich.console import Console

    from wtacrs_fx.demo import InputError, Settings, run

    try:
        run(Settings(model, data, steps, batch, length, ratio, seed, out), Console())
    except InputError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error


@app.command()
def explain(
    model: Annotated[
        str, typer.Argument(help="Folder with a config.json, such a file, or a name on the Hub.")
    ],
    batch: Annotated[int, typer.Option(min=1, help="Samples a step.")] = 8,
    length: Annotated[int, typer.Option(min=1, help="Tokens a sample.")] = 1024,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    ratio: Annotated[float, typer.Option(help="Share of the rows that are kept, in (0, 1].")] = 0.3,
    residuals: Annotated[str, typer.Option(help="exact, lossless, balanced or small.")] = "balanced",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")] = False,
) -> None:
    """Tell what training a model would store, without allocating anything.

    Examples:  wtacrs explain ./my-model --batch 4 --length 4096;  wtacrs explain config.json --json
    """
    import torch
    from rich.console import Console
    from rich.table import Table

    from wtacrs_fx import Policy, PolicyError
    from wtacrs_fx.predict import CARDS, INDUCTOR, ModelError, predict
    from wtacrs_passes.report import format_bytes

    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    try:
        if dtype not in dtypes:
            raise ModelError(f"dtype must be one of {', '.join(dtypes)}, got {dtype!r}")
        policy = Policy(ratio=ratio, residuals=residuals)  # type: ignore[arg-type]
        with Console(stderr=True).status(f"tracing {model}"):
            found = predict(model, batch, length, dtypes[dtype], policy)
    except (ModelError, PolicyError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
        return
    typer.echo(
        f"Two of {found.layers} layers of {model}, {batch} x {length} tokens, {dtype}:\n\n{found.report}\n"
    )
    state = f"{found.parameters / 1e9:.2f}e9 parameters, {format_bytes(found.state)} with gradients and AdamW"
    table = Table(title=f"{state}; largest batch by memory of the GPU")
    table.add_column("training")
    for column in ("saved", "to Inductor", *(f"{card} GB" for card in CARDS)):
        table.add_column(column, justify="right")
    for way, size in found.saved.items():
        share = size / found.saved[INDUCTOR]
        batches = [str(found.largest_batch(way, card)) for card in CARDS]
        table.add_row(way, format_bytes(round(size)), f"{share:.2f}", *batches)
    Console().print(table)
