"""Compiled pipelines in the user's cache folder: how often Metal's compiler runs in processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import umfa
from tests.metal.host.test_self_test import forget
from tools.metal import double as metal_double
from tools.metal.double import Double
from tools.metal.double.gpus import Recorder
from umfa.cli import env

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(metal_double.CACHES, str(tmp_path))
    return tmp_path / "umfa"


@pytest.fixture
def double(recorder: Recorder) -> Iterator[Double]:
    with metal_double.machine(recorder, pipeline_archive="1") as machine:
        yield machine


def call(seqlen_q: int = 100, **options: Any) -> None:
    x, y = np.empty((1, seqlen_q, 4, 64), np.float16), np.empty((1, 4096, 4, 64), np.float16)
    umfa.flash_attn_func(x, y, y, backend="metal", **options)


def compiled(double: Double, **options: Any) -> int:
    """Pipelines that Metal's compiler makes for a call, in what might be a new process."""
    forget(double)
    before = double.compiled()[1]
    call(**options)
    return double.compiled()[1] - before


def archives(cache: Path) -> list[Path]:
    return sorted(cache.glob("pipelines-*/*.archive"))


def test_a_pipeline_is_compiled_once(double: Double, cache: Path) -> None:
    before = umfa.stats()
    call()
    assert double.compiled()[1] > 0
    first = double.compiled()
    call()
    assert double.compiled() == first, "the second call compiles nothing"
    assert compiled(double) == 0, "nor does a later process"
    after = umfa.stats()
    assert after.pipelines - before.pipelines == 2
    assert after.pipelines_from_archive - before.pipelines_from_archive == 1
    assert len(archives(cache)) == 1
    assert compiled(double, softcap=5.0) == 1, "other options"
    assert compiled(double, seqlen_q=1) == 2, "keys are split, and merged"
    for options in ({}, {"softcap": 5.0}, {"seqlen_q": 1}):
        assert compiled(double, **options) == 0
    assert len(archives(cache)) == 4
    assert not list(cache.glob("pipelines-*/*.reading"))


def test_warmup_fills_it(double: Double) -> None:
    x = np.empty((1, 100, 4, 64), np.float16)
    assert umfa.warmup(x, x, x, backend="metal").built == 1
    assert compiled(double) == 0


def test_the_limits_of_a_pipeline_are_those_of_the_archive(double: Double) -> None:
    """A pipeline with fewer threads is planned again, whether it was compiled or read."""
    double.set_machine(max_threads=64)
    assert compiled(double) == 2
    assert compiled(double) == 0


def damage(file: Path, how: str) -> None:
    content = file.read_bytes()
    changed = {
        "empty": b"",
        "cut": content[: len(content) // 2],
        "another byte": content[:-3] + b"?" + content[-2:],
        "not text": bytes(range(256)),
    }
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(changed[how])


@pytest.mark.parametrize("how", ["empty", "cut", "another byte", "not text", "missing"])
@pytest.mark.parametrize("which", ["archive", "txt"])
def test_a_damaged_file_is_replaced(which: str, how: str, double: Double, cache: Path) -> None:
    """The double reports a damaged archive that Metal gets to see."""
    call()
    (file,) = cache.glob(f"pipelines-*/*.{which}")
    damage(file, how)
    assert compiled(double) == 1
    assert compiled(double) == 0


def test_another_pipelines_file(double: Double, cache: Path) -> None:
    """A digest may collide: the record names what it is about."""
    call()
    call(softcap=5.0)
    one, other = archives(cache)
    for ending in (".archive", ".txt"):
        other.with_suffix(ending).write_bytes(one.with_suffix(ending).read_bytes())
    assert compiled(double) + compiled(double, softcap=5.0) == 1


def test_what_it_depends_on(double: Double, cache: Path) -> None:
    call()
    record = archives(cache)[0].with_suffix(".txt").read_text()
    assert umfa.__version__ in record
    assert os.uname().release in record
    double.set_machine(name="Apple M4", architecture="applegpu_g16g", family=7)
    assert compiled(double) == 1
    assert len({file.parent for file in archives(cache)}) == 2
    double.set_machine()
    assert compiled(double) == 0


def test_old_folders_are_removed(double: Double, cache: Path) -> None:
    ages = {"pipelines-0": 61, "pipelines-1": 59, "others": 61}
    for name, days in ages.items():
        (cache / name).mkdir(parents=True)
        (cache / name / "file").touch()
        then = time.time() - days * 24 * 3600
        os.utime(cache / name, (then, then))
    call()
    left = {folder.name for folder in cache.iterdir()}
    assert left == {"pipelines-1", "others", archives(cache)[0].parent.name}


@pytest.mark.parametrize("value", ["/proc/nowhere", "relative"])
def test_without_a_folder(value: str, double: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    monkeypatch.setenv("HOME", "/proc/nowhere")
    assert compiled(double) == 1
    assert compiled(double) == 1


@pytest.mark.parametrize("fault", ["archive", "archive_add", "archive_write"])
def test_metal_makes_no_archive(fault: str, double: Double, cache: Path) -> None:
    double.fault(fault)
    assert compiled(double) == 1
    assert archives(cache) == []
    assert compiled(double) == 1
    assert compiled(double) == 0


def test_metal_does_not_open_it(double: Double) -> None:
    call()
    double.fault("archive")
    assert compiled(double) == 1
    assert compiled(double) == 0


def test_a_compiler_error_is_an_error(double: Double, cache: Path) -> None:
    double.fault("pipeline")
    with pytest.raises(RuntimeError, match="Metal could not build the kernel"):
        call()
    assert archives(cache) == []
    call()


def test_off(recorder: Recorder, cache: Path) -> None:
    with metal_double.machine(recorder) as machine:
        assert compiled(machine) == 1
        assert compiled(machine) == 1
    assert not cache.exists()


def test_another_value_is_an_error(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    message = "UMFA_PIPELINE_ARCHIVE is wrong; got 'yes'; expected '0' or '1'"
    with metal_double.machine(recorder, pipeline_archive="yes"):
        with pytest.raises(ValueError, match=message):
            call()
        assert message in env.collect()["backends"][0]["reason"]


# ---- processes ----------------------------------------------------------------------------------

CHILD = """
import json, sys
import numpy as np
import umfa
from tools.metal import double as metal_double
from tools.metal.double.gpus import Recorder

with metal_double.machine(Recorder(), pipeline_archive="1") as double:
    if len(sys.argv) > 1:
        double.fault(sys.argv[1])
    for heads in (1, 2):
        for options in ({}, {"softcap": 2.0}, {"return_lse": True}):
            x = np.empty((1, 40, 2, 64), np.float16)
            umfa.flash_attn_func(x, x, x, backend="metal", **options)
    print(json.dumps([double.compiled()[1], umfa.stats().pipelines]))
"""


def child(*fault: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *fault], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


def outcome_of(process: subprocess.Popen[str]) -> list[int]:
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    found: list[int] = json.loads(text)
    return found


def test_processes(cache: Path) -> None:
    metal_double.load()
    together = [outcome_of(process) for process in [child(), child(), child()]]
    assert {pipelines for _, pipelines in together} == {3}
    assert max(count for count, _ in together) <= 3
    assert outcome_of(child()) == [0, 3], "the last file is whole, whichever process wrote it"
    assert len(archives(cache)) == 3
    files = {file.suffix for file in archives(cache)[0].parent.iterdir()}
    assert files == {".archive", ".txt"}, "nothing else is left"


def test_a_process_that_ends_as_it_reads(cache: Path) -> None:
    """A driver that crashes on an archive must not crash every process from then on."""
    metal_double.load()
    assert outcome_of(child()) == [3, 3]
    dying = child("archive_crash")
    dying.communicate(timeout=120)
    assert dying.returncode == 9
    assert outcome_of(child()) == [1, 3], "that archive is not read again; the others are"
    assert outcome_of(child()) == [1, 3]
