"""What holds for every test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from re2fx.state import READERS, State

WATCHED = tuple(name for name in READERS if name != "random seed")


@pytest.fixture(autouse=True)
def _settings_stay() -> Iterator[None]:
    """Whatever runs in the process afterwards finds torch's settings as this test found them."""
    state = State(WATCHED)
    yield
    assert state.changed() is None
