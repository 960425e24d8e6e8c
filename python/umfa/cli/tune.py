"""``python -m umfa tune``: choose what depends on the GPU by measuring it. Never needed."""

from __future__ import annotations

import argparse
import importlib
import queue
import re
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
from rich.markup import escape
from rich.progress import Progress

import umfa
from umfa import _ext
from umfa.cli import demo, env, terminal

DESCRIPTION = (
    "Measure this machine's GPU and keep the fastest choices in the user's cache folder: how "
    "finely the keys of few queries are split, which tiles the kernels have, and from which size "
    "'auto' uses the GPU for tensors in CPU memory. Results stay right, but their last bits may "
    "differ between machines."
)

SPLITS = (3, 2, 4, 6, 1)
"""Candidates for threadgroups of each GPU core, the default first."""

BETTER = 0.97
"""A candidate must take less than this share of the default's time, or noise would choose."""

DECODE = ((1, 4096, 32, 8, 128), (1, 16384, 32, 8, 128))
"""(batch, keys, heads, key heads, head_dim) of the calls that are timed: Llama 3 8B."""

TILED = (1, 2048, 8)
"""(batch, queries and keys, heads) of the calls that time tiles."""

LENGTHS = (64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536)
"""Queries and keys of the calls on CPU memory: 8 heads of 64, 1e7 to 5e9 FLOP."""

CALLS = 7
"""Timed calls, after one that is not timed. Their median counts."""


T = TypeVar("T")


class OutOfTimeError(Exception):
    """The budget is spent, or the GPU does not answer."""


class Clock:
    """The time budget, and calls that may hang."""

    def __init__(self, seconds: float, patience: float) -> None:
        self.end = time.monotonic() + seconds
        self.patience = patience

    def run(self, body: Callable[[], T]) -> T:
        """`body()` in a thread of its own, which is left behind if it hangs."""
        if time.monotonic() > self.end:
            raise OutOfTimeError("the time budget is spent")
        results: queue.Queue[T | BaseException] = queue.Queue()

        def work() -> None:
            try:
                results.put(body())
            except BaseException as error:
                results.put(error)

        threading.Thread(target=work, daemon=True).start()
        try:
            result = results.get(timeout=self.patience)
        except queue.Empty:
            raise OutOfTimeError(f"the GPU did not answer within {self.patience:g} s") from None
        if isinstance(result, BaseException):
            raise result
        return result


def gpu_seconds(call: Callable[[], Any]) -> float:
    """Time of one call by the GPU's own clock."""
    before = umfa.stats().gpu_seconds
    call()
    return umfa.stats().gpu_seconds - before


def wall_seconds(call: Callable[[], Any]) -> float:
    """Time of one call with everything around the work."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def median(clock: Clock, measure: Callable[[Callable[[], Any]], float], call: Any) -> float:
    """Median of `CALLS` calls."""
    clock.run(lambda: measure(call))
    return statistics.median(clock.run(lambda: measure(call)) for _ in range(CALLS))


def choose_splits(clock: Clock) -> Iterator[tuple[float, int, list[str]]]:
    """Yield (share done, best so far, what was measured)."""
    calls = []
    for batch, keys, heads, heads_kv, head_dim in DECODE:
        query = np.ones((batch, 1, heads, head_dim), np.float16)
        key = np.ones((batch, keys, heads_kv, head_dim), np.float16)
        calls.append(lambda q=query, k=key: umfa.flash_attn_func(q, k, k, backend="metal"))
    threshold = umfa_tuning()["worthwhile_flop"]
    times: dict[int, float] = {}
    lines = []
    for done, count in enumerate(SPLITS, 1):
        _ext.tune(threshold, count, [], keep=False)
        each = [median(clock, gpu_seconds, call) for call in calls]
        times[count] = sum(each)
        shown = ", ".join(f"{1e6 * x:.1f}" for x in each)
        lines.append(f"decode, {count} threadgroups per core: {shown} us on the GPU")
        best = min(times, key=lambda x: times[x])
        chosen = best if times[best] < BETTER * times[SPLITS[0]] else SPLITS[0]
        yield done / len(SPLITS), chosen, lines


def element_type(name: str) -> Any:
    """NumPy's dtype for a kernel's; None where there is none."""
    if name == "f16":
        return np.float16
    if name == "f32":
        return np.float32
    try:
        return importlib.import_module("ml_dtypes").bfloat16
    except ImportError:
        return None


def tiled_call(kernel: str) -> Callable[[], Any] | None:
    """A call that this kernel, or one with other tiles, computes."""
    found = re.fullmatch(r"forward_(\w+?)_d(\d+)_v(\d+)_k\d+", kernel)
    dtype = element_type(found.group(1)) if found else None
    if found is None or dtype is None:
        return None
    batch, length, heads = TILED
    rng = np.random.default_rng(0)
    q, k, v = (
        rng.standard_normal((batch, length, heads, int(d)), np.float32).astype(dtype)
        for d in (found.group(2), found.group(2), found.group(3))
    )
    return lambda: umfa.flash_attn_func(q, k, v, backend="metal")


def agrees(result: Any, expected: Any) -> bool:
    """Whether other tiles round otherwise, and no more than that."""
    share = 1e-4 if expected.dtype == np.float32 else 1e-2
    result, expected = result.astype(np.float32), expected.astype(np.float32)
    with np.errstate(all="ignore"):  # NaN and infinity agree with nothing
        return bool(np.abs(result - expected).max() <= share * np.abs(expected).max())


def fastest_tiles(
    clock: Clock, choices: Sequence[str], use: Callable[[list[str]], Any]
) -> tuple[list[str], str]:
    """What to use instead of the default, and what was measured."""
    default, *others = choices
    call = tiled_call(default)
    if call is None:
        return [], f"{default}: not measured, NumPy has no such dtype"
    use([])
    expected = clock.run(call)
    times, shown = {default: median(clock, gpu_seconds, call)}, []
    for kernel in others:
        use([kernel])
        try:
            if agrees(clock.run(call), expected):
                times[kernel] = median(clock, gpu_seconds, call)
            else:
                shown.append(f"{kernel} is wrong")
        except (RuntimeError, MemoryError) as error:
            shown.append(f"{kernel} does not run: {error}")
    shown = [f"{kernel} {1e6 * x:.1f} us on the GPU" for kernel, x in times.items()] + shown
    best = min(times, key=lambda x: times[x])
    return [best] if times[best] < BETTER * times[default] else [], ", ".join(shown)


def choose_tiles(clock: Clock) -> Iterator[tuple[float, list[str], list[str]]]:
    """Yield (share done, kernels so far, what was measured)."""
    before = umfa_tuning()
    threshold, splits = before["worthwhile_flop"], before["decode_threadgroups_per_core"]
    chosen: list[str] = []
    lines: list[str] = []
    for done, choices in enumerate(before["tile_choices"], 1):
        best, line = fastest_tiles(
            clock,
            choices,
            lambda tiles: _ext.tune(threshold, splits, [], keep=False, tiles=tiles),
        )
        chosen += best
        lines.append(line)
        yield done / len(before["tile_choices"]), chosen, lines


def choose_threshold(clock: Clock) -> Iterator[tuple[float, float, list[str]]]:
    """Yield (share done, FLOP from which the GPU is faster, what was measured)."""
    lines: list[str] = []
    threshold = umfa_tuning()["worthwhile_flop"]
    for done, length in enumerate(reversed(LENGTHS), 1):
        x = np.ones((1, length, 8, 64), np.float16)
        flop = 4.0 * length * length * 8 * 64
        seconds = {
            name: median(
                clock, wall_seconds, lambda x=x, n=name: umfa.flash_attn_func(x, x, x, backend=n)
            )
            for name in ("metal", "cpu")
        }
        shown = ", ".join(f"{name} {1e6 * each:.0f} us" for name, each in seconds.items())
        lines.append(f"{flop:.1e} FLOP: {shown}")
        faster = seconds["metal"] < seconds["cpu"]
        # From the largest down to the first size at which the CPU wins.
        if not faster and done == 1:
            yield 1.0, 1e12, lines  # no size at which the GPU wins was found
            return
        if not faster:
            break
        threshold = flop
        yield done / len(LENGTHS), threshold, lines
    yield 1.0, threshold, lines


def last(
    steps: Iterator[tuple[float, T, list[str]]], progress: Progress, name: str
) -> tuple[T, list[str]]:
    """The choice after all steps, and what was measured."""
    task = progress.add_task(name, total=1.0)
    found = []
    for done, choice, lines in steps:
        progress.update(task, completed=done)
        found = [(choice, lines)]
    return found[0]


def umfa_tuning() -> dict[str, Any]:
    """The choices in use; raises without a GPU."""
    found = _ext.tuning()
    if found is None:
        metal = next(x for x in umfa.backends() if x.name == "metal")
        raise umfa.UnsupportedError(
            f"[umfa.tune] there is no GPU to tune; got {metal.reason}; "
            "expected a Mac with Apple silicon"
        )
    return found


def budget(text: str) -> float:
    """Return a time budget in seconds; also NaN, which would never end, is refused."""
    seconds = float(text)
    if not 0 < seconds <= 180:
        raise argparse.ArgumentTypeError(
            f"the time budget is out of range; got {text}; expected more than 0, at most 180"
        )
    return seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "--seconds", type=budget, default=120.0, help="time budget (default: 120, at most 180)"
    )


def run(arguments: argparse.Namespace, patience: float = 20.0) -> int:
    """Measure, keep, and show; the exit status is 1 if nothing was kept."""
    console = terminal.console()
    try:
        before = umfa_tuning()
    except (umfa.UnsupportedError, ValueError) as error:  # no GPU, or an invalid variable
        console.print(escape(str(error)), soft_wrap=True)
        return 1
    if before["ignored"] == "UMFA_TUNE=0":
        console.print("UMFA_TUNE=0 is set: a record would not be used")
        return 1
    clock = Clock(arguments.seconds, patience)
    splits = before["decode_threadgroups_per_core"]
    threshold = before["worthwhile_flop"]
    tiles = before["tiles"]
    measured: list[str] = []
    try:
        with demo.progress_bar(console) as progress:
            splits, lines = last(choose_splits(clock), progress, "splits")
            measured += lines
            _ext.tune(threshold, splits, [], keep=False)
            tiles, lines = last(choose_tiles(clock), progress, "tiles")
            measured += lines
            _ext.tune(threshold, splits, [], keep=False, tiles=tiles)
            threshold, lines = last(choose_threshold(clock), progress, "CPU or GPU")
            measured += lines
    except (OutOfTimeError, RuntimeError, MemoryError, umfa.UnsupportedError) as error:
        _ext.tune(
            before["worthwhile_flop"], before["decode_threadgroups_per_core"], [],
            keep=False, tiles=before["tiles"],
        )  # fmt: skip
        console.print(escape(f"nothing is kept: {error}"), soft_wrap=True)
        return 1
    kept = _ext.tune(threshold, splits, measured, keep=True, tiles=tiles)
    terminal.print_rows(console, env.tuning_rows(kept))
    return 0 if kept["kept"] else 1
