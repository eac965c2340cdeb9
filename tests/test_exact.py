"""Fixed-point streams: stored execution of the same network, to the bit."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import re2fx
from re2fx.exact import DECODE, ENCODE, FixedCoupling
from re2fx.fixed_point import Kernels, change
from re2fx.gauge import Gauge
from re2fx.inner import Inner
from re2fx.memory import live_bytes
from re2fx.program import calls_made_by
from re2fx.runtime import ChainCall, Reverse

from .compare import Outcome, assert_same, step, weighted
from .models import ConvNet, Net, Tapped

C = re2fx.Coupling
COUPLINGS = {
    "re2tal": C.re2tal(),
    "1 bit": C.consistent(0.5),
    "2 bits": C.consistent(0.25),
    "3 bits": C.midpoint(0.125, 0.7),
    "8 bits": C.consistent(2.0**-8),
    "negative": C.momentum(0.5),
    "free a and c": C(0.3, -0.25, -1.3),
    "double": C.double(),
}


def example(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


X, IMAGE, CONTEXT = example(5, 4), example(4, 3, 6, 6), example(3, 8)
MODELS: dict[str, tuple[Any, tuple[Tensor, ...]]] = {
    "dropout": (lambda: Net(6, dropout=0.2), (X,)),
    "batch norm": (lambda: ConvNet(dropout=0.2), (IMAGE,)),
    "tapped": (Tapped, (CONTEXT, CONTEXT.flip(0))),
}


def rewired(model: nn.Module, **options: Any) -> re2fx.RewiredModule:
    rev = re2fx.transform(model, exact=True, **options)
    assert isinstance(rev, re2fx.RewiredModule)
    return rev


def made(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    build, inputs = MODELS[name]
    return build(), inputs


def assert_equal(got: Outcome, expected: Outcome) -> None:
    """To the bit."""
    assert_same(got, expected, 0.0)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_gradients_are_those_of_stored_execution(coupling: str, model: str) -> None:
    network, inputs = made(model)
    rev = rewired(network, coupling=COUPLINGS[coupling])
    assert_equal(step(rev, "reversible", *inputs), step(rev, "store", *inputs))


@pytest.mark.parametrize("gamma", [0.5, 0.25, -0.5])
@pytest.mark.parametrize("model", MODELS)
def test_drawn_signs(model: str, gamma: float) -> None:
    """BDIA: one bit per element and block for 1/2; the given network in eval mode."""
    network, inputs = made(model)
    rev = rewired(network, coupling=C.bdia(gamma), readout="last")
    got = step(rev, "reversible", *inputs)
    assert_equal(got, step(rev, "store", *inputs))
    floating: Any = re2fx.transform(network, coupling=C.bdia(gamma), readout="last", memory="store")
    near = step(floating, "store", *inputs)
    torch.testing.assert_close(got.outputs[0], near.outputs[0], rtol=1e-3, atol=1e-3)
    how: dict[str, Any] = {"coupling": C.original(), "readout": "last", "memory": "store"}
    given: Any = re2fx.transform(network.eval(), **how)
    expected = step(given, "store", *inputs)
    assert_same(step(rev, "reversible", *inputs), expected, 1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("readout", ["mean", "sum"])
def test_dtypes(dtype: torch.dtype, readout: str) -> None:
    network, (x,) = made("dropout")
    rev = rewired(network.to(dtype), coupling=C.consistent(0.25), readout=readout)
    got, expected = (step(rev, memory, x.to(dtype)) for memory in ("reversible", "store"))
    assert_equal(got, expected)
    assert got.outputs[0].dtype == dtype


@pytest.mark.parametrize("activation", ["branch", "stream"])
def test_moved_activations(activation: str) -> None:
    network, inputs = made("batch norm")
    rev = rewired(network, coupling=C.consistent(0.5), activation=activation)
    assert_equal(step(rev, "reversible", *inputs), step(rev, "store", *inputs))


class Links(nn.Module):
    """Shape-only operations between its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for number, block in enumerate(self.blocks):
            x = x + block(x).tanh()
            x = x.transpose(1, 2).contiguous() if number % 2 else x.reshape(2, 6, 6)
        return x


def test_links_move_the_bits() -> None:
    rev = rewired(Links(), coupling=C.consistent(0.25))
    assert len(rev.plan.chains[0]) == 4
    assert any(rev.plan.chains[0].links)
    x = example(2, 6, 6)
    assert_equal(step(rev, "reversible", x), step(rev, "store", x))


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("coupling", ["re2tal", "1 bit", "2 bits", "3 bits"])
def test_deep_and_trained(coupling: str, mixed: bool) -> None:
    """96 residuals whose weights have moved, with dropout; in floating point b = 1/8 overflows."""
    torch.manual_seed(0)
    rev = rewired(Net(96, dropout=0.1), coupling=COUPLINGS[coupling])
    optimizer = torch.optim.Adam(rev.parameters(), 1e-3)
    context = torch.autocast("cpu", torch.bfloat16) if mixed else nullcontext()
    x, target = example(16, 4), example(16, 3)
    for _ in range(5):
        with context:
            loss = (rev(x).float() - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def trained(memory: Any) -> Outcome:
        rev.memory = memory
        rev.zero_grad()
        torch.manual_seed(1)
        with context:
            output = rev(x)
        weighted(output.float()).backward()
        gradients = {name: p.grad for name, p in rev.named_parameters()}
        return Outcome([output.detach()], gradients, {}, torch.get_rng_state())

    assert_equal(trained("reversible"), trained("store"))
    with context, re2fx.record() as calls:
        rev.memory = "reversible"
        rev(x)
    start = DECODE(ENCODE(rev.get_submodule("stem")(x).detach(), -1, 0), -1, 0)
    if not mixed:
        assert torch.equal(calls[0].reconstruct(), start)


def test_in_floating_point_it_is_not() -> None:
    """The same comparison notices what floating point loses."""
    network, inputs = made("dropout")
    rev: Any = re2fx.transform(network, coupling=C.consistent(0.5))
    got, expected = step(rev, "reversible", *inputs), step(rev, "store", *inputs)
    with pytest.raises(AssertionError):
        assert_equal(got, expected)


@pytest.mark.parametrize("bits", range(4))
def test_side_bits(bits: int) -> None:
    """J / 8 bytes for each element and block, nothing for b = 1."""
    kept = {}
    for depth in (4, 20):
        torch.manual_seed(0)
        rev = rewired(Net(depth, width=64), coupling=C.consistent(2.0**-bits))
        kept[depth] = live_bytes(lambda rev=rev: rev(example(32, 4)))  # type: ignore[misc]
    assert kept[20] - kept[4] == 16 * 32 * 64 * bits / 8


def test_the_report_counts_them() -> None:
    found = re2fx.report(Net(8, width=64), example(32, 4), exact=True, coupling=C.consistent(0.25))
    plain = re2fx.report(Net(8, width=64), example(32, 4))
    assert found.total.reversible is not None
    assert plain.total.reversible is not None
    assert found.total.reversible - plain.total.reversible == 7 * 32 * 64 * 2 / 8
    assert found.chains[0].side_bytes == 7 * 32 * 64 * 2 / 8
    assert "Chain 0 keeps 2 bits per element and block, 3.5 KiB of it" in str(found)


def test_numbers_are_read_as_floating_point() -> None:
    """Outputs, taps, readouts and what is recorded; the whole numbers stay inside."""
    network, inputs = made("dropout")
    rev = rewired(network)
    floating: Any = re2fx.transform(network, memory="store")
    torch.manual_seed(0)
    expected = floating(*inputs)
    torch.manual_seed(0)
    with re2fx.record() as calls:
        output = rev(*inputs)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    assert calls[0].output is not None
    for state in calls[0].output:
        assert torch.equal(state, (state * 2**16).round() / 2**16)
    stem = rev.get_submodule("stem")(*inputs)
    torch.testing.assert_close(calls[0].reconstruct(), stem, rtol=0, atol=2.0**-17)


def test_tools() -> None:
    """verify, the drift guard, copies and pickles."""
    network, inputs = made("dropout")
    rev = rewired(network, coupling=C.consistent(0.25))
    found = re2fx.verify(rev, inputs)
    assert found.ok
    assert not found.findings
    assert {block.error for chain in found.chains for block in chain.blocks} == {0.0}
    with re2fx.DriftGuard(rev, every=1, tolerance=1e-30, action="raise") as guard:
        for _ in range(6):
            rev(*inputs).sum().backward()
    assert len(guard.history) > 1
    assert {drift.error for drift in guard.history} == {0.0}
    assert [*rev.state_dict()] == [*network.state_dict()]
    rev.load_state_dict(network.state_dict(), strict=True)
    for other in (copy.deepcopy(rev), pickle.loads(pickle.dumps(rev))):
        assert_equal(step(other, "reversible", *inputs), step(rev, "store", *inputs))


@pytest.mark.parametrize("memory", ["reversible", "store"])
@pytest.mark.parametrize(("value", "says"), [(1e5, "does not fit"), (float("nan"), "not a number")])
def test_what_does_not_fit(memory: Any, value: float, says: str) -> None:
    """In a branch and in the chain's input; the next step is a clean one."""
    network, (x,) = made("dropout")
    rev = rewired(network)
    before = step(rev, memory, x)
    with torch.no_grad():
        bias = rev.get_parameter("blocks.2.outer.bias")
        old = bias.clone()
        bias.fill_(value)
    with pytest.raises(re2fx.RangeError, match=says) as raised:
        rev(x)
    assert "models.py" in str(raised.value)
    with torch.no_grad():
        bias.copy_(old)
    with pytest.raises(re2fx.RangeError, match="chain's input"):
        rev(x * 1e6)
    assert_equal(step(rev, memory, x), before)


def test_a_sum_of_small_changes_does_not_overflow_unseen() -> None:
    """Each change fits, and their sum does not."""
    network, (x,) = made("dropout")
    rev = rewired(network.eval())
    with torch.no_grad():
        for number in range(6):
            rev.get_parameter(f"blocks.{number}.outer.bias").fill_(9000.0)
    for rev.memory in ("reversible", "store"):
        with pytest.raises(re2fx.RangeError, match="does not fit"):
            rev(x)


def test_figures_that_wait_for_the_end_of_the_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where nobody wants to wait for each block."""
    coupling = FixedCoupling.of(C.re2tal(), re2fx.FixedPoint())
    gauge = Gauge()
    monkeypatch.setattr("re2fx.gauge.immediate", lambda tensor: False)
    state = ENCODE(torch.full((4,), 9000.0), -1, 0)
    branch = torch.full((4,), 9000.0)
    for number in range(3):
        state, _ = coupling.advance(state, state, branch, None, gauge, f"block {number}")
    with pytest.raises(re2fx.RangeError, match=r"block 0: a value of 1.8e\+04 does not fit"):
        gauge.settle()
    gauge.settle()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"coupling": C.consistent(0.3)}, "b = 0.3 is no power of two"),
        ({"coupling": C.consistent(2.0)}, "b = 2 is out of range"),
        ({"coupling": C.consistent(2.0**-9)}, "out of range"),
        ({"exact": 3}, "expected True, False or a re2fx.FixedPoint"),
    ],
)
def test_bad_arguments(options: dict[str, Any], says: str) -> None:
    with pytest.raises(re2fx.OptionError, match=says):
        re2fx.transform(Net(3), **{"exact": True, **options})


@pytest.mark.parametrize("values", [{"width": 16}, {"fraction": 31}, {"fraction": -1}])
def test_bad_points(values: dict[str, Any]) -> None:
    with pytest.raises(re2fx.OptionError, match="exact: "):
        re2fx.FixedPoint(**values)


@pytest.mark.parametrize("point", [re2fx.FixedPoint(8), re2fx.FixedPoint(40, 64)])
def test_finer_and_coarser_numbers(point: re2fx.FixedPoint) -> None:
    network, inputs = made("dropout")
    rev: Any = re2fx.transform(network, exact=point, coupling=C.consistent(0.5))
    got = step(rev, "reversible", *inputs)
    assert_equal(got, step(rev, "store", *inputs))
    floating: Any = re2fx.transform(network, memory="store", coupling=C.consistent(0.5))
    error = (got.outputs[0] - step(floating, "store", *inputs).outputs[0]).abs().max()
    bits = point.fraction or 0
    assert 0 < error < 2.0 ** -(min(bits, 20) - 4)


# Compiled.


class Stored(ChainCall):
    """Runs the same blocks and lets autograd keep everything."""

    def block(self, frame: Reverse, sides: Any) -> Tensor:
        current, previous = self.streams
        branch = frame.branch(self.root, current, *sides)
        following, _ = frame.coupling.advance(current, previous, branch, None, Gauge(), frame.name)
        self._streams = (following, current)
        assert isinstance(following, Tensor)
        return following

    def leave(self) -> None:
        self._streams = None


def outcome(run: Any, model: nn.Module, inputs: tuple[Tensor, ...]) -> Outcome:
    model.zero_grad()
    torch.manual_seed(0)
    output = run(*inputs)
    weighted(output).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return Outcome([output.detach()], gradients, {}, torch.get_rng_state())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo hides it
@pytest.mark.parametrize("given", ["model", "rewired"])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled_by_regions(compiler: str, given: str) -> None:
    """Equal to the eager executor, whether Dynamo gets the model or its rewired form."""
    network, inputs = made("tapped")
    options: dict[str, Any] = {"compiler": compiler, "scope": "region"}
    coupling = C.consistent(0.25)
    rev = rewired(network, coupling=coupling)
    if given == "model":
        options |= {"exact": True, "coupling": coupling}
    run = torch.compile(network if given == "model" else rev, backend="re2fx", options=options)
    kept = live_bytes(lambda: run(*inputs))
    assert kept < live_bytes(lambda: Tapped()(*inputs))
    got = outcome(lambda *args: run(*args)[0], network, inputs)
    assert_equal(got, outcome(lambda *args: rev(*args)[0], network, inputs))
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("mixed", [False, True])
def test_compiled_by_inductor(mixed: bool) -> None:
    """The very same kernels run again: no bit differs from running them once and storing."""
    network, inputs = made("dropout")
    options: dict[str, Any] = {
        "scope": "region", "exact": True, "coupling": C.consistent(0.25)
    }  # fmt: skip
    run = torch.compile(network.eval(), backend="re2fx", options=options)
    context = torch.autocast("cpu", torch.bfloat16) if mixed else nullcontext()
    with context:
        run(*inputs)
        got = outcome(run, network, inputs)
        with calls_made_by(lambda chain, root, *starts: Stored(root, *starts)):
            assert_equal(got, outcome(run, network, inputs))
    torch.compiler.reset()


def test_more_couplings_in_a_process_than_dynamo_compiles_one_function_for() -> None:
    """A schedule goes through many, and every network that is compiled has its own."""
    torch.compiler.reset()
    whole, branch = torch.arange(6, dtype=torch.int32), example(6)
    for number in range(10):
        kernels = Kernels().compiled(Inner("aot_eager").wrap)
        for a in (0.0, 0.1 + number):
            got = kernels.change(whole, branch, torch.float32, a, 1.0 + number)
            assert torch.equal(got[0], change(whole, branch, torch.float32, a, 1.0 + number)[0])
    torch.compiler.reset()


@pytest.mark.parametrize("given", ["model", "rewired"])
def test_whole_graphs_are_refused(given: str) -> None:
    network, inputs = made("dropout")
    options: dict[str, Any] = {"compiler": "aot_eager"}
    subject: Any = rewired(network)
    if given == "model":
        subject, options["exact"] = network, True
    with pytest.raises(Exception, match="Use scope='region'") as raised:
        torch.compile(subject, backend="re2fx", options=options)(*inputs)
    inner = getattr(raised.value, "inner_exception", raised.value)
    assert isinstance(inner, re2fx.OptionError)
    torch.compiler.reset()


def test_another_backend_runs_the_same_network() -> None:
    network, inputs = made("dropout")
    rev = rewired(network.eval())
    run = torch.compile(rev, backend="aot_eager")
    with pytest.warns(re2fx.Re2fxWarning, match="stores"):
        got = outcome(run, network, inputs)
    assert_equal(got, outcome(rev, network, inputs))
    torch.compiler.reset()


def test_double_backward() -> None:
    network, (x,) = made("dropout")
    rev = rewired(network, coupling=C.consistent(0.5))

    def penalty(memory: Any) -> list[Tensor]:
        rev.memory = memory
        torch.manual_seed(0)
        given = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(rev(given).square().sum(), given, create_graph=True)
        return list(
            torch.autograd.grad(
                gradient.square().sum(), [*rev.parameters()], None, True, False, True
            )
        )

    for got, expected in zip(penalty("reversible"), penalty("store"), strict=True):
        if expected is not None:
            assert torch.equal(got, expected)


def test_a_coupling_that_moves() -> None:
    """By powers of two; another one changes nothing."""
    network, (x,) = made("dropout")
    rev = rewired(network, coupling=C.consistent(0.25))
    schedule = re2fx.Schedule(rev, C.consistent(0.25), C.re2tal(), over=4, snap=True)
    shifts = []
    for _ in range(5):
        assert_equal(step(rev, "reversible", x), step(rev, "store", x))
        assert isinstance(rev.coupling, C)
        shifts.append(abs(rev.coupling.b))
        schedule.step()
    assert shifts == [0.25, 0.5, 0.5, 1.0, 1.0]
    with pytest.raises(re2fx.OptionError, match="no power of two"):
        rev.coupling = C.consistent(0.3)
    assert rev.coupling == C.re2tal()


def test_without_gradients_and_in_eval_mode() -> None:
    network, (x,) = made("dropout")
    rev = rewired(network.eval(), coupling=C.consistent(0.25))
    with torch.no_grad():
        plain = rev(x)
    assert torch.equal(plain, rev(x))
    assert plain.grad_fn is None
