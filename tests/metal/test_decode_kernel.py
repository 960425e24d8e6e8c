"""The decode kernel and its merge: few queries, many keys, every option, and what they read."""

from __future__ import annotations

import numpy as np
import pytest

from tests import array_libraries, reference
from tests.attend import Attend
from tests.cases import Case, normal
from tests.checks import BASE, LSE, assert_close
from tests.metal import emulated
from tests.metal.emulated import MACHINES
from tests.tiers import crossed
from tools.metal.emulator import Options

CASES = [
    Case((1, 8, 1, 900, 64), "float16", heads_k=2),
    Case((2, 4, 3, 700, 128), "bfloat16", heads_k=1, options=(("causal", True),)),
    Case((1, 6, 8, 500, 40), "float32", heads_k=2, options=(("window_size", (300, 2)),)),
    Case((1, 4, 2, 600, 80), "float16", heads_k=2, alibi="heads", options=(("softcap", 20.0),)),
    Case((1, 2, 5, 300, 250), "float32", options=(("causal", True),)),
    Case((1, 2, 1, 300, 192), "float16", head_dim_v=100),
]


pytestmark = pytest.mark.usefixtures("own_settings")


@pytest.fixture
def attend() -> Attend:
    return Attend(array_libraries.load("numpy"), "metal-emulated")


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_schedule(case: Case, seed: int, attend: Attend) -> None:
    emulated.settings.schedule_seed = seed
    attend.case(case)


@pytest.mark.parametrize("options", MACHINES.values(), ids=MACHINES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_machine(case: Case, options: Options, attend: Attend) -> None:
    emulated.settings.options = options
    attend.case(case)


@pytest.mark.parametrize("family", [7, 9])
@pytest.mark.parametrize("cores", [1, 40])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_gpu(case: Case, family: int, cores: int, attend: Attend) -> None:
    """The number of cores decides into how many parts the keys are split."""
    emulated.settings.family = family
    emulated.settings.cores = cores
    attend.case(case)


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    crossed([1, 32, 33, 64, 72, 80, 96, 128, 160, 192, 256], ["float32", "float16", "bfloat16"]),
)
def test_head_dims(head_dim: int, dtype: str, attend: Attend) -> None:
    attend.case(Case((1, 4, 2, 150, head_dim), dtype, heads_k=2))


@pytest.mark.parametrize("seqlen_k", [0, 1, 7, 8, 9, 31, 32, 33, 127, 129, 1000, 1031])
def test_key_counts(seqlen_k: int, attend: Attend) -> None:
    attend.case(Case((1, 2, 4, seqlen_k, 32), "float32", options=(("causal", True),)))


@pytest.mark.parametrize("group", [1, 3, 4, 8, 16])
@pytest.mark.parametrize("seqlen_q", [1, 5, 8])
def test_every_row_of_a_group(seqlen_q: int, group: int, attend: Attend) -> None:
    """Rows of a key head fill fragments across query heads, and threadgroups beyond 16 rows."""
    case = Case((1, 2 * group, seqlen_q, 290, 32), "float32", heads_k=2, alibi="heads")
    attend.case(case)


@pytest.mark.parametrize("dtype", ["bool", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "shape", [(2, 4, 3, 400), (2, 1, 1, 400), (3, 400), (1, 4, 1, 400)], ids=str
)
def test_dense_masks(shape: tuple[int, ...], dtype: str) -> None:
    query = normal((2, 3, 4, 64), seed=0)
    key, value = (normal((2, 400, 2, 64), seed=i) for i in (1, 2))
    if dtype == "bool":
        mask = np.random.default_rng(3).random(shape) < 0.3
        mask[..., 100:] &= mask[..., :1]  # some rows see nothing from there on
    else:
        mask = normal(shape, dtype, seed=3, factor=3)
        mask[..., 5] = -np.inf
    out, lse = emulated.attention(query, key, value, mask=mask)
    expected_out, expected_lse = reference.attention(query, key, value, mask=mask)
    assert_close(out.astype(np.float64), expected_out, BASE["float32"])
    assert_close(lse.astype(np.float64), expected_lse, LSE, "lse")


def test_parts_that_see_nothing_weigh_nothing() -> None:
    """A mask that hides whole parts of the keys, and for one row all of them."""
    query = normal((1, 2, 2, 32), seed=0)
    key, value = (normal((1, 2000, 2, 32), seed=i) for i in (1, 2))
    mask = np.zeros((2, 2000), bool)
    mask[0, 700:710] = True
    out, lse = emulated.attention(query, key, value, mask=mask)
    expected_out, expected_lse = reference.attention(query, key, value, mask=mask)
    assert_close(out.astype(np.float64), expected_out, BASE["float32"])
    assert_close(lse.astype(np.float64), expected_lse, LSE, "lse")
    assert np.isneginf(lse[0, :, 1]).all()
    assert (out[0, 1] == 0).all()


def test_hidden_values_do_not_reach_the_result_across_a_split() -> None:
    """The keys of the next part are real data: a run of 8 that a split cuts must not read them."""
    emulated.settings.cores = 2
    query = normal((1, 1, 1, 32), seed=0)
    key, value = (normal((1, 1001, 1, 32), seed=i) for i in (1, 2))
    _, lse = emulated.attention(query, key, value)
    expected_out, expected_lse = reference.attention(query, key, value)
    assert_close(lse.astype(np.float64), expected_lse, LSE, "lse")
    found = emulated.attention(query, key, value)[0]
    assert_close(found.astype(np.float64), expected_out, BASE["float32"])


# ---- cost ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("group", "seqlen_q"), [(1, 1), (4, 1), (8, 2)])
def test_keys_and_values_are_read_once_for_a_group(
    group: int, seqlen_q: int, attend: Attend
) -> None:
    case = Case((1, 2 * group, seqlen_q, 1500, 64), "float16", heads_k=2)
    with emulated.counting() as counters:
        attend.case(case)
    decode, merge = counters
    once = 2 * 1500 * 64 * 2
    assert decode.buffer_bytes_read[1] == decode.buffer_bytes_read[2] == once
    rows = 2 * group * seqlen_q
    splits = decode.buffer_bytes_written[14] // (rows * 8)
    assert decode.buffer_bytes_written[13] == rows * splits * 64 * 4
    assert merge.buffer_bytes_read[0] == rows * splits * 64 * 4
    assert merge.buffer_bytes_written[2] == rows * 64 * 2


def test_no_barrier_inside_the_loop(attend: Attend) -> None:
    """Simdgroups meet only to merge: twice for each halving of four of them."""
    emulated.settings.cores = 1
    with emulated.counting() as counters:
        attend.case(Case((1, 1, 1, 4096, 64), "float16"))
    decode = counters[0]
    assert decode.threadgroup_barriers == 4 * decode.threadgroups


def test_declared_threadgroup_memory_is_what_the_kernel_takes(attend: Attend) -> None:
    for case in CASES:
        with emulated.counting() as counters:
            attend.case(case)
        for launch, planned in zip(counters, emulated.last_plan["launches"], strict=True):
            assert launch.threadgroup_memory == planned["threadgroup_bytes"], planned["kernel"]
