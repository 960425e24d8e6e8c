"""Stage: which lane holds which elements of an 8x8 matrix, as shaders/shared/fragment.h assumes."""

from __future__ import annotations

import numpy as np

from tests.on_a_mac.metal import Device
from tests.on_a_mac.part import Part

TEXT = """#include <metal_stdlib>
#include <metal_simdgroup_matrix>
using namespace metal;
[[kernel]] void umfa_lanes(device const {0}* matrix [[buffer(0)]], device float* held [[buffer(1)]],
                           uint lane [[thread_index_in_simdgroup]]) {{
    simdgroup_matrix<{0}, 8, 8> m;
    simdgroup_load(m, matrix, 8);
    held[2 * lane] = float(m.thread_elements()[0]);
    held[2 * lane + 1] = float(m.thread_elements()[1]);
}}
"""


def assumed() -> np.ndarray:
    """Index of both elements that each lane holds: lane_map of shaders/shared/fragment.h."""
    lane = np.arange(32)
    quad = lane // 4
    row = (quad & 4) + lane // 2 % 4
    column = (quad & 2) * 2 + lane % 2 * 2
    return np.stack([8 * row + column, 8 * row + column + 1], axis=1)


def matrix(kind: str) -> np.ndarray:
    """0 to 63, exact in every type."""
    numbers = np.arange(64, dtype=np.float32)
    if kind == "bfloat":
        return (numbers.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    return numbers.astype(np.float16 if kind == "half" else np.float32).view(np.uint8)


def run(part: Part, *, quick: bool) -> None:
    with Device() as device:
        probe(part, device, ("float",) if quick else ("float", "half", "bfloat"))


def probe(part: Part, device: Device, kinds: tuple[str, ...]) -> None:
    for kind in kinds:
        with part.guarded(f"8x8 matrices of {kind}"):
            held = np.zeros(64, np.float32)
            with (
                device.library(TEXT.format(kind)) as library,
                device.pipeline(library, "umfa_lanes", {}) as pipeline,
            ):
                device.run(pipeline, (1, 1, 1), (32, 1, 1),
                           {0: matrix(kind).tobytes(), 1: held.view(np.uint8)})  # fmt: skip
            found = held.astype(int).reshape(32, 2)
            if (found == assumed()).all():
                part.write(f"* {kind}: the assumed map of lanes to elements")
            else:
                rows = [f"lane {i:2}: {', '.join(f'({n // 8}, {n % 8})' for n in pair)}"
                        for i, pair in enumerate(found.tolist())]  # fmt: skip
                part.fail(f"{kind}: ANOTHER map, (row, column) of both elements", "\n".join(rows))
