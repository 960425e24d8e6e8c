"""The core's common entry on NumPy arrays, with any of its options and tensors together."""

from __future__ import annotations

from typing import Any

from tests.array_libraries import Array
from umfa import _ext
from umfa._call.run import run

FUNCTION = _ext.Function("umfa.flash_attn_func", query="q", key="k", value="v")


TORCH = _ext.Function("umfa.flash_attn_func", layout="bhsd", broadcasts=True)


def attend(
    q: Array, k: Array, v: Array, function: _ext.Function = FUNCTION, **given: Any
) -> tuple[Array, Array]:
    """Output and log-sum-exp, by the CPU backend; `given` are fields of the record."""
    given = {"backend": "cpu", "return_lse": True, **given}
    out, lse = run(_ext.Attention(function, query=q, key=k, value=v, **given))
    return out, lse
