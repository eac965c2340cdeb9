"""On a GPU: the same step as stored execution takes, and the memory that was planned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import re2fx
from re2fx.workspace import nbytes
from re2fx.workspace_cuda import allocated, rule_of

from .compare import weighted
from .models import ConvNet, Net
from .situations.harness import double, example

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    # Of torch's, in the thread that runs the first backward.
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS"),
]

MEMORIES = ("reversible", "lowest", 0.5)
Step = tuple[list[Tensor], Tensor]


@pytest.fixture(autouse=True)
def _same_kernels() -> Iterator[None]:
    """The sums of cuDNN are in the same order every time."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = before


def mixed(dtype: torch.dtype = torch.bfloat16) -> AbstractContextManager[Any]:
    """Autocast."""
    return torch.autocast("cuda", dtype)


def step(
    run: Callable[..., Any],
    model: nn.Module,
    x: Tensor,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    backward: Callable[[Tensor], None] = Tensor.backward,
) -> Step:
    """Result, gradients, and the state of the GPU's generator afterwards."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.zero_grad(set_to_none=True)
    x = x.detach().clone().requires_grad_()
    torch.cuda.manual_seed(0)
    with context():
        result = run(x)
    backward(weighted(result.double().cpu()))
    found = [result.detach(), x.grad, *(p.grad for p in model.parameters())]
    found += [buffer.clone() for buffer in model.buffers()]
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    return [tensor for tensor in found if tensor is not None], torch.cuda.get_rng_state()


def assert_same(got: Step, expected: Step, tolerance: float) -> None:
    """In norm, relative to each tensor's own, or to the largest where it is rounding alone."""
    largest = max(float(tensor.double().norm()) for tensor in expected[0])
    for a, b in zip(got[0], expected[0], strict=True):
        scale = max(float(b.double().norm()), 1e-6 * largest)
        assert float((a.double() - b.double()).norm()) <= tolerance * scale
    assert torch.equal(got[1], expected[1]), "the random stream differs"


def subject(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    """A network with dropout and its input, on the GPU."""
    if name == "mlp":
        model, x = double(Net(6, width=64, dropout=0.2)), example(128, 4)
    else:
        model, x = double(ConvNet(4, width=16, dropout=0.2)), example(8, 3, 32, 32)
    return model.to("cuda", dtype), x.to("cuda", dtype)


def rewired(model: nn.Module, x: Tensor, memory: Any, **options: Any) -> Any:
    """With a budget as a share of the way from the lowest peak to the stored one."""
    if isinstance(memory, float):
        lowest: Any = re2fx.transform(model, x, memory="lowest", **options)
        plan = lowest.plan_memory(x)
        low, high = plan.predicted.peak.peak, plan.stored.peak.peak
        memory = int(low + memory * (high - low))
    return re2fx.transform(model, x, memory=memory, **options)


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_steps_in_fp64(name: str, memory: Any) -> None:
    model, x = subject(name)
    expected = step(re2fx.transform(model, x, memory="store"), model, x)
    assert_same(step(rewired(model, x, memory), model, x), expected, 1e-10)


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_steps_under_autocast(name: str, memory: Any) -> None:
    model, x = subject(name, torch.float32)
    expected = step(re2fx.transform(model, x, memory="store"), model, x, mixed)
    with mixed():
        network = rewired(model, x, memory)
    assert_same(step(network, model, x, mixed), expected, 0.1)
    assert not torch.is_autocast_enabled("cuda")


@pytest.mark.parametrize("coupling", [re2fx.Coupling.consistent(0.25), re2fx.Coupling.re2tal()])
@pytest.mark.parametrize("context", [nullcontext, mixed, partial(mixed, torch.float16)])
def test_exact_streams_lose_no_bit(coupling: Any, context: Any) -> None:
    model, x = subject("mlp", torch.float32)
    exact: Any = re2fx.transform(model, x, exact=True, coupling=coupling)
    exact.memory = "store"
    expected = step(exact, model, x, context)
    exact.memory = "reversible"
    assert_same(step(exact, model, x, context), expected, 0.0)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor",  # torch hides it
    "ignore:TensorFloat32 tensor cores",
)
@pytest.mark.parametrize("scope", ["graph", "region"])
def test_compiled_by_inductor(scope: str) -> None:
    model, x = subject("mlp", torch.float32)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # Inductor draws its own random numbers
    expected = step(re2fx.transform(model, x, memory="store"), model, x)
    run = torch.compile(model, backend="re2fx", options={"scope": scope})
    for _ in range(2):
        assert_same(step(run, model, x), expected, 1e-4)


def test_on_another_stream() -> None:
    """The backward brings states back on the stream of the forward."""
    model, x = subject("conv")
    expected = step(re2fx.transform(model, x, memory="store"), model, x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())

    def on_stream() -> AbstractContextManager[Any]:
        return torch.cuda.stream(stream)

    def backward(loss: Tensor) -> None:
        torch.cuda.current_stream().wait_stream(stream)
        loss.backward()
        torch.cuda.synchronize()

    network = re2fx.transform(model, x)
    assert_same(step(network, model, x, on_stream, backward), expected, 1e-10)


def test_scaled_gradients_in_fp16() -> None:
    model, x = subject("mlp", torch.float32)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)

    def backward(loss: Tensor) -> None:
        scaler.scale(loss.to("cuda")).backward()

    half = partial(mixed, torch.float16)
    expected = step(re2fx.transform(model, x, memory="store"), model, x, half, backward)
    assert_same(step(re2fx.transform(model, x), model, x, half, backward), expected, 1e-2)


@pytest.mark.parametrize("memory", ["lowest", 0.3, 0.7])
@pytest.mark.parametrize("context", [nullcontext, mixed])
def test_planned_peaks(context: Any, memory: Any) -> None:
    """Within 5 % of what is measured; a budget is exceeded by 3 % at most."""
    model = Net(8, width=512).to("cuda")
    x = torch.randn(16384, 4, device="cuda")
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with context():
        network = rewired(model, x, memory)

    def run() -> None:
        with context():
            loss = network(x).float().square().mean()
        loss.backward()

    run()
    measured = re2fx.peak(run, "cuda").peak
    assert network.memory_plan.predicted.peak.peak == pytest.approx(measured, rel=0.05)
    if isinstance(network.memory, int):
        assert measured <= 1.03 * network.memory


def test_verified() -> None:
    model, x = subject("conv")
    assert re2fx.verify(re2fx.transform(model, x), x).ok


def kernels() -> dict[str, tuple[Any, list[Any]]]:
    """Operators and arguments whose workspace has a rule."""
    aten = torch.ops.aten
    x = torch.randn(16, 512, 768, device="cuda")
    turned = x.transpose(0, 1)
    half, w = x.bfloat16(), torch.ones(768, device="cuda")
    norm = aten.native_layer_norm(turned, [768], w, w, 1e-5)
    q = torch.randn(8, 300, 12, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    flash = aten._scaled_dot_product_flash_attention(q, q, q)
    ids = torch.randint(1000, (16, 512), device="cuda")
    odd = torch.randn(4096, 771, device="cuda")
    return {
        "bias gradient": (aten.sum.dim_IntList, [half, [0, 1]]),
        "bias gradient, odd": (aten.sum.dim_IntList, [odd, [0]]),
        "mean of images": (aten.mean.dim, [x.view(16, 512, 24, 32).permute(0, 3, 1, 2), [2, 3]]),
        "sum of rows": (aten.sum.dim_IntList, [x, [2]]),
        "sum of all": (aten.sum.dim_IntList, [x, [0, 1, 2]]),
        "layer norm, turned": (aten.native_layer_norm.default, [turned, [768], w, w, 1e-5]),
        "layer norm backward": (
            aten.native_layer_norm_backward.default,
            [turned, turned, [768], norm[1], norm[2], w, w, [True] * 3],
        ),
        "softmax backward": (aten._softmax_backward_data.default, [x, x, -1, x.dtype]),
        "roll": (aten.roll.default, [x, [1, 0, 2], [0, 1, 2]]),
        "embedding backward": (
            aten.embedding_dense_backward.default,
            [x, ids, 1000, -1, False],
        ),
        "flash backward": (
            aten._scaled_dot_product_flash_attention_backward.default,
            [q, q, q, q, *flash[:6], 0.0, False, *flash[6:8]],
        ),
    }


@pytest.mark.parametrize("name", kernels() if torch.cuda.is_available() else [])
def test_what_a_kernel_takes(name: str) -> None:
    func, args = kernels()[name]
    func(*args)
    rule = rule_of(func)
    assert rule is not None
    found: list[Any] = []
    real = re2fx.peak(lambda: found.append(func(*args)), "cuda").peak
    made = found[0] if isinstance(found[0], tuple) else (found[0],)
    outputs = [x for x in made if isinstance(x, Tensor) and x.device.type == "cuda"]
    expected = sum(allocated(nbytes(x)) for x in outputs) + allocated(rule(args, outputs))
    assert real == pytest.approx(expected, rel=0.05, abs=2**20)
