"""The export route: ATen graphs of what runs, and what it refuses because it would be lost."""

from __future__ import annotations

import copy
import logging
import pickle
import random
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import re2fx
from re2fx.export_capture import LONGEST, LongSizes, check_sizes

from .compare import assert_reversible_equals_store, assert_same, step
from .models import ConvNet, Net, Tapped
from .test_routes import Branching, Scale

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(3, 5, 4, dtype=torch.float64, generator=GENERATOR)
IMAGE = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=GENERATOR)
PAIR = torch.randn(2, 4, 8, dtype=torch.float64, generator=GENERATOR)


def exported(model: nn.Module, *inputs: Any) -> re2fx.RewiredModule:
    rev = re2fx.transform(model, inputs, capture="export", strict=True)
    assert isinstance(rev, re2fx.RewiredModule)
    return rev


def lengths(rev: Any) -> list[int]:
    return [len(chain) for chain in rev.plan.chains]


MODELS = {
    "pre-norm, dropout": (lambda: Net(4, dropout=0.2), (X,), (torch.cat([X, X]),)),
    "batch norm, in place": (
        lambda: ConvNet(3, dropout=0.2), (IMAGE,), (torch.cat([IMAGE, IMAGE, IMAGE]),),
    ),
    "taps, side input": (Tapped, tuple(PAIR), tuple(torch.cat([PAIR, PAIR], 1))),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_the_same_network_as_by_symbolic_tracing(name: str) -> None:
    make, inputs, larger = MODELS[name]
    torch.manual_seed(0)
    model = make().double()
    rev, symbolic = exported(model, *inputs), re2fx.transform(model, capture="symbolic")
    assert isinstance(symbolic, re2fx.RewiredModule)
    for training in (True, False):
        rev.train(training)
        for got, expected in zip(rev.plan.chains, symbolic.plan.chains, strict=True):
            pairs = zip(got.residuals, expected.residuals, strict=True)
            assert all(a.kind == b.kind and a.location == b.location for a, b in pairs)
            assert len(got.taps) == len(expected.taps)
        for given in (inputs, larger):
            assert_reversible_equals_store(rev, *given)
            assert_same(step(rev, "store", *given), step(symbolic, "store", *given), 1e-12)


def test_statistics_of_a_batch_norm_move_on_the_model() -> None:
    model = ConvNet(3).double()
    rev = exported(model, IMAGE)
    before = {name: value.clone() for name, value in model.named_buffers()}
    rev(IMAGE).sum().backward()
    for name, value in model.named_buffers():
        assert not torch.equal(value, before[name]), name
    assert model.stem[1].num_batches_tracked == 1


def test_capturing_leaves_everything_as_it_was() -> None:
    model = ConvNet(3, dropout=0.1).double()
    model.blocks[0].eval()
    state = copy.deepcopy(model.state_dict())
    members = {name: id(p) for name, p in (*model.named_parameters(), *model.named_buffers())}
    flags, numbers = [m.training for m in model.modules()], torch.get_rng_state()
    rev = exported(model, IMAGE)
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), numbers)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert {n: id(p) for n, p in (*rev.named_parameters(), *rev.named_buffers())} == members
    assert torch.autograd.Function.apply.__module__ == "torch.autograd.function"


class Talkative(nn.Module):
    """Trivia that stop Dynamo, and a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net(3)
        self.lstm = nn.LSTM(4, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 1000:
            return x
        logging.getLogger("talkative").warning("at work")
        x, _ = self.lstm(x)
        out: Tensor = self.net(x)
        return out


def test_auto_exports_what_dynamo_cannot_follow() -> None:
    model = Talkative().double()
    explanation = re2fx.explain(model, X)
    assert explanation.route == "export"
    assert list(explanation.failures) == ["symbolic", "dynamo"]
    assert all("test_export.py" in reason for reason in explanation.failures.values())
    rev = re2fx.transform(model, X)
    assert lengths(rev) == [3]
    assert_reversible_equals_store(rev, X)


def test_structures_of_inputs_and_outputs() -> None:
    model = Branching().double()
    mask = torch.ones_like(X)
    rev = re2fx.transform(model, {"x": X, "mask": mask, "wide": True}, capture="export")
    got = rev(X, mask=mask, wide=True)
    assert type(got).__name__ == "Output"
    assert got.sizes == (7, "b")
    assert got.hidden[0] is got.hidden[1]
    reference = re2fx.transform(model, {"x": X, "mask": mask, "wide": True}, capture="dynamo")
    expected = reference(X, mask=mask, wide=True)
    torch.testing.assert_close(got.logits, expected.logits, rtol=0, atol=1e-12)
    long = torch.ones(3, 120, 4, dtype=torch.float64)  # the other path, which is captured too
    expected = reference(long, mask=long, wide=True)
    got = rev(long, mask=long, wide=True)
    torch.testing.assert_close(got.logits, expected.logits, rtol=0, atol=1e-12)


class Custom(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = Scale.apply(x)
        return out


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.net, self.reentrant = Net(3).double(), reentrant

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.net, x, use_reentrant=self.reentrant)


class TensorHook(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = 2 * x
        y.register_hook(lambda gradient: 2 * gradient)
        return y


class Drawing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * random.random()


class Assigning(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        self.last = 2 * x
        return self.last


class Values(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Custom(), r"custom autograd.Function Scale.*test_export.py:\d+"),
        (Checkpointed(False), r"checkpoints or offloads.*test_export.py:\d+"),
        (Checkpointed(True), r"custom autograd.Function CheckpointFunction"),
        (TensorHook(), r"registers a hook on a tensor.*test_export.py:\d+"),
        (Drawing(), "draws random numbers in Python"),
        (Assigning(), r"assigns tensors to Assigning\.last"),
        (Values(), r"test_export.py:\d+"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_would_be_lost_is_refused(model: nn.Module, message: str) -> None:
    state = random.getstate()
    before = set(vars(model))
    with pytest.raises(re2fx.CaptureError, match=message):
        re2fx.transform(model, X, capture="export")
    assert set(vars(model)) == before
    assert random.getstate() == state


def test_hooks_are_refused() -> None:
    model = Net(3)
    model.blocks[1].register_forward_hook(lambda module, args, out: 2 * out)
    with pytest.raises(re2fx.CaptureError, match=r"hooks of blocks\.1 only once"):
        exported(model, X.float())


def test_export_needs_examples() -> None:
    with pytest.raises(re2fx.CaptureError, match="export needs example_inputs="):
        re2fx.transform(Net(), capture="export")


class Casting(nn.Module):
    """A cast in the branch that does nothing in fp32, as in an RMS norm."""

    def __init__(self) -> None:
        super().__init__()
        self.mixes = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for mix in self.mixes:
            h = x.to(torch.float32).contiguous()
            x = x + mix(h.square().to(x.dtype))
        return x


def test_a_cast_in_the_branch_is_not_in_the_skip() -> None:
    torch.manual_seed(0)
    model = Casting()
    rev = exported(model, X.float())
    assert lengths(rev) == [3]
    assert_reversible_equals_store(rev, X.float(), tolerance=1e-5)
    program = torch.export.export(model, (X.float(),), strict=False)
    assert lengths(re2fx.transform(program)) == [3]


def test_another_type_is_captured_again() -> None:
    model = Casting()
    rev = exported(model, X.float()).double()
    assert_same(step(rev, "store", X), step(exported(model, X), "store", X), 1e-12)
    assert_reversible_equals_store(rev, X)


class NoGrad(Casting):
    """A table without gradients, of a parameter and the input."""

    def forward(self, x: Tensor) -> Tensor:
        for mix in self.mixes:
            with torch.no_grad():
                gate = torch.sigmoid(x @ mix.get_parameter("weight"))
            x = x + mix(x) * gate
        return x


def test_a_region_without_gradients() -> None:
    model = NoGrad().double()
    original = re2fx.Coupling.original()
    rev = re2fx.transform(
        model, X, capture="export", coupling=original, memory="store", readout="sum"
    )
    reversible = exported(model, X)
    assert_reversible_equals_store(reversible, X)
    names = [str(node.target) for node in rev.graph.nodes]  # type: ignore[union-attr]
    assert not any("set_grad_enabled" in name for name in names)
    x = X.clone().requires_grad_()
    expected = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    single = re2fx.transform(
        model, X, capture="export", coupling=re2fx.Coupling(1.0, 0.0, 1.0), memory="store"
    )
    assert isinstance(single, re2fx.RewiredModule)
    got = torch.autograd.grad(single(x).square().sum(), [x, *model.parameters()])
    assert len(got) == len(expected)


class Autocast(Casting):
    def forward(self, x: Tensor) -> Tensor:
        for mix in self.mixes:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                f = mix(x)
            x = x + f.float()
        return x


def test_a_region_of_autocast() -> None:
    rev = exported(Autocast(), X.float())
    assert lengths(rev) == [3]
    assert_reversible_equals_store(rev, X.float(), tolerance=0.02)
    model = rev.mixes
    half = torch.Generator().manual_seed(1)
    x = torch.randn(3, 5, 4, generator=half)
    before = x
    for mix in model:  # the first two residuals of the two-stream form, by hand
        with torch.autocast("cpu", dtype=torch.bfloat16):
            f = mix(x)
        before, x = x, before + f.float()
    torch.testing.assert_close(
        rev(torch.randn(3, 5, 4, generator=half.manual_seed(1))), (x + before) / 2
    )


def test_the_device_of_the_example_is_not_written_in() -> None:
    class Placing(Net):
        def forward(self, x: Tensor) -> Tensor:
            places = torch.arange(3, device=x.device).to(x.device, x.dtype)
            return super().forward(x) + places

    rev = exported(Placing().to("meta"), X.float().to("meta"))
    rev.to_empty(device="cpu")
    for parameter in rev.parameters():
        nn.init.normal_(parameter)
    assert rev(X.float()).device.type == "cpu"


class Windows(Net):
    """Pads to multiples of windows, again and again: the sizes become long expressions."""

    def forward(self, x: Tensor) -> Tensor:
        for window in (3, 5, 7):
            x = nn.functional.pad(x, (0, 0, 0, (window - x.shape[1] % window) % window))
            x = x.reshape(x.shape[0], x.shape[1] // window, window, 4).mean(2)
            x = nn.functional.pad(x, (0, 0, 0, (window - x.shape[1] % window) % window))
        return super().forward(x)


def test_sizes_that_would_be_long_expressions_are_fixed() -> None:
    x = torch.randn(3, 200, 4, dtype=torch.float64)
    rev = exported(Windows(3).double(), x)
    assert rev(torch.cat([x, x])).shape[0] == 6
    with pytest.raises(re2fx.InputError, match="dimension 1 of x of size 200"):
        rev(x[:, :100])
    check_sizes(x)
    assert LONGEST < 20
    assert issubclass(LongSizes, Exception)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda rev: pickle.loads(pickle.dumps(rev))])
def test_copies(copied: Any) -> None:
    rev = exported(ConvNet(3).double(), IMAGE)
    other = copied(rev)
    torch.testing.assert_close(other(IMAGE), rev(IMAGE), rtol=0, atol=0)
    assert_reversible_equals_store(other, IMAGE)


class Noted(nn.Module):
    """Not a program of one mode: nothing in it asks for the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.mixes = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.register_buffer("scale", torch.ones(4), persistent=False)

    def forward(self, x: Tensor, *, side: dict[str, Tensor], flag: bool = True) -> dict[str, Any]:
        for mix in self.mixes:
            x = x + torch.tanh(mix(x) * side["gate"])
        return {"out": x * self.get_buffer("scale"), "number": 3}


def program_of(model: nn.Module, *args: Tensor) -> Any:
    sizes = ({0: torch.export.Dim.AUTO},)
    return torch.export.export(model, args, strict=False, dynamic_shapes=sizes)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_program_is_taken_as_it_is(training: bool) -> None:
    model = ConvNet(3, dropout=0.1).double().train(training)
    program = program_of(model, IMAGE)
    rev = re2fx.transform(program)
    assert isinstance(rev, re2fx.RewiredModule)
    assert rev.training is training
    assert rev.get_parameter("head.weight") is program.state_dict["head.weight"]
    assert rev.state_dict().keys() == model.state_dict().keys()
    symbolic = re2fx.transform(model)
    larger = torch.cat([IMAGE, IMAGE])
    assert_reversible_equals_store(rev, larger)
    assert_same(step(rev, "store", larger), step(symbolic, "store", larger), 1e-12)
    with pytest.raises(re2fx.OptionError, match=r"cannot be put in (eval|train) mode"):
        rev.train(not training)
    with pytest.raises(re2fx.InputError, match="dimension 2 of x of size 8"):
        rev(torch.ones(2, 3, 9, 9, dtype=torch.float64))
    explanation = re2fx.explain(program)
    assert explanation.route == "program"
    assert explanation.plan.chains[0].residuals[0].location.file.endswith("models.py")
    again = pickle.loads(pickle.dumps(rev))
    assert_reversible_equals_store(again, IMAGE)


def test_arguments_and_results_of_a_program() -> None:
    model = Noted()
    given = {"side": {"gate": torch.ones(4)}, "flag": True}
    x = X.float()[0]
    rev = re2fx.transform(torch.export.export(model, (x,), given, strict=False))
    got = rev.eval()(x, side={"gate": torch.ones(4)}, flag=True)
    assert got["number"] == 3
    expected = re2fx.transform(model, {"x": x, **given}, capture="dynamo")(x, **given)
    torch.testing.assert_close(got["out"], expected["out"])
    with pytest.raises(re2fx.InputError, match="flag"):
        rev(x, side={"gate": torch.ones(4)}, flag=False)


def test_a_functional_program_writes_its_buffers() -> None:
    class Counting(Net):
        def __init__(self) -> None:
            super().__init__(3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.get_buffer("calls").add_(1)
            return super().forward(x)

    program = torch.export.export(Counting(), (X.float(),), strict=False)
    with pytest.warns(FutureWarning):  # torch's own
        functional = program.run_decompositions({})
    assert functional.graph_signature.buffers_to_mutate
    rev = re2fx.transform(functional)
    before = rev.get_buffer("calls").clone()
    rev(X.float()).sum().backward()
    assert rev.get_buffer("calls") == before + 1


def test_a_report_of_a_program() -> None:
    program = program_of(ConvNet(3, width=32), torch.randn(2, 3, 16, 16))
    report = re2fx.report(program, torch.randn(2, 3, 16, 16), measure=True)
    assert report.total.reversible is not None
    assert report.measured is not None
    assert report.measured.reversible == report.total.reversible


def test_a_graph_module_is_taken_as_it_is() -> None:
    model = ConvNet(3).double()
    given = torch.fx.symbolic_trace(model)
    for node in given.graph.nodes:
        node.meta["mine"] = node.name
    rev = re2fx.transform(given)
    assert isinstance(rev, re2fx.RewiredModule)
    assert re2fx.explain(given).route == "graph"
    captured = dict(rev.history)["captured"]
    assert [n.meta["mine"] for n in captured.nodes] == [n.name for n in given.graph.nodes]
    symbolic = re2fx.transform(model)
    assert_same(step(rev, "store", IMAGE), step(symbolic, "store", IMAGE), 1e-12)
    assert_reversible_equals_store(rev, IMAGE)
    given.register_forward_hook(lambda module, args, out: None)
    with pytest.warns(re2fx.Re2fxWarning, match="hooks registered on the model itself"):
        re2fx.transform(given)


def test_nothing_of_export_is_imported_before_it_is_asked_for() -> None:
    code = "import re2fx, sys; print([m for m in sys.modules if m.startswith('torch._dynamo')])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
