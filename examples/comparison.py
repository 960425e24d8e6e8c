"""What the model examples share: one model with stock attention and with umfa's, by turns.

Both run in one process, on the same weights and inputs. An example ends with an error if umfa has
computed nothing, or if the results differ by more than the example says.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.progress import track

import umfa

STOCK, OURS = "stock", "umfa"

ON_A_MAC = """\
On a Mac: these examples have not run on one. Expect differences of the same size, and other times.
Their tensors are in CPU memory. umfa computes small calls with its kernels for arm64, tested under
QEMU, and gives large ones to the GPU, whose kernels have run on an emulator only.
UMFA_BACKEND=cpu keeps all calls on the CPU."""


@dataclass(frozen=True)
class Comparison:
    """What `compare` has found."""

    what: str
    seconds: dict[str, float]
    """Medians, by attention."""
    difference: float
    calls: int
    """What umfa has computed in one of its turns."""

    def __str__(self) -> str:
        stock, ours = self.seconds[STOCK], self.seconds[OURS]
        return (
            f"{self.what}: stock {1e3 * stock:.1f} ms, umfa {1e3 * ours:.1f} ms "
            f"({stock / ours:.2f}x), difference {self.difference:.1e}, "
            f"{self.calls} calls by umfa"
        )


def relative(ours: Any, stock: Any) -> float:
    """Norm of the difference of two tensors of torch, over the norm of the second."""
    ours, stock = ours.double(), stock.double()
    return float((ours - stock).norm() / stock.norm())


def computed() -> int:
    """The number of calls that umfa has computed in this process."""
    found = umfa.stats()
    return found.cpu_calls + found.metal_calls


def compare(
    what: str,
    use: Callable[[str], Any],
    run: Callable[[], Any],
    *,
    rounds: int,
    tolerance: float,
    differ: Callable[[Any, Any], float] = relative,
) -> Comparison:
    """Run a model `rounds` times with each attention, behind a progress bar, and print the result.

    `use` gets ``"stock"`` or ``"umfa"`` and switches the model, which is not timed. `run` returns
    what `differ` compares.

    Raises
    ------
    SystemExit
        umfa computed nothing, or something in stock's turn, or the results differ by more than
        `tolerance`.
    """
    seconds: dict[str, list[float]] = {STOCK: [], OURS: []}
    results: dict[str, Any] = {}
    calls = dict.fromkeys(seconds, 0)
    # Nobody is always first.
    turns = [name for i in range(rounds) for name in sorted(seconds, reverse=i % 2 == 1)]
    for name in track(turns, f"{what:12}"):
        use(name)
        before, start = computed(), time.perf_counter()
        results[name] = run()
        seconds[name].append(time.perf_counter() - start)
        calls[name] = computed() - before
    use(STOCK)
    if calls[STOCK] or not calls[OURS]:
        raise SystemExit(
            f"{what}: umfa computed {calls[OURS]} calls in its turn, {calls[STOCK]} in stock's"
        )
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    difference = differ(results[OURS], results[STOCK])
    found = Comparison(what, medians, difference, calls[OURS])
    print(found)
    if not difference <= tolerance:  # NaN is a difference
        raise SystemExit(f"{what}: umfa and stock differ by {difference}, more than {tolerance}")
    return found


def finish() -> None:
    """The last lines of every example."""
    print(ON_A_MAC)
    print(umfa.stats())


def positive(number: str) -> int:
    """A number of at least 1, for argparse."""
    if int(number) < 1:
        raise ValueError(number)
    return int(number)
