"""Import what the models of the zoo need, once, in the process that the others are forked from."""

from __future__ import annotations

import gc
import importlib
import os
import warnings
from contextlib import suppress

from re2fx.torchvision_shim import ensure_torchvision

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # configurations, never downloads

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    with suppress(ImportError):
        ensure_torchvision()
    for _name in (
        "re2fx.zoo.measure",
        "torch._dynamo",
        "timm",
        "transformers.modeling_utils",
        "pytorchvideo.models",
    ):
        with suppress(ImportError):  # whoever lacks a library misses its models only
            importlib.import_module(_name)

gc.collect()
gc.freeze()  # or each collection in a model's process looks through all of these libraries
