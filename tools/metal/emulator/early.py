"""What is done to LLVM IR before it is optimised, while it still says what the text said.

Comparing vectors gives Metal booleans, and clang masks of all ones: the sign extensions, of which
there are no others here, become zero extensions. And some things that clang accepts and Metal does
not are plain to see: a vector that chooses by ``?:``, casts from one memory to another, calls
through pointers. Variables without a value hold all ones, and divisions get their check here, since
the optimiser takes it for granted that no divisor is zero.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from .errors import SourceError
from .sites import Sites

_MASK = re.compile(r"= sext (<\d+ x i1>)")
# That memory is there, which would let the optimiser read where the kernel does not.
_PROMISE = re.compile(r" dereferenceable(?:_or_null)?\(\d+\)")
_SPACES = {"": "thread", "1": "device", "2": "constant", "3": "threadgroup"}
_CHOICE = re.compile(r"= select <\d+ x i1> ")
_CAST = re.compile(r"= addrspacecast ptr(?: addrspace\((\d)\))? .* to ptr(?: addrspace\((\d)\))?")
_CALL = re.compile(r"\bcall .*?(?:@([\w$.]+)|%[\w.]+)\(")
_DEBUG = re.compile(r"!dbg !(\d+)")

# What clang writes into variables without a value: NaN, and 0xAA... for integers, whose bits are a
# finite half or float.
_PATTERN = re.compile(r"(?<![\w.-])-(?:86|21846|1431655766|6148914691236517206)(?![\w.])")
_PATTERN_COPY = re.compile(
    r"@llvm\.memcpy\.p0\.p0\.(i\d+)\((ptr .*?%[\w.]+), ptr .*?@[\w.$\"]+, (i\d+ \d+, i1 \w+)\)"
)
_DIVISION = re.compile(
    r"^  %\S+ = ([su])(?:div|rem) (?:<(\d+) x )?i(\d+)>? ([^!]+), ([^!]+?), (!dbg !\d+)"
)

Finding = tuple[str, str, str]  # a line of IR, a rule and what it says


def read_early(
    ir: str, own_headers: tuple[str, ...], allow: frozenset[str], checks: bool = False
) -> str:
    """The IR to optimise, with ``checks`` of divisors. Raises SourceError for what Metal does not
    have."""
    lines = ir.split("\n")
    found = [f for f in _expressions(lines) if f[1] not in allow]
    if found:
        _refuse(lines, found, own_headers)
    _poison(lines)
    if checks:
        lines = _check_divisors(lines)
    return _PROMISE.sub("", _MASK.sub(r"= zext \1", "\n".join(lines)))


def _poison(lines: list[str]) -> None:
    """All ones in every variable without a value: NaN in every format of float, whatever the type
    of the variable that carries it."""
    kinds = [line.split(" ")[0] for line in lines if line.endswith('!{!"auto-init"}')]
    marks = tuple(f"!annotation {kind}" for kind in kinds)
    for i, line in enumerate(lines):
        if line.endswith(marks):
            copied = _PATTERN_COPY.sub(r"@llvm.memset.p0.\1(\2, i8 -1, \3)", line)
            lines[i] = _PATTERN.sub("-1", copied)
    if not any("declare void @llvm.memset.p0.i64(" in line for line in lines):
        lines.append("declare void @llvm.memset.p0.i64(ptr, i8, i64, i1 immarg)")


def _check_divisors(lines: list[str]) -> list[str]:
    """A call of the runtime before every division whose divisor is not written as a number."""
    out: list[str] = []
    for line in lines:
        found = _DIVISION.match(line)
        if found and _may_be_zero(found.group(5)):
            out += _division_calls(found, len(out))
        out.append(line)
    out.append("declare void @umfa_check_division(i64, i64, i32) nomerge nounwind")
    return out


def _may_be_zero(divisor: str) -> bool:
    numbers = re.findall(r"(?<![\w.])-?\d+(?!\w| x )", divisor)
    return "%" in divisor or "undef" in divisor or not numbers or "0" in numbers or "-1" in numbers


def _division_calls(found: re.Match[str], serial: int) -> list[str]:
    sign, lanes, bits, *operands, debug = found.groups()
    calls = []
    for lane in range(int(lanes or 1)):
        values = []
        for which, operand in enumerate(operands):
            name, value = f"%umfa.division.{serial}.{lane}.{which}", operand
            if lanes:
                element = f"extractelement <{lanes} x i{bits}> {value}, i64 {lane}"
                calls.append(f"  {name}.lane = {element}, {debug}")
                value = f"{name}.lane"
            if bits != "64":
                wide = "sext" if sign == "s" else "zext"
                calls.append(f"  {name} = {wide} i{bits} {value} to i64, {debug}")
                value = name
            values.append(f"i64 {value}")
        width = bits if sign == "s" else "0"
        calls.append(f"  call void @umfa_check_division({', '.join(values)}, i32 {width}), {debug}")
    return calls


def _expressions(lines: list[str]) -> Iterator[Finding]:
    for line in lines:
        if not line.startswith("  "):
            continue
        if _CHOICE.search(line):
            yield (
                line,
                "vector-condition",
                "the condition of ?: is one bool, not a vector of them: use select()",
            )
        elif cast := _CAST.search(line):
            a, b = (_SPACES[x or ""] for x in cast.groups())
            yield line, "address-space-cast", f"a pointer to {a} memory is cast to {b} memory"
        elif (call := _CALL.search(line)) and call.group(1) is None:
            yield line, "function-pointer", "a function is called through a pointer"


def _refuse(lines: list[str], found: list[Finding], own_headers: tuple[str, ...]) -> None:
    sites = Sites(lines, own_headers)
    messages: dict[str, str] = {}
    for line, rule, message in found:
        debug = _DEBUG.search(line)
        file, number = sites.table[sites.number(int(debug.group(1)))] if debug else ("", 0)
        if file and not file.startswith("<launcher"):
            messages[f"{file}:{number}: error: {message} [{rule}]"] = rule
    if messages:
        raise SourceError("\n".join(messages), tuple(messages.values()))
