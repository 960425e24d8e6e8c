"""Mutation testing: change one operator or constant, and see whether a test notices.

    python tools/mutate.py [--count 25] [--seed 1] [--seconds N] [--only PATTERN] [--part 1/4]
                           [--list]

Mutants are drawn with a fixed seed from the kernels (shaders/), the Metal planner, the CPU backend
and the core. For each, umfa is built in a copy of the repository and installed into a directory of
its own, and only the tests that cover the file run (`COVERED`), at most 60 s. A mutant is killed if
it does not build or a test fails. If the time ends first it is counted by itself: that may be an
endless loop, or slow tests. Survivors are printed with their line; the exit status is 1 if there
are more than --allow.

Needs the build requirements of umfa without isolation, as CONTRIBUTING.md installs them.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 60
SURVIVED, LATE = "SURVIVED", "not decided in time"

VALUES = ("tests/core/test_values.py", "tests/core/test_masks.py", "tests/core/test_acceptance.py")
CACHE = ("tests/functional/test_kvcache.py", "tests/functional/test_varlen.py")
BACKWARD = (
    "tests/core/test_backward.py",
    "tests/core/test_backward_extremes.py",
    "tests/core/test_backward_combinations.py",
)
# Files of a pattern: the tests that cover them, and the expression for pytest's -m. Of several
# patterns that match a file, the first counts.
COVERED: dict[str, tuple[tuple[str, ...], str]] = {
    "shaders/forward.metal": (
        ("tests/metal/test_forward_kernel.py", "tests/metal/test_decode_kernel.py"),
        "metal",
    ),
    "shaders/backward.metal": (("tests/metal/test_backward_kernel.py",), "metal"),
    "shaders/row_sums.metal": (("tests/metal/test_backward_kernel.py",), "metal"),
    "shaders/backward_mask.metal": (("tests/metal/test_backward_kernel.py",), "metal"),
    "shaders/decode.metal": (("tests/metal/test_decode_kernel.py",), "metal"),
    "shaders/decode_vector.metal": (("tests/metal/test_decode_kernel.py",), "metal"),
    "shaders/append.metal": (("tests/metal/test_append_kernel.py",), "metal"),
    "shaders/shared/visible.h": ((*VALUES, *CACHE), "not metal"),
    "shaders/shared/softmax.h": (("tests/metal/test_forward_kernel.py",), "metal"),
    "shaders/shared/rotary.h": (("tests/metal/test_rotary_kernel.py",), "metal"),
    "shaders/shared/code_*.h": (("tests/metal/test_quantized_attention.py",), "metal"),
    "shaders/shared/staged_codes.h": (("tests/metal/test_quantized_attention.py",), "metal"),
    "src/metal/plan_codes.cpp": (
        ("tests/metal/test_plan_codes.py", "tests/metal/test_quantized_attention.py"),
        "metal or not metal",
    ),
    "src/metal/plan_backward.cpp": (
        ("tests/metal/test_plan_backward.py", "tests/metal/test_backward_kernel.py"),
        "metal or not metal",
    ),
    "src/metal/plan_sequences.cpp": (
        ("tests/metal/test_plan_forward.py", "tests/metal/test_plan_backward.py"),
        "metal or not metal",
    ),
    "shaders/sequences.metal": (("tests/metal/test_sequences_tables.py",), "metal"),
    "src/core/sequence_bounds.cpp": (
        ("tests/metal/test_sequences_tables.py", "tests/metal/host/test_torch_tables.py"),
        "metal or not metal",
    ),
    "src/metal/plan_tables.cpp": (("tests/metal/test_sequences_tables.py",), "metal"),
    "src/metal/plan_*.cpp": (("tests/metal/test_plan_forward.py", *CACHE), "metal or not metal"),
    "src/cpu/backward*.cpp": (
        (*BACKWARD, "tests/core/test_backward_shared_masks.py"),
        "not metal",
    ),
    "src/cpu/isa/backward_*.h": (BACKWARD, "not metal"),
    "src/core/backward.cpp": ((*BACKWARD, "tests/core/test_backward_bad_input.py"), "not metal"),
    "src/core/gradient_sums.cpp": (BACKWARD, "not metal"),
    "src/cpu/combine.cpp": (("tests/functional/test_combine.py",), "not metal"),
    "src/cpu/quantize.cpp": (("tests/quant",), "not metal"),
    "src/cpu/*.cpp": ((*VALUES, *CACHE), "not metal"),
    "src/cpu/isa/int8_scores.h": (("tests/quant/test_sage.py",), "not metal"),
    "src/cpu/isa/int8_values.h": (("tests/quant/test_int8_mode.py",), "not metal"),
    "src/cpu/isa/*kernel.h": ((*VALUES, *CACHE), "not metal"),
    "src/cpu/isa/decode_*.h": ((*VALUES, *CACHE), "not metal"),
    "src/core/quant*.cpp": (("tests/quant",), "not metal"),
    "src/core/*.cpp": (
        ("tests/core/test_bad_input.py", "tests/core/test_bad_tables.py", *CACHE, *VALUES),
        "not metal",
    ),
}
CHANGES = [
    (r" \+ ", " - "), (r" - ", " + "), (r" < ", " <= "), (r" <= ", " < "), (r" > ", " >= "),
    (r" >= ", " > "), (r" == ", " != "), (r" && ", " || "), (r" \* ", " + "),
    (r"\bmin\(", "max("), (r"\bmax\(", "min("), (r"\btrue\b", "false"), (r" / ", " * "),
]  # fmt: skip


class Mutant(NamedTuple):
    """One change of one line."""

    file: Path  # relative to the repository
    line: int
    before: str
    after: str
    tests: tuple[str, ...]
    expression: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.before.strip()}  ->  {self.after.strip()}"


def mutants() -> list[Mutant]:
    """Every change that could be made, in a fixed order."""
    found = []
    seen: set[Path] = set()
    for pattern, (tests, expression) in COVERED.items():
        for path in sorted(set(ROOT.glob(pattern)) - seen):
            seen.add(path)
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                code = line.split("//")[0]
                if not code.strip() or code.lstrip().startswith(("#", "*", "/*", "template")):
                    continue
                if '"' in code:  # a message is not arithmetic
                    continue
                for old, new in CHANGES:
                    for match in re.finditer(old, code):
                        after = code[: match.start()] + new + code[match.end() :]
                        file = path.relative_to(ROOT)
                        found.append(Mutant(file, number, code, after, tests, expression))
    return found


def choose(count: int, seed: int, only: str) -> list[Mutant]:
    """As many of each group of files, so that no large file takes all."""
    groups: dict[tuple[str, ...], list[Mutant]] = {}
    for mutant in mutants():
        if re.search(only, str(mutant.file)):
            groups.setdefault((mutant.expression, *mutant.tests), []).append(mutant)
    draw = random.Random(seed)
    for group in groups.values():
        draw.shuffle(group)
    chosen: list[Mutant] = []
    while len(chosen) < count and any(groups.values()):
        for group in groups.values():
            if group and len(chosen) < count:
                chosen.append(group.pop())
    return chosen


def part_of(chosen: list[Mutant], part: str) -> list[Mutant]:
    """The mutants of one of several runs side by side, as "2/4"."""
    index, count = (int(x) for x in part.split("/"))
    if not 1 <= index <= count:
        raise SystemExit(f"--part is wrong; got {part!r}; expected '1/1', or as '2/4'")
    return chosen[index - 1 :: count]


def copy_repository(target: Path) -> None:
    names = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    for name in filter(None, names):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name)


def build(tree: Path, site: Path) -> bool:
    """umfa from `tree` into `site`; objects that did not change are kept between mutants."""
    shutil.rmtree(site, ignore_errors=True)
    command = [
        *(sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps"),
        *("--target", str(site), f"--config-settings=build-dir={tree / 'build' / 'mutants'}"),
        str(tree),
    ]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def run_tests(tree: Path, site: Path, mutant: Mutant) -> str:
    """What became of the mutant."""
    command = [
        *(sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-n", "2"),
        *("-m", mutant.expression, *mutant.tests),
    ]
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTEST_ADDOPTS": ""}
    process = subprocess.Popen(
        command, cwd=tree, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        text, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its own session: pytest and its workers
        process.communicate()
        return LATE
    if process.returncode == 0:
        return SURVIVED
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", text, re.MULTILINE)
    if failed is None:  # nothing was collected, or pytest itself failed: no verdict
        raise RuntimeError(f"pytest ended with {process.returncode}:\n{text[-2000:]}")
    return f"killed by {failed[1]}"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python tools/mutate.py", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--count", type=int, default=25)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="a regular expression for files")
    parser.add_argument("--part", default="1/1", help="of several runs side by side: as 2/4")
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    parser.add_argument("--seconds", type=float, help="start no mutant after this time")
    parser.add_argument("--allow", type=int, default=0, help="survivors that are no failure")
    given = parser.parse_args()
    chosen = part_of(choose(given.count, given.seed, given.only), given.part)
    if given.list:
        print(*chosen, sep="\n")
        return 0
    verdicts: list[str] = []
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        tree, site = Path(work) / "tree", Path(work) / "site"
        copy_repository(tree)
        if not build(tree, site):
            raise SystemExit("umfa does not build here: see CONTRIBUTING.md for what it needs")
        for one in {(m.tests, m.expression): m for m in chosen}.values():
            if (verdict := run_tests(tree, site, one)) not in (SURVIVED, LATE):
                raise SystemExit(f"without any mutant, too: {verdict}")
        for mutant in chosen:
            begin = time.monotonic()
            if verdicts and given.seconds and begin > start + given.seconds:
                break
            path = tree / mutant.file
            original = path.read_text(encoding="utf-8")
            lines = original.splitlines(keepends=True)
            lines[mutant.line - 1] = mutant.after + "\n"
            path.write_text("".join(lines), encoding="utf-8")
            # The emulator reads kernels from the tree, not from the library.
            built = path.suffix == ".metal" or build(tree, site)
            verdicts.append(run_tests(tree, site, mutant) if built else "killed by the compiler")
            path.write_text(original, encoding="utf-8")
            seconds = time.monotonic() - begin
            print(f"{mutant}\n    {verdicts[-1]} ({seconds:.0f} s)", flush=True)
            if path.suffix != ".metal" and mutant != chosen[-1]:
                path.touch()
                build(tree, site)  # a kernel's mutant must not run with this one
    survived, late = verdicts.count(SURVIVED), verdicts.count(LATE)
    killed = len(verdicts) - survived - late
    print(f"{killed} killed, {survived} survived, {late} not decided; seed {given.seed}")
    return int(survived > given.allow)


if __name__ == "__main__":
    sys.exit(main())
