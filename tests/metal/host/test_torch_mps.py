"""Calls on MPS tensors in torch's stream: on a stand-in for torch's MPS device, whose stream runs
only when the test says so. No part of it is Apple's."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import umfa
from tests import reference
from tests.attend import BSHD
from tests.checks import BASE, LSE, assert_close
from tests.gradients import RELATIVE, assert_gradients
from tests.metal.emulated import exported_of as plans_of
from tools.metal import double as metal_double
from tools.metal.double import Double
from tools.metal.double.gpus import Recorder
from umfa import _ext
from umfa._call.prepared import prepared, stream_of
from umfa._frameworks import _numpy

torch = pytest.importorskip("torch")

import umfa.torch  # noqa: E402
from tests.metal.host.torch_mps import Kernel, TorchMps, standing_in  # noqa: E402
from umfa._frameworks import _torch, _torch_mps  # noqa: E402

SLOW = pytest.mark.slow


@pytest.fixture
def mps(double: Double, monkeypatch: pytest.MonkeyPatch) -> Iterator[TorchMps]:
    """A Mac with an MPS device: umfa plans for the double's GPU."""
    with standing_in(monkeypatch) as device:
        yield device


def made(mps: TorchMps, dtype: Any, rows: int, keys: int, heads: int = 4, dim: int = 64) -> Any:
    """Query, key and value (batch, rows, heads, dim); half as many heads of keys."""
    generator = torch.Generator().manual_seed(rows * keys)
    shapes = [(2, rows, heads, dim), (2, keys, heads // 2, dim), (2, keys, heads // 2, dim)]
    return [mps.tensor(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def name_of(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def expected(mps: TorchMps, tensors: Any, **options: Any) -> Any:
    return reference.attention(*(mps.read(x) for x in tensors), **options)


def test_nothing_runs_and_nothing_waits_within_a_call(mps: TorchMps) -> None:
    q, k, v = made(mps, torch.float16, 20, 70)
    before = umfa.stats()
    out, lse, _ = umfa.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    after = umfa.stats()
    assert mps.poisoned(out)
    assert mps.poisoned(lse)
    assert mps.waits == 0
    assert mps.launched == ["forward_f16_d64_v64_k32_q2_f1"]
    assert after.metal_calls - before.metal_calls == 1
    assert after.plans_in_stream - before.plans_in_stream == 1
    assert after.command_buffers == before.command_buffers
    assert after.waits == before.waits
    wanted, wanted_lse = expected(mps, (q, k, v), causal=True)
    assert_close(mps.read(out), wanted, BASE["float16"])
    assert_close(mps.read(lse), wanted_lse, LSE, "lse")


def test_calls_in_a_row_see_each_other(mps: TorchMps) -> None:
    q, k, v = made(mps, torch.float16, 20, 70)
    first = umfa.flash_attn_func(q, k, v, causal=True)
    second = umfa.flash_attn_func(first, k, v, causal=True)
    assert mps.waits == 0
    assert mps.poisoned(first)
    assert mps.poisoned(second)
    wanted, _ = expected(mps, (q, k, v), causal=True)
    assert_close(mps.read(first), wanted, BASE["float16"])
    wanted, _ = expected(mps, (first, k, v), causal=True)
    assert_close(mps.read(second), wanted, BASE["float16"])


def test_slices_start_where_they_lie(mps: TorchMps) -> None:
    """Query, key and value in one tensor: Metal's offsets are the tensors' own."""
    packed = mps.tensor(torch.randn(2, 33, 3, 4, 64, generator=torch.Generator().manual_seed(1)))
    packed = mps.adopt(packed.half())
    out = umfa.flash_attn_qkvpacked_func(packed, causal=True)
    wanted, _ = expected(mps, packed.unbind(2), causal=True)
    assert_close(mps.read(out), wanted, BASE["float16"])


def test_a_model_compiles_few_texts(mps: TorchMps) -> None:
    """Layers and steps of different lengths share their kernels."""
    for step in range(8):
        q, k, v = made(mps, torch.float16, 20 + step, 70 + step)
        for _ in range(3):
            q = umfa.flash_attn_func(q, k, v, causal=True)
    assert len(mps.launched) == 24
    assert len(mps.compiled) == 1
    assert mps.waits == 0


def test_torchs_own_attention(mps: TorchMps) -> None:
    """With `umfa.torch`, as a program calls it that knows nothing of umfa; with gradients, too."""
    q, k, v = (x.transpose(1, 2) for x in made(mps, torch.float16, 20, 70))
    leaves = [mps.adopt(x.clone()).requires_grad_() for x in (q, k, v)]
    sdpa = torch.nn.functional.scaled_dot_product_attention
    before = umfa.stats()
    with umfa.torch.sdpa():
        out = sdpa(sdpa(*leaves, enable_gqa=True), *leaves[1:], enable_gqa=True)
    after = umfa.stats()
    assert after.plans_in_stream - before.plans_in_stream == 2
    assert after.left == before.left
    assert mps.waits == 0
    assert mps.poisoned(out)
    first = reference.scaled_dot_product(*(mps.read(x) for x in leaves), enable_gqa=True)
    wanted = reference.scaled_dot_product(
        first.astype(np.float16), *(mps.read(x) for x in leaves[1:]), enable_gqa=True
    )
    assert_close(mps.read(out), wanted, BASE["float16"])


OPTIONS = {
    "plain": {},
    "window": {"window_size": (9, 3)},
    "softcap": {"softcap": 5.0},
    "mask of numbers": {"attn_mask": (1, 4, 20, 70)},
    "mask of bool": {"attn_mask": (2, 1, 1, 70)},
    "slopes": {"alibi_slopes": (4,)},
    "sinks": {"learnable_sink": (4,)},
    "dropout": {"dropout_p": 0.3, "dropout_seed": 7},
}


def with_tensors(mps: TorchMps, options: dict[str, Any]) -> dict[str, Any]:
    """Shapes become tensors on the device."""
    found = {}
    for name, value in options.items():
        found[name] = value
        if name in ("attn_mask", "alibi_slopes", "learnable_sink"):
            numbers = torch.rand(value, generator=torch.Generator().manual_seed(5))
            found[name] = mps.tensor(numbers > 0.3 if value[-2:] == (1, 70) else numbers)
    return found


def in_reference(mps: TorchMps, options: dict[str, Any]) -> dict[str, Any]:
    """The options as tests/reference.py names them."""
    arrays = {
        name: (value.numpy() if value.dtype == torch.bool else mps.read(value))
        if isinstance(value, torch.Tensor)
        else value
        for name, value in options.items()
    }
    return {"mask" if name == "attn_mask" else name: value for name, value in arrays.items()}


@pytest.mark.slow
@pytest.mark.whole
@pytest.mark.parametrize("name", OPTIONS)
def test_options(mps: TorchMps, name: str) -> None:
    q, k, v = made(mps, torch.float16, 20, 70)
    options = with_tensors(mps, OPTIONS[name])
    out = umfa.flash_attn_func(q, k, v, **options)
    assert mps.waits == 0
    assert mps.poisoned(out)
    wanted, _ = expected(mps, (q, k, v), **in_reference(mps, options))
    assert_close(mps.read(out), wanted, BASE["float16"])


@pytest.mark.slow
@pytest.mark.whole
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [20, 1])
def test_dtypes(mps: TorchMps, dtype: Any, rows: int) -> None:
    """Of many queries, and of one, whose keys are split."""
    tensors = made(mps, dtype, rows, 500)
    out = umfa.flash_attn_func(*tensors, causal=True)
    assert mps.waits == 0
    wanted, _ = expected(mps, tensors, causal=True)
    assert_close(mps.read(out), wanted, BASE[name_of(dtype)])


@pytest.mark.parametrize(
    "dtype",
    [torch.float16, *(pytest.param(x, marks=SLOW) for x in (torch.float32, torch.bfloat16))],
)
def test_gradients(mps: TorchMps, dtype: Any) -> None:
    """Forward and backward in a row: the backward pass reads results that are not there yet."""
    leaves = [x.requires_grad_() for x in made(mps, dtype, 20, 70)]
    dout = mps.tensor(
        torch.randn(2, 20, 4, 64, generator=torch.Generator().manual_seed(9)).to(dtype)
    )
    before = umfa.stats()
    out = umfa.flash_attn_func(*leaves, causal=True)
    found = torch.autograd.grad(out, leaves, dout)
    after = umfa.stats()
    assert mps.waits == 0
    assert after.plans_in_stream - before.plans_in_stream == 2
    assert after.waits == before.waits
    assert all(map(mps.poisoned, (out, *found)))
    arrays = [mps.read(x) for x in leaves]
    wanted = reference.gradients(*arrays, mps.read(dout), causal=True)
    gradients = dict(zip(("dq", "dk", "dv"), map(mps.read, found), strict=True))
    assert_gradients(gradients, wanted, RELATIVE[name_of(dtype)])


@pytest.mark.slow
def test_all_gradients(mps: TorchMps) -> None:
    q, k, v = made(mps, torch.float16, 20, 70)
    options = with_tensors(mps, {"attn_mask": (4, 20, 70), "learnable_sink": (4,)})
    options["alibi_slopes"] = mps.tensor(torch.linspace(0.1, 0.4, 4))
    leaves = [x.requires_grad_() for x in (q, k, v, *options.values())]
    out = umfa.flash_attn_func(q, k, v, dropout_p=0.2, dropout_seed=3, **options)
    dout = mps.tensor(torch.ones(2, 20, 4, 64).half())
    found = torch.autograd.grad(out, leaves, dout)
    assert mps.waits == 0
    names = ("dq", "dk", "dv", "dmask", "dsinks", "dalibi_slopes")
    wanted = reference.gradients(
        *(mps.read(x) for x in (q, k, v)), mps.read(dout), dropout_p=0.2, dropout_seed=3,
        **in_reference(mps, options),
    )  # fmt: skip
    assert_gradients(
        dict(zip(names, map(mps.read, found), strict=True)), wanted, RELATIVE["float16"]
    )


@pytest.mark.slow
def test_a_cache_grows_in_the_stream(mps: TorchMps) -> None:
    """New rows go into the caches, and the next step reads them; lengths are the host's."""
    steps, start = 3, 130
    _, keys, values = made(mps, torch.float16, 1, 200)
    rows = [made(mps, torch.float16, 1, 1 + 0 * step) for step in range(steps)]
    for step, (_, key, value) in enumerate(rows):
        key.add_(step)
        value.sub_(step)
    caches = [mps.read(x).copy() for x in (keys, values)]
    outs = [
        umfa.flash_attn_with_kvcache(q, keys, values, k, v, cache_seqlens=start + i, causal=True)
        for i, (q, k, v) in enumerate(rows)
    ]
    assert mps.waits == 0
    assert len(mps.compiled) <= 4
    for i, ((q, k, v), out) in enumerate(zip(rows, outs, strict=True)):
        n = start + i + 1
        for cache, row in zip(caches, (k, v), strict=True):
            cache[:, n - 1 : n] = mps.read(row)
        wanted, _ = reference.attention(mps.read(q), *(x[:, :n] for x in caches), causal=True)
        assert_close(mps.read(out), wanted, BASE["float16"])
    assert np.array_equal(mps.read(keys), caches[0])


@pytest.mark.slow
def test_parts_of_a_batch_start_where_they_lie(mps: TorchMps) -> None:
    """Two batch dimensions that no stride joins: each index of the outer one is a plan."""
    generator = torch.Generator().manual_seed(4)
    q, k, v = (
        mps.tensor(torch.randn((3, 2, 4, n, 64), generator=generator).half()).transpose(0, 1)
        for n in (20, 70, 70)
    )
    before = umfa.stats()
    out = umfa.scaled_dot_product_attention(q, k, v)
    after = umfa.stats()
    assert mps.waits == 0
    assert after.plans_in_stream - before.plans_in_stream > 1
    assert after.metal_calls - before.metal_calls == 1
    wanted = reference.scaled_dot_product(*(mps.read(x) for x in (q, k, v)))
    assert_close(mps.read(out), wanted, BASE["float16"])


@pytest.mark.parametrize("given", [False, True])
def test_combine(mps: TorchMps, given: bool) -> None:
    generator = torch.Generator().manual_seed(6)
    parts = mps.tensor(torch.randn(3, 2, 5, 2, 24, generator=generator))
    sums = mps.tensor(torch.randn(3, 2, 5, 2, generator=generator))
    out = mps.tensor(torch.full((2, 5, 2, 24), float("nan"))) if given else None
    assert umfa.warmup(umfa.flash_attn_combine, parts, sums, out)[:3] == ("metal", 1, 1)
    before = umfa.stats()
    merged, lse = umfa.flash_attn_combine(parts, sums, out)
    after = umfa.stats()
    assert mps.waits == 0
    assert len(mps.compiled) == 1
    assert after.plans_in_stream - before.plans_in_stream == 1
    assert mps.poisoned(merged)
    assert merged is out or not given
    wanted, wanted_lse = reference.combine(mps.read(parts), mps.read(sums))
    assert_close(mps.read(merged), wanted, BASE["float32"])
    assert_close(mps.read(lse), wanted_lse, LSE, "lse")


@pytest.mark.slow
def test_tensors_without_elements(mps: TorchMps) -> None:
    """They have no memory that could be bound."""
    q, k, v = made(mps, torch.float16, 20, 70)
    out = umfa.flash_attn_func(q, mps.adopt(k[:, :0].clone()), mps.adopt(v[:, :0].clone()))
    assert (mps.read(out) == 0).all()
    assert umfa.flash_attn_func(mps.adopt(q[:, :0].clone()), k, v).shape == (2, 0, 4, 64)
    assert mps.waits == 0


def test_stats_say_what_ran_where(mps: TorchMps) -> None:
    umfa.flash_attn_func(*made(mps, torch.float16, 20, 70), causal=True)
    _torch_mps.wait("a test")
    lines = str(umfa.stats()).splitlines()
    assert any(line.endswith("in torch's MPS stream, without a wait") for line in lines)
    assert any(line.endswith("waits for the GPU: a test") for line in lines)


def test_the_self_tests_exclusions_hold(recorder: Recorder, monkeypatch: Any) -> None:
    """On a GPU that computes nothing right."""
    with (
        metal_double.machine(recorder, self_test="1"),
        standing_in(monkeypatch) as mps,
    ):
        tensors = made(mps, torch.float16, 20, 70)
        possible, reason = umfa.can_run(*tensors)
        assert not possible
        assert "forward_f16" in reason
        with pytest.raises(umfa.UnsupportedError, match="forward_f16"):
            umfa.flash_attn_func(*tensors)
        assert mps.launched == []
        assert mps.compiled == []


def test_verdicts_wait_for_nothing(mps: TorchMps) -> None:
    tensors = made(mps, torch.float16, 20, 70)
    assert umfa.can_run(*tensors) == (True, "")
    assert umfa.can_run(*(x.requires_grad_() for x in tensors)) == (True, "")
    possible, reason = umfa.can_run(*tensors, backend="cpu")
    assert not possible
    assert "metal" in reason
    assert mps.waits == 0
    assert mps.compiled == []


def test_warmup_compiles_for_the_stream(mps: TorchMps) -> None:
    tensors = made(mps, torch.float16, 20, 70)
    before = umfa.stats()
    done = umfa.warmup(*tensors, causal=True)
    assert done[:3] == ("metal", 1, 1)
    assert umfa.warmup(*tensors, causal=True)[:3] == ("metal", 1, 0)
    assert umfa.stats() == before
    assert mps.launched == []
    umfa.flash_attn_func(*tensors, causal=True)
    assert len(mps.compiled) == 1


def test_kernels_that_take_few_threads(mps: TorchMps, monkeypatch: Any) -> None:
    """The plan is made again for fewer, until there is none."""
    kernel = SimpleNamespace(max_threads_per_threadgroup=16, thread_execution_width=32)
    asked = []
    monkeypatch.setattr(_torch_mps, "_compiled", lambda name, *_: asked.append(name) or kernel)
    with pytest.raises(umfa.UnsupportedError) as caught:
        umfa.flash_attn_func(*made(mps, torch.float16, 20, 70))
    assert str(caught.value) == (
        "[umfa.flash_attn_func] no kernel has a tile small enough for this GPU; got 16 threads; "
        "expected at most 16"
    )
    assert len(asked) > 1


@pytest.mark.slow
def test_a_smaller_threadgroup_is_planned(mps: TorchMps) -> None:
    """The kernels of dK and dV have 512 threads where the GPU allows it, else half as many."""
    mps.max_threads = 256
    shapes = [(1, 20, 2, 576), (1, 35, 1, 576), (1, 35, 1, 512)]
    tensors = [mps.tensor(torch.randn(x).half()).requires_grad_() for x in shapes]
    dout = mps.tensor(torch.randn(1, 20, 2, 512).half())
    found = torch.autograd.grad(umfa.flash_attn_func(*tensors), tensors, dout)
    assert mps.waits == 0
    wanted = reference.gradients(*(mps.read(x) for x in (*tensors, dout)))
    gradients = dict(zip(("dq", "dk", "dv"), map(mps.read, found), strict=True))
    assert_gradients(gradients, wanted, RELATIVE["float16"])


def test_an_error_of_the_compiler_names_the_kernel(mps: TorchMps, monkeypatch: Any) -> None:
    def refuse(text: str) -> Any:
        raise RuntimeError("program_source:1:1: error")

    monkeypatch.setattr(torch.mps, "compile_shader", refuse)
    with pytest.raises(RuntimeError) as caught:
        umfa.flash_attn_func(*made(mps, torch.float16, 20, 70))
    assert str(caught.value) == (
        "[umfa.flash_attn_func] torch.mps.compile_shader refused the kernel "
        "forward_f16_d64_v64_k32_q2_f1; got program_source:1:1: error; "
        "expected a macOS whose Metal is 3.1 or newer; else report this as a bug"
    )


def test_simdgroups_of_another_size(mps: TorchMps, monkeypatch: Any) -> None:
    monkeypatch.setattr(Kernel, "thread_execution_width", 16)
    with pytest.raises(umfa.UnsupportedError, match="simdgroups have another size; got 16"):
        umfa.flash_attn_func(*made(mps, torch.float16, 20, 70), causal=True)


def the_wait_of(mps: TorchMps, call: Any) -> str:
    """The reason of the only wait of `call`."""
    before, waits = umfa.stats().waits, mps.waits
    call()
    assert mps.waits == waits + 1
    [reason] = [x for x, n in umfa.stats().waits.items() if n > before.get(x, 0)]
    return reason


def test_what_umfas_own_queue_runs_is_waited_for(mps: TorchMps, monkeypatch: Any) -> None:
    """Each reason is counted, once for a call."""
    q, k, v = made(mps, torch.float16, 20, 70)

    def stream(**options: Any) -> Any:
        record = _ext.Attention(BSHD, query=q, key=k, value=v, backend="auto", **options)
        return stream_of(_torch, prepared(record.options), record.tensors, ("out", "lse"))

    assert isinstance(stream(), _torch_mps.Stream)

    def weights() -> None:
        assert stream(return_attn_probs=True, dropout_p=0.5, dropout_seed=1) is None

    assert the_wait_of(mps, weights) == "the host gathers the matrix of weights"

    def long() -> None:
        assert stream().play({"launches": [{"further_slice": True}]}) == 0

    assert "command buffers of its own" in the_wait_of(mps, long)

    def refused() -> None:
        assert stream() is None

    monkeypatch.setenv("UMFA_TORCH_STREAM", "0")
    assert the_wait_of(mps, refused) == "UMFA_TORCH_STREAM=0"
    monkeypatch.setenv("UMFA_TORCH_STREAM", "yes")
    with pytest.raises(ValueError, match="UMFA_TORCH_STREAM is wrong; got 'yes'; expected '0'"):
        umfa.flash_attn_func(q, k, v)
    monkeypatch.delenv("UMFA_TORCH_STREAM")
    monkeypatch.setenv("PYTORCH_MPS_FAST_MATH", "1")
    assert "PYTORCH_MPS_FAST_MATH" in the_wait_of(mps, refused)
    monkeypatch.setenv("PYTORCH_MPS_FAST_MATH", "0")
    monkeypatch.delattr(torch.mps, "compile_shader")
    assert "has no torch.mps.compile_shader" in the_wait_of(mps, refused)


def test_large_tables_are_copied_once(mps: TorchMps) -> None:
    small, large = bytes(range(250)), bytes(5000)
    device = torch.device("cpu")
    assert np.array(_torch_mps._data(small, device), np.int64).tobytes()[:250] == small

    def copy() -> None:
        assert mps.has(_torch_mps._data(large, device))

    assert "more than 4 KB" in the_wait_of(mps, copy)
    copy()
    assert mps.waits == 1


def test_a_stream_that_takes_nothing(double: Double) -> None:
    """umfa's own queue runs what the stream hands back."""
    arrays = [np.zeros((1, 20, 2, 16), np.float32) for _ in range(3)]
    record = _ext.Attention(BSHD, query=arrays[0], key=arrays[1], value=arrays[2], backend="metal")
    plans = []

    def play(plan: dict[str, Any]) -> int:
        plans.append(plan)
        return 0

    def allocate(like: Any, shape: Any, dtype: str, backend: str) -> Any:
        out = np.zeros(shape, dtype)
        return _numpy.export(out, "f", "out"), out

    before = umfa.stats()
    _ext.attention_forward(record.options, plans_of(record), allocate, arrays[0], "metal", play)
    assert len(plans) == 1
    assert umfa.stats().command_buffers == before.command_buffers + 1
    assert umfa.stats().metal_calls == before.metal_calls + 1


# ---- the stand-in itself -------------------------------------------------------------------------

COPY = """
#include <metal_stdlib>
using namespace metal;
kernel void copy(device const float* from [[buffer(0)]], constant long& more [[buffer(1)]],
                 device float* to [[buffer(2)]], uint i [[thread_position_in_grid]]) {
    to[i] = from[i] + float(more);
}
"""


def test_the_stand_in_runs_later_and_in_order(mps: TorchMps) -> None:
    copy = torch.mps.compile_shader(COPY).copy
    x, y, z = (mps.tensor(torch.full((32,), float(n))) for n in range(3))
    copy(x, 5, y, threads=(32,), group_size=(32,))
    copy(y, (2,), z, threads=(32,), group_size=(32,))
    assert z[0] == 2
    torch.mps.synchronize()
    assert mps.waits == 1
    assert (y == 5).all()
    assert (z == 7).all()


def test_the_stand_in_refuses(mps: TorchMps) -> None:
    copy = torch.mps.compile_shader(COPY).copy
    x, host = mps.tensor(torch.zeros(32)), torch.zeros(32)
    shape = {"threads": (32,), "group_size": (32,)}
    for arguments, words in (
        ((host, 1, x), "Passed CPU tensor"),
        ((x, b"1234", x), "Unsupported argument type"),
        ((x, (), x), "Empty list/tuple"),
        ((x, (1,) * 600, x), "setBytes"),
        ((x, *(1,) * 31), "31 buffers"),
    ):
        with pytest.raises(RuntimeError, match=words):
            copy(*arguments, **shape)
    with pytest.raises(RuntimeError, match="part of a threadgroup"):
        copy(x, 1, x, threads=(33,), group_size=(32,))
    with pytest.raises(RuntimeError, match="exceed"):
        copy(x, 1, x, threads=(2048,), group_size=(2048,))
    with pytest.raises(RuntimeError, match="Number of threads"):
        copy(x, 1, x)
    with pytest.raises(RuntimeError, match="function state object"):
        getattr(torch.mps.compile_shader(COPY), "no_such_kernel")  # noqa: B009
    with pytest.raises(RuntimeError, match="threadgroup memory"):
        torch.mps.compile_shader("kernel void f(threadgroup float* x [[threadgroup(0)]]) {}")
    constant = "constant bool on [[function_constant(0)]];\n"
    with pytest.raises(RuntimeError, match="function constants"):
        torch.mps.compile_shader(
            constant + "kernel void f(device int* x [[buffer(0)]]) { *x = on; }"
        )
    assert mps.queue == []


@pytest.mark.parametrize("dtype", ["int8", "nf4"])
def test_quantising_in_the_stream(mps: TorchMps, dtype: str) -> None:
    """Codes, scales and numbers again, and nothing waits; then tokens into the same memory."""
    x = torch.randn((2, 40, 2, 33), generator=torch.Generator().manual_seed(8))
    expected = umfa.quantize(x, dtype)
    before = umfa.stats()
    found = umfa.quantize(mps.tensor(x), dtype, nonfinite="nan")
    out = found.dequantize(torch.float16)
    found.append(mps.tensor(x[:, :7].flip(1).contiguous()), 30, nonfinite="nan")
    after = umfa.stats()
    assert mps.waits == 0
    assert after.plans_in_stream - before.plans_in_stream == 3
    assert mps.poisoned(out)
    wanted = expected.dequantize(torch.float16)
    assert (mps.read(out) == wanted.double().numpy()).all()
    expected.append(x[:, :7].flip(1).contiguous(), 30)
    for part, other in ((found.data, expected.data), (found.scales, expected.scales)):
        assert (mps.read(part) == other.double().numpy()).all()
    assert found.shape == (2, 40, 2, 33)


def test_quantising_waits_for_numbers_like_nan(mps: TorchMps, monkeypatch: Any) -> None:
    """umfa's own queue runs it, which the stand-in does not have."""
    x = mps.tensor(torch.randn((2, 40, 2, 32)))
    played = []

    def quantize(*arguments: Any) -> tuple[Any, ...]:
        played.append(arguments[-1])
        return (x, x, None)

    monkeypatch.setattr(_ext, "quantize", quantize)
    wait = the_wait_of(mps, lambda: umfa.quantize(x, "int8"))
    assert wait == "nonfinite='raise' has to know of numbers like NaN"
    umfa.quantize(x, "int8", nonfinite="nan")
    assert played[0] is None
    assert callable(played[1])


@pytest.mark.parametrize("rows", [20, 1])
def test_attention_on_codes_in_the_stream(mps: TorchMps, rows: int) -> None:
    """Quantised and attended to, and nothing waits."""
    draw = torch.Generator().manual_seed(8)
    q, k = (torch.randn((2, n, 2, 64), generator=draw).half() for n in (rows, 300))
    keys, values = (
        umfa.quantize(mps.tensor(k), "int8", nonfinite="nan"),
        umfa.quantize(mps.tensor(k), "int4", "block", block=(1, 32), nonfinite="nan"),
    )
    before = umfa.stats()
    out = umfa.quantized_attention(mps.tensor(q), keys, values, causal=True)
    after = umfa.stats()
    assert mps.waits == 0
    assert after.plans_in_stream - before.plans_in_stream == 1
    assert mps.poisoned(out)
    own = umfa.quantize(k, "int8"), umfa.quantize(k, "int4", "block", block=(1, 32))
    seen = [x.dequantize(torch.float16).double().numpy() for x in own]
    wanted, _ = reference.attention(q.double().numpy(), *seen, causal=True)
    assert_close(mps.read(out), wanted, BASE["float16"])
