"""A key padding mask at the size of FLUX at 1024x1024 pixels: nothing of the size of the scores."""

from __future__ import annotations

import numpy as np
import pytest

from tests import reference
from tests.array_libraries import DTYPES
from tests.cases import normal
from tests.checks import BASE, LSE, assert_close
from tests.metal import emulated
from tests.metal.test_plan_forward import plan

SEQLEN, HEADS, HEAD_DIM = 4608, 24, 128
MASK = 5  # its buffer's index

pytestmark = pytest.mark.usefixtures("own_settings")


@pytest.mark.parametrize("family", [7, 8, 9, 10])
@pytest.mark.parametrize("kind", [np.bool_, np.float32])
def test_the_plan_needs_no_memory(family: int, kind: type) -> None:
    made = plan(
        DTYPES["bfloat16"],
        (1, SEQLEN, HEADS, HEAD_DIM),
        family=family,
        mask=np.zeros((1, 1, 1, SEQLEN), kind),
    )
    assert made["scratch_bytes"] == []
    assert made["data"] == []
    (launch,) = made["launches"]
    names = [made["tensors"][piece][0] for _, _, piece, _ in launch["buffers"]]
    assert sorted(names) == ["attn_mask", "key", "lse", "out", "query", "value"]


@pytest.mark.nightly  # 130 s
def test_the_kernel_reads_the_mask_where_it_is() -> None:
    """One head of it. The emulator would stop at any access outside of the buffers it was given, of
    which the mask's holds one row."""
    emulated.settings.family = 9  # bfloat fragments
    query, key, value = (normal((1, SEQLEN, 1, HEAD_DIM), "bfloat16", seed=i) for i in range(3))
    seen = np.arange(SEQLEN) < 4000
    mask = np.where(seen, 0, -np.inf).astype(np.float32)
    with emulated.counting() as counters:
        out, lse = emulated.attention(query, key, value, mask=mask[None, None, None])
    (launch,) = counters
    # One element for each score, and what is written are the results.
    assert launch.buffer_bytes_read[MASK] <= SEQLEN**2 * mask.itemsize
    assert sum(launch.buffer_bytes_written.values()) == out.nbytes + lse.nbytes
    rows = [0, 1, 2303, 4607]
    exact, exact_lse = reference.attention(query[:, rows], key[:, :4000], value[:, :4000])
    assert_close(out[:, rows].astype(np.float64), exact, BASE["bfloat16"])
    assert_close(lse[:, :, rows].astype(np.float64), exact_lse, LSE, "lse")
