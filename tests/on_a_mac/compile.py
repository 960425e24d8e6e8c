"""Stage: every kernel through Apple's compiler, from its text and from the metallib."""

from __future__ import annotations

from contextlib import AbstractContextManager

from tests.on_a_mac import shapes
from tests.on_a_mac.metal import Device, MetalError
from tests.on_a_mac.part import Part
from tests.on_a_mac.shapes import Shape
from umfa import _ext

HEAD = "max threads, static threadgroup bytes, simdgroup width"
QUICK = {
    ("append_f16", "everything"),
    ("clear_f32", "plain"),
    ("decode_f16_d64_v64_q1", "plain"),
    ("decode_vector_f16_d64_v64", "plain"),
    ("dq_f16_d64_v64_k16", "plain"),
    ("forward_f16_d64_v64_k32", "plain"),
}


def limits(
    device: Device, library: AbstractContextManager[int], shape: Shape
) -> tuple[str, list[str]]:
    """The pipeline's limits for the table, and what umfa's host would not like about them."""
    launch = shape.launch
    with library as opened, device.pipeline(opened, shape.name, launch["constants"]) as pipeline:
        notes = []
        threads = launch["threadgroup"][0]
        if pipeline.max_threads < threads:
            notes.append(f"allows {pipeline.max_threads} threads, planned are {threads}")
        if pipeline.threadgroup_bytes > 32768:
            notes.append(f"takes {pipeline.threadgroup_bytes} bytes of threadgroup memory")
        if pipeline.width != 32:
            notes.append(f"has simdgroups of {pipeline.width}")
        return (
            f"{pipeline.max_threads}, {pipeline.threadgroup_bytes}, {pipeline.width}",
            notes,
        )


def compile_all(part: Part, device: Device, chosen: list[Shape]) -> int:
    """Write a row for each kernel and its errors in full; return how many were refused."""
    refused, notes = 0, []
    errors: dict[str, list[str]] = {}
    ahead = _ext.metallib()
    part.write(
        f"{len(chosen)} pipelines; the metallib has {len(ahead)} bytes. Columns: {HEAD}.",
        *("", "| kernel | variant | from text | from the metallib |", "|---|---|---|---|"),
    )
    for shape in chosen:
        cells = []
        for route in ("text", "metallib"):
            if route == "metallib" and not ahead:
                cells.append("–")
                continue
            library = device.library(shape.text) if route == "text" else device.metallib(ahead)
            try:
                cell, said = limits(device, library, shape)
                notes += [f"{shape.name}, {shape.variant}, {route}: {note}" for note in said]
            except MetalError as error:
                cell = "**refused**"
                refused += 1
                who = f"`{shape.name}`, {shape.variant}, {route}"
                errors.setdefault(str(error), []).append(who)
            cells.append(cell)
        part.write(f"| {shape.name} | {shape.variant} | {' | '.join(cells)} |")
    part.write("", f"{refused} refused.", *(f"* {note}" for note in notes))
    for text, who in errors.items():
        part.fail(f"{len(who)} refused: {'; '.join(who)}", text)
    return refused


def run(part: Part, *, quick: bool) -> None:
    chosen = shapes.every_shape()
    if quick:
        chosen = [s for s in chosen if (s.name, s.variant) in QUICK]
    with Device() as device:
        compile_all(part, device, chosen)
