"""The macOS build as CMake has it: the real CMakeLists.txt, configured for Darwin on Linux.

The compiler is zig's clang, and ``xcrun`` a script that writes down what it is asked. The kernels
that it "compiles" are text: what is shown is what the build asks of Apple's compiler and where the
answer goes, not what that compiler would say.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import cross
import emulated
import macho
import pytest

pytestmark = pytest.mark.skipif(
    not (shutil.which("cmake") and shutil.which("ninja")), reason="needs cmake and ninja"
)

# What Apple's compiler is asked for: the language and the macOS that are promised, and the safe
# mathematics that src/metal/library.mm chooses for the text.
METAL_FLAGS = "-std=metal3.1 -mmacosx-version-min=14.0 -O2 -fno-fast-math -Wall -Wextra"
SHADERS = sorted(cross.ROOT.glob("shaders/*.metal"))

XCRUN = """#!/bin/sh
echo "$*" >> {log}
case "$*" in
"--sdk macosx --find metal") echo /stand-in/metal; exit {found};;
"--sdk macosx metal --version") exit {works};;
"--sdk macosx metal -std="* | "--sdk macosx metallib "*)
    for output; do :; done
    printf 'MTLB of %s' "$*" > "$output";;
*) exit 1;;
esac
"""
# Apple's clang takes -march for a file that needs more than its CPU; zig has -mcpu for that.
COMPILER = """#!/bin/sh
for word in "$@"; do
    shift
    case "$word" in
    -march=armv8.2-a+bf16) word=-mcpu=apple_m1+bf16;;
    esac
    set -- "$@" "$word"
done
exec {zig} {flags} "$@"
"""


@dataclass
class Mac:
    """A folder of stand-ins for the tools of a Mac, and a build that finds them."""

    folder: Path

    @classmethod
    def made(cls, folder: Path, *, found: bool, works: bool) -> Mac:
        mac = cls(folder)
        (folder / "bin").mkdir()
        log = folder / "xcrun.log"
        log.touch()
        mac._tool("xcrun", XCRUN.format(log=log, found=int(not found), works=int(not works)))
        mac._tool("install_name_tool", "#!/bin/sh\n")
        flags = (
            *(*cross.TARGET, "-fno-sanitize=undefined", "-include", "float.h"),
            *(f"-I{cross.HEADERS}", f"-F{cross.STUBS / 'frameworks'}"),
            *(f"-L{cross.STUBS / 'lib'}", "-lobjc", "-Wno-unused-command-line-argument"),
        )
        zig = shlex.join([sys.executable, "-m", "ziglang", "c++"])
        mac._tool("c++", COMPILER.format(zig=zig, flags=shlex.join(flags)))
        return mac

    def _tool(self, name: str, text: str) -> None:
        tool = self.folder / "bin" / name
        tool.write_text(text)
        tool.chmod(0o755)

    @property
    def build(self) -> Path:
        return self.folder / "build"

    def run(self, *arguments: str) -> str:
        environment = cross.environment()
        environment["PATH"] = f"{self.folder / 'bin'}:{environment['PATH']}"
        done = subprocess.run(
            arguments,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def configure(self, *options: str) -> str:
        nanobind = pytest.importorskip("nanobind")
        compiler = self.folder / "bin" / "c++"
        return self.run(
            *("cmake", "-S", str(cross.ROOT), "-B", str(self.build), "-G", "Ninja"),
            "-DCMAKE_SYSTEM_NAME=Darwin",
            f"-DCMAKE_OSX_DEPLOYMENT_TARGET={cross.FLOOR}",
            "-DCMAKE_OSX_ARCHITECTURES=arm64",
            f"-DCMAKE_CXX_COMPILER={compiler}",
            f"-DCMAKE_OBJCXX_COMPILER={compiler}",
            # CMake's trials need not link, for which zig would first build a C++ library.
            "-DCMAKE_TRY_COMPILE_TARGET_TYPE=STATIC_LIBRARY",
            "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dnanobind_DIR={nanobind.cmake_dir()}",
            *options,
        )

    def make(self, target: str) -> None:
        self.run("cmake", "--build", str(self.build), "--target", target)

    def asked_of_xcrun(self) -> list[str]:
        return (self.folder / "xcrun.log").read_text().splitlines()

    def commands(self) -> dict[str, list[str]]:
        """Of each source of libumfa, by its name, the compiler's arguments."""
        entries = json.loads((self.build / "compile_commands.json").read_text())
        return {
            Path(entry["file"]).name: shlex.split(entry["command"])
            for entry in entries
            if "libumfa.dir" in entry["command"]
        }


def embedded(mac: Mac) -> tuple[str, bytes]:
    """(the C++ file that holds the shaders, the metallib in it)."""
    mac.make("embedded_shaders.cpp")
    text = (mac.build / "embedded_shaders.cpp").read_text()
    data = re.search(r"metallib_bytes\[\] = \{([\d, ]*)\}", text)
    size = re.search(r"\(metallib_bytes\), (\d+)\}", text)
    assert data is not None
    assert size is not None
    return text, bytes(map(int, data[1].split(",")))[: int(size[1])]


def assert_texts_are_there(text: str) -> None:
    for source in SHADERS:
        assert emulated.embed.flatten(source.name)[:12000] in text


def test_kernels_are_compiled_ahead(tmp_path: Path) -> None:
    mac = Mac.made(tmp_path, found=True, works=True)
    assert "Metal compiler: /stand-in/metal" in mac.configure()
    text, metallib = embedded(mac)
    asked = mac.asked_of_xcrun()
    objects = [str(mac.build / f"{source.stem}.air") for source in SHADERS]
    for source, output in zip(SHADERS, objects, strict=True):
        assert (
            f"--sdk macosx metal {METAL_FLAGS} -I {cross.ROOT / 'shaders'} -c {source} -o {output}"
        ) in asked
    link = f"--sdk macosx metallib {' '.join(objects)} -o {mac.build / 'umfa.metallib'}"
    assert link in asked
    assert metallib == f"MTLB of {link}".encode()
    assert_texts_are_there(text)


@pytest.mark.parametrize("found", [False, True], ids=["no tool", "a placeholder of one"])
def test_without_apples_compiler_the_text_is_carried(found: bool, tmp_path: Path) -> None:
    mac = Mac.made(tmp_path, found=found, works=False)
    assert "No Metal compiler: kernels will be compiled from their text" in mac.configure()
    text, metallib = embedded(mac)
    assert metallib == b""
    assert_texts_are_there(text)
    assert not [line for line in mac.asked_of_xcrun() if " -c " in line or "metallib" in line]


def test_how_the_host_is_compiled(tmp_path: Path) -> None:
    mac = Mac.made(tmp_path, found=False, works=False)
    mac.configure()  # AUTO, which is ON here
    commands = mac.commands()
    host = {source.name for source in cross.host_sources()}
    assert {name for name in commands if name.endswith(".mm")} == host
    for name in host:
        assert {
            *("-std=c++20", "-fobjc-arc", "-fvisibility=hidden", "-Wunguarded-availability-new"),
            *("-DUMFA_HAS_METAL", f"-mmacosx-version-min={cross.FLOOR}"),
        } <= set(commands[name]), name
    assert "-DUMFA_HAS_METAL" in commands["dispatch.cpp"]
    built = {source.name for source in cross.core_sources()}
    assert set(commands) == {*built, "embedded_shaders.cpp"}, "what cross.py compiles, too"


def test_off(tmp_path: Path) -> None:
    mac = Mac.made(tmp_path, found=True, works=True)
    mac.configure("-DUMFA_METAL=OFF")
    commands = mac.commands()
    assert not [name for name in commands if name.endswith(".mm")]
    assert "-DUMFA_HAS_METAL" not in commands["dispatch.cpp"]
    assert embedded(mac)[1] == b"", "the text is always there, and is enough without a GPU"


@pytest.mark.parametrize(
    ("system", "choice", "message"),
    [
        ("Linux", "ON", "UMFA_METAL=ON needs macOS"),
        ("Darwin", "DOUBLE", "UMFA_METAL=DOUBLE is for Linux"),
        ("Linux", "on", "UMFA_METAL is 'on'; expected AUTO, ON, OFF or DOUBLE"),
    ],
)
def test_choices_that_make_no_sense(system: str, choice: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.24)\nproject(choice LANGUAGES NONE)\n"
        f"include({cross.ROOT / 'cmake' / 'metal.cmake'})\n"
    )
    done = subprocess.run(
        [
            *("cmake", "-S", str(tmp_path), "-B", str(tmp_path / "build"), "-G", "Ninja"),
            *(f"-DCMAKE_SYSTEM_NAME={system}", f"-DUMFA_METAL={choice}"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert message in done.stderr


def test_the_workflow_compiles_as_the_build_does() -> None:
    workflow = (cross.ROOT / ".github" / "workflows" / "wheels.yml").read_text()
    step = re.sub(r"\\\n\s*", "", workflow)
    assert f"xcrun --sdk macosx metal {METAL_FLAGS} -Werror" in step


@pytest.mark.slow
def test_the_library_links(tmp_path: Path) -> None:
    mac = Mac.made(tmp_path, found=True, works=True)
    mac.configure("-DUMFA_METAL=ON")
    mac.make("libumfa")
    library = mac.build / "libumfa.dylib"
    image = macho.read(library)
    assert image.arm64
    assert image.minimum_macos == cross.FLOOR
    assert set(image.libraries) == cross.MAY_NEED
    assert b"MTLB of" in library.read_bytes()
    assert b"#include <metal_stdlib>" in library.read_bytes()
