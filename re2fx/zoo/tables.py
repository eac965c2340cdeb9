"""The results of a zoo to read: totals, every model, and a sentence for every kind of trouble."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

from ..tables import Table
from ..text import count
from .results import STATUSES, Results, Row

TOTALS = (
    "library", "models>", "captured>", "whole>", "rewired>", "skip-adds>", "in chains>",
    "refused>", "worst error>",
)  # fmt: skip
FINISHED = ("rewired", "refused", "no residual")
MODELS = (
    "model", "captured by", "nodes>", "found>", "chains", "refused", "share>", "gradient error>",
    "seconds>",
)  # fmt: skip


def tables(results: Results) -> Iterator[Table]:
    """Everything, the totals last, where they are seen in a terminal."""
    for group, rows in by_group(results.rows):
        yield Table(group or "models", MODELS, tuple(map(model_row, rows)))
    yield from reasons(results)
    yield totals(results)


def reasons(results: Results) -> Iterator[Table]:
    """One sentence for every kind of refusal, and one for everything that went wrong."""
    refused = tuple(refusal_rows(results.rows))
    if refused:
        yield Table("Refused", ("rule", "times>", "models>", "for example"), refused)
    lost = [row for row in results.rows if row.status not in FINISHED]
    if lost:
        rows = tuple((short(row), row.status, row.reason) for row in lost)
        yield Table("Not captured or not finished", ("model", "status", "reason"), rows)
    wrong = tuple((short(row), sentence) for row, sentence in results.findings)
    if wrong:
        yield Table("Findings", ("model", "what is wrong"), wrong)


def totals(results: Results) -> Table:
    """One row per library, and one for all."""
    libraries: dict[str, list[Row]] = defaultdict(list)
    for row in results.rows:
        libraries[row.entry.library].append(row)
    rows = [total(name, own) for name, own in libraries.items()]
    return Table("The zoo", TOTALS, (*rows, total("all", results.rows)))


def total(name: str, rows: list[Row]) -> tuple[str, ...]:
    """What became of some models."""
    errors = [row.gradient_error for row in rows if row.gradient_error is not None]
    captured = [row for row in rows if row.captured]
    numbers = (
        len(rows), len(captured), sum(row.whole for row in rows),
        sum(row.status == "rewired" for row in rows), sum(row.found for row in rows),
        sum(row.rewired for row in rows), sum(row.refused for row in rows),
    )  # fmt: skip
    return name, *map(str, numbers), f"{max(errors):.1e}" if errors else ""


def model_row(row: Row) -> tuple[str, ...]:
    """One model."""
    refused = Counter[str]()
    for refusal in row.refusals:
        refused[refusal["rule"]] += refusal["count"]
    route = row.route or row.status
    if row.parts:
        route += f", {count(len(row.parts), 'part')} rewired by itself"
    elif row.hidden:
        route += f", {', '.join(row.hidden)} kept whole"
    elif row.kept_whole:
        route += f", {count(len(row.kept_whole), 'module')} kept whole"
    return (
        short(row) + (" (fp32)" if row.dtype == "float32" else ""),
        route,
        str(row.nodes or ""),
        str(row.found) if row.route else "",
        " + ".join(map(str, row.chains)),
        ", ".join(f"{times} {rule}" for rule, times in refused.most_common()),
        "" if row.share is None else f"{row.share:.0%}",
        "" if row.gradient_error is None else f"{row.gradient_error:.1e}",
        f"{row.seconds.get('total', sum(row.seconds.values())):.1f}",
    )


def refusal_rows(rows: Iterable[Row]) -> Iterator[tuple[str, ...]]:
    """Per rule how often, in how many models, and the sentence of one of them."""
    times, models = Counter[str](), Counter[str]()
    example: dict[str, str] = {}
    for row in rows:
        for refusal in row.refusals:
            times[refusal["rule"]] += refusal["count"]
            example.setdefault(refusal["rule"], f"{short(row)}: {refusal['sentence']}")
        models.update({refusal["rule"] for refusal in row.refusals})
    for rule, number in times.most_common():
        yield rule, str(number), str(models[rule]), example[rule]


def by_group(rows: Iterable[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Rows by the group they are filed under, in the order of the first of each."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.group].append(row)
    yield from groups.items()


def short(row: Row) -> str:
    """The model's name without its options."""
    return row.entry.name.partition(":")[2]


def headline(results: Results) -> str:
    """What became of the models, in one sentence."""
    statuses = Counter(row.status for row in results.rows)
    parts = ", ".join(f"{statuses[name]} {name}" for name in STATUSES if statuses[name])
    wrong = len({row.target for row, _ in results.findings})
    return f"{count(len(results.rows), 'model')}: {parts}; findings in {wrong}"
