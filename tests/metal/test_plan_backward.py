"""The planner of the backward pass: what it asks of the GPU, what it refuses, what kernels move."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.array_libraries import DTYPES
from tests.metal import emulated
from tests.metal.backward_calls import Call
from tests.metal.test_plan_forward import FAMILIES, host_names
from umfa import _ext

pytestmark = pytest.mark.usefixtures("own_settings")

HEAD_DIMS = [(1, 1), (32, 32), (64, 64), (80, 70), (96, 96), (128, 128), (130, 40), (160, 160),
             (192, 128), (192, 192), (256, 256), (200, 256), (257, 64), (64, 320), (128, 512),
             (576, 512)]  # fmt: skip


def plan(call: Call, wanted: tuple[str, ...] = ("dq", "dk", "dv")) -> dict[str, Any]:
    """Without running it."""
    played = emulated._play
    try:
        vars(emulated)["_play"] = lambda launch, pieces: None
        call.run(wanted)
    finally:
        vars(emulated)["_play"] = played
    return dict(emulated.last_plan)


def test_every_launch_fits_every_gpu_and_has_a_kernel() -> None:
    asked = set()
    for head_dim, head_dim_v in HEAD_DIMS:
        for dtype in DTYPES:
            options = {"attn_mask": np.zeros((1, 1, 9, 10), np.float32)}
            call = Call(
                [9], [10], head_dim=head_dim, head_dim_v=head_dim_v, dtype=dtype, options=options
            )
            for family in FAMILIES:
                emulated.settings.family = family
                launches = plan(call, ("dq", "dk", "dv", "dmask"))["launches"]
                stems = [x["kernel"].split("_")[0] for x in launches]
                assert stems == ["delta", "dq", "dkv", "dmask"]
                for launch in launches:
                    assert launch["threadgroup_bytes"] <= 32768
                    assert launch["threadgroup"][0] <= 1024
                    assert launch["threadgroup"][0] % 32 == 0
                    assert launch["buffer_count"] <= 31
                    assert len(launch["params"]) < 4096
                    asked.add(launch["kernel"])
    # Of Apple7 and 8, which compute bfloat as float.
    spare = {"dq_bf16_d128_v128_k16", "dmask_bf16_d128_v128_k16"}
    assert asked | spare == host_names("backward.metal") | host_names("backward_mask.metal")
    assert not asked & spare


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_have_a_kernel_compiled_ahead(dtype: str) -> None:
    options = {"learnable_sink": np.ones(2, DTYPES[dtype])}
    delta, sums = plan(Call([9], [10], dtype=dtype, options=options), ("dsinks",))["launches"]
    assert delta["kernel"].startswith("delta_")
    assert sums["kernel"] in host_names("row_sums.metal")
    assert sums["grid"] == (2, 1, 1)
    assert sums["families"] == [sums["kernel"]]


def test_memory_grows_with_the_rows_alone() -> None:
    for length in (64, 640):
        found = plan(Call([length], [length], heads=4))
        assert found["scratch_bytes"] == [8 * 4 * length]
        sloped = Call([length], [length], heads=4, options={"alibi_slopes": np.ones(4, "f4")})
        found = plan(sloped, ("dq", "dalibi_slopes"))
        assert found["scratch_bytes"] == [8 * 4 * length, 4 * 4 * length]
        for rows, keys in ((1, 1), (1, length), (length, 1), (length, length)):
            mask = {"attn_mask": np.zeros((1, 1, rows, keys), np.float32)}
            found = plan(Call([length], [length], heads=4, options=mask), ("dmask",))
            terms = [4 * 4 * length] if rows == keys == 1 else []
            assert found["scratch_bytes"] == [8 * 4 * length, *terms]


def test_long_calls_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """All kernels of products, along the blocks of their grids."""
    monkeypatch.setenv("UMFA_METAL_SLICE_MS", "0.02")
    options = {"causal": True, "attn_mask": np.zeros((1, 1, 300, 500), np.float32)}
    wanted = ("dq", "dk", "dv", "dmask")
    call = Call([300], [500], heads=4, heads_k=2, options=options, dtype="float16")
    launches = plan(call, wanted)["launches"]
    names = [x["kernel"].split("_")[0] for x in launches]
    for name in ("dq", "dkv", "dmask"):
        assert names.count(name) > 1
    assert names == sorted(names, key=["delta", "dq", "dkv", "dmask"].index)
    call.check(wanted)


# ---- what the kernels cost ---------------------------------------------------------------------

DOCUMENT = Path(__file__).parents[2] / "docs" / "metal-verification.md"
ROW = re.compile(r"^\| (dQ|dK and dV), (\w+), D = (\d+), Apple(\d+) \|(.*)\|$", re.MULTILINE)
STATED = ROW.findall(DOCUMENT.read_text())
LENGTH = 512
FULL = {(dtype, d, family) for _, dtype, d, family, _ in STATED}


def counted(call: Call) -> dict[str, Any]:
    """Counters of a launch, and the launch, by the kernel's stem."""
    with emulated.counting() as counters:
        call.run()
        kept = list(counters)
    launches = emulated.last_plan["launches"]
    stems = [x["kernel"].split("_")[0] for x in launches]
    return dict(zip(stems, zip(kept, launches, strict=True), strict=True))


def moved(stem: str, counter: Any, launch: dict[str, Any]) -> list[float]:
    """The cells of a row: per score, and barriers per tile."""
    tile = int(launch["macros"]["UMFA_SHAPE"].split(", ")[2])
    scores, tiles = LENGTH**2, counter.threadgroups * LENGTH // tile
    read = counter.buffer_bytes_read
    tiled = (1, 2) if stem == "dq" else (0, 3)
    return [
        counter.threadgroup_bytes_read / scores,
        counter.threadgroup_bytes_written / scores,
        counter.threadgroup_barriers / tiles,
        sum(read[i] for i in tiled) / scores,
    ]


@pytest.mark.parametrize(
    ("dtype", "head_dim", "family"),
    [x if x == ("float16", "64", "7") else pytest.param(*x, marks=pytest.mark.slow)
     for x in sorted(FULL)],
)  # fmt: skip
def test_kernels_move_what_is_stated(dtype: str, head_dim: str, family: str) -> None:
    emulated.settings.family = int(family)
    d, item = int(head_dim), np.dtype(DTYPES[dtype]).itemsize
    found = counted(Call([LENGTH], [LENGTH], 1, 1, head_dim=d, dtype=dtype))
    stated = {
        ("dq" if name == "dQ" else "dkv"): [float(cell) for cell in cells.split("|")]
        for name, *rest, cells in STATED
        if rest == [dtype, head_dim, family]
    }
    assert set(stated) == {"dq", "dkv"}
    for stem, products in (("dq", 3), ("dkv", 4)):
        counter, launch = found[stem]
        assert counter.mma * 1024 == LENGTH**2 * 2 * products * d  # none is computed twice
        # Simdgroups that share the channels of a row each compute all of its probabilities.
        *_, split, one_tile = launch["macros"]["UMFA_SHAPE"].split(", ")
        assert counter.exp2 <= 1.01 * LENGTH**2 * int(split)
        assert stated[stem] == pytest.approx(moved(stem, counter, launch), abs=0.005)
        # What a block holds is read once, tiles once for each block; dO twice if Q replaces it.
        blocks = launch["grid"][0]
        held, tiled = ((0, 3), (1, 2)) if stem == "dq" else ((1, 2), (0, 3))
        for index in range(4):
            times = blocks if index in tiled else 1
            if (stem, index, one_tile) == ("dkv", 3, "true"):
                times *= 2
            assert counter.buffer_bytes_read[index] == times * LENGTH * d * item
        assert set(held) | set(tiled) == {0, 1, 2, 3}


def test_hidden_tiles_are_skipped_in_both_directions() -> None:
    length, d = LENGTH, 64
    options = {"causal": True}
    found = counted(Call([length], [length], 1, 1, head_dim=d, dtype="float16", options=options))
    triangle = length * (length + 1) / 2
    products = sum(found[stem][0].mma for stem in ("dq", "dkv")) * 1024
    assert products <= 1.15 * triangle * 14 * d


@pytest.mark.slow
def test_a_window_costs_what_its_band_holds() -> None:
    length, d, window = 1024, 64, 128
    options = {"window_size": (window - 1, 0)}
    call = Call([length], [length], 1, 1, head_dim=d, dtype="float16", options=options)
    found = counted(call)
    band = window * length - window * (window - 1) / 2
    products = sum(found[stem][0].mma for stem in ("dq", "dkv")) * 1024
    assert products <= 1.35 * band * 14 * d


def test_families() -> None:
    launches = plan(Call(dtype="float16", options={"dropout_p": 0.5}, head_dim=80))["launches"]
    assert [x["families"] for x in launches] == [
        ["delta_f16"],
        ["dq_f16_d128", "backward_dropout_f16"],
        ["dkv_f16_d128", "backward_dropout_f16"],
    ]
    assert _ext.shader_text("backward.metal")


def test_rows_of_no_sequence_are_cleared_and_no_others() -> None:
    """By bytes: two rows behind three sequences."""
    call = Call([9, 12, 5], [30, 25, 11], heads=2, heads_k=1, head_dim=32, packed=True)
    with emulated.counting() as counters:
        call.run()
    launches = emulated.last_plan["launches"]
    cleared = [
        sum(counter.buffer_bytes_written.values())
        for launch, counter in zip(launches, counters, strict=True)
        if launch["kernel"].startswith("clear")
    ]
    row = 32 * 4
    assert sorted(cleared) == [2 * row, 2 * row, 2 * 2 * row], "dK, dV, and dQ of two heads"
