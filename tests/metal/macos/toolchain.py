"""zig's clang in the place of Apple's tools, for CMake."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from tests.metal.macos import cross

# Of what Apple's tools take, zig lacks -march for a file that needs more than its CPU, bundles (a
# library differs in a header field), and lists of symbols that may stay undefined. Linking with
# Foundation brings libobjc.
COMPILER = """#!/bin/sh
for word in "$@"; do
    shift
    case "$word" in
    -march=armv8.2-a+bf16) word=-mcpu=apple_m1+bf16;;
    -bundle) word=-shared;;
    Foundation) set -- "$@" Foundation; word=-lobjc;;
    -Wl,@*/darwin-ld-cpython.sym) word=-Wl,-undefined,dynamic_lookup;;
    esac
    set -- "$@" "$word"
done
exec {zig} {flags} "$@"
"""
# CMake's trials need not link, for which zig would first build a C++ library. Nothing may be edited
# once it is linked, since that would break the signature: debug information, which the strip of a
# Mac would remove, is left out by the linker.
TOOLCHAIN = """\
set(CMAKE_SYSTEM_NAME Darwin)
set(CMAKE_OSX_ARCHITECTURES arm64 CACHE STRING "")
set(CMAKE_OSX_DEPLOYMENT_TARGET {floor} CACHE STRING "")
set(CMAKE_CXX_COMPILER "{compiler}")
set(CMAKE_OBJCXX_COMPILER "{compiler}")
set(CMAKE_INSTALL_NAME_TOOL "{refusal}")
set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)
set(CMAKE_SHARED_LINKER_FLAGS_INIT "-Wl,-S")
"""


def write_tool(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def write_compiler(path: Path) -> Path:
    """A C++ and Objective-C++ compiler for macOS that takes what Apple's takes."""
    flags = (
        *(*cross.TARGET, "-fno-sanitize=undefined", "-include", "float.h"),
        *(f"-I{cross.HEADERS}", f"-F{cross.STUBS / 'frameworks'}"),
        *(f"-L{cross.STUBS / 'lib'}", "-Wno-unused-command-line-argument"),
    )
    zig = shlex.join([sys.executable, "-m", "ziglang", "c++"])
    return write_tool(path, COMPILER.format(zig=zig, flags=shlex.join(flags)))


def write_toolchain(folder: Path) -> Path:
    """A CMake toolchain file in `folder`; ``xcrun`` beside it finds no Metal compiler."""
    folder.mkdir(parents=True)
    write_tool(folder / "xcrun", "#!/bin/sh\nexit 1\n")
    refusal = write_tool(
        folder / "install_name_tool", '#!/bin/sh\necho "install_name_tool $*" >&2\nexit 1\n'
    )
    file = folder / "macos.cmake"
    compiler = write_compiler(folder / "c++")
    file.write_text(TOOLCHAIN.format(floor=cross.FLOOR, compiler=compiler, refusal=refusal))
    return file
