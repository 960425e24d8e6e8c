"""What the first call waits for: which kernels are compiled, when, and how often."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

import umfa
from tests.metal.host.test_encode import c_library, host_tensor
from tests.metal.metal_tensors import MetalTensor
from tests.nightly.fuzz_c import options_type
from tools.metal.double import Double
from tools.metal.double.gpus import Recorder


def built() -> int:
    return umfa.stats().pipelines


def tensors(seqlen_q: int = 100, seqlen_kv: int = 300, dtype: Any = np.float16) -> list[Any]:
    return [np.empty((1, seqlen_q, 4, 64), dtype), *(np.empty((1, seqlen_kv, 2, 64), dtype),) * 2]


def test_after_warmup_a_call_compiles_nothing(double: Double, recorder: Recorder) -> None:
    done = umfa.warmup(*tensors(), backend="metal")
    assert done[:3] == ("metal", 1, 1)
    assert done.seconds > 0
    assert recorder.dispatches == [], "nothing is computed"
    before = built()
    umfa.flash_attn_func(*tensors(), backend="metal")
    umfa.flash_attn_func(*tensors(77, 1000), causal=True, backend="metal")
    assert built() == before, "other lengths and causality need no other kernel"
    assert umfa.warmup(*tensors(), backend="metal")[:3] == ("metal", 1, 0)
    assert umfa.warmup(*tensors(), softcap=5.0, backend="metal")[:3] == ("metal", 1, 1)


CALLS: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
    "split keys": (umfa.flash_attn_func, tuple(tensors(1, 4096)), {}),
    "lse": (umfa.flash_attn_func, tuple(tensors()), {"return_lse": True}),
    "strided out": (
        umfa.flash_attn_func,
        tuple(tensors()),
        {"out": np.empty((1, 100, 4, 128), np.float16)[..., ::2]},
    ),
    "cache": (
        umfa.flash_attn_with_kvcache,
        (
            *tensors(1, 2048)[:2],
            np.empty((1, 2048, 2, 64), np.float16),
            *(np.empty((1, 1, 2, 64), np.float16),) * 2,
        ),
        {"cache_seqlens": 1500},
    ),
    "varlen": (
        umfa.flash_attn_varlen_func,
        (*(np.empty((60, 2, 64), np.float16),) * 3, [0, 20, 50], [0, 20, 50], 30, 30),
        {},
    ),
    "sdpa, batch dimensions": (
        umfa.scaled_dot_product_attention,
        (np.empty((2, 3, 4, 9, 32), np.float32).transpose(1, 0, 2, 3, 4),) * 3,
        {},
    ),
    "combine": (
        umfa.flash_attn_combine,
        (np.empty((3, 1, 5, 2, 48), np.float32), np.empty((3, 1, 5, 2), np.float32)),
        {},
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_function(name: str, double: Double, recorder: Recorder) -> None:
    function, args, options = CALLS[name]
    before = built()
    done = umfa.warmup(function, *args, **options, backend="metal")
    assert done.backend == "metal"
    assert done.kernels == done.built == built() - before > 0
    assert recorder.dispatches == []
    function(*args, **options, backend="metal")
    assert built() - before == done.built
    kernels = {(k.name, tuple(k.constants.items())) for k in recorder.dispatches}
    assert len(kernels) == done.kernels


def kernels_of(calls: list[tuple[int, ...]]) -> int:
    """Kernels that float16 calls of (batch, queries, heads, keys, key heads, head_dim) compile."""
    before = built()
    for batch, seqlen_q, heads, seqlen_kv, heads_kv, head_dim in calls:
        q = np.empty((batch, seqlen_q, heads, head_dim), np.float16)
        k = np.empty((batch, seqlen_kv, heads_kv, head_dim), np.float16)
        umfa.warmup(q, k, k, backend="metal")
    return built() - before


FLUX = [(1, n, 24, n, 24, 128) for n in (1536, 2816)]  # 512, 768 pixels
SDXL = [  # 512 pixels, both resolutions, attention to itself and to 77 or 154 tokens
    (2, n, h, m, h, 64) for n, h in ((1024, 10), (256, 20)) for m in (n, 77, 154)
]


@pytest.mark.parametrize(
    ("calls", "count"), [(FLUX, 1), ([*FLUX, (1, 8192, 24, 8192, 24, 128)], 2), (SDXL, 1)]
)
def test_kernels_of_image_models(calls: list[Any], count: int, double: Double) -> None:
    """The second: the longest call is cut into slices."""
    assert kernels_of(calls) == count


def test_kernels_of_llama(double: Double) -> None:
    """Llama 3 8B with a cache, as docs/backends.md counts them."""
    caches = [np.empty((1, 8192, 8, 128), np.float16) for _ in "kv"]

    def step(queries: int, length: int) -> None:
        q = np.empty((1, queries, 32, 128), np.float16)
        new = np.empty((1, queries, 8, 128), np.float16)
        umfa.warmup(
            umfa.flash_attn_with_kvcache, q, *caches, new, new, cache_seqlens=length,
            causal=True, backend="metal",
        )  # fmt: skip

    before = built()
    for prompt, length in ((17, 0), (512, 0), (300, 4000)):
        step(prompt, length)
    assert built() - before == 2, "forward, and append"
    for length in (10, 100, 1000, 5000, 8191):
        step(1, length)
    assert built() - before == 4, "decode, and merge of split keys"
    for queries in range(2, 9):
        for length in (10, 1000, 8000):
            step(queries, length)
    assert built() - before == 5, "decode by more than 8 rows"


def test_tensors_on_the_gpu(double: Double) -> None:
    q, k, v = (MetalTensor(double, x) for x in tensors())
    assert umfa.warmup(q, k, v)[:3] == ("metal", 1, 1)
    before = built()
    umfa.flash_attn_func(q, k, v)
    assert built() == before


def test_fewer_threads_count_too(double: Double, recorder: Recorder) -> None:
    double.set_machine(max_threads=64)
    done = umfa.warmup(*tensors(), backend="metal")
    assert (done.kernels, done.built) == (1, 2), "the first has too many threads"
    umfa.flash_attn_func(*tensors(), backend="metal")
    assert umfa.warmup(*tensors(), backend="metal").built == 0


def test_a_kernel_that_does_not_compile(double: Double) -> None:
    double.fault("pipeline")
    with pytest.raises(RuntimeError, match="Metal could not build the kernel"):
        umfa.warmup(*tensors(), backend="metal")
    assert umfa.warmup(*tensors(), backend="metal").built == 1, "it may the next time"


def test_the_choice_is_the_calls(double: Double) -> None:
    assert umfa.warmup(*tensors(4, 4))[:3] == ("cpu", 0, 0)
    assert umfa.warmup(*tensors(1000, 1000)).backend == "metal"


METAL = 2  # UMFA_BACKEND_METAL


def options_in_c(**fields: int) -> Any:
    options = options_type()(
        window_size_left=-1, window_size_right=-1, max_seqlen_q=-1, max_seqlen_k=-1
    )
    options.struct_size = ctypes.sizeof(options) - 8
    options.rotary_interleaved = options.smooth_k = 1
    for name, value in fields.items():
        setattr(options, name, value)
    return ctypes.byref(options)


def call_in_c(name: str, arrays: list[Any], *last: Any) -> None:
    """A function of the C interface on float32 arrays or None, and what follows the tensors."""
    library = c_library()
    tensors = [None if x is None else host_tensor(x) for x in arrays]
    handles = [None if t is None else ctypes.byref(t) for t in tensors]
    status = getattr(library, f"umfa_attention_{name}")(*handles, *last)
    assert status == 0, library.umfa_last_error()


def zeros(*shape: int) -> Any:
    return np.zeros(shape, np.float32)


def test_in_c_a_call_compiles_nothing_after_it(double: Double, recorder: Recorder) -> None:
    q, k, out = zeros(1, 100, 4, 64), zeros(1, 300, 2, 64), zeros(1, 100, 4, 64)
    wide, lse = zeros(1, 100, 4, 128)[..., ::2], zeros(1, 4, 100)
    seen = 0
    for written, softcap in (
        ((out, None), 0),
        ((out, lse), 0),
        ((wide, None), 0),
        ((out, None), 5),
    ):
        options = options_in_c(backend=METAL, softcap=softcap)
        before = built()
        call_in_c("warmup", [q, k, k, *written], options)
        assert built() - before == 1, "has_lse, strides of out and softcap are constants"
        assert len(recorder.dispatches) == seen, "nothing is computed"
        call_in_c("forward", [q, k, k, *written], options)
        assert built() - before == 1
        seen = len(recorder.dispatches)
    assert seen == 4


def test_in_c_a_merge_compiles_nothing_after_it(double: Double, recorder: Recorder) -> None:
    parts, parts_lse = zeros(3, 1, 5, 2, 48), zeros(3, 1, 5, 2)
    tensors = [parts, parts_lse, zeros(1, 5, 2, 48), zeros(1, 5, 2)]
    before = built()
    call_in_c("combine_warmup", tensors, METAL)
    assert (built() - before, len(recorder.dispatches)) == (1, 0)
    call_in_c("combine", tensors, METAL)
    assert (built() - before, len(recorder.dispatches)) == (1, 1)


def test_in_c_a_kernel_that_does_not_compile(double: Double) -> None:
    arrays = [zeros(1, 100, 4, 64)] * 3 + [zeros(1, 100, 4, 64), None]
    double.fault("pipeline")
    with pytest.raises(AssertionError, match="Metal could not build the kernel"):
        call_in_c("warmup", arrays, options_in_c(backend=METAL))
