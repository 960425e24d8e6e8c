"""Runs one of Apple's Metal tools in a build that can do without it.

    python metal_tool.py [--required] --output FILE [--objects FILE...] -- COMMAND...

Where the command fails, the build goes on: the kernels' text is in the library, and Metal compiles
it at run time. What the compiler failed to write becomes an empty file. Where one of the linker's
objects is empty, or the linker fails, there is no output, and the objects are removed so that the
next build tries again. With --required a failure is an error.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ADVICE = (
    "the kernels are not compiled ahead. The library holds their text, and Metal compiles each "
    "when it is first used. UMFA_METALLIB=ON makes this an error, UMFA_METALLIB=OFF does not try."
)


def failure_of(command: list[str], output: Path, objects: list[Path]) -> str:
    """Runs the command; what went wrong, or nothing."""
    output.unlink(missing_ok=True)
    if missing := [path.name for path in objects if not path.stat().st_size]:
        return f"nothing in {', '.join(missing)}"
    try:
        status = subprocess.run(command, check=False).returncode
    except OSError as error:
        return f"{command[0]} does not start: {error.strerror}"
    if status != 0:
        return f"status {status} of: {' '.join(command)}"
    if not output.exists() or not output.stat().st_size:
        return f"nothing written by: {' '.join(command)}"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--required", action="store_true")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--objects", type=Path, nargs="+", default=[], help="what is linked")
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args()
    output: Path = arguments.output
    failure = failure_of(arguments.command, output, arguments.objects)
    if not failure:
        return 0
    output.unlink(missing_ok=True)  # remove a partial output
    print(f"umfa: Apple's Metal compiler failed: {failure}", file=sys.stderr)
    if arguments.required:
        print("umfa: UMFA_METALLIB=ON makes this an error; AUTO goes on without.", file=sys.stderr)
        return 1
    if not arguments.objects:
        output.touch()
        return 0
    for path in arguments.objects:
        path.unlink()
    print(f"umfa: {ADVICE}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
