"""What holds for every test."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from re2fx.state import READERS, State

WATCHED = tuple(name for name in READERS if name != "random seed")


@pytest.fixture(autouse=True, scope="module")
def _old_objects_are_left_alone() -> None:
    """A collection looks at what a module's tests have made, not at all that was there before.

    Peaks are measured behind a collection, which takes seconds once libraries are loaded.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _settings_stay() -> Iterator[None]:
    """Whatever runs in the process afterwards finds torch's settings as this test found them."""
    state = State(WATCHED)
    yield
    assert state.changed() is None
