"""Rows 5, 6 and 7 on real ranks over loopback, each against one process on the whole batch."""

from __future__ import annotations

import multiprocessing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ..models import Block
from ..ranks import Job, run_jobs
from ..sharding import checkpointed, die, expected, kept, replicated, sharded

# One worker, so that the ranks are started once.
pytestmark = pytest.mark.xdist_group("ranks")

FIND = {"find_unused_parameters": True}

# The first seven are the matrix that torch tests its own checkpoint with.
REPLICATED: dict[str, dict[str, Any]] = {
    "once": {"name": "once"},
    "twice": {"name": "twice"},
    "unused": {"name": "unused", **FIND},
    "dynamic, grows": {"name": "unused", "more": (False, True), **FIND},
    "dynamic, shrinks": {"name": "unused", "more": (True, False), **FIND},
    "dynamic, shared": {"name": "unused, shared", "more": (False, True), **FIND},
    "shared": {"name": "shared"},
    "static graph": {"name": "once", "static_graph": True},
    "static graph, twice": {"name": "twice", "static_graph": True},
    "static graph, shared": {"name": "shared", "static_graph": True},
    "static graph, unused": {"name": "unused", "static_graph": True},
    "find, nothing unused": {"name": "once", **FIND},
    "bucket views": {"name": "once", "gradient_as_bucket_view": True},
    "no_sync": {"name": "once", "accumulate": True},
    "no_sync, batch norm": {"name": "batch norm", "accumulate": True, "broadcast_buffers": False},
    "batch norm": {"name": "batch norm"},
    "exact": {"name": "once", "exact": True},
    "exact, shared, static graph": {"name": "shared", "exact": True, "static_graph": True},
    "compiled inside": {"name": "once", "compile": "inside"},
    "compiled inside, shared": {"name": "shared", "compile": "inside"},
    "compiled inside, no_sync": {"name": "once", "compile": "inside", "accumulate": True},
    "compiled around": {"name": "once", "compile": "around"},
    "compiled around, unused": {"name": "unused", "compile": "around", **FIND},
}

LEVELS = ("root", "unit", "leaf", "list")
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "not resharded": {"reshard_after_forward": False},
    "mixed precision": {"half": True},
    "compiled": {"compile": True},
}
SHARDED = {
    f"{level}, {kind}": {"level": level, **options}
    for level in LEVELS
    for kind, options in KINDS.items()
} | {"unit, shared": {"level": "unit", "name": "shared"}}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "block": ({"level": "block", "when": "after"}, "ShardingError: Net: blocks.3 was sharded"),
    "block, compiled": (
        {"level": "block", "when": "after", "compile": True},
        "ShardingError: Net: blocks.3 was sharded",
    ),
    "before, root": ({"level": "root", "when": "before"}, "ShardingError: FSDPNet: the model was"),
    "before, block": ({"level": "block", "when": "before"}, "ShardingError: FSDPNet: the model"),
    "before, leaf": ({"level": "leaf", "when": "before"}, "ShardingError: FSDPNet: the model was"),
    "before, list": ({"level": "list", "when": "before"}, "ShardingError: FSDPNet: the model was"),
    "given, block, compiled": (
        {"level": "block", "when": "given", "compile": True},
        "ChainCutError: FSDPNet: the residual",
    ),
}


def jobs(folder: Path, save: bool) -> dict[str, Job]:
    """Everything that the ranks of one group run."""
    made: dict[str, Job] = {
        f"ddp, {name}": partial(replicated, **options) for name, options in REPLICATED.items()
    }
    for name, options in SHARDED.items():
        made[f"fsdp, {name}"] = partial(sharded, when="after", **options)
        if "half" in options:
            made[f"fsdp, {name}, stored"] = partial(
                sharded, when="after", memory="store", **options
            )
    made |= {f"refused, {name}": partial(sharded, **what) for name, (what, _) in REFUSED.items()}
    for way in ("alone", "ddp", "fsdp"):
        for depth in (4, 12):
            made[f"kept, {way}, {depth}"] = partial(kept, depth=depth, way=way)
    made["checkpoint"] = partial(checkpointed, folder=str(folder), save=save)
    return made


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two ranks found."""
    folder: Path = tmp_path_factory.mktemp("two")
    return run_jobs(jobs(folder / "saved", save=True), 2, folder)


@pytest.fixture(scope="module")
def three(two: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What three ranks found, which load what two have saved."""
    folder: Path = tmp_path_factory.mktemp("three")
    saved = next(folder.parent.glob("two*")) / "saved"
    names = ("ddp, once", "ddp, unused", "ddp, shared", "ddp, no_sync", "ddp, batch norm")
    some = {name: job for name, job in jobs(saved, save=False).items() if name in names}
    some |= {
        name: job
        for name, job in jobs(saved, save=False).items()
        if name in ("checkpoint", "fsdp, unit, plain", "fsdp, root, plain")
    }
    return run_jobs(some, 3, folder)


def assert_equal(got: Any, reference: Any, tolerance: float = 1e-10) -> None:
    """All of the gradients, none of them missing."""
    assert not isinstance(got, str), got
    assert got.keys() == reference.keys()
    for name, gradient in reference.items():
        assert (got[name] is None) == (gradient is None), name
        if gradient is not None:
            error = (got[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
            assert error <= tolerance, f"{name}: {error:.2g}"


def reference(options: dict[str, Any], ranks: int) -> Any:
    """Of one process."""
    steps = 2 if options.get("accumulate") else 1
    more, exact = options.get("more", ())[-1:], options.get("exact", False)
    return expected(options.get("name", "once"), ranks, steps, more, exact)


EAGER = [name for name in REPLICATED if not name.startswith("compiled")]
COMPILED = [name for name in REPLICATED if name.startswith("compiled")]


@pytest.mark.situation(5, "eager")
@pytest.mark.parametrize("name", EAGER)
def test_replicated(name: str, two: list[dict[str, Any]]) -> None:
    """DistributedDataParallel on two ranks, gradients alike on both."""
    for found in two:
        assert_equal(found[f"ddp, {name}"], reference(REPLICATED[name], 2))


@pytest.mark.situation(5, "compiled")
@pytest.mark.parametrize("name", COMPILED)
def test_replicated_and_compiled(name: str, two: list[dict[str, Any]]) -> None:
    """Compiled inside and around."""
    for found in two:
        assert_equal(found[f"ddp, {name}"], reference(REPLICATED[name], 2))


@pytest.mark.situation(5, "eager")
@pytest.mark.parametrize("name", ["once", "unused", "shared", "no_sync", "batch norm"])
def test_replicated_on_three_ranks(name: str, three: list[dict[str, Any]]) -> None:
    """As on two."""
    for found in three:
        assert_equal(found[f"ddp, {name}"], reference(REPLICATED[name], 3))


@pytest.mark.situation(6, "eager")
@pytest.mark.parametrize("name", ["shared", "static graph, shared", "twice"])
def test_shared_parameters_on_ranks(name: str, two: list[dict[str, Any]]) -> None:
    """They are reduced once, when the last use has given its part."""
    assert_equal(two[0][f"ddp, {name}"], reference(REPLICATED[name], 2))


def check_sharded(name: str, found: dict[str, Any], ranks: int) -> None:
    """Gradients of the first step, and where two steps of the optimizer lead."""
    got = found[f"fsdp, {name}"]
    assert not isinstance(got, str), got
    if "mixed" in name:
        stored = found[f"fsdp, {name}, stored"]
        for key in ("gradients", "parameters"):
            assert_equal(got[key], stored[key], 2e-2)
        return
    assert_equal(got["gradients"], reference(SHARDED[name], ranks))


@pytest.mark.situation(7, "eager")
@pytest.mark.parametrize("name", [name for name in SHARDED if "compiled" not in name])
def test_sharded(name: str, two: list[dict[str, Any]]) -> None:
    """`fully_shard` of the root, of each block's modules, of leaves and of lists of them."""
    for found in two:
        check_sharded(name, found, 2)


@pytest.mark.situation(7, "compiled")
@pytest.mark.parametrize("name", [name for name in SHARDED if "compiled" in name])
def test_sharded_and_compiled(name: str, two: list[dict[str, Any]]) -> None:
    """The same below `torch.compile`."""
    check_sharded(name, two[0], 2)


@pytest.mark.situation(7, "eager")
@pytest.mark.parametrize("name", ["unit, plain", "root, plain"])
def test_sharded_on_three_ranks(name: str, three: list[dict[str, Any]]) -> None:
    """Sizes that three does not divide."""
    for found in three:
        check_sharded(name, found, 3)


def refuses(name: str, two: list[dict[str, Any]]) -> None:
    """The same words on both ranks, with the recipe."""
    for found in two:
        said = found[f"refused, {name}"]
        assert isinstance(said, str), "it was not refused"
        assert REFUSED[name][1] in said
        assert ("re2fx.shard_units(rev)" in said) or ("rewire first" in said)


@pytest.mark.situation(7, "eager", "raises")
@pytest.mark.parametrize("name", [name for name in REFUSED if "compiled" not in name])
def test_what_cannot_be_sharded(name: str, two: list[dict[str, Any]]) -> None:
    """Without `check_dissolved`: an error about mixed tensors; without `check_not_sharded`: other
    errors, or none.
    """
    refuses(name, two)


@pytest.mark.situation(7, "compiled", "raises")
@pytest.mark.parametrize("name", [name for name in REFUSED if "compiled" in name])
def test_what_cannot_be_sharded_and_compiled(name: str, two: list[dict[str, Any]]) -> None:
    """The hooks of a sharded block end Dynamo's graph."""
    refuses(name, two)


@pytest.mark.situation(5, "eager")
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_activation_bytes_of_each_rank(way: str, two: list[dict[str, Any]]) -> None:
    """Three times the depth keeps nothing more; in replicas, as much as on one process."""
    for found in two:
        shallow, deep = (found[f"kept, {way}, {depth}"] for depth in (4, 12))
        alone = found["kept, alone, 12"]
        unit = sum(p.numel() for p in Block(8).parameters()) * 8
        slack = unit if way == "fsdp" else 0  # gathered ahead of time
        assert abs(shallow["reversible"] - deep["reversible"]) <= slack
        assert way == "fsdp" or deep == alone
        assert deep["store"] > 2 * shallow["store"]


@pytest.mark.situation(7, "eager")
@pytest.mark.parametrize("ranks", [2, 3])
def test_distributed_checkpoints(ranks: int, two: Any, three: Any) -> None:
    """Saved by two ranks, loaded by two and by three, into the rewired and the original model."""
    saved = two[0]["checkpoint"]
    for found in two if ranks == 2 else three:
        got = found["checkpoint"]
        assert not isinstance(got, str), got
        assert_equal(got["rewired"], saved["rewired"], 0.0)
        assert_equal(got["original"], saved["rewired"], 0.0)
        assert_equal(got["original, optimizer"], saved["rewired, optimizer"], 0.0)


@pytest.mark.situation(5, "eager")
def test_a_killed_rank_ends_the_run(tmp_path: Path) -> None:
    """The other one does not wait for it for ever."""
    context = multiprocessing.get_context("spawn")
    ranks = [
        context.Process(target=die, args=(rank, 2, str(tmp_path / "rendezvous")))
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    try:
        for process in ranks:
            process.join(60)
        assert ranks[1].exitcode == -9
        assert ranks[0].exitcode not in (None, 0)
    finally:
        for process in ranks:
            process.kill()
