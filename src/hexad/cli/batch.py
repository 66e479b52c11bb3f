"""`hexad run-batch`: a file of requests, answered."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from hexad.cli import note

if TYPE_CHECKING:
    from hexad.server.batch import Counts
    from hexad.server.settings import ServerSettings


def run_batch(settings: ServerSettings, source: str, target: str) -> None:
    """Answers the requests of a file, with a bar on a terminal, and says on stderr what came of them."""
    from hexad.server.batch import STREAM, run_batch

    with _bar(wanted=target != STREAM or not sys.stdout.isatty()) as progress:
        counts = run_batch(settings, source, target, progress)
    text = f"{counts.answered:,} answered, {counts.failed:,} of them with errors"
    if counts.skipped:
        text += f"; {counts.skipped:,} had been before"
    if counts.signal:
        note(f"Interrupted: {text}." + " The same command goes on from there." * (target != STREAM))
        raise typer.Exit(128 + counts.signal)
    note(f"{text}.")


@contextmanager
def _bar(*, wanted: bool) -> Iterator[Callable[[Counts], object]]:
    """A bar on stderr while the block runs, if that is a terminal. Yields what moves it."""
    if not wanted or not sys.stderr.isatty():
        yield lambda counts: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    numbers = TextColumn("{task.fields[answered]:,} answered, {task.fields[failed]:,} with errors")
    columns = BarColumn(), numbers, TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None, answered=0, failed=0)

        def show(counts: Counts) -> None:
            answered = counts.answered + counts.skipped
            bar.update(
                task, total=counts.size, completed=counts.read, answered=answered, failed=counts.failed
            )

        yield show
