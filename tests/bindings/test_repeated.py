"""Calls that repeat another one's options: wholly in C++ on plain arrays, by Python else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import umfa
from tests import reference
from tests.cases import normal
from umfa import _ext
from umfa._call import _public, repeated

sdpa = umfa.scaled_dot_product_attention
SHAPE = (1, 2, 5, 8)


def arrays(dtype: Any = np.float32) -> list[Any]:
    return [normal(SHAPE, seed=i).astype(dtype) for i in range(3)]


def by_python(*tensors: Any, **options: Any) -> Any:
    """The call as if it were the first: its record, and nothing that was kept."""
    return _public.run(_public.BODIES[sdpa](*tensors, **options))


def expect_repeated(tensors: Any, **options: Any) -> Any:
    sdpa(*tensors, **options)
    found = repeated(sdpa, tuple(tensors), options)
    assert found is not None, "Python computed"
    return found


def expect_python(tensors: Any, **options: Any) -> None:
    assert repeated(sdpa, tuple(tensors), options) is None


OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"is_causal": True},
    {"scale": 0.25, "backend": "cpu"},
    {"out_dtype": "float16"},
    {"dropout_p": 0.5, "dropout_seed": 3},
)

NUMPY: dict[str, Callable[[Any], Any]] = {
    "whole": lambda x: x,
    "read-only": lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
    "steps": lambda x: np.repeat(x, 2, axis=-2)[:, :, ::2],
    "reversed": lambda x: x[:, ::-1, ::-1],
    "another order": lambda x: np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2),
    "expanded": lambda x: np.broadcast_to(x[:, :1], x.shape),
    "without a batch": lambda x: x[0],
    "no rows": lambda x: x[:, :, :0],
}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("view", NUMPY.values(), ids=NUMPY)
def test_numpy(view: Callable[[Any], Any], dtype: Any, options: dict[str, Any]) -> None:
    given = [view(x) for x in arrays(dtype)]
    found = expect_repeated(given, **options)
    expected = by_python(*given, **options)
    assert type(found) is np.ndarray
    assert found.flags.writeable
    assert (found.dtype, found.strides) == (expected.dtype, expected.strides)
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("causal", [False, True])
def test_against_the_reference(causal: bool) -> None:
    """What is repeated is the options, not the result."""
    for seed in range(3):
        given = [normal(SHAPE, seed=10 * seed + i) for i in range(3)]
        expected = reference.scaled_dot_product(*given, is_causal=causal)
        found = expect_repeated(given, is_causal=causal)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


class Subclass(np.ndarray):  # type: ignore[type-arg]
    """NumPy's own methods could mean something else here."""


def misaligned(x: Any) -> Any:
    bytes_ = np.zeros(x.nbytes + 1, np.uint8)
    view = bytes_[1:].view(x.dtype).reshape(x.shape)
    view[...] = x
    return view


def of_records(x: Any) -> Any:
    """Strides of 5 bytes."""
    records = np.zeros(x.shape, np.dtype([("a", x.dtype), ("b", np.uint8)]))
    records["a"] = x
    return records["a"]


@pytest.mark.parametrize(
    "made",
    [
        lambda x: x.astype(x.dtype.newbyteorder()),
        lambda x: np.ma.masked_array(x, x > 0),
        lambda x: x.astype(np.float64),
        lambda x: x.astype(np.int32),
        of_records,
        misaligned,
        lambda x: x[0, 0, 0],
        lambda x: x[..., :0],
        lambda x: x.tolist(),
    ],
    ids=[
        "byte order", "masked", "float64", "int32", "records", "misaligned", "1-D", "empty", "list",
    ],
)  # fmt: skip
@pytest.mark.parametrize("position", range(3))
def test_numpy_is_refused_as_the_first_time(made: Callable[[Any], Any], position: int) -> None:
    given = arrays()
    sdpa(*given)
    given[position] = made(given[position])
    with pytest.raises((ValueError, TypeError, umfa.UnsupportedError)) as expected:
        by_python(*given)
    with pytest.raises(expected.type) as found:
        sdpa(*given)
    assert str(found.value) == str(expected.value)
    expect_python(given)


def test_what_only_python_reads() -> None:
    given = arrays()
    sdpa(*given)
    for other in ([x.view(Subclass) for x in given], [memoryview(x) for x in given]):
        expect_python(other)
        np.testing.assert_array_equal(sdpa(*other), sdpa(*given))


def test_types_of_options_count() -> None:
    given = arrays()
    sdpa(*given, is_causal=True)
    sdpa(*given, scale=1.0)
    with pytest.raises(TypeError, match="scale is not a number"):
        sdpa(*given, scale=True)
    for options in ({"is_causal": 1.0}, {"is_causal": "True"}, {"backend": "gpu"}, {"scale": "1"}):
        for _ in range(2):
            with pytest.raises((TypeError, ValueError), match=r"^\[umfa\.scaled_dot"):
                sdpa(*given, **options)
    with pytest.raises(TypeError, match="unknown"):
        sdpa(*given, unknown=1)
    assert not np.array_equal(sdpa(*given, is_causal=True), sdpa(*given, is_causal=False))


def test_tensors_among_the_options_are_not_kept() -> None:
    known = _ext.Repeated()
    given = tuple(arrays())
    assert known.run(given, {"attn_mask": np.ones((5, 5), bool)}) is False
    assert known.run(given, {"window_size": (1, np.ones(1))}) is False
    assert known.run(given[:2], {}) is False
    assert known.run((*given, None), {}) is False
    assert known.run(given, {"window_size": (1, 2)}) is None


def test_how_much_is_kept() -> None:
    known = _ext.Repeated()
    given = tuple(arrays())
    function = _ext.Function("umfa.test", layout="bhsd")
    made = _ext.Attention(
        function, backend="cpu", query=given[0], key=given[1], value=given[2]
    ).options
    for i in range(256):
        assert known.run(given, {"scale": i}) is None
        known.keep({"scale": i}, made, "kept")
        known.keep({"scale": i}, made, "kept twice")
    assert known.run(given, {"scale": 256}) is False
    known.keep({"scale": 256}, made, "one too many")
    assert known.run(given, {"scale": 256}) is False
    assert known.run((None, None, None), {"scale": 255}) == "kept"
    assert np.array_equal(known.run(given, {"scale": 255}), by_python(*given))


# ---- torch ---------------------------------------------------------------------------------------


@pytest.fixture
def torch() -> Any:
    module = pytest.importorskip("torch")
    if not hasattr(module.Tensor, "__dlpack_c_exchange_api__"):
        pytest.skip("this torch has no C exchange API")
    return module


def torch_tensors(torch: Any, dtype: Any = None) -> list[Any]:
    return [torch.from_numpy(x).to(dtype or torch.float32) for x in arrays()]


TORCH: dict[str, Callable[[Any], Any]] = {
    "whole": lambda x: x,
    "steps": lambda x: x.repeat_interleave(2, -2)[:, :, ::2],
    "another order": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "odd strides of one": lambda x: x.as_strided(x.shape, (7, *x.stride()[1:])),
    "expanded": lambda x: x[:, :1].expand(x.shape),
    "without a batch": lambda x: x[0],
    "no rows": lambda x: x[:, :, :0],
}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("view", TORCH.values(), ids=TORCH)
def test_torch(torch: Any, view: Callable[[Any], Any], dtype: str, options: dict[str, Any]) -> None:
    given = [view(x) for x in torch_tensors(torch, getattr(torch, dtype))]
    if options.get("out_dtype", dtype) != dtype:  # allocated by Python
        sdpa(*given, **options)
        return expect_python(given, **options)
    found = expect_repeated(given, **options)
    expected = by_python(*given, **options)
    assert (found.dtype, found.stride()) == (expected.dtype, expected.stride())
    assert torch.equal(found, expected)
    assert not found.requires_grad
    return None


def test_a_value_of_another_head_dim(torch: Any) -> None:
    q, k, v = torch_tensors(torch)
    found = expect_repeated((q, k, v[..., :3]))
    assert found.shape == (*SHAPE[:-1], 3)
    assert found.is_contiguous()
    assert torch.equal(found, by_python(q, k, v[..., :3]))


def test_inference_tensors(torch: Any) -> None:
    given = torch_tensors(torch)
    with torch.inference_mode():
        inside = expect_repeated(given)
        assert inside.is_inference()
    assert not expect_repeated([inside, inside, inside]).is_inference()


@pytest.mark.parametrize("position", range(3))
@pytest.mark.parametrize(
    "made",
    [
        lambda torch, x: torch._neg_view(x),
        lambda torch, x: torch._efficientzerotensor(x.shape),
        lambda torch, x: torch.nn.Parameter(x),
        lambda torch, x: x.clone().requires_grad_(),
        lambda torch, x: x.to_sparse(),
        lambda torch, x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        lambda torch, x: torch.nested.nested_tensor([x[0]], layout=torch.strided),
        lambda torch, x: torch._to_functional_tensor(x),
        lambda torch, x: x.to("meta"),
        lambda torch, x: x.to_mkldnn(),
        lambda torch, x: x.numpy(),
    ],
    ids=[
        "negated", "zeros", "parameter", "grad", "sparse", "quantized", "nested", "functional",
        "meta", "mkldnn", "numpy",
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_that_python_looks_at(
    torch: Any, made: Callable[[Any, Any], Any], position: int
) -> None:
    given = torch_tensors(torch)
    sdpa(*given)
    given[position] = made(torch, given[position])
    expect_python(given)


def test_a_negated_tensor_keeps_its_sign(torch: Any) -> None:
    q, k, v = torch_tensors(torch)
    for _ in range(2):
        assert torch.equal(sdpa(torch._neg_view(q), k, v), sdpa(-q, k, v))


def test_states_in_which_python_decides(torch: Any) -> None:
    given = torch_tensors(torch)
    expect_repeated(given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expect_python(given)
        assert sdpa(*given).dtype is torch.bfloat16
    with torch.autograd.forward_ad.dual_level():
        expect_python(given)
    mode = pytest.importorskip("torch.utils.flop_counter").FlopCounterMode(display=False)
    with mode:
        expect_python(given)
    seen = []
    torch.func.vmap(lambda x: seen.append(repeated(sdpa, tuple(given), {})) or x)(given[0])
    assert seen == [None]
    expect_repeated(given)


def test_gradients_of_repeated_calls(torch: Any) -> None:
    """The same options, with and without gradients, by turns."""
    plain = torch_tensors(torch)
    wanted = [x.clone().requires_grad_() for x in plain]
    for _ in range(2):
        assert sdpa(*plain).grad_fn is None
        sdpa(*wanted).sum().backward()
        with torch.no_grad():
            assert torch.equal(expect_repeated(wanted), sdpa(*plain))
    assert all(x.grad is not None for x in wanted)


# ---- mlx -----------------------------------------------------------------------------------------


@pytest.fixture
def mx() -> Any:
    mlx = pytest.importorskip("mlx.core")
    with mlx.stream(mlx.cpu):
        yield mlx


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_mlx(mx: Any, dtype: str) -> None:
    """Also of arrays that mlx has not evaluated yet, and of views."""
    if mx.default_device().type != mx.DeviceType.cpu:
        pytest.skip("calls go into MLX's graph")
    q, k, v = (mx.array(x).astype(getattr(mx, dtype)) for x in arrays())
    for given in ((q, k, v), (q * 2, k[:, :, ::-1], v), (q[:, :1], k, v)):
        sdpa(*given, backend="cpu")
        sdpa(*given, backend="cpu")
        found = repeated(sdpa, given, {"backend": "cpu"})
        assert type(found) is mx.array
        assert found.dtype == getattr(mx, dtype)
        assert mx.array_equal(found, by_python(*given, backend="cpu"))


def test_mlx_derivatives_reach_python(mx: Any) -> None:
    q, k, v = (mx.array(x) for x in arrays())
    seen: list[Any] = []

    def loss(x: Any) -> Any:
        y = mx.sin(x)
        mx.eval(y)
        for given in ((x, k, v), (q, y, v), (q, k, y)):
            seen.append(repeated(sdpa, given, {"backend": "cpu"}))
        return sdpa(y, k, v, backend="cpu").sum()

    for _ in range(3):
        sdpa(q, k, v, backend="cpu")
    first = mx.grad(loss)(q)
    mx.checkpoint(loss)(q)
    assert mx.array_equal(mx.grad(mx.checkpoint(loss))(q), first)
    assert mx.abs(first).max().item() > 0
    assert all(x is None for x in seen[:3] + seen[-3:])
