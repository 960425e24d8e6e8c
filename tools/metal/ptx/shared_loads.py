"""Loads of 8x8 matrices from threadgroup memory: four at a time, and transposed on the way.

umfa_backend.h loads such a matrix by ldmatrix, transposed or not, and a movmatrix. Where the
movmatrix did not meet another one (peephole.py), the load can transpose instead. An mma.m16n8k16
takes two matrices as B, in neighbouring registers, and one ldmatrix fills the registers of two such
pairs: lane n then points to row n % 8 of matrix n / 8.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

THREAD = "llvm.nvvm.read.ptx.sreg.tid.x"
NAME = "llvm.nvvm.ldmatrix.sync.aligned.m8n8"
_LOAD = re.compile(
    rf"^\s*(%[\w.]+) = (?:tail )?call (?:noundef )?i32 @{re.escape(NAME)}\.x1(\.trans)?\.b16\.p3"
    r"\(ptr addrspace\(3\) (?:[\w()]+ )*([%@][\w.$]+)\)"
)
_FLAGS = r"getelementptr (?:inbounds )?(?:nusw )?(?:nuw )?"
_ADDRESS = re.compile(
    rf"^\s*(%[\w.]+) = {_FLAGS}(i8|half|bfloat|i16|float|i32), ptr addrspace\(3\) "
    rf"(?:([%@][\w.$]+)|{_FLAGS}\(i8, ptr addrspace\(3\) (@[\w.$]+), i64 (\d+)\)), i64 (%?[\w.-]+)$"
)
_BYTES = {"i8": 1, "half": 2, "bfloat": 2, "i16": 2, "float": 4, "i32": 4}
# What may write threadgroup memory, or order accesses to it.
_ORDERS = re.compile(r"\bstore\b|\bsideeffect\b|atomicrmw|cmpxchg|fence|@llvm\.(?:mem|nvvm\.bar)")
_LABEL = re.compile(r"^[\w.$\"-]+:|^\}")
_PRODUCT = re.compile(r"mma\.sync\.aligned\.m16n8k16\.[^\"]*\", \"[^\"]*\"\((.*?)\) #")

DECLARATIONS = "".join(
    f"declare {type_} @{NAME}.{count}{trans}.b16.p3(ptr addrspace(3))\n"
    for count, type_ in (("x1", "i32"), ("x4", "{ i32, i32, i32, i32 }"))
    for trans in ("", ".trans")
)


@dataclass
class _Load:
    result: str
    transposes: bool
    pointer: str
    offset: int  # in bytes, from what varies in the address
    line: int
    place: int  # loads of one place may be done together


def transposed_by_loads(lines: list[str], transpose: re.Pattern[str]) -> list[str]:
    """A movmatrix of what was just loaded becomes a load of the other kind, beside the first."""
    loads = {m.group(1): m for line in lines if (m := _LOAD.match(line))}
    wanted: dict[str, list[str]] = {}
    kept = []
    for line in lines:
        found = transpose.match(line)
        if found and found.group(2) in loads:
            wanted.setdefault(found.group(2), []).append(found.group(1))
        else:
            kept.append(line)
    if not wanted:
        return lines
    used = set(re.findall(r"%[\w.]+", "\n".join(x for x in kept if not _LOAD.match(x))))
    out = []
    for line in kept:
        found = _LOAD.match(line)
        if not found or found.group(1) not in wanted:
            out.append(line)
            continue
        if found.group(1) in used:
            out.append(line)
        other = "" if found.group(2) else ".trans"
        out += [
            f"  {name} = tail call i32 @{NAME}.x1{other}.b16.p3(ptr addrspace(3) {found.group(3)})"
            for name in wanted[found.group(1)]
        ]
    return out


def four_at_a_time(lines: list[str]) -> list[str]:
    """The loads of two B operands of mma.m16n8k16 as one."""
    loads = _loads(lines)
    fours = _fours(loads, lines)
    if not fours:
        return lines
    gone = {load.line for four in fours for load in four}
    first = {four[0].line: four for four in fours}
    out: list[str] = []
    for i, line in enumerate(lines):
        if i in first:
            out += _wide(len(out), first[i])
        elif i not in gone:
            out.append(line)
    at = 2 if _LABEL.match(out[1]) else 1
    steps = dict.fromkeys(_steps(four) for four in fours)
    return [*out[:at], *_matrix_of_lane(list(steps)), *out[at:]]


def _loads(lines: list[str]) -> dict[str, _Load]:
    """By result. A place is a block, or what lies between two lines of it that order accesses, one
    varying part of the address, and one kind of load."""
    addresses = {m.group(1): m for line in lines if (m := _ADDRESS.match(line))}

    def resolve(pointer: str) -> tuple[str, int]:
        """What varies in an address, as text, and bytes from there."""
        if pointer not in addresses:
            return pointer, 0
        _, type_, base, variable, start, index = addresses[pointer].groups()
        root, offset = (variable, int(start)) if variable else resolve(base)
        if index.startswith("%"):
            return f"{root} {type_} {index}", offset
        return root, offset + int(index) * _BYTES[type_]

    found: dict[str, _Load] = {}
    places: dict[tuple[int, str, bool], int] = {}
    section = 0
    for i, line in enumerate(lines):
        section += bool(_LABEL.match(line) or _ORDERS.search(line))
        if m := _LOAD.match(line):
            root, offset = resolve(m.group(3))
            transposes = bool(m.group(2))
            place = places.setdefault((section, root, transposes), len(places))
            found[m.group(1)] = _Load(m.group(1), transposes, m.group(3), offset, i, place)
    return found


def _fours(loads: dict[str, _Load], lines: list[str]) -> list[list[_Load]]:
    """Pairs of pairs in which the second lies to the first as the first two to each other."""
    found = []
    waiting: dict[tuple[int, int], list[_Load]] = {}
    taken: set[str] = set()
    for line in lines:
        m = _PRODUCT.search(line)
        names = [x.removeprefix("i32 ") for x in m.group(1).split(", ")[4:6]] if m else []
        if not m or not all(x in loads and x not in taken for x in names) or names[0] == names[1]:
            continue
        pair = [loads[x] for x in names]
        if pair[0].place != pair[1].place:
            continue
        taken.update(names)
        key = (pair[0].place, pair[1].offset - pair[0].offset)
        before = waiting.pop(key, None)
        if before is None:
            waiting[key] = pair
            continue
        four = [*before, *pair]
        # The first one's pointer must be there where the first of them is loaded.
        if four[0].line == min(x.line for x in four):
            found.append(four)
    return found


def _steps(four: list[_Load]) -> tuple[int, int]:
    """Bytes between the matrices of a pair, and between the pairs."""
    return four[1].offset - four[0].offset, four[2].offset - four[0].offset


def _matrix_of_lane(steps: list[tuple[int, int]]) -> list[str]:
    """Where each lane's row lies, from that of the first matrix: for each pair of steps."""
    return [
        f"  %umfa.thread = tail call i32 @{THREAD}()",
        "  %umfa.wide = zext i32 %umfa.thread to i64",
        "  %umfa.eighth = lshr i64 %umfa.wide, 3",
        "  %umfa.sixteenth = lshr i64 %umfa.wide, 4",
        "  %umfa.in_pair = and i64 %umfa.eighth, 1",
        "  %umfa.pair = and i64 %umfa.sixteenth, 1",
        *(
            line
            for a, b in steps
            for line in (
                f"  %umfa.in_pair.{a}.{b} = mul i64 %umfa.in_pair, {a}",
                f"  %umfa.pair.{a}.{b} = mul i64 %umfa.pair, {b}",
                f"  %umfa.step.{a}.{b} = add i64 %umfa.in_pair.{a}.{b}, %umfa.pair.{a}.{b}",
            )
        ),
    ]


def _wide(number: int, four: list[_Load]) -> list[str]:
    name, first = f"%umfa.four{number}", four[0]
    a, b = _steps(four)
    trans = ".trans" if first.transposes else ""
    type_ = "{ i32, i32, i32, i32 }"
    row, step = f"{name}.row", f"%umfa.step.{a}.{b}"
    return [
        f"  {row} = getelementptr i8, ptr addrspace(3) {first.pointer}, i64 {step}",
        f"  {name} = tail call {type_} @{NAME}.x4{trans}.b16.p3(ptr addrspace(3) {row})",
        *(f"  {x.result} = extractvalue {type_} {name}, {k}" for k, x in enumerate(four)),
    ]
