"""Build a bundle here, run it on a machine with an NVIDIA GPU.

    python -m tools.metal.ptx build FOLDER [--cases all|check|time] [--only PATTERN]
    python -m tools.metal.ptx run FOLDER [--check] [--time] [--only PATTERN] [--json OUT]
    python -m tools.metal.ptx sanitize FOLDER [--only PATTERN]

A PATTERN is a regular expression for names of cases.
"""

from __future__ import annotations

import argparse
import json
import re
import secrets
import sys
import time
from pathlib import Path
from typing import Any


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.metal.ptx",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build")
    build.add_argument("--cases", choices=("all", "check", "time"), default="all")
    run = commands.add_parser("run")
    for name in ("check", "time", "small"):
        run.add_argument(f"--{name}", action="store_true")
    run.add_argument("--json", type=Path)
    run.add_argument("--seed", type=int, default=None)
    run.add_argument("--sanitized", default="", help="the tool that watches, for `sanitize`")
    sanitize = commands.add_parser("sanitize")
    for command in (build, run, sanitize):
        command.add_argument("folder", type=Path)
        command.add_argument("--only", default="")
    given = parser.parse_args(arguments)
    if given.command == "build":
        return _build(given)
    if given.command == "sanitize":
        from .sanitize import sanitize as sanitize_all

        return min(1, sanitize_all(given.folder, given.only))
    return _run(given)


def _build(given: argparse.Namespace) -> int:
    from .bundle import build
    from .cases import CHECKS, TIMINGS

    def chosen(purpose: str, cases: list[Any]) -> list[Any]:
        wanted = given.cases in ("all", purpose)
        return [c for c in cases if wanted and re.search(given.only, c.name)]

    started = time.monotonic()
    made = build(given.folder, chosen("check", CHECKS), chosen("time", TIMINGS))
    kernels = {x["ptx"] for case in made["cases"] for x in case["launches"]}
    print(
        f"{len(made['cases'])} cases, {len(kernels)} kernels in {given.folder} "
        f"({time.monotonic() - started:.0f} s)"
    )
    return 0


def _run(given: argparse.Namespace) -> int:
    import cupy

    described = json.loads((given.folder / "cases.json").read_text())["cases"]
    described = [d for d in described if re.search(given.only, d["name"])]
    both = not given.check and not given.time
    seed = secrets.randbits(32) if given.seed is None else given.seed
    device = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    result: dict[str, Any] = {"device": device, "seed": seed}
    print(f"{device}, seed {seed}", flush=True)
    status = 0
    if given.check or both:
        cases = [d for d in described if d["purpose"] == "check"]
        if given.small:
            from .cases import Case

            cases = [d for d in cases if Case.read(d["case"]).small]
        result["checks"] = _check_all(given.folder, cases, seed, given.sanitized)
        status |= not cases or not all(row["ok"] for row in result["checks"])
    if given.time or both:
        cases = [d for d in described if d["purpose"] == "time"]
        result |= _time_all(given.folder, cases, seed)
    if given.json:
        given.json.write_text(json.dumps(result, indent=1))
    return int(status)


def _check_all(
    folder: Path, cases: list[dict[str, Any]], seed: int, sanitized: str
) -> list[dict[str, Any]]:
    from .check import check
    from .placement import GRADIENTS

    rows = []
    print(f"{'':4} {'out/allowed':>11} {'error':>9} {'relative':>9} {'lse':>9}  case")
    for i, one in enumerate(cases):
        row = check(folder, one, seed + i, sanitized=sanitized)
        rows.append(row)
        names = [x for x in ("out", *GRADIENTS) if f"{x}_worst" in row]
        worst, error, relative = (
            max(row[f"{x}_{kind}"] for x in names) for kind in ("worst", "error", "relative")
        )
        print(
            f"{'ok' if row['ok'] else 'FAIL':4} {worst:11.3f} {error:9.2e} "
            f"{relative:9.2e} {row.get('lse_error', 0):9.2e}  {row['name']}",
            flush=True,
        )
    print(f"{sum(r['ok'] for r in rows)} of {len(rows)} cases agree with float64", flush=True)
    return rows


def _time_all(folder: Path, cases: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    from .timing import copy_bandwidth, time

    copy = copy_bandwidth()
    print(f"device-to-device copy: {copy / 1e9:.0f} GB/s read and written")
    print(
        f"{'ms':>9} {'spread':>7} {'TFLOP/s':>8} {'K+V GB/s':>9} {'of copy':>8} {'ratio':>7}  case"
    )
    rows: dict[str, dict[str, Any]] = {}
    for one in cases:
        row = time(folder, one, seed, copy)
        rows[row["label"]] = row
        base = rows.get(row["compared_with"])
        row["ratio"] = base["ms"] / row["ms"] if base else None
        ratio = f"{row['ratio']:6.2f}x" if base else ""
        print(
            f"{row['ms']:9.4f} {row['spread']:6.1%} {row['tflops']:8.1f} {row['kv_gb_per_s']:9.0f} "
            f"{row['share_of_copy']:7.1%} {ratio:>7}  {row['name']}"
            + (f" (to {row['compared_with']})" if base else ""),
            flush=True,
        )
    return {"copy_gb_per_s": copy / 1e9, "timings": list(rows.values())}


if __name__ == "__main__":
    sys.exit(main())
