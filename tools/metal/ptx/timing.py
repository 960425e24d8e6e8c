"""Times cases: CUDA graphs of many plays between two events, the median of many."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cupy
import numpy as np

from . import reference
from .cases import Case
from .device import Prepared, upload
from .inputs import Array, from_bfloat16, store
from .placement import STORAGE, placements, written

# Input sets rotate so that together they exceed any L2 cache (50 MB on an H100) severalfold.
ROTATED_BYTES = 200 << 20
MAX_SETS = 16
SECONDS = 0.25  # of measuring a case
COPY_BYTES = 1 << 30


def copy_bandwidth() -> float:
    """Bytes read plus bytes written per second by a device-to-device copy."""
    source, target = cupy.cuda.alloc(COPY_BYTES), cupy.cuda.alloc(COPY_BYTES)
    source.memset(1, COPY_BYTES)
    target.memset(2, COPY_BYTES)
    seconds = _median(lambda: target.copy_from_device_async(source, COPY_BYTES, _stream()), 20)
    return 2 * COPY_BYTES / seconds


def time(folder: Path, described: dict[str, Any], seed: int, copy: float) -> dict[str, Any]:
    """One row of the table."""
    case = Case.read(described["case"])
    places = placements(case)
    read = [n for n in places if n.removesuffix("_scales") in ("key", "value")]
    kv_bytes = sum(places[n].size * places[n].item_bytes for n in read)
    input_bytes = kv_bytes + places["query"].size * places["query"].item_bytes
    sets = int(min(MAX_SETS, max(1, -(-ROTATED_BYTES // input_bytes))))
    pool = np.random.default_rng(seed).standard_normal(1 << 22, np.float32)
    prepared = []
    for i in range(sets):
        inputs = {
            name: upload(
                _fill(
                    _scaled(pool, name), places[name].size, places[name].dtype, 7919 * (9 * i + j)
                )
            )
            for j, name in enumerate(name for name in places if name not in written(case))
        }
        if case.backward:  # about that of random scores, so that probabilities are finite
            lse = np.full(places["lse"].size, np.log(case.seqlen_k), np.float32)
            inputs["lse"] = upload(lse)
        prepared.append(Prepared(folder, described, inputs))
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        for (
            one
        ) in prepared:  # warm up: loads the kernels, and shows errors before a graph hides them
            one.play()
        stream.synchronize()
        seconds = _median(lambda: [one.play() for one in prepared], 3) / sets
        # Short plays are timed as a graph of many, so that launching from Python does not count.
        plays = max(sets, int(min(256, 2e-3 / seconds)) // sets * sets)
        stream.begin_capture()
        for i in range(plays):
            prepared[i % sets].play()
        graph = stream.end_capture()
        graph.launch(stream)
        stream.synchronize()
        repeats = int(np.clip(SECONDS / (seconds * plays), 7, 200))
        spread = _times(lambda: graph.launch(stream), repeats) / plays
    if not np.isfinite(_sample(prepared[-1])).all():
        raise ArithmeticError(f"{described['name']}: the output holds NaN")
    seconds = float(np.median(spread))
    pairs = case.batch * case.heads * reference.visible_pairs(case)
    # A backward pass counts as five products, as is usual; its two kernels compute seven.
    products = 5 if case.backward else 2
    return {
        "name": described["name"],
        "label": case.label,
        "compared_with": case.compared_with,
        "ms": 1e3 * seconds,
        "spread": float((np.quantile(spread, 0.9) - np.quantile(spread, 0.1)) / seconds),
        "tflops": products * pairs * (case.head_dim + case.head_dim_v) / seconds / 1e12,
        "kv_gb_per_s": kv_bytes / seconds / 1e9,
        "share_of_copy": kv_bytes / seconds / copy,
        "sets": sets,
        "plays": plays,
        "repeats": repeats,
    }


def _scaled(pool: Array, name: str) -> Array:
    """Scales are small, so that quantised keys and values are not large."""
    return pool * np.float32(0.01) if name.endswith("_scales") else pool


def _stream() -> Any:
    return cupy.cuda.get_current_stream()


def _fill(pool: Array, size: int, dtype: str, start: int) -> Array:
    """Random numbers from the pool, another start in it for each buffer."""
    if dtype in ("int8", "uint8"):
        kept = np.roll(pool, start).view(np.uint8)[::4].view(STORAGE[dtype])
    else:
        kept = store(np.roll(pool, start), dtype)
    return np.tile(kept, -(-size // kept.size))[:size]


def _sample(prepared: Prepared) -> Array:
    name = written(prepared.case)[0]
    out = prepared.results()[name]
    return from_bfloat16(out) if prepared.places[name].dtype == "bfloat16" else out


def _times(work: Any, repeats: int) -> Array:
    pairs = []
    for _ in range(repeats):
        start, stop = cupy.cuda.Event(), cupy.cuda.Event()
        start.record()
        work()
        stop.record()
        pairs.append((start, stop))
    _stream().synchronize()
    return np.array([cupy.cuda.get_elapsed_time(a, b) * 1e-3 for a, b in pairs])


def _median(work: Any, repeats: int) -> float:
    work()
    return float(np.median(_times(work, repeats)))
