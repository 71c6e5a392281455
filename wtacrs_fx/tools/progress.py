"""How far a long job is: what it tells, and bars for it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

Progress = Callable[[str, int, int], None]
"""``progress(part, done, total)``: so many of the steps of a part of the job are done."""


def silent(part: str, done: int, total: int) -> None:
    """Show nothing."""


@contextlib.contextmanager
def bars() -> Iterator[Progress]:
    """Show a bar for each part, on stderr, until the job is done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Bars(*columns, console=Console(stderr=True), transient=True) as shown:
        tasks = {}

        def progress(part: str, done: int, total: int) -> None:
            if part not in tasks:
                tasks[part] = shown.add_task(part)
            shown.update(tasks[part], completed=done, total=total)

        yield progress
