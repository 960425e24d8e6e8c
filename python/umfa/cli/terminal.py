"""Where the commands print: colour and motion on a terminal, plain text everywhere else."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table


def console() -> Console:
    """Return a console on standard output.

    Escape codes go to a terminal only. Rich would also obey FORCE_COLOR and TTY_COMPATIBLE, which
    CI services set for every program they run; a log or a pipe must stay readable all the same.
    """
    return Console(force_terminal=sys.stdout.isatty(), force_jupyter=False, highlight=False)


def print_rows(console: Console, rows: dict[str, str]) -> None:
    """Print names on the left, texts on the right; texts may carry Rich's markup."""
    if console.is_terminal:
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for name, text in rows.items():
            table.add_row(name, text)
        console.print(table)
        return
    # Neither wrapped nor padded: easy to grep, and to compare between machines.
    width = max(map(len, rows))
    for name, text in rows.items():
        for line in text.split("\n"):
            console.print(f"{name:<{width}}  {line}", soft_wrap=True)
            name = ""
