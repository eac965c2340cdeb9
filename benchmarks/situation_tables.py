"""The README's table of situations."""

from __future__ import annotations

from typing import Any

from .tables import Data, machine, table

NAMES = {
    1: "batch norm and other buffers that a forward moves",
    2: "dropout, stochastic depth, noise",
    3: "autocast, the backward outside of it",
    4: "drift in bf16 and fp16",
    5: "DistributedDataParallel, two and three ranks",
    6: "shared weights, a block used twice",
    7: "`fully_shard`, two and three ranks",
    8: "frozen backbone, adapters before and after",
    9: "no_grad, inference_mode, training in eval mode",
    10: "in-place operations",
    11: "tensors of the caller",
    12: "unused outputs, auxiliary heads, part of the graph",
    13: "taps, hooks that keep a hidden state",
    14: "several forwards and backwards, accumulation",
    15: "double backward",
    16: "hooks, parametrized weights",
    17: "`torch.func`",
    18: "`torch.compile`, graph breaks, other backends",
    19: "compiled rerun against compiled forward",
    20: "CUDA graphs, `reduce-overhead`",
    21: "dynamic shapes",
    22: "nested, optional and dataclass inputs and outputs",
    23: "state dicts, copies, pickles, `.to()`",
    24: "channels_last, strided streams",
    25: "models where reversing does not pay",
    26: "branches that are not deterministic",
    27: "discrete choices that rounding can turn",
    28: "anomaly mode, profiler, saved-tensor hooks",
    29: "errors inside a branch",
    30: "threads",
    31: "integer, complex, half and quantised",
    32: "empty and single batches",
    33: "models that cannot be traced",
    34: "nothing to rewire",
    35: "bad arguments",
}


def cell(found: dict[str, Any]) -> str:
    """Outcomes and the number of tests."""
    if found["failed"]:
        return f"**{found['failed']} failed**"
    if not found["passed"]:
        return "needs a GPU" if found["skipped"] else ""
    return f"{' / '.join(found['outcomes'])} ({found['passed']})"


def text_fuzz(data: Data) -> str:
    """How many random programs were tried, and what became of them."""
    verdicts, precisions = (
        ", ".join(f"{name} {number:,}" for name, number in sorted(data[key].items()))
        for key in ("verdicts", "precisions")
    )
    return (
        f"{data['tried']:,} random programs in random situations, {data['executors']['eager']:,} "
        f"in the eager executor and {data['executors'].get('compiled', 0):,} compiled: "
        f"**{len(data['found'])} disagreements** ({verdicts}; lowest precision: {precisions}). "
        f"Found on the way and mended, here or in the fuzzer: {len(data['mended'])}."
        f"\n\n{machine(data)}"
    )


def text_situations(data: Data) -> str:
    """A row for each situation: what happens in each executor, and the number of tests."""
    rows = [
        (
            f"{row['row']}. {NAMES[row['row']]}",
            cell(row["eager"]),
            cell(row["compiled"]),
            str(row["proven"] or ""),
        )
        for row in data["rows"]
    ]
    head = ("situation", "eager", "compiled", "shown to fail")
    unnoticed = f", {len(data['unnoticed'])} of them unnoticed" if data["unnoticed"] else ""
    return (
        f"{table(head, rows)}\n\n{data['tests']} tests, {len(data['failed'])} failed. The last "
        "column counts tests that were run again with the code replaced that they need "
        f"({data['replaced']} in all{unnoticed}).\n\n{machine(data)}"
    )
