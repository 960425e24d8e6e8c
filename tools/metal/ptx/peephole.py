"""Simplifications of warp-wide matrix operations that LLVM cannot know, on the optimised IR's text.

1. Transposing a matrix twice gives it back. A transposed simdgroup_load is a load and a movmatrix
   (umfa_backend.h), and a B operand is a movmatrix of its fragment: where one feeds the other, both
   go. Equal transposes become one.
2. An 8x8 product fills half of mma.m16n8k8. Two with the same B operand fill it.
3. Two products added to one accumulator, one after the other, are one mma.m16n8k16.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

from .shared_loads import DECLARATIONS, THREAD, four_at_a_time, transposed_by_loads

_FUNCTION = re.compile(r"^define .*?^\}$", re.MULTILINE | re.DOTALL)
_VALUE = re.compile(r"%[\w.]+")
_CALL = r"^\s*(%[\w.]+) = (?:tail )?call (?:noundef )?"
_TRANSPOSE = re.compile(
    _CALL + r"i32 asm \"movmatrix\.sync\.aligned\.m8n8\.trans\.b16 \$0, \$1;\", \"=r,r\""
    r"\(i32 (%?[\w.]+)\)"
)
_MMA = re.compile(
    _CALL + r"\{ float, float, float, float \} asm "
    r"\"\{ \.reg \.f32 z; mma\.sync\.aligned\.m16n8k8\.row\.col\.f32\.(b?f16)\.\2\.f32 .*?\""
    r"\(i32 (\S+), i32 0, i32 (\S+), float (\S+), float (\S+)\)(.*)$"
)
_EXTRACT = re.compile(
    r"^\s*(%[\w.]+) = extractvalue \{ float, float, float, float \} (%[\w.]+), (\d)$"
)
_MOVABLE = re.compile(r"^\s*%[\w.]+ = (?:insertelement|extractelement|bitcast|fmul|fadd|select) ")
_DECLARATIONS = [(re.findall(r"@([\w.]+)", x)[0], x) for x in DECLARATIONS.splitlines(True)] + [
    (THREAD, f"declare i32 @{THREAD}()\n")
]
_LABEL = re.compile(r"^[\w.$\"-]+:|^\}")


def improve(ir: str) -> str:
    """The optimised IR of a library with fewer matrix operations."""
    improved = _FUNCTION.sub(lambda m: _in_function(m.group()), ir)
    declared = set(re.findall(r"^declare .*?@([\w.]+)\(", improved, re.MULTILINE))
    wanted = [x for x in _DECLARATIONS if x[0] in improved and x[0] not in declared]
    return improved + "".join(text for _, text in wanted)


def _in_function(text: str) -> str:
    if "movmatrix" not in text and "mma.sync" not in text:
        return text
    lines = _without_double_transposes(_with_names(text.split("\n")))
    lines = _merged(transposed_by_loads(lines, _TRANSPOSE))
    return "\n".join(four_at_a_time(lines))


def _with_names(lines: list[str]) -> list[str]:
    """The function with names for the values and blocks that LLVM numbers in the order of the
    text, which is about to change."""
    numbered = [int(n) for n in re.findall(r"%(\d+)\b", lines[0])]
    entry = [] if _LABEL.match(lines[1]) else [f"{max(numbered, default=-1) + 1}:"]
    lines = [lines[0], *entry, *lines[1:]]
    return [re.sub(r"^(\d+):", r"v\1:", re.sub(r"%(\d+)\b", r"%v\1", line)) for line in lines]


def _uses(lines: list[str]) -> Counter[str]:
    found: Counter[str] = Counter()
    for line in lines:
        values = _VALUE.findall(line)
        found.update(values[1:] if re.match(r"\s*%[\w.]+ =", line) else values)
    return found


def _without_double_transposes(lines: list[str]) -> list[str]:
    same: dict[str, str] = {}  # a transpose, and the value that it equals

    def resolve(name: str) -> str:
        while name in same:
            name = same[name]
        return name

    source: dict[str, str] = {}
    in_block: dict[str, str] = {}  # LLVM does not share what is convergent
    for line in lines:
        if _LABEL.match(line):
            in_block = {}
        if m := _TRANSPOSE.match(line):
            result, operand = m.group(1), resolve(m.group(2))
            if operand in source:
                same[result] = source[operand]
            elif operand in in_block:
                same[result] = in_block[operand]
            else:
                source[result] = operand
                in_block[operand] = result
    if not same:
        return lines
    kept = [x for x in lines if not ((m := _TRANSPOSE.match(x)) and m.group(1) in same)]
    kept = [_VALUE.sub(lambda m: resolve(m.group()), line) for line in kept]
    used = _uses(kept)
    return [x for x in kept if not ((m := _TRANSPOSE.match(x)) and not used[m.group(1)])]


@dataclass
class _Mma:
    """One product: ``a`` and ``c`` per half of rows, ``b`` per step of k."""

    result: str
    type: str
    a: list[list[str]]  # of each step of k: of each half of rows
    b: list[str]
    c: list[str]
    tail: str
    line: int
    block: int
    extracts: dict[str, int] = field(default_factory=dict)  # value: which of the results

    @property
    def halves(self) -> int:
        return len(self.c) // 2

    def render(self) -> list[str]:
        k = 8 * len(self.b)
        a = [x for step in self.a for x in (*step, "0")[:2]]
        numbers = iter(range(4 + len(a) + len(self.b) + len(self.c)))

        def take(n: int) -> str:
            return ", ".join(f"${next(numbers)}" for _ in range(n))

        unset = self.halves == 1  # the other half's sums are not read: leave them to chance
        text = (
            f"mma.sync.aligned.m16n8k{k}.row.col.f32.{self.type}.{self.type}.f32 "
            f"{{{take(4)}}}, {{{take(len(a))}}}, {{{take(len(self.b))}}}, "
            f"{{{take(len(self.c))}{', z, z' if unset else ''}}};"
        )
        if unset:
            text = f"{{ .reg .f32 z; {text} }}"
        constraints = ["=f"] * 4 + ["r"] * (len(a) + len(self.b)) + ["f"] * len(self.c)
        arguments = [f"i32 {x}" for x in [*a, *self.b]] + [f"float {x}" for x in self.c]
        call = (
            f"  {self.result} = tail call {{ float, float, float, float }} asm "
            f'"{text}", "{",".join(constraints)}"({", ".join(arguments)}){self.tail}'
        )
        return [
            call,
            *(
                f"  {value} = extractvalue {{ float, float, float, float }} {self.result}, {i}"
                for value, i in self.extracts.items()
            ),
        ]


def _merged(lines: list[str]) -> list[str]:
    products: dict[str, _Mma] = {}
    block = 0
    skipped = set()
    for i, line in enumerate(lines):
        block += bool(_LABEL.match(line))
        if m := _MMA.match(line):
            name, type_, a, b, c0, c1, tail = m.groups()
            products[name] = _Mma(name, type_, [[a]], [b], [c0, c1], tail, i, block)
            skipped.add(i)
        elif (m := _EXTRACT.match(line)) and m.group(2) in products:
            products[m.group(2)].extracts[m.group(1)] = int(m.group(3))
            skipped.add(i)
    rest = {i: _VALUE.findall(x) for i, x in enumerate(lines) if i not in skipped}
    movable = {i for i in rest if _MOVABLE.match(lines[i])}
    sunk = _fill_rows(products, rest, movable)
    _chain(products, _uses(lines))
    at = {p.line: p for p in products.values()}
    out: list[str] = []
    for i, line in enumerate(lines):
        if i in at:
            out += at[i].render()
            out += [lines[k] for k, to in sorted(sunk.items()) if to == i]
        elif i not in skipped and i not in sunk:
            out.append(line)
    return out


def _fill_rows(
    products: dict[str, _Mma], rest: dict[int, list[str]], movable: set[int]
) -> dict[int, int]:
    """Two products with one B become one, where the second stands. What needs the first before that
    sinks below it, if it can: the line of each, and of the product that it comes after."""
    sunk: dict[int, int] = {}
    open_: dict[tuple[int, str, str], _Mma] = {}
    for second in list(products.values()):
        key = (second.block, second.type, second.b[0])
        first = open_.pop(key, None)
        if first is None:
            open_[key] = second
            continue
        dependent = set(first.extracts)
        sinking = []
        for i in rest:
            if first.line < sunk.get(i, i) < second.line and dependent & set(rest[i]):
                sinking.append(i)
                dependent.add(rest[i][0])
        needed = {
            x
            for p in products.values()
            if first.line < p.line <= second.line
            for x in (*(v for step in p.a for v in step), *p.b, *p.c)
        }
        if needed & dependent or not movable.issuperset(sinking):
            open_[key] = second
            continue
        sunk.update(dict.fromkeys(sinking, second.line))
        second.a = [[first.a[0][0], second.a[0][0]]]
        second.c = [*first.c, *second.c]
        second.extracts = first.extracts | {v: i + 2 for v, i in second.extracts.items()}
        # What had sunk below the first now stands below the second.
        sunk.update({i: second.line for i, to in sunk.items() if to == first.line})
        del products[first.result]
    return sunk


def _chain(products: dict[str, _Mma], uses: Counter[str]) -> None:
    """A product added to nothing but another one's sum takes that one in."""
    maker = {v: p for p in products.values() for v in p.extracts}
    for second in list(products.values()):
        first = maker.get(second.c[0])
        if (
            first is None
            or first.result not in products
            or (first.block, first.type, first.halves) != (second.block, second.type, second.halves)
            or len(first.b) > 1
            or [maker.get(c) for c in second.c] != [first] * len(second.c)
            or [first.extracts[c] for c in second.c] != list(range(len(second.c)))
            or any(uses[v] != 1 for v in first.extracts)
        ):
            continue
        second.a = first.a + second.a
        second.b = first.b + second.b
        second.c = first.c
        del products[first.result]
