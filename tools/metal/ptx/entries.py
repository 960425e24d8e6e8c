"""Writes the C++ around the kernels for PTX: one entry each, with what a launch must pass to it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tools.metal.emulator.launcher import definitions
from tools.metal.emulator.structure import BUILTIN_SYNONYMS, EntryPoint, Structure

Extents = tuple[int, int, int]


@dataclass(frozen=True)
class Entry:
    """A kernel's entry in PTX.

    Its parameters are a pointer for each of ``buffers`` (indices, in order), a 32-bit offset into
    the dynamic shared memory for each of ``threadgroup`` (indices), and three 32-bit extents of the
    threadgroup.
    """

    host_name: str
    symbol: str
    buffers: tuple[int, ...]
    threadgroup: tuple[int, ...]

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def entries(
    s: Structure, constants: Mapping[int, Any], threads: Extents | None
) -> tuple[str, list[Entry]]:
    """Text to append to the library, and the entries in it."""
    lines = ["", '# 1 "<entries>"', "#include <umfa_ptx_launch.h>", *definitions(s, constants)]
    made = []
    for i, entry in enumerate(s.entries.values()):
        text, described = _entry(i, entry, threads)
        lines += text
        made.append(described)
    return "\n".join(lines) + "\n", made


def _entry(number: int, entry: EntryPoint, threads: Extents | None) -> tuple[list[str], Entry]:
    signature = f"umfa_signature_{number}"
    pointers, offsets, arguments = [], [], []
    buffers, threadgroup = [], []
    shared_index = {
        p.index
        for p in entry.kernel.parameters
        if [q.index for q in entry.kernel.parameters if q.kind == "buffer"].count(p.index) > 1
    }
    for i, p in enumerate(entry.kernel.parameters):
        type_ = f"{signature}::parameter<{i}>"
        bound = f"umfa_backend::bound<{type_}>"
        if p.kind == "builtin":
            name = BUILTIN_SYNONYMS.get(p.builtin, p.builtin)
            arguments.append(
                f"umfa_backend::launch_value<{type_}>(umfa_backend::{name}, umfa_threads)"
            )
        elif p.kind == "threadgroup":
            offsets.append(f"unsigned offset_{i}")
            threadgroup.append(p.index)
            arguments.append(
                f"{bound}::value(({bound}::pointer)(umfa_dynamic_memory + offset_{i}))"
            )
        else:
            # Metal takes different arguments for different memory if one of them is written.
            restrict = "" if p.index in shared_index else "__restrict "
            pointers.append(f"{bound}::pointer {restrict}pointer_{i}")
            buffers.append(p.index)
            arguments.append(f"{bound}::value(pointer_{i})")
    symbol = re.sub(r"\W", "_", entry.host_name)
    extents = ["unsigned umfa_x", "unsigned umfa_y", "unsigned umfa_z"]
    known = ", ".join(map(str, threads)) if threads else "umfa_x, umfa_y, umfa_z"
    token = entry.kernel.token
    file = token.file.replace("\\", "\\\\").replace('"', '\\"')
    at = f'# {token.line} "{file}"'  # errors in how parameters are made point at the kernel
    text = [
        *(at, f"typedef umfa_backend::signature<decltype({entry.expression})> {signature};"),
        at,
        f"UMFA_ENTRY umfa_entry_{number}({', '.join([*pointers, *offsets, *extents])}) "
        f'__asm__("{symbol}");',
        at,
        f"UMFA_ENTRY umfa_entry_{number}({', '.join([*pointers, *offsets, *extents])}) {{ "
        f"const umfa_backend::extents umfa_threads = {{{known}}}; (void)umfa_threads; "
        f"{entry.expression}({', '.join(arguments)}); }}",
    ]
    return text, Entry(entry.host_name, symbol, tuple(buffers), tuple(threadgroup))
