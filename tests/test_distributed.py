"""Two real ranks over loopback: the mean of both ranks' gradients, as on one process."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

import re2fx
from re2fx.passes.reverse import reverse

from .models import Net

# One worker, so that the ranks are started once.
pytestmark = pytest.mark.xdist_group("ranks of all ways")

RANKS = 2

# MiB; one block of the network has about 2.3 KiB of parameters.
BUCKET = 0.0045


def data() -> Tensor:
    return torch.randn(RANKS, 6, 4, generator=torch.Generator().manual_seed(1)).double()


def network() -> nn.Module:
    torch.manual_seed(0)
    return Net(depth=4).double()


def expected() -> dict[str, Tensor]:
    """Gradients of the stored network on the whole batch."""
    rev = re2fx.transform(network(), memory="store")
    sum(rev(x).square().sum() for x in data()).backward()
    return {n: p.grad / RANKS for n, p in rev.named_parameters() if p.grad is not None}


def run_rank(rank: int, rendezvous: str, out: str) -> None:
    """One rank: every way of wrapping, two steps each; rank 0 saves the gradients."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=RANKS)
    results: dict[str, Any] = {}
    try:
        for name, (wrap, options) in WAYS.items():
            model = network()
            module = wrap(model, **options)
            for _ in range(2):  # static_graph rebuilds after the first step
                model.zero_grad()
                module(data()[rank]).square().sum().backward()
            results[name] = {n: whole(p.grad) for n, p in model.named_parameters()}
            torch.compiler.reset()
        results["cut"] = refused(rank)
        results["pieces"] = pieces(rank)
        if rank == 0:
            torch.save(results, out)
    finally:
        dist.destroy_process_group()


def refused(rank: int) -> str:
    """What is said of a model that DistributedDataParallel's optimizer cuts into pieces."""
    module = wrap_compiled(network(), rewire=False, optimize=True)
    try:
        module(data()[rank])
    except torch._dynamo.exc.BackendCompilerFailed as error:
        return f"{type(error.inner_exception).__name__}: {error.inner_exception}"
    finally:
        torch.compiler.reset()
    return "nothing"


def pieces(rank: int) -> list[int]:
    """How many graphs a rewired network is cut into, and how many of its blocks each reverses."""
    backend: Any = importlib.import_module("re2fx.backend")
    reversed_blocks: list[int] = []

    def count(graph: torch.fx.Graph) -> int:
        reversed_blocks.append(reverse(graph))
        return reversed_blocks[-1]

    module = wrap_compiled(network(), rewire=True, optimize=True)
    original, backend.reverse = backend.reverse, count
    try:
        module(data()[rank]).sum().backward()
    finally:
        backend.reverse = original
        torch.compiler.reset()
    return reversed_blocks


def whole(gradient: Tensor | None) -> Tensor:
    """A gradient, gathered if it is sharded."""
    assert gradient is not None
    full: Tensor = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    return full


def wrap_ddp(model: nn.Module, **options: Any) -> nn.Module:
    return nn.parallel.DistributedDataParallel(re2fx.transform(model), **options)


def wrap_fsdp(model: nn.Module, level: str) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    rev = re2fx.transform(model)
    mesh = dist.device_mesh.init_device_mesh("cpu", (RANKS,))
    if level == "leaf":
        for module in list(rev.modules()):
            if isinstance(module, (nn.Linear, nn.LayerNorm)):
                fully_shard(module, mesh=mesh)
    fully_shard(rev, mesh=mesh)
    return rev


def wrap_compiled(
    model: nn.Module, rewire: bool, optimize: bool, scope: str = "graph"
) -> nn.Module:
    """Compiled around DistributedDataParallel, whose buckets hold about one block each.

    Args:
        model: the given network.
        rewire: whether `re2fx.transform` rewires it before it is wrapped.
        optimize: whether Dynamo cuts the graph at the buckets, as it does by default.
        scope: what is compiled at once.
    """
    torch._dynamo.config.optimize_ddp = optimize
    setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 1)
    inner = re2fx.transform(model) if rewire else model
    wrapped = nn.parallel.DistributedDataParallel(inner, bucket_cap_mb=BUCKET)
    options: dict[str, Any] = {"compiler": "aot_eager", "scope": scope}
    compiled: Any = torch.compile(wrapped, backend="re2fx", options=options)
    return compiled


def wrap_around_compiled(model: nn.Module) -> nn.Module:
    """Compiled inside DistributedDataParallel, whose optimizer would cut it all the same."""
    torch._dynamo.config.optimize_ddp = False
    options: dict[str, Any] = {"compiler": "aot_eager"}
    inner: Any = torch.compile(model, backend="re2fx", options=options)
    return nn.parallel.DistributedDataParallel(inner, bucket_cap_mb=BUCKET)


WAYS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    "ddp": (wrap_ddp, {}),
    "ddp, find_unused_parameters": (wrap_ddp, {"find_unused_parameters": True}),
    "ddp, static_graph": (wrap_ddp, {"static_graph": True}),
    "fully_shard, root": (wrap_fsdp, {"level": "root"}),
    "fully_shard, leaves": (wrap_fsdp, {"level": "leaf"}),
    "compiled, one graph": (wrap_compiled, {"rewire": False, "optimize": False}),
    "compiled, rewired before, one graph": (wrap_compiled, {"rewire": True, "optimize": False}),
    "compiled, rewired before, in pieces": (wrap_compiled, {"rewire": True, "optimize": True}),
    "compiled by regions, rewired before, in pieces": (
        wrap_compiled,
        {"rewire": True, "optimize": True, "scope": "region"},
    ),
    "ddp of the compiled": (wrap_around_compiled, {}),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Rank 0's gradients for every way of wrapping, and what else was seen."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    out = folder / "gradients.pt"
    spawn(run_rank, (str(folder / "rendezvous"), str(out)), nprocs=RANKS)
    loaded: dict[str, Any] = torch.load(out)
    return loaded


@pytest.mark.parametrize("way", WAYS)
def test_gradients_equal_one_process(way: str, results: dict[str, Any]) -> None:
    reference = expected()
    assert results[way].keys() == reference.keys()
    for name, gradient in reference.items():
        torch.testing.assert_close(results[way][name], gradient, rtol=1e-10, atol=1e-12)


def test_a_chain_cut_at_the_buckets_is_refused(results: dict[str, Any]) -> None:
    message = results["cut"]
    assert message.startswith("ChainCutError: ")
    assert "models.py:" in message
    assert "DistributedDataParallel's bucket boundaries" in message
    assert "Set torch._dynamo.config.optimize_ddp = False" in message
    assert "torch.compile(re2fx.transform(model), backend='re2fx'), then wrap" in message


def test_a_rewired_chain_cut_at_the_buckets_is_reversed_piece_by_piece(
    results: dict[str, Any],
) -> None:
    blocks = results["pieces"]
    assert len(blocks) > 1
    assert sum(blocks) > 0
