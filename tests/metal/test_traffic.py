"""What the kernels move for each score, as docs/metal-verification.md states it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from tests import reference
from tests.cases import normal
from tests.checks import BASE, assert_close
from tests.metal import emulated
from tests.metal.backward_calls import Call
from tests.sequences import paged

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
    emulated.settings.cores = 1  # gets the tiles of large problems
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


@pytest.mark.whole
@pytest.mark.parametrize(
    (
        "head_dim",
        "pages",
        "masked",
    ),  # with 64 a thread walks from row to row, else it looks them up
    [(64, False, True), (80, False, False), (80, True, True)],
)
def test_a_ragged_tile_costs_what_a_whole_one_does(
    head_dim: int, pages: bool, masked: bool
) -> None:
    """It holds finite numbers past the last key, too. With NaN there, an unmasked call would have
    another result, and a masked one would go through the keys three more times."""
    products = []
    for keys in (313, 320):
        query, key, value = (
            normal((1, rows, 1, head_dim), "float16", seed=i)
            for i, rows in enumerate((64, keys, keys))
        )
        caches, tensors = [key, value], {}
        if pages:
            caches, tensors["block_table"] = paged(caches, 16)
            tensors["seqused_k"] = np.array([keys], np.int32)
        if masked:
            tensors["attn_mask"] = np.ones((1, 1, 1, 320 if pages else keys), bool)
        with emulated.counting() as counters:
            out, _ = emulated.call(query, *caches, **tensors)
        assert_close(
            out.astype(np.float64), reference.attention(query, key, value)[0], BASE["float16"]
        )
        products.append(sum(counter.mma for counter in counters))
    assert products[0] == products[1] > 0


def test_so_do_those_of_gradients() -> None:
    products = []
    for rows in (313, 320):
        call = Call([rows], [rows], heads=1, head_dim=80, dtype="float16")
        with emulated.counting() as counters:
            call.check()
        products.append(sum(counter.mma for counter in counters))
    assert products[0] == products[1] > 0
