"""What the backward pass refuses, and how it says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import umfa
from tests.attend import BSHD
from tests.cases import normal
from tests.gradients import Forward
from tests.sequences import offsets
from umfa import _ext


def call_of(**options: Any) -> tuple[Forward, Any]:
    q, k, v = (normal((2, n, 2, 8), seed=i) for i, n in enumerate((5, 7, 7)))
    call = Forward(**{"query": q, "key": k, "value": v} | options)
    return call, normal(call.out.shape, seed=3)


def refused(
    call: Forward,
    saved: tuple[Any, ...],
    wanted: tuple[str, ...] = ("dq",),
    allocate: Callable[[tuple[int, ...], str], Any] | None = None,
) -> str:
    """The message; nothing may be allocated before it is sure that the call is sound."""

    def never(*_: Any) -> Any:
        raise AssertionError("allocated")

    with pytest.raises((ValueError, TypeError, umfa.UnsupportedError)) as error:
        _ext.attention_backward(
            call.call.options, call.exported(), saved, wanted, allocate or never
        )
    text = str(error.value)
    assert text.startswith("[umfa.flash_attn_func] ")
    assert "; got " in text
    assert "; expected " in text
    return text


def test_saved_tensors() -> None:
    call, dout = call_of()
    out, lse, _, _ = call.saved(dout)
    for saved, text in (
        ((None, lse, dout, None), "out is missing; got none"),
        ((out, None, dout, None), "lse is missing; got none"),
        ((out, lse, None, None), "dout is missing; got none"),
        ((out, lse, dout), "saved has the wrong length; got 3"),
        ((out, lse, dout[:, 1:], None), "dout has the wrong shape; got (2, 4, 2, 8); "),
        ((out, lse[:1], dout, None), "lse has the wrong shape; got (1, 2, 5); "),
        ((out, lse, dout, lse[:, :1]), "dlse has the wrong shape"),
        ((out, lse.astype(np.float16), dout, None), "lse has the wrong dtype; got float16"),
        ((out, lse, dout.astype(np.int32), None), "dout has the wrong dtype; got int32"),
        ((out, lse, dout.astype(np.float64), None), "dout has the wrong dtype; got float64"),
    ):
        assert text in refused(call, saved), text


def test_wanted() -> None:
    call, dout = call_of(attn_mask=np.ones((5, 7), bool))
    saved = call.saved(dout)
    for wanted, text in (
        ((), "no gradient is wanted"),
        (("dx",), "there is no such gradient; got 'dx'"),
        (("dq", "dq"), "a gradient is wanted twice; got 'dq'"),
        (("dqv",), "dqv is the gradient of qv; got a call without qv"),
        (("dsinks",), "dsinks is the gradient of learnable_sink"),
        (("dalibi_slopes",), "dalibi_slopes is the gradient of alibi_slopes"),
        (("dmask",), "attn_mask has no gradient; got bool"),
    ):
        assert text in refused(call, saved, wanted), text


def test_written_tensors() -> None:
    call, dout = call_of()
    saved = call.saved(dout)
    small, half = np.zeros((2, 5, 2, 7), np.float32), np.zeros((2, 5, 2, 8), np.float16)
    shared = np.broadcast_to(np.zeros((2, 5, 2, 1), np.float32), (2, 5, 2, 8))
    shared.flags.writeable = True
    both = np.zeros((2, 7, 2, 8), np.float32)
    for array, wanted, text in (
        (small, ("dq",), "dq has the wrong shape; got (2, 5, 2, 7); expected (2, 5, 2, 8)"),
        (half, ("dq",), "dq has the wrong dtype; got float16; expected float32"),
        (shared, ("dq",), "dq has elements that share memory"),
        (dout, ("dq",), "dq overlaps dout"),
        (call.out, ("dq",), "dq overlaps out"),
        (next(iter(call.tensors.values())), ("dq",), "dq overlaps q"),
        (both, ("dk", "dv"), "dv overlaps dk in memory"),
    ):
        before = array.copy()
        found = refused(call, saved, wanted, lambda *_, array=array: (array, array))
        assert text in found, found
        assert np.array_equal(array, before)


def test_what_has_no_gradient() -> None:
    """Pages and new keys are refused by name; so are sequences that share keys."""
    q, k, v = (normal((2, n, 2, 8), seed=i) for i, n in enumerate((5, 16, 16)))
    pages = np.array([[0], [1]], np.int32)
    used = np.array([7, 9])
    calls = (
        ({"block_table": pages, "seqused_k": used}, "cpu: block_table is not implemented in a"),
        ({"new_key": k[:, :5], "new_value": v[:, :5], "seqused_k": used}, "appending to the cache"),
        ({"cache_batch_idx": np.array([1, 1])}, "two sequences share keys"),
    )
    for tables, text in calls:
        call = Forward(BSHD, query=q, key=k.copy(), value=v.copy(), **tables)
        assert text in refused(call, call.saved(normal(call.out.shape, seed=9)), ("dk",)), text


def test_packed_lengths() -> None:
    call = Forward(
        query=normal((5, 2, 8), seed=0), key=normal((7, 2, 8), seed=1),
        value=normal((7, 2, 8), seed=2), cu_seqlens_q=offsets([2, 3]), cu_seqlens_k=offsets([4, 3]),
    )  # fmt: skip
    dout = normal((5, 2, 8), seed=3)
    out, lse, _, _ = call.saved(dout)
    text = refused(call, (out, np.ascontiguousarray(lse.T), dout, None))
    assert "lse has the wrong shape; got (5, 2); expected (2, 5)" in text
