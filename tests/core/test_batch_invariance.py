"""batch_invariant=True: a query's bits do not depend on what else is computed."""

from __future__ import annotations

import itertools
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import umfa
from tests.array_libraries import Array
from tests.attend import call_on
from tests.cases import normal
from tests.tiers import crossed

BACKENDS = ["cpu", "metal-emulated"]
DTYPES = ["float32", "float16", "bfloat16"]
ROWS, HEADS = 45, 4


def bits(x: Array) -> bytes:
    return np.ascontiguousarray(x).tobytes()


def tensors(dtype: str, batch: int = 3) -> list[Array]:
    kind = {"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype)
    shapes = [(batch, ROWS, HEADS, 64), (batch, ROWS, 2, 64), (batch, ROWS, 2, 64)]
    return [normal(shape, "float32", seed=i).astype(kind) for i, shape in enumerate(shapes)]


def invariant(backend: str, function: Any, *arguments: Any, **options: Any) -> Array:
    found = call_on(backend, function, *arguments, batch_invariant=True, **options)
    return found[0] if isinstance(found, tuple) else found


@pytest.mark.parametrize(
    ("options", "dtype"),
    crossed(
        [{"window_size": (17, 0)}, {"softcap": 5.0}, {}],
        ["float16", "bfloat16", "float32"],
        mark=pytest.mark.slow_emulated,
    ),
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_decoded_or_prompt(backend: str, dtype: str, options: dict[str, Any]) -> None:
    """Token by token, in pieces, in one, alone and in a batch: causal attention."""
    q, k, v = tensors(dtype)
    options = {"causal": True, **options}
    whole = invariant(backend, umfa.flash_attn_func, q, k, v, **options)
    for n in (1, 2, 16, 33, ROWS):
        alone = invariant(backend, umfa.flash_attn_func, q[:1, n - 1 : n], k[:1, :n], v[:1, :n],
                       **options)  # fmt: skip
        assert bits(alone[0, 0]) == bits(whole[0, n - 1]), n
    used = np.array([3, 40, ROWS])
    cached = invariant(
        backend, umfa.flash_attn_with_kvcache, q[np.arange(3), used - 1][:, None], k, v,
        cache_seqlens=used, **options,
    )  # fmt: skip
    for b, n in enumerate(used):
        assert bits(cached[b, 0]) == bits(whole[b, n - 1]), b
    pieces = np.array([0, 5, 6, ROWS])
    packed = invariant(
        backend, umfa.flash_attn_varlen_func, q[1, 40:].reshape(-1, HEADS, 64), k[1], v[1],
        np.array([0, 5]), np.array([0, ROWS]), 5, ROWS, **options,
    )  # fmt: skip
    assert bits(packed) == bits(whole[1, 40:])
    for a, b in itertools.pairwise(pieces):
        part = invariant(backend, umfa.flash_attn_func, q[2:, a:b], k[2:, :b], v[2:, :b], **options)
        assert bits(part[0]) == bits(whole[2, a:b]), (a, b)


def test_splits_do_not_matter() -> None:
    q, k, v = tensors("float32")
    expected = invariant("cpu", umfa.flash_attn_func, q[:, :1], k, v)
    for splits in (0, 1, 7):
        found = invariant("cpu", umfa.flash_attn_with_kvcache, q[:, :1], k, v, num_splits=splits)
        assert bits(found) == bits(expected)


def test_without_it_decoding_rounds_otherwise() -> None:
    """So that the tests above can fail."""
    q, k, v = tensors("float32")
    whole = umfa.flash_attn_func(q, k, v, causal=True)
    alone = umfa.flash_attn_func(q[:, -1:], k, v, causal=True)
    assert bits(alone) != bits(whole[:, -1:])
    np.testing.assert_allclose(alone, whole[:, -1:], atol=1e-5)
