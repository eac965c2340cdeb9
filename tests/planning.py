"""Fixtures of tests that plan or measure memory; a module that imports one uses it throughout."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from re2fx.zoo.steps import one_thread


@pytest.fixture(autouse=True)
def single() -> Iterator[None]:
    """One thread: kernels take some of their scratch per thread."""
    with one_thread():
        yield


@pytest.fixture(autouse=True)
def few_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """One number of slices to try: every candidate is a simulated step."""
    monkeypatch.setattr("re2fx.planner.SLICES", (4,))
