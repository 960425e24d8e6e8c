"""Random arguments for the C interface; see fuzz.py."""

from __future__ import annotations

import ctypes
import functools
import re
from pathlib import Path
from typing import Any

import numpy as np

import umfa
from tests.capsules import _DLTensor

Rng = np.random.Generator
BYTES = 1 << 16  # memory of a tensor, which starts in the middle
OK, INTERNAL, OUT_OF_MEMORY, DEVICE = 0, 5, 4, 6
INTEGERS = [-(2**63), -(2**31), -2, -1, 0, 1, 2, 3, 7, 100, 2**31 - 1, 2**31, 2**63 - 1]
REALS = [0.0, -0.0, 0.5, 1.0, -1.0, 3.0, 1e300, -1e300, float("nan"), float("inf"), 1e-300]
TYPES: dict[str, Any] = {
    "size_t": ctypes.c_size_t,
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "uint64_t": ctypes.c_uint64,
    "double": ctypes.c_double,
    "const DLTensor*": ctypes.POINTER(_DLTensor),
    "const char*": ctypes.c_char_p,
}
FORMATS = [
    b"", b"int8", b"int8 row none float32 0 0 8", b"int4 block none float16 1 32 8",
    b"int8 row zero_point float32 0 0 -1", b"int8 row none float32 0 0 99999999999999999999",
    b"mxfp4 block none float8_e8m0fnu 1 32 8", b"\xc1\xff\n", b"x" * 5000,
]  # fmt: skip
FLOATS = [(2, 32), (2, 16), (4, 16)]
WHOLE = [(0, 32), (0, 64)]
OTHERS = [(2, 64), (1, 8), (6, 8), (0, 8), (5, 64), (2, 0), (255, 255)]


@functools.cache
def options_type() -> type[ctypes.Structure]:
    """umfa_attention_options, as the header declares it."""
    text = (Path(umfa.get_include()) / "umfa" / "umfa.h").read_text()
    found = re.search(r"struct umfa_attention_options \{(.+?)\n\}", text, re.DOTALL)
    assert found is not None
    body = re.sub(r"/\*.*?\*/", "", found[1], flags=re.DOTALL)
    fields = []
    declared = re.findall(
        r"(size_t|u?int\d+_t|double|const DLTensor\*|const char\*) ([\w, ]+);", body
    )
    assert len(declared) == body.count(";")  # or later fields would lie elsewhere
    for type_, names in declared:
        fields += [(name.strip(), TYPES[type_]) for name in names.split(",")]
    # `beyond` is a field of a newer header: this library must not read it.
    return type("Options", (ctypes.Structure,), {"_fields_": [*fields, ("beyond", ctypes.c_int64)]})


@functools.cache
def library() -> ctypes.CDLL:
    found = ctypes.CDLL(umfa.get_library())
    found.umfa_last_error.restype = ctypes.c_char_p
    return found


class Tensor:
    """A DLTensor that stays inside its own memory, whatever its fields say."""

    def __init__(self, rng: Rng, shape: list[int], kinds: list[tuple[int, int]]) -> None:
        self.memory = np.zeros(BYTES, np.uint8)
        code, bits = kinds[rng.integers(len(kinds))]
        if (code, bits) in WHOLE:
            numbers = self.memory.view(f"i{bits // 8}")
            numbers[:] = rng.integers(-1, 9, numbers.size) * rng.choice([1, 1, 1, 2**20])
        else:
            self.memory[:] = rng.integers(0, 255, BYTES)
        steps = [int(np.prod([max(n, 1) for n in shape[i + 1 :]])) for i in range(len(shape))]
        if rng.random() < 0.2 and shape:
            steps[rng.integers(len(shape))] = int(rng.integers(-3, 4))
        lanes, ndim = 1, len(shape)
        if rng.random() < 0.1:
            lanes, ndim = int(rng.choice([0, 1, 2])), int(rng.choice([-1, 0, ndim, 33]))
        self._shape = (ctypes.c_int64 * 64)(*shape, *[1] * (64 - len(shape)))
        self._steps = (ctypes.c_int64 * 64)(*steps, *[1] * (64 - len(shape)))
        self.tensor = _DLTensor(
            data=self.memory.ctypes.data + BYTES // 2 if rng.random() < 0.98 else None,
            device_type=int(rng.choice([1] * 30 + [0, 2, 8, -1])),
            device_id=0,
            ndim=ndim,
            code=code,
            bits=bits,
            lanes=lanes,
            shape=self._shape,
            strides=self._steps if rng.random() < 0.7 else None,
            byte_offset=0 if rng.random() < 0.9 else int(rng.choice([1, 2, 4, 64])),
        )

    def __str__(self) -> str:
        t = self.tensor
        shape, steps = (
            [x[i] for i in range(min(max(t.ndim, 0), 8))] for x in (t.shape, self._steps)
        )
        return f"(code {t.code}, {t.bits} bits, {shape}, strides {steps})"


def tensor_like(rng: Rng, shape: list[int], kinds: list[tuple[int, int]]) -> Tensor | None:
    """Usually the requested tensor, sometimes another."""
    if rng.random() < 0.02:
        return None
    shape = list(shape)
    if rng.random() < 0.1 and shape:
        shape[rng.integers(len(shape))] = int(rng.choice([-1, 0, 1, 2, 3, 5, 16, -(2**40)]))
    if rng.random() < 0.05:
        shape = [int(n) for n in rng.integers(0, 5, rng.integers(0, 6))]
    return Tensor(rng, shape, [*kinds, *OTHERS] if rng.random() < 0.1 else kinds)


def options_of(rng: Rng, keep: list[Tensor | None], shapes: dict[str, list[int]]) -> Any:
    """Options with a few fields of any value."""
    kind = options_type()
    options = kind(window_size_left=-1, window_size_right=-1, max_seqlen_q=-1, max_seqlen_k=-1)
    options.rotary_interleaved = 1
    sizes = [8, 0, 16, ctypes.sizeof(kind)]
    size = ctypes.sizeof(kind) - 8
    options.struct_size = size if rng.random() < 0.9 else int(rng.choice(sizes))
    fields = [f for f in kind._fields_ if f[0] not in ("struct_size", "beyond")]
    for _ in range(int(rng.integers(0, 5))):
        name, type_ = fields[rng.integers(len(fields))]
        if type_ is TYPES["const DLTensor*"]:
            whole = any(x in name for x in ("seq", "idx", "pad", "table", "lens"))
            made = tensor_like(rng, shapes.get(name, [2]), WHOLE if whole else FLOATS)
            keep.append(made)
            if made is not None:
                setattr(options, name, ctypes.pointer(made.tensor))
        elif type_ is ctypes.c_char_p:
            setattr(options, name, FORMATS[rng.integers(len(FORMATS))])
        elif type_ is ctypes.c_double:
            setattr(options, name, REALS[rng.integers(len(REALS))])
        elif type_ is ctypes.c_int32:
            setattr(options, name, int(rng.choice([-1, 0, 1, 2, 77])))
        else:
            setattr(options, name, INTEGERS[rng.integers(len(INTEGERS))] % 2**64)
    return options


def try_c(rng: Rng) -> str:
    """What is wrong with the answer to a call; "" if nothing is."""
    batch, heads, rows, keys, width = 2, 2, int(rng.integers(1, 12)), int(rng.integers(1, 40)), 8
    kinds = [FLOATS[rng.integers(3)]]
    q, k = [batch, rows, heads, width], [batch, keys, heads, width]
    if rng.random() < 0.2:
        q, k = [rows, heads, width], [keys, heads, width]
    shapes = {
        "alibi_slopes": [heads], "attn_mask": [rows, keys], "learnable_sink": [heads], "qv": q,
        "cu_seqlens_q": [3], "cu_seqlens_k": [3], "block_table": [2, 3], "new_key": [2, 1, 2, 8],
        "new_value": [2, 1, 2, 8], "rotary_cos": [60, 4], "rotary_sin": [60, 4],
    }  # fmt: skip
    keep: list[Tensor | None] = []
    options = options_of(rng, keep, shapes)
    lse = [batch, heads, rows]
    name, wanted = [
        ("forward", [(q, kinds), (k, kinds), (k, kinds), (q, kinds), (lse, FLOATS[:1])]),
        ("can_run", [(q, kinds), (k, kinds), (k, kinds)]),
        ("weights", [(q, kinds), (k, kinds), ([batch, heads, rows, keys], kinds)]),
        ("combine", [([3, *q], kinds), ([3, batch, rows, heads], FLOATS[:1]), (q, FLOATS),
                     ([batch, rows, heads], FLOATS[:1])]),
        ("combine_can_run", [([3, *q], kinds), ([3, batch, rows, heads], FLOATS[:1])]),
        ("combine_warmup", [([3, *q], kinds), ([3, batch, rows, heads], FLOATS[:1]), (q, FLOATS),
                            ([batch, rows, heads], FLOATS[:1])]),
        ("warmup", [(q, kinds), (k, kinds), (k, kinds), (q, kinds), (lse, FLOATS[:1])]),
        ("forward_encode", [(q, kinds), (k, kinds), (k, kinds), (q, kinds), (lse, FLOATS[:1])]),
    ][rng.integers(8)]  # fmt: skip
    given = [tensor_like(rng, shape, kinds_) for shape, kinds_ in wanted]
    before = [None if x is None else x.memory.tobytes() for x in (*given, *keep)]
    arguments: list[Any] = [None if x is None else ctypes.byref(x.tensor) for x in given]
    if "combine" in name:
        arguments.append(ctypes.c_int32(int(rng.choice([0, 1, 2, -1, 99]))))
    else:
        arguments.append(ctypes.byref(options) if rng.random() < 0.95 else None)
    if name == "forward_encode":
        arguments.insert(0, None)  # no command buffer
    status = getattr(library(), f"umfa_attention_{name}")(*arguments)
    if status == OK:
        return ""
    said = (library().umfa_last_error() or b"").decode()
    fields = {n: getattr(options, n) for n, _ in options_type()._fields_}
    call = f"umfa_attention_{name}({', '.join(map(str, given))}, {fields}) gave {status}: {said}"
    if not said.startswith(f"[umfa_attention_{name}] "):
        return call
    if status in (INTERNAL, OUT_OF_MEMORY, DEVICE):
        return call
    if before != [None if x is None else x.memory.tobytes() for x in (*given, *keep)]:
        return f"{call}, but has written"
    return ""
