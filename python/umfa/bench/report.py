"""The results for readers: one table, aligned for a terminal or as Markdown."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .cases import BURST
from .peers import PEERS
from .results import MEASURED, NOT_MEASURED, NOT_SUPPORTED, CaseResult, Entry, Run

COLUMNS = (
    "case",
    "umfa",
    "of the limit",
    "compared with",
    "its speed",
    "ratio",
    "target",
    "reached",
)
NONE = "–"

# A limit that varies by so much within a case was disturbed.
RESTLESS = 1.2


def seconds(value: float) -> str:
    """A duration with a unit that suits it."""
    if value >= 1:
        return f"{value:.2f} s"
    if value >= 1e-3:
        return f"{value * 1e3:.1f} ms"
    return f"{value * 1e6:.2f} µs"


def speed(entry: Entry, case: CaseResult) -> str:
    """Rate and time of a call, or that there is none; `notes` says why."""
    if entry.status == NOT_MEASURED:
        return NONE
    if entry.status != MEASURED or entry.median_s is None:
        return entry.status
    if case.kind == "overhead" or entry.rate is None:
        return seconds(entry.median_s)
    unit = "GB/s" if case.unit == "bytes/s" else "GFLOP/s"
    digits = 1 if entry.rate < 100e9 else 0
    return f"{entry.rate / 1e9:.{digits}f} {unit}, {seconds(entry.median_s)}"


def share(case: CaseResult) -> str:
    """Share of the peak or bandwidth; of the overhead its microseconds, of formats their loss."""
    if case.overhead_us is not None:
        over = "it" if case.kind == "overhead" else case.target["against"]
        return f"{case.overhead_us:.2f} µs over {over}"
    if case.attention_share is not None and case.attainable is not None:
        return f"attention {case.attention_share:.0%}: {case.attainable:.2f}× attainable"
    if case.cosine is not None and case.relative_l1 is not None:
        loss = f"cosine {case.cosine:.5f}, relative L1 {case.relative_l1:.2%}"
        if case.bytes_ratio is None:
            return loss
        return f"{case.bytes_read / 1e6:.1f} MB, {case.bytes_ratio:.2f}× the bytes; {loss}"
    if case.share is None or case.limit_rate is None:
        return NONE
    unit = "GB/s" if case.unit == "bytes/s" else "GFLOP/s"
    return f"{case.share:.0%} of {case.limit_rate / 1e9:.0f} {unit}"


def rows(run: Run) -> list[list[str]]:
    """One row a case and peer, in the order of `COLUMNS`."""
    table = []
    for case in run.cases:
        against = case.target["against"]
        for peer in case.peers or [Entry(NONE)]:
            judged = peer.name == against or case.kind == "overhead" or not case.peers
            reached = {True: "yes", False: "no", None: NONE}[case.met]
            table.append(
                [
                    case.name,
                    speed(case.umfa, case),
                    share(case),
                    peer.name,
                    speed(peer, case),
                    NONE if peer.ratio is None else f"{peer.ratio:.2f}×",
                    (judged and case.target["text"]) or NONE,
                    reached if judged else NONE,
                ]
            )
    return table


def notes(run: Run) -> list[str]:
    """Why there is no measurement, or one to doubt; a line each."""
    missing = [
        f"{case.name}: {entry.status} by {entry.name}: {entry.reason}"
        if entry.status == NOT_SUPPORTED
        else f"{case.name}: {entry.name} failed: {entry.reason}"
        for case in run.cases
        for entry in (case.umfa, *case.peers)
        if entry.status not in (MEASURED, NOT_MEASURED)
    ]
    # What is measured from registers only varies by a per cent on a machine that does nothing else.
    restless = [
        f"{case.name}: the machine was not quiet: {case.limit} was "
        f"{min(case.limit_samples) / 1e9:.0f} to {max(case.limit_samples) / 1e9:.0f}"
        for case in run.cases
        if case.limit_samples and not run.quick
        if max(case.limit_samples) > RESTLESS * min(case.limit_samples)
    ]
    return missing + restless


def limits(run: Run) -> dict[str, list[float]]:
    """What bounds the cases, with the rates found beside each of them."""
    found: dict[str, list[float]] = {}
    for case in run.cases:
        if case.limit_rate is not None:
            found.setdefault(case.limit, []).append(case.limit_rate)
    return found


def facts(run: Run) -> dict[str, str]:
    """Where and with what it was measured, and what could not be controlled."""
    machine = run.machine
    cores = f"{run.threads} threads of {machine.cores} cores"
    lines = {
        "machine": f"{machine.cpu}, {cores}, {machine.system}",
        "umfa's kernels": f"{machine.isa}, {machine.compiler}",
    }
    for peer in run.contenders:
        if peer.skipped:
            lines[peer.name] = f"skipped: {peer.skipped}"
        else:
            lines[peer.name] = f"{peer.version}, threads: {peer.threads}"
    for name, rates in limits(run).items():
        unit = "GB/s" if name == "read bandwidth" else "GFLOP/s"
        low, high = (f"{rate / 1e9:.0f}" for rate in (min(rates), max(rates)))
        lines[name] = f"{low} {unit}" if low == high else f"{low} to {high} {unit}, case by case"
    lines["method"] = f"medians of {run.repeats} alternations in one process, inputs N(0,1)"
    if any(case.kind in ("call", "overhead") for case in run.cases):
        lines["method"] += f"; of tiny calls, the fastest {BURST} of each alternation"
    if run.quick:
        lines["quick"] = "lengths cut to almost nothing: these numbers say nothing about speed"
    return lines


def print_table(console: Console, run: Run) -> None:
    """For a terminal, which may be narrow; a pipe gets one line a row."""
    body = rows(run)
    if console.is_terminal:
        table = Table(box=None, padding=(0, 2, 0, 0))
        for name in COLUMNS:
            table.add_column(name, style="bold" if name == "case" else "", overflow="fold")
        colours = {"yes": "[green]yes[/]", "no": "[red]no[/]"}
        for row in body:
            cells = [escape(cell) for cell in row]
            table.add_row(*cells[:-1], colours.get(cells[-1], cells[-1]))
        console.print(table)
        return
    widths = [max(map(len, column)) for column in zip(COLUMNS, *body, strict=True)]
    for row in [list(COLUMNS), *body]:
        line = "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        console.print(line.rstrip(), soft_wrap=True, markup=False)


def markdown(run: Run) -> str:
    """What docs/performance.md holds: where it was measured, the table, and each row's command."""
    commands = {case.name: case.command for case in run.cases}
    titles = {case.name: case.title for case in run.cases}
    lines = [f"- {name}: {text}" for name, text in facts(run).items()]
    lines += ["", "| " + " | ".join([*COLUMNS, "command"]) + " |"]
    lines += ["|---" * (len(COLUMNS) + 1) + "|"]
    for row in rows(run):
        name = row[0]
        command = commands[name]
        if row[3] in PEERS:  # else it is umfa itself, or nothing
            command = command.replace("--against torch", f"--against {row[3]}")
        cells = [f"**{name}**: {titles[name]}", *row[1:], f"`{command}`"]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    why = notes(run)
    lines += ["", *(f"- {note}" for note in why)] if why else []
    return "\n".join(lines) + "\n"
