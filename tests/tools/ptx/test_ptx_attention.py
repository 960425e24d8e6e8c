"""Attention through the PTX back end, run on the warp machine: all but LLVM's code generator, ptxas
and the GPU."""

from __future__ import annotations

import numpy as np
import pytest

from tests import array_libraries, reference
from tests.attend import Attend
from tests.cases import Case
from tests.checks import BASE, LSE, assert_close
from tests.metal import emulated
from tests.metal.emulated import Settings
from tests.tools.ptx.warp_machine import WarpLibrary

CASES = [
    Case((1, 2, 70, 70, 64), "float16", options=(("causal", True),)),
    Case((1, 2, 45, 100, 40), "bfloat16", heads_k=1, options=(("window_size", (20, 5)),)),
    Case((1, 2, 33, 65, 128), "float32", alibi="heads", options=(("softcap", 20.0),)),
    Case((1, 1, 40, 50, 128), "float16"),
    Case((1, 1, 40, 50, 250), "float16", head_dim_v=72),
    Case((1, 1, 40, 50, 200), "float32", options=(("causal", True),)),
    Case((1, 1, 33, 40, 512), "bfloat16"),
    Case((1, 8, 1, 700, 128), "float16", heads_k=2),
    Case((1, 2, 1, 700, 128), "float16", alibi="heads"),  # a single row of each key head
    Case((1, 6, 2, 300, 576), "float16", heads_k=1, head_dim_v=512),  # by tiles, split
    Case((1, 4, 2, 300, 64), "float32", heads_k=1, options=(("causal", True),)),
]

SLOW = pytest.mark.slow


@pytest.fixture(autouse=True)
def _warps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulated, "Library", WarpLibrary)
    monkeypatch.setattr(emulated, "settings", Settings())


# The same kernels run on the emulator; every run needs one of each sort here.
EVERY_RUN = (CASES[1], CASES[2], CASES[7], CASES[8])


@pytest.mark.parametrize(
    ("case", "family"),
    [
        pytest.param(case, family, marks=() if case in EVERY_RUN and family == 9 else SLOW)
        for case in CASES
        for family in (7, 9)
    ],
    ids=str,
)
def test_agrees_with_float64(case: Case, family: int) -> None:
    emulated.settings.family = family
    emulated.settings.cores = 40
    Attend(array_libraries.load("numpy"), "metal-emulated").case(case)


@pytest.mark.parametrize("seed", [1, 2])
def test_any_schedule(seed: int) -> None:
    """Warps in any order: a shuffle or barrier that not all lanes reach would be found."""
    emulated.settings.schedule_seed = seed
    Attend(array_libraries.load("numpy"), "metal-emulated").case(CASES[0])


def test_masks() -> None:
    rng = np.random.default_rng(0)
    query, key, value = (
        rng.standard_normal((1, 40, 2, 64), np.float32).astype(np.float16) for _ in range(3)
    )
    mask = rng.random((1, 1, 40, 40)) < 0.7
    mask[:, :, 3] = False
    out, lse = emulated.attention(query, key, value, mask=mask)
    expected, expected_lse = reference.attention(query, key, value, mask=mask)
    assert_close(out.astype(np.float64), expected, BASE["float16"])
    assert_close(lse.astype(np.float64), expected_lse, LSE, "lse")
    assert (out[0, 3] == 0).all()
    assert np.isneginf(lse[:, :, 3]).all()
