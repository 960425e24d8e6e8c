"""The results as a picture; needs matplotlib, which the extra ``bench`` brings."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from .._errors import message
from .results import CaseResult, Run

UMFA = "#2f6db5"
COLOURS = {"torch": "#d9622b", "jax": "#3d9a6d", "mlx": "#8a63b8", "umfa-full": "#7a7a7a"}


def check(suite: str) -> None:
    """Raise, before anything is measured, where nothing can be drawn.

    Raises
    ------
    ValueError
        The suite has no rates, or matplotlib is not installed.
    """
    if suite in ("models", "quant"):
        what, expected = "a chart shows shares of the machine's limits", "another suite, or --json"
        raise ValueError(message("umfa.bench", what, f"suite {suite}", expected))
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            message(
                "umfa.bench",
                "a chart needs matplotlib",
                "no such module",
                "pip install 'umfa[bench]', or no --chart",
            )
        )


def draw(run: Run, path: Path) -> None:
    """Write a PNG: how many times as fast umfa is, and its share of what the machine can do."""
    check(run.suite)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cases = [case for case in run.cases if case.umfa.median_s is not None and case.limit_rate]
    peers = list(dict.fromkeys(peer.name for case in cases for peer in case.peers))
    height = 1.6 + sum(0.25 + 0.2 * max(1, len(case.peers)) for case in cases)
    figure = Figure(figsize=(11, height), layout="constrained")
    FigureCanvasAgg(figure)
    ratios, shares = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    labelled: set[str] = set()
    places: list[float] = []
    place = 0.0
    for case in cases:
        bars = [peer for peer in case.peers if peer.ratio is not None]
        middle = place + 0.1 * (max(1, len(bars)) - 1)
        places.append(middle)
        for index, peer in enumerate(bars):
            assert peer.ratio is not None
            label = "_" if peer.name in labelled else f"against {peer.name}"
            labelled.add(peer.name)
            y = place + 0.2 * index
            colour = COLOURS.get(peer.name, UMFA)
            ratios.barh(y, peer.ratio, 0.18, color=colour, label=label)
            ratios.annotate(
                f"{peer.ratio:.2f}×", (peer.ratio, y), (3, 0), textcoords="offset points",
                va="center", fontsize=8,
            )  # fmt: skip
            if case.target["ratio"] and peer.name == case.target["against"]:
                ratios.plot([case.target["ratio"]] * 2, [y - 0.12, y + 0.12], color="black", lw=2)
        assert case.share is not None
        shares.barh(middle, 100 * case.share, 0.3, color=UMFA)
        shares.annotate(
            rate(case), (100 * case.share, middle), (3, 0), textcoords="offset points",
            va="center", fontsize=8,
        )  # fmt: skip
        if case.target["share"]:
            at = 100 * case.target["share"]
            shares.plot([at, at], [middle - 0.2, middle + 0.2], color="black", lw=2)
        place += 0.25 + 0.2 * max(1, len(bars))
    if cases:
        ratios.set_yticks(places, [case.name for case in cases])
        ratios.set_ylim(place, -0.3)  # the first case on top
    if peers and labelled:
        ratios.set_xscale("log")
        ratios.xaxis.set_major_formatter("{x:g}")
        ratios.axvline(1, color="gray", lw=0.8)
        ratios.margins(x=0.12)
        ratios.legend(fontsize=8)
    ratios.set_xlabel("times as fast (black: target)")
    shares.set_xlim(0, 125)
    shares.set_xlabel("% of the peak; decode: of the read bandwidth")
    title = f"umfa on {run.machine.cpu}, {run.threads} threads, {run.machine.isa} kernels"
    figure.suptitle(title + (" (--quick: no measurement)" if run.quick else ""))
    figure.savefig(path, dpi=130, format="png")


def rate(case: CaseResult) -> str:
    """umfa's speed in a few characters."""
    unit = "GB/s" if case.unit == "bytes/s" else "GFLOP/s"
    return f"{(case.umfa.rate or 0) / 1e9:.0f} {unit}"
