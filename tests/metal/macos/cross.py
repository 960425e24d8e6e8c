"""Compiles and links all of umfa for arm64 macOS on Linux, with PyPI's ``ziglang``.

zig brings clang, a linker, a C++ library and Apple's libSystem; the headers of Foundation, Metal
and IOKit are those of the double, and what is linked is a list of symbols (``stubs/``), which
thereby is the list of what umfa may use. Nothing is run, and nothing built here is shipped: macOS
wheels are made on macOS.
"""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
import sysconfig
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tools.metal.emulator.build import cache_folder

ROOT = Path(__file__).parents[3]
HEADERS = ROOT / "tools" / "metal" / "double" / "include"
STUBS = Path(__file__).parent / "stubs"
FLOOR = "14.0"
TARGET = ("-target", f"aarch64-macos.{FLOOR}")

METAL = "/System/Library/Frameworks/Metal.framework/Versions/A/Metal"
FOUNDATION = "/System/Library/Frameworks/Foundation.framework/Versions/C/Foundation"
CORE_GRAPHICS = "/System/Library/Frameworks/CoreGraphics.framework/Versions/A/CoreGraphics"
IO_KIT = "/System/Library/Frameworks/IOKit.framework/Versions/A/IOKit"
SYSTEM, OBJC = "/usr/lib/libSystem.B.dylib", "/usr/lib/libobjc.A.dylib"
MAY_NEED = {METAL, FOUNDATION, CORE_GRAPHICS, IO_KIT, SYSTEM, OBJC}
# What the frameworks export, as far as umfa may use it.
STUBBED = (
    *(f"-F{STUBS / 'frameworks'}", f"-L{STUBS / 'lib'}", "-lobjc"),
    *("-framework", "Metal", "-framework", "Foundation", "-framework", "CoreGraphics"),
    *("-framework", "IOKit"),
)

CXX = (
    *("-std=c++20", "-O2", "-DNDEBUG", "-fvisibility=hidden", "-fvisibility-inlines-hidden"),
    *("-Wall", "-Wextra", "-Werror", "-fno-sanitize=undefined"),
    # zig's Darwin math.h takes two macros of float.h, and zig's C++ library then thinks it has all.
    *("-include", "float.h"),
    *(f"-I{ROOT / folder}" for folder in ("include", "src", "shaders")),
)
CORE = (*CXX, "-DUMFA_BUILDING", '-DUMFA_VERSION="0"')
# Names of methods and the availability of what is used: an error here, a crash on an older Mac.
HOST = (
    *("-x", "objective-c++", "-fobjc-arc", f"-I{HEADERS}"),
    *("-Wunguarded-availability-new", "-Wobjc-method-access"),
)


def extension_flags() -> tuple[str, ...]:
    """Those of nanobind_add_module(... BACKEND_MODULE nanobind_backend)."""
    import nanobind  # a build requirement, which those who only test need not have

    return (
        *CXX,
        *("-DNB_BACKEND_MODULE=nanobind_backend", "-DNB_BACKEND_PYPI=nanobind-backend"),
        *("-DPy_LIMITED_API=0x030A0000", "-fno-strict-aliasing", "-Wno-unused-const-variable"),
        *("-isystem", sysconfig.get_path("include"), "-isystem", nanobind.include_dir()),
    )


def environment() -> dict[str, str]:
    """This process's, with what zig keeps beside what the emulator keeps."""
    cache = cache_folder() / "zig"
    cache.mkdir(parents=True, exist_ok=True)
    return {
        **os.environ,
        "ZIG_GLOBAL_CACHE_DIR": str(cache),
        "ZIG_LOCAL_CACHE_DIR": str(cache / "local"),
    }


def zig(*arguments: str) -> subprocess.CompletedProcess[str]:
    """``zig c++`` for macOS."""
    return subprocess.run(
        [sys.executable, "-m", "ziglang", "c++", *TARGET, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
    )


def kernel_flags(source: Path) -> tuple[str, ...]:
    """What CMakeLists.txt gives this file alone, in zig's words."""
    return ("-mcpu=apple_m1+bf16",) if source.name == "neon_bf16.cpp" else ()


def core_sources() -> list[Path]:
    """What CMakeLists.txt compiles on an arm64 Mac."""
    source = ROOT / "src"
    found = [
        path
        for folder in ("core", "capi", "cpu", "cpu/isa", "metal")
        for path in (source / folder).glob("*.cpp")
        if not path.name.startswith(("avx", "amx")) and path.name != "unavailable.cpp"
    ]
    return sorted([*found, *host_sources()])


def host_sources() -> list[Path]:
    return sorted((ROOT / "src" / "metal").glob("*.mm"))


def extension_sources() -> list[Path]:
    return sorted((ROOT / "src" / "python").glob("*.cpp"))


class CompileError(Exception):
    """The compiler's or the linker's words."""


def compile_one(source: Path, output: Path, *flags: str) -> Path:
    done = zig(*flags, "-c", str(source), "-o", str(output))
    if done.returncode != 0:
        raise CompileError(f"{source}:\n{done.stderr}")
    return output


def link(output: Path, objects: list[Path], *flags: str) -> Path:
    # Not -bundle, on which zig's linker crashes; a bundle and a library differ in a header field.
    done = zig("-shared", *flags, *map(str, objects), "-o", str(output))
    if done.returncode != 0:
        raise CompileError(done.stderr)
    return output


def build(work: Path) -> tuple[Path, Path]:
    """(libumfa.dylib, _ext.abi3.so)."""
    embedded = work / "embedded.cpp"
    subprocess.run([sys.executable, str(ROOT / "shaders" / "embed.py"), str(embedded)], check=True)
    jobs = [
        *(
            (source, CORE + kernel_flags(source) + (HOST if source.suffix == ".mm" else ()))
            for source in core_sources()
        ),
        (embedded, CORE),
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:

        def one(job: tuple[int, tuple[Path, tuple[str, ...]]]) -> Path:
            number, (source, flags) = job
            return compile_one(source, work / f"{number}-{source.name}.o", *flags)

        objects = list(pool.map(one, enumerate(jobs)))
        library = link(
            work / "libumfa.dylib",
            objects,
            *("-install_name", "@rpath/libumfa.dylib"),
            *STUBBED,
            "-Wl,-dead_strip_dylibs",  # as some distributions have it in LDFLAGS
        )
        flags = extension_flags()
        door = list(pool.map(one, enumerate(((s, flags) for s in extension_sources()), len(jobs))))
    extension = link(
        work / "_ext.abi3.so",
        [*door, library],
        *("-Wl,-undefined,dynamic_lookup", "-Wl,-dead_strip", "-Wl,-rpath,@loader_path"),
    )
    return library, extension


def wheel(folder: Path, library: Path, extension: Path) -> Path:
    """A wheel as the macOS runner would make it, apart from what is in the two binaries."""
    name, version = "umfa", "0.1.0"
    info = f"{name}-{version}.dist-info"
    tag = f"cp310-abi3-macosx_{FLOOR.replace('.', '_')}_arm64"
    files: dict[str, bytes] = {
        f"umfa/{path.relative_to(ROOT / 'python' / 'umfa').as_posix()}": path.read_bytes()
        for path in sorted((ROOT / "python" / "umfa").rglob("*"))
        if path.is_file() and path.suffix in (".py", ".typed")
    }
    for path in sorted((ROOT / "include" / "umfa").glob("*.h")):
        files[f"umfa/include/umfa/{path.name}"] = path.read_bytes()
    files["umfa/libumfa.dylib"] = library.read_bytes()
    files["umfa/_ext.abi3.so"] = extension.read_bytes()
    files[f"{info}/METADATA"] = (
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode()
    )
    files[f"{info}/WHEEL"] = (
        f"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: false\nTag: {tag}\n".encode()
    )
    record = ""
    for path_, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        record += f"{path_},sha256={digest},{len(data)}\n"
    files[f"{info}/RECORD"] = (record + f"{info}/RECORD,,\n").encode()
    made = folder / f"{name}-{version}-{tag}.whl"
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for path_, data in files.items():
            archive.writestr(path_, data)
    return made
