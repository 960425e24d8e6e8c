"""The planner of attention over quantised keys and values."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest

import umfa
from tests.metal.test_plan_forward import CODES, DECODE, FORWARD, plan_of
from tests.quant.test_attention import KEY, VALUE
from tests.quantization import Format

KEY_KIND, VALUE_KIND, OUT_KIND = 23, 24, 25
KEY_CODES, VALUE_CODES, HAS_CODES = 54, 55, 56
IS_CODES = 5  # UMFA_KIND_CODES


def operand(field: str, form: Format, shape: tuple[int, ...], offset: int = 0) -> dict[str, Any]:
    """A quantised key or value by its fields of the record. `offset`: bytes before the codes."""
    x = umfa.quantize(np.zeros(shape, np.float32), **form._asdict())
    data = np.zeros(x.data.nbytes + 16, x.data.dtype)
    data = data[-data.ctypes.data % 16 + offset :][: x.data.nbytes].reshape(x.data.shape)
    parts = {field: data, f"{field}_scales": x.scales, f"{field}_offsets": x.zero_points}
    found = {name: part for name, part in parts.items() if part is not None}
    return {**found, f"{field}_format": x._format.text(shape[-1])}


def plan(
    key: Format = KEY,
    value: Format = VALUE,
    head_dim: int = 64,
    seqlen_q: int = 50,
    offset: int = 0,
    **options: Any,
) -> dict[str, Any]:
    query = np.zeros((2, seqlen_q, 4, head_dim), np.float16)
    shape = (2, 700, 2, head_dim)
    tensors = operand("key", key, shape, offset) | operand("value", value, shape)
    return plan_of(query=query, out=query.copy(), **tensors, **options)


def kind(launch: dict[str, Any], index: int = KEY_CODES) -> dict[str, Any]:
    """What the constant says, as code_kinds.h packs it."""
    packed = launch["constants"][index]
    assert packed & 1
    names = ("wide", "row_blocks", "channel_blocks", "each", "near")
    found: dict[str, Any] = {name: bool(packed >> 10 + i & 1) for i, name in enumerate(names)}
    numbers = {"codes": packed >> 1 & 15, "scales": packed >> 5 & 7, "offset": packed >> 8 & 3}
    return numbers | found | {"shift": packed >> 15}


def test_the_format_is_a_constant() -> None:
    (launch,) = plan(VALUE, KEY)["launches"]
    usual = {
        "wide": True,
        "row_blocks": False,
        "channel_blocks": False,
        "each": False,
        "near": True,
    }
    usual["shift"] = 0
    assert kind(launch) == {"codes": 0, "scales": 1, "offset": 0} | usual  # int8, float16
    assert kind(launch, VALUE_CODES) == {
        "codes": 3, "scales": 1, "offset": 1, **usual, "channel_blocks": True, "shift": 5,
    }  # fmt: skip
    assert launch["constants"][HAS_CODES] is True
    assert launch["constants"][KEY_KIND] == launch["constants"][VALUE_KIND] == IS_CODES
    assert launch["constants"][OUT_KIND] == 0


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        (Format("int8", "tensor"), ""),
        (Format("int8", "row"), ""),
        (Format("int8", "channel"), "each"),
        (Format("int8", "block", True, (1, 32)), "channel_blocks"),
        (Format("int8", "block", True, (4, 16)), "channel_blocks row_blocks"),
        (Format("int8", "block", True, (4, None)), "row_blocks"),
        (Format("int8", "block", True, (1, 64)), ""),
        (Format("int8", "block", True, (700, 64)), ""),
    ],
    ids=str,
)
def test_what_shares_a_scale(form: Format, expected: str) -> None:
    found = kind(plan(form)["launches"][0])
    assert (1 << found["shift"]) == (form.block[1] if found["channel_blocks"] else 1)
    names = ("channel_blocks", "each", "row_blocks")
    assert [name for name in names if found[name]] == expected.split()


@pytest.mark.parametrize(("form", "bytes_"), [(KEY, 8), (VALUE, 16)], ids=str)
def test_runs_are_read_where_they_are_aligned(form: Format, bytes_: int) -> None:
    for offset in (0, 1, 4, 8):
        assert kind(plan(form, offset=offset)["launches"][0])["wide"] is (offset % bytes_ == 0)
    for head_dim in (48, 72, 75, 80):
        # Two heads of a token follow each other.
        (launch,) = plan(form, head_dim=head_dim)["launches"]
        assert kind(launch)["wide"] is (head_dim % 16 == 0)


@pytest.mark.parametrize("seqlen_q", [1, 50])
def test_every_buffer_is_bound(seqlen_q: int) -> None:
    form = Format("int4", "block", False, (1, 32))
    made = plan(form, form, seqlen_q=seqlen_q, num_splits=1)
    (launch,) = made["launches"]
    name, layout_ = ("decode_f16_d64", DECODE) if seqlen_q == 1 else ("forward_f16_d64", FORWARD)
    assert launch["kernel"].startswith(name)
    bound = {index for index, *_ in launch["buffers"]} | {launch["params_index"]}
    missing = {name for name, index in layout_.items() if index not in bound}
    assert not missing & CODES
    assert max(layout_.values()) <= 30
    assert ("decode_codes_f16" if seqlen_q == 1 else "codes_f16") in launch["families"]
    assert "dtypes_f16" not in launch["families"]


def test_parts_that_a_format_lacks_are_not_bound() -> None:
    (launch,) = plan(VALUE, VALUE)["launches"]
    bound = {index for index, *_ in launch["buffers"]}
    assert {name for name in CODES if FORWARD[name] in bound} == CODES - {
        "KEY_OFFSETS", "VALUE_OFFSETS",
    }  # fmt: skip
    assert [launch["constants"][i] for i in range(57, 61)] == [True, False, True, False]


def test_where_scales_lie() -> None:
    """Strides from one block to the next; 0 where one block spans the dimension."""
    made = plan(Format("int8", "block", False, (4, 32)), Format("int8", "channel"))
    (params,) = made["data"]
    numbers = struct.unpack("<8q2i8q2i", params)
    per_row = 2 * 2  # heads, blocks of a head
    strides = (700 // 4 * per_row, 2, per_row, 1)
    assert numbers[:10] == (*strides, *strides, 4, 32)
    assert numbers[10:14] == (2 * 64, 64, 0, 1)
    assert numbers[18:] == (700, 1)


def test_the_kernel_is_that_of_the_numbers() -> None:
    """Of those tensors that are no codes; float32 where they differ."""
    query, other = np.zeros((1, 50, 2, 64), np.float16), np.zeros((1, 90, 2, 64), np.float32)
    codes = operand("key", VALUE, other.shape)
    mixed = plan_of(query=query, value=other, out=query.copy(), **codes)["launches"][0]
    assert mixed["kernel"].startswith("forward_f32")
    assert mixed["constants"][KEY_KIND] == IS_CODES
    same = plan_of(query=query, value=other.astype(np.float16), out=query.copy(), **codes)
    assert same["launches"][0]["kernel"].startswith("forward_f16")
    wide = 7
    assert same["launches"][0]["constants"][wide] is True


@pytest.mark.parametrize("channels", [48, 80])
def test_blocks_that_are_no_power_of_two(channels: int) -> None:
    (launch,) = plan(Format("int8", "block", True, (1, channels)), head_dim=160)["launches"]
    found = kind(launch)
    assert found["channel_blocks"]
    assert found["shift"] == 0
