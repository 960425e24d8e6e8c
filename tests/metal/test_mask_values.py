"""Masks and sinks whose values are ends of ranges, or lie in memory unlike the scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests import reference
from tests.cases import normal
from tests.checks import BASE, LSE, Tolerance, assert_close
from tests.metal import emulated

Array = np.ndarray[Any, np.dtype[Any]]
pytestmark = pytest.mark.usefixtures("own_settings")


def arrays(seqlen_q: int, seqlen_k: int, heads: int = 2) -> tuple[Array, Array, Array]:
    query, key, value = (
        normal((1, rows, heads, 32), seed=i)
        for i, rows in enumerate((seqlen_q, seqlen_k, seqlen_k))
    )
    return query, key, value


def agrees(found: tuple[Array, Array], exact: tuple[Array, Array]) -> None:
    assert_close(found[0].astype(np.float64), exact[0], BASE["float32"])
    assert_close(found[1].astype(np.float64), exact[1], LSE, "lse")


@pytest.mark.parametrize("seqlen_q", [4, 40], ids=["decode", "forward"])
@pytest.mark.parametrize("rows", ["all", "some"])
@pytest.mark.parametrize("seqlen_k", [70, 72], ids=["pairs", "runs"])
def test_the_lowest_number_is_not_minus_infinity(seqlen_k: int, rows: str, seqlen_q: int) -> None:
    """Masks that transformers makes hold finfo.min: a row of it weighs all keys alike."""
    query, key, value = arrays(seqlen_q, seqlen_k)
    mask = np.zeros((1, 1, seqlen_q, seqlen_k), np.float32)
    lowest = slice(None) if rows == "all" else slice(0, None, 3)
    mask[:, :, lowest] = np.finfo(np.float32).min
    out, _ = emulated.attention(query, key, value, mask=mask)
    exact, _ = reference.attention(query, key, value)
    exact[:, lowest] = value.astype(np.float64).mean(axis=1, keepdims=True)
    assert_close(out.astype(np.float64), exact, BASE["float32"])


@pytest.mark.parametrize("scale", [1e-3, 0.034, 0.3, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("seqlen_q", [4, 40], ids=["decode", "forward"])
def test_masks_beside_every_scale(seqlen_q: int, dtype: Any, scale: float) -> None:
    """Some keys of each row are far below the others, and so are all keys of one row. What two such
    scores differ by must be exact."""
    query, key, value = arrays(seqlen_q, 70)
    far = -1e36 if dtype == np.float32 else -6e4
    mask = normal((1, 1, seqlen_q, 70), seed=5)
    mask[..., ::5] = far
    mask[..., 2, :] = far
    mask[..., 2, 7] = far / 2
    mask = mask.astype(dtype)
    exact = reference.attention(query, key, value, mask=mask, softmax_scale=scale)
    out, lse = emulated.attention(query, key, value, mask=mask, softmax_scale=scale)
    assert_close(out.astype(np.float64), exact[0], BASE["float32"])
    assert_close(lse.astype(np.float64), exact[1], Tolerance(LSE.atol, 1e-6), "lse")


@pytest.mark.parametrize("seqlen_q", [4, 40], ids=["decode", "forward"])
def test_minus_infinity_hides(seqlen_q: int) -> None:
    """Hidden keys have the largest scores and values; a row of them alone has no weights at all."""
    query, key, value = arrays(seqlen_q, 70)
    shown = np.random.default_rng(0).random((1, 1, seqlen_q, 70)) < 0.5
    shown[..., 3, :] = False
    shown[..., [5, 33, 69]] = False
    key[:, [5, 33, 69]] *= 50
    value[:, [5, 33, 69]] = 1e6
    mask = np.where(shown, normal((1, 2, seqlen_q, 70), seed=3), -np.inf).astype(np.float32)
    exact = reference.attention(query, key, value, mask=mask)
    assert (exact[1][..., 3] == -np.inf).all()
    agrees(emulated.attention(query, key, value, mask=mask), exact)


@pytest.mark.parametrize("seqlen_q", [4, 40], ids=["decode", "forward"])
@pytest.mark.parametrize("layout", ["columns first", "every other", "backwards", "one column"])
def test_where_the_columns_of_a_mask_lie(layout: str, seqlen_q: int) -> None:
    query, key, value = arrays(seqlen_q, 70)
    mask = {
        "columns first": normal((1, 2, 70, seqlen_q), seed=3, factor=3).swapaxes(2, 3),
        "every other": normal((1, 2, seqlen_q, 140), seed=3, factor=3)[..., ::2],
        "backwards": normal((1, 2, seqlen_q, 70), seed=3, factor=3)[..., ::-1],
        "one column": np.broadcast_to(
            normal((1, 2, seqlen_q, 1), seed=3, factor=3), (1, 2, seqlen_q, 70)
        ),
    }[layout]
    agrees(
        emulated.attention(query, key, value, mask=mask),
        reference.attention(query, key, value, mask=mask),
    )


@pytest.mark.parametrize("seqlen_q", [4, 40], ids=["decode", "forward"])
def test_sinks_are_in_the_lse(seqlen_q: int) -> None:
    """One more logit of every row: among small ones, among large ones, and alone."""
    query, key, value = arrays(seqlen_q, 70, heads=4)
    sinks = np.array([0.0, 6.0, -np.inf, -20.0], np.float32)
    shown = np.ones((1, 1, seqlen_q, 70), bool)
    shown[..., 3, :] = False  # a row of the sink alone
    found = emulated.call(query, key, value, attn_mask=shown, learnable_sink=sinks)
    exact = reference.attention(query, key, value, mask=shown, learnable_sink=sinks)
    agrees(found, exact)
    _, without = reference.attention(query, key, value)
    assert (np.abs(exact[1] - without)[:, :2, :3] > 1e-3).all()
