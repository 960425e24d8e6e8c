"""``python -m umfa`` as a user meets it: in a pipe, on a terminal, and interrupted."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import umfa
from umfa.cli import demo

ESCAPE = b"\x1b"
# A colour among the parameters of an escape sequence that sets text attributes.
COLOUR = re.compile(rb"\x1b\[(?:\d+;)*(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])(?:;\d+)*m")


def environment(**changes: str) -> dict[str, str]:
    """The tests' environment without what would change the output, with `changes`."""
    unwanted = ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS", "UMFA_", "OMP_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(unwanted)}
    return {**kept, "TERM": "xterm-256color", **changes}


def run(*arguments: str, **changes: str) -> subprocess.CompletedProcess[bytes]:
    """Run ``python -m umfa`` with its output in pipes."""
    return subprocess.run(
        [sys.executable, "-m", "umfa", *arguments],
        capture_output=True,
        timeout=120,
        env=environment(**changes),
        stdin=subprocess.DEVNULL,
    )


def run_on_terminal(*arguments: str, **changes: str) -> tuple[int, bytes]:
    """Run ``python -m umfa`` on a pseudo-terminal; returns the exit status and what it drew."""
    return python_on_terminal("-m", "umfa", *arguments, **changes)


def python_on_terminal(*arguments: str, **changes: str) -> tuple[int, bytes]:
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=environment(COLUMNS="100", **changes),
    )
    os.close(slave)
    drawn = b""
    deadline = time.monotonic() + 120
    try:
        while time.monotonic() < deadline:
            if not select.select([master], [], [], 1)[0]:
                continue
            try:
                piece = os.read(master, 65536)
            except OSError:  # Linux's way to say that the other end is closed
                break
            if not piece:
                break
            drawn += piece
        return process.wait(timeout=10), drawn
    finally:
        process.kill()
        process.wait()
        os.close(master)


# ---- the demonstration -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def piped() -> subprocess.CompletedProcess[bytes]:
    # FORCE_COLOR as CI services set it: a pipe gets plain text even so.
    return run(FORCE_COLOR="1")


def test_demo_succeeds_in_a_pipe(piped: subprocess.CompletedProcess[bytes]) -> None:
    assert piped.returncode == 0, piped.stderr
    assert piped.stderr == b""
    text = piped.stdout.decode()
    assert text.startswith(f"umfa {umfa.__version__}\n")
    assert re.search(r"^cpu backend +available$", text, re.MULTILINE)
    assert "1536 tokens" in text
    assert re.search(r"^speed +\d+\.\d GFLOP/s$", text, re.MULTILINE)
    assert re.search(r"^median time +\d+\.\d ms", text, re.MULTILINE)
    assert text.endswith("OK: umfa agrees with the float64 reference.\n")


def test_demo_names_every_backend(piped: subprocess.CompletedProcess[bytes]) -> None:
    text = piped.stdout.decode()
    for backend in umfa.backends():
        line = "available" if backend.available else f"not available: {backend.reason}"
        assert re.search(rf"^{backend.name} backend +{re.escape(line)}$", text, re.MULTILINE)


def test_pipe_gets_neither_escapes_nor_a_bar(piped: subprocess.CompletedProcess[bytes]) -> None:
    assert ESCAPE not in piped.stdout
    assert b"\r" not in piped.stdout
    assert b"%" not in re.sub(rb"[\d.]+% of the allowed", b"", piped.stdout)


FEWER_TOKENS = "from umfa.cli import demo; raise SystemExit(demo.run((1, 512, 24, 128)))"


@pytest.mark.parametrize(
    "arguments",
    [("-c", FEWER_TOKENS), pytest.param(("-m", "umfa"), marks=pytest.mark.slow)],
    ids=["fewer tokens", "whole"],
)
def test_bar_moves_on_a_terminal(arguments: tuple[str, ...]) -> None:
    status, drawn = python_on_terminal(*arguments)
    assert status == 0, drawn.decode(errors="replace")
    assert COLOUR.search(drawn)
    text = drawn.decode()
    assert "━" in text
    assert "float64 reference" in text
    shown = {int(number) for number in re.findall(r"(\d+)%", text)}
    assert 100 in shown
    assert any(0 < number < 100 for number in shown), shown
    assert "OK" in text


def test_ctrl_c_ends_quietly() -> None:
    # A process started in the background of a shell ignores SIGINT, and so would its children.
    code = (
        "import runpy, signal, sys;"
        "signal.signal(signal.SIGINT, signal.default_int_handler);"
        "sys.argv[0] = 'umfa';"
        "runpy.run_module('umfa', run_name='__main__', alter_sys=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(b"Attention as in"):
                break
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == b""
    assert b"OK" not in rest


SMALL = (1, 70, 2, 16)


@pytest.mark.parametrize(
    ("spoil", "status", "verdict"),
    [(0.0, 0, "OK"), (1e-3, 1, "FAILED"), (np.nan, 1, "FAILED")],
)
def test_verdict_follows_the_error(
    spoil: float,
    status: int,
    verdict: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One element off is enough to fail."""
    attention = umfa.flash_attn_func

    def spoiled(*tensors: Any) -> Any:
        out = attention(*tensors)
        out[0, -1, 1, 3] += spoil
        return out

    monkeypatch.setattr(umfa, "flash_attn_func", spoiled)
    assert demo.run(SMALL) == status
    assert verdict in capsys.readouterr().out


# ---- env -------------------------------------------------------------------------------------

# What `env --json` promises: a dict maps keys to shapes, [x] is a list of x, types are types.
SCHEMA = {
    "umfa": {"version": str, "library": str, "compiler": str},
    "python": {"implementation": str, "version": str},
    "platform": {
        "system": str,
        "release": str,
        "machine": str,
        "libc": str | None,
        "macos": str | None,
    },
    "cpu": {
        "model": str,
        "cores": int,
        "features": [str],
        "isa": str | None,
        "isas": [{"name": str, "usable": bool}],
        "threads": int | None,
    },
    "backends": [{"name": str, "available": bool, "reason": str, "device": str}],
    "self_tests": [
        {
            "dtype": str,
            "device": str,
            "system": str,
            "when": str,
            "seconds": float,
            "pipelines": int,
            "faults": dict,
            "kept": str,
            "not_kept": str,
            "tried_again": [str],
        }
    ],
    "tuning": dict | None,
    "environment": dict,
    "packages": dict,
    "problems": [str],
}


def check(value: object, schema: Any, path: str = "report") -> None:
    if isinstance(schema, dict):
        assert isinstance(value, dict), path
        assert set(value) == set(schema), path
        for key, inner in schema.items():
            check(value[key], inner, f"{path}.{key}")
    elif isinstance(schema, list):
        assert isinstance(value, list), path
        for index, item in enumerate(value):
            check(item, schema[0], f"{path}[{index}]")
    else:
        assert isinstance(value, schema), path


def env_json(**changes: str) -> dict[str, Any]:
    result = run("env", "--json", **changes)
    assert result.returncode == 0, result.stderr
    assert result.stderr == b""
    report: dict[str, Any] = json.loads(result.stdout)
    check(report, SCHEMA)
    return report


def test_env_json() -> None:
    report = env_json(OMP_NUM_THREADS="2", UMFA_NUM_THREADS="1")
    assert report["umfa"]["version"] == umfa.__version__
    assert report["python"]["version"] == sys.version.split()[0]
    assert report["packages"]["numpy"] == np.__version__
    assert report["cpu"]["threads"] == 1
    assert report["environment"] == {"OMP_NUM_THREADS": "2", "UMFA_NUM_THREADS": "1"}
    assert report["cpu"]["isa"] in [isa["name"] for isa in report["cpu"]["isas"] if isa["usable"]]
    assert [backend["name"] for backend in report["backends"]] == [b.name for b in umfa.backends()]
    assert report["problems"] == []


def test_env_says_the_same_to_a_reader() -> None:
    result = run("env")
    assert result.returncode == 0, result.stderr
    assert ESCAPE not in result.stdout
    text = result.stdout.decode()
    report = env_json()
    facts = [report["umfa"]["library"], report["cpu"]["model"], report["cpu"]["isa"]]
    facts += [f"{name} {version}" for name, version in report["packages"].items()]
    for fact in facts:
        assert fact in text


VARIABLES = ["UMFA_NUM_THREADS", "UMFA_CPU_ISA", "UMFA_BACKEND", "UMFA_SELF_TEST", "UMFA_TUNE"]


@pytest.mark.parametrize("name", VARIABLES)
def test_env_survives_a_bad_variable(name: str) -> None:
    """The report must work above all where umfa itself does not."""
    report = env_json(**{name: "banana"})
    assert report["environment"][name] == "banana"
    assert len(report["problems"]) == 1
    assert name in report["problems"][0]
    assert "banana" in report["problems"][0]


@pytest.mark.parametrize("name", VARIABLES)
def test_demo_names_a_bad_variable(name: str) -> None:
    result = run(**{name: "banana"})
    assert result.returncode == 1
    assert b"Traceback" not in result.stderr
    assert b"banana" in result.stdout


def test_env_keeps_home_folders_to_itself(tmp_path: Path) -> None:
    home = tmp_path / "alice"
    home.mkdir()
    result = run(
        "env", "--json", HOME=str(home), UMFA_A=f"{home}/models", UMFA_B="/Users/bob/x:/home/eve"
    )
    report = json.loads(result.stdout)
    assert report["environment"] == {"UMFA_A": "~/models", "UMFA_B": "~/x:~"}
    assert b"alice" not in result.stdout


def test_env_imports_no_framework() -> None:
    code = (
        "import sys; from umfa.__main__ import main; main(['env']);"
        "sys.exit(str({'torch', 'jax', 'mlx', 'transformers'} & set(sys.modules) or ''))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, timeout=120, env=environment()
    )
    assert result.stderr.strip() == b""


def test_no_color_is_honoured_on_a_terminal() -> None:
    status, drawn = run_on_terminal("env", NO_COLOR="1")
    assert status == 0
    assert b"available" in drawn
    assert not COLOUR.search(drawn)
    assert COLOUR.search(run_on_terminal("env")[1])


# ---- the command line itself -----------------------------------------------------------------


def test_version() -> None:
    result = run("--version")
    assert (result.returncode, result.stdout) == (0, f"umfa {umfa.__version__}\n".encode())


@pytest.mark.parametrize("arguments", [["--help"], ["env", "--help"]])
def test_help(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.returncode == 0
    assert result.stdout.startswith(b"usage: python -m umfa")


@pytest.mark.parametrize("arguments", [["--fast"], ["flash"], ["env", "--xml"], ["env", "x"]])
def test_unknown_arguments_are_refused(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    assert result.stdout == b""
    assert b"usage: python -m umfa" in result.stderr
    assert arguments[-1].encode() in result.stderr


def test_demo_names_a_backend_that_is_not_there() -> None:
    if any(backend.name == "metal" and backend.available for backend in umfa.backends()):
        pytest.skip("there is a GPU")
    result = run(UMFA_BACKEND="metal")
    assert result.returncode == 1
    assert b"Traceback" not in result.stderr
    assert b"problem" in result.stdout
