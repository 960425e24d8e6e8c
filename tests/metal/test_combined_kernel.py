"""Everything that a call can ask for at once, on the emulated GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests import reference
from tests.cases import normal
from tests.checks import BASE, LSE, Tolerance, assert_close
from tests.metal import emulated
from tests.metal.emulated import MACHINES
from tests.sequences import rotary_tables, rotated

Array = np.ndarray[Any, np.dtype[Any]]
pytestmark = pytest.mark.usefixtures("own_settings")

HEADS, HEADS_K, NEW, CHANNELS = 4, 2, 6, 24
USED = np.array([61, 0, 130])


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=pytest.mark.slow) for seed in range(12)])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("seqlen_q", [3, 30])
def test_any_combination(seqlen_q: int, dtype: str, seed: int) -> None:
    """Each option by chance, and another machine and schedule each time."""
    rng = np.random.default_rng(1000 * seqlen_q + seed)
    names = list(MACHINES)
    emulated.settings.options = MACHINES[names[seed % len(names)]]
    emulated.settings.schedule_seed = seed
    emulated.settings.family = (7, 9)[seed % 2]
    emulated.settings.cores = 30

    def some(value: Any, otherwise: Any = None) -> Any:
        return value if rng.random() < 0.6 else otherwise

    head_dim, head_dim_v = ((64, 64), (40, 72))[seed % 2]
    longest = int(USED.max()) + NEW
    query = normal((3, seqlen_q, HEADS, head_dim), dtype, seed=0)
    key, value = (
        normal((3, longest, HEADS_K, d), dtype, seed=i)
        for i, d in enumerate((head_dim, head_dim_v), 1)
    )
    new = [
        normal((3, NEW, HEADS_K, d), dtype, seed=i) for i, d in enumerate((head_dim, head_dim_v), 3)
    ]
    interleaved, p = bool(rng.random() < 0.5), some(0.3, 0.0)
    qv = some(normal((3, seqlen_q, HEADS, head_dim_v), dtype, seed=5))
    rotary = some(rotary_tables(2 * longest, CHANNELS))
    mask = some(normal((1, HEADS, seqlen_q, longest), seed=6, factor=2))
    shared: dict[str, Any] = {
        "causal": some(True, False), "softcap": some(5.0, 0.0),
        "attention_chunk": some(50, 0),
    }  # fmt: skip
    window = some((40, 3), (-1, -1))
    slopes, sinks = some(np.full(HEADS, 0.1, np.float32)), some(normal((HEADS,), seed=7))

    after_key, after_value, turned, shown = key.copy(), value.copy(), query, new[0]
    steps = shared["causal"] or shared["attention_chunk"] or window[0] >= 0
    if rotary:
        shown = rotated(new[0], *rotary, USED[:, None] + np.arange(NEW), interleaved=interleaved)
        positions = USED[:, None] + np.arange(seqlen_q) * bool(steps)
        turned = rotated(query, *rotary, positions, interleaved=interleaved)
    for b, n in enumerate(USED):
        after_key[b, n : n + NEW], after_value[b, n : n + NEW] = shown[b], new[1][b]
        key[b, n:] = value[b, n:] = np.nan

    more = {"alibi_slopes": slopes, "attn_mask": mask, "learnable_sink": sinks, "qv": qv}
    if rotary:
        more |= dict(zip(("rotary_cos", "rotary_sin"), rotary, strict=True))
    out, lse = emulated.call(
        query, key, value,
        {
            **shared, "window_size": window, "dropout_p": p,
            "rotary_interleaved": interleaved, "num_splits": some(3, 0),
        },
        new_key=new[0], new_value=new[1], seqused_k=USED,
        **{name: x for name, x in more.items() if x is not None},
    )  # fmt: skip
    loose = 1 / (1 - p) * (2 if rotary and dtype == "float16" else 1)
    tolerance = Tolerance(*(x * loose for x in BASE[dtype]))
    lse_tolerance = Tolerance(2e-3, 0) if rotary and dtype == "float16" else LSE
    for b, n in enumerate(USED + NEW):
        exact, exact_lse = reference.attention(
            turned[b, None], after_key[b, None, :n], after_value[b, None, :n],
            qv=None if qv is None else qv[b, None], mask=None if mask is None else mask[..., :n],
            window_size=window, alibi_slopes=slopes, learnable_sink=sinks, dropout_p=p,
            first_index=b, **shared,
        )  # fmt: skip
        assert_close(out[b, None].astype(np.float64), exact, tolerance)
        assert_close(lse[b, None].astype(np.float64), exact_lse, lse_tolerance, "lse")
