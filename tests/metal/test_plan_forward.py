"""The planner: what it asks of the GPU fits every GPU, and names kernels that exist."""

from __future__ import annotations

import functools
import itertools
import re
import struct
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import umfa
from tests.metal.emulated import FUNCTION, SHADERS, exported_of, spread_out
from tools.metal.emulator import structure, toolchain
from umfa import _ext
from umfa._frameworks import _numpy

FAMILIES = [7, 8, 9, 10]
DTYPES = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
HEAD_DIMS = [1, 32, 33, 40, 64, 72, 80, 96, 100, 128, 160, 192, 256, 257, 512, 576]


def plan(
    dtype: Any = np.float16,
    shape: tuple[int, int, int, int] = (1, 100, 4, 64),
    seqlen_kv: int | None = None,
    nheads_kv: int | None = None,
    head_dim_v: int | None = None,
    family: int = 7,
    lse: bool = True,
    alibi: bool = False,
    cores: int = 8,
    mask: Any = None,
    others: dict[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """`settings`, `others`: by their names in the record."""
    batch, seqlen_q, nheads, head_dim = shape
    kv_shape = (batch, seqlen_q if seqlen_kv is None else seqlen_kv, nheads_kv or nheads, head_dim)
    out = np.zeros((*shape[:3], head_dim_v or head_dim), dtype)
    return plan_of(
        np.zeros(shape, dtype),
        np.zeros(kv_shape, dtype),
        np.zeros((*kv_shape[:3], head_dim_v or head_dim), dtype),
        out,
        np.zeros((batch, nheads, seqlen_q), np.float32) if lse else None,
        family,
        cores,
        alibi_slopes=np.zeros(nheads, np.float32) if alibi else None,
        attn_mask=mask,
        **(others or {}),
        **settings,
    )


def plan_of(
    query: Any,
    key: Any,
    value: Any,
    out: Any,
    lse: Any = None,
    family: int = 7,
    cores: int = 8,
    tiles: list[str] | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """`fields`: by their names in the record. `tiles`: as tuning chose them."""
    attention = _ext.Attention(
        FUNCTION, query=query, key=key, value=value, backend="metal", **fields
    )
    return _ext.metal_plan_forward(
        attention.options,
        family,
        cores,
        exported_of(attention),
        _numpy.export(out, "umfa.test", "out"),
        lse,
        tiles or [],
    )


def only_launch(**arguments: Any) -> dict[str, Any]:
    (launch,) = plan(**arguments)["launches"]
    return launch


def layout(kernel: str) -> dict[str, int]:
    """Buffer indices of a kernel, by what shared/indices.h calls them."""
    text = (SHADERS / "shared" / "indices.h").read_text()
    found = {n: int(i) for n, i in re.findall(rf"#define UMFA_{kernel}_(\w+) (\d+)", text)}
    count = found.pop("BUFFERS")
    assert sorted(found.values()) == list(range(count))
    return found


DECODE, MERGE, FORWARD = layout("DECODE"), layout("MERGE"), layout("FORWARD")
CODES = {"KEY_SCALES", "KEY_OFFSETS", "VALUE_SCALES", "VALUE_OFFSETS", "CODES"}
"""Buffers of the forward and decode kernels for keys and values that are quantised."""


def layout_of(launch: dict[str, Any]) -> dict[str, int]:
    if launch["kernel"].startswith("decode_merge"):
        return MERGE
    return layout(launch["kernel"].split("_")[0].upper())


@functools.cache
def host_names(source: str) -> set[str]:
    """Kernels that a library compiled ahead from one of the shaders holds."""
    path = SHADERS / source
    flat = toolchain.preprocess(path.read_text(), str(path), str(SHADERS), [], {})
    return set(structure.read(flat).entries)


def shape(launch: dict[str, Any]) -> list[int]:
    """D, DV, BK, QF, SIMDGROUPS, SPLIT of a forward launch."""
    return [int(n) for n in launch["macros"]["UMFA_SHAPE"].split(", ")[:6]]


def shape_rows(launch: dict[str, Any]) -> int:
    """Queries of a threadgroup of a forward launch."""
    _, _, _, fragments, simdgroups, split = shape(launch)
    return 8 * fragments * simdgroups // split


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("seqlen_q", [1, 8, 50])
def test_every_launch_fits_every_gpu(seqlen_q: int, head_dim: int, dtype: str, family: int) -> None:
    launches = plan(
        dtype=DTYPES[dtype], shape=(1, seqlen_q, 8, head_dim), seqlen_kv=2000, nheads_kv=2,
        head_dim_v=min(head_dim, 512), family=family,
    )["launches"]  # fmt: skip
    assert launches
    for launch in launches:
        assert 0 < launch["threadgroup_bytes"] <= 32768
        x, y, z = launch["threadgroup"]
        assert x * y * z <= 1024
        assert x % 32 == 0  # whole simdgroups
        assert launch["kernel"] in host_names(launch["source"])
    assert int(launches[0]["macros"]["UMFA_SHAPE"].split(",")[0]) >= head_dim


@pytest.mark.parametrize("dtype", DTYPES)
def test_unused_rows_have_a_kernel_compiled_ahead(dtype: str) -> None:
    used = {"seqused_q": np.array([90, 100])}
    clear, forward = plan(DTYPES[dtype], (2, 100, 4, 64), others=used)["launches"]
    assert clear["kernel"] in host_names("clear.metal")
    assert clear["grid"] == (1, 4, 1)
    assert forward["grid"] == (sum(-(-n // shape_rows(forward)) for n in (90, 100)), 4, 1)


def test_kernels_compiled_ahead_are_all_asked_for() -> None:
    """No shape in the lists that no problem reaches, for one of the families and dtypes."""
    asked = set()
    for family, dtype, head_dim, seqlen_q, nheads in itertools.product(
        (7, 9),
        DTYPES.values(),
        [32, 64, 80, 96, 128, 160, 192, 256, 512, 576],
        (1, 50),
        (1, 4, 16),
    ):
        for head_dim_v in {min(head_dim, 512), 128, 512}:
            made = plan(
                dtype=dtype, shape=(1, seqlen_q, nheads, head_dim), seqlen_kv=2000, nheads_kv=1,
                head_dim_v=head_dim_v, family=family,
            )  # fmt: skip
            asked |= {launch["kernel"] for launch in made["launches"]}
    # Rows of Apple7 and Apple8 alone. bfloat does not use them: the GPU computes it as float.
    spare = {"forward_bf16_d128_v128_k16", "forward_bf16_d256_v256_k32"}
    spare |= {f"forward_bf16_d128_v128_{rest}" for rest in ("k32_q1_f2", "k16_q1_f0")}
    for kernel in host_names("forward.metal") - asked - spare:  # that tuning may choose
        head_dim = int(re.findall(r"_d(\d+)_", kernel)[0])
        for family, dtype in itertools.product((7, 9), DTYPES.values()):
            x = np.zeros((1, 50, 1, head_dim), dtype)
            (launch,) = plan_of(x, x, x, x.copy(), family=family, tiles=[kernel])["launches"]
            asked.add(launch["kernel"])
    sources = ("forward.metal", "decode.metal", "decode_vector.metal")
    assert asked | spare == set().union(*map(host_names, sources))


def test_value_head_dim_has_a_kernel_of_its_own() -> None:
    """DeepSeek's MLA: V of 128 channels is not padded to K's 192."""
    assert shape(only_launch(shape=(1, 50, 2, 192), head_dim_v=128))[:2] == [192, 128]
    assert shape(only_launch(shape=(1, 50, 2, 192), head_dim_v=129))[:2] == [192, 192]


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat_fragments_only_where_they_are_native(family: int) -> None:
    """Before Apple9 bfloat arithmetic is emulated, and its simdgroup matrices are in doubt."""
    macros = only_launch(dtype=ml_dtypes.bfloat16, family=family)["macros"]
    assert macros["UMFA_T"] == "bfloat"
    assert macros["UMFA_M"] == ("bfloat" if family >= 9 else "float")


@pytest.mark.parametrize("seqlen_q", [9, 31, 32, 33, 63, 64, 65, 100])
def test_grid_covers_the_queries_and_nothing_else(seqlen_q: int) -> None:
    launch = only_launch(shape=(3, seqlen_q, 4, 64), nheads_kv=2)
    rows = shape_rows(launch)
    x, y, z = launch["grid"]
    assert (x - 1) * rows < seqlen_q <= x * rows
    assert (y, z) == (4, 3)


def test_constants_follow_the_problem() -> None:
    # Chunk, sequences, pages, sinks; rotary, dropout, qv; prefix; dtypes; the mask; pages again;
    # slices; packed heads; gradients; head dims; quantised formats; quantised keys and values.
    rest = {9: False, 10: False, 11: False, 12: False, 13: 0}
    rest |= {14: False, 15: False, 16: False, 17: 0, 18: False, 19: False, 20: False,
             21: False, 22: 0, 23: 0, 24: 0, 25: 0, 26: 0, 27: 0, 28: False,
             29: False, 30: False, 31: False, 32: False,
             33: 0, 34: 0, 35: 0, 36: 0, 37: False, 38: False, 39: False, 40: True, 41: 0,
             42: False, 43: False, 44: 0, 45: False, 46: False,
             47: 0, 48: 0, 49: 0, 50: False, 51: False, 52: False, 53: False,
             54: 0, 55: 0, 56: False, 57: False, 58: False, 59: False, 60: False,
             61: False}  # fmt: skip
    plain = only_launch(lse=False)["constants"]
    assert plain == rest | {
        0: False, 1: 0, 2: False, 3: False, 4: False, 5: True, 6: True, 7: True, 8: True,
    }  # fmt: skip
    assert only_launch()["constants"][0] is True
    assert only_launch(alibi=True)["constants"] | {0: True} == rest | {
        0: True, 1: 0, 2: False, 3: True, 4: False, 5: False, 6: True, 7: True, 8: True,
    }  # fmt: skip
    assert only_launch(softcap=5.0)["constants"][4] is True
    assert only_launch(softmax_scale=-1.0)["constants"][5] is False
    for prefix in (0, 3):
        launch = only_launch(others={"prefix_lens": np.array([prefix])})
        assert launch["constants"][21] is (prefix > 0)


@pytest.mark.parametrize("family", [7, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_tiles_fit_the_registers(head_dim: int, dtype: str, family: int) -> None:
    """Of M1 and M2, by the count of forward_shapes.h, which says what the limits are."""
    launch = only_launch(
        dtype=DTYPES[dtype], shape=(1, 50, 2, head_dim), head_dim_v=min(head_dim, 512),
        family=family,
    )  # fmt: skip
    d, dv, keys, fragments, _, split = shape(launch)
    of_q = 8 if launch["macros"]["UMFA_M"] == "half" else 4
    o, q = fragments * dv / split / 4, fragments * d / split / of_q
    assert o + fragments * keys * 3 / 8 + q + 20 <= (110 if head_dim <= 256 else 122)


def test_padded_channels_are_known() -> None:
    for head_dim, head_dim_v in ((64, 64), (72, 72), (64, 40), (40, 64), (192, 128)):
        launch = only_launch(shape=(1, 100, 4, head_dim), head_dim_v=head_dim_v)
        *dims, _, _, _, _ = shape(launch)
        assert launch["constants"][40] is (dims == [head_dim, head_dim_v])


def test_far_rows_are_known() -> None:
    """32 bits must hold the distance of any two rows of a tile, or of a page, in elements."""

    def is_near(row_stride: int, page_size: int = 0, page_stride: int = 0) -> bool:
        strides = (page_stride, row_stride, 32, 1)
        key = spread_out((2, page_size or 20, 1, 32), strides)
        query = np.zeros((2, 100, 1, 32), np.float16)
        tables = {"block_table": np.zeros((2, 4), np.int32)} if page_size else {}
        for launch in plan_of(query, key, key, query.copy(), **tables)["launches"]:
            if launch["kernel"].startswith("forward"):
                return bool(launch["constants"][8])
        raise AssertionError

    assert is_near(2**24 - 1)
    assert not is_near(2**24)
    assert is_near(2**21, 512, 2**30)
    assert not is_near(2**22, 512, 2**30)
    assert not is_near(32, 16, 2**31)


@pytest.mark.parametrize("page_size", [1, 7, 16, 48, 64])
def test_rows_of_pages_are_found_by_shifts_where_they_can(page_size: int) -> None:
    pages = np.zeros((8, page_size, 4, 64), np.float16)
    for seqlen_q in (1, 100):
        query = np.zeros((2, seqlen_q, 4, 64), np.float16)
        table = np.zeros((2, 4), np.int32)
        for launch in plan_of(query, pages, pages, query.copy(), block_table=table)["launches"]:
            is_power = page_size & (page_size - 1) == 0
            assert launch["constants"][30] is is_power


UNIT_MASK, WIDE_MASK = 28, 29


def test_pairs_of_a_mask_are_read_at_once_where_they_are_aligned() -> None:
    def found(mask: Any, seqlen_q: int = 100) -> tuple[bool, bool]:
        exported = _numpy.export(mask, "umfa.test", "attn_mask")
        shape = (1, seqlen_q, 4, 64)
        launch = plan(shape=shape, seqlen_kv=100, mask=exported)["launches"][0]
        assert launch["kernel"].startswith("forward" if seqlen_q > 8 else "decode")
        return launch["constants"][UNIT_MASK], launch["constants"][WIDE_MASK]

    for dtype in (np.bool_, np.float32, np.float16):
        memory = np.zeros((4, 100, 202), dtype)
        assert found(memory[..., :100]) == (True, True)
        assert found(memory[:, :1, 2:102]) == (True, True)
        assert found(memory[..., 1:101]) == (True, False)  # the first pair is not aligned
        assert found(memory[:, 0, :].reshape(4, 1, 202)[..., 100:200]) == (True, True)
        assert found(np.zeros((100, 101), dtype)[:, :100]) == (True, False)  # nor that of row 1
        assert found(memory[..., :200:2]) == (False, False)
        assert found(memory[..., :1]) == (False, False)
        # In decoding, a range of keys may begin at an odd one.
        assert found(memory[:, :4, :100], seqlen_q=4) == (True, False)
    # The last column has no neighbour.
    odd = _numpy.export(np.zeros((100, 200), np.float16)[:, :99], "umfa.test", "attn_mask")
    constants = only_launch(seqlen_kv=99, mask=odd)["constants"]
    assert (constants[UNIT_MASK], constants[WIDE_MASK]) == (True, False)


def tensors_of(made: dict[str, Any], launch: dict[str, Any]) -> set[str]:
    """Names of the tensors that a launch binds."""
    return {made["tensors"][i][0] for _, kind, i, _ in launch["buffers"] if kind == "tensor"}


def test_each_buffer_index_is_bound_once() -> None:
    made = plan(alibi=True)
    (launch,) = made["launches"]
    indices = [index for index, *_ in launch["buffers"]] + [launch["params_index"]]
    assert len(set(indices)) == len(indices)
    assert max(indices) <= 30
    assert tensors_of(made, launch) == {
        "query", "key", "value", "out", "lse", "alibi_slopes",
    }  # fmt: skip


def tail_of(params: bytes) -> tuple[float, ...]:
    """The numbers of ForwardParams, up to `right` of its Visible: what comes after is shorter."""
    return struct.unpack_from("<5i3f4i", params, len(params) - 64)


def test_parameters_fit_set_bytes_and_hold_the_problem() -> None:
    launch = only_launch(
        shape=(2, 100, 8, 40), seqlen_kv=70, nheads_kv=2, head_dim_v=24, window_size=(5, 7)
    )
    params = launch["params"]
    assert len(params) < 4096
    *integers, scale, softcap, mask_unit, seqlen_kv, offset, left, right = tail_of(params)
    assert integers == [100, 0, 40, 24, 4]
    assert (seqlen_kv, offset, left, right) == (70, 70 - 100, 5, 7)
    assert scale == np.float32(40**-0.5 * np.log2(np.e))
    assert softcap == 0
    assert mask_unit == np.float32(40**0.5)  # of raw scores: the scale comes last


def test_nothing_to_do_is_an_empty_plan() -> None:
    assert plan(shape=(1, 0, 4, 64))["launches"] == []
    assert plan(shape=(0, 10, 4, 64))["launches"] == []


@pytest.mark.parametrize(
    ("dtype", "head_dim", "wide"),
    [
        ("f16", 64, True),
        ("f16", 40, True),
        ("f16", 36, False),
        ("f32", 36, True),
        ("f32", 33, False),
    ],
)
def test_rows_are_read_in_16_bytes_where_they_come_in_them(
    dtype: str, head_dim: int, wide: bool
) -> None:
    launch = only_launch(dtype=DTYPES[dtype], shape=(1, 50, 2, head_dim))
    assert launch["constants"][7] is wide


def aligned(shape: tuple[int, ...], extra: int = 0) -> np.ndarray:
    """float16 zeros that start `extra` elements after a multiple of 16 bytes."""
    memory = np.zeros(int(np.prod(shape)) + 16, np.float16)
    skip = -memory.ctypes.data % 16 // 2 + extra
    return memory[skip : skip + int(np.prod(shape))].reshape(shape)


@pytest.mark.parametrize(
    ("key", "wide"),
    [
        (aligned((1, 50, 2, 64)), True),
        (aligned((1, 50, 2, 64), 1), False),
        (aligned((1, 50, 2, 64), 8), True),
        (aligned((1, 50, 2, 72))[..., :64], True),
        (aligned((1, 50, 2, 68))[..., :64], False),
        (aligned((1, 50, 2, 128))[..., ::2], False),
        (aligned((1, 50, 2, 64)).transpose(0, 1, 3, 2).copy().transpose(0, 1, 3, 2), False),
    ],
    ids=["plain", "odd start", "16 bytes on", "padded rows", "odd rows", "gaps", "transposed"],
)  # fmt: skip
def test_wide_reads_need_aligned_rows(key: np.ndarray, wide: bool) -> None:
    query = aligned((1, 50, 2, 64))
    made = plan_of(query, key, query, aligned((1, 50, 2, 64)))
    assert made["launches"][0]["constants"][7] is wide


# ---- decode --------------------------------------------------------------------------------------


def splits_of(made: dict[str, Any]) -> tuple[int, int]:
    """(keys per split, splits) of a decode plan."""
    _, _, keys, splits, heads, _ = struct.unpack("<6i", made["launches"][0]["params"][-24:])
    assert heads == 8
    return keys, splits


@pytest.mark.parametrize("seqlen_kv", [1, 31, 255, 256, 1000, 16384, 100_001])
@pytest.mark.parametrize("cores", [8, 40, 132])
def test_splits_cover_the_keys_and_fill_the_gpu(seqlen_kv: int, cores: int) -> None:
    made = plan(shape=(1, 1, 8, 64), seqlen_kv=seqlen_kv, nheads_kv=2, cores=cores)
    keys, splits = splits_of(made)
    assert (splits - 1) * keys < seqlen_kv <= splits * keys
    assert made["launches"][0]["grid"] == (splits, 2, 1)
    assert splits * 2 <= 4 * cores + 1
    if seqlen_kv >= 128 * 4 * cores:  # enough for everyone
        assert splits * 2 > 2 * cores


@pytest.mark.parametrize("seqlen_kv", [1, 40, 1000, 16384])
@pytest.mark.parametrize("num_splits", [1, 2, 3, 7, 1000])
def test_the_caller_bounds_the_splits(num_splits: int, seqlen_kv: int) -> None:
    """Whole rounds of 32 keys each; 1 is none."""
    arguments = {"shape": (1, 1, 8, 64), "seqlen_kv": seqlen_kv, "nheads_kv": 2}
    made = plan(**arguments, num_splits=num_splits)
    keys, splits = splits_of(made)
    assert keys % 32 == 0
    assert (splits - 1) * keys < seqlen_kv <= splits * keys
    assert splits <= num_splits
    assert keys == -(-seqlen_kv // (32 * num_splits)) * 32
    assert len(made["launches"]) == (1 if splits == 1 else 2)
    chosen = plan(**arguments, num_splits=0)
    assert splits_of(chosen) == splits_of(plan(**arguments))


def test_splits_of_sequences_are_bounded_too() -> None:
    others = {"seqused_k": np.array([3000, 100])}
    made = plan(
        shape=(2, 1, 8, 64), seqlen_kv=4000, nheads_kv=2, others=others,
        num_splits=3,
    )  # fmt: skip
    keys, splits = splits_of(made)
    assert (keys, splits) == (1024, 3)
    assert made["launches"][0]["grid"] == (3 + 1, 2, 1)


def test_many_queries_have_nothing_to_split() -> None:
    arguments = {"shape": (1, 50, 8, 64), "seqlen_kv": 4000}
    assert plan(**arguments, num_splits=5) == plan(**arguments)


def test_scratch_holds_every_part() -> None:
    made = plan(shape=(3, 2, 8, 64), seqlen_kv=5000, nheads_kv=2, head_dim_v=40)
    _, splits = splits_of(made)
    assert made["scratch_bytes"] == [3 * 8 * 2 * splits * 40 * 4, 3 * 8 * 2 * splits * 8]
    decode, merge = made["launches"]
    pieces = [(i, p) for i, kind, p, _ in decode["buffers"] if kind == "scratch"]
    merged = [(i, p) for i, kind, p, _ in merge["buffers"] if kind == "scratch"]
    assert pieces == [(DECODE["PARTIAL_OUT"], 0), (DECODE["PARTIAL_STATE"], 1)]
    assert merged == [(MERGE["PARTIAL_OUT"], 0), (MERGE["PARTIAL_STATE"], 1)]
    assert merge["grid"] == (2, 8, 3)


def test_few_keys_need_no_merge() -> None:
    made = plan(shape=(1, 1, 8, 64), seqlen_kv=200)
    assert len(made["launches"]) == 1
    assert made["scratch_bytes"] == [4, 8], "one element for each buffer of partial results"


def test_a_window_is_all_that_is_split() -> None:
    made = plan(shape=(1, 1, 8, 64), seqlen_kv=100_000, window_size=(255, 0))
    first, last = struct.unpack("<2i", made["launches"][0]["params"][-24:-16])
    assert (first, last) == (100_000 - 256, 100_000)


@pytest.mark.parametrize(("seqlen_q", "decodes"), [(1, True), (8, True), (9, False)])
def test_few_queries_are_decoded(seqlen_q: int, decodes: bool) -> None:
    launches = plan(shape=(1, seqlen_q, 8, 64), seqlen_kv=100)["launches"]
    assert launches[0]["kernel"].startswith("decode" if decodes else "forward")


def test_rows_beyond_a_threadgroup_get_more_of_them() -> None:
    """8 queries of 6 heads are 48 rows: three blocks of 16."""
    made = plan(shape=(1, 8, 12, 64), seqlen_kv=64, nheads_kv=2)
    assert made["launches"][0]["macros"]["UMFA_SHAPE"] == "64, 64, 2, 4"
    assert made["launches"][0]["grid"] == (1, 2 * 3, 1)


# ---- masks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask_shape", "strides"),
    [
        ((2, 4, 50, 70), (14000, 3500, 70, 1)),
        ((4, 50, 70), (0, 3500, 70, 1)),
        ((50, 70), (0, 0, 70, 1)),
        ((2, 1, 1, 70), (70, 0, 0, 1)),
        ((2, 1, 50, 1), (50, 0, 1, 0)),
        ((70,), (0, 0, 0, 1)),
        ((), (0, 0, 0, 0)),
    ],
)
def test_masks_broadcast_by_stride(mask_shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    mask = np.zeros(mask_shape, np.float32)
    launch = only_launch(shape=(2, 50, 4, 64), seqlen_kv=70, mask=mask)
    assert struct.unpack("<4q", launch["params"][5 * 32 : 5 * 32 + 32]) == strides
    assert launch["constants"][1] == 2


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (np.zeros((50, 71), bool), ValueError, r"attn_mask has the wrong shape; got \(50, 71\)"),
        (np.zeros((3, 1, 50, 70), bool), ValueError, r"got \(3, 1, 50, 70\); .*\(2, 4, 50, 70\)"),
        (np.zeros((1, 2, 4, 50, 70), bool), ValueError, r"got \(1, 2, 4, 50, 70\)"),
        (np.zeros((50, 70), np.int32), TypeError, r"attn_mask has the wrong dtype; got int32"),
        (
            np.zeros((50, 70), np.float64),
            umfa.UnsupportedError,
            r"attn_mask has the wrong dtype; got float64",
        ),
    ],
    ids=["columns", "batch", "5-D", "int", "double"],
)
def test_masks_that_do_not_fit(mask: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plan(shape=(2, 50, 4, 64), seqlen_kv=70, mask=mask)


@pytest.mark.parametrize(("alignment", "offset"), [("bottom_right", 20), ("top_left", 0)])
def test_causal_alignment(alignment: str, offset: int) -> None:
    launch = only_launch(
        shape=(1, 50, 4, 64), seqlen_kv=70, causal=True, causal_alignment=alignment
    )
    assert tail_of(launch["params"])[9:] == (offset, 2**31 - 1, 0)  # unbounded on the left


# ---- sequences -----------------------------------------------------------------------------------


def piece_of(launch: dict[str, Any], name: str) -> int:
    """Which of the plan's data a launch finds at one of its indices."""
    index = layout_of(launch)[name]
    (piece,) = (p for i, kind, p, _ in launch["buffers"] if (i, kind) == (index, "data"))
    return int(piece)


def data_of(made: dict[str, Any], launch: dict[str, Any], name: str) -> bytes:
    return made["data"][piece_of(launch, name)]


SEQUENCE = "<6q5i20x"  # SequenceParams, without the end of its Visible


def test_sequences_are_data_of_the_plan() -> None:
    others = {
        "seqused_k": np.array([70, 3]),
        "cache_batch_idx": np.array([1, 0]),
        "cache_leftpad": np.array([20, 0]),
    }
    made = plan(shape=(2, 50, 4, 64), seqlen_kv=80, others=others)
    (launch,) = made["launches"]
    # seqlen_q, splits, position_q; seqlen_kv, offset
    found = list(struct.iter_unpack(SEQUENCE, data_of(made, launch, "SEQUENCES")))
    assert found == [
        (0, 0, 1, 20, 0, 0, 50, 0, 0, 50, 0),
        (1, 0, 0, 0, 0, 0, 50, 0, -47, 3, -47),
    ]
    tasks = [task[:2] for task in struct.iter_unpack("<4i", data_of(made, launch, "TASKS"))]
    rows = shape_rows(launch)
    assert tasks == [(b, row) for b in (0, 1) for row in range(0, 50, rows)]
    assert launch["constants"][10] is True
    assert launch["constants"][11] is False


def test_pages_are_one_table_for_all_launches() -> None:
    table = np.array([[4, 1, 0], [3, 3, 3]])
    others = {
        "cu_seqlens_q": np.array([0, 40, 41]), "seqused_k": np.array([25, 12]),
        "block_table": table,
    }  # fmt: skip
    tensors = {
        "query": np.zeros((41, 4, 64), np.float16), "key": np.zeros((5, 10, 2, 64), np.float16),
        "value": np.zeros((5, 10, 2, 64), np.float16), "out": np.zeros((41, 4, 64), np.float16),
    }  # fmt: skip
    made = plan_of(**tensors, **others)
    forward, decode = made["launches"]
    for launch in (forward, decode):
        assert launch["constants"][11] is True
        pages = struct.unpack("<6i", data_of(made, launch, "PAGES"))
        assert pages == (4, 1, 0, 3, 3, 0)  # of those in use
    assert len(made["data"]) == 5
    places = list(struct.iter_unpack(SEQUENCE, data_of(made, decode, "SEQUENCES")))
    assert [place[4] for place in places] == [0, 3]


# ---- rotary, append, dropout, qv -----------------------------------------------------------------

LENGTHS = {"seqused_k": np.array([60, 3]), "seqused_q": np.array([50, 2])}


def rotary(positions: int = 200, channels: int = 32) -> dict[str, Any]:
    table = np.zeros((positions, channels // 2), np.float32)
    return {"rotary_cos": table, "rotary_sin": table}


def new_rows(rows: int, head_dim: int = 64) -> dict[str, Any]:
    return {name: np.zeros((2, rows, 4, head_dim), np.float16) for name in ("new_key", "new_value")}


def test_appending_comes_first() -> None:
    others = {**LENGTHS, **new_rows(20), **rotary()}
    made = plan(shape=(2, 50, 4, 64), seqlen_kv=90, others=others)
    append, clear, forward, decode = made["launches"]
    kernels = [x["kernel"].split("_")[0] for x in made["launches"]]
    assert kernels == ["append", "clear", "forward", "decode"]
    assert append["grid"] == (6, 4, 1)  # 8 rows each
    assert tensors_of(made, append) == {
        "key", "value", "new_key", "new_value", "rotary_cos", "rotary_sin",
    }  # fmt: skip
    for launch in (forward, decode):
        assert launch["constants"][14] is True
        assert launch["constants"][15] is False  # they were rotated on their way into the cache
    assert tensors_of(made, clear) == {"out", "lse"}
    assert {name for name, written in made["tensors"] if written} == {
        "key", "value", "out", "lse",
    }  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_appending_has_a_kernel_compiled_ahead(dtype: str) -> None:
    others = {name: x.astype(DTYPES[dtype]) for name, x in new_rows(1).items()} | {
        "seqused_k": np.array([60, 3])
    }
    append, *_ = plan(DTYPES[dtype], (2, 50, 4, 64), 90, others=others)["launches"]
    assert append["kernel"] in host_names("append.metal")
    assert host_names("append.metal") == {f"append_{name}" for name in DTYPES}


def test_one_table_of_pages_for_appending_too() -> None:
    others = {
        "new_key": np.zeros((2, 3, 4, 64), np.float16),
        "new_value": np.zeros((2, 3, 4, 64), np.float16),
        "seqused_k": np.array([30, 7]), "block_table": np.array([[1], [0]]),
    }  # fmt: skip
    made = plan(shape=(2, 5, 4, 64), seqlen_kv=40, others=others)
    append, decode = made["launches"]
    for launch in (append, decode):
        assert data_of(made, launch, "PAGES") == struct.pack("<2i", 1, 0)
    assert len({piece_of(launch, "PAGES") for launch in made["launches"]}) == 1


@pytest.mark.parametrize("seqlen_q", [1, 50])
def test_keys_are_rotated_where_they_are_staged(seqlen_q: int) -> None:
    (launch,) = plan(shape=(1, seqlen_q, 4, 64), seqlen_kv=100, others=rotary())["launches"]
    assert launch["kernel"].startswith("forward")
    assert [launch["constants"][i] for i in range(14, 18)] == [True, True, True, 2]


@pytest.mark.parametrize(
    ("dtype", "channels", "wide"),
    [
        (np.float16, 32, True),
        (np.float16, 24, False),
        (np.float32, 24, True),
        (np.float32, 20, False),
    ],
)
def test_keys_are_rotated_32_bytes_at_a_time(dtype: Any, channels: int, wide: bool) -> None:
    """Where the rotated channels are whole such pieces, and so are their angles in float32."""
    launch = only_launch(dtype=dtype, seqlen_kv=100, others=rotary(channels=channels))
    assert launch["constants"][20] is wide


@pytest.mark.parametrize("seqlen_q", [1, 50])
def test_values_meet_queries_where_they_are_staged(seqlen_q: int) -> None:
    others = {"qv": np.zeros((1, seqlen_q, 4, 512), np.float16)}
    launch = only_launch(shape=(1, seqlen_q, 4, 64), seqlen_kv=100, head_dim_v=512, others=others)
    assert launch["kernel"] == "forward_f16_d64_v512_k16"
    assert launch["constants"][19] is True


@pytest.mark.parametrize(
    ("head_dim", "head_dim_v", "expected"),
    [(64, 512, [64, 512]), (65, 512, [512, 512]), (300, 300, [512, 512]), (513, 8, [576, 512])],
)
def test_large_head_dims(head_dim: int, head_dim_v: int, expected: list[int]) -> None:
    """64 channels of keys are not padded to the 512 of the values, nor 300 to 576."""
    assert shape(only_launch(shape=(1, 50, 2, head_dim), head_dim_v=head_dim_v))[:2] == expected


def test_no_buffer_index_is_bound_twice_in_a_call_that_has_everything() -> None:
    """Of the launches of a call that has everything."""
    others = {
        **LENGTHS, **new_rows(20), **rotary(), "qv": np.zeros((2, 50, 4, 64), np.float16),
        "learnable_sink": np.zeros(4, np.float32),
    }  # fmt: skip
    launches = plan(
        shape=(2, 50, 4, 64), seqlen_kv=90, alibi=True, mask=np.zeros((50, 90), bool),
        others=others, dropout_p=0.5,
    )["launches"]  # fmt: skip
    for launch in launches:
        indices = [index for index, *_ in launch["buffers"]] + [launch["params_index"]]
        assert len(set(indices)) == len(indices)
        assert max(indices) <= 30
        assert len(launch["params"]) < 4096


@pytest.mark.parametrize("seqlen_q", [1, 50])
def test_every_buffer_of_a_layout_is_bound_where_a_call_has_everything(seqlen_q: int) -> None:
    """A tensor's name that the planner misspelt would leave its index empty."""
    others = {
        **rotary(3100), "block_table": np.arange(200).reshape(2, 100),
        "seqused_k": np.array([3000, 60]), "learnable_sink": np.zeros(4, np.float32),
        "new_key": np.zeros((2, 3, 4, 64), np.float16),
        "new_value": np.zeros((2, 3, 4, 64), np.float16),
        "seqused_q": np.array([seqlen_q, 0]),
    }  # fmt: skip
    if seqlen_q == 50:
        others["qv"] = np.zeros((2, 50, 4, 64), np.float16)
    query = np.zeros((2, seqlen_q, 4, 64), np.float16)
    pages = np.zeros((200, 32, 4, 64), np.float16)
    tensors = {
        "query": query, "key": pages, "value": pages.copy(), "out": query.copy(),
        "alibi_slopes": np.zeros(4, np.float32), "lse": np.zeros((2, 4, seqlen_q), np.float32),
        "attn_mask": np.zeros((seqlen_q, 3200), np.float32),
    }  # fmt: skip
    made = plan_of(**tensors, **others, dropout_p=0.5)
    kinds = [layout_of(launch) for launch in made["launches"]]
    assert len(kinds) == (4 if seqlen_q == 1 else 3)
    for launch, indices in zip(made["launches"], kinds, strict=True):
        bound = {index for index, *_ in launch["buffers"]} | {launch["params_index"]}
        assert launch["buffer_count"] == len(indices)
        missing = {name for name, index in indices.items() if index not in bound}
        # Of many queries nothing is split. Codes take no new keys (test_plan_codes.py).
        parts = {"SPLIT", "PARTIAL_OUT", "PARTIAL_STATE"}
        absent = {"SPLIT", *parts} if seqlen_q == 50 else {"QV"}
        codes = CODES if indices in (FORWARD, DECODE) else set()
        assert missing == codes | (absent if indices == FORWARD else set())


@pytest.mark.parametrize("seqlen_q", [1, 50])
def test_dropout_reaches_whoever_divides(seqlen_q: int) -> None:
    """The kernel that drops, and the merge of what it found; in units of 2^-32."""
    made = plan(
        shape=(1, seqlen_q, 8, 64), seqlen_kv=5000, nheads_kv=2,
        dropout_p=0.25, dropout_seed=1,
    )  # fmt: skip
    first, *merge = made["launches"]
    for launch in made["launches"]:
        assert launch["constants"][18] is True
    assert struct.pack("<I", 2**30) in first["params"]
    factor = struct.pack("<f", np.float32(1 / 0.75))
    assert factor in first["params"]
    assert all(factor in launch["params"] for launch in merge)
    assert len(merge) == (1 if seqlen_q == 1 else 0)


def test_dropout_starts_at_whole_runs_of_keys() -> None:
    arguments = {"shape": (1, 1, 8, 64), "seqlen_kv": 100_000, "nheads_kv": 8}
    for p, begin in ((0.0, 99_701), (0.5, 99_696)):
        made = plan(**arguments, window_size=(298, -1), dropout_p=p)
        first, last = struct.unpack("<2i", made["launches"][0]["params"][-24:-16])
        assert (first, last) == (begin, 100_000)


# ---- decode by tiles -----------------------------------------------------------------------------

PACKS_HEADS = 32
TILES: dict[str, dict[str, Any]] = {
    "head_dim": {"shape": (1, 1, 8, 320), "nheads_kv": 2},
    "mla": {"shape": (1, 2, 16, 576), "nheads_kv": 1, "head_dim_v": 512},
    "qv": {"shape": (1, 1, 8, 64), "nheads_kv": 2, "others": {"qv": np.zeros((1, 1, 8, 64), "f2")}},
    "rotary": {"shape": (1, 1, 8, 64), "nheads_kv": 2, "others": rotary(20000)},
}
"""What the decode kernel does not have."""


@pytest.mark.parametrize("cores", [8, 40])
@pytest.mark.parametrize("name", TILES)
def test_tiles_of_few_queries_split_the_keys(name: str, cores: int) -> None:
    arguments = TILES[name] | {"seqlen_kv": 16384, "cores": cores}
    forward, merge = plan(**arguments)["launches"]
    assert forward["constants"][PACKS_HEADS] is True
    assert merge["kernel"].startswith("decode_merge_f16_d")
    batch, seqlen_q, nheads, _ = arguments["shape"]
    blocks = -(-(nheads // arguments["nheads_kv"] * seqlen_q) // shape_rows(forward))
    splits, y, z = forward["grid"]
    assert (y, z) == (blocks * arguments["nheads_kv"], batch)
    threadgroups = cores * max(1, 12 // shape(forward)[4])
    assert threadgroups / 2 < splits * y <= max(threadgroups, y)
    unsplit = plan(**arguments, num_splits=1)["launches"]
    assert [launch["grid"][0] for launch in unsplit] == [1]
    (alone,) = plan(**arguments, batch_invariant=True)["launches"]
    assert alone["constants"][PACKS_HEADS] is False
