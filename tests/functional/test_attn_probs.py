"""Seeds of dropout, and the matrix of weights that shows what it dropped."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import umfa
from tests import array_libraries, philox, reference
from tests.array_libraries import Array, Framework
from tests.cases import normal
from tests.checks import Tolerance, assert_close, assert_same_bits
from tests.sequences import offsets

P = 0.3


def weights(
    query: Array, key: Array, seed: int, offset: int = 0, index: int = 0, **options: Any
) -> Array:
    """The matrix as it should be: weights from attention to an identity, signs from Philox."""
    batch, seqlen_q, heads, _ = query.shape
    seqlen_k, heads_k = key.shape[1:3]
    identity = np.broadcast_to(
        np.eye(seqlen_k)[None, :, None], (batch, seqlen_k, heads_k, seqlen_k)
    )
    out, _ = reference.attention(query, key, identity, **options)
    found = out.swapaxes(1, 2)
    for b, h in np.ndindex(batch, heads):
        dropped = philox.dropped(
            P, seed, offset, batch=index + b, head=h, rows=range(seqlen_q), seqlen_k=seqlen_k
        )
        found[b, h] = np.where(dropped, -found[b, h], found[b, h])
    return found


def signs(matrix: Array) -> Array:
    return np.sign(matrix)


@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k", "options"),
    [
        (40, 70, {}),
        (3, 700, {"causal": True}),  # more keys than a value has channels
        (50, 50, {"causal": True, "window_size": (9, 0), "softcap": 5.0}),
        (5, 0, {}),
    ],
)
def test_weights_of_dense_calls(
    seqlen_q: int, seqlen_k: int, options: dict[str, Any], framework: Framework
) -> None:
    query, key = normal((2, seqlen_q, 4, 16), seed=1), normal((2, seqlen_k, 2, 16), seed=2)
    value = normal((2, seqlen_k, 2, 8), seed=3)
    out, lse, found = umfa.flash_attn_func(
        *map(framework.tensor, (query, key, value)), P, return_attn_probs=True, dropout_seed=5,
        dropout_offset=7, **options,
    )  # fmt: skip
    assert isinstance(found, framework.array_type)
    assert framework.dtype_name(found) == "float32"
    matrix = framework.float64(found)
    expected = weights(query, key, 5, 7, **options)
    assert_close(matrix, expected, Tolerance(1e-6, 1e-5), "weights")
    assert (signs(matrix) == signs(expected)).all()
    # And they are those of the same call.
    kept = np.where(matrix > 0, matrix, 0) / (1 - P)
    by_hand = np.einsum("bhij,bjhd->bihd", kept, np.repeat(value.astype(np.float64), 2, axis=2))
    assert_close(framework.float64(out), by_hand, Tolerance(1e-5, 1e-5))
    assert tuple(lse.shape) == (2, 4, seqlen_q)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_have_the_dtype_of_the_query(dtype: str, framework: Framework) -> None:
    tensors = [framework.tensor(normal((1, 20, 2, 16), dtype, seed=i)) for i in range(3)]
    *_, found = umfa.flash_attn_func(*tensors, P, return_attn_probs=True, dropout_seed=1)
    assert framework.dtype_name(found) == dtype
    expected = weights(*map(framework.numpy, tensors[:2]), 1)
    assert (signs(framework.float64(found)) == signs(expected)).all()


def test_weights_of_packed_sequences(framework: Framework) -> None:
    lengths_q, lengths_k, used_k = [3, 0, 17], [5, 4, 40], [5, 2, 33]
    query, key = normal((20, 2, 8), seed=1), normal((49, 1, 8), seed=2)
    cu_q, cu_k = offsets(lengths_q), offsets(lengths_k)
    *_, found = umfa.flash_attn_varlen_func(
        *map(framework.tensor, (query, key, key)), cu_q, cu_k, 17, 40, P, causal=True,
        return_attn_probs=True, seqused_k=np.array(used_k), dropout_seed=3,
    )  # fmt: skip
    matrix = framework.float64(found)
    assert matrix.shape == (3, 2, 17, 33)
    for b in range(3):
        q = query[None, cu_q[b] : cu_q[b + 1]]
        k = key[None, cu_k[b] : cu_k[b] + used_k[b]]
        own = matrix[b, :, : q.shape[1], : k.shape[1]]
        expected = weights(q, k, 3, index=b, causal=True)[0]
        assert_close(own, expected, Tolerance(1e-6, 1e-5), f"weights of {b}")
        assert (signs(own) == signs(expected)).all()
        assert np.count_nonzero(matrix[b]) == np.count_nonzero(own)


@pytest.mark.parametrize("per_sequence", [False, True])
def test_weights_of_packed_sequences_with_slopes(per_sequence: bool) -> None:
    query, key = normal((14, 2, 8), seed=1), normal((30, 2, 8), seed=2)
    cu_q, cu_k = offsets([5, 9]), offsets([12, 18])
    slopes = abs(normal((2, 2) if per_sequence else (2,), seed=3))
    *_, found = umfa.flash_attn_varlen_func(
        query, key, key, cu_q, cu_k, 9, 18, P, window_size=(7, 3), alibi_slopes=slopes,
        return_attn_probs=True, dropout_seed=3,
    )  # fmt: skip
    for b in range(2):
        q, k = query[None, cu_q[b] : cu_q[b + 1]], key[None, cu_k[b] : cu_k[b + 1]]
        own = slopes[b : b + 1] if per_sequence else slopes
        expected = weights(q, k, 3, index=b, window_size=(7, 3), alibi_slopes=own)[0]
        matrix = found[b, :, : q.shape[1], : k.shape[1]]
        assert_close(matrix.astype(float), expected, Tolerance(1e-6, 1e-5), f"weights of {b}")
        assert (signs(matrix) == signs(expected)).all()
    assert (found[0, :, 5:] == 0).all()
    assert (found[0, :, :, 12:] == 0).all()


def test_weights_of_one_query_and_head_dims_that_values_cannot_have() -> None:
    query, key = (
        normal((1, 1, 2, 576), "float16", seed=1),
        normal((1, 20, 1, 576), "float16", seed=2),
    )
    *_, found = umfa.flash_attn_func(
        query, key, key[..., :512], P, return_attn_probs=True, dropout_seed=3
    )
    expected = weights(query, key, 3)
    assert_close(found.astype(float), expected, Tolerance(1e-4, 1e-3), "weights")
    assert (signs(found) == signs(expected)).all()


def test_weights_that_cannot_be_returned() -> None:
    x = normal((1, 4, 1, 8), seed=1)
    with pytest.raises(umfa.UnsupportedError, match="weights of a call with qv"):
        umfa.flash_attn_func(x, x, x, P, return_attn_probs=True, qv=x)
    pages = np.zeros((1, 4, 1, 8), np.float32)
    tables = offsets([4]), offsets([4])
    with pytest.raises(umfa.UnsupportedError, match="weights of a call with block_table"):
        umfa.flash_attn_varlen_func(
            x[0], pages, pages, *tables, 4, 4, P, return_attn_probs=True,
            block_table=np.zeros((1, 1), np.int32),
        )  # fmt: skip
    assert umfa.flash_attn_func(x, x, x, return_attn_probs=True, qv=x)[2] is None


# ---- seeds ---------------------------------------------------------------------------------------


def seeded(name: str, seed: int) -> None:
    framework = array_libraries.load(name)
    if name == "torch":
        framework.module.manual_seed(seed)
    elif name == "mlx":
        framework.module.random.seed(seed)
    else:
        np.random.seed(seed)


def dropped(framework: Framework, **options: Any) -> Array:
    x = framework.tensor(normal((1, 40, 2, 16), seed=1))
    return framework.bits(umfa.flash_attn_func(x, x, x, 0.5, **options))


@pytest.mark.filterwarnings("ignore:.*dropped at random outside training")
@pytest.mark.parametrize("framework", ["numpy", "torch", "mlx"], indirect=True)
def test_the_frameworks_generator_gives_the_seed(framework: Framework) -> None:
    seeded(framework.name, 1)
    first, second = dropped(framework), dropped(framework)
    assert not np.array_equal(first, second)
    x = framework.tensor(normal((1, 4, 2, 16), seed=1))
    seeded(framework.name, 1)
    assert_same_bits(dropped(framework), first)
    # Neither asking nor a call without dropout, nor one with a seed, moves it.
    assert umfa.can_run(x, x, x, 0.5) == (True, "")
    umfa.flash_attn_func(x, x, x)
    dropped(framework, dropout_seed=3)
    assert_same_bits(dropped(framework), second)
    seeded(framework.name, 2)
    assert not np.array_equal(dropped(framework), first)


@pytest.mark.parametrize("framework", ["jax"], indirect=True)
def test_jax_needs_a_seed(framework: Framework) -> None:
    with pytest.raises(ValueError, match=r"dropout_seed is missing.*expected 0 to 2\*\*64 - 1"):
        dropped(framework)
    assert_same_bits(dropped(framework, dropout_seed=4), dropped(framework, dropout_seed=4))


def test_seeds_are_the_same_in_every_framework(framework: Framework) -> None:
    found = dropped(framework, dropout_seed=2**64 - 1, dropout_offset=2**64 - 1)
    numpy = array_libraries.load("numpy")
    assert_same_bits(found, dropped(numpy, dropout_seed=2**64 - 1, dropout_offset=2**64 - 1))
    assert not np.array_equal(found, dropped(framework, dropout_seed=2**64 - 1))
    assert not np.array_equal(found, dropped(framework, dropout_seed=0))


def test_pytorchs_signature_drops_the_same(framework: Framework) -> None:
    query, key = normal((2, 9, 4, 16), seed=1), normal((2, 30, 4, 16), seed=2)
    one = umfa.flash_attn_func(*map(framework.tensor, (query, key, key)), P, dropout_seed=8)
    tensors = [framework.permute(framework.tensor(x), (0, 2, 1, 3)) for x in (query, key, key)]
    other = umfa.scaled_dot_product_attention(*tensors, dropout_p=P, dropout_seed=8)
    assert_same_bits(framework.bits(framework.permute(other, (0, 2, 1, 3))), framework.bits(one))


@pytest.mark.parametrize("name", ["dropout_seed", "dropout_offset"])
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (-1, ValueError, "is out of range; got -1; expected 0 to 2**64 - 1"),
        (2**64, ValueError, f"is out of range; got {2**64}"),
        (1.0, TypeError, "is not an integer; got 1.0"),
        (True, TypeError, "is not an integer; got True"),
        ("1", TypeError, "is not an integer; got '1'"),
    ],
)
@pytest.mark.parametrize("function", ["flash_attn_func", "scaled_dot_product_attention"])
def test_bad_seeds(
    name: str, p: float, value: Any, error: type[Exception], text: str, function: str
) -> None:
    x = np.zeros((1, 4, 2, 8), np.float32)
    with pytest.raises(error) as caught:
        getattr(umfa, function)(x, x, x, dropout_p=p, **{name: value})
    assert f"[umfa.{function}] {name} {text}" in str(caught.value)
