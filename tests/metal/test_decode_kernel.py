"""The decode kernel and its merge: few queries, many keys, every option, and what they read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests import array_libraries, reference
from tests.attend import Attend
from tests.cases import Case, normal
from tests.checks import BASE, LSE, assert_close, assert_same_bits
from tests.metal import emulated
from tests.metal.emulated import MACHINES, SOME_MACHINES, Array
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


@pytest.mark.parametrize(("case", "seed"), crossed(CASES, [1, 2]), ids=str)
def test_any_schedule(case: Case, seed: int, attend: Attend) -> None:
    emulated.settings.schedule_seed = seed
    attend.case(case)


@pytest.mark.parametrize("options", MACHINES.values(), ids=MACHINES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_machine(case: Case, options: Options, attend: Attend) -> None:
    emulated.settings.options = options
    attend.case(case)


@pytest.mark.parametrize(("case", "cores", "family"), crossed(CASES, [1, 40], [7, 9, 9]), ids=str)
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


@pytest.mark.parametrize(
    ("shape", "dtype"),
    crossed(
        [(2, 4, 3, 400), (2, 1, 1, 400), (3, 400), (1, 4, 1, 400)],
        ["bool", "float32", "float16", "bfloat16"],
    ),
    ids=str,
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


@pytest.mark.parametrize("heads", [2, 4])  # a single row of a key head; matrices
@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_last_value_that_is_not_finite(bad: float, heads: int) -> None:
    """Past the end of the last run of keys that value is read again, where its weight is 0."""
    query = normal((1, 1, heads, 64), "float16", seed=0)
    key, value = (normal((1, 203, 2, 64), "float16", seed=i) for i in (1, 2))
    value[0, -1, 0, :5] = bad
    out, _ = emulated.attention(query, key, value)
    expected, _ = reference.attention(query, key, value)
    assert np.array_equal(np.isnan(out), np.isnan(expected))
    finite = ~np.isnan(expected)
    assert_close(out[finite].astype(np.float64), expected[finite], BASE["float16"])
    assert not np.isfinite(out[0, 0, 0, :5]).any()


# ---- a single row --------------------------------------------------------------------------------

SINGLE = [
    Case((1, 2, 1, 700, 64), "float16", alibi="heads", options=(("softcap", 20.0),)),
    Case((2, 2, 1, 333, 128), "bfloat16", options=(("window_size", (290, 0)),)),
    Case((1, 3, 1, 310, 90), "float32", head_dim_v=33, options=(("causal", True),)),
]
"""One query head of a key head, and one query: no matrices."""


@pytest.mark.parametrize("machine", SOME_MACHINES)
@pytest.mark.parametrize("case", SINGLE, ids=str)
def test_single_rows_on_any_machine(case: Case, machine: str, attend: Attend) -> None:
    emulated.settings.options = MACHINES[machine]
    emulated.settings.schedule_seed = 3
    attend.case(case)
    assert "vector" in emulated.last_plan["launches"][0]["kernel"]


@pytest.mark.parametrize(
    ("head_dim", "dtype", "family"),
    crossed([1, 32, 33, 64, 72, 80, 96, 100, 128], ["float32", "float16", "bfloat16"], [7, 9]),
)
def test_head_dims_of_single_rows(head_dim: int, dtype: str, family: int, attend: Attend) -> None:
    emulated.settings.family = family
    attend.case(Case((1, 2, 1, 150, head_dim), dtype))


@pytest.mark.parametrize("seqlen_k", [0, 1, 7, 8, 9, 63, 64, 65, 127, 129, 1031])
def test_key_counts_of_single_rows(seqlen_k: int, attend: Attend) -> None:
    attend.case(Case((1, 2, 1, seqlen_k, 64), "float32"))


def of_everything(heads: int, seed: int, **more: Any) -> tuple[Array, Array]:
    """Attention of so many query heads over one key head in pages, with everything at once."""
    table = np.random.default_rng(7).permutation(60).reshape(2, 30)
    query = normal((2, 1, 2, 64), "float16", seed=seed)
    mask = normal((2, 1, 1, 480), "float16", seed=seed + 3)
    mask[..., 3::7] = -np.inf
    slopes, sinks = np.abs(normal((2,), seed=seed + 4)), normal((2,), seed=seed + 5)
    return emulated.call(
        query[:, :, :heads],
        normal((60, 16, 1, 64), "float16", seed=seed + 1),
        normal((60, 16, 1, 64), "float16", seed=seed + 2),
        {"dropout_p": 0.3, "dropout_seed": 5, "softcap": 9.0, "window_size": (300, 0), **more},
        block_table=table,
        seqused_k=np.array([470, 301]),
        attn_mask=mask,
        alibi_slopes=slopes[:heads],
        learnable_sink=sinks[:heads],
        prefix_lens=np.array([40, 0]),
    )


@pytest.mark.parametrize("cores", [1, 40])
def test_a_single_row_is_what_it_is_among_others(cores: int) -> None:
    """Dropout, pages, a mask, sinks, a prefix: head 0 of two on matrices, and alone without."""
    emulated.settings.cores = cores
    several = of_everything(2, seed=1)
    assert "_q1" in emulated.last_plan["launches"][0]["kernel"]
    alone = of_everything(1, seed=1)
    assert "vector" in emulated.last_plan["launches"][0]["kernel"]
    assert len(emulated.last_plan["launches"]) == (1 if cores == 1 else 2)
    for found, expected, what in zip(alone, several, ("out", "lse"), strict=True):
        of_head_0 = expected[:, :, :1] if what == "out" else expected[:, :1]
        tolerance = BASE["float16"] if what == "out" else LSE
        assert_close(found.astype(np.float64), of_head_0.astype(np.float64), tolerance, what)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_hidden_values_of_single_rows(head_dim: int) -> None:
    """NaN among hidden values changes no bit; among seen ones it shows in its channels."""
    query, key, value = (normal((1, n, 2, head_dim), "float16", seed=n) for n in (1, 300, 301))
    value = value[:, :300].copy()
    mask = np.zeros((1, 300), np.float32)
    mask[:, [5, 40, 299]] = -np.inf
    clean = emulated.attention(query, key, value, mask=mask, window_size=(250, 0))
    value[:, [5, 40, 299]], value[:, 10] = np.nan, np.inf
    for found, expected in zip(
        emulated.attention(query, key, value, mask=mask, window_size=(250, 0)), clean, strict=True
    ):
        assert_same_bits(found, expected)
    value[0, 100, 1, 3], value[0, 101, 0, 5] = np.nan, np.inf
    out, _ = emulated.attention(query, key, value, mask=mask, window_size=(250, 0))
    assert np.isnan(out[0, 0, 1, 3])
    assert np.isposinf(out[0, 0, 0, 5])
    assert np.isfinite(out).sum() == out.size - 2


# ---- by tiles: large head dims, qv, rotated keys -------------------------------------------------

LARGE = [
    Case((1, 6, 1, 500, 300), "float16", heads_k=2),
    Case((1, 4, 3, 300, 320), "float32", heads_k=1, options=(("causal", True),)),
    Case((1, 20, 1, 330, 576), "bfloat16", heads_k=1, head_dim_v=512),
    Case((1, 4, 8, 300, 264), "float16", heads_k=2, alibi="heads",
         options=(("softcap", 20.0), ("window_size", (250, 3)))),
]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "cores"),
    [
        pytest.param(case, cores, marks=() if (n, cores) in ((0, 8), (2, 1)) else pytest.mark.slow)
        for n, case in enumerate(LARGE)
        for cores in (8, 1)
    ],
    ids=str,
)
def test_large_head_dims_are_split(case: Case, cores: int, attend: Attend) -> None:
    emulated.settings.cores = cores
    emulated.settings.schedule_seed = 1
    attend.case(case)
    launches = emulated.last_plan["launches"]
    assert launches[0]["kernel"].startswith("forward")
    assert cores == 1 or len(launches) == 2


@pytest.mark.parametrize("machine", SOME_MACHINES)
@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(64, 512), (128, 64)])
def test_second_parts_of_few_queries(head_dim: int, head_dim_v: int, machine: str) -> None:
    emulated.settings.options = MACHINES[machine]
    query = normal((2, 2, 4, head_dim), "float16", seed=0)
    qv = normal((2, 2, 4, head_dim_v), "float16", seed=1)
    key, value = (normal((2, 430, 2, n), "float16", seed=n) for n in (head_dim, head_dim_v))
    out, lse = emulated.call(query, key, value, {"causal": True}, qv=qv)
    assert len(emulated.last_plan["launches"]) == 2
    expected_out, expected_lse = reference.attention(query, key, value, qv=qv, causal=True)
    assert_close(out.astype(np.float64), expected_out, BASE["float16"])
    assert_close(lse.astype(np.float64), expected_lse, LSE, "lse")


def tables(head_dim: int) -> dict[str, Array]:
    angles = np.arange(500)[:, None] * 0.1 ** np.arange(head_dim // 2)[None]
    return {"rotary_cos": np.cos(angles), "rotary_sin": np.sin(angles)}


@pytest.mark.parametrize(
    "name",
    ["pages", *(pytest.param(name, marks=pytest.mark.slow) for name in ("rotary", "dense"))],
)
def test_splits_by_tiles_give_what_whole_rows_do(name: str) -> None:
    """Pages, a prefix, dropout, sinks, masks: against the same call computed head by head."""
    emulated.settings.cores = 16
    head_dim = 64 if name == "rotary" else 288
    query = normal((2, 2, 4, head_dim), "float16", seed=0)
    options: dict[str, Any] = {"dropout_p": 0.3, "dropout_seed": 5, "softcap": 9.0}
    more: dict[str, Any] = {"learnable_sink": normal((4,), seed=5)}
    shape: tuple[int, ...] = (2, 400, 2, head_dim)
    if name == "pages":
        shape = (50, 16, 2, head_dim)
        more |= {
            "block_table": np.random.default_rng(7).permutation(50).reshape(2, 25),
            "seqused_k": np.array([390, 201]), "prefix_lens": np.array([40, 0]),
        }  # fmt: skip
        options["window_size"] = (200, 0)
    elif name == "dense":
        more["attn_mask"] = normal((2, 4, 2, 400), "float16", seed=6)
        more["attn_mask"][..., 3::7] = -np.inf
    else:
        more |= {key: x.astype(np.float32) for key, x in tables(head_dim).items()}
        options["causal"] = True
    key, value = (normal(shape, "float16", seed=i) for i in (1, 2))
    split = emulated.call(query, key, value, options, **more)
    assert len(emulated.last_plan["launches"]) == 2
    whole = emulated.call(query, key, value, options | {"batch_invariant": True}, **more)
    assert len(emulated.last_plan["launches"]) == 1
    for found, expected, tolerance in zip(split, whole, (BASE["float16"], LSE), strict=True):
        assert_close(found.astype(np.float64), expected.astype(np.float64), tolerance)
    again = emulated.call(query, key, value, options, **more)
    for found, expected in zip(again, split, strict=True):
        assert_same_bits(found, expected)


def test_hidden_values_do_not_reach_splits_by_tiles() -> None:
    query = normal((1, 2, 2, 320), "float16", seed=0)
    key, value = (normal((1, 300, 1, 320), "float16", seed=i) for i in (1, 2))
    mask = np.zeros((2, 300), np.float32)
    mask[:, [5, 40, 299]] = -np.inf
    mask[0, 200] = -np.inf
    clean = emulated.attention(query, key, value, mask=mask)
    assert len(emulated.last_plan["launches"]) == 2
    value[:, [5, 40, 299]] = np.nan
    for found, expected in zip(
        emulated.attention(query, key, value, mask=mask), clean, strict=True
    ):
        assert_same_bits(found, expected)
    value[0, 200, 0, 7] = np.inf
    out, _ = emulated.attention(query, key, value, mask=mask)
    assert_same_bits(out[:, 0], clean[0][:, 0])
    assert np.isposinf(out[0, 1, :, 7]).all()
    assert np.isfinite(out).sum() == out.size - 2


# ---- cost ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("group", "seqlen_q"), [(1, 1), (4, 1), (8, 2)])
def test_keys_and_values_are_read_once_for_a_group(
    group: int, seqlen_q: int, attend: Attend
) -> None:
    """In runs of 8: past the last of 1500 keys, lanes read that key again, without a guard."""
    case = Case((1, 2 * group, seqlen_q, 1500, 64), "float16", heads_k=2)
    with emulated.counting() as counters:
        attend.case(case)
    decode, merge = counters
    once = 2 * 1504 * 64 * 2
    assert decode.buffer_bytes_read[1] == decode.buffer_bytes_read[2] == once
    rows = 2 * group * seqlen_q
    splits = decode.buffer_bytes_written[14] // (rows * 8)
    assert decode.buffer_bytes_written[13] == rows * splits * 64 * 4
    assert merge.buffer_bytes_read[0] == rows * splits * 64 * 4
    assert merge.buffer_bytes_written[2] == rows * 64 * 2


@pytest.mark.parametrize(
    ("head_dim", "head_dim_v", "qv"),
    [(64, 512, True), pytest.param(576, 512, False, marks=pytest.mark.slow)],
)
def test_tiles_read_keys_and_values_once_for_a_group(
    head_dim: int, head_dim_v: int, qv: bool
) -> None:
    """16 query heads are the rows of one tile; head by head they would read all keys 16 times."""
    query, key, value = (
        normal(shape, "float16", seed=i)
        for i, shape in enumerate(
            [(1, 1, 16, head_dim), (1, 1000, 1, head_dim), (1, 1000, 1, head_dim_v)]
        )
    )
    second = {"qv": normal((1, 1, 16, head_dim_v), "float16", seed=3)} if qv else {}
    with emulated.counting() as counters:
        emulated.call(query, key, value, {}, **second)
        emulated.call(query, key, value, {"batch_invariant": True}, **second)
    packed, merge, alone = counters
    for buffer, tensor in ((1, key), (2, value)):
        # 63 tiles of 16 keys, in steps of 256 threads with 16 bytes each. Past the end of the tile
        # and of the keys, threads read the last row again, without a guard.
        once = 63 * -(-16 * tensor.shape[3] * 2 // 4096) * 4096
        assert packed.buffer_bytes_read[buffer] == once
        assert alone.buffer_bytes_read[buffer] == 16 * once
    assert packed.mma * 8 <= alone.mma * 1.02
    assert merge.buffer_bytes_read[0] == packed.buffer_bytes_written[15]


def test_no_barrier_inside_the_loop(attend: Attend) -> None:
    """Simdgroups meet only to merge: twice for each halving of four of them."""
    emulated.settings.cores = 1
    with emulated.counting() as counters:
        attend.case(Case((1, 2, 1, 4096, 64), "float16", heads_k=1))
        attend.case(Case((1, 1, 1, 4096, 64), "float16"))
    decode, _, vector, _ = counters
    assert decode.threadgroup_barriers == 4 * decode.threadgroups
    assert vector.threadgroup_barriers == vector.threadgroups
    assert vector.mma == 0


def test_declared_threadgroup_memory_is_what_the_kernel_takes(attend: Attend) -> None:
    for case in CASES:
        with emulated.counting() as counters:
            attend.case(case)
        for launch, planned in zip(counters, emulated.last_plan["launches"], strict=True):
            assert launch.threadgroup_memory == planned["threadgroup_bytes"], planned["kernel"]
