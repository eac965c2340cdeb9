"""One rewired module, called in ways it was not captured for."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import re2fx
from re2fx import RewiredModule, variants

from .compare import assert_reversible_equals_store
from .models import Net
from .test_routes import Branching, Scale, X, model


@pytest.fixture(autouse=True)
def fresh() -> Any:
    yield
    torch.compiler.reset()


def rewired(given: nn.Module, example: Any, **options: Any) -> RewiredModule:
    rev = re2fx.transform(given, example, **options)
    assert isinstance(rev, RewiredModule)
    return rev


def expected(given: Branching, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """What the rewired `Branching` computes, by way of its net, which symbolic tracing captures."""
    if x.shape[1] > 100:
        x = x.mean(1, keepdim=True)
    positions = torch.arange(x.shape[1], dtype=x.dtype)[:, None]
    out: Tensor = re2fx.transform(given.net)(x if mask is None else x * mask) + positions
    return out


SHAPES = [(1, 5, 4), (2, 1, 4), (1, 1, 4), (2, 120, 4), (1, 120, 4)]


@pytest.mark.parametrize("shape", SHAPES)
def test_sizes_of_one_and_other_paths(shape: tuple[int, ...]) -> None:
    given = model()
    rev, x = rewired(given, X), torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(rev(x).logits, expected(given, x), rtol=0, atol=1e-12)
    gradients: dict[str, list[Tensor | None]] = {}
    for rev.memory in ("store", "reversible"):
        rev.zero_grad()
        rev(x).logits.square().mean().backward()
        gradients[rev.memory] = [p.grad for p in given.parameters()]
    torch.testing.assert_close(gradients["reversible"], gradients["store"], rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(rev(X).logits, expected(given, X), rtol=0, atol=1e-12)
    assert len(rev._variants) == 2


@pytest.mark.parametrize("shape", [(3, 5, 4), (3, 1, 4), (1, 7, 4)])
def test_an_example_of_size_one(shape: tuple[int, ...]) -> None:
    given = model()
    rev, x = rewired(given, X[:1, :1]), torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(rev(x).logits, expected(given, x), rtol=0, atol=1e-12)


def test_each_way_is_captured_once() -> None:
    rev = rewired(model(), X)
    for rows in (1, 2, 1, 3, 1):
        for length in (1, 4, 1, 6):
            rev(torch.randn(rows, length, 4, dtype=torch.float64))
    assert len(rev._variants) == 4


def test_optional_arguments_given_later() -> None:
    given, mask = model(), torch.rand(3, 5, 4, dtype=torch.float64)
    rev = rewired(given, X)
    got = rev(X, mask=mask, wide=True)
    torch.testing.assert_close(got.logits, expected(given, X, mask), rtol=0, atol=1e-12)
    assert got.hidden is not None
    assert rev(X).hidden is None
    torch.testing.assert_close(rev(X[:1], mask=mask[:1]).logits, expected(given, X[:1], mask[:1]))


def test_with_symbolic_tracing_too() -> None:
    class Masked(Net):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            out: Tensor = super().forward(x if mask is None else x * mask)
            return out

    given, mask = Masked().double(), torch.rand(3, 5, 4, dtype=torch.float64)
    rev = rewired(given, None)
    torch.testing.assert_close(rev(X, mask), rev(X * mask))
    assert_reversible_equals_store(rev, X, mask)


class Deep(Branching):
    """How many blocks run is an argument."""

    def forward(self, x: Tensor, depth: int = 3, rate: float = 1.0, extra: Any = None) -> Tensor:  # type: ignore[override]
        if x.shape[0] > 100:
            return x
        x = self.net.stem(x)
        for block in list(self.net.blocks)[:depth]:
            x = block(x)
        return x * rate


def test_another_plan_is_refused() -> None:
    rev = rewired(Deep().double(), X)
    with pytest.raises(re2fx.ModeMismatchError, match=r"depth=3 and called with .* chain 0 was"):
        rev(X, depth=2)
    rev(X)


def test_no_chain_at_all_is_refused_with_the_reason() -> None:
    rev = rewired(Deep().double(), X)
    with pytest.raises(re2fx.ModeMismatchError, match=r"1 chain then, 0 now; refused now: .*one"):
        rev(X, depth=1)


def test_a_fraction_is_not_captured_at_every_call() -> None:
    rev = rewired(Deep().double(), X)
    with pytest.raises(re2fx.InputError, match=r"rate=1\.0 and called with another value"):
        rev(X, rate=0.5)
    assert len(rev._variants) == 1


def test_objects_are_not_captured() -> None:
    rev = rewired(Deep().double(), X)
    with pytest.raises(re2fx.InputError, match="An argument of object cannot be captured"):
        rev(X, extra=object())


def test_captures_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "MAX_CAPTURES", 3)
    rev = rewired(model(), X)
    rev(X[:1])
    rev(X[:, :1])
    with pytest.raises(re2fx.InputError, match="captured for 3 ways of calling it, and no more"):
        rev(X[:1, :1])
    rev(X[:1])


def test_sizes_that_do_not_fit_the_model() -> None:
    rev = rewired(model(), X)
    words = r"dimension 2 of x of size 4, and called with(.|\n)*called now failed"
    with pytest.raises(re2fx.InputError, match=words):
        rev(torch.randn(2, 5, 6, dtype=torch.float64))


def test_a_model_that_has_changed() -> None:
    """What Dynamo captured then does not hold for a hook."""
    given = model()
    rev = rewired(given, X)
    plain = rev(X).logits
    handle = given.net.blocks[1].register_forward_hook(lambda module, args, out: 2 * out)
    hooked = rewired(given, X)(X).logits
    torch.testing.assert_close(rev(X).logits, hooked, rtol=0, atol=1e-12)
    assert not torch.allclose(hooked, plain)
    handle.remove()
    torch.testing.assert_close(rev(X).logits, plain, rtol=0, atol=0)


def test_an_edited_graph() -> None:
    given = model()
    rev = rewired(given, X)
    rev(X[:1])
    output = next(node for node in rev.graph.nodes if node.op == "output")
    with rev.graph.inserting_before(output):
        output.args = (rev.graph.call_function(id, (output.args[0],)),)
    rev.recompile()
    assert isinstance(rev(X), int)
    with pytest.raises(re2fx.InputError, match="sizes below 2"):
        rev(X[:1])


def test_what_was_selected_stays_selected() -> None:
    given = model()
    rev = rewired(given, X, select=lambda r: not r.location.module.endswith("0"), min_saving=1)
    assert [len(chain) for chain in rev.plan.chains] == [3]
    rev(X[:1])
    small = pickle.loads(pickle.dumps(rev))
    torch.testing.assert_close(small(X[:1, :1]).logits, rev(X[:1, :1]).logits)


def through_pickle(module: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, copy.copy])
def test_copies_keep_them(copied: Callable[[nn.Module], Any]) -> None:
    rev = rewired(model(), X)
    rev(X[:1])
    other = copied(rev)
    assert len(other._variants) == 2
    torch.testing.assert_close(other(X[:1]).logits, rev(X[:1]).logits)
    torch.testing.assert_close(other(X[:1, :1]).logits, rev(X[:1, :1]).logits)
    assert len(rev._variants) == 3


# dtypes


class Typed(Branching):
    """Reads the dtype of its stream, which Dynamo writes in as a constant."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        if x.shape[0] > 100:
            return x
        x = self.net.stem(x)
        for block in self.net.blocks:
            x = x + block(x).to(x.dtype)
        return self.net.head(x).to(x.dtype)


def test_another_dtype_of_the_parameters() -> None:
    given = Typed().double()
    rev = rewired(given, X)
    given.float()
    single = rev(X.float())
    assert single.dtype == torch.float32
    assert len(rev._variants) == 2
    rev.double()
    torch.testing.assert_close(rev(X).float(), single, rtol=1e-4, atol=1e-5)
    assert len(rev._variants) == 2


def test_autocast() -> None:
    given = Typed()
    rev, x = rewired(given, X.float()), X.float()
    plain = rev(x)
    with torch.autocast("cpu", torch.bfloat16):
        again = re2fx.transform(given, x)
        torch.testing.assert_close(rev(x), again(x), rtol=0, atol=0)
        assert_reversible_equals_store(rev, x)
    assert len(rev._variants) == 2
    torch.testing.assert_close(rev(x), plain, rtol=0, atol=0)


# how it is called


# Dynamo makes one of its own.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_called_without_gradients_first(mode: Any) -> None:
    class Custom(Branching):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            if x.shape[0] > 100:
                return x
            out: Tensor = Scale.apply(self.net(x))
            return out

    given = Custom().double()
    rev = rewired(given, X)
    with mode():
        inside = rev(X[:1].clone())
    torch.testing.assert_close(inside, rev(X[:1]), rtol=1e-12, atol=0)
    rev(X[:1]).sum().backward()
    bias = given.get_parameter("net.head.bias").grad
    assert bias is not None
    torch.testing.assert_close(bias, torch.full_like(bias, 25.0))  # 5 rows, a gradient of 5


@pytest.mark.filterwarnings("ignore:.*compile.*:UserWarning")
def test_inside_distributed_data_parallel(tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        given = model()
        wrapped = nn.parallel.DistributedDataParallel(rewired(given, X))
        wrapped(X[:1]).logits.square().sum().backward()
        found = [p.grad.clone() for p in given.parameters() if p.grad is not None]
    finally:
        torch.distributed.destroy_process_group()
    given.zero_grad()
    expected(given, X[:1]).square().sum().backward()
    wanted = [p.grad for p in given.parameters() if p.grad is not None]
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-14)


def test_compiled() -> None:
    given = model()
    rev = rewired(given, X)
    run = torch.compile(rev, backend="re2fx", options={"compiler": "aot_eager"})
    for x in (X, X[:1], X[:1, :1]):
        torch.testing.assert_close(run(x).logits, expected(given, x), rtol=0, atol=1e-12)
    assert len(rev._variants) == 3
    torch.compiler.reset()
    run = torch.compile(rev, backend="re2fx", fullgraph=True, options={"compiler": "aot_eager"})
    for x in (X, X[:1]):
        torch.testing.assert_close(run(x).logits, expected(given, x), rtol=0, atol=1e-12)


def test_nothing_of_the_users_is_touched() -> None:
    given = model()
    rev = rewired(given, X)
    state, settings = torch.get_rng_state(), torch._dynamo.config.get_config_copy()
    flags = [m.training for m in given.modules()]
    rev.memory = "store"
    rev.eval()(X[:1])
    rev.train()
    assert torch._dynamo.config.get_config_copy() == settings
    assert [m.training for m in given.modules()] == flags
    assert torch.equal(torch.get_rng_state(), state)


@dataclasses.dataclass
class Loss:
    """What a language model returns."""

    loss: Tensor | None


def test_a_call_that_logs() -> None:
    import logging

    logger = logging.getLogger("tests")

    class Logging(Branching):
        def forward(self, x: Tensor, y: Tensor | None = None) -> Loss:  # type: ignore[override]
            if x.shape[0] > 100:
                return Loss(None)
            if y is None:
                return Loss(self.net(x))
            logger.warning("with a target")
            return Loss((self.net(x) - y).square().mean())

    rev = rewired(Logging().double(), X)
    loss = rev(X, torch.ones(3, 5, 3, dtype=torch.float64)).loss
    assert loss.dim() == 0


class Pooled(nn.Module):
    """Looks at the height of an image, so that tracing stops; forgets what it makes on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.mixes = nn.ModuleList([nn.Conv2d(3, 3, 1) for _ in range(3)])

    def forward(self, x: Tensor, unread: Tensor | None = None) -> Tensor:
        if x.shape[2] > 100:
            x = x[:, :, :100]
        for mix in self.mixes:
            x = x + torch.tanh(mix(x))
        return x.mean((2, 3))


def test_images_of_many_sizes() -> None:
    """Two captures for sizes of their own, then one for all."""
    given, rev = Pooled().double(), None
    for size in (8, 6, 10, 7, 9, 11, 5):
        image = torch.randn(2, 3, size, size, dtype=torch.float64)
        rev = rev or rewired(given, image)
        reference = rewired(given, image, capture="export")
        torch.testing.assert_close(rev(image), reference(image), rtol=0, atol=1e-12)
    assert rev is not None
    sizes = [variant.inputs.shapes[0].sizes[0] for variant in rev._variants]
    assert [[isinstance(size, int) for size in row] for row in sizes] == [
        [False, True, True, True], [False, True, True, True], [False, True, True, True],
        [False, True, False, False],
    ]  # fmt: skip
    assert_reversible_equals_store(rev, torch.randn(4, 3, 12, 12, dtype=torch.float64))


def test_an_input_that_is_not_read_has_any_size() -> None:
    image = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    rev = rewired(Pooled().double(), (image, torch.ones(2, 1)), capture="dynamo")
    torch.testing.assert_close(rev(image, torch.ones(2, 1)), rev(image, torch.ones(1, 7)))
    assert len(rev._variants) == 1
