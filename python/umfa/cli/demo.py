"""``python -m umfa``: attention on a real model's shape, timed and compared with float64."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

import umfa
from umfa.cli import env, terminal

# One joint attention of FLUX.1 at 512 x 512 pixels: 512 text and 1024 image tokens.
# (batch, tokens, heads, head_dim), the layout of flash_attn_func.
FLUX = (1, 1536, 24, 128)

# An element passes when |error| <= ABSOLUTE + RELATIVE * |reference|: what float32 is held to.
ABSOLUTE = 2e-5
RELATIVE = 1e-5

# Timing stops at whichever comes first, so that a slow machine is not kept waiting.
SECONDS = 3.0
CALLS = 12

# Rows of the score matrix that the reference holds at a time.
ROWS = 256

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]


@dataclass
class Error:
    """Difference from the reference, gathered piece by piece; NaN anywhere stays and fails."""

    absolute: float = 0.0  # largest |error|
    share: float = 0.0  # largest |error| as a share of what is allowed
    error_squares: float = 0.0
    reference_squares: float = 0.0

    def add(self, out: Float32, reference: Float64) -> None:
        """Take in one piece of the output."""
        error = np.abs(out - reference)
        allowed = ABSOLUTE + RELATIVE * np.abs(reference)
        self.absolute = float(np.maximum(self.absolute, error.max()))
        self.share = float(np.maximum(self.share, (error / allowed).max()))
        self.error_squares += float(np.square(error).sum())
        self.reference_squares += float(np.square(reference).sum())

    @property
    def relative(self) -> float:
        """Norm of the error over the norm of the reference."""
        return math.sqrt(self.error_squares / self.reference_squares)

    @property
    def within(self) -> bool:
        """Whether every element passes."""
        return self.share <= 1.0  # false for NaN


def inputs(shape: tuple[int, int, int, int]) -> tuple[Float32, Float32, Float32]:
    """Query, key and value, N(0,1), the same on every run."""
    random = np.random.default_rng(0)
    query, key, value = (random.standard_normal(shape, dtype=np.float32) for _ in range(3))
    return query, key, value


def reference_rows(query: Float64, key: Float64, value: Float64) -> Float64:
    """Attention of some rows of one head, by the book."""
    scores = query @ key.T / math.sqrt(query.shape[1])
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    out: Float64 = weights @ value / weights.sum(axis=1, keepdims=True)
    return out


def progress_bar(console: Console) -> Progress:
    """A bar that draws on a terminal and is silent elsewhere."""
    return Progress(
        TextColumn("{task.description:<17}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=console,
        refresh_per_second=5,
        disable=not console.is_terminal,
    )


def timed(
    query: Float32, key: Float32, value: Float32, progress: Progress
) -> tuple[Float32, list[float]]:
    """Call umfa `CALLS` times or for `SECONDS`; return the output and each call's seconds."""
    task = progress.add_task("umfa", total=1.0)
    times: list[float] = []
    done = 0.0
    while done < 1.0:
        start = time.perf_counter()
        out: Float32 = umfa.flash_attn_func(query, key, value)
        times.append(time.perf_counter() - start)
        done = max(len(times) / CALLS, sum(times) / SECONDS)
        progress.update(task, completed=min(done, 1.0))
    return out, times


def compared(
    query: Float32, key: Float32, value: Float32, out: Float32, progress: Progress
) -> Error:
    """Compare with float64, head by head and `ROWS` rows at a time."""
    batch, tokens, heads, _ = query.shape
    starts = range(0, tokens, ROWS)
    task = progress.add_task("float64 reference", total=batch * heads)
    error = Error()
    for b in range(batch):
        for h in range(heads):
            k, v = (tensor[b, :, h].astype(np.float64) for tensor in (key, value))
            for start in starts:
                rows = (b, slice(start, start + ROWS), h)
                error.add(out[rows], reference_rows(query[rows].astype(np.float64), k, v))
            progress.advance(task)
    return error


def run(shape: tuple[int, int, int, int] = FLUX) -> int:
    """Show the machine, compute, compare; the exit status is 0 if the error is within bounds."""
    console = terminal.console()
    report = env.collect()
    console.print(f"[bold]umfa {escape(report['umfa']['version'])}[/]", end="\n\n")
    rows = {
        **env.backend_rows(report),
        **env.self_test_rows(report),
        **env.tuning_rows(report["tuning"]),
        **env.cpu_rows(report),
        **env.problem_rows(report),
    }
    terminal.print_rows(console, rows)
    if report["problems"]:
        return 1

    batch, tokens, heads, head_dim = shape
    console.print(
        f"\nAttention as in FLUX.1 at 512 x 512 pixels: batch {batch}, {heads} heads, "
        f"{tokens} tokens, head_dim {head_dim}, float32",
        soft_wrap=not console.is_terminal,
    )
    query, key, value = inputs(shape)
    possible, reason = umfa.can_run(query, key, value)
    if not possible:  # UMFA_BACKEND asks for one that is not there
        console.print()
        terminal.print_rows(console, {"problem": f"[red]{escape(reason)}[/]"})
        return 1
    with progress_bar(console) as progress:
        out, times = timed(query, key, value, progress)
        error = compared(query, key, value, out, progress)

    # The first call also wakes the threads and touches new memory; it counts only if it is alone.
    kept = times[1:] or times
    seconds = statistics.median(kept)
    operations = 4 * batch * heads * tokens * tokens * head_dim
    calls = f"{len(kept)} calls" if len(kept) > 1 else "1 call"
    rows = {
        "median time": f"{seconds * 1e3:.1f} ms ({calls}, fastest {min(kept) * 1e3:.1f} ms)",
        "speed": f"{operations / seconds / 1e9:.1f} GFLOP/s",
        "largest error": f"{error.absolute:.2e} absolute, {error.share:.1%} of the allowed "
        f"{ABSOLUTE:g} + {RELATIVE:g} * |reference|",
        "relative error": f"{error.relative:.2e} (norm of error / norm of reference)",
    }
    console.print()
    terminal.print_rows(console, rows)
    if error.within:
        console.print("\n[bold green]OK[/]: umfa agrees with the float64 reference.")
        return 0
    console.print("\n[bold red]FAILED[/]: umfa differs from the float64 reference.")
    return 1
