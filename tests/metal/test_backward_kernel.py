"""Gradients on the emulated GPU, against float64."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.array_libraries import DTYPES
from tests.metal import emulated
from tests.metal.backward_calls import Call, bits
from tests.metal.emulated import MACHINES
from tests.sequences import rotary_tables

pytestmark = pytest.mark.usefixtures("own_settings")

SLOPES = np.array([0.5, 0.125], np.float32)
RNG = np.random.default_rng(5)
SEEN = RNG.random((1, 2, 70, 100)) < 0.8
SEEN[:, :, 11] = False  # a row that sees nothing
BIAS = np.where(SEEN, RNG.standard_normal(SEEN.shape), -np.inf).astype(np.float32)

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "top left": {"causal": True, "causal_alignment": "top_left"},
    "window": {"window_size": (20, 9)},
    "chunk": {"causal": True, "attention_chunk": 24},
    "chunk offset": {"attention_chunk": 24, "attention_chunk_offset": 7},
    "softcap": {"softcap": 3.0, "softmax_scale": 0.3},
    "negative scale": {"softmax_scale": -0.3},
    "ALiBi": {"causal": True, "alibi_slopes": SLOPES},
    "bool mask": {"attn_mask": SEEN},
    "mask": {"attn_mask": BIAS},
    "mask of keys": {"attn_mask": SEEN[:, :, :1]},
    "mask of rows": {"attn_mask": BIAS[:, :1, :, :1].copy()},
    "sinks": {"learnable_sink": np.array([0.5, 3.0], np.float32)},
    "dropout": {"dropout_p": 0.3, "dropout_seed": 5},
}  # fmt: skip

IN_EVERY_RUN = ["chunk", "ALiBi", "mask", "dropout"]


@pytest.mark.parametrize(
    "name",
    [x if x in IN_EVERY_RUN else pytest.param(x, marks=pytest.mark.slow) for x in OPTIONS],
)
def test_options(name: str) -> None:
    Call(options=OPTIONS[name], heads_k=2 if name in ("window", "mask") else 1).check()


@pytest.mark.parametrize("has_qv", [False, True])
def test_gradients_with_gaps_between_channels(has_qv: bool) -> None:
    call = Call(options={"causal": True}, has_qv=has_qv)
    wanted = ("dq", "dk", "dv", *(["dqv"] if has_qv else []))
    close = call.run(wanted)
    assert unit_channels() == {True}
    for found in (call.run(wanted, channel_step=3), call.run(wanted[:1], channel_step=3)):
        assert unit_channels() == {False}
        for name, gradient in found.items():
            np.testing.assert_array_equal(gradient, close[name])
            between = gradient.base.reshape(*gradient.shape, 3)[..., 1:]
            assert np.isnan(between).all()


def unit_channels() -> set[bool]:
    """What the kernels of the last plan are told of strides."""
    launches = emulated.last_plan["launches"]
    return {x["constants"][6] for x in launches if not x["kernel"].startswith("delta")}


SEQUENCES: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "prefix": {"causal": True, "prefix_lens": np.array([9, 0, 40, 3, 70], np.int32)},
    "window": {"window_size": (20, 3), "alibi_slopes": np.abs(RNG.normal(size=(5, 2)))},
    "mask": {"attn_mask": RNG.random((5, 1, 60, 99)) < 0.7, "causal_alignment": "top_left"},
    "dropout": {"dropout_p": 0.4, "dropout_seed": 9, "attention_chunk": 16},
}  # fmt: skip


@pytest.mark.parametrize(
    "name", ["prefix", *(pytest.param(x, marks=pytest.mark.slow) for x in SEQUENCES)]
)
def test_sequences(name: str) -> None:
    """Packed: some without queries, some without keys, some with more queries than keys."""
    options = {
        k: v.astype(np.float32) if k == "alibi_slopes" else v for k, v in SEQUENCES[name].items()
    }
    lengths = {"lengths_q": [33, 0, 5, 60, 60], "lengths_k": [70, 20, 0, 99, 31]}
    Call(**lengths, dtype="float16", options=options, dlse=True).check()


# Head dims of q and v, dtype and GPU family: every row of backward_shapes.h.
SHAPES = [
    (40, 24, "bfloat16", 9), (256, 256, "float16", 7), (128, 128, "float32", 7),
    (80, 80, "bfloat16", 7), (576, 512, "float16", 9),
]  # fmt: skip
MORE_SHAPES = [
    (d, dv, dtype, family)
    for d, dv in [(32, 32), (64, 64), (80, 80), (96, 96), (128, 128), (160, 160), (192, 128),
                  (192, 192), (256, 256), (7, 130), (40, 512), (320, 320), (512, 512), (576, 512)]
    for dtype, family in [("float16", 7), ("float16", 9), ("bfloat16", 9), ("bfloat16", 8),
                          ("float32", 10)]
]  # fmt: skip


@pytest.mark.parametrize(
    ("head_dim", "head_dim_v", "dtype", "family"),
    [
        *SHAPES,
        *(pytest.param(*x, marks=pytest.mark.slow) for x in MORE_SHAPES if x not in SHAPES),
    ],
)
def test_shapes(head_dim: int, head_dim_v: int, dtype: str, family: int) -> None:
    emulated.settings.family = family
    Call(
        [45], [61], heads=4, heads_k=2, head_dim=head_dim, head_dim_v=head_dim_v, dtype=dtype,
        options={"causal": True}, dlse=True,
    ).check()  # fmt: skip


def wide_options(name: str) -> dict[str, Any]:
    cos, sin = rotary_tables(100, 576 if name == "rotary" else 64)
    return {
        "scores": {
            "causal": True, "softcap": 5.0, "dropout_p": 0.3, "dropout_seed": 5,
            "attn_mask": BIAS[:, :, :45, :61].copy(), "alibi_slopes": SLOPES,
            "learnable_sink": np.array([0.5, 3.0], np.float32),
        },
        "window": {"window_size": (20, 9)},
        "sequences": {"causal": True, "prefix_lens": np.array([9, 0, 40], np.int32)},
        "rotary": {"causal": True, "rotary_cos": cos, "rotary_sin": sin},
        "halves": {
            "rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": False,
            "attn_mask": BIAS[:, :1, :1, :61].copy(),
        },
    }[name]  # fmt: skip


# Options, head dims of q and v, whether there is qv, dtype and GPU family.
WIDE = [
    ("scores", 320, 40, False, "float16", 7), ("window", 576, 512, True, "float32", 9),
    ("rotary", 576, 512, False, "bfloat16", 7),
]  # fmt: skip
MORE_WIDE = [
    (name, d, dv, has_qv, dtype, family)
    for name, d, dv, has_qv in [("scores", 576, 512, False), ("scores", 64, 512, True),
                                ("window", 576, 512, True), ("sequences", 576, 300, True),
                                ("rotary", 576, 512, False), ("halves", 512, 512, True)]
    for dtype, family in [("float16", 7), ("bfloat16", 8), ("bfloat16", 9), ("float32", 10)]
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "head_dim", "head_dim_v", "has_qv", "dtype", "family"),
    [
        WIDE[0],
        *(pytest.param(*x, marks=pytest.mark.slow) for x in (*WIDE[1:], *MORE_WIDE)),
    ],
)
def test_options_of_head_dims_above_256(
    name: str, head_dim: int, head_dim_v: int, has_qv: bool, dtype: str, family: int
) -> None:
    """Tiles that take each other's place in threadgroup memory."""
    emulated.settings.family = family
    options = wide_options(name)
    lengths = ([33, 0, 60], [70, 20, 99]) if name == "sequences" else ([45], [61])
    call = Call(
        *lengths, head_dim=head_dim, head_dim_v=head_dim_v, dtype=dtype, options=options,
        has_qv=has_qv, dlse=True,
    )  # fmt: skip
    wanted = ("dq", "dk", "dv", *(["dqv"] if has_qv else []))
    wanted += tuple(x for x, field in OF_OPTIONS.items() if is_float(options.get(field)))
    found = call.check(wanted)
    if name == "scores":
        return
    for alone in ("dk", "dv"):  # without the other, fewer tiles are staged
        array = call.run((alone,))[alone]
        np.testing.assert_array_equal(bits(array), bits(found[alone]), alone)


@pytest.mark.parametrize(
    ("wanted", "float32"),
    [(("dq",), True), (("dk",), True), pytest.param(("dv",), True, marks=pytest.mark.slow)],
)
def test_what_is_wanted_alone_has_the_same_bits(wanted: tuple[str, ...], float32: bool) -> None:
    call = Call([45], [61], dtype="float16", options={"causal": True})
    (name,) = wanted
    alone = call.run(wanted, float32=float32)
    assert list(alone) == [name]
    assert alone[name].dtype == np.float32
    together = call.run()[name]
    np.testing.assert_array_equal(bits(alone[name].astype(np.float16)), bits(together))


OF_OPTIONS = {"dmask": "attn_mask", "dsinks": "learnable_sink", "dalibi_slopes": "alibi_slopes"}
"""Gradients of options that are sums over rows."""


def is_float(array: Any) -> bool:
    return array is not None and array.dtype != bool


ROWS_OF_SUMS = [([70], [100]), ([33, 0, 5, 60], [70, 20, 0, 99])]
"""Fewer than threads and more, in one sequence and in some that are packed."""


@pytest.mark.parametrize(
    ("dtype", "of_sinks", "lengths"),
    [
        ("float32", "float16", ROWS_OF_SUMS[1]),
        pytest.param("float16", "bfloat16", ROWS_OF_SUMS[0], marks=pytest.mark.slow),
        pytest.param("bfloat16", "float32", ROWS_OF_SUMS[1], marks=pytest.mark.slow),
        pytest.param("float16", "float32", ([5] * 70, [9] * 70), marks=pytest.mark.slow),
    ],
)
def test_sinks(dtype: str, of_sinks: str, lengths: tuple[list[int], list[int]]) -> None:
    """Some rows see no key: the sink has all of their weight. One head has none."""
    sinks = np.array([0.5, -np.inf, 3.0, -20.0]).astype(DTYPES[of_sinks])
    options = {"learnable_sink": sinks, "causal": True, "causal_alignment": "bottom_right"}
    call = Call(*lengths, heads=4, heads_k=2, head_dim=32, dtype=dtype, options=options, dlse=True)
    found = call.check(("dsinks",))["dsinks"]
    assert found.dtype == DTYPES[of_sinks]
    assert found[1] == 0
    alone = call.run(("dsinks", "dq"), float32=True)["dsinks"]
    np.testing.assert_array_equal(bits(alone.astype(found.dtype)), bits(found))


@pytest.mark.parametrize(
    ("dtype", "head_dim", "lengths", "by_sequence"),
    [
        ("float16", 256, ROWS_OF_SUMS[1], True),
        pytest.param("float32", 32, ROWS_OF_SUMS[0], False, marks=pytest.mark.slow),
        pytest.param("float16", 64, ROWS_OF_SUMS[1], False, marks=pytest.mark.slow),
        pytest.param("bfloat16", 128, ([70] * 3, [41] * 3), True, marks=pytest.mark.slow),
        pytest.param("bfloat16", 64, ([70] * 3, [41] * 3), False, marks=pytest.mark.slow),
    ],
)
def test_slopes(
    dtype: str, head_dim: int, lengths: tuple[list[int], list[int]], by_sequence: bool
) -> None:
    slopes = RNG.uniform(0, 0.3, (len(lengths[0]), 2) if by_sequence else 2).astype(np.float32)
    options = {"alibi_slopes": slopes, "causal": True, "softcap": 4.0}
    call = Call(*lengths, head_dim=head_dim, dtype=dtype, options=options, dlse=True)
    alone = call.check(("dalibi_slopes",))
    found = call.check(("dalibi_slopes", "dq", "dv"))
    np.testing.assert_array_equal(found["dalibi_slopes"], alone["dalibi_slopes"])


# Shape of the mask for sequences of 70 and 100 rows, or packed ones of at most 60 and 99; dtypes of
# the mask and of the call; head dim.
MASKS = [
    ((2, 4, 70, 100), "float32", "float16", 64),
    ((2, 1, 1, 100), "float16", "float32", 256), ((1, 4, 70, 1), "float32", "float16", 64),
    ((1, 4, 1, 1), "float32", "float32", 40), ((2, 1, 60, 101), "float16", "float16", 64),
]  # fmt: skip
MORE_MASKS = [
    (shape, of_mask, dtype, 128)
    for shape in [(1, 1, 1, 1), (2, 1, 1, 1), (1, 1, 1, 100), (1, 4, 70, 100), (2, 4, 70, 1),
                  (1, 1, 60, 99), (2, 4, 62, 1), (1, 4, 1, 99)]
    for of_mask, dtype in [("float32", "bfloat16"), ("float16", "float32")]
] + [((1, 1, 70, 100), "bfloat16", "float32", 40)]  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "of_mask", "dtype", "head_dim"),
    [*MASKS[:2], *(pytest.param(*x, marks=pytest.mark.slow) for x in (*MASKS[2:], *MORE_MASKS))],
)
def test_mask(shape: tuple[int, ...], of_mask: str, dtype: str, head_dim: int) -> None:
    """Of every shape that broadcasts; some elements are -inf, whose gradient is exactly 0. Without
    sinks one number for all would have a gradient of 0."""
    packed = not {70, 100} & {*shape} and shape[2:] != (1, 1)
    lengths = ([33, 60], [99, 31]) if packed else ([70, 70], [100, 100])
    rng = np.random.default_rng([*shape, head_dim])
    mask = rng.standard_normal(shape)
    if mask[0].size > 4:
        mask[rng.random(shape) < 0.2] = -np.inf
    options = {
        "attn_mask": mask.astype(DTYPES[of_mask]), "causal": not packed, "softcap": 5.0,
        "learnable_sink": rng.standard_normal(4).astype(np.float32),
        "alibi_slopes": rng.uniform(0, 0.1, 4).astype(np.float32),
    }  # fmt: skip
    call = Call(
        *lengths, heads=4, heads_k=2, head_dim=head_dim, dtype=dtype, options=options, dlse=True
    )
    found = call.check(("dmask",))["dmask"]
    assert found.dtype == DTYPES[of_mask]
    assert (found[np.isneginf(mask)] == 0).all()
    wide = call.check(("dmask", "dq"), float32=True)["dmask"]
    np.testing.assert_array_equal(bits(wide.astype(found.dtype)), bits(found))


@pytest.mark.parametrize(
    ("dtype", "of_mask"),
    [("float32", "float32"), pytest.param("bfloat16", "bfloat16", marks=pytest.mark.slow)],
)
def test_rows_of_the_lowest_number_add_nothing(dtype: str, of_mask: str) -> None:
    """As on the CPU: their log-sum-exp does not tell how many keys share it."""
    mask = np.zeros((1, 1, 45, 61), DTYPES[of_mask])
    mask[:, :, 30] = ml_dtypes.finfo(mask.dtype).min
    call = Call([45], [61], dtype=dtype, options={"attn_mask": mask})
    found = call.run()
    call.tensors["dout"][0][30] = 0
    for name, array in call.run().items():
        np.testing.assert_array_equal(bits(array[0]), bits(found[name][0]), name)
    assert not found["dq"][0][30].any()


def test_gradient_of_a_mask_keeps_hidden_nan_out() -> None:
    keys, queries = [3, 31, 32, 60], [0, 7, 33]
    mask = np.zeros((1, 1, 45, 61), np.float32)
    mask[..., keys] = -np.inf
    mask[:, :, queries] = -np.inf
    clean, spoiled = (
        Call([45], [61], dtype="float16", options={"attn_mask": mask}) for _ in range(2)
    )
    for name in ("key", "value", "query", "dout"):
        rows = keys if name in ("key", "value") else queries
        clean.tensors[name][0][rows, :, ::3] = 0
        spoil(spoiled, name, rows, np.nan)
    spoiled.results = clean.results = [clean.forward(0)]
    right, found = (call.run(("dmask",))["dmask"] for call in (clean, spoiled))
    np.testing.assert_array_equal(bits(found), bits(right))
    assert (found[0, 0, :, keys] == 0).all()
    assert (found[0, 0, queries] == 0).all()


@pytest.mark.parametrize(
    ("dtype", "head_dim", "channels", "interleaved"),
    [
        ("float32", 64, 24, True),
        *(
            pytest.param(*x, marks=pytest.mark.slow)
            for x in [("float16", 64, 64, False), ("float16", 256, 96, False),
                      ("float32", 40, 16, False), ("bfloat16", 128, 128, True),
                      ("float16", 75, 10, True), ("float32", 256, 256, False),
                      ("float32", 160, 160, True)]
        ),
    ],
)  # fmt: skip
def test_rotary(dtype: str, head_dim: int, channels: int, interleaved: bool) -> None:
    """Gradients are rotated back, whichever lanes hold the two channels of a pair."""
    packed = dtype == "float16"
    lengths = ([33, 0, 60], [70, 20, 99]) if packed else ([70], [100])
    cos, sin = rotary_tables(100, channels)
    options = {
        "rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": interleaved, "causal": True,
        "attn_mask": RNG.standard_normal((1, 1, 1, max(lengths[1]))).astype(np.float32),
    }  # fmt: skip
    call = Call(*lengths, head_dim=head_dim, dtype=dtype, options=options, dlse=True)
    call.check(("dq", "dk", "dv", "dmask"))


@pytest.mark.slow
def test_rotary_of_other_tables_and_bad_rows() -> None:
    """Angles in half precision, channels apart; NaN in a hidden key."""
    cos, sin = rotary_tables(61, 32, np.float16)
    seen = np.ones((1, 1, 45, 61), bool)
    seen[..., 7] = False
    options = {"rotary_cos": cos, "rotary_sin": sin, "attn_mask": seen}
    clean, spoiled = (Call([45], [61], dtype="float16", options=options) for _ in range(2))
    clean.tensors["key"][0][7] = 0
    spoil(spoiled, "key", [7], np.nan)
    spoiled.results = clean.results = [clean.forward(0)]
    right = clean.check()
    for name, array in spoiled.run().items():
        np.testing.assert_array_equal(bits(array), bits(right[name]), name)


QV_CASES = [
    ("float16", 64, 64, 2, {"causal": True, "softcap": 4.0}), ("float32", 40, 256, 1, {}),
]  # fmt: skip
MORE_QV_CASES = [
    ("bfloat16", 64, 128, 1, {"window_size": (20, 9), "dropout_p": 0.3, "dropout_seed": 5}),
    ("float32", 192, 128, 2, {"alibi_slopes": SLOPES, "causal": True}),
    ("float16", 16, 256, 1, {"dropout_p": 0.3, "dropout_seed": 5}),
    ("float16", 128, 40, 1, {"learnable_sink": np.array([0.5, 3.0], np.float32)}),
    ("float32", 64, 64, 1, {"attn_mask": BIAS}),
]


@pytest.mark.parametrize(
    ("dtype", "head_dim", "head_dim_v", "heads_k", "options"),
    [
        QV_CASES[0],
        *(pytest.param(*x, marks=pytest.mark.slow) for x in (*QV_CASES[1:], *MORE_QV_CASES)),
    ],
)
def test_qv(
    dtype: str, head_dim: int, head_dim_v: int, heads_k: int, options: dict[str, Any]
) -> None:
    """Values are keys of the second part: their gradient has two terms."""
    packed = dtype == "float16"
    lengths = ([33, 0, 60], [70, 20, 99]) if packed else ([70], [100])
    call = Call(
        *lengths, heads=2, heads_k=heads_k, head_dim=head_dim, head_dim_v=head_dim_v,
        dtype=dtype, options=options, has_qv=True, dlse=True,
    )  # fmt: skip
    wanted = ("dq", "dk", "dv", "dqv")
    wanted += tuple(x for x, field in OF_OPTIONS.items() if is_float(options.get(field)))
    found = call.check(wanted)
    for name in ("dv", "dqv"):
        alone = call.run((name,))[name]
        np.testing.assert_array_equal(bits(alone), bits(found[name]), name)


@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [
        ("float16", 64),
        *(pytest.param(*x, marks=pytest.mark.slow) for x in [("float32", 64), ("float16", 512)]),
    ],
)
def test_hidden_rows_of_qv_keep_their_nan(dtype: str, head_dim: int) -> None:
    keys, queries = [3, 31, 32, 60], [0, 7, 33]
    seen = np.ones((1, 1, 45, 61), bool)
    seen[..., keys] = False
    seen[:, :, queries] = False
    clean, spoiled = (
        Call([45], [61], head_dim=head_dim, dtype=dtype, options={"attn_mask": seen}, has_qv=True)
        for _ in range(2)
    )
    for name in ("value", "qv", "dout"):
        rows = keys if name == "value" else queries
        clean.tensors[name][0][rows, :, ::3] = 0
        spoil(spoiled, name, rows, np.nan)
    spoiled.results = clean.results = [clean.forward(0)]
    wanted = ("dq", "dk", "dv", "dqv")
    right, found = clean.run(wanted), spoiled.run(wanted)
    for name, array in found.items():
        np.testing.assert_array_equal(bits(array), bits(right[name]), name)
        hidden = keys if name in ("dk", "dv") else queries
        assert (array[0, hidden] == 0).all(), name


OF_HEADS: dict[str, Any] = {
    "learnable_sink": np.ones(2, np.float32), "alibi_slopes": SLOPES,
    "attn_mask": np.ones((1, 2, 1, 1), np.float32),
}  # fmt: skip


def test_sums_without_rows() -> None:
    for name, array in Call([0, 0], [3, 5], options=OF_HEADS).run(tuple(OF_OPTIONS)).items():
        assert (array == 0).all(), name


def test_any_schedule_sums_alike() -> None:
    call = Call([300], [40], head_dim=32, options=OF_HEADS)
    first = call.run(tuple(OF_OPTIONS))
    emulated.settings.schedule_seed = 1
    for name, array in call.run(tuple(OF_OPTIONS)).items():
        np.testing.assert_array_equal(array, first[name], name)


def test_dtypes_may_differ() -> None:
    dtypes = {"query": "float16", "value": "bfloat16", "out": "bfloat16", "dout": "float16"}
    Call([45], [61], dtypes=dtypes, options={"causal": True}).check()


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.slow
def test_other_machines(name: str) -> None:
    emulated.settings.options = MACHINES[name]
    for dtype, head_dim in [("float16", 64), ("float32", 128), ("bfloat16", 96), ("float16", 320)]:
        Call(dtype=dtype, head_dim=head_dim, options={"causal": True}).check()


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "head_dim", [64, *(pytest.param(d, marks=pytest.mark.slow) for d in (256, 512))]
)
def test_any_schedule_gives_the_same_bits(seed: int, head_dim: int) -> None:
    call = Call(dtype="float16", head_dim=head_dim, heads=4, options={"causal": True})
    first = call.run()
    emulated.settings.schedule_seed = seed
    for name, array in call.run().items():
        np.testing.assert_array_equal(bits(array), bits(first[name]), name)


@pytest.mark.parametrize("everything", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_without_function_constants(everything: bool) -> None:
    """As PyTorch and MLX launch kernels."""
    emulated.settings.function_constants = False
    options: dict[str, Any] = {"causal": True}
    wanted: tuple[str, ...] = ("dq", "dk", "dv")
    if everything:
        cos, sin = rotary_tables(61, 16)
        options |= OF_HEADS | {"rotary_cos": cos, "rotary_sin": sin}
        wanted += ("dqv", *OF_OPTIONS)
    Call([45], [61], options=options, has_qv=everything).check(wanted)


@pytest.mark.parametrize("factor", [2.0**16, pytest.param(2.0**-20, marks=pytest.mark.slow)])
def test_gradients_of_half_neither_overflow_nor_vanish(factor: float) -> None:
    """dO as gradient scalers make it, and values that take dP out of half's range: 2^16 overflows
    there, and of 2^-20 times a probability nothing would be left."""
    call = Call([45], [61], dtype="float16", options={"causal": True})
    for name, times in (("dout", factor), ("value", 100.0)):
        small = np.clip(call.tensors[name][0].astype(np.float64), -0.9, 0.9)
        call.tensors[name] = [(small * times).astype(np.float16)]
    call.results = [call.forward(0)]
    found, expected = call.run(float32=True), call.expected()
    for name, array in found.items():
        right = expected[name][0]
        assert np.abs(array[0] - right).max() <= 2e-3 * np.abs(right).max(), name
    if factor > 1:
        assert np.abs(expected["dq"][0]).max() > 65504
    else:
        assert np.abs(expected["dv"][0]).max() < 2.0**-14


def test_scores_that_float32_cannot_tell_from_the_log_sum_exp() -> None:
    """Of such scores a probability may round to 0, but to no more than 1."""
    call = Call([45], [61], dtype="float16", options={"softmax_scale": 1e30})
    found = call.run(("dv",), float32=True)["dv"][0]
    most = np.abs(call.tensors["dout"][0].astype(np.float64)).sum(axis=-3, keepdims=True)
    assert (np.abs(found) <= most * 2 * (1 + 1e-6)).all()  # of the heads that share it
    assert found.any()


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.slow
def test_any_options_together(seed: int) -> None:
    rng = np.random.default_rng(1000 + seed)

    def some(share: float = 0.4) -> bool:
        return bool(rng.random() < share)

    batch, heads_k = int(rng.integers(1, 4)), int(rng.integers(1, 3))
    heads = heads_k * int(rng.integers(1, 4))
    lengths_q, lengths_k = ([int(n) for n in rng.integers(1, most, batch)] for most in (70, 140))
    if packed := some():
        lengths_k[0] = 0
    else:
        lengths_q, lengths_k = ([max(x)] * batch for x in (lengths_q, lengths_k))
    options: dict[str, Any] = {"causal": some(0.6)}
    if some():
        options["causal_alignment"] = "top_left"
    if some():
        options["window_size"] = tuple(int(n) for n in rng.integers(-1, 50, 2))
    if some(0.3):
        options["attention_chunk"] = int(rng.integers(1, 60))
        options["attention_chunk_offset"] = int(rng.integers(0, 40))
    if some():
        options["softcap"] = float(rng.uniform(1, 20))
    if some():
        options["softmax_scale"] = float(rng.uniform(-0.4, 0.4))
    if some():
        shape = (heads,) if some() else (batch, heads)
        options["alibi_slopes"] = rng.uniform(0, 0.5, shape).astype(np.float32)
    if some():
        full = (batch, heads, max(lengths_q), max(lengths_k))
        mask = [n if some(0.6) else 1 for n in full]
        seen = rng.random(mask) < 0.8
        bias = np.where(seen, rng.standard_normal(mask), -np.inf).astype(np.float16)
        options["attn_mask"] = seen if some() else bias
    if some():
        options["learnable_sink"] = rng.standard_normal(heads).astype(np.float32)
    if some():
        options |= {"dropout_p": float(rng.uniform(0.1, 0.7)), "dropout_seed": seed}
    if packed and some():
        options["prefix_lens"] = rng.integers(0, 60, batch).astype(np.int32)
    emulated.settings.family = int(rng.integers(7, 11))
    emulated.settings.schedule_seed = seed
    wanted = (
        "dq",
        "dk",
        "dv",
        *(x for x, field in OF_OPTIONS.items() if is_float(options.get(field))),
    )
    Call(
        lengths_q, lengths_k, heads, heads_k, head_dim=int(rng.integers(1, 130)),
        head_dim_v=int(rng.integers(1, 130)), dtype=str(rng.choice(list(DTYPES))),
        options=options, packed=packed, dlse=some(), seed=seed,
    ).check(wanted, float32=some())  # fmt: skip


# ---- what is hidden ----------------------------------------------------------------------------

BAD = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}


def spoil(call: Call, name: str, rows: list[int], bad: float) -> Call:
    call.tensors[name][0][rows, :, ::3] = bad
    return call


@pytest.mark.parametrize(
    ("dtype", "head_dim", "bad"),
    [
        ("float16", 64, "nan"),
        *(
            pytest.param(dtype, head_dim, bad, marks=pytest.mark.slow)
            for dtype, head_dim in [
                ("float16", 256),
                ("bfloat16", 64),
                ("float32", 128),
                ("float32", 512),
            ]
            for bad in BAD
        ),
    ],
)
def test_hidden_rows_keep_their_nan(dtype: str, head_dim: int, bad: str) -> None:
    """Of keys that no query sees, and queries that see none: 0; all else as with zeros there."""
    keys, queries = [3, 31, 32, 60], [0, 7, 33]
    seen = np.ones((1, 1, 45, 61), bool)
    seen[..., keys] = False
    seen[:, :, queries] = False

    def made() -> Call:
        return Call([45], [61], dtype=dtype, head_dim=head_dim, options={"attn_mask": seen})

    clean, spoiled = made(), made()
    for name in ("key", "value", "query", "dout"):
        rows = keys if name in ("key", "value") else queries
        clean.tensors[name][0][rows, :, ::3] = 0
        spoil(spoiled, name, rows, BAD[bad])
    spoiled.results = clean.results = [clean.forward(0)]
    right, found = clean.run(), spoiled.run()
    for name, array in found.items():
        np.testing.assert_array_equal(bits(array), bits(right[name]), name)
        hidden = queries if name == "dq" else keys
        assert (array[0, hidden] == 0).all(), name


@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [
        ("float16", 64),
        *(pytest.param(*x, marks=pytest.mark.slow) for x in [("float32", 64), ("float16", 512)]),
    ],
)
def test_what_is_seen_is_not_hidden(dtype: str, head_dim: int) -> None:
    """Causal: a bad row of dO reaches the keys that it sees, in its channels, and no other."""
    row = 20
    call = Call([45], [61], head_dim=head_dim, dtype=dtype, options={"causal": True})
    clean = call.run()
    call.tensors["dout"][0][row, 0, 5] = np.inf
    call.tensors["dout"][0][row, 1, 9] = np.nan
    dv, dq = (call.run()[name][0].astype(np.float64) for name in ("dv", "dq"))
    last = row + 61 - 45
    assert np.isposinf(dv[: last + 1, 0, 5]).all()
    assert np.isnan(dv[: last + 1, 0, 9]).all()
    rest = np.ones(dv.shape, bool)
    rest[: last + 1, 0, [5, 9]] = False
    np.testing.assert_array_equal(dv[rest], clean["dv"][0].astype(np.float64)[rest])
    assert not np.isfinite(dq[row]).any()
    others = np.arange(45) != row
    np.testing.assert_array_equal(dq[others], clean["dq"][0].astype(np.float64)[others])


@pytest.mark.parametrize("name", ["query", "key"])
@pytest.mark.slow
def test_bad_queries_and_keys(name: str) -> None:
    """Causal: a row of NaN reaches what sees it, or what it sees, and nothing else."""
    row, call = 20, Call([45], [61], dtype="float16", options={"causal": True}, heads=1)
    clean = call.run()
    call.tensors[name][0][row] = np.nan
    with np.errstate(all="ignore"):
        call.results = [call.forward(0)]
    found = {k: v[0].astype(np.float64) for k, v in call.run().items()}
    queries, keys = np.zeros(45, bool), np.zeros(61, bool)
    if name == "query":
        queries[row] = True
    else:
        queries[max(0, row - 16) :] = True
    keys[: np.flatnonzero(queries)[-1] + 16 + 1] = True
    assert np.isnan(found["dq"][queries]).all()
    for gradient in ("dk", "dv"):
        assert np.isnan(found[gradient][keys]).all()
        right = clean[gradient][0].astype(np.float64)
        np.testing.assert_array_equal(found[gradient][~keys], right[~keys])
    right = clean["dq"][0].astype(np.float64)
    np.testing.assert_array_equal(found["dq"][~queries], right[~queries])


@pytest.mark.parametrize(
    ("lengths_q", "lengths_k"), [([5], [0]), ([0], [5]), ([0, 0], [3, 0]), ([40], [17])]
)
@pytest.mark.slow
def test_empty_sides(lengths_q: list[int], lengths_k: list[int]) -> None:
    """Without keys or without queries all gradients are 0."""
    call = Call(lengths_q, lengths_k, options={"causal": True})
    found = call.check()
    if not sum(lengths_q) or not sum(lengths_k):
        assert all((x == 0).all() for x in found.values())


@pytest.mark.slow
def test_other_strides() -> None:
    """Channels apart, and rows that are not aligned for wide loads."""
    call = Call([45], [61], dtype="float16", options={"causal": True})
    for name, parts in call.tensors.items():
        step = 2 if name in ("query", "value") else 1
        wide = np.zeros((*parts[0].shape[:2], step * parts[0].shape[2] + 1), np.float16)
        wide[..., 1::step] = parts[0]
        call.tensors[name] = [wide[..., 1::step]]
    right = Call([45], [61], dtype="float16", options={"causal": True}).run()
    joined = call.joined
    call.joined = lambda parts, axis=0: parts[0][None]  # type: ignore[method-assign]
    found = call.run()
    call.joined = joined  # type: ignore[method-assign]
    for name, array in found.items():
        np.testing.assert_array_equal(bits(array), bits(right[name]), name)
