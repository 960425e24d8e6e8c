"""What a kernel's loop over keys costs beside its products, counted in LLVM's optimised IR.

    python -m tools.metal.ptx.loops

prints a table of the cases that docs/metal-verification.md shows. Apple's compiler is not LLVM's
NVPTX target, but both start from this IR: neither removes a branch around a load, because a load
that the program does not reach may not be made.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import astuple, dataclass, field, replace

from tools.metal.emulator.instrument import type_size

from .bundle import SHADERS, kernel_text
from .cases import Case
from .planner import plan
from .translate import as_cpp, as_ir

_DEFINE = re.compile(r"^define .*ptx_kernel ")
_POINTER = re.compile(r"ptr addrspace\(1\) [^,%]*(%[\w.$-]+)")
_LABEL = re.compile(r"^([\w.$-]+):")
_ASSIGNED = re.compile(r"^\s+(%[\w.$-]+) = (.*)$")
_TARGET = re.compile(r"label %([\w.$-]+)")
_NAME = re.compile(r"%[\w.$-]+")
_PRODUCT = re.compile(r"mma\.sync")
_LOAD = re.compile(r"load .*?, ptr addrspace\(1\) (%[\w.$-]+)")
_LOADED = re.compile(r"load (.*?), ptr ")
_WIDE = re.compile(r"mul (?:n[us]w )*i64 ([^,]+), (\S+)")
_DIVISION = re.compile(r"= [us](?:div|rem) ")
_WIDENED = re.compile(r"[sz]ext (?:nneg )?i32 |ashr exact i64 \S+ 32$")


@dataclass(frozen=True)
class LoopCounts:
    """Of one pass through the code of a loop: what stands there, on whichever path.

    ``loaded``: bytes of tensors in device memory that a thread loads. ``conditional``: those of
    them that some threads load and others do not. ``late``: those that are loaded behind the first
    matrix product, which then wait for memory while nothing else is left to do. ``products``: of
    64 bits, not by a constant.
    """

    loaded: int
    conditional: int
    late: int
    products: int
    divisions: int


@dataclass
class _Function:
    """A kernel's control flow, and where its values come from."""

    pointers: list[str]
    blocks: dict[str, list[str]] = field(default_factory=dict)
    values: dict[str, str] = field(default_factory=dict)

    def successors(self, block: str) -> list[str]:
        return _TARGET.findall(self.blocks[block][-1])


def _read(text: str) -> Iterator[_Function]:
    found: _Function | None = None
    block = ""
    lines = iter(text.split("\n"))
    for line in lines:
        if _DEFINE.match(line):
            found, block = _Function(_POINTER.findall(line)), "entry"
            found.blocks[block] = []
        elif found is None:
            continue
        elif line == "}":
            yield found
            found = None
        elif match := _LABEL.match(line):
            block = match.group(1)
            if list(found.blocks) == ["entry"] and not found.blocks["entry"]:
                found.blocks.clear()
            found.blocks[block] = []
        elif line.strip():
            if line.endswith("["):  # a switch, whose cases follow
                while not line.endswith("]"):
                    line += next(lines)
            found.blocks[block].append(line)
            if match := _ASSIGNED.match(line):
                found.values[match.group(1)] = match.group(2)


def _dominators(nodes: list[str], entry: str, before: dict[str, set[str]]) -> dict[str, set[str]]:
    """The nodes that each path from the entry to a node passes."""
    found = {n: set(nodes) for n in nodes} | {entry: {entry}}
    changed = True
    while changed:
        changed = False
        for n in nodes:
            if n == entry:
                continue
            sets = [found[p] for p in before[n]]
            new = {n} | (set.intersection(*sets) if sets else set())
            if new != found[n]:
                found[n], changed = new, True
    return found


def _reversed(edges: dict[str, set[str]]) -> dict[str, set[str]]:
    return {n: {m for m in edges if n in edges[m]} for n in edges}


def _loops(function: _Function) -> list[tuple[str, set[str]]]:
    """Header and blocks of each natural loop, those with one header as one."""
    blocks = list(function.blocks)
    after = {b: set(function.successors(b)) for b in blocks}
    before = _reversed(after)
    dominators = _dominators(blocks, blocks[0], before)
    found: dict[str, set[str]] = {}
    for b in blocks:
        for header in after[b] & dominators[b]:
            members, work = found.setdefault(header, {header}), [b]
            while work:
                if (n := work.pop()) not in members:
                    members.add(n)
                    work.extend(before[n])
    return list(found.items())


def _divergent(function: _Function) -> set[str]:
    """Values that may differ between the threads of a threadgroup."""
    users: dict[str, list[str]] = {}
    work = []
    for name, text in function.values.items():
        for used in _NAME.findall(text):
            users.setdefault(used, []).append(name)
        if "sreg.tid" in text or "sreg.laneid" in text or "asm" in text or "ldmatrix" in text:
            work.append(name)
    found: set[str] = set()
    while work:
        if (name := work.pop()) not in found:
            found.add(name)
            # A vote, or a value that all lanes of a warp exchanged, is the same for them.
            work += [u for u in users.get(name, []) if "vote" not in function.values[u]]
    return found


def _buffer(function: _Function, load: str) -> str | None:
    """The kernel's argument that a load's address comes from."""
    match = _LOAD.search(load)
    work, seen = [match.group(1)] if match else [], set[str]()
    while work:
        name = work.pop()
        if name in function.pointers:
            return name
        text = function.values.get(name, "")
        if name not in seen and re.match(r"getelementptr|phi|select|bitcast|freeze", text):
            seen.add(name)
            work += [n for n in _NAME.findall(text) if n != name]
    return None


def _last(function: _Function) -> str:
    """The argument that holds the parameters."""
    return function.pointers[-1]


def _is_product(function: _Function, text: str) -> bool:
    match = _WIDE.search(text)
    if not match:
        return False
    operands = [match.group(1), match.group(2)]
    for operand in operands:
        if re.fullmatch(r"-?\d+", operand):
            return False
    return not all(_WIDENED.match(function.values.get(o, "")) for o in operands)


def _count(function: _Function, header: str, members: set[str]) -> LoopCounts:
    inner = list(members)
    after = {b: {s for s in function.successors(b) if s in members} for b in inner}
    # Which blocks each path through the loop passes, seen from its end: the way back is the exit.
    exits = {b: {"end" if s == header or s not in members else s
                 for s in function.successors(b)} for b in inner} | {"end": set[str]()}  # fmt: skip
    nodes = ["end", *inner]
    post = _dominators(nodes, "end", {n: exits[n] for n in nodes})
    divergent = _divergent(function)
    loaded = conditional = late = products = divisions = 0
    multiplies = False
    for b in function.blocks:
        if b not in members:
            continue
        decides = False
        for branch in inner:
            condition = _NAME.findall(function.blocks[branch][-1].split("label")[0])
            if not (condition and condition[0] in divergent):
                continue
            if not members.issuperset(function.successors(branch)):
                continue  # the end of the loop
            on_way = [s for s in after[branch] if b in post[s]]
            decides = decides or (bool(on_way) and b not in post[branch] - {branch})
        for line in function.blocks[b]:
            if _LOAD.search(line) and _buffer(function, line) not in (None, _last(function)):
                size = type_size(_LOADED.findall(line)[0], {})
                loaded += size
                conditional += size * decides
                late += size * multiplies
            multiplies = multiplies or bool(_PRODUCT.search(line))
            products += _is_product(function, line)
            divisions += bool(_DIVISION.search(line))
    return LoopCounts(loaded, conditional, late, products, divisions)


def tile_loop_of_case(case: Case) -> LoopCounts:
    """Of the kernel that attends."""
    launch = next(
        x for x in plan(case)["launches"] if x["kernel"].startswith(("forward_", "decode_"))
    )
    code, _, threads = as_cpp(
        kernel_text(launch, SHADERS), [SHADERS], None, launch["constants"], launch["threadgroup"]
    )
    return tile_loop_of(as_ir(code, threads))


def tile_loop_of(ir: str) -> LoopCounts:
    """Of the innermost loop with matrix products; the first, if there are several."""
    (function,) = _read(ir)
    loops = [
        (header, members)
        for header, members in _loops(function)
        if any(_PRODUCT.search(line) for b in members for line in function.blocks[b])
    ]
    inner = [x for x in loops if not any(y[1] < x[1] for y in loops)]
    return _count(function, *min(inner, key=lambda x: list(function.blocks).index(x[0])))


_COMMON = Case(heads=2, seqlen_q=512, head_dim=128, lse=False)
_PACKED = {"seqlens_q": (200, 100), "seqlens_k": (200, 100)}
_FEW = Case(heads=32, heads_k=8, seqlen_q=1, seqlen_k=4096, head_dim=128, lse=False)
CASES = {
    "forward, D = 64": Case(heads=2, seqlen_q=512, lse=False),
    "forward, D = 128": _COMMON,
    **{
        f"forward, D = 128, a {dtype} mask": replace(
            _COMMON, mask=dtype, mask_varies=(False, False, True, True)
        )
        for dtype in ("bool", "float16", "float32")
    },
    "forward, D = 72": Case(heads=2, seqlen_q=512, head_dim=72, lse=False),
    "forward, D = 128, packed sequences": Case(heads=2, head_dim=128, lse=False, **_PACKED),
    "forward, D = 128, pages of 16": Case(
        heads=2, head_dim=128, lse=False, page_size=16, **_PACKED
    ),
    "forward, D = 128, int8 by row": replace(
        _COMMON, key_codes="int8_row", value_codes="int8_row"
    ),
    "forward, D = 128, int4 by 32 channels": replace(
        _COMMON, key_codes="int4_32", value_codes="int4_32"
    ),
    "decode, D = 128": _FEW,
    "decode, D = 128, int8 by row": replace(_FEW, key_codes="int8_row", value_codes="int8_row"),
    "decode, D = 128, int4 by 32 channels": replace(
        _FEW, key_codes="int4_32", value_codes="int4_32"
    ),
    "decode, D = 128, pages of 16": Case(
        heads=32, heads_k=8, head_dim=128, lse=False, page_size=16,
        seqlens_q=(1, 1), seqlens_k=(4096, 4000),
    ),
}  # fmt: skip


def main() -> None:
    print("| kernel | bytes loaded | of these conditional | late | 64-bit products | divisions |")
    print("|---|---|---|---|---|---|")
    for name, case in CASES.items():
        c = tile_loop_of_case(case)
        print(f"| {name} | {' | '.join(map(str, astuple(c)))} |")


if __name__ == "__main__":
    main()
