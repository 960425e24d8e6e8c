"""Who takes part: umfa and the libraries that it is compared with, behind one small interface."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

import umfa

from .cases import Case, Dtype

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Call = Callable[[], Any]

DROPOUT_SEED = 1

# Read once, when a library starts its threads; see `limit_threads`.
THREAD_VARIABLES = ("PJRT_NPROC", "NPROC", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


class NotSupportedError(Exception):
    """The library cannot do what the case asks for; the text says why."""


@dataclass(frozen=True)
class Inputs:
    """Query, key and value in float32, already rounded to the case's dtype: conversion is exact."""

    query: Float32
    key: Float32
    value: Float32
    mask: Float32 | npt.NDArray[np.bool_] | None = None
    """(seqlen_q, seqlen_k), added to the scores."""
    dout: Float32 | None = None
    """Gradient of the result, where the case has a backward pass."""


class Contender(Protocol):
    """A library that computes attention. Times include allocation of the result, nothing else."""

    name: str
    version: str
    threads: str
    """What is known about its threads, and what could not be controlled."""

    def prepare(self, case: Case, inputs: Inputs) -> Call:
        """Convert the inputs, and return the call to time, whose result is complete on return.

        With a backward pass, the call returns the output and the gradients of query, key, value
        and, if the case asks for it, of the mask.
        """

    def array(self, out: Any) -> Float64:
        """One result of that call: (batch, seqlen, heads, head_dim), or a mask's gradient."""


def rounded(array: Float32, dtype: Dtype) -> Float32:
    """The nearest values of `dtype`, ties to even, as float32."""
    if dtype == "float16":
        halves: Float32 = array.astype(np.float16).astype(np.float32)
        return halves
    if dtype == "bfloat16":
        bits = array.view(np.uint32)
        kept = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
        nearest: Float32 = kept.astype(np.uint32).view(np.float32)
        return nearest
    return array


def make_inputs(case: Case, seed: int) -> Inputs:
    """N(0,1), the same on every run."""
    random = np.random.default_rng(seed)

    def tensor(*shape: int) -> Float32:
        return rounded(random.standard_normal(shape, dtype=np.float32), case.dtype)

    def mask() -> Float32 | npt.NDArray[np.bool_] | None:
        if not case.mask:
            return None
        scores = tensor(case.seqlen_q, case.seqlen_k)
        return scores > 0 if case.mask == "boolean mask" else scores

    return Inputs(
        tensor(case.batch, case.seqlen_q, case.heads, case.head_dim),
        tensor(case.batch, case.seqlen_k, case.kv_heads, case.head_dim),
        tensor(case.batch, case.seqlen_k, case.kv_heads, case.value_dim),
        mask(),
        tensor(case.batch, case.seqlen_q, case.heads, case.value_dim) if case.backward else None,
    )


def limit_threads(threads: int) -> None:
    """Tell libraries that are not loaded yet; some read it from the environment only."""
    for name in THREAD_VARIABLES:
        os.environ[name] = str(threads)


class Umfa:
    """umfa itself, on tensors of torch where torch takes part, so that both get the same memory.

    NumPy asks the system for huge pages and torch does not, which alone can decide who is faster.
    """

    name = "umfa"
    version = umfa.__version__

    def __init__(self, threads: int, *, torch: bool) -> None:
        umfa.set_num_threads(threads)
        self.threads = f"{threads}, set"
        self.torch = importlib.import_module("torch") if torch else None

    def tensor(self, array: npt.NDArray[Any], dtype: str) -> Any:
        """A tensor of torch, else of NumPy."""
        if self.torch is not None:
            return self.torch.from_numpy(array).to(getattr(self.torch, dtype)).contiguous()
        if dtype != "bfloat16":
            return array.astype(dtype)
        try:
            return array.astype(importlib.import_module("ml_dtypes").bfloat16)
        except ModuleNotFoundError:
            raise NotSupportedError("bfloat16 tensors need torch or ml_dtypes") from None

    def prepare(self, case: Case, inputs: Inputs) -> Call:
        query, key, value = (
            self.tensor(array, case.dtype) for array in (inputs.query, inputs.key, inputs.value)
        )
        options: dict[str, Any] = {
            "causal": case.causal,
            "window_size": case.window,
            "batch_invariant": case.batch_invariant,
            "dropout_p": case.dropout_p,
            "backend": "cpu",
        }
        if case.dropout_p:
            options["dropout_seed"] = DROPOUT_SEED
        if inputs.mask is not None:
            dtype = "bool" if case.mask == "boolean mask" else case.dtype
            options["attn_mask"] = self.tensor(inputs.mask, dtype)
        possible, reason = umfa.can_run(query, key, value, **options)
        if not possible:
            raise NotSupportedError(reason)
        if inputs.dout is None:
            return lambda: umfa.flash_attn_func(query, key, value, **options)
        if self.torch is None:
            raise NotSupportedError("gradients are taken by torch's autograd: --against torch")
        return with_gradients(
            self.torch,
            lambda: umfa.flash_attn_func(query, key, value, **options),
            (query, key, value, *_trained_mask(case, options.get("attn_mask"))),
            self.tensor(inputs.dout, case.dtype),
        )

    def array(self, out: Any) -> Float64:
        return _float64(out.float().numpy() if self.torch is not None else out)


def with_gradients(torch: Any, forward: Call, wanted: tuple[Any, ...], dout: Any) -> Call:
    """The call that computes attention and the gradients of the `wanted` tensors."""
    for tensor in wanted:
        tensor.requires_grad_()

    def call() -> Any:
        out = forward()
        return out.detach(), *torch.autograd.grad(out, wanted, dout)

    return call


def _trained_mask(case: Case, mask: Any) -> tuple[Any, ...]:
    """The mask, if the case asks for its gradient."""
    return (mask,) if case.mask == "float mask with gradient" else ()


class UmfaFull(Umfa):
    """umfa without window and options: what a case of the kind "self" is compared with."""

    name = "umfa-full"

    def prepare(self, case: Case, inputs: Inputs) -> Call:
        return super().prepare(case.plain(), inputs)


class Torch:
    """PyTorch's scaled_dot_product_attention, on contiguous (batch, heads, seqlen, head_dim)."""

    name = "torch"

    def __init__(self, threads: int) -> None:
        self.torch = importlib.import_module("torch")
        self.version = str(self.torch.__version__)
        self.torch.set_num_threads(threads)
        self.threads = f"{self.torch.get_num_threads()}, set"

    def prepare(self, case: Case, inputs: Inputs) -> Call:
        _refuse_window(case, "scaled_dot_product_attention has no sliding window")
        _refuse_top_left(case)
        torch = self.torch
        dtype = getattr(torch, case.dtype)

        def tensor(array: Float32) -> Any:
            return torch.from_numpy(array).to(dtype).transpose(1, 2).contiguous()

        query, key, value = map(tensor, (inputs.query, inputs.key, inputs.value))
        mask = None if inputs.mask is None else torch.from_numpy(inputs.mask)
        options = {
            "attn_mask": mask.to(dtype) if mask is not None and mask.is_floating_point() else mask,
            "dropout_p": case.dropout_p,
            "is_causal": case.causal,
            "enable_gqa": case.kv_heads != case.heads,
        }
        attention = torch.nn.functional.scaled_dot_product_attention
        if inputs.dout is not None:
            wanted = query, key, value, *_trained_mask(case, options["attn_mask"])
            dout = tensor(inputs.dout)
            return with_gradients(
                torch, lambda: attention(query, key, value, **options), wanted, dout
            )

        def call() -> Any:
            with torch.inference_mode():
                return attention(query, key, value, **options)

        return call

    def array(self, out: Any) -> Float64:
        # A mask's gradient has neither batch nor heads.
        return _float64((out.transpose(1, 2) if out.ndim == 4 else out).float().numpy())


class Jax:
    """jax.nn.dot_product_attention, compiled, on (batch, seqlen, heads, head_dim)."""

    name = "jax"

    def __init__(self, threads: int) -> None:
        loaded = "jax" in sys.modules
        self.jax = importlib.import_module("jax")
        importlib.import_module("jax.numpy")
        self.version = str(self.jax.__version__)
        self.threads = (
            "not controlled: JAX was loaded before, and has taken as many as there are CPUs"
            if loaded
            else f"{threads} asked for by PJRT_NPROC at start; XLA has no way to set or check it"
        )

    def prepare(self, case: Case, inputs: Inputs) -> Call:
        _refuse_backward(case)
        _refuse_top_left(case)
        jax = self.jax
        cpu = jax.devices("cpu")[0]
        query, key, value = (
            jax.device_put(jax.numpy.asarray(array, dtype=case.dtype), cpu)
            for array in (inputs.query, inputs.key, inputs.value)
        )
        window = None
        if case.window != (-1, -1):
            if min(case.window) < 0:
                raise NotSupportedError("its window has two bounds")
            window = case.window
        attention = jax.jit(
            lambda q, k, v: jax.nn.dot_product_attention(
                q, k, v, is_causal=case.causal, local_window_size=window
            )
        )
        return lambda: attention(query, key, value).block_until_ready()

    def array(self, out: Any) -> Float64:
        return _float64(out.astype("float32"))


class Mlx:
    """mlx.core.fast.scaled_dot_product_attention on the CPU, (batch, heads, seqlen, head_dim)."""

    name = "mlx"

    def __init__(self, threads: int) -> None:
        loaded = "mlx.core" in sys.modules
        self.mx = importlib.import_module("mlx.core")
        self.version = metadata.version("mlx")
        self.threads = "not controlled: MLX computes in one thread of its own" + (
            "; its BLAS was loaded before, with threads of its own"
            if loaded
            else f", and matrix products in its BLAS, told at start to use {threads}"
        )

    def prepare(self, case: Case, inputs: Inputs) -> Call:
        _refuse_backward(case)
        _refuse_window(case, "scaled_dot_product_attention has no sliding window")
        mx = self.mx
        with mx.stream(mx.cpu):
            query, key, value = (
                mx.contiguous(mx.array(array).astype(getattr(mx, case.dtype)).transpose(0, 2, 1, 3))
                for array in (inputs.query, inputs.key, inputs.value)
            )
            mx.eval(query, key, value)
        scale = case.head_dim**-0.5
        mask = "causal" if case.causal else None

        def call() -> Any:
            out = mx.fast.scaled_dot_product_attention(
                query, key, value, scale=scale, mask=mask, stream=mx.cpu
            )
            mx.eval(out)
            return out

        return call

    def array(self, out: Any) -> Float64:
        with self.mx.stream(self.mx.cpu):
            return _float64(out.transpose(0, 2, 1, 3).astype(self.mx.float32))


PEERS: dict[str, Callable[[int], Contender]] = {"torch": Torch, "jax": Jax, "mlx": Mlx}


@dataclass(frozen=True)
class Team:
    """Everyone who takes part, and the reasons of those who do not."""

    umfa: Contender
    full: Contender
    peers: list[Contender]
    skipped: dict[str, str]


def assemble(names: list[str], threads: int) -> Team:
    """Start umfa and the named peers with so many threads each; the absent are skipped by name."""
    limit_threads(threads)
    peers: list[Contender] = []
    skipped = {}
    for name in names:
        try:
            peers.append(PEERS[name](threads))
        except ModuleNotFoundError as error:
            skipped[name] = f"not installed ({error})"
        except Exception as error:  # a broken installation is not umfa's, nor a reason to stop
            skipped[name] = f"does not start: {brief(error)}"
    torch = any(peer.name == "torch" for peer in peers)
    return Team(Umfa(threads, torch=torch), UmfaFull(threads, torch=torch), peers, skipped)


def brief(error: BaseException) -> str:
    """One line about an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:150]}" if lines else type(error).__name__


def _float64(array: Any) -> Float64:
    return np.asarray(array).astype(np.float64)


def _refuse_backward(case: Case) -> None:
    if case.backward:
        raise NotSupportedError("gradients are compared with torch's only")


def _refuse_window(case: Case, reason: str) -> None:
    if case.window != (-1, -1):
        raise NotSupportedError(reason)


def _refuse_top_left(case: Case) -> None:
    if case.causal and case.seqlen_q != case.seqlen_k:
        raise NotSupportedError("its causal mask starts top-left, umfa's ends bottom-right")


@contextlib.contextmanager
def settings_restored() -> Iterator[None]:
    """Take back what `assemble` has set, for programs that go on."""
    before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    threads = umfa.get_num_threads()
    torch = sys.modules.get("torch")
    torch_threads = torch.get_num_threads() if torch else None
    try:
        yield
    finally:
        umfa.set_num_threads(threads)
        if torch:
            torch.set_num_threads(torch_threads)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
