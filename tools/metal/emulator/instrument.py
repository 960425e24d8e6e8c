"""Adds the checks and counts to a kernel's LLVM IR, which is text.

Before every access to device, constant or threadgroup memory goes a call of the runtime; at the end
of every basic block its sums of operations and bytes; before every simdgroup operation and barrier
the place in the source, by which the runtime tells one from another. Threadgroup variables get a
margin on both sides, so that running off one does not land in the next.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .rewrite import STORAGE
from .sites import Sites

_READ, _WRITE, _ATOMIC = 1 << 12, 1 << 13, 1 << 14
_MARGIN = 64
_FUNCTION = re.compile(r"^define .*?@([\w$.]+|\"[^\"]+\")\(")
_ATTRIBUTES = re.compile(r"^define .*\) .*?#(\d+)", re.MULTILINE)
_BACKEND = re.compile(r"_ZNK?12umfa_backend")  # of its namespace; others may take its types
_EFFECTS = re.compile(r" memory\([^)]*\)")
_DEBUG = re.compile(r", !dbg !(\d+)")
_ACCESS = re.compile(
    r"^\s*(?:%[\w.\"$]+ = )?(?:(?:tail|musttail|notail) )?"
    r"(load|store|atomicrmw|cmpxchg|call void @llvm\.mem(?:cpy|move|set)[\w.]*)(?![\w.])(.*)$"
)
_ALIGN = re.compile(r"\balign (\d+)")
_SITED = re.compile(
    r"call .*@(umfa_rendezvous|umfa_converge|umfa_matrix_multiply|umfa_threadgroup_barrier"
    r"|umfa_simdgroup_barrier|umfa_check_max_threads|umfa_check_uniform|umfa_past_edge"
    r"|umfa_check_division)\("
)
_MEETING = re.compile(r"@umfa_(?:rendezvous|matrix_multiply|\w+group_barrier)\(")
_SAFE_DIVISOR = re.compile(r"call void @umfa_check_division\(i64 [^,]+, i64 (?!0,|-1,)-?\d+,")
_LABEL = re.compile(r'^([\w.$-]+|"[^"]+"):')
_TARGET = re.compile(r'label %([\w.$-]+|"[^"]+")')
_COMPARED = re.compile(
    r"^(  %\S+ = icmp (?:samesign )?\w+) ptr addrspace\(([12])\) ([^,]+), ([^,]+)(.*)$"
)
_ADDRESS = re.compile(r"^  (%\S+) = ptrtoint ptr addrspace\(([12])\) ([^,]+) to i64")
_DIFFERENCE = re.compile(r"^(  %\S+ = sub (?:n[us]w )*i64) (%[^,]+), (%[^,]+)(.*)$")
_FLOP = re.compile(r"= (?:f(?:add|sub|mul|div|rem)) (?:[a-z]+ )*(<(\d+) x )?(?:float|half|bfloat)")
_FMA = re.compile(r"@llvm\.(?:fma|fmuladd)\.(?:v(\d+))?")
_TERMINATOR = re.compile(r"^\s*(?:br|ret|switch|unreachable|indirectbr)\b")
_VARIABLE = re.compile(
    r"^@(\S+) = (?:[\w()]+ )*?addrspace\(3\) global (.*?)(?:, comdat(?:\([^)]*\))?)?"
    r"(?:, align (\d+))?(?:, !\S+ !\d+)*$"
)
_UNSET = re.compile(
    r"^@(\S+) = external (?:[\w()]+ )*?addrspace\(2\) (?:global|constant) (.*?)(?:, align \d+)?$"
)
_ENTRY_CALL = re.compile(r"call .*?void @(\S+?)\(")

# Fields of umfa_static_counters, in order.
COUNTS = (
    "flops",
    "fma",
    "device_read",
    "device_written",
    "constant_read",
    "threadgroup_read",
    "threadgroup_written",
)


@dataclass
class Variable:
    symbol: str
    name: str
    size: int


@dataclass
class Instrumented:
    text: str
    sites: list[tuple[str, int]] = field(default_factory=lambda: [("", 0)])
    # Of each entry function, its kernel's threadgroup variables; symbols are in the text's table.
    variables: dict[int, list[Variable]] = field(default_factory=dict)
    unset: list[str] = field(default_factory=list)


Types = dict[str, str]  # named structs of a module
_NAMED_TYPE = re.compile(r"^(%\S+|%\"[^\"]+\") = type (.*)$")


def type_size(text: str, named: Types) -> int:
    """Bytes that a value of an IR type occupies when stored. Structs are laid out with padding."""
    return _layout(text.strip(), named)[0]


def _layout(t: str, named: Types) -> tuple[int, int]:
    if t in named:
        return _layout(named[t], named)
    simple = {"half": 2, "bfloat": 2, "float": 4, "double": 8, "ptr": 8}
    if t in simple:
        return simple[t], simple[t]
    if t.startswith("ptr"):
        return 8, 8
    if re.fullmatch(r"i\d+", t):
        size = (int(t[1:]) + 7) // 8
        return size, min(1 << (size - 1).bit_length(), 16)
    found = re.fullmatch(r"[<\[](\d+) x (.*)[>\]]", t)
    if found:
        n = int(found.group(1))
        if t[0] == "<":
            if found.group(2) == "i1":
                return (n + 7) // 8, 1
            size = n * _layout(found.group(2), named)[0]
            return size, 1 << (size - 1).bit_length()
        size, alignment = _layout(found.group(2), named)
        return n * _round_up(size, alignment), alignment
    if t.startswith(("{", "<{")):
        packed = t.startswith("<{")
        at, most = 0, 1
        for part in _parts(t.strip("<{}> ") if not packed else t[2:-2].strip()):
            size, alignment = _layout(part, named)
            alignment = 1 if packed else alignment
            size = _round_up(size, alignment)
            at = _round_up(at, alignment) + size
            most = max(most, alignment)
        return _round_up(at, most), most
    raise ValueError(f"unknown IR type {t!r}")


def _round_up(n: int, to: int) -> int:
    return (n + to - 1) // to * to


def _parts(text: str) -> list[str]:
    """Splits at commas outside of all brackets."""
    parts, depth, start = [], 0, 0
    quoted = False
    for i, c in enumerate(text):
        if c == '"':
            quoted = not quoted
        elif quoted:
            continue
        elif c in "([{<":
            depth += 1
        elif c in ")]}>":
            depth -= 1
        elif c == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    parts.append(text[start:].strip())
    return parts


def instrument(text: str, own_headers: tuple[str, ...], checks: bool) -> Instrumented:
    """The IR with checks (or only counts), and what the runtime must know of it."""
    return _Writer(text, own_headers, checks).write()


class _Writer:
    """Goes through a module line by line, and writes what goes between."""

    def __init__(self, text: str, own_headers: tuple[str, ...], checks: bool) -> None:
        self.lines = text.split("\n")
        self.attributes = tuple(f"attributes #{n} =" for n in set(_ATTRIBUTES.findall(text)))
        self.named = {m.group(1): m.group(2) for x in self.lines if (m := _NAMED_TYPE.match(x))}
        self.sites = Sites(self.lines, own_headers)
        self.checks = checks
        self.out: list[str] = []
        self.result = Instrumented("")
        self.variables: list[Variable] = []
        self.kernels: dict[int, str] = {}
        self.counts = dict.fromkeys(COUNTS, 0)
        self.serial = 0
        self.entry: int | None = None
        self.counting = False
        self.function_site = self.last_site = 0
        self.labels: set[str] = set()  # of the blocks of this function so far
        self.stepped = False  # whether this block counts as a step already
        self.addresses: dict[str, tuple[str, str]] = {}

    def write(self) -> Instrumented:
        in_function = False
        for i, line in enumerate(self.lines):
            if in_function and line != "}":
                self._instruction(i, line)
                continue
            found = None if in_function else _FUNCTION.match(line)
            in_function = found is not None
            if found:
                self._start(found.group(1), line)
            elif line.startswith(("@llvm.used", "@llvm.compiler.used")):
                continue  # it has kept the variables through the optimiser, and may go
            elif line.startswith("declare void @umfa_check_division"):
                continue
            elif line.startswith("@"):
                line = _global(line, self.variables, self.result.unset, self.named)
            elif self.attributes and line.startswith(self.attributes):
                # That a function writes no memory ends with the calls of the runtime put in: the
                # code generator drops calls of a function without effects.
                line = _EFFECTS.sub("", line)
            self.out.append(line)
        for n, kernel in self.kernels.items():
            owner = f"_ZZ{kernel[2:]}E"
            self.result.variables[n] = [v for v in self.variables if v.symbol.startswith(owner)]
        self.result.text = "\n".join([*self.out, *_tables(self.result)]) + "\n"
        self.result.sites = self.sites.table
        return self.result

    def _start(self, name: str, line: str) -> None:
        # The back end's combining functions run once for a simdgroup, not on the GPU.
        self.counting = not _BACKEND.match(name)
        self.entry = int(name[11:]) if re.fullmatch(r"umfa_entry_\d+", name) else None
        debug = re.search(r" !dbg !(\d+)", line)
        self.function_site = self.sites.of_function(int(debug.group(1))) if debug else 0
        self.last_site = self.function_site
        self.labels = set()
        self.stepped = False
        self.addresses = {}

    def _instruction(self, i: int, line: str) -> None:
        if label := _LABEL.match(line):
            self.labels.add(label.group(1))
            self.stepped = False
        if _SAFE_DIVISOR.search(line):
            return
        debug = _DEBUG.search(line)
        site = self.sites.number(int(debug.group(1))) if debug else 0
        if self.sites.is_known(site):
            self.last_site = site
        else:
            site = self.function_site
        if "addrspace(" in line:
            self._memory(line)
            line = self._pointers(line)
        elif found := _DIFFERENCE.match(line):
            line = self._difference(found)
        if "umfa_" in line and _SITED.search(line):
            self.stepped = self.stepped or bool(_MEETING.search(line))
            self.out.append(f"  store i32 {site}, ptr @umfa_site, align 4")
        if self.entry is not None and self.entry not in self.kernels:
            called = _ENTRY_CALL.search(line)
            if called and not called.group(1).startswith("umfa_"):
                self.kernels[self.entry] = called.group(1)
        if self.counting:
            self._arithmetic(line)
        if _TERMINATOR.match(line):
            self._step(i)
            self._flush()
        self.out.append(line)

    def _memory(self, line: str) -> None:
        access = _access(line, self.named)
        if access is None:
            return
        space, pointer, size, flags = access
        if self.checks:
            self.stepped = True
            self.out.append(
                f"  call void @umfa_access_{space}(ptr addrspace({space}) {pointer}, "
                f"i32 {size}, i32 {flags}, i32 {self.last_site})"
            )
        if self.counting and size.isdigit():
            for bit, word in ((_READ, "read"), (_WRITE, "written")):
                kind = {1: "device", 2: "constant", 3: "threadgroup"}[space]
                if flags & bit and f"{kind}_{word}" in self.counts:
                    self.counts[f"{kind}_{word}"] += int(size)

    def _pointers(self, line: str) -> str:
        """Pointers compare as the host's: one array at two indices is the same memory."""
        if address := _ADDRESS.match(line):
            self.addresses[address.group(1)] = (address.group(2), address.group(3))
        found = _COMPARED.match(line)
        if not found or "null" in (found.group(3), found.group(4)):
            return line
        start, space, *operands, rest = found.groups()
        a, b = (self._host_address(space, x) for x in operands)
        return f"{start} i64 {a}, {b}{rest}"

    def _difference(self, found: re.Match[str]) -> str:
        start, *operands, rest = found.groups()
        if not all(x in self.addresses for x in operands):
            return found.group(0)
        a, b = (self._host_address(*self.addresses[x]) for x in operands)
        return f"{start} {a}, {b}{rest}"

    def _host_address(self, space: str, pointer: str) -> str:
        name = f"%umfa.{self.serial}"
        self.serial += 1
        self.out.append(
            f"  {name} = call i64 @umfa_host_address_{space}(ptr addrspace({space}) {pointer})"
        )
        return name

    def _arithmetic(self, line: str) -> None:
        flop = _FLOP.search(line)
        if flop:
            self.counts["flops"] += int(flop.group(2) or 1)
        fma = _FMA.search(line)
        if fma:
            self.counts["fma"] += int(fma.group(1) or 1)
            self.counts["flops"] += 2 * int(fma.group(1) or 1)

    def _step(self, i: int) -> None:
        """Every loop jumps back somewhere: a step, if no access in the block is one already."""
        targets = _TARGET.findall(line := self.lines[i])
        if line.endswith("["):  # a switch, whose cases follow
            end = next(
                k for k in range(i, len(self.lines)) if self.lines[k].strip().startswith("]")
            )
            targets += [t for x in self.lines[i + 1 : end] for t in _TARGET.findall(x)]
        if self.checks and self.counting and not self.stepped and self.labels & set(targets):
            self.out.append(f"  call void @umfa_step(i32 {self.last_site})")

    def _flush(self) -> None:
        for i, name in enumerate(COUNTS):
            if self.counts[name]:
                at = f"getelementptr inbounds (i8, ptr @umfa_counts, i64 {8 * i})"
                old, new = f"%umfa.{self.serial}", f"%umfa.{self.serial + 1}"
                self.out.append(f"  {old} = load i64, ptr {at}, align 8")
                self.out.append(f"  {new} = add i64 {old}, {self.counts[name]}")
                self.out.append(f"  store i64 {new}, ptr {at}, align 8")
                self.serial += 2
                self.counts[name] = 0


def _access(line: str, named: Types) -> tuple[int, str, str, int] | None:
    """Space, pointer, bytes and flags of a memory access, or None."""
    found = _ACCESS.match(line)
    if not found:
        return None
    what, rest = found.group(1), found.group(2)
    if what.startswith("call"):
        return _block_access(rest, what)
    atomic = " atomic " in f" {rest}" or what in ("atomicrmw", "cmpxchg")
    words = rest.strip()
    for word in ("atomic", "volatile", "weak"):
        words = re.sub(rf"^{word} ", "", words)
    if what == "atomicrmw":
        words = words.split(" ", 1)[1]
    parts = _parts(words)
    if what == "load":
        value_type, pointer, flags = parts[0], parts[1], _READ
    elif what == "store":
        value_type, pointer, flags = _value_type(parts[0]), parts[1], _WRITE
    else:
        value_type, pointer, flags = _value_type(parts[1]), parts[0], _READ | _WRITE
    space = re.match(r"ptr addrspace\(([123])\) (.*)", pointer)
    if not space:
        return None
    alignment = _ALIGN.search(rest)
    flags |= int(alignment.group(1)) if alignment else 1
    if atomic:
        flags |= _ATOMIC
    operand = re.sub(r" (?:monotonic|acquire|release|acq_rel|seq_cst).*$", "", space.group(2))
    return int(space.group(1)), operand, str(type_size(value_type, named)), flags


def _value_type(operand: str) -> str:
    """The type of ``type value``."""
    if operand[0] in "<[{":
        depth = 0
        for i, c in enumerate(operand):
            depth += (c in "<[{(") - (c in ">]})")
            if depth == 0:
                return operand[: i + 1]
    if operand.startswith('%"'):
        return operand[: operand.index('"', 2) + 1]
    return operand.split(" ", 1)[0]


def _block_access(rest: str, what: str) -> tuple[int, str, str, int] | None:
    """memcpy, memmove, memset: of both sides the one outside of the thread's own memory."""
    arguments = _parts(rest[rest.index("(") + 1 : rest.rindex(")")])
    size = arguments[2].split(" ")[-1]
    for i, flag in ((0, _WRITE), (1, _READ)):
        space = re.match(r"ptr addrspace\(([123])\) (.*)", arguments[i])
        if space:
            words = space.group(2)
            alignment = _ALIGN.search(words)
            pointer = re.sub(
                r"(?:\b(?:noundef|nonnull|writeonly|readonly|captures\(none\)|align \d+"
                r"|dereferenceable(?:_or_null)?\(\d+\)) )+",
                "",
                words,
            )
            flags = flag | (int(alignment.group(1)) if alignment else 1)
            if not size.isdigit():
                return None
            return int(space.group(1)), pointer, size, flags
    return None


def _global(line: str, variables: list[Variable], unset: list[str], named: Types) -> str:
    """Margins around threadgroup variables; storage for function constants without a value."""
    found = _VARIABLE.match(line)
    if found:
        symbol, definition, alignment = found.groups()
        value_type = _value_type(definition)
        align = max(int(alignment or 1), _MARGIN)
        cell = f"{{ [{_MARGIN} x i8], {value_type}, [{_MARGIN} x i8] }}"
        variables.append(Variable(symbol, _local_name(symbol), type_size(value_type, named)))
        return (
            f"@{symbol}.cell = internal addrspace(3) global {cell} zeroinitializer, align {align}\n"
            f"@{symbol} = internal alias {value_type}, getelementptr inbounds ({cell}, "
            f"ptr addrspace(3) @{symbol}.cell, i32 0, i32 1)"
        )
    found = _UNSET.match(line)
    if found:
        unset.append(found.group(1))
        return f"@{found.group(1)} = addrspace(2) global {found.group(2)} zeroinitializer, align 16"
    return line


def _local_name(symbol: str) -> str:
    """The name at the end of a mangled local variable: ...E5tileA and, if repeated, E5tile_0."""
    for found in re.finditer(r"E(\d+)", symbol):
        length = int(found.group(1))
        name = symbol[found.end() : found.end() + length]
        rest = symbol[found.end() + length :]
        name = name.removeprefix(STORAGE)
        if found.end() + length <= len(symbol) and re.fullmatch(r"(_\d+|__\d+_)?", rest):
            return name
    return symbol


def _tables(result: Instrumented) -> list[str]:
    """Addresses that only the linker knows, as arrays that Python reads."""
    out = [
        "@umfa_counts = external global [7 x i64], align 8",
        "@umfa_site = external global i32, align 4",
    ]
    for space in (1, 2, 3):
        out.append(
            f"declare void @umfa_access_{space}(ptr addrspace({space}), i32, i32, i32) nounwind"
        )
        out.append(f"declare i64 @umfa_host_address_{space}(ptr addrspace({space})) nounwind")
    out.append("declare void @umfa_step(i32) nounwind")
    out.append("declare void @umfa_check_division(i64, i64, i32) nounwind")
    for n, found in result.variables.items():
        symbols = ", ".join(f"ptr addrspace(3) @{v.symbol}" for v in found)
        if found:
            out.append(
                f"@umfa_variables_{n} = constant [{len(found)} x ptr addrspace(3)] [{symbols}]"
            )
    return out
