"""Asks umfa's planner what it would launch for a case."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from umfa import _ext
from umfa._frameworks import _numpy
from umfa._options import make_options

from .cases import Case
from .placement import STORAGE, placements, tables


def plan(case: Case) -> dict[str, Any]:
    """The LaunchPlan, as plain values. Raises umfa.UnsupportedError where there is no kernel."""
    function = "umfa.metal_ptx"
    options = make_options(
        function,
        ("query", "key", "value"),
        case.dropout,
        case.scale or None,
        bool(case.causal),
        case.window,
        case.softcap,
        False,
        case.lse,
        top_left=case.causal == "upper_left",
        attention_chunk=case.chunk,
        rotary_interleaved=case.rotary != "halves",
    )
    tensors: dict[str, Any] = dict.fromkeys(
        ("query", "key", "value", "out", "lse", "alibi_slopes", "mask")
    )
    for name, place in placements(case).items():
        array = place.view(np.empty(place.size, STORAGE[place.dtype]))
        if place.dtype in ("bool", "bfloat16"):
            array = array.view({"bool": np.bool_, "bfloat16": ml_dtypes.bfloat16}[place.dtype])
        tensors[name] = _numpy.export(array, function, name)
    tensors["attn_mask"] = tensors.pop("mask")
    others: dict[str, Any] = dict(tables(case))
    for name in ("learnable_sink", "qv", "new_key", "new_value", "rotary_cos", "rotary_sin"):
        if name in tensors:
            others[name] = tensors.pop(name)
    return _ext.metal_plan_forward(options, case.family, case.cores, **tensors, others=others)
