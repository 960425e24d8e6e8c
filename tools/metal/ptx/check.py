"""Runs cases on fresh random inputs and compares them with float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cupy
import numpy as np

from . import reference
from .cases import Case
from .codes import FIELDS, format_of
from .device import Prepared, upload
from .inputs import Array, poison, random_buffers, store, widen
from .placement import placements

# |difference| <= atol + rtol * |expected|, as tests/checks.py has them for every backend.
TOLERANCES = {"float32": (2e-5, 1e-5), "float16": (1e-3, 1e-3), "bfloat16": (5e-3, 8e-3)}
# As tests/metal/backward_calls.py has them, times the largest element.
BACKWARD_TOLERANCES = TOLERANCES | {"bfloat16": (1e-2, 8e-3)}
LSE_TOLERANCE = (2e-5, 0.0)
# What is rotated may round to 16 bits the other way than the exact number.
LSE_TOLERANCE_ROTATED = (1e-3, 0.0)
# Beyond this many multiplications the reference is computed on the GPU.
_LARGE = 1 << 27


def check(
    folder: Path, described: dict[str, Any], seed: int, *, sanitized: str = ""
) -> dict[str, Any]:
    """One row of the table: what was compared, how far off it is, whether that is allowed."""
    case = Case.read(described["case"])
    buffers = random_buffers(case, np.random.default_rng(seed))
    if case.backward:
        return _check_backward(folder, described, buffers, sanitized)
    prepared = Prepared(
        folder,
        described,
        {name: upload(buffer) for name, buffer in buffers.items()},
        poisoned=sanitized != "initcheck",
    )
    prepared.play()
    results = prepared.results()
    places = placements(case)
    tensors = _tensors(case, buffers)
    if case.bad_from:
        tensors["value"][:, case.bad_from :] = 0  # times a weight of 0
    expected_out, expected_lse = _expected(case, tensors, bool(sanitized))
    row: dict[str, Any] = {"name": described["name"], "ok": True}
    for name, expected, (atol, rtol) in (
        ("out", expected_out, _out_tolerance(case)),
        ("lse", expected_lse, LSE_TOLERANCE_ROTATED if case.rotary else LSE_TOLERANCE),
    ):
        if name in results:
            found = widen(results[name], places[name].dtype)
            row |= _compare(name, found, expected, atol, rtol)
            row["ok"] = row["ok"] and row[f"{name}_worst"] <= 1
    return row


def _tensors(case: Case, buffers: dict[str, Array]) -> dict[str, Any]:
    """What the buffers hold, in float64."""
    places = placements(case)
    found: dict[str, Any] = {}
    for name, buffer in buffers.items():
        view = places[name].view(buffer)
        dtype = places[name].dtype
        found[name] = view.astype(bool) if dtype == "bool" else widen(view, dtype)
    for field in FIELDS:
        if form := format_of(case, field):  # the tile has the dtype of the kernel
            x = form.numbers(found[field], found.pop(f"{field}_scales"))
            found[field] = widen(store(x, case.dtype), case.dtype)
    return found


PLAYS = 20
"""Of a backward pass, whose results must have the same bits each time."""


def _check_backward(
    folder: Path, described: dict[str, Any], buffers: dict[str, Array], sanitized: str
) -> dict[str, Any]:
    case = Case.read(described["case"])
    places, tensors = placements(case), _tensors(case, buffers)
    saved = dict(zip(("out", "lse"), _expected(case, tensors, bool(sanitized)), strict=True))
    for name, array in saved.items():
        buffers[name] = poison(places[name])
        view = places[name].view(buffers[name])
        view[...] = store(array.astype(np.float32), places[name].dtype)
        tensors[name] = widen(view, places[name].dtype)
    expected = _reference(reference.gradients, case, tensors, bool(sanitized))
    memory = {name: upload(buffer) for name, buffer in buffers.items()}
    prepared = Prepared(folder, described, memory, poisoned=sanitized != "initcheck")
    row: dict[str, Any] = {"name": described["name"], "ok": True}
    first: dict[str, bytes] = {}
    for play in range(1 if sanitized else PLAYS):
        prepared.play()
        results = prepared.results()
        bits = {name: array.tobytes() for name, array in results.items()}
        first = first or bits
        row["ok"] = row["ok"] and bits == first
        if play > 0:
            continue
        for name, array in results.items():
            right = expected[name]
            largest = float(np.abs(right).max(initial=1.0))
            atol, rtol = BACKWARD_TOLERANCES[case.dtype]
            found = widen(array, places[name].dtype)
            row |= _compare(name, found, right, atol * largest / (1 - case.dropout), rtol)
            row["ok"] = row["ok"] and row[f"{name}_worst"] <= 1
    return row


def _out_tolerance(case: Case) -> tuple[float, float]:
    """What dropout keeps weighs more, and so does its rounding."""
    atol, rtol = TOLERANCES[case.dtype_of("out")]
    return atol / (1 - case.dropout), rtol / (1 - case.dropout)


def _expected(case: Case, tensors: dict[str, Any], on_host: bool) -> tuple[Array, Array]:
    def results(*arguments: Any) -> dict[str, Any]:
        return dict(zip(("out", "lse"), reference.attention(*arguments), strict=True))

    found = _reference(results, case, tensors, on_host)
    return found["out"], found["lse"]


def _reference(
    compute: Callable[..., dict[str, Any]], case: Case, tensors: dict[str, Any], on_host: bool
) -> dict[str, Array]:
    """On the GPU, if there is much to do."""
    work = case.batch * case.heads * case.seqlen_q * case.seqlen_k * case.head_dim
    if on_host or work < _LARGE:
        return compute(case, tensors)
    moved = {name: cupy.asarray(x) for name, x in tensors.items()}
    return {name: cupy.asnumpy(x) for name, x in compute(case, moved, cupy).items()}


def _compare(
    name: str, found: Array, expected: Array, atol: float, rtol: float
) -> dict[str, float]:
    """The error as a share of what is allowed, the largest, and relative to the norm."""
    same = found == expected  # infinities among them
    with np.errstate(invalid="ignore"):
        error = np.where(same, 0.0, np.abs(found - expected))
        allowed = atol + rtol * np.abs(np.where(same, 0.0, expected))
    error = np.where(np.isfinite(error), error, np.inf)  # NaN agrees with nothing
    norm = float(np.linalg.norm(np.where(np.isfinite(expected), expected, 0.0)))
    return {
        f"{name}_worst": float((error / allowed).max(initial=0.0)),
        f"{name}_error": float(error.max(initial=0.0)),
        f"{name}_relative": float(np.linalg.norm(error)) / (norm or 1.0),
    }
