"""What a second stream could spare: a block's rerun beside the gradient of the block behind it.

``python -m benchmarks.overlap`` runs both, one after the other and side by side, launched while the
device is kept waiting so that no launch stands between them. What side by side takes less is all
that recomputing on another stream (PaReprop, https://arxiv.org/abs/2306.09342) can spare of a
reversible step, which runs every block forward twice and backward once. Without CUDA the exit
status is 2.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from .common import progress, write_results
from .torchvision_shim import ensure_torchvision

ROUNDS, WARMUP = 11, 3
WAITING = 25_000_000  # cycles
BATCHES = (1, 4, 16)

Run = Callable[[], Any]


@dataclass(frozen=True)
class Subject:
    """A block and its input.

    Attributes:
        words: in the table.
        build: makes the block.
        shape: of the input, but for the batch.
    """

    words: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]


def subjects() -> list[Subject]:
    """Blocks of ViT-B, ViT-L and Video Swin-T's first stage."""
    ensure_torchvision()
    from torchvision.models.swin_transformer import SwinTransformerBlock
    from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d
    from torchvision.models.vision_transformer import EncoderBlock

    swin = partial(
        SwinTransformerBlock, 96, 3, [8, 7, 7], [0, 0, 0], attn_layer=ShiftedWindowAttention3d
    )
    return [
        Subject("ViT-B block, 197 tokens", partial(EncoderBlock, 12, 768, 3072, 0, 0), (197, 768)),
        Subject(
            "ViT-L block, 197 tokens", partial(EncoderBlock, 16, 1024, 4096, 0, 0), (197, 1024)
        ),
        Subject("Video Swin-T block, 16 x 56 x 56", swin, (16, 56, 56, 96)),
    ]


class Pair:
    """One block to differentiate, another to run again.

    Args:
        subject: both of them.
        batch: of their inputs.
    """

    def __init__(self, subject: Subject, batch: int) -> None:
        self.behind, self.before = (subject.build().cuda().train() for _ in range(2))
        size = (batch, *subject.shape)
        self.x, self.y = (torch.randn(size, device="cuda").requires_grad_() for _ in range(2))
        self.side = torch.cuda.Stream()
        self.gradient = torch.randn(size, device="cuda")
        self.out = self.again(self.behind, self.x)

    def again(self, block: nn.Module, x: Tensor) -> Tensor:
        """A block's forward, with what its backward needs."""
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            result: Tensor = block(x)
        return result

    def backward(self) -> Any:
        """Of the block behind."""
        wanted = [self.x, *self.behind.parameters()]
        return torch.autograd.grad(self.out, wanted, self.gradient, retain_graph=True)

    def in_turn(self) -> Any:
        """One after the other."""
        return self.backward(), self.again(self.before, self.y)

    def beside(self) -> Any:
        """The rerun on a stream of its own."""
        now = torch.cuda.current_stream()
        self.side.wait_stream(now)
        with torch.cuda.stream(self.side):
            again = self.again(self.before, self.y)
        found = self.backward()
        now.wait_stream(self.side)
        return found, again

    def forward(self) -> Any:
        """The rerun alone."""
        return self.again(self.before, self.y)


def seconds(run: Run) -> float:
    """That the device takes; everything is launched while it is kept waiting."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(WAITING)
    begin.record()
    held = run()
    end.record()
    end.synchronize()
    del held
    return float(begin.elapsed_time(end)) / 1e3


def measured(subject: Subject, batch: int) -> dict[str, Any]:
    """Median times, and the share of a reversible step that the second stream spares."""
    torch.manual_seed(0)
    pair = Pair(subject, batch)
    taken: dict[str, list[float]] = {name: [] for name in ("forward", "in_turn", "beside")}
    for index in range(WARMUP + ROUNDS):
        for name, times in taken.items():
            found = seconds(getattr(pair, name))
            times += [found] if index >= WARMUP else []
    middle = {name: median(times) for name, times in taken.items()}
    step = middle["forward"] + middle["in_turn"]  # forward, forward again, backward
    return {
        "block": subject.words,
        "batch": batch,
        "seconds": {name: round(value, 7) for name, value in middle.items()},
        "spared": round((middle["in_turn"] - middle["beside"]) / step, 4),
    }


def main() -> None:
    """Command line."""
    if not torch.cuda.is_available():
        print("benchmarks.overlap needs a CUDA device, and there is none", file=sys.stderr)
        sys.exit(2)
    rows = []
    with progress() as bar:
        task = bar.add_task("overlap", total=len(subjects()) * len(BATCHES))
        for subject in subjects():
            for batch in BATCHES:
                rows.append(measured(subject, batch))
                gc.collect()
                torch.cuda.empty_cache()
                bar.advance(task)
    properties = torch.cuda.get_device_properties(0)
    found = {"rounds": ROUNDS, "card": properties.name, "cuda": torch.version.cuda, "rows": rows}
    write_results("overlap", found)
    for row in rows:
        print(f"{row['block']}, batch {row['batch']}: {row['seconds']}, spared {row['spared']:.1%}")


if __name__ == "__main__":
    main()
