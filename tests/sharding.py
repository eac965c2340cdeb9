"""What the ranks of the tests of distributed training run."""

from __future__ import annotations

import datetime
import importlib
import os
import signal
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import re2fx
from re2fx.memory import live_bytes

from .models import Block, ConvNet, Net
from .ranks import whole

Gradients = dict[str, "Tensor | None"]


def fill(model: nn.Module) -> nn.Module:
    """Parameters in fp64 that are the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            mean = 1.0 if p.dim() == 1 and name.endswith("weight") else 0.0
            p.copy_(mean + 0.3 * torch.randn(p.shape, generator=generator))
    return model.double()


def data(ranks: int, *shape: int) -> Tensor:
    """One batch for each rank."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(ranks, *shape, generator=generator, dtype=torch.float64)


class Extra(Net):
    """Has a parameter that nothing reads, and a branch that only some iterations run."""

    def __init__(self) -> None:
        super().__init__(depth=4)
        self.unused = nn.Linear(4, 4)
        self.optional = nn.Linear(8, 8)

    def forward(self, x: Tensor, more: bool = False) -> Tensor:
        x = self.blocks(self.stem(x))
        if more:
            x = x + self.optional(x)
        out: Tensor = self.head(x)
        return out


class ExtraShared(Extra):
    """The same with one first layer for all blocks."""

    def __init__(self) -> None:
        super().__init__()
        blocks: Any = self.blocks
        for block in blocks[1:]:
            block.inner.weight = blocks[0].inner.weight


class Shared(nn.Module):
    """One block four times, and the weight of the stem again in the head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Linear(4, 8), Block(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(4):
            x = self.block(x)
        return x @ self.stem.weight


class Twice(Net):
    """Runs its blocks twice."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(self.blocks(self.stem(x))))
        return out


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "once": (Net, (6, 4)),
    "twice": (Twice, (6, 4)),
    "unused": (Extra, (6, 4)),
    "unused, shared": (ExtraShared, (6, 4)),
    "shared": (Shared, (6, 4)),
    "batch norm": (ConvNet, (4, 3, 6, 6)),
}


def make(name: str) -> nn.Module:
    """A model by name."""
    return fill(MODELS[name][0]())


def batches(name: str, ranks: int) -> Tensor:
    """Its inputs."""
    return data(ranks, *MODELS[name][1])


def gradients(model: nn.Module) -> Gradients:
    """By name, gathered."""
    return {name: whole(p.grad) for name, p in model.named_parameters()}


EXACT: dict[str, Any] = {"exact": True, "coupling": re2fx.Coupling.consistent(0.25)}


def expected(
    name: str, ranks: int, steps: int = 1, more: tuple[bool, ...] = (), exact: bool = False
) -> Gradients:
    """One process, stored: the mean over the ranks' batches."""
    total: Gradients = {}
    for batch in batches(name, ranks):
        rev = re2fx.transform(make(name), memory="store", **(EXACT if exact else {}))
        for step in range(steps):
            extra = (more[step],) if more else ()
            rev(batch, *extra).square().sum().backward()
        for key, p in rev.named_parameters():
            if p.grad is not None:
                before = total.get(key)
                total[key] = p.grad / ranks + (before if before is not None else 0)
            total.setdefault(key, None)
    return total


def replicated(
    rank: int,
    ranks: int,
    *,
    name: str,
    accumulate: bool = False,
    more: tuple[bool, ...] = (),
    compile: str = "",
    steps: int = 2,
    exact: bool = False,
    **options: Any,
) -> Gradients:
    """DistributedDataParallel; gradients of the last step, or of all of them accumulated."""
    model, batch = make(name), batches(name, ranks)[rank]
    module: Any = re2fx.transform(model, **(EXACT if exact else {}))
    if compile == "inside":
        module = torch.compile(module, backend="re2fx", options={"compiler": "aot_eager"})
    module = wrapped = nn.parallel.DistributedDataParallel(module, **options)
    if compile == "around":
        module = torch.compile(module, backend="re2fx", options={"compiler": "aot_eager"})
    for step in range(steps):  # static_graph and buckets are rebuilt after the first
        if not accumulate:
            model.zero_grad()
        silent = accumulate and step < steps - 1
        with wrapped.no_sync() if silent else nullcontext():
            module(batch, *((more[step],) if more else ())).square().sum().backward()
    return gradients(model)


def shard(model: Any, level: str, **options: Any) -> None:
    """`fully_shard` at a level of the given model's modules."""
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    leaves: list[nn.Module] = [
        m for m in model.modules() if isinstance(m, (nn.Linear, nn.LayerNorm))
    ]
    if level == "block":
        for module in list(model.modules()):
            if isinstance(module, Block):
                fully_shard(module, mesh=mesh, **options)
    elif level == "unit":
        for unit in re2fx.shard_units(model):
            fully_shard(unit, mesh=mesh, **options)
    elif level == "leaf":
        for module in leaves:
            fully_shard(module, mesh=mesh, **options)
    elif level == "list":
        for index in range(0, len(leaves), 3):
            fully_shard(leaves[index : index + 3], mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)


def sharded(
    rank: int,
    ranks: int,
    *,
    level: str,
    when: str,
    memory: str = "reversible",
    compile: bool = False,
    half: bool = False,
    name: str = "once",
    **options: Any,
) -> dict[str, Any]:
    """`fully_shard` before or after the transform; two steps of an optimizer."""
    if half:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        options["mp_policy"] = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32
        )
    model, batch = make(name), batches(name, ranks)[rank]
    if half:
        model, batch = model.float(), batch.float()
    rev: Any = model
    if when == "given":
        shard(model, level, **options)
    elif when == "before":
        shard(model, level, **options)
        rev = re2fx.transform(model, memory=memory)
    else:
        rev = re2fx.transform(model, memory=memory)
        shard(rev, level, **options)
    run = torch.compile(rev, backend="re2fx", options={"compiler": "aot_eager"}) if compile else rev
    optimizer = torch.optim.SGD(rev.parameters(), lr=1e-2)
    found: dict[str, Any] = {}
    for _ in range(2):
        optimizer.zero_grad()
        run(batch).square().sum().backward()
        found.setdefault("gradients", gradients(rev))
        optimizer.step()
    return found | {"parameters": {n: whole(p) for n, p in rev.named_parameters()}}


def kept(rank: int, ranks: int, *, depth: int, way: str) -> dict[str, int]:
    """Bytes that a forward keeps for its backward, in each way of training."""
    found = {}
    for memory in ("store", "reversible"):
        rev: Any = re2fx.transform(fill(Net(depth)), memory=memory)
        run = rev
        if way == "ddp":
            run = nn.parallel.DistributedDataParallel(rev)
        elif way == "fsdp":
            shard(rev, "unit")
        batch = data(ranks, 16, 4)[rank]
        for _ in range(3):  # whatever is made once, such as buckets
            run(batch).square().sum().backward()
        found[memory] = live_bytes(lambda run=run, batch=batch: run(batch))  # type: ignore[misc]
    return found


def checkpointed(rank: int, ranks: int, *, folder: str, save: bool) -> dict[str, Any]:
    """`torch.distributed.checkpoint` of a rewired model and its optimizer, to and fro.

    Returns:
        the parameters after loading them into a rewired and into an original model, and the state
        of the optimizer.
    """
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    dcp: Any = importlib.import_module("torch.distributed.checkpoint")

    batch = batches("once", ranks)[rank]

    def made(rewire: bool, train: bool) -> tuple[Any, torch.optim.Optimizer]:
        model: Any = fill(Net(4)) if train else Net(4).double()
        if rewire:
            model = re2fx.transform(model)
            shard(model, "unit")
        else:
            shard(model, "block")
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        if train:
            model(batch).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model, optimizer

    if save:
        trained, optimizer = made(rewire=True, train=True)
        states = get_state_dict(trained, optimizer)
        dcp.save({"model": states[0], "optimizer": states[1]}, checkpoint_id=folder)
    results: dict[str, Any] = {}
    for name, rewire in (("rewired", True), ("original", False)):
        model, optimizer = made(rewire, train=False)
        parts: Any = dict(
            zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True)
        )
        dcp.load(parts, checkpoint_id=folder)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=parts["model"],
            optim_state_dict=parts["optimizer"],
        )
        moments: Any = get_state_dict(model, optimizer)[1]["state"]
        results[name] = {n: whole(p) for n, p in model.named_parameters()}
        results[f"{name}, optimizer"] = {n: whole(m["exp_avg"]) for n, m in moments.items()}
    return results


def die(rank: int, ranks: int, rendezvous: str) -> None:
    """Rank 1 is killed in the backward of its second step."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=20),
    )
    module = nn.parallel.DistributedDataParallel(re2fx.transform(make("once")))
    for step in range(3):
        loss = module(batches("once", ranks)[rank]).square().sum()
        if rank == 1 and step == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        loss.backward()
