"""Rows 21, 22, 24, 31 and 32: sizes, structures, layouts and dtypes of what goes in and out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import re2fx
from re2fx.torchvision_shim import ensure_torchvision

from ..compare import weighted
from ..models import Block, ConvNet, Net
from .harness import GRAPH, compare, double, example, pair, row, train

IMAGE = example(4, 3, 6, 6)
X = example(5, 4)


@row(21)
def test_a_different_batch_at_each_step(executor: str) -> None:
    """One capture holds for all of them; the last batch is short."""
    both = pair(executor, double(Net(dropout=0.2)), X)
    for batch in (5, 7, 2, 1):
        compare(both, example(batch, 4))
    assert len(both.store._variants) <= 2  # type: ignore[attr-defined]


@row(21)
def test_a_sequence_that_grows(executor: str) -> None:
    """Sizes that are dynamic in two dimensions."""
    both = pair(executor, double(Net()), example(2, 3, 4))
    for batch, length in ((2, 3), (3, 5), (1, 1), (4, 2)):
        compare(both, example(batch, length, 4))


@dataclass
class Answer:
    """What libraries return."""

    out: Tensor
    parts: dict[str, Any]
    loss: Tensor | None = None


torch.utils._pytree.register_dataclass(Answer)


class Structured(nn.Module):
    """Keyword, optional, nested and non-tensor arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(
        self, x: Tensor, extra: dict[str, Any] | None = None, *, scale: float = 1.0, name: str = ""
    ) -> Answer:
        if extra is not None:
            x = x + extra["shift"][0] * scale
        out = self.net(x)
        return Answer(out, {"mean": out.mean(0), "name": name, "pair": (out.sum(), None)})


CALLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "tensor": ((X,), {}),
    "keyword": ((), {"x": X, "name": "a"}),
    "none": ((X, None), {}),
    "nested": ((X, {"shift": [X.flip(0)]}), {"scale": 0.5}),
}


@row(22)
@pytest.mark.parametrize("name", CALLS)
def test_structures(executor: str, name: str) -> None:
    """Arguments of every kind, and a dataclass that comes back as what it was."""
    args, kwargs = CALLS[name]
    model = double(Structured())
    store: Any = re2fx.transform(model, args or kwargs, memory="store")
    if args and kwargs:
        store = re2fx.transform(model, {"x": args[0], "extra": args[1], **kwargs}, memory="store")
    run: Any = re2fx.transform(model, {**dict(zip(("x", "extra"), args, strict=False)), **kwargs})
    if executor == "compiled":
        run = torch.compile(model, backend="re2fx", options=GRAPH)
    results = []
    for call in (run, store):
        model.zero_grad()
        answer = call(*args, **kwargs)
        assert type(answer) is Answer
        assert answer.loss is None
        assert answer.parts["name"] == kwargs.get("name", "")
        assert answer.parts["pair"][1] is None
        (weighted(answer.out) + answer.parts["pair"][0]).backward()
        results.append([answer.out, *(p.grad.clone() for p in model.parameters())])  # type: ignore[union-attr]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@row(22)
def test_a_model_output_of_transformers(executor: str) -> None:
    """The type, its keys and attribute access are kept."""
    ensure_torchvision()
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=20, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    model = transformers.GPT2LMHeadModel(config).double()
    ids = torch.arange(8)[None]
    inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
    store: Any = re2fx.transform(model, inputs, memory="store")
    run: Any = re2fx.transform(model, inputs)
    if executor == "compiled":
        run = torch.compile(run, backend="re2fx", options=GRAPH)
    got, expected = run(**inputs), store(**inputs)
    assert type(got) is type(expected)
    assert list(got.keys()) == list(expected.keys()) == ["loss", "logits"]
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-11, atol=1e-11)


@row(24)
def test_channels_last(executor: str) -> None:
    """Values, the layout that convolutions see in the rerun, and the strides of gradients."""
    seen: list[bool] = []

    class Look(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            if not torch.compiler.is_compiling():
                seen.append(x.is_contiguous(memory_format=torch.channels_last))
            return super().forward(x)

    model: nn.Module = ConvNet()
    for index in range(3):
        block: Any = model.get_submodule(f"blocks.{index}")
        block.conv1 = Look(6, 6, 3, padding=1, bias=False)
    model = double(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = IMAGE.to(memory_format=torch.channels_last)
    both = pair(executor, model)
    compare(both, x)
    assert all(seen)
    strides = []
    for run in both:
        given = x.clone(memory_format=torch.preserve_format).requires_grad_()
        weighted(run(given)).backward()
        assert given.grad is not None
        strides.append(given.grad.stride())
    assert strides[0] == strides[1]


@row(24)
def test_streams_that_are_not_contiguous(executor: str) -> None:
    """A transposed, an expanded and a strided input."""
    both = pair(executor, double(Net(dropout=0.2)))
    for x in (example(4, 5).t(), example(1, 4).expand(5, 4), example(5, 8)[:, ::2]):
        compare(both, x)


class Phase(nn.Module):
    """Turns a magnitude by trained angles."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.angle = nn.Parameter(torch.linspace(0, 1, width, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.polar(torch.tanh(x.abs()), self.angle.expand(x.shape))


class Rotate(nn.Module):
    """A residual on complex numbers."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.phase = Phase(width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.phase(x)
        return out


class Complex(nn.Module):
    """Streams of complex numbers between a real input and a real output."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*[Rotate(4, 0) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.blocks(torch.complex(x, x * 0.5))
        return torch.view_as_real(out)


@row(31)
def test_complex_streams(executor: str) -> None:
    """Reconstructed as others are."""
    compare(pair(executor, Complex(), X), X)


DTYPES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}


@row(31)
@pytest.mark.parametrize("dtype", DTYPES)
def test_floating_point_dtypes(executor: str, dtype: torch.dtype) -> None:
    """Parameters, streams and gradients of each dtype."""
    both = pair(executor, double(Net()).to(dtype))
    compare(both, X.to(dtype), tolerance=DTYPES[dtype])
    assert both.reversible(X.to(dtype)).dtype == dtype


class Counting(nn.Module):
    """Sums of integers beside a network, which is no network."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.table = Net(), nn.Embedding(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        first = ids + 1
        second = first + ids % 2
        out: Tensor = self.net(self.table(second % 8))
        return out


@row(31)
def test_integers(executor: str) -> None:
    """Additions of integers are no residuals; integer inputs have no gradient."""
    both = pair(executor, double(Counting()))
    assert len(both.store.plan.chains[0]) == 4  # type: ignore[attr-defined]
    compare(both, torch.arange(12).view(3, 4))


class Quantised(nn.Module):
    """A frozen linear layer of 8-bit weights, as those of 4-bit libraries a module of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        weight = torch.randn(width, width, generator=torch.Generator().manual_seed(2))
        self.scale: Tensor
        self.weight: Tensor
        self.register_buffer("scale", weight.abs().max() / 127)
        self.register_buffer("weight", (weight / self.scale).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.to(x.dtype) * self.scale.to(x.dtype))


class QuantisedBlock(Block):
    """Trained norms and adapters around quantised weights."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__(width, dropout)
        self.frozen = Quantised(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.frozen(self.outer(self.inner(self.norm(x)).tanh()))


@row(31)
def test_quantised_leaves(executor: str) -> None:
    """They are run as they are, and what trains around them gets its gradients."""
    left = compare(pair(executor, double(Net(block=QuantisedBlock))), X)
    assert left.buffers["blocks.0.frozen.weight"].dtype == torch.int8


SIZES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "no rows": (Net, (0, 4)),
    "one row": (Net, (1, 4)),
    "a sequence of one": (Net, (3, 1, 4)),
    "an empty sequence": (Net, (3, 0, 4)),
    "one image": (ConvNet, (1, 3, 6, 6)),
    "one pixel": (ConvNet, (2, 3, 1, 1)),
}


@row(32)
@pytest.mark.parametrize("name", SIZES)
def test_small_sizes(executor: str, name: str) -> None:
    """As in the stored run; an image of one pixel is what batch norm refuses."""
    build, shape = SIZES[name]
    compare(pair(executor, double(build())), example(*shape))


@row(32)
def test_no_images_at_all(executor: str) -> None:
    """What the stored run refuses, the reversible one refuses in the same words."""
    said = []
    for run in pair(executor, double(ConvNet())):
        with pytest.raises(Exception) as error:  # noqa: PT011
            train(run, nn.Module(), (example(1, 3, 1, 1),))
        said.append(str(error.value))
    assert all("Expected more than 1 value per channel" in text for text in said), said
