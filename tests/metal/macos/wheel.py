"""A wheel of umfa for arm64 macOS, built on Linux with zig, and what is in it.

    python tests/metal/macos/wheel.py FOLDER

The wheel is scikit-build-core's, from the CMakeLists.txt as macOS has it; only the tools are
stand-ins (toolchain.py). It holds the kernels as text, and no metallib. Nothing of it is run, and
it is not for publication: its Metal headers are the double's. What it shows is that the package for
macOS is whole. Every finding is printed, and the exit status is 1 if there is one.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from email.parser import Parser
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))  # pytest has it from pyproject.toml

from tests.metal.macos import cross, macho, toolchain

TAG = f"cp310-abi3-macosx_{cross.FLOOR.replace('.', '_')}_arm64"
STUB = cross.ROOT / "tests" / "bindings" / "_ext.pyi.ref"
LIBRARY, EXTENSION = "umfa/libumfa.dylib", "umfa/_ext.abi3.so"


def build(folder: Path, work: Path) -> Path:
    """The wheel, in `folder`; `work` is for what the build leaves."""
    environment = cross.environment()
    tools = toolchain.write_toolchain(work / "tools")
    environment["PATH"] = f"{tools.parent}:{environment['PATH']}"
    environment["_PYTHON_HOST_PLATFORM"] = f"macosx-{cross.FLOOR}-arm64"
    settings = {
        "build-dir": work / "build",
        "cmake.toolchain-file": tools,
        "cmake.define.UMFA_STUB": STUB,
        "install.strip": "false",  # the strip of Linux knows no Mach-O
    }
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"),
            *(f"--config-settings={name}={value}" for name, value in settings.items()),
            *("--wheel-dir", str(folder), str(cross.ROOT)),
        ],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(done.stdout)
    (wheel,) = folder.glob("umfa-*.whl")
    return wheel


def native_metadata(work: Path) -> str:
    """METADATA of a wheel for this machine."""
    hook = "from scikit_build_core.build import prepare_metadata_for_build_wheel as f; f({!r})"
    work.mkdir()
    subprocess.run(
        [sys.executable, "-c", hook.format(str(work))],
        cwd=cross.ROOT,
        check=True,
        capture_output=True,
    )
    (metadata,) = work.glob("*.dist-info/METADATA")
    return metadata.read_text(encoding="utf-8")


def python_symbols() -> set[str]:
    """Those that may stay undefined: nanobind's list for Apple's linker."""
    import nanobind  # a build requirement, which those who only test need not have

    text = (Path(nanobind.cmake_dir()) / "darwin-ld-cpython.sym").read_text()
    return {line.removeprefix("-U ") for line in text.splitlines()}


def check_binary(path: Path, needed: set[str]) -> list[str]:
    """What is wrong with one of the two."""
    image = macho.read(path)
    foreign = image.undefined.get(macho.DYNAMIC_LOOKUP, set()) - python_symbols()
    findings = {
        "is not for arm64": not image.arm64,
        "carries no signature": not image.signed,
        f"is for macOS {image.minimum_macos}": image.minimum_macos != cross.FLOOR,
        f"needs {sorted(image.libraries)}": set(image.libraries) != needed,
        f"looks up {sorted(foreign)}": foreign,
        f"searches {image.rpaths}": not set(image.rpaths) <= {"@loader_path"},
        f"calls itself {image.name}": image.name not in (path.name, f"@rpath/{path.name}"),
    }
    return [f"{path.name} {finding}" for finding, found in findings.items() if found]


def check_paths(unpacked: Path, private: list[Path]) -> list[str]:
    """Files in which a folder of this machine is written."""
    return [
        f"{path.relative_to(unpacked)} names {folder}"
        for path in sorted(unpacked.rglob("*"))
        if path.is_file()
        for folder in private
        if str(folder).encode() in path.read_bytes()
    ]


def check_contents(unpacked: Path, metadata: str) -> list[str]:
    (info,) = unpacked.glob("umfa-*.dist-info")
    tags = Parser().parsestr((info / "WHEEL").read_text()).get_all("Tag")
    files = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*")}
    sources = {
        f"umfa/{path.relative_to(cross.ROOT / 'python' / 'umfa').as_posix()}"
        for path in (cross.ROOT / "python" / "umfa").rglob("*")
        if path.suffix in (".py", ".typed")
    }
    headers = {f"umfa/include/umfa/{p.name}" for p in (cross.ROOT / "include/umfa").glob("*.h")}
    missing = {*sources, *headers, LIBRARY, EXTENSION, "umfa/_ext.pyi"} - files
    library = (unpacked / LIBRARY).read_bytes()
    findings = {
        f"WHEEL has the tags {tags}": tags != [TAG],
        "METADATA differs from that of a native wheel": (info / "METADATA").read_text(
            encoding="utf-8"
        )
        != metadata,
        f"{sorted(missing)} are missing": missing,
        f"{LIBRARY} has no text of the kernels": b"#include <metal_stdlib>" not in library,
    }
    return [finding for finding, found in findings.items() if found]


def check(wheel: Path, work: Path) -> list[str]:
    """What is wrong with the wheel; nothing, one hopes."""
    unpacked = work / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    findings = [] if wheel.name.endswith(f"-{TAG}.whl") else [f"the name is {wheel.name}"]
    findings += check_contents(unpacked, native_metadata(work / "native"))
    findings += check_binary(unpacked / LIBRARY, cross.MAY_NEED)
    findings += check_binary(unpacked / EXTENSION, {"@rpath/libumfa.dylib", cross.SYSTEM})
    findings += check_paths(unpacked, [cross.ROOT, work, Path(sys.prefix), Path.home()])
    for command in (("abi3audit", "--strict", "--report"), ("check-wheel-contents",)):
        tool = shutil.which(command[0], path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        if tool is None:
            findings.append(f"{command[0]} is not installed (pip install '.[ci]')")
            continue
        done = subprocess.run(
            [tool, *command[1:], str(wheel)], capture_output=True, text=True, check=False
        )
        print(f"{command[0]}: {done.stdout.strip()}")
        if done.returncode != 0:
            findings.append(f"{command[0]}: {done.stdout}{done.stderr}")
    return findings


def listing(wheel: Path, unpacked: Path) -> str:
    """The wheel's files with their sizes, and what its two binaries need."""
    lines = [f"{wheel.name}: {wheel.stat().st_size} bytes"]
    with zipfile.ZipFile(wheel) as archive:
        lines += [f"{entry.file_size:>10}  {entry.filename}" for entry in archive.infolist()]
    for name in (LIBRARY, EXTENSION):
        image = macho.read(unpacked / name)
        lines.append(
            f"{name}: arm64, macOS >= {image.minimum_macos}, "
            f"{'signed' if image.signed else 'not signed'}, rpaths {image.rpaths}"
        )
        for library, symbols in sorted(image.undefined.items()):
            shown = " ".join(sorted(symbols)) if len(symbols) <= 12 else f"{len(symbols)} symbols"
            lines.append(f"    {library}: {shown}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where the wheel is written")
    folder = parser.parse_args().folder.resolve()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        made = build(work / "wheel", work)
        findings = check(made, work)
        print(listing(made, work / "unpacked"))
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy2(made, folder)
    print(*(f"wrong: {finding}" for finding in findings), sep="\n", end="\n" if findings else "")
    return int(bool(findings))


if __name__ == "__main__":
    sys.exit(main())
