"""The difference of two graphs: matched by provenance and structure, shown as code or as a page.

`diff` takes what has a graph: models, graphs, rewired modules, not only those of re2fx. The parts:
`listing` reads a graph off as plain data, `match` finds which nodes are the same, `result` says
what differs; `text`, `export` and `page` show it.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

from torch import nn
from torch.fx import Graph, GraphModule

from re2fx.errors import OptionError
from re2fx.module import RewiredModule
from re2fx.piecewise import PiecewiseModule
from re2fx.routes import capture
from re2fx.wiring import Wiring

from .listing import Listing, listing
from .result import Diff, Edge, Row, Summary, compare

__all__ = ["Diff", "Edge", "Row", "Summary", "diff", "history"]


def diff(before: Any, after: Any, *, example_inputs: Any = None) -> Diff:
    """Compare two graphs.

    Args:
        before: a `torch.fx.Graph` or `torch.fx.GraphModule`, a rewired module, or any model, which
            is captured in its mode; it is not changed.
        after: another of these.
        example_inputs: for capturing models, as for `re2fx.transform`.

    Returns:
        the difference; print it, or write it to a page with `Diff.to_html`.

    Raises:
        OptionError: an argument has no graph.
        CaptureError: a model cannot be traced.
    """
    check_whole(after)
    if isinstance(after, RewiredModule) and after.is_made_of(before):
        graph = after.history[0][1]  # as it was captured
        listed = listing(graph, type(before).__name__, kinds(before))
    else:
        listed = read(before, "before", example_inputs)
    return compare(listed, read(after, "after", example_inputs), chains(after))


def history(rev: nn.Module) -> tuple[tuple[str, Diff], ...]:
    """What each pass did to a model.

    Args:
        rev: what `re2fx.transform` returned.

    Returns:
        for each pass a name and the difference of the graphs before and after it.

    Raises:
        OptionError: the module keeps no graphs of its passes.
    """
    check_whole(rev)
    graphs: tuple[tuple[str, Graph], ...] | None = getattr(rev, "history", None)
    if graphs is None:
        raise OptionError(
            f"{type(rev).__name__} keeps no graphs of the passes it went through. Give what "
            "re2fx.transform returned."
        )
    kind_of = kinds(rev)
    listings = [listing(graph, name, kind_of) for name, graph in graphs]
    steps: list[tuple[str, Diff]] = []
    wirings: tuple[Wiring, ...] = ()
    for before, after in pairwise(listings):
        # The chains' names are those of the rewired graph and of what comes after it.
        wirings = chains(rev) if after.title == "rewired" else wirings
        name = f"{before.title} \N{RIGHTWARDS ARROW} {after.title}"
        steps.append((name, compare(before, after, wirings)))
    return tuple(steps)


def check_whole(source: Any) -> None:
    """Raise if only submodules of a model have a graph."""
    if isinstance(source, PiecewiseModule):
        path = next(iter(source.pieces), "")
        raise OptionError(
            f"{type(source).__name__} is rewired in pieces and has no graph of the whole. Take a "
            f"piece, such as re2fx.diff(model.get_submodule({path!r}), rev.pieces[{path!r}])"
        )


def read(source: Any, title: str, example_inputs: Any) -> Listing:
    """The graph of whatever has one."""
    if isinstance(source, Graph):
        owner = getattr(source, "owning_module", None)
        return listing(source, title, kinds(owner))
    if isinstance(source, GraphModule):
        name = type(source).__name__
        suffix = ", rewired" if isinstance(source, RewiredModule) else ""
        return listing(source.graph, f"{name}{suffix}", kinds(source))
    if isinstance(source, nn.Module):
        captured = capture(source, example_inputs)
        graph = captured.train if source.training else captured.eval
        return listing(graph, type(source).__name__, kinds(source))
    raise OptionError(
        f"{title}={type(source).__name__}: expected a model, a torch.fx.Graph or a "
        "torch.fx.GraphModule"
    )


def kinds(root: nn.Module | None) -> Callable[[str], str]:
    """The class of a module of a model, by path; nothing for an unknown one."""

    def kind_of(path: str) -> str:
        try:
            return type(root.get_submodule(path)).__name__ if root is not None else ""
        except AttributeError:
            return ""

    return kind_of


def chains(source: Any) -> tuple[Wiring, ...]:
    """The reversible chains of a rewired module in its mode."""
    if not isinstance(source, RewiredModule):
        return ()
    return source._rewired[source.training].wirings
