"""What a tiny call costs in each library: umfa's, the library's own, and one that does nothing."""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import umfa

from .cases import DISABLED, IDENTITY, Case, Library
from .measure import (
    TOLERANCE,
    Settings,
    Step,
    Turn,
    blank,
    counted,
    judge,
    reference_error,
    row_difference,
    sample_burst,
)
from .peers import Call, Float64, Inputs, Team, make_inputs
from .results import MEASURED, NOT_SUPPORTED, CaseResult, Entry


@dataclass(frozen=True)
class Caller:
    """One call to time, with arrays of a library."""

    name: str
    call: Call
    attends: bool = True
    """Whether it returns attention, (batch, heads, seqlen, head_dim)."""
    enter: Callable[[], None] = lambda: None
    """What has to be set before it, which is not timed."""


def _torch(inputs: Inputs) -> list[Caller]:
    torch = importlib.import_module("torch")
    tensors = [torch.from_numpy(array) for array in _by_heads(inputs)]
    stock = torch.nn.functional.scaled_dot_product_attention
    return [
        Caller("umfa", lambda: umfa.scaled_dot_product_attention(*tensors)),
        Caller("torch", lambda: stock(*tensors)),
    ]


def _torch_enabled(inputs: Inputs) -> list[Caller]:
    switch = importlib.import_module("umfa.torch")
    _, stock = _torch(inputs)

    def without() -> None:
        switch.disable()
        switch.uninstall()  # torch is then as it is without umfa

    def switched_off() -> None:
        switch.enable()  # torch has umfa's kernels, which then leave all calls to torch's
        switch.disable()

    return [
        Caller("umfa", stock.call, enter=switch.enable),
        Caller("torch", stock.call, enter=without),
        Caller(DISABLED, stock.call, enter=switched_off),
    ]


def _jax(inputs: Inputs) -> list[Caller]:
    jax = importlib.import_module("jax")
    ours = jax.jit(importlib.import_module("umfa.jax").dot_product_attention)
    stock = jax.jit(jax.nn.dot_product_attention)
    # Without the product, JAX would give the argument back and run nothing.
    nothing = jax.jit(lambda q, k, v: q * 1, keep_unused=True)
    cpu = jax.devices("cpu")[0]
    arrays = [jax.device_put(array, cpu) for array in (inputs.query, inputs.key, inputs.value)]
    return [
        Caller("umfa", lambda: ours(*arrays).block_until_ready()),
        Caller(IDENTITY, lambda: nothing(*arrays).block_until_ready(), attends=False),
        Caller("jax", lambda: stock(*arrays).block_until_ready()),
    ]


def _mlx(inputs: Inputs) -> list[Caller]:
    mx = importlib.import_module("mlx.core")
    with mx.stream(mx.cpu):
        arrays = [mx.array(array) for array in _by_heads(inputs)]
        mx.eval(*arrays)
    scale = inputs.query.shape[-1] ** -0.5

    def ours() -> Any:
        out = umfa.scaled_dot_product_attention(*arrays, backend="cpu")
        mx.eval(out)
        return out

    def stock() -> Any:
        out = mx.fast.scaled_dot_product_attention(*arrays, scale=scale, stream=mx.cpu)
        mx.eval(out)
        return out

    return [Caller("umfa", ours), Caller("mlx", stock)]


CALLERS: dict[Library, Callable[[Inputs], list[Caller]]] = {
    "torch": _torch,
    "torch enabled": _torch_enabled,
    "jax": _jax,
    "mlx": _mlx,
}


def run_call(case: Case, team: Team, settings: Settings, step: Step) -> CaseResult:
    """Measure a tiny call of umfa, and the library's own, by turns."""
    result = blank(case)
    needed = case.library.split()[0]
    if needed not in [peer.name for peer in team.peers]:
        reason = team.skipped.get(needed, f"--against {needed}")
        result.umfa.status, result.umfa.reason = NOT_SUPPORTED, f"needs {needed}: {reason}"
        return result
    inputs = make_inputs(case, settings.seed)
    try:
        _measure(case, result, inputs, settings, step)
    finally:
        if needed == "torch":
            switch = importlib.import_module("umfa.torch")
            switch.disable()
            switch.uninstall()
    judge(case, result, settings)
    return result


def _measure(
    case: Case, result: CaseResult, inputs: Inputs, settings: Settings, step: Step
) -> None:
    turns: list[tuple[Caller, Turn]] = []
    ours: Float64 | None = None
    for caller in CALLERS[case.library](inputs):
        step(f"{caller.name} warms up")
        entry = result.umfa if caller.name == "umfa" else Entry(caller.name)
        turn = Turn(entry, caller.call)
        caller.enter()
        counted(turn, settings.sample_s, by_umfa=entry is result.umfa)
        entry.status = MEASURED
        turns.append((caller, turn))
        if caller.attends:
            out = _rows(case, turn.out)
            if ours is None:
                ours = out
                result.error = reference_error(case, inputs, out)
                result.correct = result.error <= TOLERANCE[case.dtype]
            else:
                entry.difference = row_difference(ours, out)
                entry.agrees = entry.difference <= TOLERANCE[case.dtype]
        turn.out = None
    result.peers = [turn.entry for _, turn in turns[1:]]

    for number in range(settings.repeats):
        step(f"{number + 1} of {settings.repeats}")
        first = number % len(turns)
        for caller, turn in turns[first:] + turns[:first]:
            caller.enter()
            sample_burst(turn)

    for _, turn in turns:
        turn.entry.samples_s = turn.samples
        turn.entry.median_s = statistics.median(turn.samples)
    took = turns[0][1].entry.median_s
    assert took is not None
    for peer in result.peers:
        assert peer.median_s is not None
        peer.ratio = peer.median_s / took
        if peer.name == IDENTITY:
            result.overhead_us = 1e6 * (took - peer.median_s)


def _by_heads(inputs: Inputs) -> list[Any]:
    """(batch, heads, seqlen, head_dim), contiguous."""
    return [
        np.ascontiguousarray(array.transpose(0, 2, 1, 3))
        for array in (inputs.query, inputs.key, inputs.value)
    ]


def _rows(case: Case, out: Any) -> Float64:
    """(batch, seqlen, heads, head_dim) of a result; JAX has it so already."""
    array: Float64 = np.asarray(out).astype(np.float64)
    return array if case.library == "jax" else array.transpose(0, 2, 1, 3)
