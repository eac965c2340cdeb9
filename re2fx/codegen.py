"""From an FX graph to a plain Python function that is called with the live root module."""

from __future__ import annotations

import itertools
import linecache
from collections.abc import Callable
from typing import Any

from torch.fx import Graph

_numbers = itertools.count()


def compile_graph(graph: Graph, name: str) -> Callable[..., Any]:
    """Compile a graph to ``function(root, *placeholders)``.

    The function looks every module and parameter up on ``root`` when it runs, so hooks, replaced
    submodules and swapped parameters are seen. Its lines show in tracebacks.
    """
    code = graph.python_code("self")
    file = f"<re2fx {name} {next(_numbers)}>"
    linecache.cache[file] = (len(code.src), None, code.src.splitlines(keepends=True), file)
    namespace = dict(code.globals)
    exec(compile(code.src, file, "exec"), namespace)
    function: Callable[..., Any] = namespace["forward"]
    return function
