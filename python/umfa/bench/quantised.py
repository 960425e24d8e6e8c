"""Quantised keys and values beside those of the case's dtype: speed, bytes and what is lost."""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

import numpy as np

import umfa

from .cases import UNQUANTISED, Case
from .measure import (
    TOLERANCE,
    Settings,
    Step,
    Turn,
    blank,
    judge,
    reference_error,
    sample,
    warmed,
)
from .peers import Float64, Inputs, Team, Umfa, make_inputs, rounded
from .results import MEASURED, CaseResult, Entry

OFFSET = 5.0

MODE_TOLERANCE = 0.1
"""Of a row, where query and key are rounded to int8 and weights are far from equal."""


def inputs_of(case: Case, seed: int) -> Inputs:
    """N(0,1); in every 16th channel of the keys around 5 where the case asks for outliers."""
    inputs = make_inputs(case, seed)
    if not case.outliers:
        return inputs
    key = inputs.key.copy()
    key[..., ::16] += OFFSET
    return replace(inputs, key=rounded(key, case.dtype))


def cosine(a: Float64, b: Float64) -> float:
    """Of the angle between all numbers of both."""
    a, b = a.ravel(), b.ravel()
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def run_quant(case: Case, team: Team, settings: Settings, step: Step) -> CaseResult:
    """Measure both by turns. Quantising a cache is not timed: it happens once."""
    if case.mode:
        return _run_mode(case, team, settings, step)
    assert case.quantised is not None
    result = blank(case)
    inputs = inputs_of(case, settings.seed)
    form: dict[str, Any] = vars(case.quantised)
    assert isinstance(team.umfa, Umfa)
    query, key, value = (
        team.umfa.tensor(array, case.dtype) for array in (inputs.query, inputs.key, inputs.value)
    )
    step("quantises")
    keys, values = (umfa.quantize(tensor, **form) for tensor in (key, value))
    options: dict[str, Any] = {"causal": case.causal, "backend": "cpu"}
    result.peers = [Entry(UNQUANTISED)]
    turns = [
        Turn(result.umfa, lambda: umfa.quantized_attention(query, keys, values, **options)),
        Turn(result.peers[0], lambda: umfa.quantized_attention(query, key, value, **options)),
    ]
    step("warms up")
    for turn in turns:
        warmed(turn, settings.sample_s)
    found = team.umfa.array(turns[0].out)
    numbers = (team.umfa.array(part.dequantize()).astype(np.float32) for part in (keys, values))
    result.error = reference_error(case, Inputs(inputs.query, *numbers), found)
    result.correct = result.error <= TOLERANCE[case.dtype]
    _add_loss(case, result, inputs, found)
    result.bytes_read = keys.nbytes + values.nbytes
    result.bytes_ratio = result.bytes_read / case.bytes_read
    _measure(turns, settings, step)
    result.peers[0].ratio = statistics.median(turns[1].samples) / statistics.median(
        turns[0].samples
    )
    judge(case, result, settings)
    return result


def _run_mode(case: Case, team: Team, settings: Settings, step: Step) -> CaseResult:
    """Measure all by turns, what the call quantises included."""
    result = blank(case)
    inputs = inputs_of(case, settings.seed)
    assert isinstance(team.umfa, Umfa)
    tensors = [
        team.umfa.tensor(array, case.dtype) for array in (inputs.query, inputs.key, inputs.value)
    ]
    options: dict[str, Any] = {"causal": case.causal, "backend": "cpu"}
    result.peers = [Entry(UNQUANTISED), *(Entry(peer.name) for peer in team.peers)]
    calls = [
        lambda: umfa.quantized_attention(*tensors, mode=case.mode, **options),
        lambda: umfa.quantized_attention(*tensors, **options),
        *(peer.prepare(case, inputs) for peer in team.peers),
    ]
    turns = [Turn(*x) for x in zip((result.umfa, *result.peers), calls, strict=True)]
    step("warms up")
    for turn in turns:
        warmed(turn, settings.sample_s)
    found = team.umfa.array(turns[0].out)
    result.tolerance = MODE_TOLERANCE
    result.error = reference_error(case, inputs, found)
    result.correct = result.error <= MODE_TOLERANCE
    _add_loss(case, result, inputs, found)
    _measure(turns, settings, step)
    for turn in turns[1:]:
        ratio = statistics.median(turn.samples) / statistics.median(turns[0].samples)
        turn.entry.ratio = ratio
    judge(case, result, settings)
    return result


def _add_loss(case: Case, result: CaseResult, inputs: Inputs, found: Float64) -> None:
    exact = umfa.flash_attn_func(inputs.query, inputs.key, inputs.value, causal=case.causal)
    result.cosine = cosine(found, exact.astype(np.float64))
    result.relative_l1 = float(np.abs(found - exact).sum() / np.abs(exact).sum())


def _measure(turns: list[Turn], settings: Settings, step: Step) -> None:
    for number in range(settings.repeats):
        step(f"{number + 1} of {settings.repeats}")
        for turn in turns if number % 2 else turns[::-1]:
            sample(turn)
    for turn in turns:
        turn.entry.samples_s = turn.samples
        turn.entry.median_s = statistics.median(turn.samples)
        turn.entry.status = MEASURED
