"""Asks umfa's planner what it would launch for a case."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from umfa import _ext
from umfa._call.run import exported, prepared
from umfa._frameworks import _numpy

from .cases import Case
from .codes import FIELDS, format_of
from .placement import STORAGE, placements, tables, written

FUNCTION = _ext.Function("umfa.tools.metal.ptx")


def plan(case: Case) -> dict[str, Any]:
    """The LaunchPlan, as plain values. Raises umfa.UnsupportedError where there is no kernel."""
    tensors: dict[str, Any] = dict(tables(case))
    for name, place in placements(case).items():
        array = place.view(np.empty(place.size, STORAGE[place.dtype]))
        if place.dtype in ("bool", "bfloat16"):
            array = array.view({"bool": np.bool_, "bfloat16": ml_dtypes.bfloat16}[place.dtype])
        tensors[name] = array
    out, lse = tensors.pop("out"), tensors.pop("lse", None)
    saved = (out, lse, tensors.pop("dout", None), tensors.pop("dlse", None))
    gradients = [(name, tensors.pop(name)) for name in written(case) if case.backward]
    for field in FIELDS:
        if form := format_of(case, field):
            tensors[f"{field}_format"] = form.text
    attention = _ext.Attention(
        FUNCTION,
        **tensors,
        dropout_p=case.dropout,
        softmax_scale=case.scale or None,
        causal=bool(case.causal),
        causal_alignment="top_left" if case.causal == "upper_left" else "bottom_right",
        window_size=case.window,
        softcap=case.softcap,
        return_lse=case.lse,
        out_dtype=case.dtype_of("out"),
        attention_chunk=case.chunk,
        rotary_interleaved=case.rotary != "halves",
        backend="metal",
    )
    if case.backward:
        return _ext.metal_plan_backward(
            attention.options,
            case.family,
            case.cores,
            exported(_numpy, prepared(attention.options), attention.tensors),
            tuple(None if x is None else _numpy.export(x, FUNCTION.name, "saved") for x in saved),
            [(name, _numpy.export(x, FUNCTION.name, name)) for name, x in gradients],
        )
    return _ext.metal_plan_forward(
        attention.options,
        case.family,
        case.cores,
        exported(_numpy, prepared(attention.options), attention.tensors),
        _numpy.export(out, FUNCTION.name, "out"),
        lse,
    )
