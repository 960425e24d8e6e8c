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

import pytest

from tests.metal import emulated
from tests.metal.macos import cross, macho, toolchain

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
*{failing}*)
    for output; do :; done
    echo "half of one" > "$output"
    echo "kernel.metal:1:1: error: planted" >&2
    exit 1;;
"--sdk macosx metal -std="* | "--sdk macosx metallib "*)
    for output; do :; done
    printf 'MTLB of %s' "$*" > "$output";;
*) exit 1;;
esac
"""


@dataclass
class Mac:
    """A folder of stand-ins for the tools of a Mac, and a build that finds them."""

    folder: Path

    @classmethod
    def made(cls, folder: Path, *, found: bool, works: bool, failing: str = "none") -> Mac:
        """`failing`: a part of the commands that xcrun fails at."""
        mac = cls(folder)
        (folder / "bin").mkdir()
        (folder / "xcrun.log").touch()
        mac.install_xcrun(found=found, works=works, failing=failing)
        mac._tool("install_name_tool", "#!/bin/sh\n")
        toolchain.write_compiler(folder / "bin" / "c++")
        return mac

    def install_xcrun(self, *, found: bool, works: bool, failing: str = "none") -> None:
        text = XCRUN.format(
            log=shlex.quote(str(self.folder / "xcrun.log")),
            found=int(not found),
            works=int(not works),
            failing=failing.replace(" ", "\\ "),
        )
        self._tool("xcrun", text)

    def _tool(self, name: str, text: str) -> None:
        toolchain.write_tool(self.folder / "bin" / name, text)

    @property
    def build(self) -> Path:
        return self.folder / "build"

    def run(self, *arguments: str, fails: bool = False) -> str:
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
        assert (done.returncode != 0) == fails, done.stdout
        return done.stdout

    def configure(self, *options: str, fails: bool = False) -> str:
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
            fails=fails,
        )

    def make(self, target: str, *, fails: bool = False) -> str:
        """What the build says."""
        return self.run("cmake", "--build", str(self.build), "--target", target, fails=fails)

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


OBJECT = "CMakeFiles/libumfa.dir/embedded_shaders.cpp.o"


def embedded(mac: Mac) -> tuple[str, bytes]:
    """(the C++ file that holds the shaders, the metallib in the object that comes of it)."""
    mac.make(OBJECT)
    text = (mac.build / "embedded_shaders.cpp").read_text()
    size = re.search(r"return \{umfa_metallib, (\d+)\};", text)
    compiled = mac.build / OBJECT
    image = macho.read(compiled)
    assert (size is not None) == ("_umfa_metallib" in image.defined)
    return text, image.content(compiled, "_umfa_metallib", int(size[1])) if size else b""


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


FAILURES = [
    pytest.param("decode.metal", id="a kernel"),
    pytest.param("macosx metallib", id="the linker", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("failing", FAILURES)
def test_a_compiler_that_fails_does_not_fail_the_build(failing: str, tmp_path: Path) -> None:
    mac = Mac.made(tmp_path, found=True, works=True, failing=failing)
    mac.configure()
    said = mac.make(OBJECT)
    assert "kernel.metal:1:1: error: planted" in said
    assert "umfa: Apple's Metal compiler failed: status 1 of: xcrun --sdk macosx metal" in said
    assert "umfa: the kernels are not compiled ahead. The library holds their text" in said
    text, metallib = embedded(mac)
    assert metallib == b""
    assert_texts_are_there(text)

    assert "error: planted" in mac.make(OBJECT), "it is tried again, and said again"
    mac.install_xcrun(found=True, works=True)
    assert "umfa: " not in mac.make(OBJECT)
    assert embedded(mac)[1].startswith(b"MTLB of --sdk macosx metallib ")


@pytest.mark.slow
def test_a_compiler_that_is_gone_does_not_fail_the_build(tmp_path: Path) -> None:
    mac = Mac.made(tmp_path, found=True, works=True)
    mac.configure()
    (tmp_path / "bin" / "xcrun").unlink()
    said = mac.make(OBJECT)
    assert "umfa: Apple's Metal compiler failed: xcrun does not start: No such file" in said
    assert embedded(mac)[1] == b""


@pytest.mark.slow
@pytest.mark.parametrize("failing", FAILURES)
def test_a_metallib_that_no_longer_compiles_is_not_kept(failing: str, tmp_path: Path) -> None:
    mac = Mac.made(tmp_path, found=True, works=True)
    mac.configure()
    assert embedded(mac)[1] != b""
    mac.install_xcrun(found=True, works=True, failing=failing)
    (mac.build / "decode.air").unlink()  # a build that was interrupted when it began to compile
    assert embedded(mac)[1] == b""
    assert not (mac.build / "umfa.metallib").exists()


@pytest.mark.parametrize("failing", FAILURES)
def test_metallib_on_makes_a_failure_an_error(failing: str, tmp_path: Path) -> None:
    mac = Mac.made(tmp_path, found=True, works=True, failing=failing)
    mac.configure("-DUMFA_METALLIB=ON")
    said = mac.make(OBJECT, fails=True)
    assert "kernel.metal:1:1: error: planted" in said
    assert "umfa: UMFA_METALLIB=ON makes this an error; AUTO goes on without." in said
    assert "The library holds their text" not in said


@pytest.mark.slow
def test_metallib_on(tmp_path: Path) -> None:
    mac = Mac.made(tmp_path, found=True, works=True)
    mac.configure("-DUMFA_METALLIB=ON")
    assert embedded(mac)[1].startswith(b"MTLB of --sdk macosx metallib ")


@pytest.mark.parametrize("found", [False, True], ids=["no tool", "a placeholder of one"])
def test_metallib_on_needs_the_compiler(found: bool, tmp_path: Path) -> None:
    mac = Mac.made(tmp_path, found=found, works=False)
    said = mac.configure("-DUMFA_METALLIB=ON", fails=True)
    assert "UMFA_METALLIB=ON needs Apple's Metal compiler" in said
    assert "xcodebuild -downloadComponent" in said


def test_metallib_off_does_not_ask(tmp_path: Path) -> None:
    mac = Mac.made(tmp_path, found=True, works=True)
    mac.configure("-DUMFA_METALLIB=OFF")
    text, metallib = embedded(mac)
    assert metallib == b""
    assert_texts_are_there(text)
    assert not [line for line in mac.asked_of_xcrun() if "metal" in line]
    assert [name for name in mac.commands() if name.endswith(".mm")], "the host is compiled"


def test_how_the_host_is_compiled(tmp_path: Path) -> None:
    mac = Mac.made(tmp_path, found=False, works=False)
    mac.configure()  # AUTO, which is ON here
    commands = mac.commands()
    host = {source.name for source in cross.host_sources()}
    assert {name for name in commands if name.endswith(".mm")} == host
    for name in host:
        assert {
            *("-std=c++20", "-fobjc-arc", "-fvisibility=hidden", "-Wunguarded-availability-new"),
            f"-mmacosx-version-min={cross.FLOOR}",
        } <= set(commands[name]), name
    assert "unavailable.cpp" not in commands
    linked = (mac.build / "build.ninja").read_text()
    for framework in ("Metal", "Foundation", "CoreGraphics", "IOKit"):
        assert f"-framework {framework}" in linked
    built = {source.name for source in cross.core_sources()}
    assert set(commands) == {*built, "embedded_shaders.cpp"}, "what cross.py compiles, too"


def test_off(tmp_path: Path) -> None:
    mac = Mac.made(tmp_path, found=True, works=True)
    mac.configure("-DUMFA_METAL=OFF")
    commands = mac.commands()
    assert not [name for name in commands if name.endswith(".mm")]
    assert "unavailable.cpp" in commands
    assert embedded(mac)[1] == b"", "the text is always there, and is enough without a GPU"


@pytest.mark.parametrize(
    ("system", "choice", "message"),
    [
        ("Linux", "METAL=ON", "UMFA_METAL=ON needs macOS"),
        ("Darwin", "METAL=DOUBLE", "UMFA_METAL=DOUBLE is for Linux"),
        ("Linux", "METAL=on", "UMFA_METAL is 'on'; expected AUTO, ON, OFF or DOUBLE"),
        ("Darwin", "METALLIB=YES", "UMFA_METALLIB is 'YES'; expected AUTO, ON or OFF"),
        ("Linux", "METALLIB=ON", "UMFA_METALLIB=ON needs the Metal backend; UMFA_METAL is 'AUTO'"),
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
            *(f"-DCMAKE_SYSTEM_NAME={system}", "-DUMFA_METAL=AUTO", f"-DUMFA_{choice}"),
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


def test_wheels_are_made_with_a_metallib_or_not_at_all() -> None:
    project = (cross.ROOT / "pyproject.toml").read_text()
    assert re.findall('CMAKE_ARGS = "(.*)"', project) == ["-DUMFA_METAL=ON -DUMFA_METALLIB=ON"]


@pytest.mark.nightly  # `.ci/run wheel` links it too
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
