"""What a calibration recommends, and how it reads."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import re2fx

from .models import Net

C = re2fx.Coupling
BATCH = 32


def made(*rows: tuple[str, float, int, str, dict[str, Any]], **more: Any) -> re2fx.Calibration:
    """A calibration of invented figures."""
    return re2fx.Calibration(
        "Net", 1, 1,
        tuple(
            re2fx.Calibrated(
                re2fx.Candidate(name, C.consistent(1 / 4), options=options, branches=branches),
                distance, None, None, bits, 4.0, kept, refusal,
            )
            for name, distance, kept, refusal, extra in rows
            for options, branches, bits in [
                (extra.get("options", {}), extra.get("branches", 1), extra.get("bits", 2))
            ]
        ),
        now=10_000,
        **more,
    )  # fmt: skip


def test_the_nearest_that_can_be_trained_is_recommended() -> None:
    found = made(
        ("far", 0.4, 100, "", {}),
        ("near", 0.1, 150, "", {}),
        ("nearer", 0.05, 0, "Net: chain 0 would lose digits", {}),
    )
    assert found.recommended is found.rows[1]
    assert [row.candidate.name for row in found.frontier] == ["far", "near"]
    assert found.recommendation == (
        "Take near read by mean: the nearest of the 2 that can be trained reversibly, moves the "
        "output by 10.0% and keeps 150 B for the backward instead of 9.8 KiB. Nearer, but not to "
        "be had: nearer read by mean, 5.0% (ill-conditioned, rounding grows 4-fold per block)."
    )


def test_of_those_as_near_the_cheapest() -> None:
    found = made(("near", 0.100, 200, "", {}), ("cheap", 0.104, 100, "", {}))
    assert found.recommended is found.rows[1]
    assert "within 5% of the nearest, at the least cost" in found.recommendation
    found = made(("near", 0.100, 200, "", {}), ("farther", 0.106, 100, "", {}))
    assert found.recommended is found.rows[0]
    found = made(("slow", 0.100, 100, "", {"branches": 2}), ("fast", 0.101, 100, "", {}))
    assert found.recommended is found.rows[1]


def test_unknown_bytes_count_as_many() -> None:
    found = made(("known", 0.2, 100, "", {}), ("unknown", 0.195, 0, "", {}))
    unknown = replace(found.rows[1], kept=None)
    found = replace(found, rows=(found.rows[0], unknown))
    assert found.recommended is found.rows[0]
    assert found.frontier == found.rows


def test_side_bits_are_bounded() -> None:
    exact = {"options": {"exact": True}}
    rows: list[tuple[str, float, int, str, dict[str, Any]]] = [
        ("a", 0.1, 300, "", exact), ("b", 0.3, 100, "", {})
    ]  # fmt: skip
    assert made(*rows).recommended is not None
    assert made(*rows).recommended.candidate.name == "a"  # type: ignore[union-attr]
    assert "2 side bits per element and block included" in made(*rows).recommendation
    few = made(*rows, max_bits=1)
    assert few.recommended is few.rows[1]
    assert "more than 1 side bits" in few.recommendation


# how it reads


@pytest.fixture(scope="module")
def found() -> re2fx.Calibration:
    data = [torch.randn(BATCH, 4) for _ in range(3)]
    return re2fx.calibrate(Net(6, 16), data, metric=lambda output, _: output.mean())


def test_columns_are_aligned(found: re2fx.Calibration) -> None:
    lines = str(found).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("coupling, readout"))
    names = ["distance", "top-1", "metric", "bits", "growth", "kept", "step"]
    assert lines[start].split()[2:] == names
    rows = lines[start + 2 : start + 2 + len(re2fx.CANDIDATES)]
    assert len({line.index("KiB") for line in rows if "KiB" in line}) == 1
    assert sum("recommended" in line for line in rows) == 1
    assert found.recommendation.split(":")[0] in str(found).replace("\n", " ")


def test_in_a_terminal(found: re2fx.Calibration) -> None:
    page = io.StringIO()
    pytest.importorskip("rich.console").Console(width=120, file=page).print(found)
    for piece in ("consistent(1/4), mean", "recommended", "Take ", "Net: the pretrained function"):
        assert piece in page.getvalue()


def test_in_a_notebook(found: re2fx.Calibration) -> None:
    page = found._repr_html_()
    assert page.count("<tr>") == 1 + len(found.rows)
    assert "consistent(1/4), mean" in page
    assert "Take " in page


def test_it_is_plain_data(found: re2fx.Calibration) -> None:
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["rows"][0]["coupling"] == [0, 1, 1]
    assert data["rows"][0]["distance"] == found.rows[0].distance
    assert found.recommended is not None
    assert data["recommended"] == found.recommended.name
    assert data["samples"] == 3 * BATCH


def test_as_a_picture(found: re2fx.Calibration, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure = found.plot(tmp_path / "distance.png")
    assert (tmp_path / "distance.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = figure.axes
    assert {text.get_text() for text in axes.texts} == {row.name for row in found.rows}
    heights: list[Any] = [line.get_ydata() for line in axes.lines[1:]]
    assert sorted(float(height[0]) for height in heights) == pytest.approx(
        sorted(row.distance for row in found.rows)
    )


def test_a_missing_library_is_named(
    found: re2fx.Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(re2fx.OptionError, match=r"re2fx\[bench\]"):
        found.plot()
