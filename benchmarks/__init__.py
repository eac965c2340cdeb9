"""Measurements and the demo; run as ``python -m benchmarks.<name>``."""
