"""``re2fx zoo``: measure models of the catalogue, and say what is wrong with any."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .catalogue import Entry, catalogue
from .keepers import visit
from .results import Results

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

TIMEOUT = 300.0


def zoo(
    pattern: Annotated[
        list[str] | None,
        typer.Argument(help="Which models: a part of a name, or a pattern such as 'timm:*swin*'."),
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Models at a time.")] = 1,
    timeout: Annotated[
        float, typer.Option("--timeout", min=0.0, help="Seconds for one model.")
    ] = TIMEOUT,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Keep the results, model by model."),
    ] = None,
    fresh: Annotated[
        bool,
        typer.Option("--fresh/--resume", help="Measure again what the file already holds."),
    ] = False,
    listing: Annotated[bool, typer.Option("--list", help="Say which models these are.")] = False,
) -> None:
    """Rewire models of torchvision, timm, transformers and others, and check each."""
    from rich.console import Console

    from .tables import headline, tables

    entries = catalogue(pattern or ())
    if not entries:
        raise typer.BadParameter("no model fits", param_hint="PATTERN")
    if listing:
        for entry in entries:
            typer.echo(" ".join((entry.target, *entry.inputs)))
        return
    results = Results.load(json_file) if json_file is not None else Results()

    def save(results: Results) -> None:
        if json_file is not None:
            results.save(json_file)

    todo = entries if fresh else results.missing(entries)
    tour(todo, results, save, jobs, timeout, Console(stderr=True))
    own = results.only(entries)
    console = Console()
    for table in tables(own):
        console.print(table.to_rich())
    console.print(headline(own), highlight=False)
    raise typer.Exit(1 if own.findings else 0)


def tour(
    entries: Sequence[Entry],
    results: Results,
    save: Callable[[Results], None],
    jobs: int,
    timeout: float,
    console: Console,
) -> None:
    """Measure models under a bar, and save what is known after each.

    Args:
        entries: which.
        results: gets their rows.
        save: called after each model.
        jobs: models at a time.
        timeout: seconds for one.
        console: where the bar is drawn.
    """
    if not entries:
        return
    with _bar(console) as bar:
        task = bar.add_task("the zoo", total=len(entries), last="")
        for row in visit(entries, jobs, timeout):
            results.put(row)
            save(results)
            bar.update(task, advance=1, last=f"{row.entry.name}: {row.status}")
            for sentence in row.findings:
                bar.console.print(f"{row.entry.name}: {sentence}", highlight=False, markup=False)


def _bar(console: Console) -> Progress:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[last]}", markup=False),
        console=console,
    )
