"""umfa.quantize and umfa.QuantizedTensor on the tensors of every framework."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import umfa
from tests import array_libraries, quantization
from tests.array_libraries import DTYPES, Array, Framework
from tests.cases import normal
from tests.quantization import Format

pytestmark = pytest.mark.cpu_only

FORMS = [
    Format("int8"),
    Format("int4", "block", False, (2, 16), "float16"),
    Format("float8_e4m3fn", "channel"),
    Format("mxfp4", "block", True, (1, 32), "float8_e8m0fnu"),
]


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_framework(form: Format, dtype: str, framework: Framework) -> None:
    x = normal((2, 3, 9, 40), dtype, seed=1)
    expected = quantization.quantize(x, form)
    found = umfa.quantize(framework.tensor(x), **form._asdict(), layout="bhsd")
    parts = [found.data, found.scales, found.zero_points]
    for part, other in zip(parts, expected[1:], strict=True):
        if other is None:
            assert part is None
            continue
        assert isinstance(part, framework.array_type)
        np.testing.assert_array_equal(np.from_dlpack(part), other)
    out = found.dequantize(framework.tensor(x[:1]).dtype)
    assert isinstance(out, framework.array_type)
    assert framework.dtype_name(out) == dtype
    np.testing.assert_array_equal(
        framework.numpy(out), quantization.dequantize(form, expected, DTYPES[dtype])
    )
    again = umfa.QuantizedTensor(*parts, **form._asdict(), layout="bhsd", head_dim=40)
    np.testing.assert_array_equal(
        framework.numpy(again.dequantize()), framework.numpy(found.dequantize())
    )


def test_dtypes_of_frameworks() -> None:
    torch = array_libraries.load("torch").module
    x = torch.randn(1, 4, 2, 16)
    for given, name in (
        (torch.int8, "int8"),
        (torch.float8_e4m3fn, "float8_e4m3fn"),
        ("fp8_e5m2", "float8_e5m2"),
        (np.int8, "int8"),
    ):
        found = umfa.quantize(x, given, scale_dtype=torch.float16)
        assert (found.dtype, found.scale_dtype) == (name, "float16")
    data = umfa.quantize(x, torch.float8_e4m3fn)
    as_float = umfa.QuantizedTensor(
        data.data.view(torch.float8_e4m3fn), data.scales, dtype="fp8_e4m3"
    )
    assert torch.equal(as_float.dequantize(), data.dequantize())
    theirs = data.data.view(torch.float8_e4m3fn).float() * data.scales
    assert torch.equal(data.dequantize(), theirs)


def test_attributes() -> None:
    x = normal((2, 9, 3, 33), seed=2)
    found = umfa.quantize(x, "int4", "block", symmetric=False, block=(4, None))
    assert found.shape == (2, 9, 3, 33)
    assert found.ndim == 4
    assert found.data.shape == (2, 9, 3, 17)
    assert found.scales.shape == found.zero_points.shape == (2, 3, 3, 1)
    assert (found.dtype, found.granularity, found.symmetric) == ("int4", "block", False)
    assert (found.block, found.scale_dtype, found.layout) == ((4, None), "float32", "bshd")
    assert found.biases is None
    assert repr(found) == (
        "QuantizedTensor(shape=(2, 9, 3, 33), dtype='int4', granularity='block', "
        "symmetric=False, block=(4, None), scale_dtype='float32', layout='bshd', nbytes=1008)"
    )


def test_fewer_dimensions() -> None:
    x = normal((7, 2, 16), seed=3)
    packed = umfa.quantize(x, "int8")
    assert packed.scales.shape == (7, 2, 1)
    whole = umfa.quantize(x[None], "int8")
    np.testing.assert_array_equal(packed.data, whole.data[0])
    rows = umfa.quantize(x[:, 0], "int8", layout="bhsd")
    assert rows.shape == (7, 16)
    np.testing.assert_array_equal(rows.data, whole.data[0, :, 0])
    np.testing.assert_array_equal(rows.dequantize(), packed.dequantize()[:, 0])


def test_int4_cache_takes_29_percent_of_float16() -> None:
    x = normal((1, 64, 2, 128), "float16", seed=4)
    found = umfa.quantize(x, "int4", "block", block=(1, 32), scale_dtype="float16")
    assert found.nbytes <= 0.29 * x.nbytes


def cache(like: Array, form: Format, rows: int, framework: Framework) -> umfa.QuantizedTensor:
    """One with room for `rows` tokens, all bytes 255."""
    wide = np.zeros((*like.shape[:-2], rows, like.shape[-1]), np.float32)
    made = quantization.quantize(wide, form)
    parts = [
        None if p is None else np.full_like(p.view(np.uint8), 255).view(p.dtype) for p in made[1:]
    ]
    tensors = [None if part is None else framework.tensor(part) for part in parts]
    return umfa.QuantizedTensor(*tensors, **form._asdict(), layout="bhsd", head_dim=like.shape[-1])


APPENDED = [
    Format("int8"),
    Format("int4", "row", False, None, "float16"),
    Format("nf4", "block", True, (4, 16)),
    Format("mxfp8", "block", True, (1, 32), "float8_e8m0fnu"),
]


@pytest.mark.parametrize("form", APPENDED, ids=str)
@pytest.mark.parametrize("framework", ["numpy", "torch"], indirect=True)
def test_append(form: Format, framework: Framework) -> None:
    x = normal((2, 3, 20, 33), seed=5)
    expected = quantization.quantize(x, form)
    found = cache(x, form, 32, framework)
    for first, end in ((4, 12), (12, 20), (0, 4)):
        before = found.data
        found.append(framework.tensor(x[:, :, first:end]), first)
        assert found.data is before
    rows = form.block[0] if form.block else 1
    for part, other in zip(
        (found.data, found.scales, found.zero_points), expected[1:], strict=True
    ):
        if other is None:
            continue
        array = np.from_dlpack(part)
        count = other.shape[2]
        np.testing.assert_array_equal(array[:, :, :count], other)
        assert (array[:, :, count:].view(np.uint8) == 255).all()
        assert count == (20 if part is found.data else 20 // rows)


def test_append_of_a_block_that_is_not_full() -> None:
    x = normal((1, 2, 6, 16), seed=6)
    form = Format("int8", "block", True, (4, None))
    found = cache(x, form, 8, array_libraries.load("numpy"))
    found.append(x, 0)
    expected = quantization.quantize(x, form)
    np.testing.assert_array_equal(found.data[:, :, :6], expected.data)
    np.testing.assert_array_equal(found.scales, expected.scales)


def test_append_refuses() -> None:
    x = normal((1, 8, 2, 16), seed=7)
    found = umfa.quantize(x, "int8", "block", block=(4, None))
    with pytest.raises(
        ValueError, match="at is out of place; got 2; expected a multiple of 4, and"
    ):
        found.append(x[:, :4], 2)
    with pytest.raises(ValueError, match=r"at is out of place; got 8; expected .* at most 4"):
        found.append(x[:, :4], 8)
    with pytest.raises(ValueError, match=r"x has the wrong shape; got \(1, 4, 2, 8\)"):
        found.append(x[:, :4, :, :8], 0)
    with pytest.raises(TypeError, match="frameworks differ"):
        found.append(array_libraries.load("torch").tensor(x), 0)
    before = found.data.copy()
    bad = x.copy()
    bad[0, 5, 1, 1] = np.nan
    with pytest.raises(ValueError, match=r"\[umfa\.QuantizedTensor\.append\] x has a NaN"):
        found.append(bad[:, 4:], 4)
    np.testing.assert_array_equal(found.data[:, :4], before[:, :4])
    for granularity in ("tensor", "channel"):
        shared = umfa.quantize(x, "int8", granularity)
        with pytest.raises(umfa.UnsupportedError, match="all tokens share a scale"):
            shared.append(x[:, :1], 0)
    found.data.flags.writeable = False
    with pytest.raises(ValueError, match="data is read-only"):
        found.append(x[:, :4], 0)


@pytest.mark.parametrize("framework", ["jax", "mlx"], indirect=True)
def test_append_to_arrays_that_cannot_be_written(framework: Framework) -> None:
    x = framework.tensor(normal((1, 8, 2, 16), seed=8))
    with pytest.raises(umfa.UnsupportedError, match="written in place"):
        umfa.quantize(x, "int8").append(x, 0)


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda found: pickle.loads(pickle.dumps(found)),
}


@pytest.mark.parametrize("how", list(COPIES))
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_copies(form: Format, how: str, framework: Framework) -> None:
    x = framework.tensor(normal((2, 3, 9, 33), seed=9))
    found = umfa.quantize(x, **form._asdict(), layout="bhsd")
    again = COPIES[how](found)
    assert repr(again) == repr(found)
    assert isinstance(again.data, framework.array_type)
    assert (again.data is found.data) == (how == "copy")
    np.testing.assert_array_equal(
        framework.numpy(again.dequantize()), framework.numpy(found.dequantize())
    )


@pytest.mark.parametrize("how", list(COPIES))
def test_copies_of_foreign_formats(how: str) -> None:
    random = np.random.default_rng(10)
    words = random.integers(0, 2**32, (1, 2, 5, 8), np.uint32)
    scales, biases = (normal((1, 2, 5, 1), "float16", seed=seed) for seed in (11, 12))
    blocks = np.zeros((1, 2, 5, 2 * 34), np.uint8)
    blocks[..., 1] = 0x3C  # a scale of 1
    for found in (
        umfa.QuantizedTensor.from_mlx(words, scales, biases),
        umfa.QuantizedTensor.from_gguf(blocks, "q8_0"),
    ):
        again = COPIES[how](found)
        assert repr(again) == repr(found)
        np.testing.assert_array_equal(again.dequantize(), found.dequantize())


def test_gradients_are_refused() -> None:
    torch = array_libraries.load("torch").module
    x = torch.zeros(1, 4, 2, 16, requires_grad=True)
    with pytest.raises(umfa.UnsupportedError, match="x requires grad"):
        umfa.quantize(x, "int8")
    umfa.quantize(x.detach(), "int8")


def test_mlx_gradients_are_refused() -> None:
    mx = array_libraries.load("mlx").module
    x = mx.ones((1, 4, 2, 16))
    with pytest.raises(umfa.UnsupportedError, match="a derivative is asked for"):
        mx.grad(lambda y: umfa.quantize(y, "int8").scales.sum())(x)


@pytest.mark.parametrize("form", FORMS[:2], ids=str)
def test_mlx_gradients_of_scales_are_refused(form: Format) -> None:
    mx = array_libraries.load("mlx").module
    found = umfa.quantize(mx.ones((1, 4, 2, 16)), **form._asdict())

    def numbers(scales: Any) -> Any:
        parts = (found.data, scales, found.zero_points)
        return umfa.QuantizedTensor(*parts, **form._asdict()).dequantize()

    with pytest.raises(umfa.UnsupportedError, match=r"dequantize\] a derivative is asked for"):
        mx.grad(lambda scales: numbers(scales).sum())(found.scales)
    with pytest.raises(umfa.UnsupportedError, match=r"dequantize\] a derivative is asked for"):
        mx.jvp(lambda scales: [numbers(scales)], [found.scales], [found.scales])
    assert numbers(found.scales).shape == (1, 4, 2, 16)


X = np.zeros((1, 4, 2, 32), np.float32)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"dtype": "int3"}, ValueError, "dtype is unknown; got 'int3'; expected 'int8' or 'int4'"),
        ({"dtype": None}, ValueError, "dtype is unknown; got 'None'"),
        ({"layout": None}, TypeError, "layout is not a string; got None"),
        ({"granularity": "rows"}, ValueError, "granularity is unknown; got 'rows'"),
        ({"granularity": 1}, TypeError, "granularity is not a string"),
        ({"layout": "bsdh"}, ValueError, "layout is unknown"),
        ({"symmetric": 1}, TypeError, "symmetric is not a bool; got 1"),
        ({"scale_dtype": "float64"}, ValueError, "scale_dtype is unknown; got 'float64'"),
        ({"block": (1, 32)}, ValueError, "block is given with granularity='row'; got .1, 32."),
        ({"granularity": "block"}, ValueError, "block is missing"),
        ({"granularity": "block", "block": 4}, TypeError, "block is not a pair; got 4"),
        ({"granularity": "block", "block": (0, 32)}, ValueError, r"block is impossible; got \(0,"),
        ({"granularity": "block", "block": (1, 24)}, ValueError, "channels a multiple of 16"),
        ({"granularity": "block", "block": (1, -16)}, ValueError, "block is impossible"),
        ({"granularity": "block", "block": (1.5, 16)}, TypeError, "block's tokens is not an int"),
        ({"nonfinite": "zero"}, ValueError, "nonfinite is unknown; got 'zero'"),
        ({"backend": "gpu"}, ValueError, "backend is unknown"),
        ({"x": X[0, 0]}, ValueError, r"x has the wrong number of dimensions; got \(2, 32\)"),
        ({"x": X[None]}, ValueError, "x has the wrong number of dimensions"),
        ({"x": X[..., :0]}, ValueError, "head_dim of x is too small; got 0"),
        ({"x": X.astype(np.int32)}, TypeError, "x has the wrong dtype; got int32"),
        ({"x": X.astype(np.float64)}, umfa.UnsupportedError, "x has the wrong dtype; got float64"),
        ({"x": [1.0]}, TypeError, "x is not a tensor"),
        ({"dtype": "nf4", "symmetric": False}, umfa.UnsupportedError, "no zero point"),
        ({"backend": "metal"}, umfa.UnsupportedError, "this build of umfa has no Metal backend"),
    ],
    ids=str,
)
def test_bad_arguments(arguments: dict[str, Any], error: type, text: str) -> None:
    given = {"x": X, "dtype": "int8", **arguments}
    with pytest.raises(error, match=rf"^\[umfa\.quantize\] .*{text}"):
        umfa.quantize(**given)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"data": X}, TypeError, "data has the wrong dtype; got float32; expected int8"),
        ({"data": np.zeros(X.shape, np.uint8)}, TypeError, "data has the wrong dtype; got uint8"),
        ({"scales": None}, ValueError, "scales of data are missing; got None"),
        ({"scales": X}, ValueError, r"scales of data has the wrong shape; got \(1, 4, 2, 32\)"),
        ({"scales": X[..., :1].astype(np.float16)}, TypeError, "scales of data has the wrong dty"),
        ({"zero_points": X[..., :1]}, ValueError, "zero points of data are given; got a tensor"),
        ({"head_dim": 31}, ValueError, r"data has the wrong shape; got \(1, 4, 2, 32\); expected"),
        ({"symmetric": False}, TypeError, "data has the wrong dtype; got int8; expected uint8"),
        ({"data": np.zeros((1, 4, 2, 64), np.int8)[..., ::2]}, ValueError, "is not contiguous"),
    ],
    ids=str,
)
def test_tensors_that_do_not_fit(changes: dict[str, Any], error: type, text: str) -> None:
    given: dict[str, Any] = {"data": X.astype(np.int8), "scales": X[..., :1], "dtype": "int8"}
    umfa.QuantizedTensor(**given)
    with pytest.raises(error, match=rf"^\[umfa\.QuantizedTensor\] .*{text}"):
        umfa.QuantizedTensor(**{**given, **changes})


@pytest.mark.parametrize("dtype", ["float64", np.int8], ids=str)
def test_dequantize_refuses_other_dtypes(dtype: Any) -> None:
    with pytest.raises(TypeError, match=r"\[umfa\.QuantizedTensor\.dequantize\] dtype is wrong"):
        umfa.quantize(X, "int8").dequantize(dtype)
