"""Make model definitions importable where torchvision's compiled operators do not load.

Next to a CPU build of torch, torchvision from the package index fails on the schemas of two
operators that no model here calls. Declaring them is enough to import torchvision, timm and
pytorchvideo. A working torchvision is left alone.
"""

from __future__ import annotations

import importlib
import sys

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_library: torch.library.Library | None = None


def ensure_torchvision() -> None:
    """Import torchvision, declaring the missing operators first if the import fails on them."""
    global _library
    if "torchvision" in sys.modules:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        _library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
        _library.define("nms" + _SCHEMA)  # type: ignore[no-untyped-call]
        _library.define("qnms" + _SCHEMA)  # type: ignore[no-untyped-call]
        importlib.import_module("torchvision")
