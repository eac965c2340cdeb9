"""What fixed-point streams give and cost: ``python -m benchmarks.exactness``.

    bits       a ViT of 96 residuals with dropout, trained on digits for 200 steps: elements of the
               reconstructed states and of the gradients that differ from stored execution
    truth      gradients under bf16 autocast against stored execution in fp64, 12 to 96 residuals,
               freshly initialised and after 300 steps, mean over 32 batches: plain, float
               reversible, exact reversible
    times      a step over the float reversible one, eager and compiled by regions

Every row is written when it is known, and a second run goes on with the missing ones.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import re2fx
from re2fx.memory import live_bytes
from re2fx.program import calls_made_by
from re2fx.runtime import ChainCall, Reverse

from .common import (
    RESULTS,
    advancer,
    median_ratio,
    paired_times,
    progress,
    target,
    write_results,
)
from .contenders import training_step, vit
from .demo import Digits, digits_vit

BITS = range(4)
DEEP, STEPS, BATCH = 48, 200, 32
TRUTH_BLOCKS, TRUTH_STEPS = (6, 12, 24, 48), 300
TRUTH_BATCHES = 32  # errors are averaged over; two networks differ by half in one, by 10 % in 8
TRUTH_COUPLINGS = {"re2tal": 0, "consistent(1/2)": 1}
ROUNDS = 9

Row = dict[str, Any]
Job = tuple[str, Callable[[], Row]]


def coupling(bits: int) -> re2fx.Coupling:
    """Of which a step loses so many bits."""
    return re2fx.Coupling.consistent(2.0**-bits) if bits else re2fx.Coupling.re2tal()


def autocast(mixed: bool) -> AbstractContextManager[Any]:
    """bf16, or nothing."""
    return torch.autocast("cpu", torch.bfloat16) if mixed else nullcontext()


def train(model: nn.Module, data: Digits, steps: int, mixed: bool) -> None:
    """AdamW on random batches."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(data.images), (BATCH,))
        with autocast(mixed):
            loss = cross_entropy(model(data.images[chosen]), data.labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def gradients(
    model: nn.Module, data: Digits, mixed: bool, dtype: torch.dtype, batch: int = 0
) -> list[Tensor]:
    """Of the loss on one of the batches, with fixed dropout masks."""
    chosen = slice(batch * BATCH, (batch + 1) * BATCH)
    model.zero_grad()
    torch.manual_seed(1)
    with autocast(mixed):
        loss = cross_entropy(model(data.images[chosen].to(dtype)), data.labels[chosen])
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


# To the bit


class Witness(ChainCall):
    """Keeps the states of its chain and counts what the reconstruction gets wrong."""

    wrong = 0
    seen = 0

    def block(self, frame: Reverse, sides: Any) -> Tensor:
        """As usual."""
        states = self.__dict__.setdefault("_true", {})
        states[len(self.records)] = self.streams[0].detach()
        return super().block(frame, sides)

    def leave(self) -> None:
        """Compare."""
        super().leave()
        true = self.__dict__.pop("_true")
        for place, state in self.reconstructed():
            whole = [t.view(torch.int32) for t in (state, true[place])]
            Witness.wrong += int((whole[0] != whole[1]).sum())
            Witness.seen += state.numel()


def count_bits(bits: int, mixed: bool, exact: bool, steps: int, blocks: int) -> Row:
    """Train, then compare one step with stored execution."""
    data = Digits.load()
    model = digits_vit(blocks)
    rev: Any = re2fx.transform(model, exact=exact, coupling=coupling(bits))
    train(rev, data, steps, mixed)
    found = {}
    for memory in ("store", "reversible"):
        rev.memory = memory
        found[memory] = gradients(rev, data, mixed, torch.float32)
    Witness.wrong = Witness.seen = 0
    torch.manual_seed(1)
    make = lambda chain, root, *starts: Witness(root, *starts)  # noqa: E731
    with autocast(mixed), calls_made_by(make):
        rev(data.images[:BATCH])
    pairs = list(zip(found["reversible"], found["store"], strict=True))
    return {
        "bits": bits, "mixed": mixed, "exact": exact, "residuals": 2 * blocks, "steps": steps,
        "states": Witness.seen, "wrong_states": Witness.wrong,
        "gradients": sum(g.numel() for _, g in pairs),
        "wrong_gradients": sum(int((a != b).sum()) for a, b in pairs),
        "gradient_error": relative(found["reversible"], found["store"]),
        "bytes_per_element": side_bytes(bits) if exact else 0.0,
    }  # fmt: skip


def side_bytes(bits: int) -> float:
    """Measured bytes that one more block keeps for each element of its stream."""
    kept = {}
    images = torch.randn(8, 3, 64, 64)
    for blocks in (4, 8):
        model = vit(blocks, img_size=64, embed_dim=64, num_heads=4, num_classes=10)
        rev = re2fx.transform(model, exact=True, coupling=coupling(bits))
        kept[blocks] = live_bytes(lambda rev=rev: rev(images))  # type: ignore[misc]
    return (kept[8] - kept[4]) / (2 * 4 * 8 * 17 * 64)


def relative(got: list[Tensor], reference: list[Tensor]) -> float:
    """Norm of the difference over norm, all parameters together."""
    pairs = [(a.double(), b.double()) for a, b in zip(got, reference, strict=True)]
    difference = sum(float((a - b).square().sum()) for a, b in pairs)
    norm = sum(float(b.square().sum()) for _, b in pairs)
    return float((difference / norm) ** 0.5)


# Against the truth


def truth(blocks: int, name: str, steps: int) -> Row:
    """Errors of three ways of training under autocast, against stored execution in fp64."""
    data, bits = Digits.load(), TRUTH_COUPLINGS[name]
    model = digits_vit(blocks)
    stored: Any = re2fx.transform(model, memory="store", coupling=coupling(bits))
    if steps:
        train(stored, data, steps, mixed=True)
    wide: Any = re2fx.transform(
        copy.deepcopy(model).double(), memory="store", coupling=coupling(bits)
    )
    # Dropout masks are drawn in the dtype of what they mask: without them, both are one network.
    for module in (*model.modules(), *wide.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    references = [gradients(wide, data, False, torch.float64, n) for n in range(TRUTH_BATCHES)]
    row: Row = {
        "residuals": 2 * blocks, "coupling": name, "steps": steps, "batches": TRUTH_BATCHES,
    }  # fmt: skip
    for way in ("plain", "float reversible", "exact reversible"):
        row[way] = None
        try:
            rev = run(way, model, coupling(bits), stored)
            row[way] = fmean(
                relative(gradients(rev, data, True, torch.float32, number), reference)
                for number, reference in enumerate(references)
            )
        except re2fx.ConditioningError:
            continue
    return row


def run(way: str, model: nn.Module, used: re2fx.Coupling, stored: nn.Module) -> nn.Module:
    """The network in one of the ways of training it."""
    if way == "plain":
        return stored
    return re2fx.transform(model, exact=way == "exact reversible", coupling=used)


# Step time


def times(scope: str, mixed: bool, layers: int, rounds: int) -> Row:
    """A step with fixed-point streams over one with streams in fp32; a ViT-S on four images."""
    torch.manual_seed(0)
    model = vit(layers, embed_dim=384, num_heads=6)
    images = torch.randn(4, 3, 224, 224)
    steps = {}
    for name, exact, bits in (("float", False, 0), *((f"{j} bits", True, j) for j in BITS)):
        rev: Any = re2fx.transform(model, exact=exact, coupling=coupling(bits))
        if scope == "region":
            settings: dict[str, Any] = {"options": {"scope": "region"}, "isolate_recompiles": True}
            rev = torch.compile(rev, backend="re2fx", **settings)
        step = training_step(rev, images)

        def mixed_step(step: Callable[[], None] = step) -> None:
            with autocast(mixed):
                step()

        steps[name] = mixed_step
    seconds = paired_times(steps, rounds)
    ratios = {name: round(median_ratio(seconds, name, "float"), 4) for name in steps}
    return {
        "scope": scope, "mixed": mixed, "layers": layers, "seconds": seconds, "ratios": ratios,
    }  # fmt: skip


def jobs(quick: bool) -> Iterator[Job]:
    """Everything, by a name that says what it is."""
    deep, steps = (4, 5) if quick else (DEEP, STEPS)
    for scope in ("eager", "region"):
        for mixed in (False, True):
            layers, rounds = (2, 2) if quick else (12, ROUNDS)
            yield f"times {scope} {mixed}", partial(times, scope, mixed, layers, rounds)
    for bits in BITS:
        for mixed in (False, True):
            yield f"bits {bits} {mixed}", partial(count_bits, bits, mixed, True, steps, deep)
    yield "bits float", partial(count_bits, 0, True, False, steps, deep)
    for blocks in (2, 4) if quick else TRUTH_BLOCKS:
        for name in TRUTH_COUPLINGS:
            for number in (0, 5 if quick else TRUTH_STEPS):
                yield f"truth {blocks} {name} {number}", partial(truth, blocks, name, number)


def holds(row: Row) -> bool:
    """Whether a row was measured as it would be now."""
    return "plain" not in row or row.get("batches") == TRUTH_BATCHES


def targets(rows: dict[str, Row]) -> list[dict[str, Any]]:
    """The limits that were set beforehand."""
    found = []
    exact = [row for row in rows.values() if row.get("exact")]
    for key in ("wrong_states", "wrong_gradients"):
        claim = f"{key.replace('_', ' ')} at {max(row['residuals'] for row in exact)} residuals"
        found.append(target(claim, sum(row[key] for row in exact), 0))
    for row in exact:
        if row["bits"] and not row["mixed"]:
            share = row["bytes_per_element"] / (row["bits"] / 8)
            found.append(target(f"side bits, kept / {row['bits']}/8 bytes", share, 1.02))
    for scope, limit in (("eager", 1.3), ("region", 1.1)):
        of = [row for row in rows.values() if row.get("scope") == scope]
        worst = max(value for row in of for value in row["ratios"].values())
        found.append(target(f"step time, exact / float reversible, {scope}", worst, limit))
    trained = [row for row in rows.values() if row.get("plain") and row["steps"]]
    worst = max(row["exact reversible"] / row["plain"] for row in trained)
    claim = f"gradient error after {trained[0]['steps']} steps of bf16 autocast, exact / plain"
    return [*found, target(claim, worst, 1.05)]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, nothing is written")
    parser.add_argument("--fresh", action="store_true", help="forget the runs before")
    parser.add_argument("--only", default="", help="rows whose name begins so")
    options = parser.parse_args()
    path = RESULTS / "exactness.json"
    rows: dict[str, Row] = {}
    if path.exists() and not (options.fresh or options.quick):
        rows = {k: v for k, v in json.loads(path.read_text())["rows"].items() if holds(v)}
    wanted = [(name, job) for name, job in jobs(options.quick) if name.startswith(options.only)]
    with progress() as bar:
        advance = advancer(bar, "rows", len(wanted))
        for name, job in wanted:
            if name not in rows:
                rows[name] = job()
                if options.quick:
                    print(name, rows[name])
                else:
                    write_results("exactness", {"rows": rows, "targets": []})
            advance()
    if len(rows) == len(list(jobs(options.quick))) and not options.quick:
        write_results("exactness", {"rows": rows, "targets": targets(rows)})


if __name__ == "__main__":
    main()
