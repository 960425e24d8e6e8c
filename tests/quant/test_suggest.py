"""umfa.suggest_precision: what it measures is right, and it names the smallest format that is exact
enough."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import umfa
from tests import array_libraries, reference
from tests.cases import normal

pytestmark = pytest.mark.cpu_only

Q, K, V = (normal((2, n, h, 64), seed=i) for i, (n, h) in enumerate([(9, 4), (50, 2), (50, 2)]))


def attention(key: Any, value: Any, **options: Any) -> Any:
    return reference.attention(Q, key, value, **options)[0]


@pytest.mark.parametrize("causal", [False, True])
def test_errors_and_bytes(causal: bool) -> None:
    found = umfa.suggest_precision(Q, K, V, 0.05, causal=causal)
    assert len(found.measured) == 8
    right = attention(K, V, causal=causal)
    for form, rel_error, nbytes in found.measured:
        key, value = (umfa.quantize(x, **form) for x in (K, V))
        wrong = attention(key.dequantize(), value.dequantize(), causal=causal) - right
        assert rel_error == pytest.approx(np.abs(wrong).sum() / np.abs(right).sum(), rel=1e-3)
        assert nbytes == key.nbytes + value.nbytes
    assert [x.nbytes for x in found.measured] == sorted(x.nbytes for x in found.measured)


def test_the_smallest_that_is_exact_enough() -> None:
    measured = umfa.suggest_precision(Q, K, V, 1.0).measured
    assert umfa.suggest_precision(Q, K, V, 1.0).format == measured[0].format
    for limit in sorted(x.rel_error for x in measured):
        found = umfa.suggest_precision(Q, K, V, limit)
        enough = [x for x in measured if x.rel_error <= limit]
        assert found.format == enough[0].format
        assert umfa.quantize(K, **enough[0].format).nbytes > 0
    best = min(x.rel_error for x in measured)
    assert umfa.suggest_precision(Q, K, V, best / 2).format is None
    assert "->" not in str(umfa.suggest_precision(Q, K, V, best / 2))
    assert str(found).count("\n") == 7
    assert str(found).count("->") == 1


def test_a_head_dim_of_no_whole_groups() -> None:
    found = umfa.suggest_precision(*(x[..., :41] for x in (Q, K, V)), 1.0)
    assert len(found.measured) == 8
    assert all(0 < x.rel_error < 0.5 for x in found.measured)


def test_only_the_last_queries_are_measured() -> None:
    q = normal((1, 300, 2, 64), seed=5)
    k, v = (normal((1, 300, 2, 64), seed=i) for i in (6, 7))
    whole = umfa.suggest_precision(q, k, v, 0.1, causal=True)
    assert whole == umfa.suggest_precision(q[:, 44:], k, v, 0.1, causal=True)
    assert whole != umfa.suggest_precision(q[:, 45:], k, v, 0.1, causal=True)


@pytest.mark.parametrize("name", ["numpy", "torch", "jax", "mlx"])
def test_frameworks_and_layouts(name: str) -> None:
    framework = array_libraries.load(name)
    expected = umfa.suggest_precision(Q, K, V, 0.02, softmax_scale=0.5)
    given = [framework.tensor(x.transpose(0, 2, 1, 3)) for x in (Q, K, V)]
    found = umfa.suggest_precision(*given, 0.02, softmax_scale=0.5, layout="bhsd")
    assert found == expected


def test_numbers_too_large_for_a_float16_scale() -> None:
    found = umfa.suggest_precision(Q, K, V * np.float32(1e30), 1.0)
    assert found.format == {"dtype": "mxfp4"}
    assert {x.rel_error for x in found.measured if "scale_dtype" in x.format} == {float("inf")}


def test_zeros_are_exact() -> None:
    found = umfa.suggest_precision(Q, K, 0 * V, 1e-9)
    assert found.format == found.measured[0].format
    assert {x.rel_error for x in found.measured} == {0.0}


@pytest.mark.parametrize("limit", [0, -1, float("nan"), "much", "0.5", None, True])
def test_bounds_that_are_none(limit: Any) -> None:
    text = (
        r"\[umfa\.suggest_precision\] max_rel_error is no bound; got .*; expected a number above 0"
    )
    with pytest.raises(ValueError, match=text):
        umfa.suggest_precision(Q, K, V, limit)


def test_bad_tensors() -> None:
    with pytest.raises(ValueError, match="layout is unknown; got 'sbhd'"):
        umfa.suggest_precision(Q, K, V, 0.1, layout="sbhd")
    for bad in ((Q, K, V * np.float32("inf")), (Q * np.nan, K, V), (Q[:, :0], K, V)):
        with pytest.raises(ValueError, match="the sample's attention is empty, or not finite"):
            umfa.suggest_precision(*bad, 0.1)
    with pytest.raises(ValueError, match=r"q has the wrong shape; got \(64,\)"):
        umfa.suggest_precision(Q[0, 0, 0], K, V, 0.1)
    with pytest.raises(TypeError, match="suggest_precision"):
        umfa.suggest_precision(Q.tolist(), K, V, 0.1)
