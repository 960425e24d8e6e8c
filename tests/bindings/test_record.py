"""The record of a call."""

from __future__ import annotations

import json
from typing import Any

import pytest

from umfa import _ext

FUNCTION = _ext.Function("umfa.f", layout="bhsd", broadcasts=True, query="q", causal="is_causal")
VALUES: list[dict[str, Any]] = [
    {},
    {"causal": True, "window_size": (-1, 3), "softmax_scale": 0.1, "grouped": False},
    {"dropout_p": 0.25, "dropout_seed": 2**64 - 1, "dropout_offset": 7, "max_seqlen_q": 0},
    {"window_size": (None, -2), "window_offsets": True, "rotary_interleaved": False},
    {"causal_alignment": "top_left", "out_dtype": "bfloat16", "attention_chunk": 3, "softcap": 1.5},
]


def made(function: _ext.Function = FUNCTION, backend: str = "cpu", **given: Any) -> _ext.Options:
    tensors = {"query": 0, "key": 0, "value": 0}
    return _ext.Attention(function, backend=backend, **(tensors | given)).options


def test_equal_options() -> None:
    """Each differs from all others, and equals another one of its kind."""
    other = _ext.Function("umfa.f", layout="bhsd", broadcasts=True, query="q", causal="causal")
    alike = _ext.Function("umfa.f", layout="bhsd", broadcasts=True, query="q", causal="is_causal")
    kinds: list[dict[str, Any]] = [
        *VALUES, {"attn_mask": 0}, {"backend": "auto"}, {"function": other},
        {"dropout_p": 0.25, "dropout_seed": 3}, {"softmax_scale": 0.2}, {"return_lse": True},
    ]  # fmt: skip
    first, second = [made(**kind) for kind in kinds], [made(**kind) for kind in kinds]
    for i, options in enumerate(first):
        assert [options == x for x in second] == [i == j for j in range(len(kinds))]
        assert hash(options) == hash(second[i])
    assert made(alike) == made()
    assert hash(made(alike)) == hash(made())
    assert made() != "other"


@pytest.mark.parametrize("values", VALUES, ids=str)
def test_a_description_makes_the_same_options(values: dict[str, Any]) -> None:
    tensors = {"query": 0, "key": 0, "value": 0, "attn_mask": 0, "seqused_k": 0}
    options = _ext.Attention(FUNCTION, backend="cpu", **tensors, **values).options
    described = json.loads(json.dumps(options.description))
    assert described["tensors"] == list(tensors)
    assert set(described["values"]) == set(values)
    function = _ext.Function(
        described["function"],
        layout=described["layout"],
        broadcasts=described["broadcasts"],
        **described["names"],
    )
    again = _ext.Attention(
        function,
        backend=described["backend"],
        **dict.fromkeys(described["tensors"], 1),
        **described["values"],
    ).options
    assert again.description == options.description
    assert again.names == ("q", "key", "value", "attn_mask", "seqused_k")
