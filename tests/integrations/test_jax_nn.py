"""`umfa.jax.dot_product_attention` beside jax.nn's and the float64 reference."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import umfa
from tests import array_libraries, reference
from tests.array_libraries import Array
from tests.cases import normal
from tests.checks import BASE, LSE, assert_close
from tests.gradients import RELATIVE, compare

jax = pytest.importorskip("jax")
jnp = jax.numpy
library = array_libraries.load("jax")
ours = pytest.importorskip("umfa.jax").dot_product_attention
stock = jax.nn.dot_product_attention

NAME = r"^\[umfa\.jax\.dot_product_attention\] "
B, T, S, N, K, H = 2, 9, 11, 4, 2, 16
Q_LENGTHS, K_LENGTHS = np.array([5, 20], np.int32), np.array([7, 40], np.int32)
"""Some are longer than the rows, which jax does not mind."""


def tensors(dtype: str = "float32") -> list[Array]:
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H)
    return [normal(shape, dtype, seed=i) for i, shape in enumerate(shapes)]


def some(*shape: int) -> Array:
    """A mask that leaves each query the key below its own position, which windows leave it too."""
    made = normal(shape, seed=7) > -0.3
    made |= np.eye(*made.shape[-2:], -1, dtype=bool)
    made[..., 0, 0] = True
    return made


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 0.3},
    "bias": {"bias": normal((1, N, T, S), seed=5)},
    "bias of other dtype": {"bias": normal((B, 1, 1, S), "bfloat16", seed=5)},
    "bias of 3 dimensions": {"bias": normal((N, T, S), seed=5)},
    "integer bias": {"bias": np.arange(S, dtype=np.int32).reshape(1, 1, 1, S)},
    "mask": {"mask": some(B, 1, T, S)},
    "bias and mask": {"bias": normal((1, N, T, S), seed=5), "mask": some(B, 1, T, S)},
    "causal": {"is_causal": True},
    "window": {"local_window_size": 3},
    "window of 2": {"local_window_size": (4, 1)},
    "right bound below 0": {"local_window_size": (6, -1), "mask": None},
    "causal window": {"local_window_size": [2, 4], "is_causal": True},
    "query lengths": {"query_seq_lengths": Q_LENGTHS},
    "key lengths": {"key_value_seq_lengths": K_LENGTHS, "is_causal": True},
    "everything": {
        "bias": normal((B, N, 1, S), seed=5), "mask": some(1, N, T, S), "is_causal": True,
        "local_window_size": (4, 3), "query_seq_lengths": Q_LENGTHS,
        "key_value_seq_lengths": K_LENGTHS, "scale": 0.4,
    },
}  # fmt: skip
"""Static ones are what jax.jit cannot take as an argument."""
STATIC = ("scale", "is_causal", "local_window_size")

every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def mask_of(options: dict[str, Any]) -> Array:
    """All that hides and biases, as numbers: jax's own rules, written out."""
    i, j = np.arange(T)[:, None], np.arange(S)
    sees = np.ones((B, N, T, S), bool)
    if options.get("mask") is not None:
        sees &= options["mask"]
    if options.get("is_causal"):
        sees &= j <= i
    window = options.get("local_window_size")
    if window is not None:
        left, right = (window, window) if isinstance(window, int) else window
        sees &= (i - left <= j) & (j <= i + right)
    if "query_seq_lengths" in options:
        sees &= i < options["query_seq_lengths"][:, None, None, None]
    if "key_value_seq_lengths" in options:
        sees &= j < options["key_value_seq_lengths"][:, None, None, None]
    return np.where(sees, np.float64(options.get("bias", 0.0)), -np.inf)


def expected(q: Array, k: Array, v: Array, options: dict[str, Any]) -> tuple[Any, Any]:
    scale = options.get("scale")
    return reference.attention(q, k, v, mask=mask_of(options), softmax_scale=scale)


def traced(function: Callable[..., Any], options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(a function of the tensors and of the arrays among the options, these arrays)."""
    static = {name: x for name, x in options.items() if name in STATIC}
    arrays = {name: x for name, x in options.items() if name not in STATIC and x is not None}
    return lambda q, k, v, arrays: function(q, k, v, **arrays, **static), arrays


def test_the_signature_is_jax_s() -> None:
    theirs, own = (inspect.signature(x).parameters.values() for x in (stock, ours))
    assert [(x.name, x.kind, x.default) for x in own] == [
        (x.name, x.kind, x.default) for x in theirs
    ]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@every_option
def test_values(options: dict[str, Any], dtype: str) -> None:
    """Under jit, the arrays among the options traced; the bits are those of an eager call."""
    q, k, v = tensors(dtype)
    call, arrays = traced(ours, options)
    given = [library.tensor(x) for x in (q, k, v)]
    found, residual = jax.jit(lambda *x: call(*x, arrays | {"return_residual": True}))(*given)
    out, lse = expected(q, k, v, options)
    assert found.dtype == residual.dtype == dtype
    assert_close(library.float64(found), out, BASE[dtype])
    tolerance = LSE if dtype == "float32" else BASE[dtype]
    assert_close(library.float64(residual), lse.swapaxes(1, 2), tolerance, "residual")
    eager = ours(*given, **options)
    assert np.array_equal(library.bits(eager), library.bits(found))
    inside = jax.jit(call)(*given, {name: jnp.asarray(x) for name, x in arrays.items()})
    assert np.array_equal(library.bits(inside), library.bits(found))
    theirs = library.float64(stock(*given, **options, implementation="xla"))
    slack = 1 if dtype == "float32" else 4  # jax rounds the weights to the dtype, umfa does not
    atol, rtol = (slack * x for x in BASE[dtype])
    seen = np.isfinite(lse.swapaxes(1, 2))
    np.testing.assert_allclose(library.float64(found)[seen], theirs[seen], rtol=rtol, atol=atol)


@every_option
def test_gradients(options: dict[str, Any]) -> None:
    """Of query, key, value and bias, against float64 and jax's own."""
    q, k, v = tensors()
    dout = normal((B, T, N, H), seed=9)
    dout[:, 0] = 0  # a row that sees no key: jax spreads its gradient over all values
    call, arrays = traced(ours, options)
    theirs, _ = traced(stock, options)
    has_bias = "bias" in arrays and jnp.issubdtype(arrays["bias"].dtype, jnp.floating)
    given = [library.tensor(x) for x in (q, k, v)]
    if has_bias:
        given.append(library.tensor(arrays.pop("bias")))

    def gradients(attention: Callable[..., Any]) -> Any:
        def loss(q: Any, k: Any, v: Any, *bias: Any) -> Any:
            more = arrays | ({"bias": bias[0]} if bias else {})
            return (attention(q, k, v, more) * dout).sum()

        return jax.jit(jax.grad(loss, tuple(range(len(given)))))(*given)

    mask = mask_of(options)
    own = reference.gradients(q, k, v, dout, mask=mask, softmax_scale=options.get("scale"))
    wanted = [own.dq, own.dk, own.dv]
    if has_bias:
        shape = options["bias"].shape
        wanted.append(reference.summed_to(own.dmask, (1,) * (4 - len(shape)) + shape)[0:])
        wanted[3] = wanted[3].reshape(shape)
    for name, a, b, c in zip(("q", "k", "v", "bias"), gradients(call), wanted, gradients(theirs),
                             strict=False):  # fmt: skip
        tolerance = RELATIVE[str(a.dtype)]
        compare(name, np.asarray(a, np.float64), b, tolerance)
        compare(name, np.asarray(a, np.float64), np.asarray(c, np.float64), 2 * tolerance)


def test_one_sequence() -> None:
    q, k, v = [library.tensor(x[0]) for x in tensors()]
    found, residual = ours(q, k, v, is_causal=True, return_residual=True)
    theirs, other = stock(q, k, v, is_causal=True, return_residual=True)
    assert found.shape == (T, N, H)
    assert residual.shape == (T, N)
    np.testing.assert_allclose(found, theirs, atol=2e-6)
    np.testing.assert_allclose(residual, other, atol=2e-6)


def test_arrays_of_others_and_x64() -> None:
    """NumPy arrays and lists are jax's ArrayLike; x64 changes nothing."""
    q, k, v = tensors()
    plain = ours(q, k, v, mask=np.ones((1, 1, T, S), bool).tolist(), query_seq_lengths=[5, 9])
    assert isinstance(plain, jax.Array)
    np.testing.assert_allclose(
        plain, stock(q, k, v, query_seq_lengths=jnp.array([5, 9])), atol=2e-6
    )
    with jax.enable_x64(True):
        again = jax.jit(lambda *x: ours(*x, query_seq_lengths=[5, 9], scale=np.float32(0.25)))
        np.testing.assert_allclose(again(q, k, v), plain, atol=2e-6)
        wide = [jnp.asarray(x, jnp.float64) for x in (q, k, v)]
        for run in (ours, jax.jit(ours)):
            with pytest.raises(umfa.UnsupportedError, match=NAME + "query .*float64"):
                run(*wide)
        with pytest.raises(umfa.UnsupportedError, match=NAME + "bias .*float64"):
            ours(q, k, v, jnp.zeros((1, 1, T, S)))


def test_a_query_without_a_key() -> None:
    """It gets 0 and -inf, where jax gives the mean of all values."""
    q, k, v = tensors()
    nothing = np.ones((1, 1, T, S), bool)
    nothing[..., 3, :] = False
    found, residual = ours(q, k, v, mask=nothing, return_residual=True)
    assert not found[:, 3].any()
    assert np.isneginf(residual[:, 3]).all()
    gradient = jax.grad(lambda v: ours(q, k, v, mask=nothing)[:, 3].sum())(jnp.asarray(v))
    assert not gradient.any()


def test_transforms() -> None:
    """vmap, scan and checkpoint, with a bias and lengths, give what each slice gives alone."""
    q, k, v = (library.tensor(x) for x in tensors())
    bias = library.tensor(normal((3, 1, N, T, S), seed=5))
    lengths = jnp.array([[3, 9], [9, 11], [1, 2]], jnp.int32)

    def loss(q: Any, bias: Any, lengths: Any) -> Any:
        out = ours(q, k, v, bias, key_value_seq_lengths=lengths, is_causal=True)
        return (out**2).sum()

    both = jax.value_and_grad(loss, (0, 1))
    found = jax.jit(jax.vmap(both, in_axes=(None, 0, 0)))(q, bias, lengths)
    alone = [both(q, bias[i], lengths[i]) for i in range(3)]
    together = jax.tree.map(lambda *x: np.stack(x), *alone)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(together), strict=True):
        compare("slices", np.asarray(a), b.astype(np.float64), 1e-5)

    def repeated(attention: Callable[..., Any]) -> Any:
        def run(q: Any) -> Any:
            def step(x: Any, bias: Any) -> tuple[Any, None]:
                return attention(x, k, v, bias, local_window_size=4), None

            return (jax.lax.scan(jax.checkpoint(step), q, bias)[0] ** 2).sum()

        return jax.jit(jax.grad(run))(q)

    compare("scan", np.asarray(repeated(ours)), np.asarray(repeated(stock), np.float64), 1e-4)


def test_no_python_runs_with_a_compiled_function() -> None:
    """It is a custom call: the program has no callback, and nothing of the scores' size."""
    q, k, v = (library.tensor(x) for x in tensors())
    program = jax.jit(lambda *x: ours(*x, is_causal=True)).lower(q, k, v).compile()
    text = program.as_text()
    assert "umfa.attention" in text
    assert "callback" not in text
    assert program.memory_analysis().temp_size_in_bytes == 0


@pytest.mark.slow
def test_sharded_arrays(run_python: Any) -> None:
    """jit of arrays spread over devices, by batch and by heads, and shard_map."""
    code = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from umfa.jax import dot_product_attention as ours
rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((4, 6, 2, 8), np.float32) for _ in range(3))
lengths = np.array([1, 6, 3, 4], np.int32)
def call(q, k, v, lengths):
    return ours(q, k, v, key_value_seq_lengths=lengths, is_causal=True)
def loss(*x):
    return (call(*x) ** 2).sum()
alone = jax.grad(loss, (0, 1, 2))(q, k, v, lengths)
mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
for spec in (P("x"), P(None, None, "x")):
    spread = [jax.device_put(x, NamedSharding(mesh, spec)) for x in (q, k, v)]
    np.testing.assert_allclose(jax.jit(call)(*spread, lengths), call(q, k, v, lengths), atol=1e-6)
    assert "all-gather" in jax.jit(call).lower(*spread, lengths).compile().as_text()
    for a, b in zip(jax.jit(jax.grad(loss, (0, 1, 2)))(*spread, lengths), alone, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
if hasattr(jax, "shard_map"):
    parts = jax.shard_map(call, mesh=mesh, in_specs=(P("x"),) * 4, out_specs=P("x"))
    found = jax.jit(parts)(q, k, v, lengths)
    np.testing.assert_allclose(found, call(q, k, v, lengths), atol=1e-6)
"""
    process = run_python(code, XLA_FLAGS="--xla_force_host_platform_device_count=2")
    assert process.returncode == 0, process.stderr


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "implementation": ({"implementation": "xla"}, ValueError, "implementation .*got 'xla'"),
    "mask of numbers": ({"mask": np.ones((1, 1, T, S))}, TypeError, "mask .*got float32"),
    "mask's shape": ({"mask": np.ones((1, 1, T, 3), bool)}, ValueError, r"mask .*\(1, 1, 9, 3\)"),
    "bias's shape": ({"bias": np.ones((1, 3, T, S))}, ValueError, r"bias .*\(1, 3, 9, 11\)"),
    "both": (
        {"bias": np.ones((1, 1, T, S)), "mask": np.ones((1, 1, T, 3), bool)},
        ValueError,
        r"bias and mask .*\(1, 1, 9, 11\) and \(1, 1, 9, 3\)",
    ),
    "a mask of more rows, with lengths": (
        {"mask": np.ones((T + 1, S), bool), "query_seq_lengths": np.ones(B, np.int32)},
        ValueError,
        r"mask has the wrong shape; got \(10, 11\); expected .* \(2, 4, 9, 11\)",
    ),
    "a bias of more keys, with lengths": (
        {"bias": np.ones((T, S + 1)), "key_value_seq_lengths": np.ones(B, np.int32)},
        ValueError,
        r"bias has the wrong shape; got \(9, 12\); expected .* \(2, 4, 9, 11\)",
    ),
    "window": ({"local_window_size": (1, 2, 3)}, TypeError, r"local_window_size .*\(1, 2, 3\)"),
    "window of fractions": ({"local_window_size": 1.5}, TypeError, "local_window_size .*1.5"),
    "no key left": (
        {"local_window_size": (-1, 5), "is_causal": True},
        ValueError,
        r"local_window_size leaves no key; got \(-1, 5\), is_causal=True",
    ),
    "lengths of fractions": (
        {"query_seq_lengths": np.ones(B)}, TypeError, "query_seq_lengths .*got float32"
    ),
    "too many lengths": (
        {"key_value_seq_lengths": np.ones(3, np.int32)}, ValueError,
        r"key_value_seq_lengths .*\(3,\)",
    ),
    "scale": ({"scale": "big"}, TypeError, "scale"),
    "scales": ({"scale": jnp.ones(N)}, ValueError, r"scale has dimensions; got shape \(4,\)"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "kind", "text"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(options: dict[str, Any], kind: type[Exception], text: str) -> None:
    q, k, v = tensors()
    for run in (ours, jax.jit(lambda *x: ours(*x, **options))):
        with pytest.raises(kind, match=NAME + text):
            run(q, k, v, **options) if run is ours else run(q, k, v)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_traced_scale(dtype: str) -> None:
    """As ``1 / jnp.sqrt(H)`` is inside of jit; it has a gradient."""
    q, k, v = (library.tensor(x) for x in tensors(dtype))

    def loss(attention: Callable[..., Any], dtype: Any) -> Any:
        def loss(scale: Any) -> Any:
            return (attention(*(x.astype(dtype) for x in (q, k, v)), scale=scale) ** 2).sum()

        return jax.jit(jax.grad(loss))(jnp.float32(0.3))

    compare("scale", np.asarray(loss(ours, dtype)), np.asarray(loss(stock, "float32")),
            RELATIVE[dtype])  # fmt: skip
    found = jax.jit(lambda *x: ours(*x, scale=1 / jnp.sqrt(H)))(q, k, v)
    assert found.dtype == dtype
    out, _ = expected(*tensors(dtype), {})
    assert_close(library.float64(found), out, BASE[dtype])


def test_what_is_not_differentiable() -> None:
    q, k, v = (library.tensor(x) for x in tensors())
    with pytest.raises(umfa.UnsupportedError, match=NAME + "the gradient of a gradient"):
        jax.hessian(lambda q: ours(q, k, v).sum())(q)
    found = jax.grad(lambda q: ours(q, k, v, return_residual=True)[1].sum())(q)
    assert not found.any()  # as in jax, the residual is a constant
    with pytest.raises(ValueError, match=NAME + "query"):
        ours(q[0, 0], k, v)
