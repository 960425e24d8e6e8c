"""The command that a Mac's owner runs, on stand-ins and on the double of Metal."""

from __future__ import annotations

import collections
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import umfa
from tests import mac
from tests.on_a_mac import compile, lanes, report, rows, self_test, shapes, smoke, stages, suite
from tests.on_a_mac.metal import Device
from tests.on_a_mac.part import Part
from tests.on_a_mac.process import Outcome
from tests.on_a_mac.stages import Stage

ROOT = Path(__file__).parents[2]
COMMAND = ROOT / ".ci" / "on-a-mac"
WORKFLOW = (ROOT / ".github" / "workflows" / "wheels.yml").read_text()


def on_the_double(test: Any) -> Any:
    """Mark what runs kernels on the emulator."""
    skip = pytest.mark.skipif(not mac.EMULATOR_RUNS, reason=mac.EMULATOR_REASON)
    return pytest.mark.metal(skip(test))


STUB = """#!/bin/sh
name=$(basename "$0")
# Runs Python's -c as a Python of that version, which can make virtual environments.
answer() {
    pretend="import sys; sys.version_info = $1; sys.modules['ensurepip'] = sys"
    exec "$REAL" -c "$pretend; exec(sys.argv[1])" "$2"
}
echo "$name $*" >>"$CALLS"
case "$name $*" in
"uname -s") echo "${SYSTEM:-Darwin}" ;;
"uname -m") echo "${MACHINE:-arm64}" ;;
"sw_vers "*) echo "${MACOS:-14.6.1}" ;;
"c++ "*) exit "${NO_COMPILER:-0}" ;;
"python3 --version") echo "Python 3.9.6" ;;
"$WORKS --version") echo "Python 3.12.9" ;;
"$WORKS -c "*) answer "(3, 12, 9)" "$2" ;;
"python3 -c "* | "python3.9 -c "*) answer "(3, 9, 6)" "$2" ;;
python3*" -c "*) exit 127 ;;
*" -m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && cp "$0" "$3/bin/pip" ;;
esac
"""
PYTHONS = ("python3", *(f"python3.{minor}" for minor in range(9, 15)))


def run_command(
    folder: Path, *arguments: str, **machine: str
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """`.ci/on-a-mac` copied to `folder`, with stand-ins for what it calls; and the calls."""
    (folder / "clone" / ".ci").mkdir(parents=True)
    programs, calls = folder / "bin", folder / "calls"
    programs.mkdir()
    calls.touch()
    (folder / "clone" / ".ci" / "on-a-mac").write_text(COMMAND.read_text())
    for name in (*PYTHONS, "uname", "sw_vers", "c++"):
        (programs / name).write_text(STUB)
        (programs / name).chmod(0o755)
    done = subprocess.run(
        ["bash", folder / "clone" / ".ci" / "on-a-mac", *arguments],
        env={
            "PATH": f"{programs}:{os.environ['PATH']}",
            "CALLS": str(calls),
            "REAL": sys.executable,
            "WORKS": "python3.12",
            **machine,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    return done, calls.read_text().splitlines()


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        ({"SYSTEM": "Linux"}, "this is Linux on arm64; expected a Mac with Apple silicon"),
        ({"MACHINE": "x86_64"}, "this is Darwin on x86_64; expected a Mac with Apple silicon"),
        ({"MACOS": "13.7"}, "this is macOS 13.7; expected macOS 14 or newer"),
        ({"NO_COMPILER": "1"}, "there is no C++ compiler; expected one, by: xcode-select"),
        (
            {"WORKS": "none"},
            "no Python >= 3.10 with venv; tried python3.10 to python3.14, and python3, which is "
            "Python 3.9.6; expected one from python.org, or by: brew install python@3.13",
        ),
        ({"PYTHON": "python3.9"}, "no Python >= 3.10 with venv; tried python3.9; expected"),
    ],
    ids=["Linux", "Intel", "macOS 13", "no compiler", "Python 3.9", "named Python"],
)
def test_the_command_asks_first_where_it_is(
    machine: dict[str, str], message: str, tmp_path: Path
) -> None:
    done, calls = run_command(tmp_path, **machine)
    assert done.returncode == 2
    assert message in done.stderr
    assert not any(" -m venv" in call for call in calls)


@pytest.mark.parametrize(
    ("arguments", "extras"), [((), "test,frameworks"), (("--hosted",), "test")]
)
def test_the_command_builds_and_runs(
    arguments: tuple[str, ...], extras: str, tmp_path: Path
) -> None:
    done, calls = run_command(tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    assert "Python 3.12.9 on macOS 14.6.1" in done.stdout
    assert f"pip install --quiet .[{extras}] pytest-timeout>=2.3" in calls
    assert calls[-1] == " ".join(["python -m tests.on_a_mac", *arguments])


def test_the_workflows_run_it() -> None:
    hosted = WORKFLOW[WORKFLOW.index("\n  hosted-gpu:") : WORKFLOW.index("\n  gpu:")]
    own = WORKFLOW[WORKFLOW.index("\n  gpu:") :]
    assert "runs-on: macos-" in hosted
    assert "run: bash .ci/on-a-mac --hosted\n" in hosted
    assert "self-hosted" in own
    assert re.search(r"run: bash \.ci/on-a-mac( #.*)?\n", own)
    for job, chosen in ((hosted, stages.HOSTED), (own, stages.OWN)):
        minutes = re.search(r"timeout-minutes: (\d+)", job)
        assert minutes is not None
        assert int(minutes[1]) * 60 > sum(stage.seconds for stage in chosen)
        assert "if: always()" in job, "the report is kept"


def of_faults(name: str, seconds: float = 60) -> Stage:
    return Stage(name, f"Stage {name}", f"tests.on_a_mac.faults:{name}", seconds)


@pytest.mark.parametrize(
    ("name", "said", "words"),
    [
        ("raises", ["before the fault", "RuntimeError: what went wrong"], "not all good"),
        ("killed", ["before the fault", "last words", "ended by signal 9 (SIGKILL)"], "not end"),
        pytest.param(
            "hangs",
            ["before the fault", "was stopped after 10 s"],
            "did not end",
            marks=pytest.mark.slow,
        ),
        ("wrong", ["**WRONG**"], "**wrong**"),
        ("silent", ["Nothing was written."], "good"),
        ("absent", ["has no attribute 'absent'"], "not all good"),
    ],
)
def test_a_stage_that_fails_leaves_its_part_and_the_others(
    name: str, said: list[str], words: str, tmp_path: Path
) -> None:
    output = tmp_path / "report.md"
    broken = of_faults(name, 10 if name == "hangs" else 60)
    statuses = report.write([of_faults("good"), broken, of_faults("good")], output, tmp_path)
    text = output.read_text()
    first, middle, last = text.split("\n## ")[1:]
    for line in said:
        assert line in middle
    assert first.strip() == last.strip() == "Stage good\n\nall is well in ~/somewhere"
    assert f"| Stage {name} | " in text
    assert words in text
    assert statuses["good"] == stages.GOOD
    assert str(ROOT) not in text
    assert str(Path.home()) + "/" not in text


def test_the_report_is_there_after_each_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ends the whole run loses only what has not run."""
    seen = []

    def stage(stage: Stage, *_: Any, **__: Any) -> tuple[int, str]:
        seen.append(output.read_text() if output.exists() else "")
        if stage.name == "wrong":
            raise KeyboardInterrupt
        return 0, f"## {stage.title}\n\nits part\n"

    output = tmp_path / "report.md"
    monkeypatch.setattr(report, "run_stage", stage)
    with pytest.raises(KeyboardInterrupt):
        report.write([of_faults("good"), of_faults("wrong")], output, tmp_path)
    assert "its part" in output.read_text()
    assert "| Stage wrong | not yet run |" in output.read_text()
    assert seen[0] == ""


def test_the_report_names_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "/Users/bob/x /private/var/folders/ab/c1_2/T/umfa.metallib /home/eve/y " + str(ROOT)
    assert report.anonymous(text) == "~/x /tmp/umfa.metallib ~/y umfa"
    monkeypatch.setattr(report, "ROOT", Path("/opt/umfa"))
    assert report.anonymous("/opt/umfa/x /opt/umfa-home/y") == "umfa/x /opt/umfa-home/y"


def test_every_shape_of_the_tables_is_compiled() -> None:
    found = shapes.every_shape()
    names = {shape.name for shape in found}
    for dtype, table in (("f16", "16"), ("f32", "32"), ("bf16_as_f32", "WIDENED")):
        text = (ROOT / "shaders" / "shared" / "forward_shapes.h").read_text()
        rows_of = text[text.index(f"#define UMFA_FORWARD_SHAPES_{table}(X)") :].split("\n\n")[0]
        for d, dv, bk in re.findall(r"X\((\d+), (\d+), (\d+),", rows_of):
            assert f"forward_{dtype}_d{d}_v{dv}_k{bk}" in names
    others = {name for _, name in shapes.alternatives()}
    assert len(others) == 7 + 5 + 2 + 4
    assert others <= names
    text = (ROOT / "shaders" / "shared" / "decode_shapes.h").read_text()
    for d, dv, qf in re.findall(r"X\((\d+), (\d+), (\d+),", text):
        for dtype in ("f16", "bf16", "f32", "bf16_as_f32"):
            assert f"decode_{dtype}_d{d}_v{dv}_q{qf}" in names
    for d, dv in re.findall(r"X\((\d+), (\d+), \d+\)", text):
        assert f"decode_vector_f16_d{d}_v{dv}" in names
    text = (ROOT / "shaders" / "shared" / "backward_shapes.h").read_text()
    for kernel, shapes_of, tiled in (("dq", "DQ", "k"), ("dmask", "DQ", "k"), ("dkv", "DKV", "q")):
        for dtype, table in (("f16", "16"), ("f32", "32"), ("bf16_as_f32", "WIDENED")):
            rows_of = text[text.index(f"#define UMFA_{shapes_of}_SHAPES_{table}(X)") :]
            for d, dv, tile in re.findall(r"X\((\d+), (\d+), (\d+),", rows_of.split("\n\n")[0]):
                assert f"{kernel}_{dtype}_d{d}_v{dv}_{tiled}{tile}" in names
    for start in (
        *("append_", "clear_", "decode_merge_", "delta_", "row_sums_"),
        *("quantize_f", "quantize_scales_", "quantize_gathered_", "dequantize_"),
    ):
        assert sum(name.startswith(start) for name in names) >= (2 if start == "quantize_f" else 3)
    # The kernel's name is told by a #define in front of the text.
    assert all(s.text.startswith("#define ") and "#include" in s.text for s in found)
    assert all(f'#define UMFA_KERNEL "{s.name}"\n' in s.text for s in found)


@on_the_double
class TestOnTheDouble:
    """Stages in this process, on GPUs that refuse, count or compute wrongly."""

    @pytest.fixture
    def part(self, tmp_path: Path) -> Part:
        return Part(tmp_path / "part.md")

    @staticmethod
    def text(part: Part) -> str:
        return part._path.read_text()

    @staticmethod
    def compile(part: Part, gpu: Any, count: int = 2, **machine: Any) -> None:
        from tools.metal import double as metal_double

        with metal_double.machine(gpu) as double:
            double.set_machine(**machine)
            chosen = [s for s in shapes.every_shape() if s.name.startswith(("append", "clear"))]
            with Device() as device:
                compile.compile_all(part, device, chosen[:count])

    def test_what_the_compiler_refuses_is_told_in_full(self, part: Part) -> None:
        from tools.metal.double import gpus

        long = "\n".join(f"program_source:{i}:1: error: no {i}" for i in range(60))

        class Refusing(gpus.Recorder):
            def prepare(self, kernel: Any) -> int:
                if kernel.name == "append_bf16":
                    raise ValueError(long)
                return 64

        self.compile(part, Refusing())
        text = self.text(part)
        assert "| append_bf16 | everything | **refused** |" in text
        assert "| append_f16 | everything | 1024, 64, 32 |" in text, "the others are compiled"
        assert "1 refused: `append_bf16`, everything, text" in text
        assert long in text
        assert part.failures == 1

    def test_few_threads_and_much_memory_are_noted(self, part: Part) -> None:
        from tools.metal.double import gpus

        class Large(gpus.Recorder):
            def prepare(self, kernel: Any) -> int:
                return 40000

        self.compile(part, Large(), count=1, max_threads=64)
        assert "allows 64 threads, planned are 128" in self.text(part)
        assert "takes 40000 bytes of threadgroup memory" in self.text(part)

    def test_a_metallib_is_compared_with_the_text(
        self, part: Part, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The double's metallib is text."""
        from tools.metal.double import gpus

        class Larger(gpus.Recorder):
            def prepare(self, kernel: Any) -> int:
                return 16 if kernel.source == "ahead" else 32

        monkeypatch.setattr(compile._ext, "metallib", lambda: b"ahead")
        self.compile(part, Larger(), count=1)
        assert "| append_bf16 | everything | 1024, 32, 32 | 1024, 16, 32 |" in self.text(part)

    @pytest.mark.parametrize("permuted", [False, True])
    def test_the_lanes(self, permuted: bool, part: Part) -> None:
        from tools.metal import double as metal_double
        from tools.metal.double import gpus
        from tools.metal.emulator import Options

        with metal_double.machine(gpus.Emulator(Options(permute_lanes=permuted))):
            lanes.run(part, quick=True)
        assert ("ANOTHER map" in self.text(part)) == permuted
        assert ("the assumed map" in self.text(part)) != permuted

    def test_rows_on_the_gpu_of_a_hosted_mac(self, part: Part) -> None:
        """umfa refuses the GPU, and the kernels that it can run are right."""
        from tools.metal import double as metal_double
        from tools.metal.double import gpus

        with metal_double.machine(gpus.Emulator()) as double:
            double.set_machine(family=5, name="Apple Paravirtual device")
            assert not umfa.backends()[0].available
            rows.run(part, quick=True)
        assert self.text(part).count("right, bit for bit") == 3
        assert "On Apple Paravirtual device:" in self.text(part)
        assert (part.wrong, part.failures) == (0, 0)

    def test_rows_that_are_wrong_and_rows_that_are_refused(self, part: Part) -> None:
        from tools.metal import double as metal_double
        from tools.metal.double import gpus

        with metal_double.machine(gpus.Recorder()) as double:
            double.fault("library")
            rows.run(part, quick=True)
        assert part.failures == 1
        assert "**append_f16 was refused: MetalError**" in self.text(part)
        assert "expected unqualified-id" in self.text(part)
        assert part.wrong == 2, "a GPU that computes nothing"

    def test_the_self_test_of_a_gpu_that_computes_nothing(self, part: Part) -> None:
        from tools.metal import double as metal_double
        from tools.metal.double import gpus

        with metal_double.machine(gpus.Recorder(), report.self_test_of(stages.SELF_TEST)):
            self_test.run(part, quick=True)
        assert "**combine_f16 is excluded**" in self.text(part)
        assert "is nan, and" in self.text(part)
        assert part.failures == 122
        assert report.self_test_of(stages.SMOKE) == "0"

    def test_a_gpu_that_computes_nothing_fails_the_smoke(
        self, part: Part, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from tools.metal import double as metal_double
        from tools.metal.double import gpus

        case = next(iter(smoke.calls()))
        monkeypatch.setattr(smoke, "calls", lambda: [case])
        with metal_double.machine(gpus.Recorder()):
            smoke.run(part, quick=False)
        assert "1 wrong." in self.text(part)
        assert part.failures == 1

    @pytest.mark.slow
    @pytest.mark.parametrize("case", list(smoke.calls()), ids=lambda c: f"{c.name}, {c.dtype}")
    def test_smoke(self, case: smoke.Call) -> None:
        from tools.metal import double as metal_double
        from tools.metal.double import gpus

        if "512" in case.name:
            pytest.skip("minutes on the emulator")
        with metal_double.machine(gpus.Emulator()):
            found = case.call(backend="metal")
        assert smoke.difference(found, case.call(backend="cpu")) <= smoke.TOLERANCES[case.dtype]


@pytest.mark.parametrize("case", list(smoke.calls()), ids=lambda c: f"{c.name}, {c.dtype}")
def test_the_calls_of_the_smoke_are_sound(case: smoke.Call) -> None:
    found = case.call(backend="cpu")
    assert smoke.difference(found, case.call(backend="cpu")) == 0
    assert all(np.isfinite(np.asarray(array, np.float32)).all() for array in found[:1])


TESTS = """
import os, pytest, time
@pytest.mark.gpu
def test_good(): pass
@pytest.mark.gpu
@pytest.mark.parametrize("i", range(2))
def test_bad(i): raise RuntimeError("the compiler said\\nmuch")
@pytest.mark.gpu
def test_last(): {last}
"""


@pytest.mark.parametrize(
    ("last", "words"),
    [
        pytest.param("os.abort()", "crashed", id="crash", marks=pytest.mark.slow),
        pytest.param(
            "time.sleep(1000)", "was stopped after 20 s", id="hang", marks=pytest.mark.slow
        ),
    ],
)
def test_a_file_of_tests_that_dies_does_not_end_the_stage(
    last: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, good = tmp_path / "test_a.py", tmp_path / "test_b.py"
    bad.write_text(TESTS.format(last=last))
    good.write_text(TESTS.format(last="pass").replace("raise", "pass  #"))
    counts = collections.Counter({str(bad): 4, str(good): 4})
    monkeypatch.setattr(suite, "files_with", lambda *_: counts)
    monkeypatch.setattr(suite, "FILE_SECONDS", 20)
    part = Part(tmp_path / "part.md")
    suite.run_tests(part, suite.VALIDATED, {"PYTEST_ADDOPTS": "-p no:cacheprovider"}, False)
    text = (tmp_path / "part.md").read_text()
    assert words in text
    assert f"| {good} | 4 | 0 | 0 | 0 |" in text
    assert part.failures > 0
    if last == "os.abort()":
        assert "2 failed alike" in text
        assert "RuntimeError: the compiler said\nmuch" in text


def test_how_the_tests_are_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at a time, each with a limit: with Metal's validation, and the slow ones too without."""
    asked: list[tuple[list[str], dict[str, str]]] = []

    def run_limited(command: list[str], log: Path, seconds: float, *given: Any) -> Outcome:
        asked.append((command, given[0]))
        return Outcome(1, "ended with status 1", "")

    for name in suite.VALIDATION:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(suite, "files_with", lambda *_: collections.Counter({"test_a.py": 1}))
    monkeypatch.setattr(suite, "run_limited", run_limited)
    monkeypatch.setattr(suite.importlib.util, "find_spec", lambda _: True)
    part = Part(tmp_path / "part.md")
    suite.run_validated(part, quick=False)
    suite.run_everything(part, quick=False)
    for command, _ in asked:
        assert {"test_a.py", "--timeout=300", "--timeout-method=thread"} <= set(command)
        assert command[command.index("-n") + 1] == "2"
    validated, everything = asked
    assert validated[1].items() >= {"MTL_DEBUG_LAYER": "1", "MTL_SHADER_VALIDATION": "1"}.items()
    assert not set(suite.VALIDATION) & set(everything[1])
    assert "gpu and not slow" in validated[0]
    assert "gpu and (slow or not slow)" in everything[0]


@pytest.mark.slow
def test_tests_that_are_all_skipped_prove_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "test_a.py"
    file.write_text("import pytest\n@pytest.mark.gpu\ndef test_a(): pytest.skip('no GPU')\n")
    monkeypatch.setattr(suite, "files_with", lambda *_: collections.Counter({str(file): 1}))
    part = Part(tmp_path / "part.md")
    suite.run_tests(part, suite.VALIDATED, {}, False)
    assert part.failures == 1
    assert "No test ran" in (tmp_path / "part.md").read_text()


def run_quick(output: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", "tests.on_a_mac", "--quick", "--on-the-double"),
            *("--output", str(output), *arguments),
        ],
        env={**os.environ, "PYTHONPATH": report.search_path(), "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@on_the_double
def test_what_a_hosted_mac_runs(tmp_path: Path) -> None:
    output = tmp_path / "report.md"
    done = run_quick(output, "--hosted")
    assert done.returncode == 0, done.stdout + done.stderr
    text = output.read_text()
    assert [re.findall(r"^\| (.+) \| good \|$", text, re.MULTILINE)] == [
        [stage.title for stage in stages.HOSTED]
    ]
    assert "0 refused." in text


@pytest.mark.slow
@on_the_double
def test_all_of_it(tmp_path: Path) -> None:
    output = tmp_path / "report.md"
    done = run_quick(output)
    assert done.returncode == 1, "torch has no MPS here"
    text = output.read_text()
    good = re.findall(r"^\| (.+) \| good \|$", text, re.MULTILINE)
    assert good == [stage.title for stage in stages.OWN if stage.name != "timing"]
    assert "Not measured" in text
    found = re.findall(r"^\| tests/\S+ \| (\d+) \| 0 \| 0 \| 0 \| \d+ \|$", text, re.MULTILINE)
    assert 0 < int(found[0]) < int(found[1]), "the second run has the slow ones, too"
    assert str(Path.home()) + "/" not in text
