"""The packed spellings are the plain function on slices of one tensor."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest

import umfa
from tests.array_libraries import DTYPES, Framework
from tests.cases import normal
from tests.checks import assert_same_bits
from tests.signatures import EXTRAS, by_keyword, by_position

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "causal": {"causal": True},
    "window": {"window_size": (11, 3)},
    "all": {"softmax_scale": 0.3, "softcap": 4.0, "window_size": (20, 1), "deterministic": True},
}


def assert_same_results(framework: Framework, found: Any, expected: Any) -> None:
    assert len(found) == len(expected) == 3
    assert found[2] is None
    for name, a, b in zip(("out", "lse"), found, expected, strict=False):
        assert isinstance(a, framework.array_type)
        assert_same_bits(framework.bits(a), framework.bits(b), name)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("dtype", DTYPES)
def test_qkvpacked(dtype: str, options: dict[str, Any], framework: Framework) -> None:
    packed = normal((2, 50, 3, 4, 24), dtype, seed=0)
    tensors = (framework.tensor(np.ascontiguousarray(packed[:, :, i])) for i in range(3))
    expected = umfa.flash_attn_func(*tensors, **options, return_attn_probs=True)
    found = umfa.flash_attn_qkvpacked_func(
        framework.tensor(packed), **options, return_attn_probs=True
    )
    assert_same_results(framework, found, expected)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("dtype", DTYPES)
def test_kvpacked(dtype: str, options: dict[str, Any], framework: Framework) -> None:
    query = framework.tensor(normal((2, 30, 4, 24), dtype, seed=1))
    packed = normal((2, 50, 2, 2, 24), dtype, seed=0)
    key, value = (framework.tensor(np.ascontiguousarray(packed[:, :, i])) for i in range(2))
    expected = umfa.flash_attn_func(query, key, value, **options, return_attn_probs=True)
    found = umfa.flash_attn_kvpacked_func(
        query, framework.tensor(packed), **options, return_attn_probs=True
    )
    assert_same_results(framework, found, expected)


@pytest.mark.parametrize("slopes_shape", [(4,), (2, 4)], ids=str)
def test_packed_with_alibi(slopes_shape: tuple[int, ...], framework: Framework) -> None:
    slopes = framework.tensor(np.abs(normal(slopes_shape, seed=5)))
    packed = framework.tensor(normal((2, 50, 3, 4, 24), seed=0))
    expected = umfa.flash_attn_func(
        *(packed[:, :, i] for i in range(3)), alibi_slopes=slopes, return_attn_probs=True
    )
    found = umfa.flash_attn_qkvpacked_func(packed, alibi_slopes=slopes, return_attn_probs=True)
    assert_same_results(framework, found, expected)
    found = umfa.flash_attn_kvpacked_func(
        packed[:, :, 0], packed[:, :, 1:], alibi_slopes=slopes, return_attn_probs=True
    )
    assert_same_results(framework, found, expected)


TAIL = {
    "dropout_p": 0.0,
    "softmax_scale": None,
    "causal": False,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "alibi_slopes": None,
    "deterministic": False,
    "return_attn_probs": False,
}


@pytest.mark.parametrize(
    ("function", "tensors"),
    [
        (umfa.flash_attn_func, ["q", "k", "v"]),
        (umfa.flash_attn_qkvpacked_func, ["qkv"]),
        (umfa.flash_attn_kvpacked_func, ["q", "kv"]),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_signatures_are_those_of_flash_attn(function: Any, tensors: list[str]) -> None:
    """Libraries look at the names and pass some arguments by position: both are the interface."""
    assert inspect.isfunction(function), "transformers introspects real Python functions only"
    assert by_keyword(function) == EXTRAS
    expected = dict.fromkeys(tensors, inspect.Parameter.empty) | TAIL
    assert list(by_position(function).items()) == list(expected.items())
