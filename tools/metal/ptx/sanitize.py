"""The small cases under compute-sanitizer's four tools."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
SECONDS = 180  # for each tool


def sanitize(folder: Path, only: str, tools: tuple[str, ...] = TOOLS) -> int:
    """Runs each tool, prints a line for it, and returns how many found something."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        raise FileNotFoundError("compute-sanitizer is not on the path")
    failed = 0
    for tool in tools:
        command = [
            *(sanitizer, "--tool", tool, "--error-exitcode", "1", "--print-limit", "20"),
            *(sys.executable, "-m", str(__package__), "run", str(folder), "--check", "--small"),
            *("--sanitized", tool, "--only", only),
        ]
        started = time.monotonic()
        log = folder / f"sanitize-{tool}.log"
        with log.open("w") as file:
            try:
                status = subprocess.run(
                    command, stdout=file, stderr=subprocess.STDOUT, timeout=SECONDS, check=False
                ).returncode
            except subprocess.TimeoutExpired:
                status = -1
        said = log.read_text()
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", said)
        ran = re.findall(r"^\d+ of \d+ cases agree.*", said, re.MULTILINE)
        ok = status == 0 and bool(summary) and bool(ran)
        failed += not ok
        print(
            f"{tool:10} {'PASS' if ok else 'FAIL'}  {time.monotonic() - started:5.1f} s  "
            f"{summary[-1] if summary else f'status {status}, no summary'}; "
            f"{ran[-1] if ran else 'no result'}",
            flush=True,
        )
        if not ok:
            print("\n".join(said.splitlines()[-30:]), flush=True)
    return failed
