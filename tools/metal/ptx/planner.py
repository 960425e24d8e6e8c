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
    made = _ext.metal_plan_forward(
        attention.options,
        case.family,
        case.cores,
        exported(_numpy, prepared(attention.options), attention.tensors),
        _numpy.export(out, FUNCTION.name, "out"),
        lse,
        by_tables=case.by_tables,
    )
    return _with_data(made, tables(case)) if case.by_tables else made


def _with_data(made: dict[str, Any], tables_: dict[str, np.ndarray]) -> dict[str, Any]:
    """The plan, with the tables that a kernel reads, and the place of what it finds wrong, as data:
    runners know no tensors of integers."""
    names = [name for name, _ in made["tensors"]]
    given = {**tables_, "table_fault": np.zeros(5, np.int64)}
    pieces = {name: len(made["data"]) + i for i, name in enumerate(given)}
    made["data"] = [*made["data"], *(x.tobytes() for x in given.values())]
    for launch in made["launches"]:
        launch["buffers"] = [
            (index, "data", pieces[names[piece]], offset)
            if kind == "tensor" and names[piece] in given
            else (index, kind, piece, offset)
            for index, kind, piece, offset in launch["buffers"]
        ]
    return made
