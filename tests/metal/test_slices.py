"""Slices of long launches: bounded, few, and together exactly the launch that they are cut from."""

from __future__ import annotations

import itertools
import struct
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import umfa
from tests.cases import normal
from tests.checks import assert_same_bits
from tests.metal import emulated
from tests.metal.test_plan_forward import plan
from tests.sequences import offsets

LIMIT = 0.25
"""Seconds of a slice, as src/metal/slices.cpp has it."""
IS_SLICE = 31
COMMAND_BUFFER = 1e-4
"""What a command buffer costs, in seconds."""

pytestmark = pytest.mark.usefixtures("own_settings")

LONG: dict[str, dict[str, Any]] = {
    "queries": {"shape": (1, 131072, 2, 128), "nheads_kv": 1},
    "causal": {"shape": (1, 131072, 4, 128), "nheads_kv": 1, "causal": True},
    "window": {"shape": (1, 131072, 4, 64), "window_size": (30000, 0)},
    "heads": {"shape": (2, 8192, 64, 128), "nheads_kv": 8},
    "batch": {"shape": (64, 1024, 32, 64), "nheads_kv": 8},
    "large head_dim": {"shape": (1, 32768, 16, 576), "nheads_kv": 1, "head_dim_v": 512},
    "float32": {"shape": (1, 40000, 7, 100), "dtype": np.float32},
    "sequences": {
        "shape": (3, 60000, 4, 64),
        "others": {"seqused_k": np.array([60000, 100, 31]), "seqused_q": np.array([60000, 50, 9])},
    },
    "decode": {"shape": (64, 1, 32, 128), "nheads_kv": 8, "seqlen_kv": 65536},
    "decode of sequences": {
        "shape": (64, 1, 32, 128), "nheads_kv": 8, "seqlen_kv": 65536,
        "others": {"seqused_k": np.full(64, 65536)},
    },
}  # fmt: skip
EVEN = ("queries", "heads", "batch", "large head_dim", "float32", "decode")
"""Whose threadgroups all take the same time."""


def slices_of(name: str, **more: Any) -> list[dict[str, Any]]:
    """Of the launch that computes."""
    launches = plan(**LONG[name], lse=False, **more)["launches"]
    return [x for x in launches if x["kernel"].startswith(("forward", "decode_f"))]


def volume(size: tuple[int, int, int]) -> int:
    return int(np.prod(size))


@pytest.mark.parametrize(("family", "cores"), [(7, 8), (9, 40)])
@pytest.mark.parametrize("name", LONG)
def test_slices_are_bounded_and_cover_the_grid_once(name: str, family: int, cores: int) -> None:
    slices = slices_of(name, family=family, cores=cores)
    assert family > 7 or len(slices) > 1
    places: set[tuple[int, ...]] = set()
    for i, one in enumerate(slices):
        assert 0 < one["seconds"] <= LIMIT
        assert one["further_slice"] is (i > 0)
        corners = zip(one["origin"], one["grid"], strict=True)
        places |= set(itertools.product(*(range(o, o + n) for o, n in corners)))
        assert one["params"] != slices[i - 1]["params"] or len(slices) == 1
        assert struct.pack("<3I", *one["origin"]) in one["params"]
        assert one["constants"][IS_SLICE] is (len(slices) > 1)
    assert len(places) == sum(volume(one["grid"]) for one in slices)
    whole = tuple(max(place[i] for place in places) + 1 for i in range(3))
    assert len(places) == volume(whole)


@pytest.mark.parametrize("name", EVEN)
def test_slices_cost_little(name: str) -> None:
    """Command buffers, and cores that are idle while the last threadgroups of a slice end."""
    slices = slices_of(name)
    seconds = sum(one["seconds"] for one in slices)
    assert len(slices) * COMMAND_BUFFER <= 0.005 * seconds
    round_ = 8 * 3  # threadgroups that 8 cores hold at once
    rounds = [volume(one["grid"]) / round_ for one in slices]
    assert np.ceil(rounds).sum() <= 1.02 * np.ceil(sum(rounds))


def test_estimates_follow_what_is_seen() -> None:
    def seconds(**options: Any) -> float:
        launches = plan(shape=(1, 131072, 4, 64), **options)["launches"]
        return float(sum(launch["seconds"] for launch in launches))

    full = seconds()
    assert seconds(causal=True) == pytest.approx(full / 2, rel=1e-2)
    assert seconds(window_size=(8191, 0)) == pytest.approx(full / 16, rel=0.05)
    assert seconds(cores=40) == pytest.approx(full / 5, rel=1e-6)
    assert full == pytest.approx(4 * 64 * 4 * 131072**2 / (8 * 164e9), rel=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("seqlen", [1, 8, 100, 1024])
@pytest.mark.parametrize("head_dim", [32, 128, 512])
def test_small_problems_are_one_slice(head_dim: int, seqlen: int, dtype: Any) -> None:
    for options in ({}, {"causal": True}, {"others": {"seqused_k": np.array([900, 7])}}):
        launches = plan(dtype, (2, seqlen, 2, head_dim), 1024, **options)["launches"]
        for launch in launches:
            assert launch["origin"] == (0, 0, 0)
            assert not launch["further_slice"]
            assert launch["constants"][IS_SLICE] is False


@pytest.mark.parametrize("value", ["0", "-1", "x", "1x", "nan", "inf"])
def test_a_wrong_limit_is_an_error(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UMFA_METAL_SLICE_MS", value)
    with pytest.raises(
        ValueError,
        match=rf"^\[umfa\] UMFA_METAL_SLICE_MS is wrong; got '{value}'; expected a positive number",
    ):
        plan()


# ---- results -------------------------------------------------------------------------------------

SHORT: dict[str, tuple[dict[str, Any], float]] = {
    # Options, and a limit in milliseconds under which it becomes several slices.
    "forward": (
        {
            "query": normal((2, 150, 3, 64), "float16", seed=0),
            "key": normal((2, 170, 3, 64), "float16", seed=1),
            "value": normal((2, 170, 3, 64), "float16", seed=2),
            "options": {"causal": True, "dropout_p": 0.2, "dropout_seed": 3},
            "alibi_slopes": np.abs(normal((3,), seed=4)),
            "learnable_sink": normal((3,), seed=5),
        },
        0.0125,
    ),
    "packed": (
        {
            "query": normal((171, 2, 64), "float16", seed=0),
            "key": normal((270, 2, 64), "float16", seed=1),
            "value": normal((270, 2, 64), "float16", seed=2),
            "cu_seqlens_q": offsets([100, 1, 70]),
            "cu_seqlens_k": offsets([130, 90, 50]),
        },
        0.003,
    ),
    "decode": (
        {
            "query": normal((3, 2, 4, 64), "float16", seed=0),
            "key": normal((3, 900, 2, 64), "float16", seed=1),
            "value": normal((3, 900, 2, 64), "float16", seed=2),
        },
        0.01,
    ),
}


@pytest.mark.parametrize("name", SHORT)
def test_slices_compute_the_same_bits_with_the_same_work(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, limit = SHORT[name]
    with emulated.counting() as counters:
        whole = emulated.call(**tensors)
        once = list(counters)
    launches = len(emulated.last_plan["launches"])
    for milliseconds in (limit, 1e-6):
        monkeypatch.setenv("UMFA_METAL_SLICE_MS", str(milliseconds))
        with emulated.counting() as counters:
            sliced = emulated.call(**tensors)
            parts = list(counters)
        assert len(emulated.last_plan["launches"]) >= launches + 3
        for found, expected in zip(sliced, whole, strict=True):
            assert_same_bits(found, expected)
        for count in ("threadgroups", "mma", "exp2", "threadgroup_barriers", "shuffles"):
            assert sum(getattr(x, count) for x in parts) == sum(getattr(x, count) for x in once)
    # The smallest limit leaves a threadgroup to a slice.
    merges = sum(x["kernel"].startswith("decode_merge") for x in emulated.last_plan["launches"])
    computing = [x for x in emulated.last_plan["launches"] if "merge" not in x["kernel"]]
    assert all(launch["grid"] == (1, 1, 1) for launch in computing)
    assert merges == (name == "decode")


def test_a_wrong_limit_does_not_concern_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UMFA_METAL_SLICE_MS", "x")
    x = np.zeros((1, 8, 1, 16), np.float32)
    umfa.flash_attn_func(x, x, x, backend="cpu")
