"""The forward kernel under conditions that the shared suite does not vary, and what it costs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests import array_libraries, reference
from tests.attend import Attend
from tests.cases import Case, normal
from tests.checks import BASE, LSE, Tolerance, assert_close
from tests.metal import emulated
from tests.metal.emulated import MACHINES
from tests.tiers import crossed
from tools.metal.emulator import KernelError, Options

CASES = [
    Case((1, 1, 40, 60, 300), "float16", options=(("causal", True),)),
    Case((1, 1, 40, 30, 512), "float32"),
    Case((1, 1, 40, 50, 192), "bfloat16", head_dim_v=128),
    Case((1, 2, 70, 70, 64), "float16", options=(("causal", True),)),
    Case((1, 2, 45, 100, 40), "bfloat16", heads_k=1, options=(("window_size", (20, 5)),)),
    Case((1, 2, 33, 65, 128), "float32", alibi="heads", options=(("softcap", 20.0),)),
    Case((1, 1, 40, 50, 250), "float16", head_dim_v=72),
    Case((1, 1, 40, 50, 200), "float32", options=(("causal", True),)),
]


pytestmark = pytest.mark.usefixtures("own_settings")


@pytest.fixture
def attend() -> Attend:
    return Attend(array_libraries.load("numpy"), "metal-emulated")


@pytest.mark.parametrize(("case", "seed"), crossed(CASES, [1, 2, 3]), ids=str)
def test_any_schedule(case: Case, seed: int, attend: Attend) -> None:
    emulated.settings.schedule_seed = seed
    attend.case(case)


@pytest.mark.parametrize("options", MACHINES.values(), ids=MACHINES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_machine(case: Case, options: Options, attend: Attend) -> None:
    emulated.settings.options = options
    emulated.settings.cores = 1  # gets the tiles of large problems
    attend.case(case)


@pytest.mark.parametrize(("case", "family"), crossed(CASES, [7, 9, 10, 8]), ids=str)
def test_any_family(case: Case, family: int, attend: Attend) -> None:
    emulated.settings.family = family
    attend.case(case)


@pytest.mark.parametrize(
    "case",
    [
        Case((1, 1, 768, 768, 128), "bfloat16", label="A03"),
        pytest.param(Case((1, 1, 1536, 1536, 128), "float16", label="A04"), marks=pytest.mark.slow),
        pytest.param(
            Case((1, 1, 1536, 1536, 128), "bfloat16", label="A04"), marks=pytest.mark.slow
        ),
        pytest.param(
            Case((1, 1, 4608, 4608, 128), "bfloat16", label="A05"), marks=pytest.mark.slow
        ),
        pytest.param(
            Case((1, 1, 4128, 4128, 128), "bfloat16", label="A06"), marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_image_models(case: Case, attend: Attend) -> None:
    """FLUX and Z-Image, one head of each."""
    emulated.settings.family = 9  # bfloat fragments
    attend.case(case)


# ---- masks ---------------------------------------------------------------------------------------

MASK_SHAPES = [(1, 1, 33, 65), (2, 1, 1, 65), (33, 65), (1, 4, 1, 65), (2, 4, 33, 65)]


@pytest.mark.parametrize("dtype", ["bool", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_dense_masks(shape: tuple[int, ...], dtype: str) -> None:
    """A13, A14: read through broadcast strides; a float mask is added after the scale."""
    query = normal((2, 33, 4, 64), seed=0)
    key, value = (normal((2, 65, 4, 64), seed=i) for i in (1, 2))
    if dtype == "bool":
        mask = np.random.default_rng(3).random(shape) < 0.7
        mask[..., 3 : shape[-2] // 2, :] = False  # rows that see nothing, where it has rows
    else:
        mask = normal(shape, dtype, seed=3, factor=3)
        mask[..., 0, 5] = -np.inf
    out, lse = emulated.attention(query, key, value, mask=mask)
    expected_out, expected_lse = reference.attention(query, key, value, mask=mask)
    assert_close(out.astype(np.float64), expected_out, BASE["float32"])
    assert_close(lse.astype(np.float64), expected_lse, LSE, "lse")


def test_the_lowest_finite_mask_hides_without_overflow() -> None:
    """torch.finfo(dtype).min is what many models write for -inf."""
    query, key, value = (normal((1, 40, 1, 32), seed=i) for i in range(3))
    mask = np.zeros((1, 1, 40, 40), np.float32)
    mask[..., 10:] = np.finfo(np.float32).min
    out, lse = emulated.attention(query, key, value, mask=mask)
    expected_out, expected_lse = reference.attention(query, key, value, mask=mask == 0)
    assert_close(out.astype(np.float64), expected_out, BASE["float32"])
    assert_close(lse.astype(np.float64), expected_lse, LSE, "lse")


def test_a_bias_for_every_pair_of_positions() -> None:
    """A12: T5, whose scale is 1 and whose bias is as large as the scores."""
    query, key, value = (normal((1, 512, 2, 64), "bfloat16", seed=i) for i in range(3))
    query = (query.astype(np.float32) / 8).astype(query.dtype)
    mask = normal((1, 2, 512, 512), "bfloat16", seed=3, factor=3)
    emulated.settings.family = 9
    out, lse = emulated.attention(query, key, value, mask=mask, softmax_scale=1.0)
    expected_out, expected_lse = reference.attention(
        query, key, value, mask=mask, softmax_scale=1.0
    )
    assert_close(out.astype(np.float64), expected_out, Tolerance(1e-2, 8e-3))
    assert_close(lse.astype(np.float64), expected_lse, LSE, "lse")


def test_key_padding() -> None:
    """A09: PixArt, a bool mask of keys, read in place."""
    query = normal((2, 1024, 1, 72), "float16", seed=0)
    key, value = (normal((2, 300, 1, 72), "float16", seed=i) for i in (1, 2))
    mask = np.ones((2, 1, 1, 300), bool)
    mask[0, ..., 120:] = False
    mask[1, ..., 77:] = False
    with emulated.counting() as counters:
        out, lse = emulated.attention(query, key, value, mask=mask)
    expected_out, expected_lse = reference.attention(query, key, value, mask=mask)
    assert_close(out.astype(np.float64), expected_out, BASE["float16"])
    assert_close(lse.astype(np.float64), expected_lse, LSE, "lse")
    assert counters[0].buffer_bytes_read[5] > 0  # the mask itself, 600 bytes of memory


@pytest.mark.parametrize("alignment", ["lower_right", "upper_left"])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(16, 128), (128, 16), (4, 100), (100, 100)])
def test_causal_alignments(seqlen_q: int, seqlen_k: int, alignment: str, attend: Attend) -> None:
    """A16: flash-attn's and PyTorch's."""
    options = (("causal", True), ("alignment", alignment))
    attend.case(Case((1, 4, seqlen_q, seqlen_k, 64), "float32", options=options))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("seqlen_q", [96, 5])
def test_the_future_does_not_leak(seqlen_q: int, dtype: str) -> None:
    """A15: changing K and V at j leaves every bit of the rows before j."""
    emulated.settings.family = 9
    query = normal((1, seqlen_q, 4, 64), dtype, seed=0)
    key, value = (normal((1, 96, 4, 64), dtype, seed=i) for i in (1, 2))
    before = emulated.attention(query, key, value, causal=True)
    for j in (95, 92, 91):
        key[0, j], value[0, j] = (normal((4, 64), dtype, seed=10 + j, factor=9) for _ in range(2))
        after = emulated.attention(query, key, value, causal=True)
        kept = j - (96 - seqlen_q)
        for one, other in zip(before, after, strict=True):
            rows = (slice(None), slice(0, kept)) if one.ndim == 4 else (..., slice(0, kept))
            assert one[rows].tobytes() == other[rows].tobytes()
        assert before[0].tobytes() != after[0].tobytes()


@pytest.mark.slow  # the emulator goes through 10 GB of addresses
def test_rows_that_lie_far_apart() -> None:
    """Row 16 of a tile begins 2^31 elements behind row 0."""
    query = normal((1, 40, 1, 32), "float16", seed=0)
    key, value = (emulated.spread_out((1, 20, 1, 32), (0, 2**27, 0, 1)) for _ in range(2))
    key[:], value[:] = (normal((1, 20, 1, 32), "float16", seed=i) for i in (1, 2))
    out, lse = emulated.attention(query, key, value)
    expected_out, expected_lse = reference.attention(query, key.copy(), value.copy())
    assert_close(out.astype(np.float64), expected_out, BASE["float16"])
    assert_close(lse.astype(np.float64), expected_lse, LSE, "lse")


# ---- cost ----------------------------------------------------------------------------------------


def mma_of(case: Case, attend: Attend) -> int:
    emulated.settings.cores = 1  # gets the tiles of large problems
    with emulated.counting() as counters:
        attend.case(case)
    return sum(c.mma for c in counters)


def ideal_mma(visible_scores: int, head_dim: int) -> float:
    """Two products of 2 * head_dim FLOP for each score that is seen, 1024 FLOP for an MMA."""
    return visible_scores * 4 * head_dim / 1024


@pytest.mark.parametrize("head_dim", [64, 128])
def test_causal_costs_its_triangle(head_dim: int, attend: Attend) -> None:
    case = Case((1, 1, 1024, 1024, head_dim), "float16", options=(("causal", True),))
    assert mma_of(case, attend) <= 1.10 * ideal_mma(1024 * 1025 // 2, head_dim)


def test_a_window_costs_its_band(attend: Attend) -> None:
    seqlen, left = 4096, 256
    case = Case((1, 1, seqlen, seqlen, 64), "float16", options=(("window_size", (left, 0)),))
    seen = sum(min(i, left) + 1 for i in range(seqlen))
    assert mma_of(case, attend) <= 1.2 * ideal_mma(seen, 64)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_keys_and_values_are_read_once_per_query_tile(dtype: str, attend: Attend) -> None:
    case = Case((1, 1, 100, 96, 64), dtype)
    rows = {"float16": 64, "float32": 32}[dtype]  # of a threadgroup
    with emulated.counting() as counters:
        attend.case(case)
    (launch,) = counters
    once = 96 * 64 * np.dtype(dtype).itemsize
    assert launch.buffer_bytes_read[1] == launch.buffer_bytes_read[2] == -(-100 // rows) * once
    # Past the end of the last query tile, a row is read again.
    assert launch.buffer_bytes_read[0] == 128 * 64 * np.dtype(dtype).itemsize
    assert launch.buffer_bytes_written[3] == 100 * 64 * np.dtype(dtype).itemsize


def test_barriers_per_tile(attend: Attend) -> None:
    """Two for each tile of keys: before it is overwritten, and before it is read."""
    with emulated.counting() as counters:
        attend.case(Case((1, 1, 32, 320, 64), "float16"))
    assert counters[0].threadgroup_barriers == 2 * 320 // 32


@pytest.mark.parametrize(("head_dim", "fences"), [(64, 64 // 8), (128, 128 // 8 + 16 // 8)])
def test_fences_for_apples_scheduler(head_dim: int, fences: int, attend: Attend) -> None:
    """One for each 8 channels of Q K; from D = 128 on also one for each 8 keys of P V."""
    with emulated.counting() as counters:
        attend.case(Case((1, 1, 32, 64, head_dim), "float16"))
    (launch,) = counters
    shape = emulated.last_plan["launches"][0]["macros"]["UMFA_SHAPE"].split(", ")
    keys, fragments = int(shape[2]), int(shape[3])
    assert launch.simdgroup_barriers == fences * 64 // keys * 32 // (8 * fragments)


@pytest.mark.parametrize("seqlen_q", [1, 2, 40])  # a single row; matrices; tiles
def test_kernels_take_the_threads_of_their_shape(
    seqlen_q: int, attend: Attend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They say so, from which Apple's compiler knows how many registers a thread may have."""
    planned = emulated._ext.metal_plan_forward

    def with_more(*arguments: Any) -> dict[str, Any]:
        made = planned(*arguments)
        for launch in made["launches"]:
            launch["threadgroup"] = (launch["threadgroup"][0] + 32, 1, 1)
        return made

    monkeypatch.setattr(emulated._ext, "metal_plan_forward", with_more)
    with pytest.raises(KernelError) as raised:
        attend.case(Case((1, 1, seqlen_q, 50, 64), "float16"))
    assert raised.value.check == "too many threads"


def test_counters_do_not_depend_on_the_schedule(attend: Attend) -> None:
    found = []
    for seed in (0, 5):
        emulated.settings = replace(emulated.settings, schedule_seed=seed)
        with emulated.counting() as counters:
            attend.case(CASES[0])
            found.append(list(counters))
    assert found[0] == found[1]
