"""The command `wtacrs`. Commands import what they need when they run, so that `--help` is quick."""

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
