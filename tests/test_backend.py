"""``torch.compile(model, backend="re2fx")``: the same network as `transform`'s, compiled."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import re2fx
from re2fx.errors import ChainCutError
from re2fx.memory import saved_bytes

from .compare import Loss, Outcome, assert_same, weighted
from .models import Block, ConvNet, Net, Tapped

Options = dict[str, Any]
Run = Callable[..., Any]

GRAPH: Options = {"compiler": "aot_eager"}
REGION: Options = {"compiler": "aot_eager", "scope": "region"}
EAGER: Options = {"compiler": "eager"}
EXECUTORS = {"graph": GRAPH, "region": REGION, "eager": EAGER}

# What the forward keeps for every random operator that its backward draws again.
STATE = torch.get_rng_state().nbytes

# Dynamo hides this warning from everybody but those who make warnings errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")

executors = pytest.mark.parametrize("options", EXECUTORS.values(), ids=EXECUTORS)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Compiled code does not outlive its test; one thread, for sums of one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.compiler.reset()
    yield
    torch.compiler.reset()
    torch.set_num_threads(threads)


def compiled(model: Any, options: Options | None = GRAPH, **kwargs: Any) -> Any:
    """A compiled module or function; a graph break is an error unless it is asked for."""
    return torch.compile(
        model, backend="re2fx", options=options, fullgraph=kwargs.pop("fullgraph", True), **kwargs
    )


def step(
    run: Run,
    model: nn.Module,
    *inputs: Any,
    seed: int = 0,
    loss: Loss = weighted,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Outcome:
    """Forward and backward of a callable around a model; buffers are put back afterwards."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.zero_grad(set_to_none=True)
    inputs = tuple(
        x.clone().requires_grad_(x.is_floating_point()) if isinstance(x, Tensor) else x
        for x in inputs
    )
    torch.manual_seed(seed)
    with context():
        output = run(*inputs)
    loss(output).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    gradients.update((f"input {i}", x.grad) for i, x in enumerate(inputs) if isinstance(x, Tensor))
    outcome = Outcome(
        [leaf.detach() for leaf in pytree.tree_leaves(output)],
        gradients,
        {name: buffer.clone() for name, buffer in model.named_buffers()},
        torch.get_rng_state(),
    )
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])
    return outcome


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """A model in fp64 with the same parameters every time."""
    torch.manual_seed(0)
    return build().double()


def example(*shape: int) -> Tensor:
    """An input in fp64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def rewired(model: nn.Module, **options: Any) -> re2fx.RewiredModule:
    """Transform and narrow the type."""
    rev = re2fx.transform(model, **options)
    assert isinstance(rev, re2fx.RewiredModule)
    return rev


def fails(
    error: type[Exception], run: Callable[[], Any], match: str | None = None, direct: bool = False
) -> str:
    """The message of the error that Dynamo wraps, or raises as it is."""
    if direct:
        with pytest.raises(error, match=match) as plain:
            run()
        return str(plain.value)
    with pytest.raises(BackendCompilerFailed, match=match) as wrapped:
        run()
    assert isinstance(wrapped.value.inner_exception, error)
    return str(wrapped.value.inner_exception)


X = example(5, 4)


# The entry point


FRESH = """
import sys
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.mix(torch.tanh(self.norm(x)))

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 8), *[Block() for _ in range(4)], nn.Linear(8, 1)).double()
assert "re2fx" not in sys.modules
run = torch.compile(model, backend="re2fx", fullgraph=True, options={"compiler": "aot_eager"})
optimizer = torch.optim.SGD(model.parameters(), 0.05)
x = torch.randn(64, 4, dtype=torch.float64)
for _ in range(20):
    optimizer.zero_grad()
    loss = (run(x) - x.sum(1, keepdim=True)).square().mean()
    loss.backward()
    optimizer.step()
    print(loss.item())
assert "re2fx.backend" in sys.modules
"""


def python(code: str, folder: Path) -> str:
    """Run a script in a process of its own, warnings as errors."""
    script = folder / "script.py"
    script.write_text(code)
    command = [sys.executable, "-W", "error", str(script)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_backend_is_found_without_an_import_and_trains(tmp_path: Path) -> None:
    losses = [float(line) for line in python(FRESH, tmp_path).splitlines()]
    assert len(losses) == 20
    assert losses[-1] < 0.5 * losses[0]


def test_importing_the_package_does_not_import_the_compiler(tmp_path: Path) -> None:
    code = (
        "import sys, torch\n"
        "before = {n for n in sys.modules if n.startswith(('torch._inductor', 'torch._dynamo'))}\n"
        "import re2fx\n"
        "after = {n for n in sys.modules if n.startswith(('torch._inductor', 'torch._dynamo'))}\n"
        "print(sorted(after - before))\n"
    )
    assert python(code, tmp_path).strip() == "[]"


# Options


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"copling": None}, "no option 'copling'.*coupling"),
        ({"mode": "default"}, "no option 'mode'"),
        ({"compiler": "gcc"}, "compiler='gcc'"),
        ({"compiler": "eager", "scope": "block"}, "scope='block'"),
        ({"compiler": "eager", "coupling": "re2tal"}, "coupling='re2tal'"),
        ({"compiler": "eager", "coupling": re2fx.Coupling.original()}, "b = 0"),
        ({"compiler": "eager", "readout": "median"}, "readout='median'"),
        ({"compiler": "eager", "activation": "head"}, "activation='head'"),
        ({"compiler": "eager", "memory": "forget"}, "memory='forget'"),
        ({**REGION, "memory": "store"}, "scope='region'"),
        ({"compiler": "aot_eager", "compiler_options": {"freezing": True}}, "compiler_options"),
        ({"compiler_options": {"no_such_setting": 1}}, "no_such_setting"),
        ({"scope": "region", "compiler_options": {"no_such_setting": 1}}, "no_such_setting"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_a_bad_option_is_refused_by_name(options: Options, match: str) -> None:
    fails(re2fx.OptionError, lambda: compiled(Net(2), options)(torch.randn(5, 4)), match)


def test_an_unknown_mode_is_refused() -> None:
    run = torch.compile(Net(2), backend="re2fx", mode="fastest")
    fails(re2fx.OptionError, lambda: run(torch.randn(5, 4)), "mode='fastest'")


@pytest.mark.parametrize("compiler", ["aot_eager", "eager"])
def test_a_mode_is_for_inductor_only(compiler: str) -> None:
    from re2fx.backend import re2fx as backend

    def custom(module: torch.fx.GraphModule, inputs: list[Any]) -> Run:
        return backend(module, inputs, mode="max-autotune", options={"compiler": compiler})

    run: Any = torch.compile(Net(2), backend=custom)
    fails(re2fx.OptionError, lambda: run(torch.randn(5, 4)), "mode='max-autotune'.*inductor")


def test_an_ill_conditioned_coupling_is_refused() -> None:
    options = {**EAGER, "coupling": re2fx.Coupling.consistent(0.001)}
    fails(re2fx.ConditioningError, lambda: compiled(Net(12), options)(torch.randn(5, 4)))
    stored = compiled(Net(12), {**options, "memory": "store"})
    assert stored(torch.randn(5, 4)).shape == (5, 3)


class Broken(nn.Module):
    """A graph break between two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.first, self.second = Block(8), Block(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.stem(x))
        torch._dynamo.graph_break()
        out: Tensor = self.second(x)
        return out


def test_suppressed_errors_still_reach_the_caller() -> None:
    """Dynamo would run the network as it was: another function."""
    with torch._dynamo.config.patch(suppress_errors=True):
        run = compiled(Net(2), {"compiler": "gcc"}, fullgraph=False)
        fails(re2fx.OptionError, lambda: run(torch.randn(5, 4)), "gcc", direct=True)
        run = compiled(Broken(), fullgraph=False)
        fails(ChainCutError, lambda: run(torch.randn(5, 4)), direct=True)


# Models with nothing to rewire


def plain() -> nn.Module:
    """No residual at all."""
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def test_nothing_to_rewire_is_said_and_compiled_unchanged() -> None:
    model = seeded(plain)
    expected = step(model, model, X)
    run = compiled(model)
    with pytest.warns(re2fx.Re2fxWarning, match="nothing in Sequential can be rewired"):
        got = step(run, model, X)
    assert_same(got, expected, 1e-12)


def test_nothing_to_rewire_is_an_error_if_strict() -> None:
    run = compiled(plain(), {**GRAPH, "strict": True})
    fails(re2fx.NoResidualError, lambda: run(torch.randn(5, 4)), "nothing in Sequential")


@pytest.mark.parametrize("strict", [False, True])
def test_a_piece_without_residuals_is_silent(strict: bool) -> None:
    class Pieces(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.first(x))
            torch._dynamo.graph_break()
            out: Tensor = self.second(x)
            return out

    model = seeded(Pieces)
    run = compiled(model, {**GRAPH, "strict": strict}, fullgraph=False)
    assert_same(step(run, model, X), step(model, model, X), 1e-12)


# The same function as transform's


@executors
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_without_gradients_it_is_the_same_function(training: bool, options: Options) -> None:
    model = seeded(lambda: Net(3, dropout=0.4)).train(training)
    expected = []
    for run in (rewired(model), compiled(model, options)):
        torch.manual_seed(0)
        with torch.no_grad():
            expected.append(run(X))
    torch.testing.assert_close(expected[1], expected[0], rtol=1e-12, atol=1e-12)


@executors
def test_batch_norm_in_eval_mode_is_the_same_function(options: Options) -> None:
    model = seeded(ConvNet).eval()
    images = example(2, 3, 6, 6)
    with torch.no_grad():
        expected = rewired(model)(images)
        torch.testing.assert_close(compiled(model, options)(images), expected, rtol=0, atol=1e-12)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]] = {
    "transformer": (lambda: Net(4, dropout=0.4), ((5, 4),)),
    "residual network": (lambda: ConvNet(3, dropout=0.4), ((3, 3, 6, 6),)),
    "taps and side inputs": (lambda: Tapped(), ((5, 8), (5, 8))),
}


@executors
@pytest.mark.parametrize("name", MODELS)
def test_executors_agree(name: str, options: Options) -> None:
    """Values, gradients, buffers and the random stream afterwards."""
    build, shapes = MODELS[name]
    model = seeded(build)
    inputs = [example(*shape) for shape in shapes]
    expected = step(rewired(model, memory="store"), model, *inputs)
    assert_same(step(compiled(model, options), model, *inputs), expected, 1e-10)


@executors
def test_a_stored_form_is_the_same_network(options: Options) -> None:
    if options is REGION:
        pytest.skip("runs reversibly only")
    model = seeded(lambda: Net(4, dropout=0.4))
    expected = step(rewired(model, memory="store"), model, X)
    run = compiled(model, {**options, "memory": "store"})
    assert_same(step(run, model, X), expected, 1e-12)


@executors
def test_a_new_batch_size(options: Options) -> None:
    model = seeded(lambda: Net(3, dropout=0.4))
    run, store = compiled(model, options), rewired(model, memory="store")
    for batch in (5, 7, 11):
        x = example(batch, 4)
        assert_same(step(run, model, x), step(store, model, x), 1e-10)


@executors
def test_dynamic_shapes(options: Options) -> None:
    class Reshaping(Net):
        def forward(self, x: Tensor) -> Tensor:
            batch, tokens = x.shape[:2]
            x = self.blocks(self.stem(x.reshape(batch * tokens, -1)))
            return self.head(x.view(batch, tokens, -1)) / tokens

    model = seeded(lambda: Reshaping(3, dropout=0.4))
    run, store = compiled(model, options, dynamic=True), rewired(model, memory="store")
    for batch, tokens in ((2, 3), (5, 4)):
        x = example(batch, tokens, 4)
        assert_same(step(run, model, x), step(store, model, x), 1e-10)


@executors
def test_autocast(options: Options) -> None:
    torch.manual_seed(0)
    model, x = Net(4, dropout=0.2), X.float()

    def half() -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16)

    expected = step(compiled(model, {**EAGER, "memory": "store"}), model, x, context=half)
    torch.compiler.reset()
    got = step(compiled(model, options), model, x, context=half)
    assert got.outputs[0].dtype == torch.bfloat16
    assert_same(got, expected, 2e-2)
    assert torch.equal(got.outputs[0], expected.outputs[0])


@executors
def test_a_half_precision_model(options: Options) -> None:
    """Streams are wide, branches see what they were written for."""
    torch.manual_seed(0)
    model, x = Net(4).bfloat16(), X.bfloat16()
    got = step(compiled(model, options), model, x, loss=lambda y: y.float().square().sum())
    store = rewired(model, memory="store")
    expected = step(store, model, x, loss=lambda y: y.float().square().sum())
    assert got.outputs[0].dtype == torch.bfloat16
    assert torch.equal(got.outputs[0], expected.outputs[0])
    assert_same(got, expected, 2e-2)


@executors
def test_frozen_parameters(options: Options) -> None:
    model = seeded(lambda: Net(5))
    model.get_submodule("stem").requires_grad_(False)
    for frozen in ("blocks.0", "blocks.3"):
        model.get_submodule(frozen).requires_grad_(False)
    store = rewired(model, memory="store")
    got = gradients(compiled(model, options), model, X)
    torch.testing.assert_close(got, gradients(store, model, X), rtol=0, atol=1e-10)


def gradients(run: Run, model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Gradients of the parameters that train; ``x`` is given as it is."""
    model.zero_grad(set_to_none=True)
    run(x).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# Memory


def saved(run: Run, model: nn.Module, x: Tensor) -> int:
    """Bytes kept for the backward."""
    run(x)
    return saved_bytes(lambda: run(x), model).total


@executors
def test_saved_bytes_grow_by_one_generator_state_per_dropout_only(options: Options) -> None:
    sizes = set()
    for depth in (4, 8, 16) if options is GRAPH else (3, 6):
        torch.compiler.reset()
        torch.manual_seed(0)
        model = Net(depth, dropout=0.3).double()
        sizes.add(saved(compiled(model, options), model, example(64, 4)) - depth * STATE)
    assert len(sizes) == 1, sizes


def test_saved_bytes_without_random_operators_do_not_depend_on_depth() -> None:
    sizes = set()
    for depth in (3, 6):
        torch.compiler.reset()
        torch.manual_seed(0)
        model = Net(depth).double()
        sizes.add(saved(compiled(model), model, example(64, 4)))
    assert len(sizes) == 1, sizes
    torch.compiler.reset()
    stored = saved(compiled(model, {**GRAPH, "memory": "store"}), model, example(64, 4))
    assert stored > 4 * max(sizes)


# Options about the rewiring


REWIRINGS: dict[str, Options] = {
    "coupling": {"coupling": re2fx.Coupling.consistent(0.75)},
    "readout": {"readout": "sum"},
    "last": {"readout": "last"},
    "both": {"coupling": re2fx.Coupling.dr2net(0.3, 0.7), "readout": "sum"},
    "activation": {"activation": "stream"},
    "original": {"coupling": re2fx.Coupling.original(), "memory": "store"},
}


@pytest.mark.parametrize("name", REWIRINGS)
def test_options_reach_the_rewiring(name: str) -> None:
    options = REWIRINGS[name]
    build, x = (ConvNet, example(2, 3, 6, 6)) if name == "activation" else (Net, X)
    model = seeded(build)
    expected = step(rewired(model, **{**options, "memory": "store"}), model, x)
    assert_same(step(compiled(model, {**GRAPH, **options}), model, x), expected, 1e-10)


def test_a_leaf_path_keeps_its_residual() -> None:
    model = seeded(lambda: Net(5))
    expected = rewired(model, leaves=["blocks.1"])(X)
    run = compiled(model, {**EAGER, "leaves": ["blocks.1"]})
    torch.testing.assert_close(run(X), expected, rtol=0, atol=1e-12)


def test_a_leaf_keeps_everything_below_it() -> None:
    model = seeded(lambda: Net(5))
    run = compiled(model, {**EAGER, "leaves": ["blocks"]})
    with pytest.warns(re2fx.Re2fxWarning, match="leaf"):
        got = run(X)
    torch.testing.assert_close(got, model(X), rtol=0, atol=1e-12)


def test_a_leaf_class_keeps_its_residuals() -> None:
    class Other(Block):
        pass

    model = seeded(lambda: Net(5))
    model.get_submodule("blocks")[2] = Other(8).double()  # type: ignore[operator]
    expected = rewired(model, leaves=[Other])(X)
    run = compiled(model, {**EAGER, "leaves": [Other]})
    torch.testing.assert_close(run(X), expected, rtol=0, atol=1e-12)


# Train and eval mode, and other compilations of one model


class Modal(nn.Module):
    """Residuals in train mode only."""

    def __init__(self, residual_in: bool = True) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.mixes = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.residual_in = residual_in

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for mix in self.mixes:
            x = x + mix(x) if self.training == self.residual_in else mix(x)
        return x


class Moved(Modal):
    """The middle residual is another one in eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.mixes[0](x)
        x = x + torch.tanh(self.mixes[1](x))
        if not self.training:
            x = F.layer_norm(x, (8,))
        return x + self.mixes[2](x)


@pytest.mark.parametrize("first", [True, False], ids=["train first", "eval first"])
@pytest.mark.parametrize("rewired_in", [True, False], ids=["in train", "in eval"])
def test_a_chain_in_one_mode_only_is_refused(rewired_in: bool, first: bool) -> None:
    model = seeded(lambda: Modal(rewired_in)).train(first)
    run = compiled(model, EAGER)
    with nullcontext() if first == rewired_in else pytest.warns(re2fx.Re2fxWarning):
        run(X)
    model.train(not first)
    fails(re2fx.ModeMismatchError, lambda: run(X), "mode")


@pytest.mark.parametrize("first", [True, False], ids=["train first", "eval first"])
def test_modes_with_other_chains_are_refused(first: bool) -> None:
    model = seeded(Moved).train(first)
    run = compiled(model, EAGER)
    run(X)
    model.train(not first)
    fails(re2fx.ModeMismatchError, lambda: run(X), "mode")


def test_modes_are_compared_for_functions_too() -> None:
    """Two networks of one model are as wrong when a function around it is compiled."""
    model = seeded(Moved)
    run = compiled(lambda x: model(x), EAGER)
    run(X)
    model.eval()
    fails(re2fx.ModeMismatchError, lambda: run(X))


def test_modes_are_compared_behind_a_graph_break() -> None:
    class Late(Moved):
        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return F.layer_norm(super().forward(x), (8,))

    model = seeded(Late)
    run = compiled(model, EAGER, fullgraph=False)
    run(X)
    model.eval()
    fails(re2fx.ModeMismatchError, lambda: run(X))


def test_the_fast_path_of_a_transformer_is_no_other_network() -> None:
    """In eval mode without gradients a whole layer is one operator, its residuals inside."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True, norm_first=True)
    model, x = layer.double(), example(2, 3, 8)
    run = compiled(model.train(), EAGER)
    run(x)
    model.eval()
    expected = run(x)
    with torch.no_grad():
        try:
            got = run(x)
        except BackendCompilerFailed as error:
            refused = error.inner_exception
        else:
            torch.testing.assert_close(got, expected)
            return
    assert isinstance(refused, re2fx.ModeMismatchError)


def test_a_new_size_does_not_change_the_rewiring() -> None:
    """A number is a constant in one compilation and a symbol in the next."""

    class Scaled(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.blocks[1](self.blocks[0](self.stem(x)))
            x = self.blocks[3](self.blocks[2](x / len(x)))
            out: Tensor = self.head(x)
            return out

    model = seeded(Scaled)
    run = compiled(model, EAGER)
    run(X)
    other = example(7, 4)
    try:
        got = run(other)
    except BackendCompilerFailed as error:
        refused = error.inner_exception
    else:
        torch.compiler.reset()
        torch.testing.assert_close(got, compiled(model, EAGER)(other))
        return
    assert isinstance(refused, re2fx.ModeMismatchError)


def test_a_model_may_grow_after_both_modes_were_compiled() -> None:
    model = seeded(lambda: Net(2))
    run = compiled(model, EAGER)
    run(X)
    model.eval()
    run(X)
    model.train()
    model.get_submodule("blocks").append(Block(8).double())  # type: ignore[operator]
    torch.testing.assert_close(run(X), rewired(model)(X), rtol=0, atol=1e-12)


def test_a_failing_compiler_does_not_give_back_the_original_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("the compiler failed")

    monkeypatch.setattr("re2fx.inner.compile_without_inductor", broken)
    run = compiled(seeded(Modal), fullgraph=False)
    with (
        torch._dynamo.config.patch(suppress_errors=True),
        pytest.raises(Exception, match="the compiler failed"),
    ):
        run(X)


# Several forwards and backwards


@executors
def test_several_forwards_and_backwards(options: Options) -> None:
    """In one compilation: forwards that overlap, gradients that add up, a graph used twice."""
    model = seeded(lambda: Net(3, dropout=0.4))
    store, run = rewired(model, memory="store"), compiled(model, options)
    results = []
    for function in (store, run):
        model.zero_grad(set_to_none=True)
        torch.manual_seed(0)
        first, second = (function(x).square().sum() for x in (X, -2 * X))
        second.backward(retain_graph=True)  # which the compiler must see first
        second.backward()
        first.backward()
        results.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-12)


@executors
def test_two_forwards_of_a_batch_norm_before_the_backwards(options: Options) -> None:
    model, images = seeded(lambda: ConvNet(2)), example(2, 3, 6, 6)
    store, run = rewired(model, memory="store"), compiled(model, options)
    buffers = copy.deepcopy(dict(model.named_buffers()))
    results = []
    for function in (store, run):
        model.load_state_dict(buffers, strict=False)
        model.zero_grad(set_to_none=True)
        first, second = (weighted(function(x)) for x in (images, -2 * images))
        first.backward()
        second.backward()
        results.append({name: p.grad for name, p in model.named_parameters()})
        results[-1].update((name, buffer.clone()) for name, buffer in model.named_buffers())
    torch.testing.assert_close(results[1], results[0], rtol=1e-8, atol=1e-9)


@executors
def test_a_forward_without_gradients_before_the_backward(options: Options) -> None:
    model, images = seeded(lambda: ConvNet(2)), example(2, 3, 6, 6)
    expected = gradients(rewired(model, memory="store"), model, images)
    run = compiled(model, options)
    model.zero_grad(set_to_none=True)
    loss = run(images).square().sum()
    with torch.no_grad():
        run(images)
    loss.backward()
    got = {name: p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9)


@executors
def test_parameters_that_train(options: Options) -> None:
    found = []
    for options_ in (options, {**EAGER, "memory": "store"}):
        torch.compiler.reset()
        model = seeded(lambda: Net(3))
        run = compiled(model, options_)
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        for _ in range(3):
            optimizer.zero_grad()
            run(X).square().sum().backward()
            optimizer.step()
        found.append(model.state_dict())
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-8)


class Tuned(Net):
    """A tensor that is no parameter and no buffer, and is set anew between calls."""

    def __init__(self) -> None:
        super().__init__(3)
        self.scale = torch.ones(8, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + torch.tanh(block.inner(x)[:, :8] * self.scale)  # type: ignore[operator]
        return x


@executors
def test_a_tensor_replaced_between_forward_and_backward(options: Options) -> None:
    """Each backward is of the forward that ran, or an error; never of another one."""
    model = seeded(Tuned)

    def both(run: Run) -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        losses = []
        for scale in (1.0, 3.0):
            setattr(model, "scale", torch.full((8,), scale, dtype=torch.float64))
            losses.append(run(X).square().sum())
        for loss in losses:
            loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    expected = both(compiled(model, {**EAGER, "memory": "store"}))
    torch.compiler.reset()
    try:
        got = both(compiled(model, options))
    except re2fx.ReplayError:
        return
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


# What branches are made of


def two_streams(branches: list[Run], x: Tensor) -> Tensor:
    """The rewired chain, written out."""
    current, previous = x, x
    for branch in branches:
        current, previous = previous + branch(current), current
    return (current + previous) * 0.5


class Special(nn.Module):
    """A branch with something that is more than an operator on tensors."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)

    def branch(self, x: Tensor) -> Tensor:
        value: Tensor = getattr(self, self.kind)(x)
        return value

    def no_grad(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(self.norm(x)))
        with torch.no_grad():
            gate = torch.sigmoid(hidden)
        out: Tensor = self.second(hidden * gate)
        return out

    def no_grad_first(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = torch.sigmoid(x)
        out: Tensor = self.second(self.norm(x) * gate)
        return out

    def autocast(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            hidden = self.first(self.norm(x))
        out: Tensor = self.second(hidden.float())
        return out

    def inner(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(self.norm(x))))
        return out

    def checkpointed(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.inner, x, use_reentrant=False)
        return out

    def function(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(Doubled.apply(self.first(self.norm(x))))
        return out

    def condition(self, x: Tensor) -> Tensor:
        hidden = self.norm(x)
        out: Tensor = torch.cond(
            hidden[0, 0] > 0,
            lambda h: torch.sin(self.first(h)),
            lambda h: torch.cos(self.second(h)),
            (hidden,),
        )
        return out

    def mapped(self, x: Tensor) -> Tensor:
        out: Tensor = torch.vmap(lambda h: self.second(torch.tanh(self.first(h))))(self.norm(x))
        return out


class Doubled(torch.autograd.Function):
    """tanh with twice its gradient, so that losing it is seen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.tanh(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * grad * (1 - torch.tanh(x) ** 2)


class Specials(nn.Module):
    """A chain of them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList([Special(kind) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.finish(x)

    def finish(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x)
        return out

    def reference(self, x: Tensor) -> Tensor:
        """The rewired network without any tool."""
        branches = [block.branch for block in self.blocks]
        return self.finish(two_streams(branches, self.stem(x)))  # type: ignore[arg-type]


KINDS = (
    "no_grad", "no_grad_first", "autocast", "checkpointed", "function", "condition", "mapped",
)  # fmt: skip


def assert_same_or_refused(
    model: nn.Module, x: Tensor, options: Options, expected: Outcome, tolerance: float
) -> None:
    """What cuts a graph may say that it cannot run it; what compiles it whole must."""
    try:
        got = step(compiled(model, options), model, x)
    except BackendCompilerFailed as error:
        refusal = error.inner_exception
    else:
        assert_same(got, expected, tolerance)
        return
    assert options is not GRAPH
    assert isinstance(refusal, re2fx.OptionError)
    assert "use scope='graph'" in str(refusal)


# Dynamo makes an instance of the class to see what it is.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function:DeprecationWarning")
@executors
@pytest.mark.parametrize("kind", KINDS)
def test_branches(kind: str, options: Options) -> None:
    torch.manual_seed(0)
    double = kind != "autocast"  # which leaves fp64 alone
    model = Specials(kind).to(torch.float64 if double else torch.float32)
    x = X if double else X.float()
    expected = step(model.reference, model, x)
    assert_same_or_refused(model, x, options, expected, 1e-9 if double else 1e-3)


def test_dropout_in_a_checkpointed_branch() -> None:
    """Recomputed twice, with one mask."""

    class Dropping(Special):
        def inner(self, x: Tensor) -> Tensor:
            out: Tensor = self.second(F.dropout(torch.tanh(self.first(self.norm(x))), 0.4))
            return out

    model = seeded(lambda: Specials("checkpointed"))
    setattr(model, "blocks", nn.ModuleList([Dropping("checkpointed") for _ in range(2)]).double())
    expected = step(compiled(model, {**GRAPH, "memory": "store"}), model, X)
    torch.compiler.reset()
    assert_same(step(compiled(model), model, X), expected, 1e-10)


@executors
def test_the_end_of_a_chain_read_without_gradients_first(options: Options) -> None:
    """Both readers share the readout, which must not be computed without gradients."""

    class Measured(Specials):
        def finish(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                size = x.square().mean()
            out: Tensor = self.head(x) / size
            return out

    model = seeded(lambda: Measured("inner"))
    expected = step(getattr(model, "reference"), model, X)  # noqa: B009
    assert_same_or_refused(model, X, options, expected, 1e-10)


@executors
def test_parametrized_weights(options: Options) -> None:
    """A spectral norm moves its vectors in every forward, and not in the rerun."""
    model = seeded(lambda: Net(3))
    for block in model.get_submodule("blocks").children():
        nn.utils.parametrizations.spectral_norm(block.inner)  # type: ignore[arg-type]
        nn.utils.parametrizations.weight_norm(block.outer)  # type: ignore[arg-type]
    expected = step(compiled(model, {**GRAPH, "memory": "store"}), model, X)
    torch.compiler.reset()
    assert_same_or_refused(model, X, options, expected, 1e-10)


@executors
def test_shared_blocks(options: Options) -> None:
    model = seeded(lambda: Net(4))
    blocks = model.get_submodule("blocks")
    blocks[2], blocks[3] = blocks[0], blocks[1]  # type: ignore[operator,index]
    expected = step(rewired(model, memory="store"), model, X)
    assert_same(step(compiled(model, options), model, X), expected, 1e-10)


# Modules that are rewired already


def test_a_rewired_module_is_compiled_reversibly() -> None:
    model, x = seeded(lambda: Net(3, dropout=0.4)), example(64, 4)
    rev = rewired(model)
    expected = step(rev, model, X)
    run = compiled(rev)
    assert_same(step(run, model, X), expected, 1e-10)
    assert saved(run, model, x) <= saved(rev, model, x)


class Outer(nn.Module):
    """A rewired network inside another one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.head = inner, nn.Linear(3, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.inner(x)))
        return out


@executors
def test_a_rewired_submodule_is_not_rewired_again(options: Options) -> None:
    outer = Outer(rewired(seeded(lambda: Net(3, dropout=0.4))))
    expected = step(outer, outer, X)
    assert_same(step(compiled(outer, options), outer, X), expected, 1e-10)


def test_a_rewired_submodule_is_compiled_reversibly() -> None:
    outer, x = Outer(rewired(seeded(lambda: Net(4)))), example(64, 4)
    small = saved(compiled(outer), outer, x)
    torch.compiler.reset()
    setattr(outer.inner, "memory", "store")
    assert small < saved(compiled(outer), outer, x) / 2


class Stopping(nn.Module):
    """A leaf that stops Dynamo in the middle of a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8) / 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.weight
        torch._dynamo.graph_break()
        return torch.tanh(x)


@executors
def test_a_rewired_module_may_be_cut_in_the_middle_of_a_chain(options: Options) -> None:
    """The remedy for a graph break that stays."""
    model = seeded(lambda: Net(4, dropout=0.4))
    setattr(model.get_submodule("blocks.1"), "outer", nn.Sequential(nn.Linear(16, 8), Stopping()))
    rev = rewired(model.double())
    expected = step(rev, model, X)
    assert_same(step(compiled(rev, options, fullgraph=False), model, X), expected, 1e-10)


@pytest.mark.parametrize(
    "options", [{"readout": "sum"}, {"leaves": ["stem"]}, {"coupling": re2fx.Coupling(0, 1, 2)}]
)
def test_a_rewired_module_takes_no_options_about_rewiring(options: Options) -> None:
    run = compiled(rewired(Net(2)), {**GRAPH, **options})
    fails(re2fx.OptionError, lambda: run(torch.randn(5, 4)), "rewired already")


def test_another_backend_warns_and_gives_the_same_results() -> None:
    model = seeded(lambda: Net(3, dropout=0.4))
    rev = rewired(model)
    expected = step(rev, model, X)
    run: Any = torch.compile(rev, backend="aot_eager", fullgraph=True)
    with pytest.warns(re2fx.Re2fxWarning, match="only backend='re2fx'") as caught:
        got = step(run, model, X)
    assert len(caught) == 1
    step(run, model, X)
    assert_same(got, expected, 1e-10)


def test_a_stored_module_does_not_warn() -> None:
    model = seeded(lambda: Net(3, dropout=0.4))
    rev = rewired(model, memory="store")
    run: Any = torch.compile(rev, backend="aot_eager", fullgraph=True)
    assert_same(step(run, model, X), step(rev, model, X), 1e-12)


@pytest.mark.parametrize("options", [GRAPH, EAGER], ids=["graph", "eager"])
def test_another_memory_is_another_compilation(options: Options) -> None:
    model = seeded(lambda: Net(4))
    rev, x = rewired(model), example(64, 4)
    run, sizes = compiled(rev, options), []
    for memory in ("reversible", "store", "reversible"):
        setattr(rev, "memory", memory)
        sizes.append(saved(run, model, x))
    assert sizes[0] == sizes[2]
    assert sizes[1] > 2 * sizes[0]


def custom(module: torch.fx.GraphModule, inputs: list[Any]) -> Run:
    """A backend of the user's own in front of this one."""
    from re2fx.backend import re2fx as backend

    return backend(module, inputs, options=GRAPH)


def test_a_custom_backend_may_call_this_one() -> None:
    model = seeded(lambda: Net(3, dropout=0.4))
    expected = step(rewired(model), model, X)
    run: Any = torch.compile(model, backend=custom, fullgraph=True)
    assert_same(step(run, model, X), expected, 1e-10)
    assert len(run_saved_streams(run, X)) == 3  # the last two states, and what the head reads


def run_saved_streams(run: Run, x: Tensor) -> list[Tensor]:
    """Tensors of a stream's size that a call keeps."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(x)
    return [tensor for tensor in kept if tensor.shape == (len(x), 8)]


def test_a_custom_backend_is_another_one_for_a_rewired_module() -> None:
    model = seeded(lambda: Net(3, dropout=0.4))
    rev = rewired(model)
    run: Any = torch.compile(rev, backend=custom, fullgraph=True)
    with pytest.warns(re2fx.Re2fxWarning):
        got = step(run, model, X)
    assert_same(got, step(rev, model, X), 1e-10)


def through_pickle(module: nn.Module) -> nn.Module:
    restored: nn.Module = pickle.loads(pickle.dumps(module))
    return restored


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle])
def test_a_copy_of_a_rewired_module_is_compiled_reversibly(
    copied: Callable[[nn.Module], nn.Module],
) -> None:
    model = seeded(lambda: Net(3, dropout=0.4))
    rev = rewired(model)
    compiled(rev, EAGER)(X)  # a copy has marks of its own
    other, x = copied(rev), example(64, 4)
    run = compiled(other)
    assert_same(step(run, other, X), step(other, other, X), 1e-10)
    assert saved(run, other, x) <= saved(rev, model, x)


# Inductor


def test_inductor_equals_its_stored_form_and_runs_the_users_pass() -> None:
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class Counting(CustomGraphPass):
        graphs = 0

        def __call__(self, graph: torch.fx.Graph) -> None:
            Counting.graphs += 1

        def uuid(self) -> Any:
            return None

    torch.manual_seed(0)
    model, x = Net(2, dropout=0.4), X.float()
    options: Options = {"compiler_options": {"joint_custom_post_pass": Counting()}}
    got = step(compiled(model, options), model, x)
    assert Counting.graphs == 1
    torch.compiler.reset()
    expected = step(compiled(model, {"memory": "store"}), model, x)
    assert_same(got, expected, 1e-5)


def test_inductor_regions() -> None:
    torch.manual_seed(0)
    model, x = Net(2), X.float()
    got = step(compiled(model, {"scope": "region"}), model, x)
    assert_same(got, step(rewired(model, memory="store"), model, x), 1e-5)


def test_a_users_pass_may_be_a_plain_function() -> None:
    """It has no key for the caches, so nothing is cached."""
    from re2fx.inductor import ReversePass

    graphs: list[torch.fx.Graph] = []
    both = ReversePass(lambda graph: 0, graphs.append)
    both(torch.fx.Graph())
    assert len(graphs) == 1
    assert both.uuid() is None
