"""Stage: times on the GPU, against umfa's CPU backend, MLX and torch's MPS."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import umfa
from tests.on_a_mac.part import Part

SECONDS = 0.5  # for each shape and contestant

# (batch, seqlen, heads, head_dim); a call takes 4 * batch * heads * seqlen**2 * head_dim FLOP.
SMALL = [(1, n, 8, 64) for n in (16, 32, 64, 96, 128, 192, 256, 384, 512)]
LARGE = [(1, 1024, 16, 64), (1, 1536, 24, 128), (1, 4096, 8, 64), (1, 4096, 8, 128)]
LARGE += [(1, 4096, 8, 256), (1, 8192, 8, 128)]

Shape = tuple[int, int, int, int]


def flop(shape: Shape) -> float:
    batch, seqlen, heads, head_dim = shape
    return 4.0 * batch * heads * seqlen**2 * head_dim


def median_of(call: Callable[[], Any], seconds: float) -> tuple[float, int]:
    """Median time of a call, and how many there were."""
    call()  # builds pipelines, starts threads
    times: list[float] = []
    while sum(times) < seconds or len(times) < 3:
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times), len(times)


def arrays(shape: Shape, dtype: Any) -> list[Any]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape, np.float32).astype(dtype) for _ in range(3)]


def of_umfa(shape: Shape, dtype: Any, backend: str, seconds: float) -> tuple[float, float]:
    """Median time, and the GPU's own share of it."""
    q, k, v = arrays(shape, dtype)
    umfa.flash_attn_func(q, k, v, backend=backend)
    before = umfa.stats().gpu_seconds
    median, count = median_of(lambda: umfa.flash_attn_func(q, k, v, backend=backend), seconds)
    return median, (umfa.stats().gpu_seconds - before) / (count + 1)


def of_mlx(shape: Shape, dtype: Any, seconds: float) -> float:
    import mlx.core as mx

    q, k, v = (mx.array(a.transpose(0, 2, 1, 3).copy()) for a in arrays(shape, dtype))
    scale = shape[3] ** -0.5

    def call() -> None:
        mx.eval(mx.fast.scaled_dot_product_attention(q, k, v, scale=scale))

    return median_of(call, seconds)[0]


def of_umfa_on_mlx(shape: Shape, dtype: Any, seconds: float) -> float:
    import mlx.core as mx

    q, k, v = (mx.array(a) for a in arrays(shape, dtype))
    mx.eval(q, k, v)
    return median_of(lambda: mx.eval(umfa.flash_attn_func(q, k, v)), seconds)[0]


def of_mps(shape: Shape, dtype: Any, seconds: float) -> float:
    import torch

    q, k, v = (torch.from_numpy(a.transpose(0, 2, 1, 3).copy()).to("mps")
               for a in arrays(shape, dtype))  # fmt: skip

    def call() -> None:
        torch.nn.functional.scaled_dot_product_attention(q, k, v)
        torch.mps.synchronize()

    return median_of(call, seconds)[0]


def milliseconds(part: Part, what: str, measure: Callable[[], float], errors: list[str]) -> str:
    """A cell: the time, or that there is none, its reason among the errors."""
    try:
        return f"{measure() * 1e3:.3f}"
    except Exception as error:
        errors.append(f"{what}: {type(error).__name__}: {error}")
        return "–"


def table(part: Part, title: str, shapes: list[Shape], dtype: Any, seconds: float) -> None:
    part.write(
        *(f"### {title}", ""),
        "| batch x seqlen x heads x head_dim | GFLOP | CPU ms | Metal ms | of which GPU ms "
        "| GPU TFLOP/s | MLX ms | umfa on MLX ms | torch MPS ms |",
        "|---|---|---|---|---|---|---|---|---|",
    )
    errors: list[str] = []
    for shape in shapes:
        name = " x ".join(map(str, shape))
        gpu = float("nan")

        def metal(shape: Shape = shape) -> float:
            nonlocal gpu
            total, gpu = of_umfa(shape, dtype, "metal", seconds)
            return total

        def cell(what: str, measure: Callable[[], float], name: str = name) -> str:
            return milliseconds(part, f"{what}, {name}", measure, errors)

        cells = [
            cell("CPU", lambda s=shape: of_umfa(s, dtype, "cpu", seconds)[0]),
            cell("Metal", metal),
        ]
        cells += [f"{gpu * 1e3:.3f}", f"{flop(shape) / gpu * 1e-12:.2f}" if gpu > 0 else "–"]
        for what, measure in (("MLX", of_mlx), ("umfa on MLX", of_umfa_on_mlx), ("MPS", of_mps)):
            cells.append(cell(what, lambda m=measure, s=shape: m(s, dtype, seconds)))
        part.write(f"| {name} | {flop(shape) * 1e-9:.3f} | {' | '.join(cells)} |")
    part.write("")
    if errors:
        part.fail("Not measured", "\n".join(dict.fromkeys(errors)))


def run(part: Part, *, quick: bool) -> None:
    if quick:
        table(part, "Tried (float32)", SMALL[:1], np.float32, 0.01)
        return
    part.write("`worthwhile_flop` in src/metal/backend.mm should be where CPU and Metal cross.", "")
    table(part, "Small (float32)", SMALL, np.float32, SECONDS)
    table(part, "Large (float16)", LARGE, np.float16, SECONDS)
    part.write(f"`{umfa.stats()}`")
