"""Measurements and the demo; run as ``python -m benchmarks.<name>``."""

import os

# Before torch loads: OpenMP's threads wait by spinning unless told otherwise. On a machine with
# anything else to do they then wait for threads that are not running, and a step takes 20 times as
# long as it should.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
