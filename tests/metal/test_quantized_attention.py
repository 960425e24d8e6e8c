"""Attention from codes on the emulated GPU: the bits of the same call on dequantised tensors where
the tile kernel takes both, and the float64 reference for decoding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import umfa
from tests import quantization, reference
from tests.array_libraries import DTYPES, Array
from tests.attend import call_on
from tests.cases import normal
from tests.checks import BASE, LSE, assert_close
from tests.metal import emulated
from tests.metal.emulated import MACHINES, SOME_MACHINES
from tests.metal.test_plan_forward import layout
from tests.quant.test_attention import KEY, OPTIONS, VALUE
from tests.quantization import Format
from tests.sequences import offsets, paged, rotary_tables, varlen_reference
from umfa import QuantizedTensor

pytestmark = pytest.mark.usefixtures("own_settings")

LEGAL = list(quantization.legal())
DTYPE_NAMES = list(DTYPES)
CHANNEL = Format("int8", "channel", False, None, "float16")
SAMPLED = [
    pytest.param(options, marks=pytest.mark.slow if i else (), id="-".join(options))
    for i, options in enumerate(OPTIONS)
]
"""Each is a set of kernels to compile."""


def quantized(x: Array, form: Format, **options: Any) -> QuantizedTensor:
    return umfa.quantize(x, **form._asdict(), **options)


def numbers(x: Any, dtype: Any) -> Array:
    """What attention sees: rounded to the dtype of its arithmetic."""
    return x.dequantize(dtype) if isinstance(x, QuantizedTensor) else x


def attend(q: Array, k: Any, v: Any, **options: Any) -> tuple[Array, Array]:
    found: tuple[Array, Array] = call_on(
        "metal-emulated", umfa.quantized_attention, q, k, v, **options
    )
    return found


def kernels() -> list[str]:
    """Of the last call."""
    return [launch["kernel"] for launch in emulated.last_plan["launches"]]


def same_bits(q: Array, k: Any, v: Any, dtype: Any = None, **options: Any) -> Array:
    """`dtype`: of the arithmetic, if not that of q."""
    out, lse = attend(q, k, v, **options)
    assert all(name.startswith(("forward_", "clear_")) for name in kernels())
    own = np.dtype(dtype or q.dtype)
    plain = attend(q, numbers(k, own), numbers(v, own), **options)
    assert all(name.startswith(("forward_", "clear_")) for name in kernels())
    np.testing.assert_array_equal(out.view(np.uint8), plain[0].view(np.uint8))
    np.testing.assert_array_equal(lse, plain[1])
    return out


def check(q: Array, k: Any, v: Any, **options: Any) -> None:
    """Against the float64 reference on the numbers that attention sees."""
    out, lse = attend(q, k, v, **options)
    seen = [numbers(x, q.dtype).astype(np.float64) for x in (k, v)]
    options.pop("num_splits", None)
    expected, expected_lse = reference.attention(q, *seen, **options)
    assert_close(out.astype(np.float64), expected, BASE[q.dtype.name])
    assert_close(lse.astype(np.float64), expected_lse, LSE, "lse")


def marks_of(n: int) -> list[pytest.MarkDecorator]:
    """Of the n-th of many kernels. A process keeps each that it has compiled: 30 MB."""
    if n % 58 == 0:
        return []
    return [pytest.mark.slow] if n % 8 == 0 else [pytest.mark.nightly]


@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        pytest.param(form, dtype, marks=marks_of(i + j))
        for i, form in enumerate(LEGAL)
        for j, dtype in enumerate(DTYPE_NAMES)
    ],
    ids=str,
)
def test_every_format(form: Format, dtype: str) -> None:
    """Keys are runs of whole codes; values end in the middle of a run, a byte and a block."""
    q = normal((1, 20, 2, 64), dtype, seed=1)
    k = quantized(normal((1, 41, 1, 64), seed=2), form)
    v = quantized(normal((1, 41, 1, 75), seed=3), form)
    same_bits(q, k, v)


@pytest.mark.parametrize(
    ("head_dim", "head_dim_v", "dtype", "family"),
    [
        (128, 128, "float16", 9),
        *(
            pytest.param(d, dv, dtype, family, marks=pytest.mark.slow)
            for dtype, family in (
                ("float16", 7), ("float16", 9), ("bfloat16", 7), ("bfloat16", 9), ("float32", 7),
            )
            for d, dv in (
                (32, 32), (64, 64), (80, 80), (96, 48), (128, 128), (160, 160), (192, 128),
                (256, 256), (64, 512), (512, 512), (576, 512),
            )
        ),
    ],
)  # fmt: skip
def test_every_tile(head_dim: int, head_dim_v: int, dtype: str, family: int) -> None:
    emulated.settings.family = family
    q = normal((1, 20, 2, head_dim), dtype, seed=1)
    k = quantized(normal((1, 45, 1, head_dim), seed=2), VALUE)
    v = quantized(normal((1, 45, 1, head_dim_v), seed=3), Format("int4", "block", True, (1, 16)))
    same_bits(q, k, v, causal=True)


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_any_mix_of_plain_and_quantised(dtype: str) -> None:
    q = normal((1, 20, 2, 64), dtype, seed=1)
    k, v = (normal((1, 41, 2, 64), dtype, seed=i) for i in (2, 3))
    same_bits(q, quantized(k, KEY), v, causal=True)
    same_bits(q, k, quantized(v, VALUE), causal=True)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_arithmetic_is_float32_where_dtypes_differ(dtype: str) -> None:
    q = normal((1, 20, 2, 64), dtype, seed=1)
    k, v = (normal((1, 41, 2, 64), seed=i) for i in (2, 3))
    same_bits(q, quantized(k, KEY), v, np.float32)
    same_bits(q, quantized(k, KEY), quantized(v, VALUE), np.float32, out_dtype=np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_blocks_that_are_no_power_of_two(dtype: str) -> None:
    form = Format(dtype, "block", False, (3, 48))
    q = normal((1, 20, 2, 128), "float16", seed=1)
    same_bits(q, *(quantized(normal((1, 41, 2, 128), seed=i), form) for i in (2, 3)))


@pytest.mark.parametrize("dtype", ["int8", pytest.param("int4", marks=pytest.mark.slow)])
def test_scales_far_apart(dtype: str) -> None:
    """More than 31 bits count the elements between them."""
    x = normal((1, 41, 1, 64), seed=2)
    cache = quantized(x, Format(dtype, "row", True, None, "float16"))
    scales = emulated.spread_out(cache.scales.shape, (0, 2**26, 1, 1))
    scales[...] = cache.scales
    far = QuantizedTensor(cache.data, scales, dtype=dtype, scale_dtype="float16")
    q = normal((1, 20, 1, 64), "float16", seed=1)
    found = attend(q, far, far)
    assert emulated.last_plan["launches"][0]["constants"][54] >> 14 & 1 == 0
    np.testing.assert_array_equal(found[0], attend(q, cache, cache)[0])


def gguf(kind: str, seed: int, rows: int = 41, channels: int = 64) -> QuantizedTensor:
    """Blocks of any codes; their float16 scales are finite."""
    rng = np.random.default_rng(seed)
    size = {"q8_0": 34, "q4_0": 18}[kind]
    data = rng.integers(0, 256, (1, rows, 2, channels // 32, size), np.uint8)
    scales = rng.uniform(-0.03, 0.03, data.shape[:-1]).astype(np.float16)
    data[..., :2] = scales[..., None].view(np.uint8)
    return QuantizedTensor.from_gguf(data.reshape(1, rows, 2, -1), kind, layout="bshd")


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_gguf_blocks(kind: str) -> None:
    q = normal((1, 20, 4, 64), "float16", seed=3)
    same_bits(q, gguf(kind, 1), gguf(kind, 2))


@pytest.mark.parametrize("scales", ["float16", *(pytest.param(x, marks=pytest.mark.slow)
                                                 for x in ("bfloat16", "float32"))])  # fmt: skip
@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_mlx_groups(bits: int, scales: str) -> None:
    """Random words are codes of any group."""
    rng = np.random.default_rng(bits)
    k, v = (
        QuantizedTensor.from_mlx(
            rng.integers(0, 2**32, (1, 41, 2, 64 * bits // 32), np.uint32),
            rng.uniform(-0.01, 0.01, (1, 41, 2, 2)).astype(DTYPES[scales]),
            rng.uniform(-0.5, 0.5, (1, 41, 2, 2)).astype(DTYPES[scales]),
            group_size=32, bits=bits, layout="bshd",
        )
        for _ in range(2)
    )  # fmt: skip
    same_bits(normal((1, 20, 2, 64), "float16", seed=1), k, v)


@pytest.mark.parametrize("options", SAMPLED)
def test_every_option(options: dict[str, Any]) -> None:
    options = dict(options)
    q = normal((2, 20, 4, 64), "float16", seed=1)
    k = quantized(normal((2, 131, 2, 64), seed=2), KEY)
    v = quantized(normal((2, 131, 2, 80), seed=3), VALUE)
    if options.pop("qv", False):
        options["qv"] = normal((2, 20, 4, 80), "float16", seed=4)
    if options.pop("rotary", False):
        options["rotary_cos"], options["rotary_sin"] = rotary_tables(131, 32)
    same_bits(q, k, v, np.float32 if "out_dtype" in options else None, **options)


@pytest.mark.parametrize("form", [KEY, pytest.param(CHANNEL, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("interleaved", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_keys_that_are_rotated(interleaved: bool, form: Format) -> None:
    """Rounded before they are rotated, as dequantised keys are."""
    q = normal((1, 20, 2, 72), "float16", seed=1)
    k, v = (quantized(normal((1, 41, 2, 72), seed=i), form) for i in (2, 3))
    cos, sin = rotary_tables(41, 32)
    same_bits(q, k, v, rotary_cos=cos, rotary_sin=sin, rotary_interleaved=interleaved)


MXFP4 = Format("mxfp4", "block", True, (1, 32), "float8_e8m0fnu")


def decode(q: Array, k: Any, v: Any, kernel: str, **options: Any) -> None:
    for splits in (1, 3):
        check(q, k, v, num_splits=splits, **options)
        assert kernels()[0].startswith(kernel)
        assert len(kernels()) == 1 + (splits > 1)


@pytest.mark.parametrize(
    ("seqlen_q", "heads", "form", "dtype", "kernel"),
    [
        (1, 4, VALUE, "float16", "decode_f16"),
        (1, 1, KEY, "float16", "decode_vector_f16"),
        (3, 4, CHANNEL, "bfloat16", "forward_bf16_as_f32"),
        (8, 2, MXFP4, "float32", "decode_f32"),
        (1, 1, Format("nf4", "tensor"), "bfloat16", "decode_vector_bf16_as_f32"),
        (1, 2, Format("int4", "tensor", False), "float32", "decode_f32"),
    ],
    ids=str,
)
def test_decoding(seqlen_q: int, heads: int, form: Format, dtype: str, kernel: str) -> None:
    q = normal((2, seqlen_q, heads, 128), dtype, seed=1)
    k, v = (quantized(normal((2, 300, 1, 128), seed=i), form) for i in (2, 3))
    decode(q, k, v, kernel, causal=True)


@pytest.mark.parametrize(
    ("form", "dtype", "heads"),
    [
        pytest.param(form, dtype, heads, marks=marks_of(i + j))
        for i, form in enumerate(LEGAL)
        for j, dtype in enumerate(DTYPE_NAMES)
        for heads in (1, 4)
    ],
    ids=str,
)
def test_decoding_every_format(form: Format, dtype: str, heads: int) -> None:
    q = normal((1, 1, heads, 64), dtype, seed=1)
    k, v = (quantized(normal((1, 75, 1, 64), seed=i), form) for i in (2, 3))
    check(q, k, v)
    assert kernels()[0].startswith("forward_" if form.granularity == "channel" else "decode_")


@pytest.mark.parametrize(
    ("head_dim", "head_dim_v", "heads", "family"),
    [
        (64, 48, 4, 7),
        *(
            pytest.param(d, dv, heads, family, marks=pytest.mark.slow)
            for d, dv in (
                (32, 32), (64, 64), (80, 80), (96, 96), (128, 128), (160, 160), (192, 128),
                (192, 192), (256, 256), (112, 80),
            )
            for heads, family in ((1, 9), (4, 9), (12, 7))
        ),
    ],
)  # fmt: skip
def test_decoding_any_head_dim(head_dim: int, head_dim_v: int, heads: int, family: int) -> None:
    """A lane's channels are 16, 8, 4 or 2 neighbours, of keys and values with other formats."""
    emulated.settings.family = family
    q = normal((1, 1, heads, head_dim), "bfloat16" if family == 9 else "float16", seed=1)
    k = quantized(normal((1, 75, 1, head_dim), seed=2), VALUE)
    v = quantized(normal((1, 75, 1, head_dim_v), seed=3), Format("int4", "block", False, (1, 16)))
    decode(q, k, v, "decode_")


@pytest.mark.parametrize("heads", [1, 4])
def test_decoding_any_mix_of_plain_and_quantised(heads: int) -> None:
    q = normal((1, 1, heads, 64), "float16", seed=1)
    k, v = (normal((1, 75, 1, 64), "float16", seed=i) for i in (2, 3))
    decode(q, quantized(k, KEY), v, "decode_")
    decode(q, k, quantized(v, VALUE), "decode_")


@pytest.mark.parametrize("place", ["aligned", "unaligned"])
def test_decoding_codes_of_a_head_dim_that_is_not_whole_runs(place: str) -> None:
    """By tiles, as for codes that are not aligned."""
    q = normal((1, 1, 4, 72 if place == "aligned" else 64), "float16", seed=1)
    k = quantized(normal((1, 75, 1, q.shape[3]), seed=2), VALUE)
    if place == "unaligned":
        room = np.zeros((*k.data.shape[:3], 65), np.int8)[..., 1:]
        room[...] = k.data
        k = QuantizedTensor(room, k.scales, dtype="int8", scale_dtype="float16")
    decode(q, k, k, "forward_")


@pytest.mark.parametrize("options", SAMPLED)
@pytest.mark.slow
@pytest.mark.parametrize("heads", [2, 4])
def test_decoding_with_every_option(options: dict[str, Any], heads: int) -> None:
    """As of dequantised tensors, whose kernel differs in how codes become numbers alone."""
    options = dict(options)
    q = normal((2, 1, heads, 64), "float16", seed=1)
    k = quantized(normal((2, 131, 2, 64), seed=2), KEY)
    v = quantized(normal((2, 131, 2, 80), seed=3), VALUE)
    if options.pop("qv", False):
        options["qv"] = normal((2, 1, heads, 80), "float16", seed=4)
    if options.pop("rotary", False):
        options["rotary_cos"], options["rotary_sin"] = rotary_tables(131, 32)
    for name in ("alibi_slopes", "learnable_sink"):
        if name in options:
            options[name] = options[name][:heads]
    if options.get("attn_mask") is not None and options["attn_mask"].shape[1] == 4:
        options["attn_mask"] = options["attn_mask"][:, :heads]
    dtype = np.float32 if "out_dtype" in options else q.dtype
    found = attend(q, k, v, **options)
    plain = attend(q, numbers(k, dtype), numbers(v, dtype), **options)
    assert_close(found[0].astype(np.float64), plain[0].astype(np.float64), BASE["float16"])
    assert_close(found[1].astype(np.float64), plain[1].astype(np.float64), LSE, "lse")


@pytest.mark.slow
def test_a_batch_invariant_token_is_that_of_a_prompt() -> None:
    q = normal((1, 20, 2, 64), "float16", seed=1)
    k, v = (quantized(normal((1, 41, 2, 64), seed=i), KEY) for i in (2, 3))
    whole = same_bits(q, k, v, causal=True, batch_invariant=True)
    one = same_bits(q[:, -1:], k, v, causal=True, batch_invariant=True)
    np.testing.assert_array_equal(one, whole[:, -1:])


@pytest.mark.parametrize("form", [KEY, VALUE, Format("float8_e4m3fn", "block", True, (3, 16))],
                         ids=str)  # fmt: skip
def test_packed_sequences(form: Format) -> None:
    """Some with many queries, some with few. Sequences begin in the middle of a block."""
    lengths_q, lengths_k = [8, 0, 16, 1], [10, 5, 70, 33]
    q = normal((25, 4, 64), "float16", seed=1)
    k, v = (quantized(normal((118, 2, 64), seed=i), form) for i in (2, 3))
    tables = {"cu_seqlens_q": offsets(lengths_q), "cu_seqlens_k": offsets(lengths_k)}
    out, lse = attend(q, k, v, causal=True, **tables)
    expected, expected_lse = varlen_reference(
        q, numbers(k, q.dtype), numbers(v, q.dtype), *tables.values(), causal=True
    )
    assert_close(out.astype(np.float64), expected, BASE["float16"])
    assert_close(lse.astype(np.float64), expected_lse, LSE, "lse")


@pytest.mark.parametrize("page_size", [16, pytest.param(12, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "form", [KEY, VALUE, Format("nf4", "block", True, (4, 32)), CHANNEL], ids=str
)
def test_pages(form: Format, page_size: int) -> None:
    """What no row fills is NaN: pages are quantised with poisoned blocks, which nobody may see."""
    caches = [normal((2, 90, 2, 64), seed=i) for i in (1, 2)]
    pages, table = paged(caches, page_size, seed=3)
    if form.granularity != "row":  # a block of many tokens may not hold NaN
        pages = [np.nan_to_num(x) for x in pages]
    k, v = (quantized(x, form, nonfinite="nan") for x in pages)
    options: dict[str, Any] = {"block_table": table, "seqused_k": np.int32([90, 41])}
    q = normal((2, 20, 4, 64), "float16", seed=4)
    out = same_bits(q, k, v, causal=True, **options)
    assert np.isfinite(out).all()
    for heads in (2, 4):
        one, lse = attend(q[:, -1:, :heads], k, v, causal=True, **options)
        wanted, wanted_lse = attend(q[:, -1:, :heads], k, v, causal=True, batch_invariant=True,
                                    **options)  # fmt: skip
        assert_close(one.astype(np.float64), wanted.astype(np.float64), BASE["float16"])
        assert_close(lse.astype(np.float64), wanted_lse.astype(np.float64), LSE, "lse")


@pytest.mark.parametrize("seqlen_q", [1, 20])
def test_hidden_blocks_of_nan_and_rows_that_see_nothing(seqlen_q: int) -> None:
    x = normal((1, 100, 2, 64), seed=1)
    x[:, 30:33] = np.nan
    k, v = (umfa.quantize(x, "int8", nonfinite="nan") for _ in range(2))
    mask = np.ones((1, 1, seqlen_q, 100), bool)
    mask[..., 30:33] = False
    mask[:, :, 0] = False
    q = normal((1, seqlen_q, 2, 64), seed=2)
    out, lse = attend(q, k, v, attn_mask=mask)
    assert np.isfinite(out).all()
    assert (out[:, 0] == 0).all()
    assert (lse[:, :, 0] == -np.inf).all()
    assert np.isnan(attend(q, k, v)[0]).all()


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
def test_numbers_that_are_too_large_for_the_tile() -> None:
    """They are infinite, as in k.dequantize("float16")."""
    x = normal((1, 41, 1, 64), seed=1)
    x[:, 7, :, 3] = 1e5
    k, v = quantized(x, Format("int8")), quantized(x, Format("int8", "channel"))
    q = np.abs(normal((1, 20, 1, 64), "float16", seed=2))
    clean = quantized(np.minimum(x, 10), Format("int8"))
    assert not np.isfinite(same_bits(q, k, clean)).all()
    assert np.isinf(same_bits(q, clean, v)[..., 3]).all()


@pytest.mark.parametrize("place", ["transposed", "unaligned", "a column of blocks"])
def test_anywhere_in_memory(place: str) -> None:
    q, x = normal((2, 20, 4, 64), "float16", seed=1), normal((2, 2, 41, 64), seed=2)
    cache = quantized(x, KEY, layout="bhsd")
    data, scales, zeros = (
        np.swapaxes(part, 1, 2) for part in (cache.data, cache.scales, cache.zero_points)
    )
    if place == "unaligned":  # nor are rows of bytes
        room = np.zeros((*data.shape[:3], 33), np.uint8)[..., 1:]
        room[...] = data
        data = room
    if place == "a column of blocks":
        scales, zeros = np.asfortranarray(scales), zeros[:, :, ::-1][:, :, ::-1]
    form = {**KEY._asdict(), "layout": "bshd"}
    k = QuantizedTensor(data, scales, zeros, **form)
    same_bits(q, k, k)


@pytest.mark.parametrize("machine", SOME_MACHINES)
def test_other_machines(machine: str) -> None:
    emulated.settings.options = MACHINES[machine]
    q = normal((1, 20, 2, 64), "float16", seed=1)
    k, v = (quantized(normal((1, 41, 1, 64), seed=i), form) for i, form in ((2, KEY), (3, VALUE)))
    same_bits(q, k, v, causal=True)


def test_without_function_constants() -> None:
    """As PyTorch and MLX launch."""
    emulated.settings.function_constants = False
    q = normal((1, 20, 2, 64), "float16", seed=1)
    k = quantized(normal((1, 41, 1, 64), seed=2), KEY)
    same_bits(q, k, normal((1, 41, 1, 64), "float16", seed=3), causal=True)
    check(q[:, :1], k, quantized(normal((1, 41, 1, 64), seed=3), VALUE), num_splits=2)


def test_no_keys() -> None:
    q, x = normal((1, 20, 2, 64), "float16", seed=1), np.zeros((1, 0, 2, 64), np.float32)
    for queries in (q, q[:, :1]):
        out, lse = attend(queries, quantized(x, VALUE), quantized(x, KEY))
        assert (out == 0).all()
        assert (lse == -np.inf).all()


@pytest.mark.parametrize("seqlen_q", [64, 1])
@pytest.mark.parametrize(
    ("form", "row_bytes", "scale_bytes"),
    [
        (VALUE, 128, 2),
        pytest.param(
            Format("int4", "block", True, (1, 32), "float16"), 64, 8, marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_codes_are_read_once_for_each_block_of_queries(
    form: Format, row_bytes: int, scale_bytes: int, seqlen_q: int
) -> None:
    """As docs/metal-verification.md states it: in a prompt for each tile of queries, in decoding
    once for all heads of a key head."""
    q = normal((1, seqlen_q, 4, 128), "float16", seed=1)
    k = quantized(normal((1, 256, 1, 128), seed=2), form)
    with emulated.counting() as counters:
        attend(q, k, k, num_splits=1)
    (launch,) = counters
    indices = layout("DECODE" if seqlen_q == 1 else "FORWARD")
    blocks = launch.threadgroups
    assert blocks == (1 if seqlen_q == 1 else 4 * seqlen_q // 32)
    # A lane reads the scale of its run.
    runs, blocks_of_row = 128 // 16, scale_bytes // 2
    for field in ("KEY", "VALUE"):
        assert launch.buffer_bytes_read[indices[field]] == blocks * 256 * row_bytes
        read = launch.buffer_bytes_read[indices[f"{field}_SCALES"]]
        assert read == blocks * 256 * 2 * runs
        assert runs % blocks_of_row == 0
