"""Dropout through the whole host, where the batch is more than one dimension."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import umfa
from tests import reference
from tests.cases import normal
from tests.checks import BASE, assert_close
from tests.metal import emulated as plans
from tools.metal.double import Double
from umfa import _ext
from umfa._frameworks import _numpy


@pytest.mark.parametrize("seqlen_q", [20, 2])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["one dimension", "two"])
def test_batch_dimensions_count_as_one(
    order: tuple[int, int], seqlen_q: int, emulated: Double
) -> None:
    """Whether they can be walked as one, or the problem is cut into several."""
    shape = [(2, 3)[i] for i in order]
    query, key, value = (
        normal((*shape, 2, n, 32), seed=i).transpose(*order, 2, 3, 4)
        for i, n in enumerate((seqlen_q, 45, 45))
    )
    function = _ext.Function("umfa.test", layout="bhsd", broadcasts=True)
    attention = _ext.Attention(
        function, query=query, key=key, value=value, dropout_p=0.4, dropout_seed=3, backend="metal"
    )

    def allocate(like: Any, shape: tuple[int, ...], dtype: str, backend: str) -> tuple[Any, Any]:
        assert like is query
        assert backend == "metal"
        out = np.full(shape, np.nan, dtype)
        return _numpy.export(out, "umfa.test", "out"), out

    before = umfa.stats().metal_calls
    found, *_ = _ext.attention_forward(
        attention.options, plans.exported_of(attention), allocate, query, "metal"
    )
    assert umfa.stats().metal_calls == before + 1
    exact = reference.scaled_dot_product(
        query, key, value, dropout_p=0.4, dropout_seed=3, dropout_offset=0
    )
    assert_close(np.asarray(found).astype(np.float64), exact, BASE["float32"])
