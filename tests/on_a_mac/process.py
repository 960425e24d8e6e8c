"""A process with a time limit, whose output survives it."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

TAIL = 400  # lines


class Outcome(NamedTuple):
    """How a process ended, and the last lines of its output."""

    status: int
    words: str
    tail: str


def run_limited(
    command: Sequence[str],
    log: Path,
    seconds: float,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Outcome:
    """Run a command; after `seconds` it is killed, with all that it has started."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=folder,
            start_new_session=True,
        )
        late = False
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    status = process.returncode
    if late:
        words = f"was stopped after {seconds:g} s"
    elif status < 0:
        words = f"was ended by signal {-status} ({signal.Signals(-status).name})"
    else:
        words = f"ended with status {status}"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return Outcome(status, words, "\n".join(lines[-TAIL:]))
