"""Compiles the CPU backend for arm64 Linux with PyPI's ``ziglang`` and runs it under QEMU.

    apt-get download qemu-user-static && dpkg -x qemu-user-static_*.deb FOLDER
    export QEMU_AARCH64=FOLDER/usr/bin/qemu-aarch64-static

zig keeps what it has compiled, its C++ library (a minute) among it, in the folder of the emulator
of Metal's libraries.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools.metal.emulator.build import cache_folder

ROOT = Path(__file__).parents[2]
ISA = ROOT / "src" / "cpu" / "isa"

FLAGS = (
    *("-target", "aarch64-linux-musl", "-static", "-std=c++20", "-DNDEBUG", "-g0"),
    *("-Wall", "-Wextra", "-Werror", "-fno-sanitize=undefined"),
    *("-DUMFA_BUILDING", '-DUMFA_VERSION="0"'),
    *(f"-I{ROOT / folder}" for folder in ("include", "src", "shaders")),
)
KERNEL_FLAGS = ("-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
# CMakeLists.txt's -march=armv8.2-a+bf16 and so on, in zig's words.
EXTENSIONS = {"neon_bf16.cpp": ("-mcpu=generic+v8_2a+bf16",)}


def kernel_sources() -> list[Path]:
    return [p for p in sorted(ISA.glob("*.cpp")) if not p.name.startswith(("avx", "amx"))]


def sources_of(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / "src" / folder).glob("*.cpp"))]


def qemu() -> str:
    """The emulator. Without one the test is skipped, or fails where UMFA_NEED_ARM64 is set."""
    found = os.environ.get("QEMU_AARCH64") or next(
        filter(None, map(shutil.which, ("qemu-aarch64", "qemu-aarch64-static"))), None
    )
    if found is not None and importlib.util.find_spec("ziglang"):
        return found
    missing = "no ziglang" if found else "no qemu-aarch64; see tests/cpu/arm64.py"
    if os.environ.get("UMFA_NEED_ARM64"):
        pytest.fail(missing)
    pytest.skip(missing)


def zig(*arguments: str | Path) -> None:
    """Compiles or links."""
    _run_zig("c++", *FLAGS, *arguments)


def _run_zig(*arguments: str | Path) -> None:
    cache = cache_folder() / "zig"
    cache.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "ziglang", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "ZIG_GLOBAL_CACHE_DIR": str(cache),
            "ZIG_LOCAL_CACHE_DIR": str(cache / "local"),
        },
    )
    assert done.returncode == 0, done.stderr


def build_attend(work: Path) -> Path:
    """attend.cpp with the whole CPU backend.

    Routing asks Metal's planner what it could do. Metal's sources are linked as a library: those
    that nothing asks for would need the texts of the shaders.
    """
    objects, metal = [], []
    plain = [*sources_of("core", "capi", "cpu"), Path(__file__).parent / "attend.cpp"]
    sources = [
        *((source, ("-O2",)) for source in (*plain, *sources_of("metal"))),
        *((source, KERNEL_FLAGS + EXTENSIONS.get(source.name, ())) for source in kernel_sources()),
    ]
    for source, flags in sources:
        kind = metal if source.parent.name == "metal" else objects
        kind.append(work / f"{source.stem}-{len(objects) + len(metal)}.o")
        zig(*flags, "-c", source, "-o", kind[-1])
    _run_zig("ar", "rc", work / "libmetal.a", *metal)
    zig(*objects, work / "libmetal.a", "-o", work / "attend")
    return work / "attend"


def build_kernel_math(work: Path, isa: str) -> Path:
    """kernel_math.cpp with the vector functions of one instruction set."""
    objects = []
    kernel_file = f'-DKERNEL_FILE="cpu/isa/{isa}.cpp"'
    sources = [(Path(__file__).parent / "kernel_math.cpp", f"{isa}.cpp")]
    if isa != "neon":
        sources.append((ISA / "neon.cpp", "neon.cpp"))  # what it falls back to
    without_tables = ("-iquote", Path(__file__).with_name("without_tables"))
    for source, name in sources:
        objects.append(work / f"{source.stem}.o")
        flags = KERNEL_FLAGS + EXTENSIONS.get(name, ())
        zig(*without_tables, *flags, kernel_file, "-c", source, "-o", objects[-1])
    zig(*objects, "-o", work / "kernel_math")
    return work / "kernel_math"


def run(
    program: Path, *arguments: str, cpu: str = "max", stdin: bytes = b"", isa: str = "auto"
) -> bytes:
    """What the program writes, run on an emulated CPU of that name."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("UMFA_")}
    done = subprocess.run(
        [qemu(), "-cpu", cpu, program, *arguments],
        input=stdin,
        capture_output=True,
        check=False,
        timeout=300,
        env={**environment, "UMFA_CPU_ISA": isa, "UMFA_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, f"status {done.returncode}: {done.stderr.decode()}"
    return done.stdout
