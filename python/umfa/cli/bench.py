"""``python -m umfa bench``: umfa against other libraries, on this machine."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

import umfa
from umfa import _ext
from umfa._errors import message
from umfa.bench import calls, cases, chart, measure, models, peers, quantised, report, results
from umfa.cli import env, terminal

DESCRIPTION = """Time umfa and other libraries by turns, in one process, with as many threads each,
and compare medians. Results are also compared: the exit status is 1 if umfa and a library, or umfa
and a float64 reference, disagree. Targets that are missed do not change it."""

# Samples of this many alternations and seconds show nothing but that the code runs.
QUICK_REPEATS = 2
QUICK_SAMPLE = 1e-4

# How the kinds of cases are run that are not attention of some size.
RUNS: dict[cases.Kind, Callable[..., results.CaseResult]] = {
    "block": models.run_block,
    "call": calls.run_call,
    "quant": quantised.run_quant,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--suite", choices=sorted(cases.SUITES), default="cpu")
    parser.add_argument(
        "--against",
        default=",".join(peers.PEERS),
        metavar="NAMES",
        help="libraries to compare with, by commas (default: %(default)s); 'none' for none",
    )
    parser.add_argument(
        "--case",
        action="append",
        default=[],
        metavar="NAME",
        help="only cases of this name or pattern, such as 'bf16-*'; may be given again",
    )
    parser.add_argument("--list", action="store_true", help="list the cases and do nothing else")
    parser.add_argument("--long", action="store_true", help="also the cases that take long")
    parser.add_argument(
        "--repeats", type=positive, metavar="N", help="alternations of each case (default: 7)"
    )
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="threads of each (default: umfa's own)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny lengths: shows that it runs, not how fast"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")
    parser.add_argument(
        "--chart", type=Path, metavar="FILE", help="draw a PNG (needs matplotlib: umfa[bench])"
    )
    parser.add_argument(
        "--markdown", action="store_true", help="print the table as docs/performance.md holds it"
    )
    parser.add_argument(
        "--from",
        dest="stored",
        type=Path,
        metavar="FILE",
        help="measure nothing: show the results of an earlier --json",
    )


def positive(text: str) -> int:
    """A number of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def names_of(against: str) -> list[str]:
    """The peers asked for.

    Raises
    ------
    ValueError
        One of them is unknown.
    """
    names = [name.strip() for name in against.split(",") if name.strip()]
    if names == ["none"]:
        return []
    for name in names:
        if name not in peers.PEERS:
            expected = f"some of {', '.join(peers.PEERS)}, or 'none'"
            raise ValueError(message("umfa.bench", "no such library", repr(name), expected))
    return list(dict.fromkeys(names))


def machine() -> results.Machine:
    """This machine, as far as it matters here."""
    return results.Machine(
        cpu=env.cpu_model(),
        cores=env.cores(),
        system=f"{platform.system()} {platform.machine()}",
        isa=_ext.cpu_isa(),
        features=list(_ext.cpu_features()),
        compiler=_ext.compiler(),
    )


def progress_bar(console: Console) -> Progress:
    """A bar that draws on a terminal, between samples only, and is silent elsewhere."""
    return Progress(
        TextColumn("{task.description:<42}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        auto_refresh=False,  # no thread that wakes up while something is timed
        disable=not console.is_terminal,
    )


def measured(arguments: argparse.Namespace, console: Console) -> results.Run:
    """Run the cases that were asked for."""
    if not arguments.quick:
        measure.keep_freed_memory()
    names = names_of(arguments.against)
    chosen = cases.select(arguments.suite, arguments.case, long=arguments.long)
    if arguments.quick:
        chosen = [case.quick() for case in chosen]
    settings = measure.Settings(
        repeats=arguments.repeats or (QUICK_REPEATS if arguments.quick else 7),
        sample_s=QUICK_SAMPLE if arguments.quick else measure.Settings.sample_s,
        quick=arguments.quick,
    )
    threads = arguments.threads or umfa.get_num_threads()
    with peers.settings_restored():
        team = peers.assemble(names, threads)
        run = results.Run(
            suite=arguments.suite,
            threads=threads,
            repeats=settings.repeats,
            quick=settings.quick,
            seed=settings.seed,
            machine=machine(),
            contenders=[
                results.PeerInfo(peer.name, peer.version, peer.threads)
                for peer in (team.umfa, *team.peers)
            ]
            + [results.PeerInfo(name, skipped=reason) for name, reason in team.skipped.items()],
        )
        with progress_bar(console) as progress:
            task = progress.add_task("", total=len(chosen))
            for case in chosen:

                def step(text: str, name: str = case.name) -> None:
                    progress.update(task, description=f"{name}: {text}", refresh=True)

                run_case = RUNS.get(case.kind, measure.run_case)
                run.cases.append(run_case(case, team, settings, step))
                progress.advance(task)
    return run


def list_cases(console: Console) -> None:
    """Names, shapes and targets."""
    for suite, members in cases.SUITES.items():
        rows = {}
        for case in members:
            target = f" (target {case.target.text(case.kind)})" if case.target else ""
            long = " (long: only with --long, or by its name)" if case.long else ""
            rows[case.name] = escape(case.title + target + long)
        console.print(f"suite {suite}: (batch, heads, seqlen, head_dim)\n")
        terminal.print_rows(console, rows)


def check_files(arguments: argparse.Namespace) -> None:
    """Find out before measuring that a result could not be written after it."""
    for path in (arguments.json, arguments.chart):
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(
                message("umfa.bench", "no such folder", path.parent, "a folder that exists")
            )
    if arguments.chart is not None and arguments.stored is None:
        chart.check(arguments.suite)


def run(arguments: argparse.Namespace) -> int:
    """Measure, or read what was measured; show it; the exit status is 0 if the results agree."""
    console = terminal.console()
    if arguments.list:
        list_cases(console)
        return 0
    try:
        check_files(arguments)
        if arguments.stored is not None:
            found = results.from_json(json.loads(arguments.stored.read_text(encoding="utf-8")))
            if arguments.chart is not None:
                chart.check(found.suite)
        else:
            found = measured(arguments, console)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2

    if arguments.json is not None:
        text = json.dumps(results.to_json(found), indent=2, allow_nan=False)
        arguments.json.write_text(text + "\n", encoding="utf-8")
    if arguments.chart is not None:
        chart.draw(found, arguments.chart)
    if arguments.markdown:
        print(report.markdown(found), end="")
    else:
        terminal.print_rows(console, {k: escape(v) for k, v in report.facts(found).items()})
        console.print()
        report.print_table(console, found)
        for note in report.notes(found):
            console.print(note, soft_wrap=True, markup=False)
    for text in found.wrong:
        # Not to standard output alone: the table may be on its way into a file.
        print(f"WRONG RESULT: {text}", file=sys.stderr)
    return 1 if found.wrong else 0
