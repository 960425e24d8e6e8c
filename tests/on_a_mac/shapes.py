"""Every kernel that the planner can ask for, as launches of its plans."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from tests import quantization
from tests.metal import emulated
from tests.quantization import Format
from umfa import _ext

Array = np.ndarray[Any, np.dtype[Any]]
Play = Callable[[dict[str, Any], dict[str, list[Any]]], None]

DTYPES = {"f16": np.float16, "bf16": ml_dtypes.bfloat16, "f32": np.float32}
# Options and tensors that switch on what costs registers.
VARIANTS = ("plain", "everything")


# Each kind of codes, scales and zero points; blocks of one and of several simdgroups.
FORMATS = (
    Format("int8"),
    Format("int8", "tensor", False),
    Format("int4", "row", True, None, "float16"),
    Format("int4", "channel", False, None, "float16"),
    *(Format(dtype) for dtype in ("float8_e4m3fn", "float8_e5m2", "nf4")),
    *(Format(dtype, "block", True, (1, 32), "float8_e8m0fnu") for dtype in ("mxfp8", "mxfp4")),
)


class Shape(NamedTuple):
    """A kernel with its constants."""

    name: str
    variant: str
    launch: dict[str, Any]

    @property
    def text(self) -> str:
        """What the compiler gets: the macros as lines in front, as src/metal/library.mm does."""
        lines = [f"#define {name} {value}\n" for name, value in self.launch["macros"].items()]
        return "".join(lines) + _ext.shader_text(self.launch["source"])


@contextmanager
def played_by(play: Play) -> Iterator[None]:
    """The launches of the plans that `emulated` makes inside go to `play`."""
    before = emulated._play
    vars(emulated)["_play"] = play
    try:
        yield
    finally:
        vars(emulated)["_play"] = before


def head_dims(
    tables: Sequence[str] = ("forward_shapes.h", "decode_shapes.h"),
) -> list[tuple[int, int]]:
    """Those of the shape tables that a call may have; 640 is 576, padded."""
    dims = set()
    for table in tables:
        text = (emulated.SHADERS / "shared" / table).read_text()
        dims |= {(int(d), int(dv)) for d, dv in re.findall(r"\bX\((\d+), (\d+),", text)}
    return sorted((d, dv) for d, dv in dims if d <= 576)


def alternatives() -> list[tuple[int, str]]:
    """(GPU family, name) of each kernel that tuning may choose, once for each."""
    text = (emulated.SHADERS / "shared" / "forward_shapes.h").read_text()
    found = []
    for table, types in (
        ("16", ("f16", "bf16")),
        ("32", ("f32",)),
        ("WIDENED", ("bf16_as_f32",)),
    ):
        rows = text[text.index(f"#define UMFA_FORWARD_ALTERNATIVES_{table}(X)") :].split("\n\n")[0]
        for row in re.findall(r"\bX\((.*)\)", rows):
            d, dv, bk, qf, _, _, _, fences, first, last = row.split(", ")
            for kind in types:
                family = int(last if kind == "bf16" else first)
                if kind == "bf16" and family < 9:
                    continue  # native from Apple9 on
                found.append((family, f"forward_{kind}_d{d}_v{dv}_k{bk}_q{qf}_f{fences}"))
    return found


def call(
    dtype: Any, dims: tuple[int, int], seqlen_q: int, heads: tuple[int, int], variant: str
) -> None:
    """Plan attention of two sequences, and what goes with it."""
    d, dv = dims
    rows, batch = (1024 if seqlen_q < 8 else 64), 2
    emulated.settings.cores = 1  # gets the tiles of large problems

    def zeros(*shape: int) -> Array:
        return np.zeros(shape, dtype)

    query, key = zeros(batch, seqlen_q, heads[0], d), zeros(batch, rows, heads[1], d)
    value = zeros(batch, rows, heads[1], dv)
    options: dict[str, Any] = {"num_splits": 2} if seqlen_q < 8 else {}
    tensors: dict[str, Any] = {}
    if variant == "everything":
        options |= {"causal": True, "softcap": 30.0, "rotary_interleaved": False}
        tensors["attn_mask"] = zeros(1, 1, seqlen_q, rows)
        tensors["learnable_sink"] = zeros(heads[0])
        table = np.zeros((rows + 64, d // 2), np.float32)
        tensors |= {"rotary_cos": table, "rotary_sin": table}
        tensors |= {"new_key": zeros(batch, 3, heads[1], d)}
        tensors |= {"new_value": zeros(batch, 3, heads[1], dv)}
        tensors["seqused_k"] = np.array([rows - 8, rows // 2], np.int32)
    emulated.call(query, key, value, options, **tensors)


def call_backward(dtype: Any, dims: tuple[int, int], variant: str) -> None:
    """Plan the gradients of a call."""
    d, dv = dims
    out = np.zeros((2, 40, 2, dv), dtype)
    options: dict[str, Any] = {}
    wanted: tuple[str, ...] = ("dq", "dk", "dv")
    if variant == "everything":
        options |= {"causal": True, "softcap": 30.0, "dropout_p": 0.5}
        options["attn_mask"] = np.zeros((1, 1, 40, 64), dtype)
        options["seqused_k"] = np.array([56, 48], np.int32)
        options["learnable_sink"] = np.zeros(2, dtype)
        options["alibi_slopes"] = np.zeros(2, np.float32)
        options["rotary_cos"] = options["rotary_sin"] = np.zeros((64, d // 2), np.float32)
        options["qv"] = np.zeros((2, 40, 2, dv), dtype)
        wanted += ("dsinks", "dalibi_slopes", "dmask", "dqv")
    attention = _ext.Attention(
        emulated.FUNCTION,
        query=np.zeros((2, 40, 2, d), dtype),
        key=np.zeros((2, 64, 2, d), dtype),
        value=np.zeros((2, 64, 2, dv), dtype),
        backend="metal",
        **options,
    )
    lse = np.zeros((2, 2, 40), np.float32)
    emulated.backward(attention, (out, lse, out.copy(), None), wanted)


def call_clear(dtype: Any) -> None:
    """Plan sequences with rows that nobody uses."""
    query, key = np.ones((2, 40, 2, 32), dtype), np.ones((2, 40, 2, 32), dtype)
    emulated.call(query, key, key, {}, seqused_q=np.array([7, 40], np.int32))


def call_combine(of: Any, to: Any) -> None:
    """Plan the merge of two partial results of a row."""
    lse = np.zeros((2, 1, 1, 1), np.float32)
    emulated.combine(
        np.zeros((2, 1, 1, 1, 32), of), lse, np.zeros((1, 1, 1, 32), to), lse[0].copy()
    )


def call_quantize(dtype: Any, form: Format) -> None:
    """Plan quantising a tensor, and the way back."""
    x = np.zeros((1, 2, 300, 64), dtype)
    like, ext_format = quantization.quantize(x, form), quantization.ext_format(form)
    emulated.quantize(x, ext_format, like[1:], np.zeros(like.scales.size, np.uint8))
    emulated.dequantize(like[1:], ext_format, 64, x)


def call_codes(dtype: Any, form: Format) -> None:
    """Plan attention on keys and values in a format, of many queries and of one."""
    x = np.zeros((2, 300, 2, 64), np.float32)
    like = quantization.quantize(x.swapaxes(1, 2), form)
    parts = [None if x is None else np.ascontiguousarray(x.swapaxes(1, 2)) for x in like[1:]]
    text = quantization.ext_format(form, "bshd").text(64)
    tensors: dict[str, Any] = {}
    for name in ("key", "value"):
        tensors |= {f"{name}_scales": parts[1], f"{name}_format": text}
        if parts[2] is not None:
            tensors[f"{name}_offsets"] = parts[2]
    for seqlen_q, heads in ((40, 4), (1, 4), (1, 2)):
        emulated.call(np.zeros((2, seqlen_q, heads, 64), dtype), parts[0], parts[0], tensors)


def every_shape() -> list[Shape]:
    """Each kernel once for each variant. Raises if the planner refuses a call of these."""
    found: dict[str, Shape] = {}
    variant = "plain"

    def note(launch: dict[str, Any], *_: Any) -> None:
        # The planner sees one problem at a time: constants are told apart by the variant.
        found.setdefault(f"{launch['kernel']} {variant}", Shape(launch["kernel"], variant, launch))

    before = emulated.settings
    with played_by(note):
        try:
            for family in (7, 9):
                emulated.settings = emulated.Settings(family=family)
                for dtype in DTYPES.values():
                    variant = "plain"
                    call_clear(dtype)
                    for to in DTYPES.values():
                        call_combine(dtype, to)
                    for form in FORMATS:
                        variant = str(form)
                        call_quantize(dtype, form)
                        call_codes(dtype, form)
                    for dims in head_dims(["backward_shapes.h"]):
                        for variant in VARIANTS:
                            call_backward(dtype, dims, variant)
                    for dims in head_dims():
                        for variant in VARIANTS:
                            call(dtype, dims, 40, (2, 2), variant)
                            call(dtype, dims, 1, (2, 2), variant)
                            call(dtype, dims, 1, (4, 2), variant)
                            call(dtype, dims, 1, (16, 1), variant)
            for family, name in alternatives():
                emulated.settings = emulated.Settings(family=family, tiles=[name])
                _, kind, *_ = name.split("_")
                for variant in VARIANTS:
                    head_dim = int(name.split("_d")[1].split("_")[0])
                    call(DTYPES[kind], (head_dim, head_dim), 40, (2, 2), variant)
        finally:
            emulated.settings = before
    return sorted(found.values(), key=lambda shape: (shape.name, shape.variant))
