"""What the kernels move for each score, as docs/metal-verification.md states it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cases import normal
from tests.metal import emulated

DOCUMENT = Path(__file__).parents[2] / "docs" / "metal-verification.md"
ROW = re.compile(r"^\| umfa, (\w+), D = (\d+), Apple(\d+) \|(.*)\|$", re.MULTILINE)
STATED = ROW.findall(DOCUMENT.read_text())
LENGTH = 512


pytestmark = pytest.mark.usefixtures("own_settings")


def test_the_document_has_rows() -> None:
    assert len(STATED) >= 6


@pytest.mark.parametrize(
    ("dtype", "head_dim", "family", "cells"),
    [pytest.param(*row, marks=pytest.mark.slow if n % 3 else ()) for n, row in enumerate(STATED)],
)
def test_forward_moves_what_is_stated(dtype: str, head_dim: str, family: str, cells: str) -> None:
    emulated.settings.family = int(family)
    query, key, value = (
        normal((1, LENGTH, 1, int(head_dim)), dtype, seed=i) for i in range(3)
    )  # fmt: skip
    with emulated.counting() as counters:
        emulated.attention(query, key, value)
    (launch,) = counters
    _, _, keys, *_ = emulated.last_plan["launches"][0]["macros"]["UMFA_SHAPE"].split(", ")
    scores, tiles = LENGTH**2, launch.threadgroups * LENGTH // int(keys)
    simdgroups = emulated.last_plan["launches"][0]["threadgroup"][0] // 32
    found = [
        launch.threadgroup_bytes_read / scores,
        launch.threadgroup_bytes_written / scores,
        launch.threadgroup_barriers / tiles,
        launch.shuffles / tiles / simdgroups,
        (launch.buffer_bytes_read[1] + launch.buffer_bytes_read[2]) / scores,
    ]
    assert [float(cell) for cell in cells.split("|")] == pytest.approx(found, abs=0.005)
    assert launch.mma * 1024 == scores * 4 * int(head_dim)  # no product is computed twice
    assert launch.exp2 <= 1.01 * scores
