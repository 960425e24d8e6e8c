"""``python -m umfa``: what umfa is on this machine, and whether it computes the right thing."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import umfa
from umfa.cli import bench, demo, env, features, tune

# What a shell reports for a program ended by Ctrl-C: 128 + SIGINT.
INTERRUPTED = 130


def parser() -> argparse.ArgumentParser:
    """The command line; each command's module holds its work."""
    root = argparse.ArgumentParser(
        prog="python -m umfa",
        description="Without a command: show the backends of this machine, run attention on the "
        "shape of FLUX.1 at 512 x 512 pixels, and compare it with a float64 reference. "
        "The exit status is 0 only if they agree.",
    )
    root.add_argument("--version", action="version", version=f"umfa {umfa.__version__}")
    root.set_defaults(run=lambda _: demo.run())
    commands = root.add_subparsers(title="commands", metavar="command")

    description = "Everything about this installation that a bug report needs, and no personal data"
    report = commands.add_parser("env", help="report for a bug report", description=description)
    report.add_argument("--json", action="store_true", help="print JSON and nothing else")
    report.set_defaults(run=lambda arguments: env.run(as_json=arguments.json))

    description = "What each backend can do, as umfa.can_run says"
    table = commands.add_parser(
        "features", help="what each backend can do", description=description
    )
    table.add_argument("--markdown", action="store_true", help="the table of the README")
    table.set_defaults(run=lambda arguments: features.run(as_markdown=arguments.markdown))

    comparison = commands.add_parser(
        "bench", help="speed against other libraries", description=bench.DESCRIPTION
    )
    bench.add_arguments(comparison)
    comparison.set_defaults(run=bench.run)

    choices = commands.add_parser(
        "tune", help="measure this machine's GPU", description=tune.DESCRIPTION
    )
    tune.add_arguments(choices)
    choices.set_defaults(run=tune.run)
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    arguments = parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return run(arguments)
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
