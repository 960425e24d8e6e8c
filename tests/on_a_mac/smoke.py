"""Stage: one small call for every kernel and feature, through umfa, compared with the CPU.

It does not use the test suite: it checks that the kernels run at all, before the suite runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

import umfa
from tests.on_a_mac import shapes
from tests.on_a_mac.part import Part

Array = np.ndarray[Any, np.dtype[Any]]
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
# Of the difference between two backends that both round: twice a backend's own.
TOLERANCES = {"float16": 4e-3, "bfloat16": 3e-2, "float32": 2e-5}
QUICK = {("forward 64/64", "float16"), ("decode 64/64", "float32"),
         ("append, 12 rows, rotary", "float16")}  # fmt: skip


class Call(NamedTuple):
    """A call that takes ``backend=`` and returns the arrays to compare."""

    name: str
    dtype: str
    call: Callable[..., list[Any]]


def normal(dtype: str, *shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, np.float32).astype(DTYPES[dtype])


def attention(
    dtype: str, rows: tuple[int, int], heads: tuple[int, int], dims: tuple[int, int],
    backend: str, **options: Any,
) -> list[Any]:  # fmt: skip
    query = normal(dtype, 2, rows[0], heads[0], dims[0])
    key = normal(dtype, 2, rows[1], heads[1], dims[0], seed=1)
    value = normal(dtype, 2, rows[1], heads[1], dims[1], seed=2)
    out, lse = umfa.flash_attn_func(query, key, value, backend=backend, return_lse=True, **options)[
        :2
    ]
    return [out, lse]


def packed(dtype: str, backend: str) -> list[Any]:
    """Sequences of several lengths, one of which leaves rows unused."""
    starts = np.array([0, 5, 46, 60], np.int32)
    query, key = normal(dtype, 60, 4, 64), normal(dtype, 60, 2, 64, seed=1)
    return [
        umfa.flash_attn_varlen_func(
            query, key, key, starts, starts, 41, 41, causal=True, backend=backend,
            seqused_q=np.array([5, 30, 14], np.int32),
        )
    ]  # fmt: skip


def cache(dtype: str, pages: bool, seqlen_q: int, backend: str) -> list[Any]:
    """New rows appended, rotated, then attended to."""
    shape = (8, 16, 2, 64) if pages else (2, 64, 2, 64)
    keys, values = normal(dtype, *shape, seed=1), normal(dtype, *shape, seed=2)
    angles = np.outer(np.arange(80), 0.5 ** np.arange(16)).astype(np.float32)
    table = np.array([[3, 0, 6, 1], [2, 7, 4, 5]], np.int32) if pages else None
    out = umfa.flash_attn_with_kvcache(
        normal(dtype, 2, seqlen_q, 4, 64), keys, values, normal(dtype, 2, seqlen_q, 2, 64, seed=3),
        normal(dtype, 2, seqlen_q, 2, 64, seed=4), rotary_cos=np.cos(angles).astype(DTYPES[dtype]),
        rotary_sin=np.sin(angles).astype(DTYPES[dtype]), block_table=table, causal=True,
        cache_seqlens=np.array([9, 33], np.int32), backend=backend,
    )  # fmt: skip
    return [out, keys, values]


def calls() -> Iterator[Call]:
    for dtype in DTYPES:
        for dims in shapes.head_dims():
            call = functools.partial(attention, dtype, (20, 70), (2, 2), dims)
            yield Call(f"forward {dims[0]}/{dims[1]}", dtype, call)
        for dims in ((64, 64), (128, 128), (192, 128)):
            call = functools.partial(attention, dtype, (1, 300), (8, 2), dims)
            yield Call(f"decode {dims[0]}/{dims[1]}", dtype, call)
        call = functools.partial(attention, dtype, (1, 5000), (8, 1), (64, 64))
        yield Call("decode in splits, merge", dtype, call)
        yield Call("packed, unused rows cleared", dtype, functools.partial(packed, dtype))
        for pages in (False, True):
            for rows in (1, 12):
                name = f"append{', pages' if pages else ''}, {rows} rows, rotary"
                yield Call(name, dtype, functools.partial(cache, dtype, pages, rows))
    visible = np.random.default_rng(3).random((1, 2, 40, 50)) < 0.7
    options: dict[str, dict[str, Any]] = {
        "causal": {"causal": True},
        "window": {"window_size": (9, 3)},
        "chunk": {"attention_chunk": 16, "causal": True},
        "softcap": {"softcap": 20.0},
        "alibi": {"alibi_slopes": np.array([0.3, 0.1], np.float32)},
        "sinks": {"learnable_sink": np.array([0.5, -1.0], np.float32)},
        "bool mask": {"attn_mask": visible},
        "float mask": {"attn_mask": np.where(visible, 0.3, -np.inf).astype(np.float32)},
        "dropout": {"dropout_p": 0.3, "dropout_seed": 7},
    }
    for name, chosen in options.items():
        for rows in (40, 1):
            fitting = {k: v[:, :, :rows] if k == "attn_mask" else v for k, v in chosen.items()}
            call = functools.partial(attention, "float16", (rows, 50), (2, 2), (64, 64), **fitting)
            yield Call(f"{name}, {rows} queries", "float16", call)


def difference(found: list[Any], expected: list[Any]) -> float:
    """Largest, relative to what is larger than 1; infinite where one is not finite."""
    worst = 0.0
    for mine, other in zip(found, expected, strict=True):
        a, b = np.asarray(mine, np.float64), np.asarray(other, np.float64)
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        with np.errstate(invalid="ignore"):
            error = np.where(same, 0.0, np.abs(a - b) / np.maximum(1.0, np.abs(b)))
        worst = max(worst, float(np.max(np.nan_to_num(error, nan=np.inf), initial=0.0)))
    return worst


def run(part: Part, *, quick: bool) -> None:
    part.write("| call | dtype | largest difference from the CPU |", "|---|---|---|")
    wrong: list[tuple[str, str]] = []
    for case in calls():
        if quick and (case.name, case.dtype) not in QUICK:
            continue
        try:
            before = umfa.stats().metal_calls
            found = case.call(backend="metal")
            if umfa.stats().metal_calls == before:
                raise AssertionError("the call did not run on the GPU")
            error = difference(found, case.call(backend="cpu"))
            text = f"{error:.2e}"
            if error > TOLERANCES[case.dtype]:
                text = f"**{text}, more than {TOLERANCES[case.dtype]}**"
                wrong.append((f"{case.name}, {case.dtype}", f"difference {error}"))
        except Exception as reason:
            text = f"**{type(reason).__name__}**"
            wrong.append((f"{case.name}, {case.dtype}", f"{type(reason).__name__}: {reason}"))
        part.write(f"| {case.name} | {case.dtype} | {text} |")
    part.write("", f"{len(wrong)} wrong.")
    grouped: dict[str, list[str]] = {}
    for name, text in wrong:
        grouped.setdefault(text, []).append(name)
    for text, names in grouped.items():
        part.fail("; ".join(names), text)
