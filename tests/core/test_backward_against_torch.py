"""Gradients against torch's own: as exact as theirs, or nearly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests import array_libraries, reference
from tests.array_libraries import Array
from tests.attend import BHSD
from tests.cases import normal
from tests.gradients import Forward
from tests.tiers import crossed

CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "grouped": {"grouped": True},
    "mask": {"attn_mask": True},
    "value head dim": {"head_dim_v": 72},
}


def error_of(found: Array, expected: Array) -> float:
    return float(np.sqrt(np.mean((found.astype(np.float64) - expected) ** 2)))


@pytest.mark.parametrize(
    ("name", "dtype"), crossed(list(CALLS), ["float32", "bfloat16", "float16"])
)
def test_error_is_like_torchs(name: str, dtype: str) -> None:
    """At most three times torch's root mean square error in the same dtype."""
    framework = array_libraries.load("torch")
    torch, options = framework.module, CALLS[name]
    heads_k, head_dim_v = 2 if options.get("grouped") else 4, options.get("head_dim_v", 48)
    query, dout = (normal((1, 4, 130, n), dtype, seed=i) for i, n in enumerate((48, head_dim_v)))
    key, value = (
        normal((1, heads_k, 170, n), dtype, seed=2 + i) for i, n in enumerate((48, head_dim_v))
    )
    given = {"query": query, "key": key, "value": value}
    if "attn_mask" in options:
        given["attn_mask"] = normal((4, 130, 170), dtype, seed=5)
    causal = options.get("causal", False)
    call = Forward(BHSD, **given, causal=causal, causal_alignment="top_left", grouped=heads_k != 4)
    wanted = ("dq", "dk", "dv", *(["dmask"] if "attn_mask" in given else []))
    found = call.backward(dout, wanted=wanted)

    theirs = {k: framework.tensor(x).detach().requires_grad_() for k, x in given.items()}
    out = torch.nn.functional.scaled_dot_product_attention(
        *theirs.values(), is_causal=causal, enable_gqa=heads_k != 4
    )
    out.backward(framework.tensor(dout))
    turned = [x.transpose(0, 2, 1, 3) for x in (query, key, value, dout)]
    exact = reference.gradients(
        *turned, mask=given.get("attn_mask"), causal=causal, alignment="upper_left"
    )
    for gradient, tensor in zip(wanted, theirs.values(), strict=True):
        wide = getattr(exact, gradient)
        wide = wide if gradient == "dmask" else wide.transpose(0, 2, 1, 3)
        their_error = error_of(framework.float64(tensor.grad), wide)
        assert error_of(found[gradient], wide) <= 3 * their_error + 1e-9, gradient
