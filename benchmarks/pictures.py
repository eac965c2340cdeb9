"""The README's pictures of what the tools show: ``python -m benchmarks.pictures``.

    explain.svg   a terminal
    diff-*.png    the page of a diff in a browser (needs Chromium)
    report.png    the bytes kept for the backward
    fit.png       memory over the course of a step, predicted (a few minutes)
    verify.png    reconstruction error against depth

Nothing here is timed, so the pictures are the same on every machine but for fonts.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rich.console import Console

import re2fx
from re2fx.targets import load

from .common import RESULTS
from .torchvision_shim import ensure_torchvision

PICTURES = RESULTS / "pictures"
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars", "--virtual-time-budget=4000",
)  # fmt: skip


def models() -> tuple[torch.nn.Module, torch.nn.Module]:
    """A Swin for the diff and the report, a deep ViT for verify."""
    ensure_torchvision()
    import timm
    import torchvision

    torch.manual_seed(0)
    swin = torchvision.models.swin_t()
    vit = timm.create_model("vit_tiny_patch16_224", depth=24, img_size=32, num_classes=10)
    return swin, vit


def terminal(result: Any, title: str, path: Path, width: int = 144) -> None:
    """What a terminal shows, as SVG."""
    console = Console(record=True, width=width, file=io.StringIO())
    console.print(result, highlight=False)
    console.save_svg(str(path), title=title)


def browser() -> str | None:
    """Where Chromium is, if it is there."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


def screenshot(page: Path, path: Path, width: int, height: int) -> None:
    """A page as a browser shows it, loaded from disk."""
    executable = browser()
    if executable is None:
        print(f"no Chromium: {path.name} stays as it was")
        return
    with tempfile.TemporaryDirectory() as profile:
        size = (f"--window-size={width},{height}", f"--user-data-dir={profile}")
        command = [executable, *FLAGS, *size, f"--screenshot={path}", page.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)


def main() -> None:
    """Make all of them."""
    matplotlib.use("Agg")
    PICTURES.mkdir(parents=True, exist_ok=True)
    swin, vit = models()
    terminal(re2fx.explain(swin), "re2fx explain torchvision:swin_t", PICTURES / "explain.svg")
    rev = re2fx.transform(swin)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "diff.html"
        re2fx.diff(swin, rev).to_html(page)
        screenshot(page, PICTURES / "diff.png", 1280, 860)
    re2fx.report(swin, torch.randn(4, 3, 224, 224)).plot(PICTURES / "report.png")
    made = load("torchvision:swin3d_b", ["4,3,32,224,224"], "meta")
    course = re2fx.memory_course(made.model, made.inputs, memory="3GiB")
    course.plot(PICTURES / "fit.png")
    verification = re2fx.verify(re2fx.transform(vit), torch.randn(4, 3, 32, 32))
    verification.plot(PICTURES / "verify.png")
    terminal(verification, "re2fx verify", PICTURES / "verify.svg")


if __name__ == "__main__":
    main()
