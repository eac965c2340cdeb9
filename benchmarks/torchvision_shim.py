"""`re2fx.torchvision_shim` under the name that the benchmarks use."""

from re2fx.torchvision_shim import ensure_torchvision

__all__ = ["ensure_torchvision"]
