"""The acceptance set of scaled_dot_product_attention: real models' masks, and both alignments.

Compared with float64 attention of the same rounded inputs, as in test_acceptance.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests import mac, reference
from tests.array_libraries import DTYPES, Array
from tests.cases import normal
from tests.checks import BASE, Tolerance, assert_close
from tests.tiers import crossed

if TYPE_CHECKING:
    from tests.attend import Attend


def inputs(
    shape: tuple[int, int, int, int, int], dtype: str = "float32"
) -> tuple[Array, Array, Array]:
    batch, heads, seqlen_q, seqlen_k, head_dim = shape
    query = normal((batch, heads, seqlen_q, head_dim), dtype, seed=0)
    key, value = (normal((batch, heads, seqlen_k, head_dim), dtype, seed=i) for i in (1, 2))
    return query, key, value


def fewer(attend: Attend, batch: int, heads: int) -> tuple[int, int]:
    """Batch and heads: one of each on the emulator, which does about 0.4 GFLOP/s."""
    emulated = attend.backend != "cpu" and not mac.IS_MAC
    return (1, 1) if emulated else (batch, heads)


def test_a09_key_padding(attend: Attend) -> None:
    """PixArt: the text is shorter than its 300 places."""
    batch, heads = fewer(attend, 2, 16)
    mask = np.arange(300) < np.array([120, 277])[:batch, None]
    query, key, value = inputs((batch, heads, 1024, 300, 72), "float16")
    attend.sdpa_case(query, key, value, mask.reshape(batch, 1, 1, 300))


def test_a12_bias_of_t5(attend: Attend) -> None:
    """scale=1 and a bias as large as the scores."""
    batch, heads = fewer(attend, 1, 64)
    query, key, value = inputs((batch, heads, 512, 512, 64), "bfloat16")
    query = (query.astype(np.float32) / 8).astype(query.dtype)  # T5 trains without the scale
    bias = normal((1, heads, 512, 512), "bfloat16", seed=3, factor=3)
    attend.sdpa_case(query, key, value, bias, scale=1.0, tolerance=Tolerance(1e-2, 8e-3))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    crossed(
        [(1, 1, 33, 65), (2, 1, 1, 65), (33, 65), (1, 4, 1, 65), (65,), (), (2, 4, 33, 1)],
        ["float32", "float16", "bfloat16", "bool"],
        mark=pytest.mark.slow_emulated,
    ),
    ids=str,
)
def test_a13_masks_that_broadcast(shape: tuple[int, ...], dtype: str, attend: Attend) -> None:
    mask = normal(shape, "float32" if dtype == "bool" else dtype, seed=3, factor=3)
    attend.sdpa_case(*inputs((2, 4, 33, 65, 64)), np.asarray(mask > 0) if dtype == "bool" else mask)


@pytest.mark.parametrize(
    ("dtype", "kind"), crossed(list(DTYPES), ["bool", "float"], mark=pytest.mark.slow_emulated)
)
def test_a14_rows_that_attend_to_nothing(dtype: str, kind: str, attend: Attend) -> None:
    query, key, value = inputs((1, 2, 64, 64, 64), dtype)
    mask: Array = np.random.default_rng(3).random((64, 64)) < 0.5
    mask[[3, 17]] = False
    if kind == "float":
        mask = np.where(mask, 0, -np.inf).astype(query.dtype)
    out = attend.sdpa_arrays(query, key, value, mask)
    assert (out[:, :, [3, 17]] == 0).all()
    assert_close(out, reference.scaled_dot_product(query, key, value, mask), BASE[dtype])


@pytest.mark.parametrize("lengths", [(16, 128), (128, 16)], ids=str)
def test_a16_is_causal_aligns_at_the_top_left(lengths: tuple[int, int], attend: Attend) -> None:
    attend.sdpa_case(*inputs((1, 4, *lengths, 64)), is_causal=True)


@pytest.mark.parametrize("lengths", [(16, 128), (128, 16), (64, 64), (1, 100)], ids=str)
@pytest.mark.parametrize("corner", ["upper_left", "lower_right"])
@pytest.mark.parametrize("framework", ["torch"], indirect=True)
@pytest.mark.filterwarnings("ignore:Lower right causal bias will produce NaNs")  # not here
def test_a16_causal_biases_of_torch(corner: Any, lengths: tuple[int, int], attend: Attend) -> None:
    from torch.nn.attention import bias

    query, key, value = inputs((1, 4, *lengths, 64))
    mask = getattr(bias, f"causal_{corner}")(*lengths)
    out = attend.sdpa(*map(attend.framework.tensor, (query, key, value)), mask)
    expected = reference.scaled_dot_product(query, key, value, is_causal=True, alignment=corner)
    assert_close(out, expected, BASE["float32"])
