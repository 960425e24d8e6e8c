"""How it is measured: by turns, with rests, and with the machine's own limits among the turns."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

import umfa
from umfa import _ext

from .._errors import message
from .cases import BURST, Case
from .peers import (
    DROPOUT_SEED,
    Call,
    Contender,
    Float64,
    Inputs,
    NotSupportedError,
    Team,
    brief,
    make_inputs,
)
from .results import FAILED, MEASURED, NOT_SUPPORTED, CaseResult, Entry

# A row (the head_dim numbers of one query and head) may differ by so much of its norm: loose enough
# for a peer that rounds the weights to the dtype, tight enough for a wrong mask or scale.
TOLERANCE = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}

# Both sides of the comparison are measured, so that a block which reaches its share exactly would
# fail every second time.
AMDAHL_NOISE = 0.97

# Rows compared with float64 for each case.
REFERENCE_ROWS = 12

# Much larger than any cache.
BANDWIDTH_BYTES = 256 << 20
QUICK_BANDWIDTH_BYTES = 8 << 20

Step = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """How much is measured."""

    repeats: int = 7
    sample_s: float = 0.05
    """A sample is the mean of as many calls as take about so long."""
    quick: bool = False
    seed: int = 0


@dataclass
class Turn:
    """One contender while a case runs."""

    entry: Entry
    call: Call
    out: Any = None
    samples: list[float] = field(default_factory=list)


def keep_freed_memory() -> None:
    """Have glibc keep what is freed, for this process.

    It gives large blocks back otherwise, so that the system hands out fresh pages for the result of
    every call, and clears them: 1280 of them, 3 ms, for an attention that takes 3 ms.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    trim_threshold, mmap_max = -1, -4
    mallopt(trim_threshold, 1 << 30)
    mallopt(mmap_max, 0)


def settle(limit_s: float = 0.3) -> None:
    """Wait until no thread of this process computes any more.

    OpenMP's threads and others spin for a while after a call, for the next one. On as many CPUs as
    there are threads, they would slow down the next contender.
    """
    deadline = time.perf_counter() + limit_s
    while time.perf_counter() < deadline:
        start, used = time.perf_counter(), time.process_time()
        time.sleep(0.004)
        if time.process_time() - used < 0.25 * (time.perf_counter() - start):
            return


def warmed(turn: Turn, sample_s: float) -> None:
    """Call until everything has been loaded and compiled; find how many calls a sample takes."""
    start = time.perf_counter()
    turn.out = turn.call()
    seconds = time.perf_counter() - start
    if seconds < 20 * sample_s:  # else one call is more than enough, and a second takes too long
        turn.call()
        start = time.perf_counter()
        turn.call()
        seconds = time.perf_counter() - start
    turn.entry.calls = max(1, min(10000, round(sample_s / max(seconds, 1e-7))))


def counted(turn: Turn, sample_s: float, *, by_umfa: bool) -> None:
    """`warmed`, where a switch decides who computes. A call of the wrong one would be as right.

    Raises
    ------
    RuntimeError
        umfa has computed where the library should have, or the reverse.
    """
    before = umfa.stats()
    warmed(turn, sample_s)
    after = umfa.stats()
    calls = after.cpu_calls - before.cpu_calls + after.metal_calls - before.metal_calls
    if (calls > 0) != by_umfa:
        what, expected = f"{turn.entry.name}: calls by umfa", "some" if by_umfa else "none"
        raise RuntimeError(message("umfa.bench", what, calls, expected))


def sample(turn: Turn) -> None:
    """Time a contender once."""
    settle()
    turn.samples.append(_timed(turn.call, turn.entry.calls))


def sample_burst(turn: Turn) -> None:
    """`sample` of a tiny call: the mean of the fastest burst.

    In the time of a sample, the system lets other programs run, which a call of microseconds is not
    to be charged with.
    """
    settle()
    count = min(BURST, turn.entry.calls)
    turn.samples.append(min(_timed(turn.call, count) for _ in range(turn.entry.calls // count)))


def _timed(call: Call, count: int) -> float:
    """Seconds that a call takes, of so many."""
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def row_difference(out: Float64, reference: Float64) -> float:
    """Largest norm of a row's difference over the norm of the reference's row; NaN stays."""
    difference = np.linalg.norm(out - reference, axis=-1)
    norm = np.maximum(np.linalg.norm(reference, axis=-1), np.finfo(np.float32).tiny)
    return float(np.max(difference / norm))


def gradient_difference(out: Float64, reference: Float64) -> float:
    """As `row_difference`, but rows smaller than the mean row count as if they had its size.

    A small row of a gradient is a difference of large terms: the first causal query's is 0.
    """
    difference = np.linalg.norm(out - reference, axis=-1)
    norm = np.linalg.norm(reference, axis=-1)
    return float(np.max(difference / np.maximum(norm, max(norm.mean(), np.finfo(np.float32).tiny))))


def largest_difference(found: list[Float64], expected: list[Float64]) -> float:
    """The output's row difference, or a gradient's if that is larger; NaN stays."""
    differences = [row_difference(found[0], expected[0])]
    differences += map(gradient_difference, found[1:], expected[1:])
    return float(np.max(differences))


def reference_head(
    case: Case, inputs: Inputs, batch: int, head: int, kept: npt.NDArray[np.bool_] | None
) -> list[Float64]:
    """Output, dQ, dK, dV and dMask of one head by the book, in float64; no grouped heads."""
    assert inputs.dout is not None
    assert case.kv_heads == case.heads
    assert case.window == (-1, -1)
    query, key, value, dout = (
        array[batch, :, head].astype(np.float64)
        for array in (inputs.query, inputs.key, inputs.value, inputs.dout)
    )
    scale = case.head_dim**-0.5
    scores = scale * (query @ key.T)
    if inputs.mask is not None:
        boolean = case.mask == "boolean mask"
        scores = np.where(inputs.mask, scores, -np.inf) if boolean else scores + inputs.mask
    if case.causal:
        behind = case.seqlen_k - case.seqlen_q
        scores[~np.tri(case.seqlen_q, case.seqlen_k, behind, dtype=bool)] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    keep = 1.0 if kept is None else kept[batch, head] / (1 - case.dropout_p)
    out = (weights * keep) @ value
    dscores = weights * ((dout @ value.T) * keep - (dout * out).sum(axis=-1, keepdims=True))
    return [
        out,
        scale * (dscores @ key),
        scale * (dscores.T @ query),
        (weights * keep).T @ dout,
        dscores,
    ]


def kept_weights(case: Case, inputs: Inputs) -> npt.NDArray[np.bool_] | None:
    """Which weights umfa's dropout keeps, (batch, heads, seqlen_q, seqlen_k); None without it."""
    if not case.dropout_p:
        return None
    _, _, weights = umfa.flash_attn_func(
        inputs.query, inputs.key, inputs.value, causal=case.causal, return_attn_probs=True,
        dropout_p=case.dropout_p, dropout_seed=DROPOUT_SEED, backend="cpu",
    )  # fmt: skip
    kept: npt.NDArray[np.bool_] = ~np.signbit(weights)
    return kept


def backward_error(case: Case, inputs: Inputs, found: list[Float64]) -> float:
    """Compare the first and the last head with the book, and the gradient of a mask over all."""
    kept = kept_weights(case, inputs)
    every = [(b, h) for b in range(case.batch) for h in range(case.heads)]
    dmask = len(found) > 4
    worst = 0.0
    total: Float64 = np.zeros(())
    for batch, head in every if dmask else (every[0], every[-1]):
        expected = reference_head(case, inputs, batch, head, kept)
        total = total + expected.pop()
        ours = [array[batch, :, head] for array in found[:4]]
        worst = float(np.maximum(worst, largest_difference(ours, expected)))
    if dmask:
        worst = float(np.maximum(worst, gradient_difference(found[4], total)))
    return worst


def reference_error(case: Case, inputs: Inputs, out: Float64) -> float:
    """Compare some rows, the first and the last among them, with attention by the book."""
    random = np.random.default_rng(1)
    last = case.seqlen_q - 1
    places = [[0, 0, 0], [case.batch - 1, last, case.heads - 1]]
    sizes = (case.batch, case.seqlen_q, case.heads)
    places += random.integers(sizes, size=(REFERENCE_ROWS - 2, 3)).tolist()
    worst = 0.0
    for b, i, h in places:
        kv_head = h // (case.heads // case.kv_heads)
        keys = inputs.key[b, :, kv_head].astype(np.float64)
        values = inputs.value[b, :, kv_head].astype(np.float64)
        scores = keys @ inputs.query[b, i, h].astype(np.float64) * case.head_dim**-0.5
        position = np.arange(case.seqlen_k) - (i + case.seqlen_k - case.seqlen_q)
        left, right = case.window
        right = 0 if case.causal else right
        hidden = ((position > right) & (right >= 0)) | ((position < -left) & (left >= 0))
        scores = np.where(hidden, -np.inf, scores)
        weights = np.exp(scores - scores.max())
        error = row_difference(out[b, i, h], weights @ values / weights.sum())
        worst = float(np.maximum(worst, error))
    return worst


def blank(case: Case) -> CaseResult:
    """The case with nothing measured."""
    target: dict[str, Any] = {"text": "", "ratio": None, "share": None, "microseconds": None}
    target["against"] = None
    if case.target is not None:
        target = {"text": case.target.text(case.kind), **vars(case.target)}
    return CaseResult(
        name=case.name,
        title=case.title,
        kind=case.kind,
        dtype=case.dtype,
        shape={
            "batch": case.batch,
            "heads": case.heads,
            "heads_kv": case.kv_heads,
            "seqlen_q": case.seqlen_q,
            "seqlen_k": case.seqlen_k,
            "head_dim": case.head_dim,
            "head_dim_v": case.value_dim,
        },
        causal=case.causal,
        window=list(case.window),
        operations=case.operations,
        bytes_read=case.bytes_read,
        command=case.command,
        target=target,
        unit="bytes/s" if case.kind == "decode" else "flop/s",
        umfa=Entry("umfa"),
        tolerance=TOLERANCE[case.dtype],
    )


def limit_of(case: Case, settings: Settings) -> tuple[str, Callable[[], float]]:
    """What bounds the case on this machine: its name, and how to measure it."""
    if case.kind == "decode":
        size = QUICK_BANDWIDTH_BYTES if settings.quick else BANDWIDTH_BYTES
        return "read bandwidth", partial(_ext.read_bandwidth, size)
    isa = _ext.cpu_isa()
    family = isa.split("_")[0]
    families = {"amx": ("amx", "avx512")}.get(family, (family,))  # AMX has no loop on float32
    for dtype in (case.dtype, "float32"):  # float32, where a dtype has no arithmetic of its own
        for its_dtype, its_isa in _ext.cpu_peaks():
            if its_dtype == dtype and its_isa.split("_")[0] in families:
                return f"peak of {dtype} {its_isa}", partial(_ext.cpu_peak, dtype, isa)
    raise AssertionError(isa)  # every set of kernels has a float32 loop


def run_case(case: Case, team: Team, settings: Settings, step: Step) -> CaseResult:
    """Measure one case: umfa, the peers and the machine's limit by turns.

    `step` is called with a few words before each turn.
    """
    result = blank(case)
    if case.kind == "overhead":
        return run_overhead(case, result, settings, step)
    inputs = make_inputs(case, settings.seed)
    peers = [team.full] if case.kind == "self" else team.peers
    turns: list[Turn] = []
    ours: list[Float64] = []
    for contender in (team.umfa, *peers):
        step(f"{contender.name} warms up")
        entry = result.umfa if contender is team.umfa else Entry(contender.name)
        if contender is not team.umfa:
            result.peers.append(entry)
        turn = prepared(contender, entry, case, inputs, settings)
        if turn is None:
            if contender is team.umfa:
                return result
            continue
        turns.append(turn)
        found = [contender.array(part) for part in (turn.out if case.backward else [turn.out])]
        turn.out = None
        if contender is team.umfa:
            ours = found
            if case.backward:
                result.error = backward_error(case, inputs, found)
            else:
                result.error = reference_error(case, inputs, found[0])
            result.correct = result.error <= TOLERANCE[case.dtype]
        elif case.kind == "self":
            entry.difference = reference_error(case.plain(), inputs, found[0])
        elif not case.dropout_p:  # with dropout, each library drops other weights
            entry.difference = largest_difference(ours, found)
        if entry.difference is not None:
            entry.agrees = entry.difference <= TOLERANCE[case.dtype]

    result.limit, limit = limit_of(case, settings)
    for number in range(settings.repeats):
        step(f"{number + 1} of {settings.repeats}")
        first = number % len(turns)  # nobody always follows the same one
        for turn in turns[first:] + turns[:first]:
            sample(turn)
        settle()
        result.limit_samples.append(limit())

    result.limit_rate = statistics.median(result.limit_samples)
    amount = case.bytes_read if case.kind == "decode" else case.operations
    for turn in turns:
        finish(turn, amount)
    for turn in turns[1:]:
        assert turn.entry.median_s is not None
        turn.entry.ratio = turn.entry.median_s / statistics.median(turns[0].samples)
        if case.kind == "self":
            turn.entry.rate = case.plain().operations / turn.entry.median_s
    assert result.umfa.rate is not None
    result.share = result.umfa.rate / result.limit_rate
    judge(case, result, settings)
    return result


def prepared(
    contender: Contender, entry: Entry, case: Case, inputs: Inputs, settings: Settings
) -> Turn | None:
    """Ready for the first sample, with a result; None, and the reason in `entry`, if it cannot."""
    try:
        turn = Turn(entry, contender.prepare(case, inputs))
        warmed(turn, settings.sample_s)
    except NotSupportedError as error:
        entry.status, entry.reason = NOT_SUPPORTED, str(error)
        return None
    except Exception as error:
        if contender.name.startswith("umfa"):  # a bug of umfa's is no result
            raise
        # Libraries say so in errors of many types.
        refused = isinstance(error, NotImplementedError) or "not support" in str(error)
        entry.status, entry.reason = NOT_SUPPORTED if refused else FAILED, brief(error)
        return None
    entry.status = MEASURED
    return turn


def finish(turn: Turn, amount: int) -> None:
    """Turn samples into numbers."""
    entry = turn.entry
    entry.samples_s = turn.samples
    entry.median_s = statistics.median(turn.samples)
    entry.rate = amount / entry.median_s


def judge(case: Case, result: CaseResult, settings: Settings) -> None:
    """Say whether the target is reached, where the run can tell."""
    target = case.target
    if target is None or settings.quick:
        return
    verdicts: list[bool | None] = []
    if target.ratio is not None:
        ratios = [peer.ratio for peer in result.peers if peer.name == target.against]
        ratio = ratios[0] if ratios else None
        verdicts.append(None if ratio is None else ratio >= target.ratio)
    if target.share is not None:
        verdicts.append(None if result.share is None else result.share >= target.share)
    if target.microseconds is not None:
        spent = result.overhead_us
        verdicts.append(None if spent is None else spent <= target.microseconds)
    if target.total_us is not None:
        took = result.umfa.median_s
        verdicts.append(None if took is None else 1e6 * took <= target.total_us)
    if target.amdahl:
        verdicts.append(_as_fast_as_attainable(result))
    if False in verdicts:
        result.met = False
    elif None not in verdicts:
        result.met = True


def _as_fast_as_attainable(result: CaseResult) -> bool | None:
    """Whether the block is as much faster as its attention is; None if that was not measured."""
    ratio = next((peer.ratio for peer in result.peers if peer.name == "torch"), None)
    if ratio is None or result.attainable is None:
        return None
    return ratio >= AMDAHL_NOISE * result.attainable


def run_overhead(case: Case, result: CaseResult, settings: Settings, step: Step) -> CaseResult:
    """A call of the public function on NumPy arrays, and the same work called from C++."""
    inputs = make_inputs(case, settings.seed)
    query, key, value = inputs.query, inputs.key, inputs.value
    out = np.empty_like(query)
    function = _ext.Function("umfa.bench")
    options = _ext.Attention(function, query=query, key=key, value=value, backend="cpu").options
    calls = 100 if settings.quick else 5000
    step("umfa warms up")
    got = umfa.flash_attn_func(query, key, value, backend="cpu")
    result.error = reference_error(case, inputs, got.astype(np.float64))
    result.correct = result.error <= TOLERANCE[case.dtype]
    python = Turn(result.umfa, lambda: umfa.flash_attn_func(query, key, value, backend="cpu"))
    python.entry.calls = calls
    kernel = Turn(Entry("kernel alone", calls=calls), lambda: None)
    for number in range(settings.repeats):
        step(f"{number + 1} of {settings.repeats}")
        sample_burst(python)
        settle()
        kernel.samples.append(
            min(
                _ext.time_forward(options, (query, key, value), out, BURST)
                for _ in range(calls // BURST)
            )
        )
    for turn in (python, kernel):
        finish(turn, case.operations)
        turn.entry.status = MEASURED
    result.peers = [kernel.entry]
    result.overhead_us = 1e6 * (
        statistics.median(python.samples) - statistics.median(kernel.samples)
    )
    kernel.entry.difference = row_difference(out.astype(np.float64), got.astype(np.float64))
    kernel.entry.agrees = kernel.entry.difference <= TOLERANCE[case.dtype]
    judge(case, result, settings)
    return result
