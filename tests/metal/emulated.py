"""Plays a LaunchPlan on the emulator: umfa's Metal backend without a Mac, for tests only."""

from __future__ import annotations

import functools
import importlib.util
import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests import reference
from tools.metal.emulator import Counters, Library, Options
from umfa import _ext
from umfa._call.run import Prepared, exported, prepared
from umfa._frameworks import _numpy

SHADERS = Path(__file__).parents[2] / "shaders"


def _load_embed() -> Any:
    spec = importlib.util.spec_from_file_location("embed_shaders", SHADERS / "embed.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


embed = _load_embed()
flattened = functools.cache(embed.flatten)
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass
class Settings:
    """How the emulated GPU behaves."""

    family: int = 7
    cores: int = 8
    schedule_seed: int = 0
    function_constants: bool = True
    """Else kernels are launched as PyTorch and MLX launch them: constants are text, and parameters,
    tables and what a call leaves out are buffers like any other."""
    options: Options = field(default_factory=Options)
    by_tables: bool = False
    """A kernel reads the tables of sequences, in place of the host."""
    tiles: list[str] = field(default_factory=list)
    """Kernels that `python -m umfa tune` might have chosen."""


MACHINES = {
    "permuted lane map": Options(permute_lanes=True),
    "reversed reductions": Options(reverse_reductions=True),
    "flush to zero": Options(flush_to_zero=True),
    "noisy math": Options(math_noise=True),
}
"""What a GPU may do otherwise than this emulator does by default."""

SOME_MACHINES = [
    name if name == "permuted lane map" else pytest.param(name, marks=pytest.mark.slow)
    for name in MACHINES
]
"""For tests of which one other machine is enough in every run: each compiles all kernels anew."""

settings = Settings()
counters: list[Counters] = []
"""Of every dispatch since the last `counting`."""
table_fault = np.zeros(5, np.int64)
"""What the last call's kernel found out of range, with `Settings.by_tables`."""
last_plan: dict[str, Any] = {}
"""The plan that `attention` played last."""


@contextmanager
def counting() -> Iterator[list[Counters]]:
    """Collects the counters of the dispatches inside."""
    counters.clear()
    yield counters


def memory_of(array: Array) -> tuple[Array, int]:
    """The bytes that an array reaches, as (contiguous uint8 array, offset of its first element)."""
    low, high = np.lib.array_utils.byte_bounds(array) if array.size else (0, 0)
    if low == high:
        return np.zeros(16, np.uint8), 0
    # A window onto the same memory, not a copy: what the kernel writes must arrive.
    window = np.asarray(_Memory(low, high - low, array))
    return window, array.__array_interface__["data"][0] - low


def spread_out(shape: tuple[int, ...], strides: tuple[int, ...]) -> Array:
    """A float16 tensor of zeros with these strides in elements, however large; memory that is never
    written takes no space."""
    size = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    no_reserve = 0x4000  # Linux; mmap has no name for it
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    memory = np.frombuffer(mmap.mmap(-1, 2 * size, flags=flags), np.float16)
    return np.lib.stride_tricks.as_strided(memory, shape, [2 * stride for stride in strides])


class _Memory:
    """Someone else's bytes at an address, for numpy; keeps their owner alive."""

    def __init__(self, address: int, size: int, owner: Array) -> None:
        self.owner = owner
        self.__array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, not owner.flags.writeable),
            "version": 3,
        }


def attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    alibi_slopes: Array | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    mask: Array | None = None,
    alignment: reference.Alignment = "lower_right",
) -> tuple[Array, Array]:
    """`umfa.flash_attn_func(..., return_attn_probs=True)` on the emulated GPU: (out, lse).

    mask, alignment: as `reference.attention` takes them.
    """
    return play(
        _ext.Attention(
            FUNCTION,
            query=query,
            key=key,
            value=value,
            alibi_slopes=alibi_slopes,
            attn_mask=mask,
            softmax_scale=softmax_scale,
            causal=causal,
            causal_alignment="top_left" if alignment == "upper_left" else "bottom_right",
            window_size=window_size,
            softcap=softcap,
            backend="metal",
        )
    )


FUNCTION = _ext.Function("umfa.test", query="q", key="k", value="v")


def call(
    query: Array, key: Array, value: Array, options: dict[str, Any] | None = None, **tensors: Any
) -> tuple[Array, Array]:
    """Whatever the core knows, on the emulated GPU: (out, lse).

    `options`, `tensors`: by their names in the record, tables among them.
    """
    return play(
        _ext.Attention(
            FUNCTION,
            query=query,
            key=key,
            value=value,
            backend="metal",
            **(options or {}),
            **tensors,
        )
    )


def exported_of(attention: _ext.Attention) -> tuple[Any, ...]:
    """What `metal_plan_forward` takes of NumPy arrays."""
    return exported(_numpy, prepared(attention.options), attention.tensors)


def play(attention: _ext.Attention) -> tuple[Array, Array]:
    """Runs a call on the emulated GPU: (out, lse)."""
    return compute(_numpy, prepared(attention.options), attention.tensors)


def compute(framework: Any, call: Prepared, tensors: dict[str, Array]) -> tuple[Array, Array]:
    """What `umfa._call.run.compute` does, on the emulated GPU: (out, lse) always."""
    query, value = tensors[call.names[0]], tensors[call.names[2]]
    *batch, rows, heads, _ = query.shape
    # Poisoned, as recycled memory may be: every element must be written.
    dtype = call.options.out_dtype or query.dtype
    # The last word of a format is head_dim, which the bytes do not always tell.
    form = call.options.description["values"].get("value_format")
    channels = int(form.split()[-1]) if form else value.shape[-1]
    out = np.full((*query.shape[:-1], channels), np.nan, dtype)
    lse = np.full((*batch, heads, rows), np.nan, np.float32)
    plan = _ext.metal_plan_forward(
        call.options,
        settings.family,
        settings.cores,
        exported(_numpy, call, tensors),
        _numpy.export(out, "umfa.test", "out"),
        lse,
        settings.tiles,
        settings.by_tables,
    )
    last_plan.clear()
    last_plan.update(plan)
    named = dict(zip(call.options.fields, tensors.values(), strict=True))
    table_fault[:] = 0
    all_tensors = {**named, "out": out, "lse": lse, "table_fault": table_fault}
    pieces = {
        "tensor": [all_tensors[name] for name, _ in plan["tensors"]],
        "scratch": [np.full(size, 0xFF, np.uint8) for size in plan["scratch_bytes"]],  # NaN
        "data": plan["data"],
    }
    for launch in plan["launches"]:
        counters.append(_play(launch, pieces))
    return out, lse


def backward(
    attention: _ext.Attention,
    saved: tuple[Array, Array, Array, Array | None],
    wanted: Sequence[str] = ("dq", "dk", "dv"),
    *,
    float32: bool = False,
    channel_step: int = 1,
) -> dict[str, Array]:
    """`_ext.attention_backward` on the emulated GPU: gradients by their names.

    saved: (out, lse, dout, dlse). channel_step: how many elements lie from one channel of a
    gradient to the next.
    """
    call = prepared(attention.options)
    named = dict(zip(call.options.fields, attention.tensors.values(), strict=True))
    # Poisoned, as recycled memory may be: every element must be written.
    gradients = {}
    for name in wanted:
        of = named[GRADIENT_OF[name]]
        shape = (*of.shape[:-1], of.shape[-1] * channel_step)
        whole = np.full(shape, np.nan, np.float32 if float32 else of.dtype)
        gradients[name] = whole[..., ::channel_step]
    saved_names = ("out", "lse", "dout", "dlse")
    plan = _ext.metal_plan_backward(
        call.options,
        settings.family,
        settings.cores,
        exported(_numpy, call, attention.tensors),
        tuple(
            None if array is None else _numpy.export(array, "umfa.test", name)
            for name, array in zip(saved_names, saved, strict=True)
        ),
        [(name, _numpy.export(array, "umfa.test", name)) for name, array in gradients.items()],
    )
    last_plan.clear()
    last_plan.update(plan)
    all_tensors = {**named, **dict(zip(saved_names, saved, strict=True)), **gradients}
    pieces = {
        "tensor": [all_tensors[name] for name, _ in plan["tensors"]],
        "scratch": [np.full(size, 0xFF, np.uint8) for size in plan["scratch_bytes"]],  # NaN
        "data": plan["data"],
    }
    for launch in plan["launches"]:
        counters.append(_play(launch, pieces))
    return gradients


GRADIENT_OF = {
    "dq": "query", "dk": "key", "dv": "value", "dqv": "qv", "dmask": "attn_mask",
    "dsinks": "learnable_sink", "dalibi_slopes": "alibi_slopes",
}  # fmt: skip


def combine(out_partial: Array, lse_partial: Array, out: Array, lse: Array) -> None:
    """`umfa.flash_attn_combine` on the emulated GPU, into `out` and `lse`."""
    tensors = {"out_partial": out_partial, "lse_partial": lse_partial, "out": out, "lse": lse}
    exported_ = [_numpy.export(array, "umfa.test", name) for name, array in tensors.items()]
    plan = _ext.metal_plan_combine(settings.family, settings.cores, *exported_)
    last_plan.clear()
    last_plan.update(plan)
    pieces = {"tensor": [tensors[name] for name, _ in plan["tensors"]]}
    for launch in plan["launches"]:
        counters.append(_play(launch, pieces))


def quantize(
    x: Array, form: _ext.QuantFormat, out: tuple[Array, Array, Array | None], faults: Array | None
) -> None:
    """`umfa.quantize` on the emulated GPU, into data, scales and zero points."""
    shown = [
        None if array is None else _numpy.export(array, "umfa.test", "out")
        for array in (*out, faults)
    ]
    plan = _ext.metal_plan_quantize(
        settings.family,
        settings.cores,
        _numpy.export(x, "umfa.test", "x"),
        form,
        (shown[0], shown[1], shown[2]),
        shown[3],
    )
    _play_all(plan, dict(zip(("x", "data", "scales", "zero_points", "faults"), (x, *out, faults),
                             strict=True)))  # fmt: skip


def dequantize(
    parts: tuple[Array, Array | None, Array | None],
    form: _ext.QuantFormat,
    channels: int,
    out: Array,
) -> None:
    """`QuantizedTensor.dequantize` on the emulated GPU, into `out`."""
    shown = [
        None if array is None else _numpy.export(array, "umfa.test", "part")
        for array in (*parts, out)
    ]
    plan = _ext.metal_plan_dequantize(
        settings.family, settings.cores, *shown[:3], form, channels, shown[3]
    )
    _play_all(plan, dict(zip(("data", "scales", "offsets", "out"), (*parts, out), strict=True)))


def _play_all(plan: dict[str, Any], tensors: dict[str, Any]) -> None:
    last_plan.clear()
    last_plan.update(plan)
    pieces = {
        "tensor": [tensors[name] for name, _ in plan["tensors"]],
        "scratch": [np.full(size, 0xFF, np.uint8) for size in plan["scratch_bytes"]],  # NaN
    }
    for launch in plan["launches"]:
        counters.append(_play(launch, pieces))


def bound(launch: dict[str, Any], pieces: dict[str, list[Any]]) -> dict[int, tuple[Any, int]]:
    """What a launch finds at each index: memory, and the byte at which it starts.

    `pieces`: what each kind of binding counts in.
    """
    found: dict[int, tuple[Any, int]] = {launch["params_index"]: (launch["params"], 0)}
    for index, kind, piece, byte_offset in launch["buffers"]:
        memory, first = pieces[kind][piece], 0
        if kind == "tensor":
            bits = memory.view(np.uint16) if memory.dtype == ml_dtypes.bfloat16 else memory
            memory, first = memory_of(bits)
        found[index] = memory, first + byte_offset
    return found


def _play(launch: dict[str, Any], pieces: dict[str, list[Any]]) -> Counters:
    # As umfa gives it to Metal, so that both share the cache.
    text = launch["defines"] + flattened(launch["source"])
    buffers = bound(launch, pieces)
    if not settings.function_constants:
        text = launch["constant_defines"] + text
        buffers = {index: _in_memory(*buffers.get(index, (bytes(16), 0)))
                   for index in range(launch["buffer_count"])}  # fmt: skip
    library = Library(
        text,
        constants=launch["constants"] if settings.function_constants else None,
        options=settings.options,
    )
    return library.dispatch(
        launch["kernel"],
        threadgroups=launch["grid"],
        threads=launch["threadgroup"],
        buffers={index: memory for index, (memory, _) in buffers.items()},
        buffer_offsets={index: first for index, (_, first) in buffers.items()},
        schedule_seed=settings.schedule_seed,
    )


def _in_memory(memory: Any, first: int) -> tuple[Array, int]:
    return np.frombuffer(memory, np.uint8).copy() if isinstance(memory, bytes) else memory, first
