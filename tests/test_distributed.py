"""Two real ranks over loopback: the mean of both ranks' gradients, as on one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

import re2fx

from .models import Net

RANKS = 2


def data() -> Tensor:
    return torch.randn(RANKS, 6, 4, generator=torch.Generator().manual_seed(1)).double()


def network() -> nn.Module:
    torch.manual_seed(0)
    return Net(depth=6).double()


def expected() -> dict[str, Tensor]:
    """Gradients of the stored network on the whole batch."""
    rev = re2fx.transform(network(), memory="store")
    sum(rev(x).square().sum() for x in data()).backward()
    return {n: p.grad / RANKS for n, p in rev.named_parameters() if p.grad is not None}


def run_rank(rank: int, rendezvous: str, out: str) -> None:
    """One rank: every way of wrapping, two steps each; rank 0 saves the gradients."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=RANKS)
    results = {}
    try:
        for name, (wrap, options) in WAYS.items():
            rev = re2fx.transform(network())
            module = wrap(rev, **options)
            for _ in range(2):  # static_graph rebuilds after the first step
                module.zero_grad()
                module(data()[rank]).square().sum().backward()
            results[name] = {n: whole(p.grad) for n, p in rev.named_parameters()}
        if rank == 0:
            torch.save(results, out)
    finally:
        dist.destroy_process_group()


def whole(gradient: Tensor | None) -> Tensor:
    """A gradient, gathered if it is sharded."""
    assert gradient is not None
    full: Tensor = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    return full


def wrap_ddp(rev: nn.Module, **options: Any) -> nn.Module:
    return nn.parallel.DistributedDataParallel(rev, **options)


def wrap_fsdp(rev: nn.Module, level: str) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (RANKS,))
    if level == "leaf":
        for module in list(rev.modules()):
            if isinstance(module, (nn.Linear, nn.LayerNorm)):
                fully_shard(module, mesh=mesh)
    fully_shard(rev, mesh=mesh)
    return rev


WAYS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    "ddp": (wrap_ddp, {}),
    "ddp, find_unused_parameters": (wrap_ddp, {"find_unused_parameters": True}),
    "ddp, static_graph": (wrap_ddp, {"static_graph": True}),
    "fully_shard, root": (wrap_fsdp, {"level": "root"}),
    "fully_shard, leaves": (wrap_fsdp, {"level": "leaf"}),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """Rank 0's gradients for every way of wrapping."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    out = folder / "gradients.pt"
    spawn(run_rank, (str(folder / "rendezvous"), str(out)), nprocs=RANKS)
    loaded: dict[str, dict[str, Tensor]] = torch.load(out)
    return loaded


@pytest.mark.parametrize("way", WAYS)
def test_gradients_equal_one_process(way: str, results: dict[str, dict[str, Tensor]]) -> None:
    reference = expected()
    assert results[way].keys() == reference.keys()
    for name, gradient in reference.items():
        torch.testing.assert_close(results[way][name], gradient, rtol=1e-10, atol=1e-12)
