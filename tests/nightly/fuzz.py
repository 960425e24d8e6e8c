"""Random arguments for every public function: no crash, and only umfa's own errors.

    python -m tests.nightly.fuzz python|c --seed 1 [--seconds 60] [--first 0]

Each call starts from valid arguments and replaces some of them. It may succeed if the replacements
are valid too. Otherwise it must raise ValueError, TypeError or umfa.UnsupportedError (in C: return
the status) with a message that begins with the function's name, and must not write anything. Before
each call its number is written to the file --progress, so that ``--first NUMBER`` can repeat a
crash. A call depends only on the seed and its number.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import umfa
from tests.array_libraries import Array
from tests.capsules import DlpackObject
from tests.sequences import rotary_tables
from umfa import fa3, fa4

Rng = np.random.Generator
NAN, INF = float("nan"), float("inf")
NUMBERS: list[Any] = [
    None, True, False, -1, 0, 1, 2, 7, -2, 2**31 - 1, 2**31, -(2**31), 2**32, 2**63 - 1, 2**63,
    -(2**63), 2**64, 10**30, NAN, INF, -INF, 0.0, -0.0, 0.3, 1e-300, 1e300, "x", "", b"", [], (),
    {}, (1, 2), [3, -1], (-1, -1), (2**31, 0), (None, 5), (0.5, 1), 1j, object(), np.int64(3),
    np.float32(0.5), np.array(3), np.ones(2), "cpu", "auto", "metal", "top_left", np.float16, "q",
]  # fmt: skip
DTYPES: list[Any] = [
    np.float32, np.float16, ml_dtypes.bfloat16, np.float64, np.int8, np.int32, np.int64, np.uint8,
    np.uint64, bool, np.complex64,
]  # fmt: skip
ALLOWED = (ValueError, TypeError, umfa.UnsupportedError)


def normal(rng: Rng, *shape: int) -> Array:
    return rng.standard_normal(shape, dtype=np.float32)


def tensors_of(name: str, rng: Rng) -> dict[str, Any]:
    """Valid tensors for the function of this name, by parameter."""
    batch, heads, rows, keys, width = 2, 2, int(rng.integers(1, 20)), int(rng.integers(20, 40)), 8
    q, k, v = (normal(rng, batch, n, heads, width) for n in (rows, keys, keys))
    starts_q, starts_k = (np.array([0, n // 2, n], np.int32) for n in (rows, keys))
    if name == "flash_attn_combine":
        return {"out_partial": normal(rng, 3, 2, 5, 2, 8), "lse_partial": normal(rng, 3, 2, 5, 2)}
    if name == "scaled_dot_product_attention":
        return dict(
            zip(("query", "key", "value"), (x.swapaxes(1, 2) for x in (q, k, v)), strict=True)
        )
    if "qkvpacked" in name:
        packed = {"qkv": np.stack([k, k, v], axis=2)}
        tables: dict[str, Any] = {"cu_seqlens": starts_k, "max_seqlen": keys}
    elif "kvpacked" in name:
        packed = {"q": q, "kv": np.stack([k, v], axis=2)}
        tables = {"cu_seqlens_q": starts_q, "cu_seqlens_k": starts_k}
        tables |= {"max_seqlen_q": rows, "max_seqlen_k": keys}
    else:
        packed = {"q": q, "k": k, "v": v}
        tables = {"cu_seqlens_q": starts_q, "cu_seqlens_k": starts_k}
        tables |= {"max_seqlen_q": rows, "max_seqlen_k": keys}
    if "varlen" in name:
        return {n: x[0] for n, x in packed.items()} | tables
    if name == "fused_rope_attention":
        cos, sin = rotary_tables(keys, width)
        return packed | {"rotary_cos": cos, "rotary_sin": sin}
    if name == "flash_attn_with_kvcache":
        found = {"q": q, "k_cache": k, "v_cache": v}
        if rng.random() < 0.5:
            found |= {"k": normal(rng, 2, 1, 2, 8), "v": normal(rng, 2, 1, 2, 8)}
            found["cache_seqlens"] = np.array([3, keys - 1], np.int32)
        return found
    return packed


FUNCTIONS: list[Callable[..., Any]] = [
    function
    for module in (umfa, fa3, fa4)
    for name in module.__all__
    if name.startswith(("flash_attn", "fused_", "scaled_", "can_run"))
    for function in [getattr(module, name)]
]


def changed_array(array: Array, rng: Rng) -> Any:
    """The array with another dtype, shape, strides or contents, or another object."""
    axis = int(rng.integers(0, max(array.ndim, 1)))
    whole = array.dtype.kind in "iu"
    ways: list[Callable[[], Any]] = [
        lambda: array.astype(DTYPES[rng.integers(len(DTYPES))]),
        lambda: array[..., None],
        lambda: array[0] if array.ndim and array.shape[0] else array,
        lambda: np.swapaxes(array, axis, -1) if array.ndim else array,
        lambda: np.flip(array, axis) if array.ndim else array,
        lambda: np.repeat(array, int(rng.integers(0, 4)), axis) if array.ndim else array,
        lambda: np.broadcast_to(array[..., :1], array.shape) if array.ndim else array,
        lambda: array.ravel()[:: int(rng.integers(1, 4))],
        lambda: array.tolist(),
        lambda: NUMBERS[rng.integers(len(NUMBERS))],
        lambda: (
            np.where(rng.random(array.shape) < 0.2, NAN, array).astype(array.dtype)
            if not whole
            else rng.choice([-1, 0, 1, 5, 19, 2**31 - 1, -(2**31)], array.shape).astype(array.dtype)
        ),
        lambda: DlpackObject(
            tuple(max(n, 1) for n in (*array.shape, 1, 1)[:4]),
            code=int(rng.choice([0, 1, 2, 4, 6, 255])),
            bits=int(rng.choice([1, 8, 12, 16, 32, 128])),  # not wider than the memory
            lanes=int(rng.choice([0, 1, 2])),
            ndim=int(rng.choice([-1, 0, 1, 3, 4, 5, 60])),
            device_type=int(rng.choice([1, 1, 1, 0, 2, 8, -1, 99])),
        ),
    ]
    return ways[rng.integers(len(ways))]()


def bytes_of(arguments: dict[str, Any]) -> dict[str, bytes]:
    return {n: x.tobytes() for n, x in arguments.items() if type(x) is np.ndarray}


def parameters_of(function: Callable[..., Any]) -> list[str]:
    found = inspect.signature(function).parameters.values()
    return [x.name for x in found if x.kind not in (x.VAR_KEYWORD, x.VAR_POSITIONAL)]


def bad_call(rng: Rng) -> tuple[Callable[..., Any], dict[str, Any]]:
    function = FUNCTIONS[rng.integers(len(FUNCTIONS))]
    known = parameters_of(function)
    arguments = {n: x for n, x in tensors_of(function.__name__, rng).items() if n in known}
    for _ in range(int(rng.integers(1, 4))):
        name = known[rng.integers(len(known))]
        if isinstance(arguments.get(name), np.ndarray):
            arguments[name] = changed_array(arguments[name], rng)
        elif rng.random() < 0.5:
            arguments[name] = NUMBERS[rng.integers(len(NUMBERS))]
        else:  # a tensor for an optional argument or a number
            shape = [int(n) for n in rng.integers(0, 9, rng.integers(0, 5))]
            kind = DTYPES[rng.integers(len(DTYPES))]
            arguments[name] = changed_array(normal(rng, *shape).astype(kind), rng)
    return function, arguments


def try_python(rng: Rng) -> str:
    """What is wrong with the answer to a call; "" if nothing is."""
    function, arguments = bad_call(rng)
    before = bytes_of(arguments)
    try:
        function(**arguments)
    except ALLOWED as error:
        said = str(error)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    else:
        return ""
    shown = {n: f"{x.dtype}{x.shape}" if hasattr(x, "dtype") else x for n, x in arguments.items()}
    call = f"{function.__module__}.{function.__name__}(**{shown})"
    if not re.match(rf"\[umfa\.(?:\w+\.)*{function.__name__}\] \S", said):
        return f"{call} said: {said}"
    if bytes_of(arguments) != before:
        return f"{call} was refused, but has written"
    return ""


def main(arguments: list[str]) -> int:
    from tests.nightly import fuzz_c

    parser = argparse.ArgumentParser(prog="python -m tests.nightly.fuzz")
    parser.add_argument("what", choices=["python", "c"])
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--progress", type=Path)
    given = parser.parse_args(arguments)
    attempt = {"python": try_python, "c": fuzz_c.try_c}[given.what]
    end = time.monotonic() + given.seconds
    for number in itertools.count(given.first):
        if given.progress:
            given.progress.write_text(str(number))
        if wrong := attempt(np.random.default_rng([given.seed, number])):
            print(f"call {number} of seed {given.seed}: {wrong}")
            return 1
        if time.monotonic() > end:
            print(f"{number + 1 - given.first} calls of seed {given.seed}")
            return 0
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
