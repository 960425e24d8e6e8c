"""The planner: what it asks of the GPU fits every GPU, and names kernels that exist."""

from __future__ import annotations

import re
import struct
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from emulated import SHADERS

import umfa
from umfa import _ext
from umfa._frameworks import _numpy
from umfa._options import make_options

FAMILIES = [7, 8, 9, 10]
DTYPES = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
HEAD_DIMS = [1, 32, 33, 40, 64, 72, 80, 96, 100, 128, 160, 192, 256]


def plan(
    dtype: Any = np.float16,
    shape: tuple[int, int, int, int] = (1, 100, 4, 64),
    seqlen_kv: int | None = None,
    nheads_kv: int | None = None,
    head_dim_v: int | None = None,
    family: int = 7,
    lse: bool = True,
    alibi: bool = False,
    **options: Any,
) -> dict[str, Any]:
    batch, seqlen_q, nheads, head_dim = shape
    kv_shape = (batch, seqlen_q if seqlen_kv is None else seqlen_kv, nheads_kv or nheads, head_dim)
    defaults = {"softmax_scale": None, "causal": False, "window_size": (-1, -1), "softcap": 0.0}
    made = {**defaults, **options}
    tensors = {
        "query": np.zeros(shape, dtype),
        "key": np.zeros(kv_shape, dtype),
        "value": np.zeros((*kv_shape[:3], head_dim_v or head_dim), dtype),
        "out": np.zeros((*shape[:3], head_dim_v or head_dim), dtype),
        "lse": np.zeros((batch, nheads, seqlen_q), np.float32) if lse else None,
        "alibi_slopes": np.zeros(nheads, np.float32) if alibi else None,
    }
    return _ext.metal_plan_forward(
        make_options("umfa.test", ("q", "k", "v"), 0.0, *made.values(), False, lse),
        family,
        8,
        **{k: None if t is None else _numpy.export(t, "umfa.test", k) for k, t in tensors.items()},
    )


def only_launch(**arguments: Any) -> dict[str, Any]:
    (launch,) = plan(**arguments)["launches"]
    return launch


def host_names() -> set[str]:
    """Kernels that a library compiled ahead from forward.metal would hold."""
    text = (SHADERS / "forward.metal").read_text()
    rows = re.findall(r"UMFA_FORWARD_(16|32)BIT\(NAME, T, (\d+), (\d+)\)", text)
    lists = re.findall(r'^UMFA_FORWARD_ALL_(16|32)BIT\("(\w+)"', text, re.MULTILINE)
    return {
        f"forward_{name}_d{dim}_k{keys}"
        for bits, name in lists
        for row_bits, dim, keys in rows
        if bits == row_bits
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_launch_fits_every_gpu(head_dim: int, dtype: str, family: int) -> None:
    launch = only_launch(dtype=DTYPES[dtype], shape=(1, 50, 2, head_dim), family=family)
    assert launch["threadgroup_bytes"] <= 32768
    x, y, z = launch["threadgroup"]
    assert x * y * z <= 1024
    assert x % 32 == 0  # whole simdgroups
    assert launch["kernel"] in host_names()
    assert int(launch["macros"]["UMFA_D"]) >= head_dim


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat_fragments_only_where_they_are_native(family: int) -> None:
    """Before Apple9 bfloat arithmetic is emulated, and its simdgroup matrices are in doubt."""
    macros = only_launch(dtype=ml_dtypes.bfloat16, family=family)["macros"]
    assert macros["UMFA_T"] == "bfloat"
    assert macros["UMFA_M"] == ("bfloat" if family >= 9 else "float")


@pytest.mark.parametrize("seqlen_q", [1, 31, 32, 33, 100])
def test_grid_covers_the_queries_and_nothing_else(seqlen_q: int) -> None:
    launch = only_launch(shape=(3, seqlen_q, 4, 64), nheads_kv=2)
    rows = 8 * int(launch["macros"]["UMFA_QF"]) * int(launch["macros"]["UMFA_SIMDGROUPS"])
    x, y, z = launch["grid"]
    assert (x - 1) * rows < seqlen_q <= x * rows
    assert (y, z) == (4, 3)


def test_constants_follow_the_problem() -> None:
    plain = only_launch(lse=False)["constants"]
    assert plain == {0: False, 1: 0, 2: False, 3: False, 4: False, 5: True, 6: True}
    assert only_launch()["constants"][0] is True
    assert only_launch(alibi=True)["constants"] | {0: True} == {
        0: True, 1: 0, 2: False, 3: True, 4: False, 5: False, 6: True,
    }  # fmt: skip
    assert only_launch(softcap=5.0)["constants"][4] is True
    assert only_launch(softmax_scale=-1.0)["constants"][5] is False


def test_each_buffer_index_is_bound_once() -> None:
    launch = only_launch(alibi=True)
    indices = [index for index, *_ in launch["buffers"]] + [launch["params_index"]]
    assert len(set(indices)) == len(indices)
    assert max(indices) <= 30
    assert {source for _, source, *_ in launch["buffers"]} == {
        "query", "key", "value", "out", "lse", "alibi_slopes",
    }  # fmt: skip


def test_parameters_fit_set_bytes_and_hold_the_problem() -> None:
    launch = only_launch(
        shape=(2, 100, 8, 40), seqlen_kv=70, nheads_kv=2, head_dim_v=24, window_size=(5, 7)
    )
    params = launch["params"]
    assert len(params) < 4096
    # The tail of ForwardParams: eight int32 and two floats.
    *integers, scale, softcap = struct.unpack("<8i2f", params[-40:])
    assert integers[:5] == [100, 70, 40, 24, 4]
    assert integers[5:] == [70 - 100, 5, 7]
    assert scale == np.float32(40**-0.5 * np.log2(np.e))
    assert softcap == 0


def test_nothing_to_do_is_an_empty_plan() -> None:
    assert plan(shape=(1, 0, 4, 64))["launches"] == []
    assert plan(shape=(0, 10, 4, 64))["launches"] == []


def test_head_dims_without_a_kernel_are_refused() -> None:
    with pytest.raises(umfa.UnsupportedError, match=r"head_dim=300"):
        plan(shape=(1, 10, 1, 300))
