"""What each kind of frame takes off the highest memory of a step: ``python -m benchmarks.frames``.

Networks of torchvision and transformers at their usual sizes, fp32, one training step, random
weights. Of each the highest memory above parameters, their gradients and inputs,

- predicted on fake tensors: plain, with ``torch.utils.checkpoint`` around every rewired branch, and
  rewired with one kind of frame more each time: chains reversed, the rest checkpointed, branches
  in slices, the largest frames brought back part by part (``memory="lowest"``)
- measured by `re2fx.peak`, and the seconds of a step in rounds, where the plain step fits the
  machine: plain, planned to half of what the checkpoints take, and lowest

GPT-2 has a vocabulary of 4,096 besides its own: the dense gradient of 50,257 word vectors is larger
than all that its blocks need, in plain training too.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import re2fx
from re2fx.foresight import total
from re2fx.frames import Frames
from re2fx.memory_plan import weigh

from .common import RESULTS, advancer, progress, read_results, write_results
from .frames_tables import HALF
from .torchvision_shim import ensure_torchvision

ROUNDS = 3
FITS = 8 * 2**30  # bytes of a plain step, up to which it is run


@dataclass(frozen=True)
class Subject:
    """A network and its input."""

    words: str
    make: Callable[[], tuple[nn.Module, Tensor]]


def vision(name: str, *shape: int, **options: Any) -> tuple[nn.Module, Tensor]:
    """A network of torchvision."""
    ensure_torchvision()
    import torchvision

    models = torchvision.models
    found = getattr(models, name, None) or getattr(models.video, name)
    return found(**options), torch.randn(*shape)


def deep_vit() -> tuple[nn.Module, Tensor]:
    """ViT-B with 24 layers."""
    size = {"image_size": 224, "patch_size": 16, "hidden_dim": 768, "mlp_dim": 3072}
    return vision("VisionTransformer", 8, 3, 224, 224, num_layers=24, num_heads=12, **size)


class Words(nn.Module):
    """GPT-2 without logits: the loss is of the last hidden state."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        ensure_torchvision()  # which transformers imports
        from transformers import GPT2Config, GPT2Model

        drops = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        ends = {"bos_token_id": 0, "eos_token_id": 0}
        self.body = GPT2Model(GPT2Config(vocab_size=vocabulary, **drops, **ends))

    def forward(self, words: Tensor) -> Tensor:
        """Hidden states of ``(batch, tokens)``."""
        found: Tensor = self.body(words, use_cache=False).last_hidden_state
        return found


def gpt2(vocabulary: int) -> tuple[nn.Module, Tensor]:
    """Twelve layers on 1,024 tokens."""
    return Words(vocabulary), torch.randint(vocabulary, (1, 1024))


CLIP, IMAGES = (1, 3, 32, 224, 224), (8, 3, 224, 224)
SUBJECTS = {
    "swin3d_t": Subject("swin3d_t, 1x3x32x224x224", lambda: vision("swin3d_t", *CLIP)),
    "swin3d_b": Subject("swin3d_b, 1x3x32x224x224", lambda: vision("swin3d_b", *CLIP)),
    "resnet50": Subject("resnet50, 8x3x224x224", lambda: vision("resnet50", *IMAGES)),
    "resnet152": Subject("resnet152, 8x3x224x224", lambda: vision("resnet152", *IMAGES)),
    "vit_b_16": Subject("vit_b_16, 8x3x224x224", lambda: vision("vit_b_16", *IMAGES)),
    "vit_b_24": Subject("vit_b_16 of 24 layers, 8x3x224x224", deep_vit),
    "swin_t": Subject("swin_t, 8x3x224x224", lambda: vision("swin_t", *IMAGES)),
    "gpt2": Subject("GPT-2, 1x1024, 4,096 words", lambda: gpt2(4096)),
    "gpt2_words": Subject("GPT-2, 1x1024, 50,257 words", lambda: gpt2(50257)),
}


def predicted(subject: Subject) -> dict[str, Any]:
    """Highest memory and work of a step, with one kind of frame more each time."""
    torch.manual_seed(0)
    model, x = subject.make()
    course = re2fx.memory_course(model, x, memory="lowest")
    rev: Any = re2fx.transform(model, x, memory="lowest")
    lowest: Frames = rev.memory_plan.frames
    nothing = replace(lowest, checkpointed=frozenset(), slices=1, apart=0)
    kinds = {
        "reversed": nothing,
        "checkpoints": replace(nothing, checkpointed=lowest.checkpointed),
        "slices": replace(lowest, apart=0),
        "part by part": lowest,
    }
    steps = {"plain": course.plain, "checkpoint": course.checkpointed}
    for kind, frames in kinds.items():
        force(rev, frames)
        steps[kind] = re2fx.foresee(rev, x)
    work = weigh(course.plain)
    return {
        kind: {"peak": step.peak.peak, "work": round(weigh(step) / work, 4), "phase": step.phase}
        for kind, step in steps.items()
    }


def force(rev: Any, frames: Frames) -> None:
    """Run a planned network with other frames."""
    (variant,) = rev._variants
    variant.framed[True] = replace(variant.framed[True], frames=frames)
    variant.programs.pop(True, None)


def measured(subject: Subject, rounds: int, checkpoint: int) -> dict[str, Any]:
    """Highest memory and seconds of a step: plain, at half of a checkpoint's peak, and lowest.

    Args:
        subject: the network.
        rounds: of steps, one of each way in turn.
        checkpoint: the peak with a checkpoint around every rewired branch.
    """
    torch.manual_seed(0)
    model, x = subject.make()
    ways: dict[str, nn.Module] = {"plain": model}
    with suppress(re2fx.BudgetError):
        ways[HALF] = re2fx.transform(model, x, memory=checkpoint // 2)
    ways["lowest"] = re2fx.transform(model, x, memory="lowest")
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    peaks = {name: _peak(way, x) for name, way in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            total(way(x)).backward()
            seconds[name].append(round(time.perf_counter() - start, 4))
    plain = seconds["plain"]
    return {HALF: None} | {
        name: {
            "peak": peaks[name],
            "seconds": own,
            "over_plain": round(median(a / b for a, b in zip(own, plain, strict=True)), 4),
        }
        for name, own in seconds.items()
    }


def _peak(way: nn.Module, x: Tensor) -> int:
    def step() -> None:
        total(way(x)).backward()

    step()
    gc.collect()
    return re2fx.peak(step).peak


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="*", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--predict", action="store_true", help="run nothing for real")
    options = parser.parse_args()
    known = read_results("frames")["models"] if (RESULTS / "frames.json").exists() else {}
    console = Console()
    with progress() as bar:
        tick = advancer(bar, "frames", len(options.models))
        for name in options.models:
            subject = SUBJECTS[name]
            row: dict[str, Any] = {"words": subject.words, "predicted": predicted(subject)}
            if not options.predict and row["predicted"]["plain"]["peak"] <= FITS:
                checkpoint = row["predicted"]["checkpoint"]["peak"]
            row["measured"] = measured(subject, options.rounds, checkpoint)
            known[name] = row
            write_results("frames", {"models": {n: known[n] for n in SUBJECTS if n in known}})
            peaks = {kind: step["peak"] / 2**20 for kind, step in row["predicted"].items()}
            console.print(name, {kind: round(peak, 1) for kind, peak in peaks.items()})
            gc.collect()
            tick()


if __name__ == "__main__":
    main()
