"""Masks that the forward kernel reads in runs of consecutive keys (shaders/shared/key_order.h)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests import reference
from tests.array_libraries import DTYPES
from tests.cases import normal
from tests.checks import BASE, LSE, Tolerance, assert_close, assert_same_bits
from tests.metal import emulated
from tests.metal.test_plan_forward import only_launch
from tests.tiers import crossed
from umfa._frameworks import _numpy

MASK_RUNS = 46
Array = np.ndarray[Any, np.dtype[Any]]
pytestmark = pytest.mark.usefixtures("own_settings")

# Tiles of 32 keys with two fragments of queries, of 32 with one, and of 16; float32 likewise.
TILES = [["float16", 64], ["float16", 128], ["float16", 192], ["float32", 64], ["float32", 96]]
MASKS = ["bool", "float32", "float16", "bfloat16"]


@pytest.fixture(autouse=True)
def large_tiles(own_settings: None) -> None:
    emulated.settings.cores = 1  # gets the tiles of large problems


def reads_runs() -> bool:
    """Whether the call before did."""
    (launch,) = emulated.last_plan["launches"]
    return bool(launch["constants"][MASK_RUNS])


def mask_of(shape: tuple[int, ...], dtype: str) -> Array:
    """A tenth of the keys is hidden, and so are all keys of row 3."""
    hidden = np.random.default_rng(7).random(shape) < 0.1
    hidden[..., 3, :] = True
    if dtype == "bool":
        return ~hidden
    numbers = np.where(hidden, -np.inf, normal(shape, seed=6))
    numbers[..., 5, ::3] = np.finfo(np.float32 if dtype == "float32" else np.float16).min
    return numbers.astype(DTYPES[dtype])


def arrays(dtype: str, head_dim: int, seqlen_k: int) -> tuple[Array, Array, Array]:
    """Rows of queries past a block, and two heads that share keys."""
    return (
        normal((2, 70, 2, head_dim), dtype, seed=0),
        normal((2, seqlen_k, 1, head_dim), dtype, seed=1),
        normal((2, seqlen_k, 1, head_dim), dtype, seed=2),
    )


@pytest.mark.parametrize(("dtype", "head_dim", "kind", "seqlen_k"), crossed(TILES, MASKS, [88, 64]))
def test_against_float64(dtype: str, head_dim: int, kind: str, seqlen_k: int) -> None:
    emulated.settings.family = 9
    query, key, value = arrays(dtype, head_dim, seqlen_k)
    mask = mask_of((1, 2, 70, seqlen_k), kind)
    slopes = np.float32([0.1, 0.3])
    options: dict[str, Any] = {
        "alibi_slopes": slopes,
        "causal": seqlen_k == 88,
        "mask": mask,
    }
    exact, exact_lse = reference.attention(query, key, value, **options)
    out, lse = emulated.attention(query, key, value, **options)
    assert reads_runs()
    assert_close(out.astype(np.float64), exact, BASE[dtype])
    assert_close(lse.astype(np.float64), exact_lse, LSE, "lse")


@pytest.mark.parametrize("head_dim", [64, 192])
def test_dropout_takes_the_same_keys(head_dim: int) -> None:
    p = 0.3
    query, key, value = arrays("float16", head_dim, 88)
    mask = mask_of((1, 1, 70, 88), "float16")
    tables: dict[str, Any] = {"dropout_p": p, "dropout_seed": 11}
    out, _ = emulated.call(query, key, value, tables, attn_mask=mask)
    assert reads_runs()
    exact, _ = reference.attention(query, key, value, mask=mask, **tables)
    tolerance = Tolerance(*(x / (1 - p) for x in BASE["float16"]))
    assert_close(out.astype(np.float64), exact, tolerance)


@pytest.mark.parametrize("kind", ["bool", "float32"])
def test_hidden_values_stay_out(kind: str) -> None:
    """Of a key that the mask hides from all, NaN in K and V changes no bit."""
    query, key, value = arrays("float16", 64, 88)
    mask = mask_of((1, 1, 70, 88), kind)
    mask[..., 17] = False if kind == "bool" else -np.inf
    key[:, 17] = value[:, 17] = 0
    clean = emulated.attention(query, key, value, mask=mask)
    key[:, 17] = value[:, 17] = np.nan
    for found, expected in zip(
        emulated.attention(query, key, value, mask=mask), clean, strict=True
    ):
        assert_same_bits(found, expected)
    assert reads_runs()


def test_where_runs_are_read() -> None:
    def found(mask: Array, seqlen_k: int = 96, **options: Any) -> bool:
        exported = _numpy.export(mask, "umfa.test", "attn_mask")
        launch = only_launch(shape=(1, 100, 4, 64), seqlen_kv=seqlen_k, mask=exported, **options)
        return bool(launch["constants"][MASK_RUNS])

    for dtype in (np.bool_, np.float32, np.float16):
        memory = np.zeros((4, 100, 256), dtype)
        run = 4 if dtype == np.float32 else 8
        assert found(memory[..., :96])
        assert found(memory[:, :1, run : run + 96])
        assert not found(memory[..., 2:98])  # begins between two runs
        assert not found(np.zeros((100, 98), dtype)[:, :96])  # nor does row 1
        assert not found(memory[..., :99], seqlen_k=99)
        assert not found(memory[..., :192:2])
        assert not found(memory[..., :1])
        # Where bits must not depend on it.
        assert not found(memory[..., :96], batch_invariant=True)
