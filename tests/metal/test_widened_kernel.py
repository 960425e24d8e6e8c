"""bfloat on M1 and M2, which multiply it as float: its tiles are widened where they are read."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from tests import reference
from tests.cases import normal
from tests.checks import BASE, LSE, assert_close, assert_same_bits
from tests.metal import emulated
from tests.metal.backward_calls import Call
from tests.metal.emulated import MACHINES
from tests.metal.test_sequences_kernel import check_packed, packed, varlen
from tests.tiers import crossed
from tools.metal.emulator import Counters

pytestmark = pytest.mark.usefixtures("own_settings")

LANE_MAPS = pytest.mark.parametrize("lane_map", ["usual", "permuted"])


def use(lane_map: str) -> None:
    if lane_map == "permuted":
        emulated.settings.options = MACHINES["permuted lane map"]


def only_kernel() -> str:
    (launch,) = emulated.last_plan["launches"]
    return str(launch["kernel"])


@pytest.mark.parametrize(
    ("head_dim", "lane_map", "masked"),
    crossed(
        [64, 80, 96, 128, 256, 40],
        ["usual", "permuted", "permuted"],
        [True, False],
    ),
)
def test_head_dims(head_dim: int, lane_map: str, masked: bool) -> None:
    """Grouped heads, whole tiles and parts of tiles."""
    use(lane_map)
    query = normal((2, 45, 4, head_dim), "bfloat16", seed=0)
    key, value = (normal((2, 77, 2, head_dim), "bfloat16", seed=i) for i in (1, 2))
    mask = np.random.default_rng(3).random((2, 4, 45, 77)) < 0.7 if masked else None
    found = emulated.attention(query, key, value, causal=True, mask=mask)
    assert only_kernel().startswith("forward_bf16_as_f32")
    out, lse = reference.attention(query, key, value, causal=True, mask=mask)
    assert_close(found[0].astype(np.float64), out, BASE["bfloat16"])
    assert_close(found[1].astype(np.float64), lse, LSE, "lse")


@LANE_MAPS
def test_packed_sequences(lane_map: str) -> None:
    use(lane_map)
    tensors = packed([10, 0, 70, 15, 40], [40, 20, 65, 0, 11], "bfloat16", head_dim=80)
    check_packed(varlen(*tensors, causal=True), *tensors, causal=True)
    assert "forward_bf16_as_f32" in emulated.last_plan["launches"][-1]["kernel"]


@LANE_MAPS
def test_every_channel_meets_its_own(lane_map: str) -> None:
    """One channel at a time is not 0: a pair of channels out of order would lose the score."""
    use(lane_map)
    head_dim = 64
    query = np.eye(head_dim, dtype=np.float32)[None, :, None]
    key = (np.eye(head_dim) * np.arange(1, head_dim + 1)).astype(np.float32)[None, :, None]
    query, key = (x.astype(normal((1,), "bfloat16", seed=0).dtype) for x in (query, key))
    value = normal((1, head_dim, 1, head_dim), "bfloat16", seed=2)
    _, lse = emulated.attention(query, key, value, softmax_scale=1.0)
    _, expected = reference.attention(query, key, value, softmax_scale=1.0)
    assert_close(lse.astype(np.float64), expected, LSE, "lse")


@LANE_MAPS
def test_hidden_nan(lane_map: str) -> None:
    """The passes that count replace values in tiles of bfloat."""
    use(lane_map)
    query, key = (normal((1, 40, 1, 64), "bfloat16", seed=i) for i in (0, 1))
    value = normal((1, 40, 1, 64), "bfloat16", seed=2)
    value[0, 33:], value[0, 20, 0, 5] = 0, 0
    expected, _ = emulated.attention(query, key, value, causal=True)
    value[0, 33:], value[0, 20, 0, 5] = np.nan, np.inf
    found, _ = emulated.attention(query, key, value, causal=True)
    assert_same_bits(found[0, :20].view(np.uint16), expected[0, :20].view(np.uint16))
    assert np.isposinf(found[0, 20:33, 0, 5].astype(np.float32)).all()
    kept = np.arange(64) != 5
    assert_same_bits(
        found[0, 20:33, 0, kept].view(np.uint16), expected[0, 20:33, 0, kept].view(np.uint16)
    )
    assert np.isnan(found[0, 33:].astype(np.float32)).all()


@LANE_MAPS
def test_gradients(lane_map: str) -> None:
    use(lane_map)
    Call(dtype="bfloat16", heads_k=1, options={"causal": True}).check()
    kernels = [launch["kernel"] for launch in emulated.last_plan["launches"]]
    assert [x for x in kernels if "bf16_as_f32" in x] == kernels[1:]


DOCUMENT = Path(__file__).parents[2] / "docs" / "metal-verification.md"
ROW = re.compile(r"^\| D = (\d+) \|(.*)\|$", re.MULTILINE)
STATED = {int(d): [int(x) for x in cells.split("|")][2::3] for d, cells in
          ROW.findall(DOCUMENT.read_text())}  # fmt: skip
LENGTH = 128


@pytest.mark.parametrize(
    "head_dim", [64, 128, 256, *(pytest.param(d, marks=pytest.mark.slow) for d in (80, 96))]
)
def test_threadgroup_memory_moves_what_float16_does(head_dim: int) -> None:
    """As many bytes of K and V as of a type that is multiplied as it is, and what is stated."""

    def counters_of(dtype: str) -> Counters:
        query, key, value = (normal((1, LENGTH, 1, head_dim), dtype, seed=i) for i in range(3))
        with emulated.counting() as counters:
            emulated.attention(query, key, value)
        (found,) = counters
        return found

    narrow, widened = counters_of("float16"), counters_of("bfloat16")
    assert only_kernel().startswith("forward_bf16_as_f32")
    assert widened.threadgroup_bytes_read == narrow.threadgroup_bytes_read
    assert widened.threadgroup_bytes_written == narrow.threadgroup_bytes_written
    assert widened.threadgroup_memory <= narrow.threadgroup_memory
    assert widened.mma == narrow.mma
    memory, read, written = STATED[head_dim]
    assert emulated.last_plan["launches"][0]["threadgroup_bytes"] == memory
    assert widened.threadgroup_memory == memory
    assert widened.threadgroup_bytes_read / LENGTH**2 == read
    assert widened.threadgroup_bytes_written / LENGTH**2 == pytest.approx(written, abs=0.005)
