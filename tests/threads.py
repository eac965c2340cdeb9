"""What kernels allocate depends on how many threads they run on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from re2fx.zoo.steps import one_thread


@pytest.fixture(autouse=True)
def single() -> Iterator[None]:
    """In a module that imports it every test runs on one thread: scratch is taken per thread."""
    with one_thread():
        yield
