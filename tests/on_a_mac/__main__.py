"""python -m tests.on_a_mac [--hosted] [--quick] [--output FILE]; see docs/on-a-mac.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.on_a_mac import report, stages


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.on_a_mac", description=__doc__)
    parser.add_argument("--output", type=Path, default=report.ROOT / "umfa-on-a-mac.md")
    parser.add_argument("--quick", action="store_true", help="a little of everything")
    parser.add_argument(
        "--hosted", action="store_true",
        help="what a hosted Mac's GPU may run; only wrong numbers are a failure",
    )  # fmt: skip
    parser.add_argument("--on-the-double", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--part", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    flags = {"quick": given.quick, "double": given.on_the_double}
    if given.stage:
        return stages.run_here(given.stage, given.part, **flags)
    chosen = stages.HOSTED if given.hosted else stages.OWN
    output = given.output.resolve()
    folder = report.ROOT / "build" / "on-a-mac" / "parts"
    statuses = report.write(chosen, output, folder, **flags)
    print(f"wrote {report.anonymous(str(output))}")
    bad = {stages.WRONG} if given.hosted else set(statuses.values()) - {stages.GOOD}
    return int(any(status in bad for status in statuses.values()))


if __name__ == "__main__":
    sys.exit(main())
