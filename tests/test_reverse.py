"""Reversed joint graphs: the same step as stored execution, and what they keep for the backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._functorch.config as functorch_config
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._prims.rng_prims import run_and_save_rng_state
from torch.fx import Graph
from torch.utils.checkpoint import checkpoint

import re2fx
from re2fx import Coupling
from re2fx.marks import MARKS

from .compare import assert_same, step, weighted
from .joint import (
    IN_BACKWARD,
    Watched,
    assert_compiled_equals_store,
    aten,
    outcome,
    size,
    watch,
)
from .models import Block, ConvNet, Net, Tapped
from .programs import Branch, Network, build, couplings, programs

COUPLINGS = [
    Coupling.re2tal(),
    Coupling.consistent(0.5),
    Coupling.midpoint(0.7, 1.2),
    Coupling.momentum(0.9),
    Coupling.dr2net(0.3, 0.7),
    Coupling(0.2, -0.9, 0.8),
]
HEAD = {"aten.mul.Tensor": 1}  # the readout, which is the input of the head


def normal(*shape: int) -> Tensor:
    """Some numbers."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


X, IMAGE = normal(5, 4), normal(4, 3, 6, 6)


def rewired(model: nn.Module, **options: Any) -> re2fx.RewiredModule:
    """Transform in fp64."""
    rev = re2fx.transform(model.double(), memory="store", **options)
    assert isinstance(rev, re2fx.RewiredModule)
    return rev


Make = Callable[[int], nn.Module]


def mlp(width: int) -> nn.Module:
    """The branch of the networks below, unless they say otherwise."""
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.Tanh())


class Wired(nn.Module):
    """Branches, and a function that says how they lie."""

    def __init__(
        self, wire: Callable[..., Any], make: Make = mlp, number: int = 6, width: int = 8
    ) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.stem, self.head = nn.Linear(width, width), nn.Linear(width, 3)
            self.branches = nn.ModuleList(make(width) for _ in range(number))
            self.table = nn.Embedding(16, width)
        self.wire = wire

    def forward(self, x: Tensor) -> Any:
        return self.wire(self, x)

    def run(self, x: Tensor, first: int = 0, last: int | None = None) -> Tensor:
        """Some of the residuals in turn."""
        for branch in self.branches[first:last]:
            x = x + branch(x)
        return x


class WiredTwo(Wired):
    """The same with two inputs."""

    def forward(self, x: Tensor, y: Tensor) -> Any:  # type: ignore[override]
        return self.wire(self, x, y)


def plain(net: Wired, x: Tensor) -> Tensor:
    """One chain."""
    return net.head(net.run(net.stem(x)))


# The family.


FAMILY = [
    *((coupling, "mean") for coupling in COUPLINGS[::2]),
    *((coupling, "sum") for coupling in COUPLINGS),
    (COUPLINGS[0], "last"),
]


@pytest.mark.parametrize(("coupling", "readout"), FAMILY, ids=str)
def test_couplings_and_readouts(coupling: Coupling, readout: str) -> None:
    rev = rewired(Net(dropout=0.3), coupling=coupling, readout=readout)
    watched = assert_compiled_equals_store(rev, X)
    assert watched.blocks == [4]
    assert watched.counts()["stream"] == 2


@pytest.mark.parametrize(
    ("activation", "readout"), [("branch", "mean"), ("stream", "sum"), ("branch", "last")]
)
def test_batch_norm_activations_and_dropout(activation: str, readout: str) -> None:
    """Buffers are updated once, masks are the same."""
    rev = rewired(ConvNet(dropout=0.3), activation=activation, readout=readout)
    watched = assert_compiled_equals_store(rev, IMAGE, tolerance=1e-9)
    assert watched.blocks == [3]
    outcome_ = outcome(rev, watched.run, IMAGE)
    assert {int(b) for name, b in outcome_.buffers.items() if "num_batches" in name} == {1}


# Chains.


def three_in_sequence(net: Wired, x: Tensor) -> Tensor:
    x = net.run(net.stem(x), 0, 2)
    x = net.run(net.stem(x), 2, 4)
    return net.head(net.run(net.stem(x), 4))


def parallel(net: Wired, x: Tensor) -> Tensor:
    x = net.stem(x)
    return net.head(net.run(x, 0, 3) + net.run(x, 3))


def interleaved(net: Wired, x: Tensor, y: Tensor) -> Tensor:
    """Two chains that take turns and modules."""
    x, y = net.stem(x), net.stem(y)
    for branch in net.branches:
        x, y = x + branch(x), y + branch(y)
    return net.head(x + y)


def one_is_the_side_of_the_other(net: Wired, x: Tensor, y: Tensor) -> Tensor:
    gate = torch.sigmoid(net.run(net.stem(x), 0, 3))
    y = net.stem(y)
    for branch in net.branches[3:]:
        y = y + branch(y) * gate
    return net.head(y)


@pytest.mark.parametrize(
    ("wire", "chains"),
    [(three_in_sequence, 3), (parallel, 2), (interleaved, 2), (one_is_the_side_of_the_other, 2)],
)
def test_two_streams_are_kept_of_each_chain(wire: Callable[..., Any], chains: int) -> None:
    two = wire in (interleaved, one_is_the_side_of_the_other)
    rev = rewired((WiredTwo if two else Wired)(wire))
    assert len(rev.plan.chains) == chains
    watched = assert_compiled_equals_store(rev, *([normal(2, 8)] * (1 + two)))
    assert watched.blocks == [rev.plan.rewired]
    assert watched.counts()["stream"] == 2 * chains


def transposed_once(net: Wired, x: Tensor) -> Tensor:
    return net.head(net.run(net.run(net.stem(x), 0, 2).transpose(1, 2), 2))


def transposed_after_the_first(net: Wired, x: Tensor) -> Tensor:
    return net.head(net.run(net.run(net.stem(x), 0, 1).transpose(1, 2), 1))


def many_links(net: Wired, x: Tensor) -> Tensor:
    x = net.run(net.stem(x), 0, 1).permute(0, 2, 1).contiguous()
    x = net.run(x, 1, 2).flatten(0, 1).clone()
    x = net.run(x, 2, 4).unflatten(0, (2, 8)).unsqueeze(1).squeeze(1).movedim(1, 2)
    return net.head(net.run(x, 4))


@pytest.mark.parametrize("wire", [transposed_once, transposed_after_the_first, many_links])
def test_shape_links_do_not_cut_a_chain(wire: Callable[..., Any]) -> None:
    rev = rewired(Wired(wire), coupling=Coupling.consistent(0.5))
    watched = assert_compiled_equals_store(rev, normal(2, 8, 8))
    assert watched.blocks == [6]
    assert watched.counts()["stream"] == 2


class Flat(nn.Module):
    """Looks at the stream through a view that not every layout allows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.mix(x.flatten(0, 1))).reshape(x.shape)


def copied_in_another_order(net: Wired, x: Tensor) -> Tensor:
    x = net.run(net.stem(x), 0, 2).permute(1, 0, 2).contiguous()
    return net.head(net.run(net.run(x, 2, 4).transpose(0, 1).clone(), 4))


@pytest.mark.parametrize("dynamic", [False, True])
def test_links_that_copy(dynamic: bool) -> None:
    """What is reconstructed behind one has the strides from before it."""
    rev = rewired(Wired(copied_in_another_order, Flat))
    watched = assert_compiled_equals_store(rev, normal(3, 5, 8), dynamic=dynamic)
    assert watched.blocks == [6]


def test_links_between_memory_formats() -> None:
    class Copying(ConvNet):
        def forward(self, x: Tensor) -> Tensor:
            first, *rest = self.blocks
            x = first(self.stem(x)).contiguous(memory_format=torch.channels_last)
            for block in rest:
                x = block(x)
            return self.head(x.mean((2, 3)))

    watched = assert_compiled_equals_store(rewired(Copying()), IMAGE, tolerance=1e-9)
    assert watched.blocks == [3]


def sliced(net: Wired, x: Tensor) -> Tensor:
    return net.head(net.run(net.stem(x)[:, 1:]))


def every_second(net: Wired, x: Tensor) -> Tensor:
    return net.head(net.run(net.stem(x)[:, ::2]))


def flipped(net: Wired, x: Tensor) -> Tensor:
    return net.head(net.run(net.stem(x).transpose(1, 2)))


def repeated(net: Wired, x: Tensor) -> Tensor:
    return net.head(net.run(net.stem(x)[:1].expand(3, 8, 8)))


def the_input(net: Wired, x: Tensor) -> Tensor:
    return net.head(net.run(x))


@pytest.mark.parametrize("entry", [sliced, every_second, flipped, repeated, the_input])
def test_chain_inputs_in_any_layout(entry: Callable[..., Any]) -> None:
    """What is reconstructed has the strides it had; branches look at it through views."""
    rev = rewired(Wired(entry, Views, 3), readout="sum")
    assert assert_compiled_equals_store(rev, normal(2, 8, 8)).blocks == [3]


class Views(nn.Module):
    """Reshapes, permutations, chunks and items, and writes into what is the branch's own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix, self.act = nn.Linear(width, 2 * width), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.act(self.mix(x)).chunk(2, dim=-1)
        a = a.reshape(x.shape[0], -1).view(x.shape)
        b = b.permute(0, 2, 1).unbind(1)[0].unsqueeze(-1)
        return (a * b).mul_(0.5) * x.transpose(1, 2)[:, :1].transpose(1, 2).sigmoid()


def test_views_and_writes_in_branches() -> None:
    watched = assert_compiled_equals_store(rewired(Wired(plain, Views)), normal(2, 8, 8))
    assert watched.counts() == {"input": 1, "stream": 2, **HEAD}


def test_channels_last() -> None:
    model = ConvNet(dropout=0.3).double()
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    image = IMAGE.to(memory_format=torch.channels_last)
    assert_compiled_equals_store(rewired(model), image, tolerance=1e-9)


# What branches read besides their stream, and who else reads the stream.


def test_sides_and_taps_with_gradients() -> None:
    watched = assert_compiled_equals_store(rewired(Tapped()), *normal(2, 3, 8))
    assert watched.blocks == [5]


def test_only_the_tap_is_differentiated() -> None:
    """Blocks behind it get zeros; the ones before are reconstructed from the end all the same."""
    rev = rewired(Tapped())
    inputs = normal(2, 3, 8)
    got = outcome(rev, watch(rev).run, *inputs, loss=lambda out: weighted(out[1]))
    expected = step(rev, "store", *inputs, loss=lambda out: weighted(out[1]))
    unused = [name for name, gradient in expected.gradients.items() if gradient is None]
    assert len(unused) == 8
    for name in unused:
        gradient = got.gradients.pop(name)
        assert gradient is None or not gradient.any()
        del expected.gradients[name]
    assert_same(got, expected, 1e-10)


def side_from_a_tap(net: Wired, x: Tensor) -> Tensor:
    x = net.run(net.stem(x), 0, 2)
    gate = torch.sigmoid(net.stem(x))
    x = net.run(x, 2, 3)
    for branch in net.branches[3:]:
        x = x + branch(x) * gate
    return net.head(x)


def skip_to_the_head(net: Wired, x: Tensor) -> Tensor:
    x = net.stem(x)
    return net.head(net.run(x) * x)


def every_state_is_read(net: Wired, x: Tensor) -> list[Tensor]:
    x, taps = net.stem(x), []
    for branch in net.branches:
        x = x + branch(x)
        taps.append(net.head(x.sin()))
    return taps


def one_row_branches(net: Wired, x: Tensor) -> Tensor:
    """The coupling broadcasts."""
    x = net.stem(x)
    for branch in net.branches:
        x = x + branch(x).mean(0, keepdim=True)
    return net.head(x)


@pytest.mark.parametrize(
    "wire", [side_from_a_tap, skip_to_the_head, every_state_is_read, one_row_branches]
)
def test_readers_and_sides(wire: Callable[..., Any]) -> None:
    assert assert_compiled_equals_store(rewired(Wired(wire)), normal(4, 8)).blocks == [6]


def a_mask_of_its_own(net: Wired, x: Tensor, mask: Tensor) -> Tensor:
    x, mask = net.stem(x), torch.sigmoid(net.stem(mask))
    for branch in net.branches:
        x = x + branch(x) * mask
    return net.head(x)


def test_a_mask_with_a_gradient_is_kept_once() -> None:
    watched = assert_compiled_equals_store(rewired(WiredTwo(a_mask_of_its_own)), *normal(2, 4, 8))
    assert watched.counts() == {"input": 2, "aten.sigmoid.default": 1, "stream": 2, **HEAD}


# Parameters without gradients.


def embedded(net: Wired, tokens: Tensor) -> Tensor:
    return net.head(net.run(net.table(tokens)))


TOKENS = torch.arange(12).view(2, 6)


@pytest.mark.parametrize("frozen", [0, 1, 4, 5, 6])
def test_frozen_early_blocks(frozen: int) -> None:
    """Nothing is reconstructed below the first block that trains."""
    model = Wired(embedded)
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    for branch in model.branches[frozen:]:
        branch.requires_grad_(True)
    watched = assert_compiled_equals_store(rewired(model), TOKENS)
    assert watched.blocks == [6 - frozen]
    assert watched.counts().get("stream", 0) == min(2, 6 - frozen)


def test_frozen_late_blocks() -> None:
    model = Wired(embedded)
    model.branches[3:].requires_grad_(False)
    assert assert_compiled_equals_store(rewired(model), TOKENS).blocks == [6]


def test_one_parameter_trains() -> None:
    model = Wired(embedded)
    model.requires_grad_(False)
    model.branches.get_parameter("2.1.weight").requires_grad_(True)
    assert assert_compiled_equals_store(rewired(model), TOKENS).blocks == [4]


def test_only_the_input_has_a_gradient() -> None:
    model = Net(dropout=0.3)
    model.requires_grad_(False)
    assert assert_compiled_equals_store(rewired(model), X).blocks == [4]


def test_a_branch_without_parameters() -> None:
    """It has to be run all the same, to go further back."""

    def some_without(net: Wired, x: Tensor) -> Tensor:
        x = net.stem(x)
        for branch in net.branches:
            x = x + branch(x)
            x = x + net.table.weight[0].detach() * x.roll(1, -1)
        return net.head(x)

    assert_compiled_equals_store(rewired(Wired(some_without)), normal(4, 8))


# Randomness.


class Noise(nn.Module):
    """Random numbers of every kind: of the stream's shape, of a constant shape, masks, orders."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        f = torch.tanh(F.dropout(x, 0.2) @ self.weight)
        f = f * (torch.rand(x.shape[0], 1, dtype=x.dtype) > 0.3) + torch.rand_like(x)
        f = f + torch.rand(8, dtype=x.dtype) * torch.rand(8, dtype=x.dtype)
        f = f * x.new_empty(x.shape[0], 1).bernoulli_(0.7).div_(0.7)
        f = f[:, torch.randperm(8)] + torch.empty(8, dtype=x.dtype).normal_()
        return f + torch.bernoulli(x.sigmoid()) + torch.normal(0.0, 1.0, (8,), dtype=x.dtype)


def test_noise_of_every_kind() -> None:
    assert_compiled_equals_store(rewired(Wired(plain, Noise)), normal(4, 8))


class Mask(nn.Module):
    """A dropped path, of the size of the input."""

    def __init__(self, width: int, way: str) -> None:
        super().__init__()
        self.weight, self.way = nn.Parameter(torch.randn(width, width) * 0.3), way

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "dropout of ones":
            mask = F.dropout(torch.ones(700, 1, dtype=x.dtype), 0.4)
        elif self.way == "rand":
            mask = (torch.rand(700, 1, dtype=x.dtype) > 0.4).to(x.dtype)
        else:
            mask = torch.empty(700, 1, dtype=x.dtype).bernoulli_(0.6)
        return torch.tanh(x @ self.weight) * mask


@pytest.mark.parametrize("way", ["dropout of ones", "rand", "empty"])
def test_draws_with_equal_arguments_are_different_draws(way: str) -> None:
    """The partitioner merges what looks the same; all blocks would get the same mask."""
    rev = rewired(Wired(plain, lambda width: Mask(width, way), 3))
    watched = assert_compiled_equals_store(rev, normal(700, 8))
    assert "aten.empty.memory_format" not in watched.counts(), "nothing is in it"


def masked(net: Wired, x: Tensor) -> Tensor:
    """A mask that two blocks share, and dropout outside the chain."""
    mask = F.dropout(torch.ones_like(x), 0.4)
    x = F.dropout(net.stem(x), 0.2)
    for branch in net.branches:
        x = x + branch(x) * mask
    return net.head(F.dropout(x, 0.1))


def test_randomness_outside_of_branches_is_drawn_once() -> None:
    watched = assert_compiled_equals_store(rewired(Wired(masked)), normal(4, 8))
    assert "state" not in watched.counts()


def test_the_seed_changes_the_masks() -> None:
    """And the graphs are good for any seed."""
    rev = rewired(Net(dropout=0.3))
    watched = watch(rev)
    outcomes = []
    for seed in (1, 2):
        outcomes.append(outcome(rev, watched.run, X, seed=seed))
        assert_same(outcomes[-1], step(rev, "store", X, seed=seed), 1e-10)
    assert not torch.equal(outcomes[0].outputs[0], outcomes[1].outputs[0])
    assert len(watched.joints) == 1


@pytest.mark.parametrize(
    "setting",
    [
        {"aggressive_recomputation": True},
        {"ban_recompute_not_in_allowlist": False},
        {"recompute_views": True},
        {"cse": False},
    ],
    ids=str,
)
def test_masks_are_never_drawn_anew_by_the_partitioner(setting: dict[str, Any]) -> None:
    with functorch_config.patch(**setting):
        assert_compiled_equals_store(rewired(Net(dropout=0.3)), X)


def through_the_backend(model: nn.Module, **options: Any) -> Callable[..., Any]:
    """What `torch.compile` makes of a model, without code generation."""
    return torch.compile(model, backend="re2fx", options={"compiler": "aot_eager"}, **options)


class Checkpointed(Block):
    """A branch that its user may checkpoint."""

    checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointing:
            return x + checkpoint(self.branch, x, use_reentrant=False)
        return x + self.branch(x)

    def branch(self, x: Tensor) -> Tensor:
        """What is checkpointed."""
        return self.outer(self.drop(F.gelu(self.inner(self.norm(x)))))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_branches_under_a_checkpoint(dropout: float) -> None:
    """They are run again once, with the masks that they had."""
    model = Net(dropout=dropout, block=Checkpointed)
    rev = rewired(model)
    expected = step(rev, "store", X)
    for block in model.blocks:
        block.checkpointing = True  # type: ignore[assignment]
    assert_same(outcome(rev, through_the_backend(model), X), expected, 1e-10)


# Buffers.


def normed(width: int) -> nn.Module:
    """A branch with statistics."""
    return nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.Tanh())


def shared(net: Wired, x: Tensor) -> Tensor:
    """Every module twice in one chain."""
    x = net.stem(x)
    for index in range(len(net.branches)):
        branch = net.branches[index % 3]
        x = x + branch(x)
    return net.head(x)


def shared_by_chains(net: Wired, x: Tensor) -> Tensor:
    x = net.run(net.stem(x), 0, 3)
    return net.head(net.run(net.stem(x), 0, 3))


def shared_with_the_rest(net: Wired, x: Tensor) -> Tensor:
    """A norm in the stem, in a block and in the head."""
    norm = net.branches[1][1]  # type: ignore[index]
    return net.head(norm(net.run(norm(net.stem(x)), 0, 3)).tanh())


@pytest.mark.parametrize("wire", [plain, shared, shared_by_chains, shared_with_the_rest])
def test_batch_norm_used_more_than_once(wire: Callable[..., Any]) -> None:
    rev = rewired(Wired(wire, normed))
    assert_compiled_equals_store(rev, normal(6, 8), tolerance=1e-8)


def test_training_in_eval_mode() -> None:
    assert_compiled_equals_store(rewired(ConvNet(dropout=0.3)).eval(), IMAGE)


@pytest.mark.parametrize("model", ["dropout", "batch norm"])
def test_two_forwards_before_their_backwards(model: str) -> None:
    """The second forward writes to the buffers that the first backward reruns its branches with."""
    rev = rewired(Net(dropout=0.3) if model == "dropout" else ConvNet())
    x = X if model == "dropout" else IMAGE

    def twice(run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: run(x) + run(x * 2).square()

    got = outcome(rev, twice(watch(rev).run), x)
    expected = outcome(rev, twice(lambda x: type(rev).forward(rev, x)), x)
    assert_same(got, expected, 1e-9)


class Centred(nn.Module):
    """Reads its buffer, directly or not, then writes to it."""

    def __init__(self, width: int, read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.read = nn.Parameter(torch.randn(width, width) * 0.3), read
        self.register_buffer("centre", torch.ones(width))
        self.centre: Tensor

    def forward(self, x: Tensor) -> Tensor:
        f = torch.tanh((x - self.read(self.centre)) @ self.weight)
        with torch.no_grad():
            self.centre.mul_(0.5).add_(x.mean(0), alpha=0.5)
        return f


@pytest.mark.parametrize(
    "read",
    [lambda centre: centre, lambda centre: centre.view(1, -1), lambda centre: centre * 2],
    ids=["itself", "a view", "something computed"],
)
def test_branches_are_rerun_with_the_buffers_they_saw(read: Callable[[Tensor], Tensor]) -> None:
    rev = rewired(Wired(plain, lambda width: Centred(width, read), 3))
    assert_compiled_equals_store(rev, normal(4, 8))


def test_backward_twice() -> None:
    """Nothing is used up."""
    rev = rewired(ConvNet(dropout=0.3))
    watched = watch(rev)
    found = []
    for run in (watched.run, rev):
        torch.manual_seed(0)
        loss = weighted(run(IMAGE))
        for _ in range(2):
            found.append(torch.autograd.grad(loss, list(rev.parameters()), retain_graph=True))
    for gradients in found[:3]:
        for got, expected in zip(gradients, found[3], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-10)


# Dtypes and sizes.


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_autocast(dropout: float) -> None:
    rev = rewired(Net(dropout=dropout)).float()
    with torch.autocast("cpu", torch.bfloat16):
        watched = assert_compiled_equals_store(rev, X.float(), tolerance=3e-2)
    (last, before) = watched.roles()["stream"]
    assert last.meta["val"].dtype == before.meta["val"].dtype == torch.float32


def test_half_precision_parameters() -> None:
    rev = rewired(Net(dropout=0.3)).bfloat16()
    assert_compiled_equals_store(rev, X.bfloat16(), tolerance=3e-2)


def test_another_dtype_inside_a_branch() -> None:
    def narrow(net: Wired, x: Tensor) -> Tensor:
        x = net.stem(x)
        for branch in net.branches:
            x = x + branch(x).float().softmax(-1).double()
        return net.head(x)

    assert_compiled_equals_store(rewired(Wired(narrow)), normal(4, 8), tolerance=1e-6)


def sizes_in_links(net: Wired, x: Tensor) -> Tensor:
    batch, tokens, width = x.shape
    x = net.run(net.stem(x), 0, 2).transpose(0, 1).reshape(batch * tokens, width)
    return net.head(net.run(x, 2, 4).flatten(0).view(tokens, batch, width))


@pytest.mark.parametrize("wire", [plain, sizes_in_links])
def test_symbolic_sizes(wire: Callable[..., Any]) -> None:
    """One graph for every size."""
    rev = rewired(Wired(wire, number=4), coupling=Coupling.consistent(0.5))
    watched = watch(rev, dynamic=True)
    for shape in ((2, 5, 8), (3, 4, 8), (4, 7, 8)):
        got = outcome(rev, watched.run, normal(*shape))
        assert_same(got, step(rev, "store", normal(*shape)), 1e-10)
    assert len(watched.joints) == 1


def test_symbolic_sizes_through_the_backend() -> None:
    model = Net(dropout=0.3)
    rev = rewired(model)
    compiled = through_the_backend(model, dynamic=True)
    for number in (5, 7):
        x = normal(number, 4)
        assert_same(outcome(rev, compiled, x), step(rev, "store", x), 1e-10)


# What is kept.


class Attention(nn.Module):
    """Multi-head attention with dropout, behind a norm."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.proj, self.drop = nn.Linear(width, width), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, tokens, 3, 2, width // 2)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q @ k.transpose(-2, -1) * 0.5).softmax(-1)
        return self.proj((self.drop(scores) @ v).transpose(1, 2).reshape(x.shape))


class ViT(nn.Module):
    """Patches, a number of residuals, attention and MLP in turn, a head."""

    def __init__(self, depth: int, dropout: float = 0.1, width: int = 8) -> None:
        super().__init__()
        self.patches = nn.Linear(12, width)
        self.attentions = nn.ModuleList(Attention(width, dropout) for _ in range(depth // 2))
        self.mlps = nn.ModuleList(Block(width, dropout) for _ in range(depth // 2))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        for attention, block in zip(self.attentions, self.mlps, strict=True):
            x = x + attention(x)
            x = block(x)
        return self.head(x)


PATCHES = normal(2, 6, 12)


@pytest.fixture(scope="module")
def depths() -> dict[int, Watched]:
    """Networks of several depths, compared with stored execution."""
    return {
        depth: assert_compiled_equals_store(rewired(ViT(depth)), PATCHES, tolerance=1e-9)
        for depth in (4, 8, 16)
    }


@pytest.mark.parametrize("depth", [4, 8, 16])
def test_tensor_by_tensor(depths: dict[int, Watched], depth: int) -> None:
    """Parameters, the input, two streams, the head's input, a generator state per dropout."""
    watched = depths[depth]
    assert watched.blocks == [depth]
    assert watched.counts() == {"input": 1, "stream": 2, "state": depth, **HEAD}
    for state in watched.roles()["state"]:
        assert size([state]) == torch.get_rng_state().numel() == 5056


@pytest.mark.parametrize("depth", [4])
def test_tensor_by_tensor_by_value(depths: dict[int, Watched], depth: int) -> None:
    """The same, told by what is in the tensors of a call."""
    watched = depths[depth]
    rev, states = watched.rev, []
    parameters = {parameter.untyped_storage().data_ptr() for parameter in rev.parameters()}
    torch.manual_seed(3)
    watched.run(PATCHES).sum().backward()
    rev.zero_grad()
    torch.manual_seed(3)
    with re2fx.record() as calls, torch.no_grad():
        rev(PATCHES)
    (call,) = calls
    assert call.output is not None
    last, before = call.output
    expected = {"input": PATCHES, "last": last, "before": before, "head": (last + before) * 0.5}
    found = []
    for value in watched.results:
        if value.untyped_storage().data_ptr() in parameters:
            continue
        if value.dtype == torch.uint8:
            states.append(value)
            continue
        found += [
            name
            for name, tensor in expected.items()
            if tensor.numel() == value.numel() and torch.equal(tensor.reshape(value.shape), value)
        ]
    assert sorted(found) == sorted(expected)
    assert len(states) == depth


def test_what_is_kept_does_not_depend_on_the_depth(depths: dict[int, Watched]) -> None:
    sizes = [
        sum(size(nodes) for name, nodes in watched.roles().items() if name not in FREE)
        for watched in depths.values()
    ]
    streams, head, batch = 2 * 2 * 6 * 8 * 8, 2 * 6 * 8 * 8, 2 * 6 * 12 * 8
    assert sizes == [streams + head + batch] * 3


FREE = ("member", "state")


def test_stored_marks_keep_every_block() -> None:
    """The same network with marks that forbid reconstruction."""
    rev = rewired(ViT(4))
    watched = watch(rev, reversible=False)
    assert_same(outcome(rev, watched.run, PATCHES), step(rev, "store", PATCHES), 1e-10)
    assert watched.blocks == [0]
    assert "state" not in watched.counts()
    assert sum(watched.counts().values()) > 4 * 4


def without_barrier(graph: Graph) -> None:
    """Let the clones of the last block read the very node that the block reads."""
    barriers = [
        node
        for node in graph.nodes
        if node.target is aten.alias.default and node.meta.get("partitioner_tag") == IN_BACKWARD
    ]
    assert barriers
    for barrier in barriers:
        barrier.replace_all_uses_with(barrier.args[0])
        graph.erase_node(barrier)


def linear(width: int) -> nn.Module:
    """A branch without a norm."""
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))


def test_the_barrier_keeps_clones_from_being_merged_with_originals() -> None:
    """Common subexpressions are merged, and then the last block's activations are stored."""
    rev, x = rewired(Wired(three_in_sequence, linear)), normal(4, 8)
    expected = step(rev, "store", x)
    merged, apart = watch(rev, edit=without_barrier), watch(rev)
    for watched in (merged, apart):
        assert_same(outcome(rev, watched.run, x), expected, 1e-10)
    assert apart.counts() == {"input": 1, "stream": 6, "aten.mul.Tensor": 3}
    assert merged.counts()["aten.addmm.default"] >= 3
    assert sum(merged.counts().values()) > sum(apart.counts().values())
    with functorch_config.patch(cse=False):
        unmerged = watch(rev, edit=without_barrier)
        outcome(rev, unmerged.run, x)
    assert unmerged.counts() == apart.counts()


# Structure.


def test_clones_belong_to_the_backward() -> None:
    """No more work in the forward, one more branch per block in the backward."""
    rev = rewired(Net(dropout=0.3))
    stored, reversed_ = watch(rev, reversible=False), watch(rev)
    for watched in (stored, reversed_):
        outcome(rev, watched.run, X)
    counted = [operators(watched.forwards[0]) for watched in (stored, reversed_)]
    for target in (aten.addmm.default, aten.native_layer_norm.default, aten.gelu.default):
        assert counted[0].count(target) == counted[1].count(target)
    tagged = [n for n in reversed_.joints[0].nodes if n.meta.get("partitioner_tag") == IN_BACKWARD]
    clones = [node.target for node in tagged]
    assert clones.count(aten.native_layer_norm.default) == 4
    assert clones.count(aten.addmm.default) == 4 + 3  # not the product that ends the first branch
    assert counted[1].count(run_and_save_rng_state) == 4


def operators(graph: Graph) -> list[Any]:
    """What a graph computes."""
    return [node.target for node in graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("model", [Net, ConvNet])
def test_inference_graphs_lose_their_marks(model: Callable[..., nn.Module]) -> None:
    """Without gradients, the graph is the one without marks, operator by operator."""
    rev = rewired(model(dropout=0.3)).eval()
    x = X if model is Net else IMAGE
    watched = watch(rev)
    with torch.no_grad():
        torch.testing.assert_close(watched.run(x), rev(x), rtol=0, atol=0)
    (graph,) = watched.inference
    graph.lint()
    assert not watched.joints
    assert not any(node.target in MARKS for node in graph.nodes)
    assert operators(graph) == operators(traced(rev, x))


def traced(rev: re2fx.RewiredModule, x: Tensor) -> Graph:
    """The ATen graph of the network without marks."""
    from functorch.compile import aot_module, make_boxed_func

    graphs = []

    def keep(module: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(module.graph)
        return make_boxed_func(module)

    with torch.no_grad():
        aot_module(rev, keep)(x)
    return graphs[0]


# Everything at once.


def with_dropout(network: Network) -> Network:
    """Dropout at the end of every other branch."""
    branches = [module for module in network.modules() if isinstance(module, Branch)]
    for branch in branches[::2]:
        branch.register_module("drop", nn.Dropout(0.3))
        branch.forward = dropping(branch)  # type: ignore[method-assign]
    return network


def dropping(branch: Branch) -> Callable[..., Tensor]:
    """The branch, then its dropout."""
    forward = branch.forward
    return lambda *args: branch.drop(forward(*args))  # type: ignore[operator]


@pytest.mark.parametrize("activation", ["branch", "stream"])
@settings(
    max_examples=16,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    data=st.data(),
    rank=st.sampled_from((2, 3, 4)),
    coupling=couplings(),
    readout=st.sampled_from(("mean", "sum", "last")),
    training=st.booleans(),
)
def test_random_programs(
    activation: str,
    data: st.DataObject,
    rank: int,
    coupling: Coupling,
    readout: str,
    training: bool,
) -> None:
    network, x, cond = build(data.draw(programs(rank, activation)))
    with_dropout(network).train(training)
    options: dict[str, Any] = {"coupling": coupling, "readout": readout, "activation": activation}
    try:
        rev = re2fx.transform(network, memory="store", **options)
    except re2fx.Re2fxWarning:
        return
    assert isinstance(rev, re2fx.RewiredModule)
    watched = assert_compiled_equals_store(rev, x, cond, tolerance=1e-7)
    assert sum(watched.blocks) <= rev.plan.rewired
