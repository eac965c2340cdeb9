"""Rows 18 to 20: compilers around a rewired network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

import re2fx

from ..compare import assert_same
from ..models import Block, Net
from .harness import (
    GRAPH,
    compare,
    double,
    example,
    outcome,
    pair,
    reversible,
    row,
    train,
    without,
)

X = example(5, 4)

WAYS: dict[str, tuple[bool, dict[str, Any]]] = {
    "given, as a graph": (False, GRAPH),
    "given, by regions": (False, {"compiler": "aot_eager", "scope": "region"}),
    "given, not compiled": (False, {"compiler": "eager"}),
    "rewired, as a graph": (True, GRAPH),
    "rewired, by regions": (True, {"compiler": "aot_eager", "scope": "region"}),
}


@row(18, eager=None)
@pytest.mark.parametrize("way", WAYS)
def test_the_backend(executor: str, way: str) -> None:
    """Every scope, over the given and over the rewired module: the same network."""
    rewired, options = WAYS[way]
    both = pair("eager", double(Net(dropout=0.2)))
    module: Any = both.reversible if rewired else both.model
    both.reversible = torch.compile(module, backend="re2fx", options=options)
    compare(both, X)


@row(18, eager=None)
@without("compiled", "re2fx.module:traced_for_re2fx", lambda *_: True)
@pytest.mark.parametrize("backend", ["aot_eager", "eager"])
def test_other_backends(executor: str, backend: str) -> None:
    """Without `traced_for_re2fx`: they are given marks, and nobody is told what is kept."""
    both = pair("eager", double(Net(dropout=0.2)))
    run: Any = torch.compile(both.reversible, backend=backend)
    both.reversible = run
    with pytest.warns(re2fx.Re2fxWarning, match="only backend='re2fx'") as caught:
        compare(both, X)
    assert len(caught) == 1


class Broken(Block):
    """Ends Dynamo's graph in its branch."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner(self.norm(x))
        torch._dynamo.graph_break()
        out: Tensor = x + self.outer(hidden.tanh())
        return out


def any_graph(*args: Any) -> None:
    """`check_cuts` that finds nothing."""


@row(18, eager=None, compiled="raises")
@without("compiled", "re2fx.backend:check_cuts", any_graph)
def test_a_graph_break_inside_a_chain(executor: str) -> None:
    """Without `check_cuts`: the pieces are rewired one by one, another network."""
    run = reversible(executor, double(Net(block=Broken)))
    with pytest.raises(BackendCompilerFailed, match=r"test_rows_compile\.py:") as raised:
        run(X)
    assert isinstance(raised.value.inner_exception, re2fx.ChainCutError)
    assert "rewire first" in str(raised.value)


@row(18, eager=None)
def test_a_graph_break_inside_a_rewired_chain(executor: str) -> None:
    """The remedy: rewired first, the pieces are those of one network."""
    both = pair("eager", double(Net(block=Broken)), X, capture="symbolic")
    both.reversible = reversible(executor, both.reversible)  # type: ignore[arg-type]
    compare(both, X)


def no_limit(*args: Any) -> None:
    """`warn_of_limit` that says nothing."""


@row(18, eager=None)
@without("compiled", "re2fx.backend:warn_of_limit", no_limit)
def test_the_limit_of_compiled_versions(executor: str) -> None:
    """Without `warn_of_limit`: behind it Dynamo runs the given network, and nobody is told."""
    model = double(Net())
    run: Any = torch.compile(model, backend="re2fx", options=GRAPH, dynamic=False)
    limit = 3
    with torch._dynamo.config.patch(recompile_limit=limit):
        for batch in range(2, limit + 1):
            run(example(batch, 4))
        with pytest.warns(re2fx.Re2fxWarning, match="Net has 3 compiled versions"):
            run(example(9, 4))


@row(18, compiled=None)
def test_importing_does_not_start_a_compiler(executor: str) -> None:
    """The eager executor needs none, and runs outside of what a compiler traces."""
    rev = re2fx.transform(double(Net()))
    run = torch.compiler.disable(rev)
    results = [outcome(module, rev, (X,), train) for module in (run, rev)]
    assert_same(results[0], results[1], 0.0)


@row(19)
def test_the_recompute_is_close_to_the_forward(executor: str) -> None:
    """In fp32 over 24 blocks, as a reader of the report is told: no worse than 1e-4."""
    both = pair(executor, double(Net(depth=24, dropout=0.1)).float())
    compare(both, X.float(), tolerance=1e-4)
    if executor == "eager":
        assert re2fx.verify(both.reversible, X.float()).ok  # type: ignore[arg-type]


@row(19, eager=None)
def test_regions_run_what_ran_in_the_forward(executor: str) -> None:
    """One artifact serves the forward and the rerun, so that both round alike."""
    both = pair("eager", double(Net(depth=24, dropout=0.1)).float())
    options: dict[str, Any] = {"compiler": "aot_eager", "scope": "region"}
    both.reversible = torch.compile(both.model, backend="re2fx", options=options)
    compare(both, X.float(), tolerance=1e-4)


@row(20, eager=None)
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores", "ignore:The CUDA Graph is empty")
def test_reduce_overhead(executor: str) -> None:
    """On a GPU with CUDA graphs, on a CPU without: the same network over several steps."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    both = pair("eager", double(Net(3)).to(device))
    both.reversible = torch.compile(both.model, backend="re2fx", mode="reduce-overhead")
    for _ in range(3):
        compare(both, X.to(device), tolerance=1e-9)


@row(20, compiled=None)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graph_of_a_whole_step(executor: str) -> None:
    """A captured step replays; reading the generator's state inside a capture raises."""
    model = double(Net(3)).cuda()
    rev, x = re2fx.transform(model), X.cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            rev(x).square().sum().backward()
    torch.cuda.current_stream().wait_stream(stream)
    expected = {name: p.grad.clone() / 3 for name, p in model.named_parameters()}  # type: ignore[union-attr]
    model.zero_grad(set_to_none=False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rev(x).square().sum().backward()
    model.zero_grad(set_to_none=False)
    graph.replay()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-9, atol=1e-12)
