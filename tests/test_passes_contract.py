"""What every pass promises, on every generated program."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Graph

from re2fx import Coupling
from re2fx.capture import capture
from re2fx.codegen import compile_graph
from re2fx.graph import Flow, copy_graph
from re2fx.passes.chain import chain
from re2fx.passes.cleanup import cleanup
from re2fx.passes.detect import detect
from re2fx.passes.normalize import normalize
from re2fx.passes.outline import outline
from re2fx.passes.rewire import rewire
from re2fx.wiring import Link

from .programs import Program, build, programs

COMMON = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def run(graph: Graph, root: nn.Module, *inputs: Tensor) -> Any:
    """What a graph returns for copies of the inputs."""
    with torch.no_grad():
        return compile_graph(graph, "contract")(root, *[x.clone() for x in inputs])


def equal(got: Any, wanted: Any) -> None:
    """Bit by bit."""
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def interface(graph: Graph) -> list[str]:
    """The names of the inputs."""
    return [node.name for node in graph.nodes if node.op == "placeholder"]


def check(program: Program, readout: Any, activation: str) -> None:
    """Run every pass and look at all it must keep."""
    network, *inputs = build(program)
    graph = capture(network).eval
    captured, values = str(graph), run(graph, network, *inputs)
    equal(values, run_module(network, *inputs))

    normal = normalize(graph, network)
    normal.lint()
    assert str(graph) == captured, "normalize changed its input"
    equal(run(normal, network, *inputs), values)
    assert str(normalize(normal, network)) == str(normal), "normalize is not idempotent"

    flow = Flow(normal, network)
    text = str(normal)
    plan = chain(flow, detect(flow), activation)
    assert plan == chain(flow, detect(flow), activation), "detection is not deterministic"
    assert pickle.loads(pickle.dumps(plan)) == plan
    for refusal in (*plan.refusals, *plan.misses):
        assert refusal.node in flow.by_name
        assert refusal.sentence

    graph, wirings = rewire(flow, plan, Coupling.re2tal(), readout, activation)
    graph.lint()
    assert str(normal) == text, "rewire changed its input"
    assert interface(graph) == interface(normal)
    if not plan.chains:
        equal(run(graph, network, *inputs), values)
    assert [len(w.blocks) for w in wirings] == [len(c) for c in plan.chains]
    rewired = run(graph, network, *inputs)

    clean = copy_graph(graph)
    for expected in (None, False):
        before = str(clean)
        changed = cleanup(clean)
        clean.lint()
        assert changed == (str(clean) != before), "cleanup is not honest"
        assert expected is None or changed is expected, "a second cleanup changes something"
        equal(run(clean, network, *inputs), rewired)
    names = {node.name for node in clean.nodes}
    for wiring in wirings:
        for step in wiring.steps:
            ends = step.currents if isinstance(step, Link) else (step.branch, step.output)
            assert names.issuperset((wiring.entry, step.current, step.previous, *ends))

    text = str(clean)
    program_ = outline(clean, network, wirings)
    assert str(clean) == text, "outline changed its input"
    with torch.no_grad():
        equal(program_.run(network, [x.clone() for x in inputs]), rewired)


def run_module(network: nn.Module, *inputs: Tensor) -> Any:
    """What the given module returns."""
    with torch.no_grad():
        return network(*[x.clone() for x in inputs])


@pytest.mark.parametrize("rank", [2, 3, 4])
@settings(COMMON, max_examples=25)
@given(
    data=st.data(),
    readout=st.sampled_from(("mean", "sum", "last")),
    activation=st.sampled_from(("branch", "stream")),
)
def test_contract(rank: int, data: st.DataObject, readout: str, activation: str) -> None:
    check(data.draw(programs(rank, activation)), readout, activation)


def test_cleanup_keeps_effects() -> None:
    """An in-place call without readers has an effect; a tuple element has none."""

    class Effect(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x * 1
            x.add_(1)
            low, _ = x.chunk(2, -1)
            _.shape[0]
            return low

    graph = capture(Effect()).eval
    assert cleanup(graph)
    assert not cleanup(graph)
    targets = [str(node.target) for node in graph.nodes]
    assert "add_" in targets
    assert len(targets) == 6, targets  # x, mul, add_, chunk, getitem, output
