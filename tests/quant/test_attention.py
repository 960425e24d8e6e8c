"""umfa.quantized_attention against the float64 reference on the numbers of the codes, and against
the same call on dequantised tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import umfa
from tests import array_libraries, quantization, reference
from tests.array_libraries import DTYPES, Array, Framework
from tests.cases import normal
from tests.checks import BASE, LSE, Tolerance, assert_close
from tests.process_memory import STATUS
from tests.quantization import Format
from tests.sequences import offsets, paged, rotary_tables, varlen_reference
from umfa import QuantizedTensor

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import RunPython

pytestmark = pytest.mark.cpu_only

LEGAL = list(quantization.legal())
KEY = Format("int4", "block", False, (1, 32), "float16")
VALUE = Format("int8", "row", True, None, "float16")


def quantized(x: Array, form: Format, layout: str = "bshd") -> QuantizedTensor:
    return umfa.quantize(x, **form._asdict(), layout=layout)


def numbers(tensor: QuantizedTensor | Array) -> Array:
    return tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor


def check(q: Array, k: Any, v: Any, tolerance: Tolerance | None = None, **options: Any) -> None:
    """Against the float64 reference."""
    out, lse = umfa.quantized_attention(q, k, v, return_lse=True, **options)
    expected, expected_lse = reference.attention(q, numbers(k), numbers(v), **options)
    assert out.dtype == q.dtype
    assert_close(out.astype(np.float64), expected, tolerance or BASE[q.dtype.name])
    assert_close(lse.astype(np.float64), expected_lse, LSE, "lse")


@pytest.mark.parametrize("form", LEGAL, ids=str)
def test_every_format_of_keys_and_values(form: Format) -> None:
    """Prefill and decode, head dims that end in the middle of a vector and of a byte."""
    for seqlen_q, dtype in ((20, "float32"), (1, "float16")):
        q = normal((2, seqlen_q, 4, 75), dtype, seed=1)
        k = quantized(normal((2, 131, 2, 75), seed=2), form)
        v = quantized(normal((2, 131, 2, 33), seed=3), form)
        check(q, k, v)


@pytest.mark.parametrize("form", LEGAL, ids=str)
def test_decoding_has_the_bits_of_dequantised_tensors(form: Format) -> None:
    """One query of a group of four heads, several queries, and more than stay in registers; whole
    vectors of channels and parts of one."""
    for seqlen_q, head_dim in ((1, 128), (3, 75), (7, 33)):
        q = normal((1, seqlen_q, 8, head_dim), "float16", seed=1)
        k, v = (quantized(normal((1, 75, 2, head_dim), seed=i), form) for i in (2, 3))
        out, lse = umfa.quantized_attention(q, k, v, causal=True, return_lse=True)
        plain = umfa.quantized_attention(q, numbers(k), numbers(v), causal=True, return_lse=True)
        np.testing.assert_array_equal(out, plain[0])
        np.testing.assert_array_equal(lse, plain[1])


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("seqlen_q", [1, 40])
def test_any_mix_of_plain_and_quantised(seqlen_q: int, dtype: str) -> None:
    q = normal((1, seqlen_q, 2, 64), dtype, seed=1)
    k, v = (normal((1, 100, 2, 64), dtype, seed=i) for i in (2, 3))
    check(q, quantized(k, KEY), v, causal=True)
    check(q, k, quantized(v, VALUE), causal=True)
    check(q, quantized(k, VALUE), quantized(v, KEY), causal=True)
    check(q, k, v, causal=True)


@pytest.mark.parametrize("bits", [4, 8])
def test_mlx_groups(bits: int) -> None:
    mlx = array_libraries.load("mlx")
    q, k, v = (mlx.tensor(normal((1, 2, n, 64), "float16", seed=n)) for n in (9, 50, 51))
    k, v = (
        QuantizedTensor.from_mlx(
            *mlx.module.quantize(x, group_size=32, bits=bits), group_size=32, bits=bits
        )
        for x in (k, v[:, :, :50])
    )
    out = umfa.quantized_attention(q, k, v, layout="bhsd")
    assert isinstance(out, mlx.array_type)
    arrays = [np.array(x).swapaxes(1, 2) for x in (q, k.dequantize(), v.dequantize())]
    expected, _ = reference.attention(*arrays)
    assert_close(mlx.float64(out).swapaxes(1, 2), expected, BASE["float16"])


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("seqlen_q", [1, 40])
def test_gguf_blocks(seqlen_q: int, kind: str) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    k, v = (
        QuantizedTensor.from_gguf(
            gguf.quants.quantize(
                normal((1, 70, 2, 64), seed=i), getattr(gguf.GGMLQuantizationType, kind)
            ),
            kind.lower(),
            layout="bshd",
        )
        for i in (1, 2)
    )
    check(normal((1, seqlen_q, 4, 64), seed=3), k, v)


OPTIONS: list[dict[str, Any]] = [
    {"causal": True},
    {"causal": True, "causal_alignment": "top_left"},
    {"window_size": (17, 3)},
    {"softcap": 5.0},
    {"softmax_scale": 0.3},
    {"alibi_slopes": np.float32([0.1, 0.2, 0.3, 0.4])},
    {"attn_mask": normal((2, 1, 1, 131), seed=9) > -0.5},
    {"attn_mask": normal((1, 4, 1, 131), "float16", seed=9)},
    {"learnable_sink": np.float32([0.5, -1.0, 2.0, 0.0])},
    {"dropout_p": 0.3, "dropout_seed": 5},
    {"attention_chunk": 32, "attention_chunk_offset": 5},
    {"prefix_lens": np.int32([9, 40]), "causal": True},
    {"num_splits": 3},
    {"batch_invariant": True},
    {"seqused_k": np.int32([131, 77])},
    {"cache_batch_idx": np.int32([1, 0])},
    {"cache_leftpad": np.int32([3, 50]), "seqused_k": np.int32([131, 120])},
    {"out_dtype": np.float32},
    {"qv": True},
    {"rotary": True},
]


@pytest.mark.parametrize("seqlen_q", [2, 37])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda x: "-".join(x))
def test_every_option(options: dict[str, Any], seqlen_q: int) -> None:
    """The same bits as on dequantised tensors."""
    options = dict(options)
    q = normal((2, seqlen_q, 4, 64), "float16", seed=1)
    k = quantized(normal((2, 131, 2, 64), seed=2), KEY)
    v = quantized(normal((2, 131, 2, 80), seed=3), VALUE)
    if options.pop("qv", False):
        options["qv"] = normal((2, seqlen_q, 4, 80), "float16", seed=4)
    if options.pop("rotary", False):
        options["rotary_cos"], options["rotary_sin"] = rotary_tables(131, 32)
    found = umfa.quantized_attention(q, k, v, return_lse=True, **options)
    plain = umfa.quantized_attention(q, numbers(k), numbers(v), return_lse=True, **options)
    without = umfa.quantized_attention(q, k, v, return_lse=True)
    for own, other in zip(found, plain, strict=True):
        np.testing.assert_array_equal(own, other)
    if not {"num_splits", "batch_invariant", "out_dtype"} & options.keys():
        assert (found[0] != without[0]).any(), "the option has no effect"


def test_packed_sequences() -> None:
    lengths_q, lengths_k = [8, 0, 16, 1], [10, 5, 70, 33]
    q = normal((25, 4, 64), "float16", seed=1)
    k, v = (normal((118, 2, 64), seed=i) for i in (2, 3))
    tables = {"cu_seqlens_q": offsets(lengths_q), "cu_seqlens_k": offsets(lengths_k)}
    for form in (KEY, VALUE, Format("float8_e4m3fn", "block", True, (3, 16))):
        keys, values = quantized(k, form), quantized(v, form)
        out, lse = umfa.quantized_attention(q, keys, values, causal=True, return_lse=True, **tables)
        expected, expected_lse = varlen_reference(
            q, keys.dequantize(), values.dequantize(), *tables.values(), causal=True
        )
        assert_close(out.astype(np.float64), expected, BASE["float16"])
        assert_close(lse.astype(np.float64), expected_lse, LSE, "lse")


@pytest.mark.parametrize("seqlen_q", [1, 9])
@pytest.mark.parametrize(
    "form", [KEY, VALUE, Format("nf4", "block", True, (4, 32)), Format("int8", "channel")], ids=str
)
def test_pages(form: Format, seqlen_q: int) -> None:
    """What no row fills is NaN: pages are quantised with poisoned blocks, which nobody may see."""
    caches = [normal((2, 90, 2, 64), seed=i) for i in (1, 2)]
    (key_pages, value_pages), table = paged(caches, 16, seed=3)
    if form.granularity != "row":  # a block of many tokens may not hold NaN
        key_pages, value_pages = (np.nan_to_num(x) for x in (key_pages, value_pages))
    k, v = (umfa.quantize(x, **form._asdict(), nonfinite="nan") for x in (key_pages, value_pages))
    q = normal((2, seqlen_q, 4, 64), "float16", seed=4)
    options: dict[str, Any] = {"block_table": table, "seqused_k": np.int32([90, 41])}
    out, lse = umfa.quantized_attention(q, k, v, return_lse=True, causal=True, **options)
    plain = umfa.quantized_attention(
        q, numbers(k), numbers(v), return_lse=True, causal=True, **options
    )
    assert np.isfinite(out).all()
    np.testing.assert_array_equal(out, plain[0])
    np.testing.assert_array_equal(lse, plain[1])


@pytest.mark.parametrize("seqlen_q", [1, 40])
def test_hidden_blocks_of_nan_and_rows_that_see_nothing(seqlen_q: int) -> None:
    x = normal((1, 100, 2, 64), seed=1)
    x[:, 30:33] = np.nan
    k, v = (umfa.quantize(x, "int8", nonfinite="nan") for _ in range(2))
    mask = np.ones((1, 1, seqlen_q, 100), bool)
    mask[..., 30:33] = False
    mask[:, :, 0] = False
    q = normal((1, seqlen_q, 2, 64), seed=2)
    out, lse = umfa.quantized_attention(q, k, v, attn_mask=mask, return_lse=True)
    assert np.isfinite(out).all()
    assert (out[:, 0] == 0).all()
    assert (lse[:, :, 0] == -np.inf).all()
    clean = np.nan_to_num(x)
    check_k, check_v = (umfa.quantize(clean, "int8") for _ in range(2))
    expected, _ = reference.attention(q, numbers(check_k), numbers(check_v), mask=mask)
    assert_close(out.astype(np.float64), expected, BASE["float32"])
    seen = umfa.quantized_attention(q, k, v)
    assert np.isnan(seen).all()


def test_both_layouts_and_every_framework(framework: Framework) -> None:
    q, k, v = (normal((2, n, 2, 64), "float16", seed=n) for n in (7, 50, 51))
    v = v[:, :50]
    own = [framework.tensor(x) for x in (q, k, v)]
    keys, values = (umfa.quantize(x, "int8") for x in own[1:])
    out = umfa.quantized_attention(own[0], keys, values)
    assert isinstance(out, framework.array_type)
    expected, _ = reference.attention(q, *(framework.numpy(x.dequantize()) for x in (keys, values)))
    assert_close(framework.float64(out), expected, BASE["float16"])
    swapped = [framework.tensor(np.ascontiguousarray(x.swapaxes(1, 2))) for x in (q, k, v)]
    keys, values = (umfa.quantize(x, "int8", layout="bhsd") for x in swapped[1:])
    again = umfa.quantized_attention(swapped[0], keys, values, layout="bhsd")
    np.testing.assert_array_equal(framework.numpy(again).swapaxes(1, 2), framework.numpy(out))


def test_the_same_bits_from_any_number_of_threads() -> None:
    q, k, v = (normal((2, n, 4, 64), "bfloat16", seed=n) for n in (5, 700, 701))
    keys, values = quantized(k, KEY), quantized(v[:, :700], VALUE)
    for queries in (q, q[:, :1]):
        umfa.set_num_threads(1)
        one = umfa.quantized_attention(queries, keys, values)
        umfa.set_num_threads(4)
        four = umfa.quantized_attention(queries, keys, values)
        np.testing.assert_array_equal(one.view(np.uint16), four.view(np.uint16))


def test_every_instruction_set(isa: str) -> None:
    for form in (KEY, VALUE, *LEGAL[::7]):
        q = normal((1, 20, 2, 40), seed=1)
        k, v = (quantized(normal((1, 99, 2, 40), seed=i), form) for i in (2, 3))
        check(q, k, v)
        check(q[:, :1], k, v)
        out = umfa.quantized_attention(q[:, :1], k, v)
        np.testing.assert_array_equal(
            out, umfa.quantized_attention(q[:, :1], *map(numbers, (k, v)))
        )


def test_after_append() -> None:
    """A cache that grows a token at a time, as decoding does."""
    tokens = normal((1, 40, 2, 64), "float16", seed=1)
    k, v = (umfa.quantize(np.zeros_like(tokens), **KEY._asdict()) for _ in range(2))
    for i in range(40):
        k.append(tokens[:, i : i + 1], i)
        v.append(tokens[:, i : i + 1], i)
        used = np.int32([i + 1])
        q = normal((1, 1, 4, 64), "float16", seed=i)
        out = umfa.quantized_attention(q, k, v, seqused_k=used)
        expected, _ = reference.attention(q, numbers(k)[:, : i + 1], numbers(v)[:, : i + 1])
        assert_close(out.astype(np.float64), expected, BASE["float16"])


def cosine(a: Array, b: Array) -> float:
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def test_a32_int4_keys_and_values() -> None:
    """(1,4,512,512,128), groups of 32. Some channels of the keys have an offset of 5. Attention
    does not change when it is taken out: each row of scores changes by one number."""
    q, k, v = (normal((1, 512, 4, 128), seed=i) for i in range(3))
    k[..., ::16] += 5
    q, k, v = (x.astype(np.float16) for x in (q, k, v))
    exact, _ = reference.attention(q, k, v)
    form = Format("int4", "block", True, (1, 32), "float16")
    values = quantized(v, form)
    check(q, quantized(k, form), values, Tolerance(2e-3, 1e-3))
    smooth = (k - k.astype(np.float32).mean(1, keepdims=True)).astype(np.float16)
    out = umfa.quantized_attention(q, quantized(smooth, form), values)
    assert cosine(out, exact) >= 0.985


MEMORY = """
import sys
import numpy as np
import umfa

seqlen, heads = 32768, 16
parts = [np.zeros((1, seqlen, heads, 64), np.int8), np.ones((1, seqlen, heads, 1), np.float16)]
k, v = (umfa.QuantizedTensor(*parts, dtype="int8", scale_dtype="float16") for _ in range(2))
q = np.ones((1, 200, heads, 64), np.float16)
umfa.quantized_attention(q[:, :4], k, v, seqused_k=np.int32([100]))  # starts the threads
parts[0].sum(), q.sum()  # pages are in memory
before = status("VmRSS")
umfa.quantized_attention(q, k, v, causal=True)
umfa.quantized_attention(q[:, :1], k, v)
print(status("VmHWM") - before)
"""


def test_memory_is_bounded(run_python: RunPython, tmp_path: Path) -> None:
    """Keys alone would take 134 MB as float32, and 67 MB as float16."""
    done = run_python(STATUS + MEMORY)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 16e6


X = normal((1, 8, 2, 32), seed=0)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"layout": "bhsd"}, ValueError, "layout differs: that of k and of the call; got 'bshd'"),
        ({"layout": "sbhd"}, ValueError, "layout is unknown; got 'sbhd'"),
        ({"q": umfa.quantize(X, "int8")}, umfa.UnsupportedError, "q is quantised; got int8"),
        ({"k": umfa.quantize(X[..., :16], "int8")}, ValueError, "head_dim differs: q has 32, k h"),
        ({"v": umfa.quantize(X[:, :4], "int8")}, ValueError, "seqlen differs: k has 8, v has 4"),
        ({"v": umfa.quantize(X[0], "int8")}, ValueError, "v has 3 dimensions"),
        ({"k": array_libraries}, TypeError, "k is not a tensor"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_refusals(changes: dict[str, Any], error: type, text: str) -> None:
    given: dict[str, Any] = {"q": X, "k": umfa.quantize(X, "int8"), "v": umfa.quantize(X, "int8")}
    with pytest.raises(error, match=rf"^\[umfa\.quantized_attention\] .*{text}"):
        umfa.quantized_attention(**{**given, **changes})


def test_results_may_not_lie_in_scales() -> None:
    scales = np.ones((1, 8, 2, 32), np.float16)
    k = QuantizedTensor(
        np.zeros((1, 8, 2, 32), np.int8), scales[..., :1], dtype="int8", scale_dtype="float16"
    )
    with pytest.raises(ValueError, match="out overlaps scales in memory"):
        umfa.quantized_attention(X.astype(np.float16), k, k, out=scales)


def test_can_run() -> None:
    k = umfa.quantize(X, "int8")
    assert umfa.can_run(umfa.quantized_attention, X, k, k) == (True, "")


def test_gradients_are_refused() -> None:
    torch = array_libraries.load("torch").module
    x = torch.randn(1, 8, 2, 32)
    k = umfa.quantize(x, "int8")
    with pytest.raises(umfa.UnsupportedError, match="a quantised key or value is not implemented"):
        umfa.quantized_attention(x.clone().requires_grad_(), k, k).sum().backward()


def test_jax_jit() -> None:
    jax = pytest.importorskip("jax", reason="jax is not installed")
    q, x = (jax.numpy.asarray(normal((1, n, 2, 64), seed=n)) for n in (5, 40))
    k, v = (umfa.quantize(x, **form._asdict()) for form in (KEY, VALUE))
    jitted = jax.jit(lambda y: umfa.quantized_attention(y, k, v, causal=True))
    np.testing.assert_array_equal(jitted(q), umfa.quantized_attention(q, k, v, causal=True))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace:UserWarning")
def test_torch_compile() -> None:
    """It breaks its graph at the call."""
    torch = array_libraries.load("torch").module
    q, x = torch.randn(1, 5, 2, 64), torch.randn(1, 40, 2, 64)
    k, v = (umfa.quantize(x, **form._asdict()) for form in (KEY, VALUE))

    def call(y: Any) -> Any:
        return umfa.quantized_attention(y, k, v, causal=True)

    compiled = torch.compile(call, backend="aot_eager")
    assert torch.equal(compiled(q), call(q))
