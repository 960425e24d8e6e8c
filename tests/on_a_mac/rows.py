"""Stage: the kernels that need no 8x8 matrices, run by Metal without umfa's host.

They run on GPUs that umfa refuses, such as those of hosted Macs (family Apple5).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.metal import emulated
from tests.on_a_mac import shapes
from tests.on_a_mac.metal import Device
from tests.on_a_mac.part import Part
from tests.on_a_mac.shapes import Array, Shape


class Player:
    """Plays the launches of append and clear; the others need what the GPU may lack."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.played: list[str] = []

    def __call__(self, launch: dict[str, Any], pieces: dict[str, list[Any]]) -> None:
        if not launch["kernel"].startswith(("append_", "clear_")):
            return
        bound = emulated.bound(launch, pieces)
        buffers = {index: memory for index, (memory, _) in bound.items()}
        offsets = {index: first for index, (_, first) in bound.items()}
        text = Shape(launch["kernel"], "", launch).text
        with (
            self.device.library(text) as library,
            self.device.pipeline(library, launch["kernel"], launch["constants"]) as pipeline,
        ):
            self.device.run(pipeline, launch["grid"], launch["threadgroup"], buffers, offsets)
        self.played.append(launch["kernel"])


def append(dtype: Any, pages: bool) -> bool:
    """Whether new rows arrive bit for bit, and nothing else changes."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape, np.float32).astype(dtype)

    used, new = np.array([9, 33], np.int32), 5
    table = np.array([[3, 0, 6, 1], [2, 7, 4, 5]], np.int32)
    shape = (8, 16, 2, 40) if pages else (2, 64, 2, 40)
    caches = [normal(*shape), normal(*shape)]
    rows = {"new_key": normal(2, new, 2, 40), "new_value": normal(2, new, 2, 40)}
    expected = [cache.copy() for cache in caches]
    for cache, added in zip(expected, rows.values(), strict=True):
        for b, first in enumerate(used):
            for i in range(new):
                at = int(first) + i
                place = (table[b, at // 16], at % 16) if pages else (b, at)
                cache[place] = added[b, i]
    tensors: dict[str, Any] = {"seqused_k": used, **rows}
    if pages:
        tensors["block_table"] = table
    emulated.call(normal(2, 1, 2, 40), *caches, {}, **tensors)
    return all(a.tobytes() == b.tobytes() for a, b in zip(caches, expected, strict=True))


def clear(dtype: Any) -> bool:
    """Whether unused rows become 0 with a log-sum-exp of -inf, and the others stay."""
    used = np.array([7, 40], np.int32)
    query = np.ones((2, 40, 2, 24), dtype)
    out, lse = emulated.call(query, query.copy(), query.copy(), {}, seqused_q=used)
    unused = np.arange(40) >= used[:, None]
    # `emulated` fills results with NaN, and no attention has run.
    return bool(
        (out[unused] == 0).all()
        and np.isneginf(lse.transpose(0, 2, 1)[unused]).all()
        and np.isnan(out[~unused].astype(np.float32)).all()
        and np.isnan(lse.transpose(0, 2, 1)[~unused]).all()
    )


def run(part: Part, *, quick: bool) -> None:
    with Device() as device:
        check_all(part, device, ["f16"] if quick else list(shapes.DTYPES))


def check_all(part: Part, device: Device, names: list[str]) -> None:
    part.write(f"On {device.name}:", "")
    player = Player(device)
    with shapes.played_by(player):
        for name in names:
            dtype = shapes.DTYPES[name]
            checks = {
                f"append_{name}": lambda d=dtype: append(d, pages=False),
                f"append_{name}, pages": lambda d=dtype: append(d, pages=True),
                f"clear_{name}": lambda d=dtype: clear(d),
            }
            for what, check in checks.items():
                with part.guarded(f"{what} was refused"):
                    player.played.clear()
                    right = check()
                    if player.played != [what.split(",")[0]]:
                        raise AssertionError(f"the plan launched {player.played}")
                    part.write(f"* {what}: {'right, bit for bit' if right else '**WRONG**'}")
                    part.wrong += not right
